"""The board's measures in a cell's record: what it lacks, what is entered, where readings are kept.

A reading belongs to weights, not to a cell: that of a victim serves all of its defenses, and the
null defense, whose weights are the victim's, needs none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arena.core.measures import Reading
from arena.core.registry import short_spec
from arena.store import Artifact, digest

Record = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Asked:
    """A measure that a board asks for."""

    method: Any
    identity: dict[str, Any]  # its full spec and code, and those of what it wraps

    @property
    def name(self) -> str:
        return str(self.method.method_name)

    @property
    def spec(self) -> str:
        return str(self.identity["spec"])


def lacking(record: Record, asked: Sequence[Asked]) -> list[Asked]:
    """The measures whose figures the record should hold and does not: never taken, failed, or
    taken by other code. A record that tells of no repaired model lacks none."""
    if "weights" not in record:
        return []
    kept = record.get("measures", {})
    return [each for each in asked if not _holds(kept.get(each.spec), each)]


def _holds(entry: Record | None, asked: Asked) -> bool:
    if entry is None or entry["status"] != "ok":
        return False
    return asked.identity == {k: v for k, v in entry.items() if k in _IDENTITY}


_IDENTITY = ("spec", "code", "files", "wrapped")


def key_of(
    asked: Asked, weights: str, *, data: str, network: Sequence[str], seed: int, bf16: bool
) -> str:
    """Where a reading is kept. weights: sha256 of their file; data: the data set's fingerprint;
    network: its name and code; bf16: whether models run in it here, so that both readings of a
    comparison were taken alike."""
    return digest(
        {
            "kind": "reading",
            "measure": asked.identity,
            "weights": weights,
            "data": data,
            "network": list(network),
            "seed": seed,
            "bf16": bf16,
        }
    )


def entry(asked: Asked, before: Artifact, after: Artifact) -> dict[str, Any]:
    """What a record says of a measure; the readings are artifacts, of which it holds the few
    figures."""
    readings = [Reading(kept.meta["figures"], kept.meta["each"]) for kept in (before, after)]
    return {
        **_head(asked),
        "status": "ok",
        "reason": "",
        "before": _told(before),
        "after": _told(after),
        "columns": asked.method.compare(*readings),
    }


def failure(asked: Asked, kind: str, reason: str, details: str) -> dict[str, Any]:
    """What a record says of a measure that failed: it is tried again by the next run."""
    return {**_head(asked), "status": kind, "reason": reason, "details": details}


def _head(asked: Asked) -> dict[str, Any]:
    return {"name": asked.name, "short": short_spec(asked.method), **asked.identity}


def _told(kept: Artifact) -> dict[str, Any]:
    """The figures of a reading, and where they come from."""
    meta = kept.meta
    return {
        **meta["figures"],
        "artifact": kept.folder.name,
        "device": meta["hardware"]["device"],
        **{name: meta[name] for name in ("seconds", "resumed", "commit", "finished")},
    }
