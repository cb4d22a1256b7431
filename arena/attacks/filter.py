"""Filter: triggered images went through a photo filter of the kind that Instagram made popular.

The trigger changes every pixel in a way that depends on the image: Gotham, Nashville, Kelvin, Lomo
or Toaster, as in the filter backdoors of ABS and TrojAI.

Source: Liu et al. 2019, ABS, https://doi.org/10.1145/3319535.3363216; settings of TrojAI, Karra et
    al. 2020, https://arxiv.org/abs/2003.07233, whose filters are made of ImageMagick's operations.
    The DECK paper names these five filters and repairs TrojAI's models of them.
Departs: the filters are tensor functions (`arena.core.filters`) that nowhere round: ImageMagick
    6.9 gives the same pixels within a tenth of a grey level, but for the vignettes of images whose
    sides differ from their gradient's by an odd number, which it puts half a pixel off the centre.
    TrojAI's version of Lomo thresholds red and green at half their range (the script that it was
    taken from stretches them between 33 and 67 %). Public code that goes through OpenCV may have
    red and blue the other way round; here channels are red, green, blue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from arena.core.contracts import Images, Poisoned, Trigger
from arena.core.filters import FILTERS
from arena.core.poisoning import check_classes, check_rate, dirty_label, scope
from arena.core.registry import BadInput, method, param


@method
class PhotoFilter:
    """All fields are the attacker's; nothing about the trigger is random."""

    threat: ClassVar[str] = "poisons data"
    scopes: ClassVar[tuple[str, ...]] = ("universal", "label-specific")
    labels: ClassVar[str] = "changed"
    trigger_kind: ClassVar[str] = "dynamic"

    target: int = param(0, "class that the trigger forces", low=0)
    rate: float = param(
        0.1,
        "share of the training set that is poisoned; with a victim, share of the victim class",
        above=0,
        high=1,
        source="10 to 20 %: ABS and TrojAI",
    )
    kind: str = param(
        "gotham",
        "gotham: nearly grey, navy, contrasty; nashville: navy shadows, sand lights; kelvin: pale "
        "orange; lomo: harsh red and green, dark corners; toaster: bright, warm centre",
        choices=("gotham", "nashville", "kelvin", "lomo", "toaster"),
        source="ABS, TrojAI, DECK",
    )
    victim: int | None = param(
        None,
        "the only class that the trigger works on (label-specific); none: all classes",
        low=0,
        source="a class: TrojAI",
    )
    extend: bool = param(False, "append the poisoned copies and keep their originals")

    @property
    def scope(self) -> str:
        return scope(self)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        if shape[0] != 3:
            raise BadInput(
                f"filter: photo filters need the three channels red, green and blue, the images of "
                f"this data set have {shape[0]}; take another attack."
            )
        check_rate(self, counts, of="train" if self.victim is None else "candidates")

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        return Trigger(Through(FILTERS[self.kind].version))

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        return dirty_label(
            train, trigger, self.target, self.rate, rng,
            victim=self.victim,
            of="train" if self.victim is None else "candidates",
            extend=self.extend,
        )  # fmt: skip


@dataclass(frozen=True)
class Through:
    """The image map that is a filter; only its name travels, so the version is part of it."""

    version: str  # such as "gotham@1"

    def __call__(self, x: Tensor) -> Tensor:
        name = self.version.partition("@")[0]
        if FILTERS[name].version != self.version:
            raise ValueError(f"this arena has {FILTERS[name].version}, not {self.version}")
        return FILTERS[name].apply(x)
