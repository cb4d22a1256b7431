"""Backdoor Arena: where backdoor attacks on image classifiers meet the defenses against them.

    import arena

    data = arena.load("signs")
    victim = arena.train(data, "fastnet", "patch", seed=0)
    repaired = arena.repair(victim, "finetune")
    print(arena.evaluate(repaired))

Names are imported when they are first used, so that `import arena` and the command line are fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arena.api import Repaired, Victim, evaluate, repair, train
    from arena.core.registry import BadInput
    from arena.data import Dataset, load

_HOMES = {
    "load": "arena.data",
    "Dataset": "arena.data",
    "train": "arena.api",
    "repair": "arena.api",
    "evaluate": "arena.api",
    "Victim": "arena.api",
    "Repaired": "arena.api",
    "BadInput": "arena.core.registry",
}

__all__ = [
    "BadInput",
    "Dataset",
    "Repaired",
    "Victim",
    "evaluate",
    "load",
    "repair",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'arena' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
