"""Universal: training on images with universal triggers, found anew for every batch.

Classes are targets in turn; the smallest trigger that sends a batch's other images there is stamped
on some of them, which keep their labels.

Source: the baseline of MOTH (Tao et al. 2022, S&P), section V-A; iterative NC of PixelBackdoor (Tao
    et al. 2022, CVPR), appendix L.1.
Departs: neither says how often triggers are made or on how many images they are stamped: every
    batch, on half, as in MOTH's warm-up; passes, weights and rates are MOTH's. The last weights
    within `max_drop` on held-out images count. Images have holes as in `moth` here.
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
class Universal:
    updates: int = param(
        800, "batches trained on", low=1, source="MOTH", under={"fast": 240, "smoke": 6}
    )
    batch: int = param(128, "images per update; a smaller set lowers it", low=2, source="MOTH")
    lr: float = param(1e-3, "learning rate", above=0, source="MOTH's code")
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
        "passes of a class's first inversion",
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
        0.5, "share of a batch's other images that are stamped", above=0, high=1,
        source="MOTH's warm-up",
    )  # fmt: skip

    @property
    def wraps(self) -> dict[str, Family]:
        """Whose code counts for what comes out."""
        return {"trigger": families.build("nc:weight=steps")}

    def check(self, model: Classifier, clean: Images) -> None:
        hardening.check(model, clean, "universal")

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        self.check(model, clean)
        family = self.wraps["trigger"]
        pace = hardening.Pace(first=self.first, more=self.more, asr=self.asr, portion=self.portion)
        course = hardening.Course(
            self.updates, self.max_drop, self.batch, self.lr, cutout=self.cutout
        )
        return hardening.by_classes(model, clean, rng, family, pace, course)
