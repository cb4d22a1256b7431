"""NC: a mask and a pattern; the size is how much of the image the mask covers.

Source: Wang et al. 2019, Neural Cleanse, section IV; its published code for the variables (tanh),
    MOTH's (Tao et al. 2022) for the start (uniform) and for the search that goes on from a best
    trigger, with mask and pattern moved by up to 0.01.
Departs: the size is the L1 norm of the one mask that all channels share. The papers of MOTH print
    three times that: the sum over the mask repeated on three channels. In published code the mask's
    weight, at first 1e-3, changes by half after ten passes in a row with success (`weight=steps`).
    Here it counts from the first success on, starts at 3e-3 and changes by a tenth after every
    pass, and a search ends that has found nothing smaller in fifty of them: masks of the same size
    in about half the passes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core.inversion.engine import Family, Search, State
from arena.core.registry import method, param

_FAINT = 0.01  # a mask that hardly shows; at 0 its slope would be gone
_WIDTH = 1 + 1e-6  # tanh of finite variables reaches 0 and 1 to within float32's resolution


@method
class NC(Family):
    unit: ClassVar[str] = "mask L1"
    nudges: ClassVar[bool] = True
    also: ClassVar[tuple[str, float]] = ("mask L1 over three channels, as MOTH prints it", 3.0)

    nudge: float = param(
        0.01, "how far mask and pattern are moved off a best trigger, in [0, 1]", low=0, high=0.5,
        source="MOTH's code",
    )  # fmt: skip

    start: str = param(
        "random",
        "of the mask; random: noise; faint: 0.01 everywhere; centre: faint but for a square of "
        "50/224 of the sides",
        choices=("random", "faint", "centre"),
        source="centre: K-arm, for label-specific triggers",
    )
    weight: str = param(
        "steady",
        "of the mask in the loss, where the search is the family's own; steady: changes by a tenth "
        "after every pass; steps: by half after ten passes in a row with success, or without",
        choices=("steady", "steps"),
        source="steps: MOTH's code",
    )
    colours: str = param(
        "each",
        "each: every pixel has its own; one: the pattern has one colour",
        choices=("each", "one"),
        source="one: K-arm, for label-specific triggers",
    )

    @property
    def usual(self) -> Search:
        if self.weight == "steps":
            return Search()
        return Search(cost=3e-3, wait=True, patience=1, up=1.1, down=1.1**1.5, stall=50)

    def begin(self, x: Tensor, rng: Generator) -> State:
        channels, height, width = x.shape[1:]
        mask = torch.rand(1, height, width, generator=rng)
        if self.start != "random":
            mask = torch.full_like(mask, _FAINT)
        if self.start == "centre":
            tall, wide = (max(1, round(side * 50 / 224)) for side in (height, width))
            top, left = (height - tall) // 2, (width - wide) // 2
            mask[:, top : top + tall, left : left + wide] = 1 - _FAINT
        one = self.colours == "one"
        pattern = torch.rand(channels, *((1, 1) if one else (height, width)), generator=rng)
        return {"mask": _free(mask), "pattern": _free(pattern)}

    def stamp(self, at: State, x: Tensor) -> Tensor:
        mask, pattern = _shown(at["mask"])[:, None], _shown(at["pattern"])[:, None]
        return torch.lerp(x, pattern, mask)

    def penalty(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        return self.size(at, x, stamped)

    def size(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        return _shown(at["mask"]).flatten(1).sum(1)

    def nudged(self, kept: State, noise: State) -> State:
        return {
            name: _free((_shown(value) + self.nudge * noise[name]).clamp(0, 1))
            for name, value in kept.items()
        }


def _shown(free: Tensor) -> Tensor:
    return free.tanh() / (2 * _WIDTH) + 0.5


def _free(shown: Tensor) -> Tensor:
    return torch.atanh((shown - 0.5) * 2 * (1 - 1e-6))
