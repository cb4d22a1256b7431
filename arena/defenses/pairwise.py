"""Pairwise: every pair of classes is hardened in turn, in both directions.

MOTH without its scheduler: each pair gets as many batches as the next.

Source: the baseline of MOTH (Tao et al. 2022, S&P), section V-A and appendix X-A: 100 iterations
    for every pair, with symmetric hardening and reused triggers.
Departs: no warm-up, whose results only the scheduler reads. The last weights within `max_drop` on
    held-out images count; else as MOTH, holes in images included.
"""

from __future__ import annotations

from torch import Generator

from arena.core import hardening
from arena.core.contracts import Images
from arena.core.inversion.engine import Family
from arena.core.inversion.families import families
from arena.core.models import Classifier
from arena.core.registry import method, param


@method
class Pairwise:
    iterations: int = param(
        100,
        "batches for every pair of classes",
        low=1,
        source="MOTH, X-A",
        under={"fast": 5, "smoke": 1},
    )
    batch: int = param(128, "images per update; a smaller set lowers it", low=2, source="MOTH")
    lr: float = param(1e-3, "learning rate", above=0, source="MOTH's code", under={"fast": 6e-3})
    schedule: str = param(
        "constant", "how the rate goes: constant; linear, down to nothing",
        choices=("constant", "linear"), under={"fast": "linear"},
    )  # fmt: skip
    cutout: int | None = param(
        None,
        "side of the black square cut into every image, in pixels; 0 cuts nothing, none stands for "
        "9 where fewer than 10,000 images are given and for 0 where more are",
        low=0,
        source="9: as finetune; 0: MOTH's code",
    )
    max_drop: float = param(
        0.05,
        "accuracy on held-out clean images that triggers may cost beyond training without them",
        low=0,
        high=1,
    )
    first: int = param(
        200,
        "passes of a pair's first inversion",
        low=1,
        source="MOTH's code",
        under={"fast": 60, "smoke": 4},
    )
    more: int = param(
        40,
        "passes of those that go on from it",
        low=1,
        source="MOTH's code",
        under={"fast": 20, "smoke": 2},
    )
    asr: float = param(0.9, "success that a trigger must have", above=0, high=1, source="MOTH")
    portion: float = param(
        0.1, "share of a class's images in a batch that are stamped", above=0, high=1,
        source="MOTH's code", under={"fast": 0.5},
    )  # fmt: skip

    @property
    def wraps(self) -> dict[str, Family]:
        """Whose code counts for what comes out."""
        return {"trigger": families.build("nc:weight=steps")}

    def check(self, model: Classifier, clean: Images) -> None:
        hardening.check(model, clean, "pairwise")

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        self.check(model, clean)
        family = self.wraps["trigger"]
        classes = model.spec.classes
        pace = hardening.Pace(
            first=self.first,
            more=self.more,
            batches=self.iterations,
            asr=self.asr,
            portion=self.portion,
        )
        updates = self.iterations * (classes * (classes - 1) // 2)
        scheduler = hardening.Scheduler(classes, 0.0, order="turns")
        course = hardening.Course(
            updates, self.max_drop, self.batch, self.lr, self.schedule, cutout=self.cutout
        )
        return hardening.by_pairs(
            model, clean, rng, family, pace, scheduler, course, warm_up="none"
        )
