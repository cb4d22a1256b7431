"""Training on the whole training set, from new weights or from those of the given model.

Some images are held out of it, to tell the accuracy on the way by; nothing is chosen by them.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from typing import Any

from torch import Generator

from arena.core import foreign, models, training
from arena.core.contracts import BatchHook, Images
from arena.core.looks import looking
from arena.core.models import Classifier
from arena.core.registry import BadInput, short_spec
from arena.core.training import Recipe

_HELD_OUT, _SHARE = 500, 0.02  # images to tell the accuracy by: so many, at most that share


def check(model: Classifier, clean: Images, start: str) -> None:
    """Raise BadInput unless `clean` has all classes, and `started` can make the network."""
    training.check_clean(clean, model)
    if start != "model" and foreign.is_foreign(model.spec.name):
        raise BadInput(
            f"{model.spec.name} cannot be made anew with other weights, as training from scratch "
            "needs; use start=model where the defense has it."
        )


def started(model: Classifier, clean: Images, start: str, rng: Generator) -> Classifier:
    """A copy of `model`, or (start is "scratch") its architecture with new weights, calibrated on
    `clean`. Raises BadInput as `check` does."""
    check(model, clean, start)
    if start == "model":
        return deepcopy(model)
    new = models.fresh(model, rng)
    models.calibrate(new, clean)
    return new


def usual(model: Classifier, recipe: str) -> Recipe:
    """The recipe with the network's own settings, as far as the arena knows the network."""
    name = model.spec.name
    known = {} if foreign.is_foreign(name) else models.info(name).overrides
    return training.recipe(recipe, known.get(recipe))


def planned(model: Classifier, recipe: str, epochs: int | None, lr: float | None) -> Recipe:
    """`usual` without label smoothing; epochs, lr: in the recipe's place."""
    plan = usual(model, recipe)
    plan = replace(plan, label_smoothing=0.0, lr=lr or plan.lr)
    return plan if epochs is None else replace(plan, epochs=epochs, min_steps=0)


def fit(
    model: Classifier,
    clean: Images,
    plan: Recipe,
    rng: Generator,
    *,
    what: str,
    on_batch: BatchHook | None = None,
    **more: Any,
) -> Images:
    """Train `model` in place, as `training.fit` does, and tell its accuracy on images held out.

    Returns the images that it was trained on; of fewer than 25 none is held out.
    """
    held, tune = training.split(clean, min(_SHARE, _HELD_OUT / len(clean)), rng)
    if not len(held):
        training.fit(model, clean, plan, rng, on_batch=on_batch, what=what, **more)
        return clean
    steps = len(tune) // min(plan.batch, len(tune))
    epochs = max(plan.epochs, math.ceil(plan.min_steps / steps))
    look = looking(what, lambda: training.accuracy(model, held), steps, steps * epochs)

    def hook(images: Images, draws: Generator) -> Images:
        images = look(images, draws)
        return images if on_batch is None else on_batch(images, draws)

    training.fit(model, tune, plan, rng, on_batch=hook, what=what, **more)
    return tune


def share_refusal(defense: Any, share: float) -> str:
    """Why a defense cannot work with this share of clean images; empty where it can."""
    need: float = getattr(defense, "needs_share", 0.0)
    if share >= need:
        return ""
    return (
        f"{short_spec(defense)} trains on {need:.0%} of the training images: set the share of "
        f"clean images (clean_share, --clean-share) to {need:g}, not {share:g}."
    )
