"""The learning rate of a fine-tuning: the largest that held-out clean accuracy bears.

How much of a backdoor fine-tuning forgets is decided by its rate and by how long it stays high,
and which rate a network bears differs tenfold: on CIFAR-10 0.01 leaves a WRN-16-1 its backdoor
whole, and NAD's 0.1 wrecks others. The defender sees clean accuracy only, so that decides.

Source: the rates of NAD's code (0.1) and of BackdoorBench (0.01), two between, and its fall along
    a cosine. The search is this arena's; the papers fix a rate per network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import Generator

from arena.core.contracts import BatchHook, Images
from arena.core.models import Classifier
from arena.core.progress import report
from arena.core.training import Recipe, accuracy, fit, split

RATES = (0.1, 0.05, 0.02, 0.01)
MOST_HELD = 1000  # images: more tell no more
_OFTEN = 10.0  # seconds between two looks at them while a copy is trained


def falling(plan: Recipe, decay_every: int | None) -> Recipe:
    """`plan`, along a cosine unless its rate is divided by ten every `decay_every` epochs."""
    return plan if decay_every else replace(plan, schedule="cosine", drop_at=())


@dataclass(frozen=True)
class Rung:
    """A rate to try on `images`."""

    rate: float
    images: Images
    held: Images | None  # None: none are held out, and nothing can decide
    floor: float = 0.0  # of the accuracy on them; 0: there is no lower rate

    def bears(self, tuned: Classifier) -> bool:
        """Whether this rate does not cost too much, or there is no other."""
        return self.held is None or accuracy(tuned, self.held) >= self.floor

    def fit(
        self, model: Classifier, plan: Recipe, rng: Generator, *, what: str, **more: Any
    ) -> None:
        """Train `model`, in place, on the images, and tell its accuracy on those held out."""
        fit(
            model, self.images, plan, rng, on_batch=self._look(model, plan, what), what=what, **more
        )

    def _look(self, model: Classifier, plan: Recipe, what: str) -> BatchHook | None:
        """Changes nothing: looks where an epoch has ended, not too often, since a look costs."""
        if (held := self.held) is None:
            return None
        steps = len(self.images) // min(plan.batch, len(self.images))
        made, last = 0, time.monotonic()

        def look(images: Images, _: Generator) -> Images:
            nonlocal made, last
            if made and made % steps == 0 and time.monotonic() - last >= _OFTEN:
                report(what, made, steps * plan.epochs, accuracy=accuracy(model, held))
                last = time.monotonic()
            made += 1
            return images

        return look


def rungs(
    model: Classifier,
    clean: Images,
    rng: Generator,
    *,
    lr: float | None,
    max_drop: float,
    held_out: float,
) -> Iterator[Rung]:
    """RATES from the largest down; whoever iterates stops at the first that the model bears: it
    costs at most `max_drop` of the accuracy on the images held out. The model may have been trained
    on these, too: then it loses more on them than on others.

    lr: this rate alone, on all clean images. Where there is nothing to hold out, nothing can
    decide, and it is the lowest of RATES.
    """
    if lr is not None:
        yield Rung(lr, clean, None)
        return
    held, tune = split(clean, min(held_out, MOST_HELD / len(clean)), rng)
    if not len(held) or not len(tune):
        yield Rung(RATES[-1], clean, None)
        return
    floor = accuracy(model, held) - max_drop - 1e-9  # the drop itself is within the limit
    for rate in RATES:
        yield Rung(rate, tune, held, 0.0 if rate == RATES[-1] else floor)


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
    """A copy of `model`, fine-tuned as `plan` says for the rate that is found as in `rungs`.

    inside: what surrounds the training of a copy, such as a mask.
    """
    for rung in rungs(model, clean, rng, lr=lr, max_drop=max_drop, held_out=held_out):
        copy, what = deepcopy(model), f"fine-tuning at {rung.rate:g}"
        with inside(copy):
            rung.fit(copy, plan(rung.rate), rng, what=what)
        if rung.bears(copy):
            break
    return copy
