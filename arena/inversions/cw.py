"""CW: pixels are painted over, and after every pass the least important ones are given up.

Source: Carlini and Wagner 2017, https://arxiv.org/abs/1608.04644 (the L0 attack), on a set of
    images as in PixelBackdoor (Tao et al. 2022, appendix A): the squared distance and the margin of
    the logits are minimised; a pixel's importance is the product of its slope and its change; what
    was given up stays so.
Departs: the threshold of the importance is not published: a share of the pixels left goes, and only
    after passes with success. The change is what the image had instead, on average.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from arena.core.inversion.engine import Family, Search, State
from arena.core.registry import method, param


@method
class CW(Family):
    unit: ClassVar[str] = "pixels"

    kappa: float | None = param(
        None,
        "lead of the target's logit beyond which an image counts no more; none: it always counts, "
        "as else no pixel is important on images that the trigger flips by far",
        low=0,
    )
    share: float = param(
        0.02, "of the pixels left, those given up after a success", above=0, high=1
    )

    @property
    def usual(self) -> Search:
        return Search(cost=1e-2)

    def begin(self, x: Tensor, rng: Generator) -> State:
        paint = torch.rand(x.shape[1:], generator=rng)
        return {
            "paint": torch.atanh((paint - 0.5) * 1.98),
            "left": torch.ones(1, *x.shape[2:]),  # not free: it has no slope
            "_mean": x.mean(0),
        }

    def stamp(self, at: State, x: Tensor) -> Tensor:
        return torch.where(at["left"][:, None] > 0.5, self._paint(at)[:, None], x)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        own = F.one_hot(target, logits.shape[2]).bool()[:, None].expand(logits.shape)
        best = logits.masked_fill(own, -torch.inf).amax(2)
        margin = best - logits[own].view(best.shape)
        return (margin if self.kappa is None else margin.clamp_min(-self.kappa)).mean(1)

    def penalty(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        return (stamped - x).square().flatten(2).sum(2).mean(1)

    def size(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        return at["left"].flatten(1).sum(1)

    def thinned(self, at: State, slopes: State, success: Tensor) -> State:
        paint = self._paint(at)
        slope = slopes["paint"] / (2 * paint * (1 - paint)).clamp_min(1e-6)  # by the shown value
        important = (slope * (paint - at["_mean"])).abs().sum(1, keepdim=True)
        left = at["left"] > 0.5
        count = left.flatten(1).sum(1)
        gone = (count * self.share).ceil() * success
        order = important.masked_fill(~left, torch.inf).flatten(1).argsort(1).argsort(1)
        stays = left & (order.view(left.shape) >= gone.view(-1, 1, 1, 1))
        return {**at, "left": stays.float()}

    def _paint(self, at: State) -> Tensor:
        return at["paint"].tanh() / 2 + 0.5
