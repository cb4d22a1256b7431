"""ABS's filter: every pixel becomes a mixture of its colours and of those around it, so that one
inner neuron rises, the one which moves all images to the target.

Source: Liu et al. 2019, ABS (Artificial Brain Stimulation), CCS, section 4 (feature space), and its
    published code: a matrix mixes the channels of the image and of its largest, smallest and mean
    values in windows of 12 pixels (of 32); it starts as the identity, its entries stay in [-1, 1];
    Adam at 2e-3; the structural similarity weighs 10, but 10,000 below a mean of 0.2.
Departs: as in `abs`; the code's weights on the sum of the similarities of ten images, beside 0.01
    on the activations, are 0.4 and 400 on their mean beside 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from arena.core.contracts import Images
from arena.core.inversion.engine import Family, Guide, Problem, Search, State
from arena.core.inversion.frozen import Frozen
from arena.core.inversion.neurons import Driver, analysed
from arena.core.metrics import similarity
from arena.core.registry import method, param

_UNLIKE = 0.2  # mean similarity below which it weighs more
_WEIGHT, _HEAVY = 0.4, 400.0
_WINDOW = 11  # of the similarity, where images are as large


@method
class ABSFilter(Family):
    unit: ClassVar[str] = "lack of SSIM"
    sized_by_images: ClassVar[bool] = True

    window: float = param(
        0.375, "side of the windows, as a share of the image's", above=0, high=1, source="code"
    )
    others: float = param(1e-5, "weight of the layer's other channels", low=0, source="code")

    @property
    def usual(self) -> Search:
        return Search(lr=2e-3, betas=(0.9, 0.999), cost=1.0, up=1.0, down=1.0)

    def guide(self, model: Frozen, problems: Sequence[Problem], images: Images, seed: int) -> Guide:
        return Driver(analysed(model, images, seed), problems, self.others)

    def begin(self, x: Tensor, rng: Generator) -> State:
        channels = x.shape[1]
        return {"mix": torch.eye(4 * channels, channels)}

    def stamp(self, at: State, x: Tensor) -> Tensor:
        around = self._around(x.flatten(0, 1)).flatten(2).unflatten(0, x.shape[:2])
        mixed = at["mix"].transpose(1, 2)[:, None] @ around
        return mixed.view(x.shape).clamp(0, 1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        return logits.new_zeros(len(logits))  # no gradient beyond the neuron's layer

    def penalty(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        lack = self.size(at, x, stamped)
        return torch.where(1 - lack < _UNLIKE, _HEAVY, _WEIGHT) * lack

    def size(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        window = min(_WINDOW, *x.shape[-2:])
        like = similarity(x.flatten(0, 1), stamped.flatten(0, 1), window=window)
        return 1 - like.unflatten(0, x.shape[:2]).mean(1)

    def projected(self, at: State) -> State:
        return {**at, "mix": at["mix"].clamp(-1, 1)}

    def _around(self, x: Tensor) -> Tensor:
        """(N, 4C, H, W): images, and of the window around each pixel the largest, smallest and mean
        values; windows end where the image does."""
        tall, wide = (max(1, round(self.window * side)) for side in x.shape[2:])

        def largest(values: Tensor) -> Tensor:
            return _largest(_largest(values, tall, 2), wide, 3)

        mean = _means(x, tall) @ x @ _means(x.mT, wide).mT
        return torch.cat([x, largest(x), -largest(-x), mean], 1)


def _largest(values: Tensor, window: int, dim: int) -> Tensor:
    """Of so many values around each along an axis, the extra one of an even number behind it. By
    doubling: some twenty times faster than pooling on a CPU."""
    before, after = (window - 1) // 2, window // 2
    edge = (0, 0, before, after) if dim == 2 else (before, after, 0, 0)
    out, seen = F.pad(values, edge, value=-torch.inf), 1
    while seen < window:
        step = min(seen, window - seen)
        left = out.shape[dim] - step
        out = torch.maximum(out.narrow(dim, 0, left), out.narrow(dim, step, left))
        seen += step
    return out


def _means(x: Tensor, window: int) -> Tensor:
    """(H, H): row i averages the rows of the window around i that there are."""
    place = torch.arange(x.shape[-2], device=x.device)
    off = place - place[:, None]
    inside = ((off >= -((window - 1) // 2)) & (off <= window // 2)).to(x.dtype)
    return inside / inside.sum(1, keepdim=True)
