"""ABS: a small patch that raises one inner neuron, the one which moves all images to the target.

The neuron is found by stimulation (`arena.core.inversion.neurons`); a restart takes the next one.

Source: Liu et al. 2019, ABS (Artificial Brain Stimulation), CCS, section 4, and its published code:
    the neuron before and after ReLU is maximised, the layer's other channels weigh 1e-4, and the
    mask costs once it covers more than 64 of 32x32 pixels, twice that beyond (8 + 2)^2; Adam at 0.1
    from noise as pattern and a mask that is high on 8x8 pixels of a corner, as many as it may
    cover. The weight on the target's logit is that of its TrojAI version (1 there).
Departs: the code's sums over images and pixels are means here, and activations are divided by the
    layer's largest. Its weights of 500 and 1000 on the sum of the mask are 20 and 40 on the mean:
    the same against ten images of 16x16 maps with activations up to 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core.contracts import Images
from arena.core.inversion.engine import Family, Guide, Problem, Search, State
from arena.core.inversion.frozen import Frozen
from arena.core.inversion.neurons import Driver, analysed
from arena.core.registry import method, param

_COVERED = 0.01  # mask from which a pixel counts
_COST = 20.0  # on the mean of a mask that covers too much
_AREA = 32 * 32  # pixels that the published bounds are for


@method
class ABS(Family):
    unit: ClassVar[str] = "mask L1"

    pixels: int = param(
        64, "pixels of 32x32 that the mask may cover at no cost, scaled with the area", low=1,
        source="code",
    )  # fmt: skip
    others: float = param(1e-4, "weight of the layer's other channels", low=0, source="code")
    logit: float = param(0.0, "weight of the target's logit", low=0, source="1: TrojAI version")

    @property
    def usual(self) -> Search:
        return Search(betas=(0.9, 0.999), cost=1.0, up=1.0, down=1.0)

    def guide(self, model: Frozen, problems: Sequence[Problem], images: Images, seed: int) -> Guide:
        return Driver(analysed(model, images, seed), problems, self.others)

    def begin(self, x: Tensor, rng: Generator) -> State:
        channels, height, width = x.shape[1:]
        tall, wide = (max(1, int(side * math.sqrt(self.pixels / _AREA))) for side in x.shape[2:])
        mask = torch.full((1, height, width), -2.0)
        mask[:, :tall, :wide] = 2.0  # the bound itself: all of a larger square would be given up
        pattern = torch.randn(channels, height, width, generator=rng).clamp(0, 1)
        return {"mask": mask, "pattern": pattern}

    def stamp(self, at: State, x: Tensor) -> Tensor:
        return torch.lerp(x, at["pattern"][:, None], _shown(at["mask"])[:, None])

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.logit == 0:
            return logits.new_zeros(len(logits))  # no gradient beyond the neuron's layer
        own = target[:, None, None].expand(-1, logits.shape[1], 1)
        return -self.logit * logits.gather(2, own).mean((1, 2))

    def penalty(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        mask = _shown(at["mask"]).flatten(1)
        scale = mask.shape[1] / _AREA
        covered = (mask > _COVERED).sum(1)
        weight = (covered > self.pixels * scale).float()
        weight = weight + (covered > (math.sqrt(self.pixels) + 2) ** 2 * scale)
        return _COST * weight * mask.mean(1)

    def size(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        return _shown(at["mask"]).flatten(1).sum(1)

    def projected(self, at: State) -> State:
        return {**at, "pattern": at["pattern"].clamp(0, 1)}


def _shown(free: Tensor) -> Tensor:
    return free.tanh() / 2 + 0.5
