"""Result cards: one JSON value that tells of a method on a board, hashed and perhaps signed.

What is hashed is the canonical JSON (sorted keys, no spaces) of the card without its hash and its
signature; what is signed (Ed25519) is that hash. A card that was altered does not fit its hash; one
that was altered and hashed again does not fit its signature, and its derived figures (summary,
drops, intervals) must follow from its cells.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arena.core.metric_list import der, wilson
from arena.core.registry import BadInput
from arena.report.statistics import summarise
from arena.store import digest, write_atomically

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

Card = dict[str, Any]

VERSION = 1
LARGEST = 64_000_000  # bytes of a card that are read
ROLES = ("attack", "repair", "scan", "detect")
FINAL = ("ok", "not_established", "collapsed", "not_applicable")
STATUSES = (*FINAL, "failed", "timeout")
FIGURES = ("acc", "asr", "ra", "der", "acc_drop", "acc_before", "asr_before", "score", "auroc")
_SHARES = ("acc", "asr", "ra", "acc_before", "asr_before", "ra_before", "auroc")
_UNHASHED = ("hash", "signature")


class Altered(Exception):
    """A card or an entry is not what its maker wrote; the message is one sentence."""


# ------------------------------------------------------------------------------- hash and signature


def sealed(body: Mapping[str, Any], key: Path | None = None) -> Card:
    """The body with its hash, and a signature where a key is given. Raises BadInput."""
    plain = {name: value for name, value in body.items() if name not in _UNHASHED}
    plain = json.loads(json.dumps(plain, allow_nan=False))  # tuples become lists, as in the file
    return {**plain, "hash": digest(plain), "signature": signature(digest(plain), key)}


def signature(text: str, key: Path | None) -> dict[str, str] | None:
    """What is written beside a hash; None without a key."""
    if key is None:
        return None
    private = _private(key)
    return {
        "algorithm": "ed25519",
        "public_key": private.public_key().public_bytes_raw().hex(),
        "signature": private.sign(text.encode()).hex(),
    }


def check_seal(body: Mapping[str, Any], what: str = "card") -> str | None:
    """The public key (hex) that signed, or None. Raises Altered."""
    plain = {name: value for name, value in body.items() if name not in _UNHASHED}
    if digest(plain) != body["hash"]:
        raise Altered(f"The {what} was altered: its content does not have the hash that it names.")
    if body["signature"] is None:
        return None
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    public = body["signature"]["public_key"]
    try:
        verifier = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        verifier.verify(bytes.fromhex(body["signature"]["signature"]), body["hash"].encode())
    except (InvalidSignature, ValueError) as error:
        raise Altered(
            f"The {what} was altered: its signature is not one of the key {public[:16]}."
        ) from error
    return str(public)


def new_key(out: Path) -> str:
    """Write a private key (PEM, for its owner's eyes) to `out` and its public half to `out`.pub;
    returns the latter (hex). Raises BadInput where a file is there."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public_file = out.with_name(f"{out.name}.pub")
    for path in (out, public_file):
        if path.exists():
            raise BadInput(f"{str(path)!r} exists and is left as it is; name another file.")
    private = Ed25519PrivateKey.generate()
    pem = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = private.public_key().public_bytes_raw().hex()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(pem)
        write_atomically(public_file, public + "\n")
    except OSError as error:
        raise BadInput(f"{str(out)!r} cannot be written ({error.strerror}).") from error
    return public


def _private(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        found = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise BadInput(f"The key {str(path)!r} cannot be read ({error.strerror}).") from error
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(
            f"{str(path)!r} is no Ed25519 key without a password; `arena submit key` makes one."
        ) from error
    if not isinstance(found, Ed25519PrivateKey):
        raise BadInput(f"{str(path)!r} holds a key of another kind than Ed25519.")
    return found


# -------------------------------------------------------------------------------- derived figures


def group_of(cell: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What cells of different seeds have in common."""
    return (
        cell["dataset"]["name"],
        cell["model"],
        cell["attack"]["short"],
        cell["defense"]["short"],
    )


def summary_of(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per data set, model, attack and defense: means, deviations and n over seeds; statuses."""
    groups: dict[tuple[str, str, str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault(group_of(cell), []).append(cell)
    found = []
    for (dataset, model, attack, defense), members in groups.items():
        figures = {}
        for name in FIGURES:
            values = [value for m in members if (value := m["metrics"].get(name)) is not None]
            if values:
                told = summarise(values)
                figures[name] = {"mean": told.mean, "sd": told.sd, "n": told.n}
        statuses = [m["status"] for m in members]
        found.append(
            {
                "dataset": dataset,
                "model": model,
                "attack": attack,
                "defense": defense,
                "figures": figures,
                "statuses": {status: statuses.count(status) for status in dict.fromkeys(statuses)},
            }
        )
    return found


def claims_with_measured(
    claims: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]], method: str
) -> list[dict[str, Any]]:
    """Each claim (percent) with the measured means (percent) of the same attack; of an attack's
    submission, of its undefended victims."""
    found = []
    for claim in claims:
        measured: dict[str, float | None] = {}
        for figure in ("acc", "asr"):
            values = [
                group["figures"][figure]["mean"]
                for group in summary
                if group["attack"] == claim["attack"]
                and group["defense"] == (claim["defense"] or method)
                and figure in group["figures"]
            ]
            measured[figure] = 100 * sum(values) / len(values) if values else None
        given = ("attack", "defense", "acc", "asr", "source")
        found.append({**{name: claim.get(name) for name in given}, "measured": measured})
    return found


def check_derived(card: Card) -> None:
    """Raise Altered where a figure does not follow from those it is derived from."""
    for cell in card["cells"]:
        metrics, counts = cell["metrics"], cell.get("counts") or {}
        where = " / ".join(part for part in group_of(cell)[2:] if part) + f", seed {cell['seed']}"
        for name in _SHARES:
            value = metrics.get(name)
            if value is not None and not 0 <= value <= 1:
                raise Altered(f"The card is inconsistent: {name} of {where} is no share.")
        expected: dict[str, float] = {}
        before, after = metrics.get("acc_before"), metrics.get("acc")
        if before is not None and after is not None:
            expected["acc_drop"] = before - after
            if (fell := metrics.get("asr")) is not None:
                expected["der"] = der(before, after, metrics.get("asr_before") or 0.0, fell)
        for name, value in expected.items():
            if not _near(metrics.get(name), value):
                raise Altered(f"The card is inconsistent: {name} of {where} does not follow.")
        sizes = {"acc": counts.get("test"), "asr": counts.get("triggered")}
        for name, interval in (cell.get("intervals") or {}).items():
            n, value = sizes.get(name), metrics.get(name)
            if not n or value is None or not _all_near(interval, wilson(round(value * n), n)):
                raise Altered(f"The card is inconsistent: the interval of {name} of {where}.")
    if not _equal(card["summary"], summary_of(card["cells"])):
        raise Altered("The card is inconsistent: its summary does not follow from its cells.")
    told = claims_with_measured(card["claims"], card["summary"], card["method"]["short"])
    if not _equal(card["claims"], told):
        raise Altered("The card is inconsistent: what was measured beside the claims.")
    for told in (card["method"], *card["against"]):
        if hashlib.sha256(told["source"].encode()).hexdigest() != told["sha256"]:
            raise Altered(
                f"The card is inconsistent: the source of {told['name']} has another hash."
            )
    if digest(card["board"]["definition"]) != card["board"]["hash"]:
        raise Altered("The card is inconsistent: the board's definition does not have its hash.")


def _near(one: Any, two: float) -> bool:
    return isinstance(one, int | float) and abs(one - two) < 1e-9


def _all_near(one: Any, two: Sequence[float]) -> bool:
    return len(one) == len(two) and all(_near(a, b) for a, b in zip(one, two, strict=True))


def _equal(one: Any, two: Any) -> bool:
    """Equal JSON values, numbers up to rounding."""
    if isinstance(two, float) and isinstance(one, int | float):
        return abs(one - two) <= 1e-9 * max(1.0, abs(two))
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return one.keys() == two.keys() and all(_equal(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_equal, one, two))
    return bool(one == two)


# --------------------------------------------------------------------------------- reading a card


def read_json(path: Path, what: str) -> Any:
    """A JSON value without NaN or double keys. Raises BadInput."""
    try:
        if path.stat().st_size > LARGEST:
            raise BadInput(f"The {what} {str(path)!r} is larger than {LARGEST / 1e6:g} MB.")
        text = path.read_text(encoding="utf-8")
        return json.loads(
            text,
            object_pairs_hook=_without_doubles,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except FileNotFoundError as error:
        raise BadInput(f"There is no {what} {str(path)!r}.") from error
    except OSError as error:
        raise BadInput(f"The {what} {str(path)!r} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"The {what} {str(path)!r} is no JSON of ours: {error}.") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _finite(word: str) -> float:
    value = float(word)
    if not math.isfinite(value):
        raise ValueError(f"{word} is too large")
    return value


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")


def check_schema(card: Any) -> Card:
    """The card, once every part of it has its type. Raises BadInput."""
    if not isinstance(card, Mapping) or card.get("card_version") != VERSION:
        version = card.get("card_version") if isinstance(card, Mapping) else None
        raise BadInput(f"This is no result card of version {VERSION} (it says {version!r}).")
    _fields(card, _CARD, "card")
    if card["method"]["role"] not in ROLES:
        raise BadInput(f"card: method.role is one of {', '.join(ROLES)}.")
    for place, cell in enumerate(card["cells"]):
        where = f"card: cell {place}"
        _fields(cell, _CELL, where)
        if cell["status"] not in STATUSES:
            raise BadInput(f"{where}: there is no status {cell['status']!r}.")
        for name, value in cell["metrics"].items():
            if value is not None and not _number(value):
                raise BadInput(f"{where}: metrics.{name} is no number.")
        for name, interval in cell.get("intervals", {}).items():
            if not (
                isinstance(interval, list) and len(interval) == 2 and all(map(_number, interval))
            ):
                raise BadInput(f"{where}: intervals.{name} is no pair of numbers.")
        for name, value in cell.get("counts", {}).items():
            if value is not None and not (isinstance(value, int) and 0 <= value < 10**12):
                raise BadInput(f"{where}: counts.{name} is no count.")
    for place, other in enumerate(card["against"]):
        _fields(other, _SOURCE, f"card: against {place}")
    for place, claim in enumerate(card["claims"]):
        _fields(claim, _CLAIM, f"card: claim {place}")
    check_signature(card["signature"], "card")
    if not card["cells"]:
        raise BadInput("card: it has no cells.")
    return dict(card)


def check_signature(value: Any, where: str) -> None:
    if value is not None:
        wanted = {"algorithm": _text, "public_key": _text, "signature": _text}
        _fields(value, wanted, f"{where}: signature")


def _fields(value: Any, wanted: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, Mapping):
        raise BadInput(f"{where} is no JSON object.")
    for name, rule in wanted.items():
        optional, name = name.endswith("?"), name.removesuffix("?")
        if name not in value:
            if optional:
                continue
            raise BadInput(f"{where} lacks {name!r}.")
        if isinstance(rule, Mapping):
            _fields(value[name], rule, f"{where}: {name}")
        elif not rule(value[name]):
            raise BadInput(f"{where}: {name} is not what it should be.")


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair
        return False
    return True


def _word(value: Any) -> bool:
    """One line that can be printed."""
    return isinstance(value, str) and len(value) <= 2000 and (not value or value.isprintable())


def _optional(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _list(value: Any) -> bool:
    return isinstance(value, list)


_METHOD = {"name": _word, "short": _word, "spec": _word, "code": _word}
_SOURCE = {
    "name": _word,
    "role": _word,
    "asked": _word,
    "package": _word,
    "sha256": _word,
    "source": _text,
}
_CARD = {
    "board": {
        "name": _word,
        "version": _whole,
        "definition": _mapping,
        "hash": _word,
        "held_back": lambda value: isinstance(value, bool),
    },
    "method": {
        **_METHOD,
        "kind": _word,
        "role": _word,
        "file": _word,
        "sha256": _word,
        "source": _text,
    },
    "author": _word,
    "claims": _list,
    "budget": _mapping,
    "isolation": _word,
    "scoring": _word,
    "against": _list,
    "hardware": _mapping,
    "versions": _mapping,
    "seeds": _list,
    "cells": _list,
    "summary": _list,
    "started": _word,
    "finished": _word,
    "hash": _word,
    "signature": lambda value: True,
}
_CELL = {
    "key": _word,
    "dataset": {"name": _word, "fingerprint": _word},
    "model": _word,
    "recipe": _word,
    "attack": _METHOD,
    "defense": _METHOD,
    "seed": _whole,
    "status": _word,
    "reason": _text,
    "metrics": _mapping,
    "counts?": _mapping,
    "intervals?": _mapping,
    "weights?": _mapping,
    "budget?": _mapping,
    "hardware?": _mapping,
    "versions?": _mapping,
}
_CLAIM = {
    "attack": _word,
    "defense": _optional(_word),
    "acc": _optional(_number),
    "asr": _optional(_number),
    "source": _word,
    "measured": _mapping,
}


def read_card(path: Path) -> Card:
    """A card that is whole: schema, hash, signature, derived figures. Raises BadInput, Altered."""
    value = read_json(path, "card")
    if isinstance(value, Mapping) and "card" in value and "verification" in value:
        value = value["card"]
    card = check_schema(value)
    check_whole(card)
    return card


def check_whole(card: Card) -> None:
    """Raise Altered unless seal and derived figures fit."""
    try:
        check_seal(card)
        check_derived(card)
    except RecursionError as error:
        raise Altered("The card is no card of ours: it is too deep.") from error
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise Altered(f"The card is inconsistent: {error}.") from error


def write(path: Path, value: Mapping[str, Any]) -> None:
    """A card, or what holds one, as a file, whole or not at all. Raises BadInput."""
    try:
        write_atomically(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
    except OSError as error:
        if type(error).__name__ == "DiskFull":
            raise
        raise BadInput(f"{str(path)!r} cannot be written ({error.strerror}).") from error
