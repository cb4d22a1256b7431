"""Scanning: is there a class to which a suspiciously small trigger leads?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from arena.core.contracts import Images, Verdict
from arena.core.inversion.distances import (
    anomalies,
    smallest,
    smallest_by_target,
    universal_problems,
)
from arena.core.inversion.engine import Family, Found, Search, invert, stamped
from arena.core.inversion.frozen import Frozen
from arena.core.registry import BadInput
from arena.core.seeding import draw_seed


def universal_triggers(
    model: nn.Module,
    family: Family,
    clean: Images,
    search: Search,
    rng: Generator,
    *,
    classes: int,
    restarts: int = 1,
    trial: int | None = None,
) -> list[Found]:
    """Triggers from all other classes to each, on images of the clean set.

    trial: passes after which, of a class's searches, only the one with the smallest trigger goes
    on; None: all do. What the others had found by then is among the answers.
    Where a class has too few images for the search's samples, fewer are used for all, and as many
    more passes made, so that a search has as many updates and ends no sooner.
    """
    counts = torch.bincount(clean.y.cpu(), minlength=classes)
    if missing := (counts == 0).nonzero().flatten().tolist():
        raise BadInput(
            f"The clean set has no image of class {missing[0]}; a scan needs one or more of each."
        )
    most = int(counts.min()) * (classes - 1)
    frozen, seed = Frozen(model), draw_seed(rng)
    problems = universal_problems(classes, restarts)
    if restarts == 1 or trial is None or trial >= search.steps:
        whole = _fitting(search, most)
        return invert(frozen, family, problems, clean, whole, seed=seed, what="scanning")
    short = _fitting(replace(search, steps=trial), most)
    tried = invert(frozen, family, problems, clean, short, seed=seed, what="choosing starts")
    going = [_promising([a for a in tried if a.problem.target == t]) for t in range(classes)]
    rest = _fitting(replace(search, steps=search.steps - trial), most)
    return tried + invert(
        frozen,
        family,
        [one.problem for one in going],
        clean,
        rest,
        seed=seed,
        what="scanning",
        starts=[one.trigger for one in going],
    )


def _promising(found: Sequence[Found]) -> Found:
    """The answer of the smallest trigger; where none has the success, of the most successful."""
    return smallest(found) or max(found, key=lambda one: one.asr)


def _fitting(search: Search, most: int) -> Search:
    """The search on `most` images at most, with about as many updates altogether."""
    if most >= search.samples:
        return search
    updates, fewer = (math.ceil(count / search.batch) for count in (search.samples, most))
    longer = math.ceil(updates / fewer)
    return replace(
        search,
        samples=most,
        steps=search.steps * longer,
        patience=search.patience * longer,
        stall=None if search.stall is None else search.stall * longer,
    )


def verdict(
    family: Family,
    found: Sequence[Found],
    classes: int,
    shape: Sequence[int],
    least_spread: float,
) -> Verdict:
    """The class whose universal trigger is unusually small, by Neural Cleanse's anomaly index.

    least_spread: as in `anomalies`.
    """
    anomaly = anomalies(smallest_by_target(found, classes), least_spread)
    target = anomaly.flagged[0] if anomaly.flagged else None
    return Verdict(anomaly.score, target, anomaly.index, picture(family, found, target, shape))


def picture(
    family: Family, found: Sequence[Found], target: int | None, shape: Sequence[int]
) -> Tensor | None:
    """(C, H, W) in [0, 1]: the smallest trigger to `target` on a black image."""
    own = [one for one in found if one.problem.target == target and one.size]
    if not own:
        return None
    return picture_of(family, min(own, key=lambda one: one.size or 0.0), shape)


def picture_of(family: Family, found: Found, shape: Sequence[int]) -> Tensor:
    """(C, H, W) in [0, 1]: a trigger on a black image."""
    return stamped(family, found.trigger, torch.zeros(1, *shape))[0]
