"""Neural attention distillation (NAD): a fine-tuned copy teaches the model where to look.

The teacher is a copy of the model, fine-tuned on the clean set and then frozen. The student is the
model itself: it is fine-tuned in the same way, while its attention (the channels' squares, summed,
as a map of length 1) is drawn to the teacher's at the shallow, the middle and the deep level. A
level without a map (no places, or a single one: its attention is always 1) is left out.

Source: Li et al. 2021, ICLR, arXiv 2101.05930. Official code: github.com/bboylyg/NAD.
Departs: the first rate is NAD's 0.1 only where held-out clean images bear it, else one of 0.05 to
    0.005, and falls along a cosine (as in `finetune`, which says why): on CIFAR-10 with fastnet 0.1
    wrecks the student (validation accuracy 33 % after 4 epochs, from 92), where a WRN-16-1 keeps
    its backdoor at 0.01. A student that loses more than its teacher may is taught anew by the
    teacher of the next lower rate. lr=0.1,decay_every=2 and 10 epochs are the paper's. The squared
    differences of two maps are summed and divided by the places of the paper's maps (32, 16 and 8 a
    side) instead of the map's own: that is the paper's mean on networks with its sizes, and the
    betas mean the same on others. With the mean over fastnet's 4x4 places the deep term's slope is
    27 times the labels' (accuracy 73 % instead of 88, both at 0.01).
    Where the paper is silent the code is followed (Nesterov momentum, black borders and holes).
    The code itself differs from the paper: 20 epochs at 0.1, 0.1, then 0.01, holes of side 3, and
    its published table used none. Every image alternates between its two mirror images instead of
    drawing one; a last, smaller batch is left out.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Generator, Tensor

from arena.core.contracts import Images, Step
from arena.core.features import features
from arena.core.models import LEVELS, Classifier
from arena.core.rates import Rung, climb, falling
from arena.core.registry import BadInput, method, param
from arena.core.training import (
    Recipe,
    autocast,
    check_clean,
    device_of,
    evaluating,
    finetuning,
)

PLACES = {"shallow": 32**2, "middle": 16**2, "deep": 8**2}  # of the paper's maps, on CIFAR-10
_TINY = 1e-6  # keeps the length of an empty map from being zero


@method
class NAD:
    beta_shallow: float = param(500.0, "weight of the shallow level's term", low=0, source="NAD")
    beta_middle: float = param(1000.0, "weight of the middle level's term", low=0, source="NAD")
    beta_deep: float = param(1000.0, "weight of the deep level's term", low=0, source="NAD")
    power: float = param(2.0, "power of a channel's size in the attention", low=1, source="NAD")
    teacher_epochs: int = param(
        40,
        "the teacher's passes over the clean set",
        low=0,
        source="NAD 10, its code 20; BackdoorBench 100",
        under={"fast": 10, "smoke": 2},
    )
    epochs: int = param(
        40,
        "the student's passes over the clean set",
        low=0,
        source="NAD 10, its code 20; BackdoorBench 100",
        under={"fast": 10, "smoke": 2},
    )
    lr: float | None = param(
        None,
        "first learning rate of both; none: the largest of 0.1 to 0.005 within max_drop",
        above=0,
        source="NAD 0.1",
        under={"smoke": 0.01},
    )
    max_drop: float = param(
        0.03, "accuracy on the held-out images that a rate may lose to lower ones", low=0, high=1
    )
    held_out: float = param(
        0.2,
        "share of the clean images, at most 1,000, that only chooses the rate",
        low=0,
        high=0.99,
    )
    decay_every: int | None = param(
        None,
        "epochs after which a rate is divided by ten; none: it falls along a cosine",
        low=1,
        source="BackdoorBench; NAD 2",
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
        if not _levels_with_maps(model):
            raise BadInput(
                f"nad: at no feature level has {model.spec.name} a map of more than one place for "
                "such images, so that there is no attention to distil; choose another network."
            )

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        self.check(model, clean)

        def teacher(rung: Rung) -> Classifier:
            copy, plan = deepcopy(model), self._plan(self.teacher_epochs, rung.rate)
            rung.fit(copy, plan, rng, what=f"teacher at {rung.rate:g}")
            return copy.eval()

        borne = climb(
            model, clean, rng, teacher, lr=self.lr, max_drop=self.max_drop, held_out=self.held_out
        )
        for found in reversed(borne):
            student = self._taught(model, found.tuned, found.rung, rng)
            if found.bears(student):
                break
        return student

    def _taught(
        self, model: Classifier, teacher: Classifier, rung: Rung, rng: Generator
    ) -> Classifier:
        """A copy of `model` whose attention follows the teacher's."""
        student, device = deepcopy(model), device_of(model)
        levels = _levels_with_maps(teacher)
        weights = dict(
            zip(LEVELS, (self.beta_shallow, self.beta_middle, self.beta_deep), strict=True)
        )

        def distil(step: Step) -> Tensor:
            with torch.no_grad(), autocast(device):
                wanted = features(teacher, step.batch.x, levels)
            terms = [
                weights[level] * distance(step.features[level], wanted[level], level, self.power)
                for level in levels
            ]
            return torch.stack(terms).sum()

        rung.fit(
            student, self._plan(self.epochs, rung.rate), rng,
            what=f"distillation at {rung.rate:g}", extra_loss=distil, levels=levels,
        )  # fmt: skip
        return student

    def _plan(self, epochs: int, lr: float) -> Recipe:
        plan = finetuning(
            epochs=epochs,
            lr=lr,
            decay_every=self.decay_every or 1,
            batch=self.batch,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            crop=self.crop,
            cutout=self.cutout,
        )
        return falling(plan, self.decay_every)


def attention(feature: Tensor, power: float = 2.0) -> Tensor:
    """(N, K, H, W) -> (N, H, W) float32 maps of Euclidean norm 1: the sum of |channel|^power."""
    found = feature.float().abs().pow(power).sum(1)
    return found / (found.flatten(1).norm(dim=1)[:, None, None] + _TINY)


def distance(student: Tensor, teacher: Tensor, level: str, power: float = 2.0) -> Tensor:
    """() squared difference of two features' attention, summed over places, mean over images, by
    the number of places in the paper's map of that level: there it is the mean over all."""
    apart = attention(student, power) - attention(teacher, power)
    return apart.square().sum((1, 2)).mean() / PLACES[level]


@torch.no_grad()
def _levels_with_maps(model: Classifier) -> list[str]:
    blank = torch.zeros(1, *model.spec.shape, device=device_of(model))
    with evaluating(model):
        found = features(model, blank)
    return [level for level in LEVELS if found[level].ndim == 4 and found[level][0, 0].numel() > 1]
