"""UAP: one change of all pixels, none by more than eps, as successful as it gets.

Source: Shafahi et al. 2020, Universal Adversarial Training, https://arxiv.org/abs/1811.11304, in
    the targeted form of PixelBackdoor (Tao et al. 2022, appendix B): the mean over images of the
    cross-entropy, cut at beta, is minimised inside the ball; no success is asked for.
Departs: of all passes the one of least loss counts, not the last. Steps are 1/255 long, by
    the sign of the slope; the change starts as noise of half the radius.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from arena.core.inversion.engine import Family, Search, State
from arena.core.registry import method, param


@method
class UAP(Family):
    unit: ClassVar[str] = "largest change in 1/255"

    eps: float = param(
        8.0, "radius in 1/255, L-inf", above=0, high=255, source="PixelBackdoor on CIFAR-10"
    )
    beta: float = param(
        9.0, "an image's cross-entropy counts up to that", above=0, source="Shafahi et al."
    )

    @property
    def usual(self) -> Search:
        return Search(asr=0.0, rule="sign", lr=1 / 255)

    def begin(self, x: Tensor, rng: Generator) -> State:
        noise = torch.rand(x.shape[1:], generator=rng) * 2 - 1
        return {"change": noise * self.eps / 2 / 255}

    def stamp(self, at: State, x: Tensor) -> Tensor:
        return (x + at["change"][:, None]).clamp(0, 1)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        wanted = target[:, None].expand(logits.shape[:2])
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        return each.clamp_max(self.beta).view(logits.shape[:2]).mean(1)

    def penalty(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        return x.new_zeros(len(x))

    def size(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        return 255 * at["change"].abs().flatten(1).amax(1)

    def record(self, at: State, size: Tensor, loss: Tensor) -> Tensor:
        return loss[:, None]

    def projected(self, at: State) -> State:
        return {"change": at["change"].clamp(-self.eps / 255, self.eps / 255)}
