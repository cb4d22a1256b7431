"""The arena from Python, in the caller's own process: load, poison, train, repair, evaluate.

The command line runs every method in a process of its own and keeps records; these functions are
for notebooks and scripts. They draw from the same streams, so a victim made here equals the one
that `arena run` makes from the same data, model, recipe, attack and seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from arena.core import metrics, poisoning, training
from arena.core.contracts import ControlsTraining, Poisoned, Trigger
from arena.core.models import Classifier
from arena.core.recipes import recipe_for
from arena.core.registry import BadInput, attacks, defenses, spec_of, strangers_imported
from arena.core.seeding import stream
from arena.core.victims import bound
from arena.core.whole import share_refusal
from arena.data import Dataset, draw_clean


@dataclass(frozen=True, eq=False)
class Victim:
    """A trained model with all that only the attacker and the referee know."""

    model: Classifier
    data: Dataset
    attack: Any
    trigger: Trigger | None
    poisoned: Poisoned
    seed: int
    recipe: str = "paper"  # of its training; defenses shorten what they say they shorten under it


@dataclass(frozen=True, eq=False)
class Repaired:
    """A repaired model and the victim that it was made from."""

    model: Classifier
    victim: Victim
    defense: Any


def train(
    data: Dataset,
    model: str = "fastnet",
    attack: str | Any = "none",
    *,
    recipe: str = "fast",
    seed: int = 0,
    device: str | None = None,
) -> Victim:
    """Poison `data` and train a victim on it.

    attack: a spec such as "patch:size=3", or an instance of a method. recipe: smoke, fast or paper,
    with fields of its own after a colon. Raises BadInput.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with strangers_imported():
        method = attacks.build(attack, recipe) if isinstance(attack, str) else attack
    method.check(data.shape, data.counts)
    trigger = method.prepare(data.train, stream(seed, "prepare"))
    poisoned = method.poison(data.train, trigger, stream(seed, "poison"))
    plan = recipe_for(recipe, model)
    fit = bound(model, data.num_classes, data.shape, plan, seed, where)
    if isinstance(method, ControlsTraining):
        made, trigger = method.train(fit, poisoned, trigger, stream(seed, "fit"))
    else:
        made = fit(poisoned.data, rng=stream(seed, "fit"))
    assert isinstance(made, Classifier)
    return Victim(made, data, method, trigger, poisoned, seed, recipe)


def repair(victim: Victim, defense: str | Any, *, clean_share: float = 0.05) -> Repaired:
    """Repair the victim with a defense that gets the weights and a clean set, and nothing else.

    defense: a spec such as "nad:epochs=5", or an instance of a method. clean_share: of the training
    images. Raises BadInput.
    """
    with strangers_imported():
        method = defenses.build(defense, victim.recipe) if isinstance(defense, str) else defense
    if refusal := share_refusal(method, clean_share):
        raise BadInput(refusal)
    data, rows = victim.data.train, victim.poisoned.rows
    chosen = draw_clean(
        data.y, clean_share, stream(victim.seed, "clean"), exclude=rows[rows < len(data)]
    )
    rng = stream(victim.seed, "repair", spec_of(method))
    return Repaired(method.repair(victim.model, data.take(chosen), rng), victim, method)


def evaluate(subject: Victim | Repaired) -> dict[str, float | None]:
    """ACC, ASR and RA of a victim or a repaired model on the whole test set, in [0, 1]."""
    victim = subject.victim if isinstance(subject, Repaired) else subject
    test, classes = victim.data.test, victim.data.num_classes
    found: dict[str, float | None] = {"acc": training.accuracy(subject.model, test)}
    if victim.trigger is None:
        return {**found, "asr": None, "ra": None}
    triggered = poisoning.stamp(test.x, victim.trigger.stamp)
    answers = training.logits(subject.model, triggered).argmax(1).cpu()
    counted = poisoning.applies(victim.attack, test.y, classes)
    wanted = poisoning.wanted(victim.attack, test.y, classes)
    found["asr"] = metrics.asr(answers, wanted, counted)
    found["ra"] = metrics.ra(answers, test.y, counted)
    return found
