"""A static site over boards: from a store's records, or from a folder of published boards.

A published board is a folder:

    BOARD/board.toml        what is run
    BOARD/results.json      flat rows, exact; the tables beside it are made from it
    BOARD/about.json        title, command, facts, figures of papers, pictures: what rows lack
    BOARD/entries/*.json    submitted result cards, one file each

Nothing is computed here that a model would be needed for, so a site builds anywhere.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arena.core.measures import COLUMNS as MEASURED
from arena.core.metric_list import METRICS
from arena.core.registry import BadInput, nearest

from . import rating, tables
from .explorer import explorer
from .figures import draw
from .page import (
    TITLE,
    Drawing,
    Entry,
    Extras,
    Figures,
    citation,
    lasting_facts,
    merged_facts,
    render_page,
    table_files,
    write_files,
    write_leaderboard,
)
from .rows import Row, flatten, measured_columns, unflatten

COUNTED = ("reproduced", "broken")  # cards whose cells enter the tables
PICTURES = ("clean", "triggered", "difference")


@dataclass(frozen=True)
class Board:
    """A board as a site shows it."""

    name: str
    records: Sequence[Mapping[str, Any]]  # cell records, or flat rows; each key once
    title: str = ""
    command: str = ""
    published: Figures = ()
    pictures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, str]] = ()
    facts: Sequence[tuple[str, Sequence[str]]] = ()
    entries: Sequence[Entry] = ()
    notes: Sequence[str] = ()
    drawings: Sequence[Drawing] = ()  # those that need weights and data
    absent: Sequence[tuple[str, str]] = ()


# ------------------------------------------------------------------------------ published boards


def published_names(folder: Path | str) -> list[str]:
    """The boards of a folder of published boards: its folders with a results.json or entries.
    Raises BadInput where there is none."""
    root = Path(folder)
    names = sorted(
        path.name
        for path in (root.iterdir() if root.is_dir() else ())
        if (path / "results.json").is_file() or (path / "entries").is_dir()
    )
    if not names:
        raise BadInput(
            f"There is no published board in {str(root)!r}: a folder with a results.json each."
        )
    return names


Card = tuple[Entry, list[dict[str, Any]]]  # a submission in words, and its records


def read_published(folder: Path | str, cards: Sequence[Card] = ()) -> Board:
    """A published board, with the cards that entered it. Raises BadInput for files that are none.

    A cell that two sources have is shown as the first has it (results.json, then the entries by
    file name), and the page says so; cards that are claimed or withdrawn are listed, not counted.
    """
    root = Path(folder)
    about = _json(root / "about.json", {})
    if not isinstance(about, Mapping):
        raise BadInput(f"{root / 'about.json'} does not hold a JSON object.")
    rows = checked_rows(_json(root / "results.json", []), root / "results.json")
    entries: list[Entry] = []
    notes: list[str] = []
    taken = {_cell(flatten(row)): "results.json" for row in rows}
    for entry, own in cards:
        if entry.status in COUNTED:
            fresh = [row for row in own if _cell(flatten(row)) not in taken]
            if clash := len(own) - len(fresh):
                others = {taken[c] for row in own if (c := _cell(flatten(row))) in taken}
                said = f"{clash} cell{'s' * (clash > 1)} also in {', '.join(sorted(others))}"
                entry = replace(entry, note=f"{said}; shown as there. {entry.note}".strip())
                notes.append(f"{entry.file}: {entry.note}")
            taken |= {_cell(flatten(row)): entry.file for row in fresh}
            rows += fresh
        elif own:
            notes.append(f"{entry.file} is {entry.status}: its cells enter no table.")
        entries.append(entry)
    if not rows:
        notes.append("This board has no rows yet: there is nothing to rank.")
    shown = measured_columns(map(flatten, rows))
    known = [*METRICS, *(column for column in MEASURED if column.name in shown)]
    return Board(
        name=root.name,
        records=rows,
        title=str(about.get("title") or f"Backdoor Arena: {root.name}"),
        command=str(about.get("command") or ""),
        published=[
            f
            for f in about.get("published") or ()
            if isinstance(f, Mapping) and {"attack", "source"} <= f.keys()
        ],
        pictures=_pictures(about.get("pictures"), root / "about.json"),
        metrics=[metric._asdict() for metric in known],
        facts=[(str(n), [*map(str, v)]) for n, v in (about.get("facts") or {}).items()],
        entries=entries,
        notes=notes,
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The records of a results.json. Raises BadInput."""
    return checked_rows(_json(path, []), path)


