"""Training from scratch on the clean set alone: what a defender gets who throws the model away.

No trace of the backdoor can be left, so that a defense whose accuracy is below this one's has
repaired nothing that was worth keeping.

Source: a null method of this arena; the recipe is the arena's `fast` one with the network's own
    settings, in batches small enough for a small set. A few images (2 %, 500 at most) are
    held out, to tell the accuracy on the way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Generator

from arena.core import whole
from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.registry import method, param


@method
class Retrain:
    null: ClassVar[bool] = True

    epochs: int = param(30, "passes over the clean set", low=1, under={"smoke": 2})
    min_steps: int = param(
        300, "updates at least; a small set gets more passes", low=0, under={"smoke": 20}
    )
    batch: int = param(128, "images per update; a smaller set lowers it", low=2)
    lr: float | None = param(
        None, "peak rate; none: that of the network's recipe, in proportion to the batch", above=0
    )

    def check(self, model: Classifier, clean: Images) -> None:
        whole.check(model, clean, "scratch")

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        new = whole.started(model, clean, "scratch", rng)
        usual = whole.usual(model, "fast")
        plan = replace(
            usual,
            epochs=self.epochs,
            min_steps=self.min_steps,
            batch=self.batch,
            lr=self.lr or usual.lr * self.batch / usual.batch,
        )
        whole.fit(new, clean, plan, rng, what="retraining")
        return new
