"""PixelBackdoor: Neural Cleanse's scan with triggers of few pixels instead of small masks.

Source: Tao et al. 2022, CVPR, Better Trigger Inversion Optimization in Backdoor Scanning: two
    positive changes per value, in the smooth (tanh) form that scanning needs; sizes are pixels, and
    the anomaly index is Neural Cleanse's.
Departs: `samples` images per class searched; searches may end early (`stall`), like NC's.
"""

from __future__ import annotations

from torch import Generator

from arena.core.contracts import Images, Verdict
from arena.core.inversion import scanning
from arena.core.inversion.engine import Search
from arena.core.inversion.families import families
from arena.core.models import Classifier
from arena.core.registry import method, param
from arena.core.training import check_clean


@method
class Pixel:
    steps: int = param(1000, "passes over the images, at most", low=1, source="paper")
    samples: int = param(270, "clean images per class searched", low=1)
    asr: float = param(0.9, "success that a trigger must have", above=0, high=1, source="paper")
    stall: int | None = param(
        100, "passes without a trigger smaller by 1 % that end a search; none: all passes", low=1
    )
    restarts: int = param(1, "searches per class, of which the smallest counts", low=1)

    def scan(self, model: Classifier, clean: Images, rng: Generator) -> Verdict:
        check_clean(clean, model)
        _, classes, shape = model.spec
        family = families.build("pixel:form=tanh")
        search = Search(samples=self.samples, steps=self.steps, asr=self.asr, stall=self.stall)
        found = scanning.universal_triggers(
            model, family, clean, search, rng, classes=classes, restarts=self.restarts
        )
        return scanning.verdict(family, found, classes, shape)
