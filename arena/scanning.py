"""Scanners asked about one model, each in a process that holds the model and a clean set only."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from arena.boards import check_recipe
from arena.core.inversion.distances import ANOMALY
from arena.core.registry import BadInput, defenses, nearest, short_spec
from arena.store import Store
from arena.subjects import Subject, ask_once


def scanners() -> list[str]:
    return [each.name for each in defenses.describe_all() if "scans" in each.powers]


def check(text: str, recipe: str = "paper") -> None:
    """Raise BadInput unless `text` is the spec of a scanner; imports no method."""
    check_recipe(recipe)
    name = text.partition(":")[0]
    if name not in (known := scanners()):
        if name in defenses.names():
            powers = " and ".join(defenses.describe(name).powers)
            raise BadInput(f"{name} {powers} but scans nothing; scanners: {', '.join(known)}.")
        raise BadInput(f"There is no scanner {name!r}; {nearest(name, known)}")


def scan(
    subject: Subject,
    text: str,
    store: Store,
    *,
    clean_share: float = 0.05,
    recipe: str = "paper",
    device: str = "cpu",
) -> tuple[dict[str, Any], Tensor | None]:
    """What `arena scan` prints, as JSON values, and the trigger's picture (C, H, W) in [0, 1].

    The clean set is the one that a defense of the cell would get; recipe: what scanners shorten
    under it, they do. Raises BadInput.
    """
    method, data = defenses.build(text, recipe), subject.data
    found, written = ask_once(
        subject, "scan", method, store, clean_share=clean_share, device=device
    )
    each, matrix = found["per_class"], None
    if each and isinstance(each[0], list):  # by victim and target
        matrix, each = each, [max(column) for column in zip(*each, strict=True)]
    victim = _victim(matrix, found["target"])
    return {
        "model": subject.name,
        "weights": subject.digest,
        "method": short_spec(method),
        "backdoored": found["target"] is not None,
        "score": found["score"],
        "threshold": getattr(method, "threshold", ANOMALY),
        "target": found["target"],
        "target_name": None if found["target"] is None else data.classes[found["target"]],
        "victim": victim,
        "victim_name": None if victim is None else data.classes[victim],
        "per_class": None if each is None else [None if math.isnan(v) else v for v in each],
        "per_pair": matrix,
        "classes": list(data.classes),
        "clean_images": found["budget"]["clean_images"],
        "seed": subject.seed,
        "budget": found["budget"],
    }, written.get("trigger")


def _victim(matrix: list[list[float]] | None, target: int | None) -> int | None:
    """The one class from which the suspicious trigger leads to the target; None: from all."""
    if matrix is None or target is None:
        return None
    scores = [row[target] for row in matrix]
    worst = [label for label, score in enumerate(scores) if score == max(scores)]
    return worst[0] if len(worst) == 1 else None
