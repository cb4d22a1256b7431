"""One flat row per record: what scripts, tables and pages read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]

CONTEXT = ("board", "version", "dataset", "model", "recipe")
METRICS = (
    "acc",
    "asr",
    "ra",
    "der",
    "acc_drop",
    "acc_before",
    "asr_before",
    "ra_before",
    "clean_twin_acc",
    "clean_twin_asr",
    "clean_twin_ra",
    "twin_acc_drop",
    "psnr",
    "ssim",
    "l2",
    "linf",
)
MEASURED = (
    "distance",
    "distance_before",
    "distance_gain",
    "robust_acc",
    "robust_acc_before",
)
UNITS = {"distance": "distance_unit", "robust_acc": "robust_against"}  # what they are in words
MEASURED_WORDS = (*UNITS.values(), "unmeasured")
LEVELS = ("shallow", "middle", "deep")  # of every network, from input to output
MMD = tuple(f"mmd_{kind}_{level}" for level in LEVELS for kind in ("stamped", "intra", "inter"))
BUDGET = ("seconds", "peak_memory_mb", "clean_images", "forward_images", "backward_images")
INTERVALS = ("acc_low", "acc_high", "asr_low", "asr_high")
COLUMNS = (
    *CONTEXT,
    "attack",
    "defense",
    "seed",
    "status",
    "reason",
    *METRICS,
    *INTERVALS,
    *BUDGET,
    *MMD,
    "flags",
    "threat",
    "labels",
    "attack_name",
    "attack_short",
    "defense_name",
    "defense_short",
    "null",
    "fingerprint",
    "commit",
    "finished",
    "key",
)
"""The keys of a flat row, in the order in which `flatten` writes them; `MEASURED` columns follow
the metrics where a measure gave them."""


def number(value: Any) -> float | int | None:
    """`value` where it is a finite number; NaN, an infinity or anything else is None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def flatten(record: Mapping[str, Any]) -> Row:
    """The flat row of one record: full specs, fractions in [0, 1], None where not measured.

    The keys are `COLUMNS`; `flags` is a list of names. What the board's measures found stands after
    the metrics, in columns that other rows lack; `unmeasured` lists those that failed, with the
    reason. Raises ValueError where the record does not say which cell it is.
    """
    try:
        board, data = record["board"], record["dataset"]
        attack, defense = record["attack"], record["defense"]
        row: Row = {
            "board": board["name"],
            "version": board["version"],
            "dataset": data["name"],
            "model": record["model"],
            "recipe": record["recipe"],
            "attack": attack["spec"],
            "defense": defense["spec"],
            "seed": record["seed"],
            "status": record["status"],
            "reason": record.get("reason") or "",
        }
    except (KeyError, TypeError) as missing:
        name = record.get("key", "without a key") if isinstance(record, Mapping) else repr(record)
        raise ValueError(f"record {name} does not name its cell: {missing} is missing") from None
    metrics, budget = record.get("metrics") or {}, record.get("budget") or {}
    row |= {name: number(metrics.get(name)) for name in METRICS}
    row |= _measured(record.get("measures") or {})
    for name in ("acc", "asr"):
        low, high = (record.get("intervals") or {}).get(name) or (None, None)
        row[f"{name}_low"], row[f"{name}_high"] = number(low), number(high)
    row |= {name: number(budget.get(name)) for name in BUDGET}
    for name in MMD:
        _, kind, level = name.split("_")
        row[name] = number(((record.get("mmd") or {}).get(level) or {}).get(kind))
    return row | {
        "flags": [flag["name"] for flag in record.get("flags") or ()],
        "threat": attack.get("threat") or "",
        "labels": attack.get("labels") or "",
        "attack_name": attack.get("name") or attack["spec"].partition(":")[0],
        "attack_short": attack.get("short") or attack["spec"],
        "defense_name": defense.get("name") or defense["spec"].partition(":")[0],
        "defense_short": defense.get("short") or defense["spec"],
        "null": bool(defense.get("null")),
        "fingerprint": data.get("fingerprint") or "",
        "commit": record.get("commit") or "",
        "finished": record.get("finished") or "",
        "key": record.get("key") or "",
    }


