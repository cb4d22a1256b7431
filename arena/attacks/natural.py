"""Natural: nothing is poisoned; the trigger is one that a cleanly trained network has by itself.

The engine of trigger inversion finds it: small, and yet it sends most images of a class, or of all
classes, to another. Defenses that harden against such triggers are measured on it.

Source: Tao et al. 2022, MOTH (Model Orthogonalization) and PixelBackdoor (CVPR 2022): natural
    backdoors; 100 images of the victim class, 90 % success, the smallest of three searches.
Departs: the images that the trigger is found on are training images. Where no search succeeds, the
    trigger is the most successful one, and the cell says that the attack is not established.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Generator, Tensor, nn

from arena.core.contracts import Fit, Images, Poisoned, Trigger
from arena.core.inversion.distances import smallest
from arena.core.inversion.engine import Family, Problem, invert, stamped
from arena.core.inversion.families import families
from arena.core.inversion.frozen import Frozen
from arena.core.poisoning import check_classes, scope
from arena.core.registry import BadInput, method, param
from arena.core.seeding import draw_seed
from arena.core.training import to_float


@method
class Natural:
    """All fields are the attacker's; the trigger that counts is the one `train` hands back."""

    threat: ClassVar[str] = "controls training"
    scopes: ClassVar[tuple[str, ...]] = ("universal", "label-specific")
    labels: ClassVar[str] = "kept"
    trigger_kind: ClassVar[str] = "static"
    learned: ClassVar[bool] = True
    stamps_unseen: ClassVar[bool] = True  # it stamps no training image at all

    method: str = param("pixel", "trigger family, with its fields; see `arena list triggers`")
    victim: int | None = param(
        3, "the only class that the trigger works on; none: all classes", low=0
    )
    target: int = param(5, "class that the trigger leads to", low=0)
    restarts: int = param(3, "searches, of which the smallest trigger counts", low=1)
    samples: int = param(
        100, "images that a trigger is searched on", low=1, source="MOTH", under={"smoke": 4}
    )
    steps: int | None = param(
        None, "passes over them; none: as in the family's paper", low=1, under={"smoke": 2}
    )

    def __post_init__(self) -> None:
        families.build(self.method)

    @property
    def wraps(self) -> dict[str, Family]:
        """Whose code counts for the victim's key: the family finds the trigger."""
        return {"method": families.build(self.method)}

    @property
    def scope(self) -> str:
        return scope(self)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        others = [count for label, count in enumerate(counts) if label != self.target]
        least = min(others) * len(others) if self.victim is None else counts[self.victim]
        if least < self.samples:
            raise BadInput(
                f"natural: {self.samples} images are searched on, but there are {least} of the "
                "victim class; lower samples."
            )

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        """Where a search starts: a network's own triggers are found when it is trained."""
        family: Family = families.build(self.method)
        shown = train.y != self.target if self.victim is None else train.y == self.victim
        rows = shown.nonzero().flatten()[: self.samples]
        return Trigger(Own(family, family.begin(to_float(train.x[rows].cpu()), rng)))

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        """The clean set."""
        return Poisoned(train, train.y.new_empty(0))

    def train(
        self, fit: Fit, poisoned: Poisoned, trigger: Trigger, rng: Generator
    ) -> tuple[nn.Module, Trigger]:
        family: Family = families.build(self.method)
        model = fit(poisoned.data, rng=rng)
        steps = family.usual.steps if self.steps is None else self.steps
        search = replace(family.usual, samples=self.samples, steps=steps)
        problems = [Problem(self.victim, self.target, restart) for restart in range(self.restarts)]
        found = invert(Frozen(model), family, problems, poisoned.data, search, seed=draw_seed(rng))
        best = smallest(found) or max(found, key=lambda one: one.asr)
        return model, Trigger(Own(family, best.trigger))


@dataclass(frozen=True, eq=False)
class Own:
    """The image map of an inverted trigger."""

    family: Any
    trigger: dict[str, Tensor]  # its variables

    def __call__(self, x: Tensor) -> Tensor:
        return stamped(self.family, self.trigger, x)
