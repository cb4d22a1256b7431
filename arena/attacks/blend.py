"""Blend: a fixed pattern shines through the whole image, x' = (1 - alpha) x + alpha pattern.

Source: Chen et al. 2017, https://arxiv.org/abs/1712.05526; defaults of the DECK paper (one
    uniform random pattern, alpha 0.2, target 0, 10 % of the non-target training images).
Departs: the triggered image is rounded to 8 bits, not truncated as public code does. Test images
    are blended with the alpha of training (the first paper also shows stronger ones at test time).
    The pattern is drawn per seed, where public code ships one picture: name a picture to fix it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core.contracts import Images, Poisoned, Trigger
from arena.core.pictures import read_picture
from arena.core.poisoning import check_classes, check_rate, dirty_label, scope
from arena.core.registry import BadInput, method, param


@method
class Blend:
    """All fields are the attacker's; the pattern is drawn or read once and never resampled."""

    threat: ClassVar[str] = "poisons data"
    scopes: ClassVar[tuple[str, ...]] = ("universal", "label-specific")
    labels: ClassVar[str] = "changed"
    trigger_kind: ClassVar[str] = "static"

    target: int = param(0, "class that the trigger forces", low=0, source="DECK")
    rate: float = param(
        0.1,
        "poisoned share of the images that may be: all but the target class, or the victim class",
        above=0,
        high=1,
        source="DECK; ANP's code 0.05",
    )
    alpha: float = param(0.2, "weight of the pattern, a share", above=0, high=1, source="DECK")
    pattern: str = param(
        "uniform",
        "uniform: each value uniform in [0, 1]; gaussian: normal of mean 0.5 and deviation 0.25, "
        "clipped; image: the picture of field image",
        choices=("uniform", "gaussian", "image"),
        source="uniform: DECK; gaussian: ANP's kind; image: Chen et al.",
    )
    image: str | None = param(
        None, "file of the picture, stretched to the images' size; its alpha is ignored", path=True
    )
    victim: int | None = param(
        None, "the only class that the trigger works on (label-specific); none: all classes", low=0
    )
    extend: bool = param(
        False, "append the poisoned copies and keep their originals", source="true: SDRM"
    )

    def __post_init__(self) -> None:
        if self.pattern == "image" and self.image is None:
            raise BadInput("blend: pattern=image needs image=FILE.")
        if self.pattern != "image" and self.image is not None:
            raise BadInput(f"blend: image is only for pattern=image, not pattern={self.pattern}.")

    @property
    def scope(self) -> str:
        return scope(self)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        check_rate(self, counts)
        if self.image is not None:
            read_picture(self.image, shape[0])

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        channels, height, width = train.x.shape[1:]
        if self.image is not None:
            pattern, _ = read_picture(self.image, channels, size=(height, width))
        elif self.pattern == "gaussian":
            noise = torch.randn(channels, height, width, generator=rng)
            pattern = (0.5 + 0.25 * noise).clamp_(0, 1)
        else:
            pattern = torch.rand(channels, height, width, generator=rng)
        return Trigger(Mix(pattern, self.alpha))

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        return dirty_label(
            train, trigger, self.target, self.rate, rng,
            victim=self.victim, of="candidates", extend=self.extend,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Mix:
    """The image map (1 - alpha) x + alpha pattern."""

    pattern: Tensor  # (C, H, W) float32 in [0, 1]
    alpha: float

    def __call__(self, x: Tensor) -> Tensor:
        share = self.alpha * self.pattern.to(x.device)
        return torch.add(share, x, alpha=1 - self.alpha).clamp_(0, 1)
