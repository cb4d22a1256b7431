"""What the answers of workers must look like, since a record is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arena.referee.isolate import Failed

_COUNT, _NUMBER, _TEXT, _FLAG, _ANY = "a count", "a number", "a text", "yes or no", "anything"
_BUDGET = {
    "seconds": _NUMBER,
    "peak_memory_mb": (_NUMBER, None),
    "forward_images": _COUNT,
    "backward_images": _COUNT,
}
_REPAIRED = {**_BUDGET, "clean_images": _COUNT}
_ANSWERS: dict[str, Any] = {
    "attack": {
        "budget": _BUDGET,
        "poisoned_rows": _COUNT,
        "training_images": _COUNT,
        "stamped": _FLAG,
        "resumed": _FLAG,
    },
    "repair": {"budget": _REPAIRED},
    "usable": {"reasons": {str: _TEXT}},
    "scan": {
        "score": _NUMBER,
        "target": (_COUNT, None),
        "per_class": ([_NUMBER], [[_NUMBER]], None),
        "budget": _REPAIRED,
    },
    "detect": {},
    "measure": _ANY,  # no stranger's code runs there
    "examine": {"figures": _ANY, "each": _ANY, "seconds": _NUMBER, "resumed": _FLAG},
}


def check_answer(job: str, found: Mapping[str, Any]) -> None:
    """Raise Failed unless the result of a job has its entries, each of its kind, and no other."""
    if job in _ANSWERS and (fault := _fault(found, _ANSWERS[job], "")):
        raise Failed("failed", f"its answer is not one: {fault}")


def _fault(value: Any, wanted: Any, where: str) -> str:
    """What is wrong, or ''."""
    if isinstance(wanted, tuple):
        return "" if not all(_fault(value, each, where) for each in wanted) else f"{where} is wrong"
    if wanted is None:
        return "" if value is None else f"{where} is wrong"
    if isinstance(wanted, list):
        if not isinstance(value, list) or len(value) > 10_000:
            return f"{where} is no list"
        return next((fault for each in value if (fault := _fault(each, wanted[0], where))), "")
    if isinstance(wanted, dict):
        if not isinstance(value, Mapping):
            return f"{where or 'the whole'} has no entries"
        if str in wanted:
            faults = (_fault(each, wanted[str], where) for each in value.values())
            return next(filter(None, faults), "")
        if value.keys() != wanted.keys():
            names = sorted(map(str, value.keys() ^ wanted.keys()))
            return f"{names[0][:60]!r} is missing or too much"
        faults = (_fault(value[name], kind, name) for name, kind in wanted.items())
        return next(filter(None, faults), "")
    right = {
        _ANY: True,
        _TEXT: isinstance(value, str) and len(value) <= 10_000,
        _FLAG: isinstance(value, bool),
        _NUMBER: isinstance(value, int | float) and not isinstance(value, bool),
        _COUNT: isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53,
    }[wanted]
    return "" if right else f"{where} is not {wanted}"
