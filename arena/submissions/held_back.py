"""What a board holds back: seeds, target classes and trigger instances drawn from a secret.

The maintainer keeps the secret; board.toml commits to its sha256. Draws are HMACs, so that nobody
gets from what was drawn to the secret. On a card, what was drawn is replaced by what the board says
in public, and keys, which others could guess their way back from, by an HMAC.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arena.boards import Board
from arena.core.registry import BadInput, attacks, show_value, split_spec

_TELLING = ("command", "parents", "mmd", "probes", "parts", "clean_rows", "details", "measures")


def read_secret(path: Path, board: Board) -> bytes:
    """The maintainer's secret. Raises BadInput unless it is the one that the board commits to."""
    if board.held_back is None:
        raise BadInput(f"The board {board.name!r} holds nothing back, so it needs no --secret.")
    try:
        secret = path.read_bytes()
    except OSError as error:
        raise BadInput(f"The secret {str(path)!r} cannot be read ({error.strerror}).") from error
    if len(secret) < 16:
        raise BadInput("A secret has 16 bytes at least; `openssl rand -out FILE 32` makes one.")
    if not hmac.compare_digest(hashlib.sha256(secret).hexdigest(), board.held_back.commitment):
        raise BadInput(f"This is not the secret that the board {board.name!r} commits to.")
    return secret


def drawn(board: Board, secret: bytes, classes: int) -> Board:
    """The board with what it holds back; attacks and seeds stay in their places.

    classes: of its data sets, the fewest. Raises BadInput.
    """
    assert board.held_back is not None
    held = board.held_back

    def number(*purpose: object) -> int:
        words = "/".join(map(str, (board.name, board.version, *purpose)))
        return int.from_bytes(hmac.digest(secret, words.encode(), "sha256"), "big")

    seeds = board.seed
    if "seed" in held.draws:
        seeds = tuple(number("seed", place) % 2**31 for place in range(len(board.seed)))
    specs = []
    for place, text in enumerate(board.attack):
        name, values = split_spec(text)
        fields = [field.name for field in attacks.describe(name).fields]
        if "target" in held.draws and "target" in fields:
            values["target"] = str(number("target", place) % classes)
        for attack, field, options in held.choices:
            if attack == name:
                if field not in fields:
                    raise BadInput(f"held_back: attack {name!r} has no field {field!r}.")
                values[field] = show_value(options[number("trigger", place, field) % len(options)])
        told = ",".join(f"{key}={_wrapped(value)}" for key, value in values.items())
        specs.append(f"{name}:{told}" if told else name)
    if len(set(specs)) < len(specs) or len(set(seeds)) < len(seeds):
        raise BadInput("What is held back fell on the same value twice; choose another secret.")
    return replace(board, seed=seeds, attack=tuple(specs), published=())


def _wrapped(value: str) -> str:
    return f"({value})" if set(value) & set(",=") and not value.startswith("(") else value


def told_apart(
    records: Sequence[Mapping[str, Any]],
    secret: bytes,
    shown: Mapping[str, tuple[str, str]],
    places: Mapping[int, int],
) -> list[dict[str, Any]]:
    """Records as they may be published.

    shown: full spec that was run -> the public short and full spec; places: seed -> public seed.
    """
    hidden = {str(seed) for seed in places} | _values(shown)
    return [_told(record, secret, shown, places, hidden) for record in records]


def _told(
    record: Mapping[str, Any],
    secret: bytes,
    shown: Mapping[str, tuple[str, str]],
    places: Mapping[int, int],
    hidden: set[str],
) -> dict[str, Any]:
    found = {name: value for name, value in record.items() if name not in _TELLING}
    short, spec = shown[record["attack"]["spec"]]
    found["attack"] = {**record["attack"], "short": short, "spec": spec}
    found["attack"].pop("files", None)
    found["key"] = hmac.digest(secret, record["key"].encode(), "sha256").hex()
    found["seed"] = places[record["seed"]]
    found["target"] = None
    found["reason"] = _withheld(record["reason"], hidden)
    return found


def _values(shown: Mapping[str, tuple[str, str]]) -> set[str]:
    """Values that were drawn: those of the specs that ran that the public ones do not have."""
    return {
        value
        for ran, (_, public) in shown.items()
        for name, value in split_spec(ran)[1].items()
        if split_spec(public)[1].get(name) != value
    }


def _withheld(reason: str, hidden: set[str]) -> str:
    """A reason without the values that were drawn."""
    for value in sorted(hidden, key=len, reverse=True):
        reason = re.sub(rf"(?<![\w.]){re.escape(value)}(?![\w])", "…", reason)
    return reason
