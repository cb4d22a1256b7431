"""Neural Cleanse: a class to which an unusually small trigger leads is a backdoor's target.

For every class, a mask and a pattern are optimised that send all other images there; the class
whose mask is smaller than the median by more than twice 1.4826 MAD is blamed.

Source: Wang et al. 2019, S&P, Neural Cleanse, section IV; settings of its published library (the
    weight on the mask waits for the first successes, 1e-3, changed by 1.5 and 1.5^1.5 after ten
    passes, 99 % success; a search ends after 20 passes without a smaller mask).
Departs: `samples` images per class searched, not the whole clean set; the anomaly index is that of
    the smallest mask, negative for masks above the median.
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
class NC:
    steps: int = param(1000, "passes over the images, at most", low=1, source="library")
    samples: int = param(270, "clean images per class searched", low=1)
    asr: float = param(0.99, "success that a trigger must have", above=0, high=1, source="library")
    stall: int = param(
        20, "passes without a trigger smaller by 1 % that end a search", low=1, source="library"
    )
    restarts: int = param(1, "searches per class, of which the smallest counts", low=1)

    def scan(self, model: Classifier, clean: Images, rng: Generator) -> Verdict:
        check_clean(clean, model)
        _, classes, shape = model.spec
        family = families.build("nc:nudge=0")
        search = Search(
            samples=self.samples, steps=self.steps, asr=self.asr, stall=self.stall, wait=True
        )
        found = scanning.universal_triggers(
            model, family, clean, search, rng, classes=classes, restarts=self.restarts
        )
        return scanning.verdict(family, found, classes, shape)
