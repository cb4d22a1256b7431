"""What records and boards of a store look like: readers rely on it, whoever wrote the file.

A checksum tells damage, not where a file comes from: one of another program, of another version,
or made by hand may have a right one. `misfit` names the first place where a value is not of its
shape: a type; {name: shape}, where `name?` may be missing; {"*": shape} for any names; [shape] for
a list; a tuple of shapes for any of them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

_NUMBERS = {"*": (float, None)}
_METHOD = {"name": str, "short": str, "spec": str, "code": str}
_READING = {"seconds": float, "device": str, "resumed": bool}

RECORD: Mapping[str, Any] = {
    "key": str,
    "status": str,
    "reason?": str,
    "details?": str,
    "board": {"name": str, "version": int},
    "dataset": {
        "name": str,
        "fingerprint": str,
        "source": str,
        "train": int,
        "test": int,
        "classes": [str],
        "shape": [int],
    },
    "model": str,
    "recipe": str,
    "plan": dict,
    "attack": {**_METHOD, "threat": str, "scope": str, "labels": str, "trigger": str},
    "defense": {**_METHOD, "null": bool},
    "clean_share": float,
    "seed": int,
    "metrics": _NUMBERS,
    "intervals?": {"*": [float, float]},
    "budget?": _NUMBERS,
    "victim_budget?": _NUMBERS,
    "flags": [{"name": str, "meaning": str, "remedy": str}],
    "measures?": {
        "*": (
            {**_METHOD, "status": ("ok",), "before": dict, "after": _READING, "columns": dict},
            {**_METHOD, "status": str, "reason": str},
        )
    },
    "probes?": {"*": {"ra": (float, None), "asr": (float, None), "images": int}},
    "mmd?": {"*": _NUMBERS},
    "parts?": {"*": {"name": str, "figures": dict}},
    "weights?": {"before": str, "after": str},
    "parents": {"victim": str, "twin": (str, None), "twin_cell": (str, None)},
    "hardware": dict,
    "versions": dict,
    "command": str,
    "commit?": str,
    "started?": str,
    "finished?": str,
}
BOARD: Mapping[str, Any] = {
    "name": str,
    "version": int,
    "definition": {
        "title?": str,
        "measure?": [str],
        "published?": [
            {"attack": str, "source": str, "acc?": (float, None), "asr?": (float, None)}
        ],
    },
    "command": str,
    "cells": [str],
}


def misfit(value: Any, shape: Any, at: str = "it") -> str:
    """`at.name is no …`, or '' where the value is of its shape."""
    if isinstance(shape, tuple):
        faults = [misfit(value, each, at) for each in shape]
        return "" if "" in faults else faults[0]
    if isinstance(shape, Mapping):
        return _in_mapping(value, shape, at)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{at} is no list"
        if len(shape) > 1 and len(value) != len(shape):
            return f"{at} holds {len(value)} values, not {len(shape)}"
        return next(filter(None, (misfit(each, shape[0], f"{at}[]") for each in value)), "")
    if shape is None or isinstance(shape, str):
        return "" if value == shape else f"{at} is not {shape!r}"
    if shape in (int, float):
        kinds = (int,) if shape is int else (int, float)
        number = isinstance(value, kinds) and not isinstance(value, bool)
        return "" if number and abs(value) <= sys.float_info.max else f"{at} is no number"
    return "" if isinstance(value, shape) else f"{at} is no {shape.__name__}"


def _in_mapping(value: Any, shape: Mapping[str, Any], at: str) -> str:
    if not isinstance(value, Mapping):
        return f"{at} is no object"
    for name, inner in shape.items():
        if name == "*":
            found = (misfit(each, inner, f"{at}.{key}") for key, each in value.items())
            return next(filter(None, found), "")
        bare = name.removesuffix("?")
        if bare not in value:
            if bare == name:
                return f"{at} lacks {bare!r}"
        elif fault := misfit(value[bare], inner, f"{at}.{bare}"):
            return fault
    return ""
