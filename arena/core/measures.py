"""What a board may ask the referee to measure beside answers: `measures.build("pgd:eps=4")`.

A measure is one file of `arena/measures`. It is asked about a victim and about what each defense
made of it, in the referee's own processes; no method ever sees it. Needs no torch.

Its columns are defined here, not in `metric_list`: what stands there counts for the key of every
cell, and a measure must not make old results stale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from arena.core.metric_list import Metric
from arena.core.registry import Registry

if TYPE_CHECKING:
    from arena.core.contracts import Images
    from arena.core.models import Classifier
    from arena.core.training import Checkpoint

measures = Registry("measure", "arena.measures", "arena.measures")

_MOTH = "Tao et al. 2022, MOTH (Model Orthogonalization), IEEE S&P"
COLUMNS: tuple[Metric, ...] = (
    Metric(
        "distance",
        "size of the smallest trigger that was found to send images of one class to another, mean "
        "over ordered pairs of classes; compares only where distance_unit is the same",
        "as distance_unit says",
        f"{_MOTH}, section III",
        "up",
    ),
    Metric(
        "distance_gain",
        "(after - before) / before of the defense, mean over the ordered pairs of classes that "
        "have a distance both times",
        "share; 1: doubled",
        f"{_MOTH}, equation 12; DECK, equation 8",
        "up",
    ),
    Metric(
        "distance_unit",
        "what distances are counted in, and the triggers that they are sizes of",
        "text",
        "this arena",
        "",
    ),
    Metric(
        "robust_acc",
        "share of clean test images still given their true class after an untargeted L-inf PGD "
        "attack on each",
        "share in [0, 1]",
        "Madry et al. 2018, https://arxiv.org/abs/1706.06083",
        "up",
    ),
    Metric("robust_against", "the attack of robust_acc, and its radius", "text", "this arena", ""),
)
"""Columns that stand in a table only where they were measured; NAME_before is the victim's."""


class Reading(NamedTuple):
    """What a measure found out about one model: JSON values."""

    figures: dict[str, float | int | None]  # few: they go into records
    each: list[list[float | int | None]]  # as many as it likes: what `compare` pairs up


class Measure(Protocol):
    """Pure: the same model, images and seed give the same reading.

    Optional attribute `wraps`: methods by name that it asks, which count with all their fields and
    their code.
    """

    method_name: ClassVar[str]

    def check(self, val: Images, test: Images, classes: int, seed: int) -> None:
        """Raise BadInput, before anything is computed, where such images cannot be measured so."""

    def passes(self, classes: int) -> float:
        """Images that it passes forward through a model; a pass forward and back counts three."""
        ...

    def measure(
        self,
        model: Classifier,
        val: Images,
        test: Images,
        seed: int,
        checkpoint: Checkpoint | None = None,
    ) -> Reading:
        """val, test: clean images, uint8; checkpoint: where a stopped search goes on."""
        ...

    def compare(self, before: Reading, after: Reading) -> dict[str, Any]:
        """Columns of a row from the readings of a victim and of what a defense made of it."""
        ...
