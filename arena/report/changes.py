"""What changed between two tables of results, cell by cell, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from . import tables
from .rows import CONTEXT, METRICS, Row

COMPARED = tuple(name for name in METRICS if name not in ("psnr", "ssim", "l2", "linf"))
SAME = 1e-9  # shares that differ by less are equal: the last digit of a float is no result


class Change(NamedTuple):
    kind: str  # "added", "removed" or "changed"
    where: str  # board, data set, model and recipe
    attack: str
    defense: str
    seed: Any
    figures: dict[str, tuple[Any, Any]]  # column -> before, after; status among them
    why: tuple[str, ...]


def changes(before: Iterable[Row], after: Iterable[Row]) -> list[Change]:
    """Every cell that is not the same in both, sorted; cells are matched by data set, model,
    recipe, methods and seed, whatever the board's version."""
    old, new = _cells(before), _cells(after)
    versions = [sorted({str(row["version"]) for row in cells.values()}) for cells in (old, new)]
    found = []
    for key in sorted({*old, *new}, key=lambda key: tuple(map(str, key))):
        one, other = old.get(key), new.get(key)
        if one is None or other is None:
            row, kind = (one, "removed") if one else (other, "added")
            assert row is not None
            found.append(_change(kind, row, {}, _why_absent(row, new if one else old, versions)))
            continue
        figures = {
            name: (one[name], other[name])
            for name in ("status", *COMPARED)
            if not _equal(one[name], other[name])
        }
        if figures:
            found.append(_change("changed", other, figures, _why(one, other)))
    return found


def _cells(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    return {
        (*(row[name] for name in CONTEXT if name != "version"), *_cell(row)): row
        for row in tables.current(rows)
    }


def _cell(row: Row) -> tuple[Any, ...]:
    return row["attack"], row["defense"], row["seed"]


def _change(kind: str, row: Row, figures: Mapping[str, Any], why: Sequence[str]) -> Change:
    where = tables.context_title({name: row[name] for name in CONTEXT if name != "version"})
    attack, defense = (tables.clean_text(row[f"{kind}_short"]) for kind in ("attack", "defense"))
    return Change(kind, where, attack, defense, row["seed"], dict(figures), tuple(why))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= SAME
    return bool(one == other)


def _why(one: Row, other: Row) -> list[str]:
    """What differs between two runs of one cell; each run's key covers code, data and settings."""
    why = []
    if one["version"] != other["version"]:
        why.append(f"version: {one['version']} → {other['version']}")
    if one["fingerprint"] != other["fingerprint"]:
        why.append(f"data: {_brief(one['fingerprint'])} → {_brief(other['fingerprint'])}")
    if one["commit"] != other["commit"]:
        why.append(f"commit: {_brief(one['commit'])} → {_brief(other['commit'])}")
    if one["key"] == other["key"]:
        why.append("the same code, data and seed, run again: another machine or its rounding")
    elif one["fingerprint"] == other["fingerprint"]:
        why.append("code: the key differs while data, specs and seed agree")
    return why


def _why_absent(row: Row, cells: Mapping[Any, Row], versions: Sequence[Sequence[str]]) -> list[str]:
    """What the other side has instead of a cell that it lacks."""
    rows = [r for r in cells.values() if r["board"] == row["board"]] or list(cells.values())
    why = []
    if versions[0] != versions[1]:
        why.append(f"version: {', '.join(versions[0])} → {', '.join(versions[1])}")
    for name in ("dataset", "model", "recipe"):
        if all(r[name] != row[name] for r in rows):
            why.append(f"{name.replace('dataset', 'data')}: only one side has {row[name]}")
    for kind in ("attack", "defense"):
        if all(r[kind] != row[kind] for r in rows):
            same = any(r[f"{kind}_name"] == row[f"{kind}_name"] for r in rows)
            what = "the other has it with other fields" if same else "the other lacks it"
            why.append(f"{kind} {tables.clean_text(row[f'{kind}_short'])}: {what}")
    if all(r["seed"] != row["seed"] for r in rows):
        why.append(f"seed: only one side has {row['seed']}")
    return why or ["the cell was not run on one side"]


def _brief(text: str) -> str:
    return text[:12] or "not recorded"


def as_text(found: Sequence[Change]) -> str:
    """One line per change, the figures in percent, and a count at the end."""
    lines = []
    for change in found:
        told = [
            f"{name} {_told(name, one)} → {_told(name, other)}"
            for name, (one, other) in change.figures.items()
        ]
        pair = f"{change.attack} × {change.defense}, seed {change.seed}"
        head = f"{change.kind:<8} {change.where}: {pair}"
        lines.append("; ".join([head, *told]) + f"  [{'; '.join(change.why)}]")
    counts = [
        f"{sum(c.kind == kind for c in found)} {kind}" for kind in ("added", "removed", "changed")
    ]
    lines.append(", ".join(counts) + "." if found else "No differences.")
    return "\n".join(lines)


def _told(name: str, value: Any) -> str:
    return str(value).replace("_", " ") if name == "status" else tables.percent(value)
