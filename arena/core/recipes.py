"""Training recipes by spec: `fast`, or `fast:epochs=20,lr=0.3` with fields of its own.

A network's own settings (`arena.core.models.info(NAME).overrides`) come first, then the spec's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from arena.core import models, training
from arena.core.registry import BadInput, nearest, split_spec
from arena.core.training import Recipe

_AT_LEAST = {"epochs": 1, "batch": 2}  # all other numbers: 0


def recipe_for(text: str, model: str) -> Recipe:
    """The recipe `text` for the network `model`. Raises BadInput with the nearest valid choice."""
    name, changes = split_spec(text)
    plan = training.recipe(name, models.info(model).overrides.get(name))
    known = {f.name: getattr(plan, f.name) for f in fields(Recipe) if f.name != "drop_at"}
    for key in changes:
        if key not in known:
            raise BadInput(f"recipe {name!r} has no field {key!r}; {nearest(key, known)}.")
    values: dict[str, Any] = {k: _parsed(v, k, known[k], text) for k, v in changes.items()}
    return replace(plan, **values)


def _parsed(text: str, key: str, usual: object, spec: str) -> bool | int | float | str:
    if isinstance(usual, bool):
        if text not in ("true", "false"):
            raise BadInput(f"{spec!r}: {key} must be true or false, got {text!r}.")
        return text == "true"
    if isinstance(usual, str):
        return text
    kind: Callable[[str], int | float] = int if isinstance(usual, int) else float
    try:
        value = kind(text)
    except ValueError:
        need = "a whole number" if kind is int else "a number"
        raise BadInput(f"{spec!r}: {key} must be {need}, got {text!r}.") from None
    if not _AT_LEAST.get(key, 0) <= value < float("inf"):
        raise BadInput(f"{spec!r}: {key} must be at least {_AT_LEAST.get(key, 0)}, got {text}.")
    return value
