"""Standard fine-tuning: all weights are trained on the clean set, from a high rate downwards.

The rate decides the outcome, and networks bear different ones. The largest that held-out clean
images bear is taken: what is forgotten beyond that is not worth its price.

Source: the fine-tuning baseline of NAD (Li et al. 2021, arXiv 2101.05930), which DECK and MOTH
    compare with. Official code: github.com/bboylyg/NAD.
Departs: NAD starts at 0.1, BackdoorBench at 0.01. On CIFAR-10 0.01 leaves a WRN-16-1 its backdoor
    and 0.1 costs fastnet and resnet20 13 points; NAD and DECK report 2 to 4. So the rate is chosen
    (`arena.core.rates`); lr=0.1 is NAD's own, lr=0.01 BackdoorBench's, both on all clean images.
    Where the paper is silent the code is followed (Nesterov momentum, black borders and holes).
    The code itself differs from the paper: 20 epochs at 0.1, 0.1, then 0.01, and 0.0001 from the
    21st on, holes of side 3, and its published table used none. Every image alternates between
    its two mirror images instead of drawing one; a last, smaller batch is left out.
"""

from __future__ import annotations

from copy import deepcopy

from torch import Generator

from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.rates import rungs
from arena.core.registry import method, param
from arena.core.training import Recipe, check_clean, finetuning, fit


@method
class FineTune:
    epochs: int = param(10, "passes over the clean set", low=0, source="NAD")
    lr: float | None = param(
        None,
        "first learning rate; none: the largest of 0.1, 0.03 and 0.01 within max_drop",
        above=0,
        source="NAD 0.1; BackdoorBench 0.01",
        under={"smoke": 0.01},
    )
    max_drop: float = param(
        0.05, "accuracy that a rate may cost on the held-out images", low=0, high=1
    )
    held_out: float = param(
        0.2,
        "share of the clean images, at most 1,000, that only chooses the rate",
        low=0,
        high=0.99,
    )
    decay_every: int = param(
        2, "epochs after which the rate is divided by ten", low=1, source="NAD"
    )
    batch: int = param(64, "images per update; a smaller set lowers it", low=2, source="NAD")
    crop: int = param(4, "random shift, in pixels; 0: none", low=0, source="NAD")
    cutout: int = param(
        9, "side of the black square in every image, in pixels; 0: none", low=0, source="NAD"
    )
    weight_decay: float = param(1e-4, "on all weights", low=0, source="NAD")
    momentum: float = param(0.9, "Nesterov", low=0, high=0.999, source="NAD")

    def check(self, model: Classifier, clean: Images) -> None:
        check_clean(clean, model)

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        self.check(model, clean)
        rates = rungs(model, clean, rng, lr=self.lr, max_drop=self.max_drop, held_out=self.held_out)
        for rung in rates:
            tuned = deepcopy(model)
            fit(
                tuned, rung.images, self._plan(rung.rate), rng, what=f"fine-tuning at {rung.rate:g}"
            )
            if rung.bears(tuned):
                break
        return tuned

    def _plan(self, lr: float) -> Recipe:
        return finetuning(
            epochs=self.epochs,
            lr=lr,
            decay_every=self.decay_every,
            batch=self.batch,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            crop=self.crop,
            cutout=self.cutout,
        )