def unflatten(row: Mapping[str, Any]) -> dict[str, Any]:
    """The record that `flatten` gives `row` of, as far as a row tells: what published rows become.

    A mapping that is a record already comes back as it is. Raises ValueError where the row does
    not say which cell it is, or where a column holds something else than it should.
    """
    if isinstance(row, Mapping) and isinstance(row.get("board"), Mapping):
        return dict(row)
    if not isinstance(row, Mapping):
        raise ValueError(f"a row is a JSON object, got {str(row)[:60]!r}")
    if missing := [name for name in _NEEDED if name not in row]:
        raise ValueError(f"row {row.get('key', 'without a key')} has no {', '.join(missing)}")
    if wrong := [name for name in _NEEDED if not isinstance(row[name], str | int)]:
        raise ValueError(f"row {row.get('key', 'without a key')}: {wrong[0]} is no word")
    texts = {name: str(row.get(name) or "") for name in _WORDS}
    flags, lost = (_list(row.get(name)) for name in ("flags", "unmeasured"))
    columns = {n: row[n] for n in (*MEASURED, *UNITS.values()) if row.get(n) is not None}
    measures = (
        {"": {"name": "", "short": "", "status": "ok", "columns": columns}} if columns else {}
    )
    for text in lost:
        name, _, reason = str(text).partition(": ")
        measures[name] = {"name": name, "short": name, "status": "failed", "reason": reason}
    mmd: dict[str, dict[str, Any]] = {}
    for name in MMD:
        _, kind, level = name.split("_")
        if row.get(name) is not None:
            mmd.setdefault(level, {})[kind] = row[name]
    return {
        "key": texts["key"],
        "board": {"name": str(row["board"]), "version": row["version"]},
        "dataset": {"name": str(row["dataset"]), "fingerprint": texts["fingerprint"]},
        "model": str(row["model"]),
        "recipe": str(row["recipe"]),
        "attack": {
            "name": texts["attack_name"],
            "spec": str(row["attack"]),
            "short": texts["attack_short"],
            "threat": texts["threat"],
            "labels": texts["labels"],
        },
        "defense": {
            "name": texts["defense_name"],
            "spec": str(row["defense"]),
            "short": texts["defense_short"],
            "null": bool(row.get("null")),
        },
        "seed": row["seed"],
        "status": str(row["status"]),
        "reason": texts["reason"],
        "metrics": {name: row.get(name) for name in METRICS},
        "intervals": {
            name: [row.get(f"{name}_low"), row.get(f"{name}_high")] for name in ("acc", "asr")
        },
        "budget": {name: row.get(name) for name in BUDGET},
        "mmd": mmd,
        "flags": [{"name": str(name)} for name in flags],
        "measures": measures,
        "commit": texts["commit"],
        "finished": texts["finished"],
    }


_NEEDED = (*CONTEXT, "attack", "defense", "seed", "status")
_WORDS = (
    *("reason", "threat", "labels", "attack_name", "attack_short", "defense_name"),
    *("defense_short", "fingerprint", "commit", "finished", "key"),
)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _measured(measures: Mapping[str, Mapping[str, Any]]) -> Row:
    entries = list(measures.values())
    found = {k: v for entry in entries for k, v in (entry.get("columns") or {}).items()}
    row: Row = {name: number(found[name]) for name in MEASURED if name in found}
    row |= {name: str(found[name]) for name in UNITS.values() if name in found}
    if lost := [f"{e['name']}: {e['reason']}" for e in entries if e["status"] != "ok"]:
        row["unmeasured"] = sorted(lost)
    return row


def measured_columns(rows: Iterable[Row]) -> tuple[str, ...]:
    """The columns that only measures give, as far as any of the rows has them, in order."""
    there = {name for row in rows for name in row}
    return tuple(name for name in (*MEASURED, *MEASURED_WORDS) if name in there)


def aligned(rows: Sequence[Row]) -> list[Row]:
    """The rows with the same columns each: None where one lacks what another has."""
    extra = measured_columns(rows)
    place = COLUMNS.index(METRICS[-1]) + 1
    columns = (*COLUMNS[:place], *extra, *COLUMNS[place:])
    return [{name: row.get(name) for name in columns} for row in rows]
