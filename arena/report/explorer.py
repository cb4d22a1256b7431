"""What a page's filterable table is filled with: pairs of attack and defense, and their runs.

The page's script builds the table from JSON, so that thousands of rows open at once. Words stand in
one list and rows hold their places in it, since the same few recur in every row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import tables
from .rows import CONTEXT, Row, number
from .statistics import summarise

WORDS = (
    *("board", "dataset", "model", "recipe", "threat", "labels", "attack", "attack_spec"),
    *("defense", "defense_spec", "status", "reason", "flags", "fingerprint", "commit"),
    *("finished", "key", "home"),
)
FIGURES = (
    *("acc", "asr", "ra", "der", "acc_drop", "twin_acc_drop", "seconds"),
    *("distance", "distance_gain", "robust_acc"),
)
OTHERS = (
    *("acc_low", "acc_high", "asr_low", "asr_high", "acc_before", "asr_before"),
    *("clean_twin_acc", "clean_twin_asr", "clean_images", "peak_memory_mb"),
    *("forward_images", "backward_images"),
)
COLUMNS = (*WORDS, "seed", "null", *FIGURES, *OTHERS)
UNRANKED = ("not_established",)  # has figures, which rank nobody


def explorer(rows: Sequence[Row], more: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, Any]:
    """JSON for the page: `columns`, `runs` (a row each), `pairs`, `words`, `more`.

    A pair is [places of its runs, {figure: [mean, sd]}, number of runs with figures, what its
    status is]. more: a run's key -> further provenance, as (label, text); where a row names its
    `home`, the address of its board's page, the table links there.
    """
    words: dict[str, int] = {}

    def place(word: Any) -> int:
        return words.setdefault(tables.clean_text(word or ""), len(words))

    lines = [_line(row) for row in rows]
    columns = [name for name in COLUMNS if any(line[name] is not None for line in lines)]
    runs = [[place(line[c]) if c in WORDS else line[c] for c in columns] for line in lines]
    groups: dict[tuple[Any, ...], list[int]] = {}
    for k, row in enumerate(rows):
        key = (*(row[name] for name in CONTEXT), row["attack"], row["defense"])
        groups.setdefault(key, []).append(k)
    known = {row["key"]: more[row["key"]] for row in rows if more.get(row["key"])}
    return {
        "columns": columns,
        "words_in": [name for name in columns if name in WORDS],
        "figures": [name for name in columns if name in FIGURES],
        "runs": runs,
        "pairs": [_pair(places, [rows[k] for k in places]) for places in groups.values()],
        "more": {
            tables.clean_text(key): [[place(label), place(text)] for label, text in entries]
            for key, entries in known.items()
        },
        "words": list(words),
    }


def _line(row: Row) -> Row:
    return {name: row.get(name) for name in COLUMNS} | {
        "board": f"{row['board']} v{row['version']}",
        "attack": "clean twin" if not tables.is_attacked(row) else row["attack_short"],
        "attack_spec": row["attack"],
        "defense": row["defense_short"],
        "defense_spec": row["defense"],
        "status": row["status"].replace("_", " "),
        "flags": ", ".join(flag.replace("_", " ") for flag in row["flags"]),
        "seed": number(row["seed"]),
        "labels": row["labels"] if tables.is_attacked(row) else "",
        "null": int(row["null"]),
        "home": row.get("home") or "",
    }


def _pair(places: list[int], rows: list[Row]) -> list[Any]:
    shown = [row for row in rows if tables.measured(row) or row["status"] in UNRANKED]
    means = {}
    for name in FIGURES:
        summary = summarise(row.get(name) for row in shown)
        if summary.mean is not None:
            means[name] = [_short(summary.mean), _short(summary.sd)]
    return [places, means, len(shown), outcome(rows)]


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def outcome(rows: Iterable[Row]) -> str:
    """ "ok", or what happened to how many of the runs: "collapsed 1 of 3"."""
    statuses = [row["status"].replace("_", " ") for row in rows]
    if len(set(statuses)) == 1:
        return statuses[0]
    counts = {word: statuses.count(word) for word in sorted(set(statuses)) if word != "ok"}
    return ", ".join(f"{word} {count} of {len(statuses)}" for word, count in counts.items())
