"""Standard fine-tuning: all weights are trained on the clean set, from a high rate downwards.

The rate decides the outcome: 0.1 unlearns nearly all and relearns it, 0.001 leaves the backdoor
alone.

Source: the fine-tuning baseline of NAD (Li et al. 2021, arXiv 2101.05930), which DECK and MOTH
    compare with. Official code: github.com/bboylyg/NAD.
Departs: the first rate is 0.01 (BackdoorBench's), not NAD's 0.1. On CIFAR-10 with the recipe fast,
    0.1 costs fastnet 13 points of accuracy and resnet20 14 (validation images), about what
    training anew on the clean set gives; NAD and DECK report 2 to 4. lr=0.1 is NAD's own.
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
from arena.core.registry import method, param
from arena.core.training import check_clean, finetuning, fit


@method
class FineTune:
    epochs: int = param(10, "passes over the clean set", low=0, source="NAD")
    lr: float = param(0.01, "first learning rate", above=0, source="BackdoorBench; NAD 0.1")
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
        model = deepcopy(model)
        plan = finetuning(
            epochs=self.epochs,
            lr=self.lr,
            decay_every=self.decay_every,
            batch=self.batch,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            crop=self.crop,
            cutout=self.cutout,
        )
        fit(model, clean, plan, rng, what="fine-tuning")
        return model