def about_file(board: Board) -> str:
    """What about.json holds for `read_published`."""
    pictures = {
        name: {
            "caption": shown.get("caption") or "",
            "psnr": shown.get("psnr"),
            "images": [
                {
                    "label": image.get("label") or "",
                    **{kind: base64.b64encode(image[kind]).decode() for kind in PICTURES},
                }
                for image in shown["images"]
            ],
        }
        for name, shown in board.pictures.items()
    }
    about = {
        "title": board.title,
        "command": board.command,
        "facts": dict(board.facts),
        "published": list(board.published),
        "pictures": pictures,
    }
    return json.dumps(about, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _json(path: Path, absent: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return absent
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{path} cannot be read as JSON ({type(error).__name__}: {error})."
        ) from error


def checked_rows(found: Any, path: Path) -> list[dict[str, Any]]:
    """Records as read from `path`, each with a key. Raises BadInput for what is none."""
    if not isinstance(found, list):
        raise BadInput(f"{path} does not hold a list of rows.")
    try:
        rows = [unflatten(row) for row in found]
        for k, row in enumerate(rows):
            flatten(row)
            row["key"] = str(row.get("key") or f"{path.stem}-{k}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path}: {error}.") from error
    return rows


def _cell(row: Row) -> tuple[Any, ...]:
    names = ("dataset", "model", "recipe", "attack", "defense", "seed")
    return tuple(str(row[name]) for name in names)


def _pictures(found: Any, path: Path) -> dict[str, dict[str, Any]]:
    try:
        return {
            str(name): {
                **shown,
                "images": [
                    {
                        "label": str(image.get("label") or ""),
                        **{kind: base64.b64decode(image[kind], validate=True) for kind in PICTURES},
                    }
                    for image in shown["images"]
                ],
            }
            for name, shown in (found or {}).items()
        }
    except (KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise BadInput(f"{path}: the pictures cannot be read ({error}).") from error


# -------------------------------------------------------------------------------------- writing


def published_files(board: Board) -> dict[str, str]:
    """The files of a published board that are made from its rows, and about.json."""
    made = table_files(board.records, board.metrics, board.title, board.command, board.published)
    return {**made, "about.json": about_file(board)}


def write_board(board: Board, folder: Path | str, exports: bool = True) -> list[Path]:
    """A board's page with its tables, figures, rating and about.json; one that says so where there
    are no rows. `exports` writes each table in four formats, for pages that are part of a site."""
    if not board.records:
        text = render_page("site.html.j2", title=board.title or TITLE, **_nothing(board))
        return write_files(folder, {"index.html": text})
    rows = [flatten(unflatten(record)) for record in board.records]
    drawn = draw(rows)
    extras = Extras(
        drawings=[*drawn.drawings, *board.drawings],
        absent=[*drawn.absent, *board.absent],
        rated=rating.rating(rows),
        entries=board.entries,
        notes=board.notes,
        facts=board.facts,
        exports=exports,
    )
    written = write_leaderboard(
        board.records,
        board.pictures,
        folder,
        board.metrics,
        board.title or TITLE,
        board.command,
        board.published,
        extras,
    )
    facts = merged_facts(lasting_facts(board.records), board.facts)
    return [*written, *write_files(folder, {"about.json": about_file(replace(board, facts=facts))})]


def _nothing(board: Board) -> dict[str, Any]:
    return {"boards": [], "notes": board.notes, "rated": tables.view(_rated([])), "data": None} | {
        "entries": board.entries,
        "rating_definition": "",
        "alone": board.name,
    }


def _rated(rows: Sequence[Row]) -> Any:
    from .page import rated_frame

    return rated_frame(rating.rating(rows))


def write_site(boards: Sequence[Board], out: Path | str, title: str = TITLE) -> list[Path]:
    """One page per board in a folder of its name, and index.html over all of them.

    Raises BadInput where two boards have one name, or a name is no folder's."""
    names = [board.name for board in boards]
    for name in names:
        if names.count(name) > 1:
            raise BadInput(f"Two boards are called {name!r}; a site shows each name once.")
        if name != os.path.basename(name) or name in ("", ".", ".."):
            raise BadInput(f"A board called {name!r} cannot have a folder of its name.")
    out = Path(out)
    written = [path for board in boards for path in write_board(board, out / board.name)]
    rows, lines, notes = [], [], []
    for board in boards:
        own = [flatten(unflatten(record)) for record in board.records]
        shown = tables.current(own)
        rows += [row | {"home": f"{board.name}/index.html"} for row in shown]
        lines.append(_line(board, own))
        notes += [f"{board.name}: {note}" for note in board.notes]
    text = render_page(
        "site.html.j2",
        title=title,
        boards=lines,
        notes=notes,
        rated=tables.view(_rated(rows)),
        rating_definition=rating.DEFINITION,
        entries=[],
        data=explorer(rows, {}) if rows else None,
        alone="",
    )
    return [*written, *write_files(out, {"index.html": text})]


def _line(board: Board, rows: Sequence[Row]) -> dict[str, Any]:
    """A board in the list of all: what it is about, and who leads it."""
    best = []
    defenses = {row["defense"] for row in rows if not row["null"]}
    if defenses:  # null methods alone are no contest
        frame = tables.leaderboard(rows)
        first = frame[frame["standing"] == "best"]
        names = zip(first["defense_short"], first["null"], strict=True)
        best = list(dict.fromkeys(name + " (null)" * bool(null) for name, null in names))
    return {
        "name": board.name,
        "title": tables.clean_text(board.title or board.name),
        "version": tables.clean_text(", ".join(dict.fromkeys(str(r["version"]) for r in rows))),
        "data": tables.clean_text(", ".join(dict.fromkeys(r["dataset"] for r in rows))),
        "model": tables.clean_text(", ".join(dict.fromkeys(r["model"] for r in rows))),
        "attacks": len({r["attack"] for r in rows if tables.is_attacked(r)}),
        "defenses": len(defenses),
        "seeds": len({str(r["seed"]) for r in rows}),
        "cells": len(rows),
        "best": tables.clean_text(", ".join(best)) or tables.MISSING,
        "sha256": citation(board.title, rows).sha256 if rows else "",
    }


def chosen(boards: Iterable[str], known: Sequence[str], where: str) -> list[str]:
    """The boards asked for, or all. Raises BadInput for a name that is not known."""
    asked = list(dict.fromkeys(boards))
    for name in asked:
        if name not in known:
            raise BadInput(f"There is no board {name!r} in {where!r}; {nearest(name, known)}.")
    return asked or list(known)
