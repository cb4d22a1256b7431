"""The learning rate of a fine-tuning: the largest that held-out clean accuracy bears.

How much of a backdoor fine-tuning forgets is decided by its rate and by how long it stays high,
and which rate a network bears differs tenfold: on CIFAR-10 0.01 leaves a WRN-16-1 its backdoor
whole, and NAD's 0.1 wrecks others. The defender sees clean accuracy only, so that decides.

What a rate costs is counted from the best of the lower ones, not from the model as it came. The
defender's images are mostly ones that the victim was trained on: what it knew of them by heart goes
with any fine-tuning, is no loss on other images, and differs from network to network.

Accuracy alone would end the climb before anything is forgotten where a network stays as it is at
low rates. How far a rate moves it can be seen without a trigger: by the angle that filters turn.
Behind a normalisation only their direction counts, so that the same rate means more for short
filters than for long ones, and angles compare where rates do not. Until they have turned enough, a
rate may cost more.

Source: the rates of NAD's code (0.1) and of BackdoorBench (0.01), two between and one below, and
    its fall along a cosine. That the effective rate is one of directions: van Laarhoven 2017, arXiv
    1706.05350. The search is this arena's; the papers fix a rate per network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator
from torch.nn import functional as F

from arena.core.contracts import Images
from arena.core.looks import looking
from arena.core.models import Classifier
from arena.core.training import Recipe, accuracy, fit, split

RATES = (0.005, 0.01, 0.02, 0.05, 0.1)
MOST_HELD = 1000  # images: more tell no more
_TURNED = 15.0  # degrees: at 13.7 a WRN-16-1 kept its backdoor, at 15.8 fastnets had lost theirs
_UNTURNED_DROP = 0.1  # accuracy that a rate may cost while lower ones have turned less


def falling(plan: Recipe, decay_every: int | None) -> Recipe:
    """`plan`, along a cosine unless its rate is divided by ten every `decay_every` epochs."""
    return plan if decay_every else replace(plan, schedule="cosine", drop_at=())


@dataclass(frozen=True)
class Rung:
    """A rate to try on `images`."""

    rate: float
    images: Images
    held: Images | None  # None: none are held out, and nothing can decide

    def fit(
        self, model: Classifier, plan: Recipe, rng: Generator, *, what: str, **more: Any
    ) -> None:
        """Train `model`, in place, on the images, and tell its accuracy on those held out."""
        steps = len(self.images) // min(plan.batch, len(self.images))
        look, held = None, self.held
        if held is not None:
            look = looking(what, lambda: accuracy(model, held), steps, steps * plan.epochs)
        fit(model, self.images, plan, rng, on_batch=look, what=what, **more)


@dataclass(frozen=True)
class Borne:
    """What a rate that costs little has made of the model."""

    rung: Rung
    tuned: Classifier
    floor: float  # of the accuracy on the images held out: below it, a rate costs too much

    def bears(self, tuned: Classifier) -> bool:
        """Whether so much is left in what was made of the model in another way at this rate."""
        held = self.rung.held
        return held is None or accuracy(tuned, held) >= self.floor


def climb(
    model: Classifier,
    clean: Images,
    rng: Generator,
    train: Callable[[Rung], Classifier],
    *,
    lr: float | None,
    max_drop: float,
    held_out: float,
) -> list[Borne]:
    """What `train` makes of `model` at RATES from the lowest up, until one costs more than
    `max_drop` of the accuracy on the images held out, counted from the best; a tenth of it, where
    `max_drop` is less, while no rate has turned the filters far. At least the lowest.

    lr: this rate alone, on all clean images. Where there is nothing to hold out, nothing can
    decide, and it is the lowest of RATES.
    """
    if lr is not None:
        rung = Rung(lr, clean, None)
        return [Borne(rung, train(rung), 0.0)]
    held, tune = split(clean, min(held_out, MOST_HELD / len(clean)), rng)
    if not len(held) or not len(tune):
        rung = Rung(RATES[0], clean, None)
        return [Borne(rung, train(rung), 0.0)]
    borne: list[Borne] = []
    best, far = 0.0, False
    for rate in RATES:
        rung = Rung(rate, tune, held)
        made = train(rung)
        reached = accuracy(made, held)
        best = max(best, reached)
        limit = max_drop if far else max(max_drop, _UNTURNED_DROP)
        floor = best - limit - 1e-9  # the drop itself is within the limit
        if reached < floor:
            break
        borne.append(Borne(rung, made, floor))
        far = turned(model, made) >= _TURNED
    return borne


@torch.no_grad()
def turned(before: Classifier, after: Classifier) -> float:
    """Degrees by which filters have turned: the mean over those of a layer, and over the layers
    that learn. A filter is what makes one output of a weight; its length does not count."""
    old, angles = dict(before.named_parameters()), []
    for name, weight in after.named_parameters():
        if weight.ndim < 2 or not weight.requires_grad:
            continue
        one, two = (w.detach().double().flatten(1) for w in (old[name], weight))
        some = (one != 0).any(1) & (two != 0).any(1)  # nothing, as of pruned filters, has no angle
        if some.any():
            turns = F.cosine_similarity(one[some], two[some], 1).clamp(-1, 1).acos()
            angles.append(turns.mean())
    return math.degrees(float(torch.stack(angles).mean())) if angles else 0.0


def tuned(
    model: Classifier,
    clean: Images,
    rng: Generator,
    plan: Callable[[float], Recipe],
    *,
    lr: float | None,
    max_drop: float,
    held_out: float,
    inside: Callable[[Classifier], AbstractContextManager[object]] = nullcontext,
) -> Classifier:
    """A copy of `model`, fine-tuned as `plan` says for the largest rate that `climb` finds borne.

    inside: what surrounds the training of a copy, such as a mask.
    """

    def train(rung: Rung) -> Classifier:
        copy = deepcopy(model)
        with inside(copy):
            rung.fit(copy, plan(rung.rate), rng, what=f"fine-tuning at {rung.rate:g}")
        return copy

    borne = climb(model, clean, rng, train, lr=lr, max_drop=max_drop, held_out=held_out)
    return borne[-1].tuned
