"""SIG: a faint sinusoid over images of the target class, which keep their labels; x' = x + v.

Source: Barni et al. 2019, https://arxiv.org/abs/1902.11237; defaults of the DECK paper's text:
    v = 20 grey levels * sin(2 pi 6 j / W) in column j of W, target 0, 8 % of the target class.
Departs: DECK's published figures come from other code. That blends, x' = 0.8 x + 0.2 s, with a
    sinusoid s = trunc(20 sin(0.8 j)) whose negative levels wrapped round at 8 bits (0, 14, 19, 13,
    255, 241 ...): stripes of 0 to 51 grey levels, about 4 in 32 columns, far stronger than +-20.
    And its 8 % counts the whole data set, 4,000 draws with replacement from the 5,000 images of a
    CIFAR-10 class, where the text's 8 % of the class are 400 images. That code's attack is
    form=wrapped_blend,of=data (drawn without replacement). The text's is the default, and a weak
    one: Barni et al. poison 20 to 40 % of the class. Columns are counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from arena.core.contracts import Images, Poisoned, Trigger
from arena.core.poisoning import check_classes, check_rate, clean_label, scope
from arena.core.registry import BadInput, method, param

_STEP = 0.8  # radians per column of the public code's sinusoid
_SHARE = 0.2  # its weight in the blend


@method
class Sig:
    """All fields are the attacker's; nothing about the trigger is random."""

    threat: ClassVar[str] = "poisons data"
    scopes: ClassVar[tuple[str, ...]] = ("universal",)
    labels: ClassVar[str] = "kept"
    trigger_kind: ClassVar[str] = "static"
    keeps_labels: ClassVar[bool] = True

    target: int = param(
        0, "class that the trigger forces, and the one whose images carry it", low=0
    )
    rate: float = param(
        0.08,
        "poisoned share, of what field `of` says",
        above=0,
        high=1,
        source="DECK; Barni et al. 0.2 to 0.4 of the class",
    )
    of: str = param(
        "class",
        "what the rate is a share of: the images of the target class, or all the training data",
        choices=("class", "data"),
        source="class: DECK's text; data: its group's code, and BackdoorBench",
    )
    delta: float = param(
        20.0,
        "amplitude of the sinusoid in grey levels of 255",
        above=0,
        high=255,
        source="DECK; BackdoorBench 40",
    )
    test_delta: float | None = param(
        None,
        "amplitude on test images in grey levels; none: as in training",
        above=0,
        high=255,
        source="Barni et al.: MNIST 40 in training, 60 in tests",
    )
    frequency: float = param(
        6.0, "periods in the image's width; for form=additive", above=0, source="DECK"
    )
    form: str = param(
        "additive",
        "additive: x + sinusoid, clipped; wrapped_blend: 0.8 x + 0.2 sinusoid whose negative "
        "levels have wrapped round at 8 bits",
        choices=("additive", "wrapped_blend"),
        source="additive: Barni et al.; wrapped_blend: code of DECK's group and of NAD",
    )

    def __post_init__(self) -> None:
        if self.form == "wrapped_blend" and self.frequency != 6:
            raise BadInput("sig: frequency is only for form=additive, not form=wrapped_blend.")

    @property
    def scope(self) -> str:
        return scope(self)

    @property
    def _of(self) -> Literal["train", "candidates"]:
        return "candidates" if self.of == "class" else "train"

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        check_rate(self, counts, of=self._of)
        if self.form == "additive" and 2 * self.frequency >= shape[2]:
            raise BadInput(
                f"sig: {self.frequency:g} periods do not fit into {shape[2]} columns; the "
                f"frequency must be below {shape[2] / 2:g}."
            )

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        height, width = train.x.shape[2:]
        embed = self._map(self.delta, height, width)
        if self.test_delta is None:
            return Trigger(embed)
        return Trigger(self._map(self.test_delta, height, width), embed)

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        return clean_label(train, trigger, self.target, self.rate, rng, of=self._of)

    def _map(self, delta: float, height: int, width: int) -> Add:
        columns = torch.arange(width, dtype=torch.float64)
        if self.form == "additive":
            wave = delta * torch.sin(2 * math.pi * self.frequency * columns / width)
            keep = 1.0
        else:
            wave = _SHARE * (delta * torch.sin(_STEP * columns)).trunc().remainder(256)
            keep = 1 - _SHARE
        return Add((wave / 255).float().expand(1, height, width).contiguous(), keep)


@dataclass(frozen=True, eq=False)
class Add:
    """The image map clip(keep * x + wave), the same wave on every channel."""

    wave: Tensor  # (1, H, W) float32 in [-1, 1]
    keep: float  # weight of the image, a share

    def __call__(self, x: Tensor) -> Tensor:
        return torch.add(self.wave.to(x.device), x, alpha=self.keep).clamp_(0, 1)
