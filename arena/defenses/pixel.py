"""PixelBackdoor: triggers of few pixels instead of small masks, for scans and for hardening.

As a scanner it is Neural Cleanse with other triggers. As a repair it trains on images with
universal triggers, found anew for every batch.

Source: Tao et al. 2022, CVPR, Better Trigger Inversion Optimization in Backdoor Scanning: two
    positive changes per value; sizes are pixels, the anomaly index is Neural Cleanse's. Scanning
    needs the smooth (tanh) form, hardening (appendix L.1) uses the faster one.
Departs: `samples` images per class searched; searches may end early (`stall`), like NC's. As in
    `nc`, the spread of sizes counts as at least 0.3 of their median: the smallest of two clean
    networks were 0.59 and 0.73 of the median, that of a patch's target 0.04 (CIFAR-10,
    fastnet_small of 5 epochs). It hardens in `updates` batches as `universal` here.
"""

from __future__ import annotations

from torch import Generator

from arena.core import hardening
from arena.core.contracts import Images, Verdict
from arena.core.inversion import scanning
from arena.core.inversion.engine import Family, Search
from arena.core.inversion.families import families
from arena.core.models import Classifier
from arena.core.registry import method, param
from arena.core.training import check_clean


@method
class Pixel:
    steps: int = param(1000, "passes over the images, at most", low=1, source="paper")
    samples: int = param(90, "clean images per class searched", low=1)
    asr: float = param(0.9, "success that a trigger must have", above=0, high=1, source="paper")
    stall: int | None = param(
        100, "passes without a trigger smaller by 1 % that end a search; none: all passes", low=1
    )
    restarts: int = param(3, "searches per class, of which the smallest counts", low=1)
    least_spread: float = param(
        0.3,
        "what the spread of the triggers' sizes counts as at least, as a share of their median",
        low=0,
        source="0: paper",
    )
    updates: int = param(
        800, "hardening: batches trained on", low=1, source="MOTH", under={"fast": 240, "smoke": 6}
    )
    batch: int = param(
        128, "hardening: images per update; a smaller set lowers it", low=2, source="MOTH"
    )
    lr: float = param(1e-3, "hardening: learning rate", above=0, source="MOTH's code")
    cutout: int | None = param(
        None,
        "hardening: side of the black square cut into every image, in pixels; 0 cuts nothing, none "
        "stands for 9 where fewer than 10,000 images are given and for 0 where more are",
        low=0,
        source="9: as finetune; 0: MOTH's code",
    )
    max_drop: float = param(
        0.05,
        "hardening: accuracy on held-out clean images that triggers may cost beyond training "
        "without them",
        low=0,
        high=1,
    )
    first: int = param(
        200,
        "hardening: passes of a class's first inversion",
        low=1,
        source="MOTH",
        under={"fast": 60, "smoke": 4},
    )
    more: int = param(
        40,
        "hardening: passes of those that go on from it",
        low=1,
        source="MOTH",
        under={"fast": 20, "smoke": 2},
    )
    portion: float = param(
        0.5, "hardening: share of a batch's other images that are stamped", above=0, high=1,
        source="MOTH's warm-up",
    )  # fmt: skip

    @property
    def wraps(self) -> dict[str, Family]:
        """Whose code counts for what comes out."""
        return {
            "scan": families.build("pixel:form=tanh"),
            "repair": families.build("pixel:form=clip"),
        }

    def scan(self, model: Classifier, clean: Images, rng: Generator) -> Verdict:
        check_clean(clean, model)
        _, classes, shape = model.spec
        family = self.wraps["scan"]
        search = Search(samples=self.samples, steps=self.steps, asr=self.asr, stall=self.stall)
        found = scanning.universal_triggers(
            model, family, clean, search, rng, classes=classes, restarts=self.restarts
        )
        return scanning.verdict(family, found, classes, shape, self.least_spread)

    def check(self, model: Classifier, clean: Images) -> None:
        hardening.check(model, clean, "pixel")

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        self.check(model, clean)
        family = self.wraps["repair"]
        pace = hardening.Pace(first=self.first, more=self.more, asr=self.asr, portion=self.portion)
        course = hardening.Course(
            self.updates, self.max_drop, self.batch, self.lr, cutout=self.cutout
        )
        return hardening.by_classes(model, clean, rng, family, pace, course)
