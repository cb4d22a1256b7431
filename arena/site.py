"""Boards of a store as a site shows them, with what only weights and data can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arena.core.measures import COLUMNS
from arena.core.metric_list import METRICS
from arena.core.registry import BadInput
from arena.report.page import Drawing
from arena.report.site import Board
from arena.store import Store


def board_of(
    store: Store,
    name: str,
    records: Sequence[Mapping[str, Any]] | None = None,
    *,
    portraits: bool = False,
    data_dir: Path | None = None,
) -> Board:
    """A board of a store, of its newest version unless `records` are given.

    portraits: also draw what needs the weights and the data (`arena.portraits`); what cannot be
    drawn is named with the reason. Raises BadInput without finished cells.
    """
    from arena.gallery import pictures
    from arena.report.rows import flatten, measured_columns

    if records is None:
        records = store.board_records(name)
    if not records:
        raise BadInput(f"The board {name!r} has no finished cells yet; run it first.")
    shown = measured_columns(map(flatten, records))
    metrics = [*METRICS, *(column for column in COLUMNS if column.name in shown)]
    version = records[0]["board"]["version"]  # of all of them
    [board] = [b for b in store.boards() if (b["name"], b["version"]) == (name, version)]
    definition = board["definition"]
    drawings: Sequence[Drawing] = ()
    absent: Sequence[tuple[str, str]] = ()
    if portraits:
        from arena.portraits import portray

        drawings, absent = portray(store, records, data_dir)
    return Board(
        name=name,
        records=records,
        title=definition.get("title") or f"Backdoor Arena: {name}",
        command=board["command"],
        published=definition.get("published", ()),
        pictures=pictures(store, records),
        metrics=[metric._asdict() for metric in metrics],
        drawings=drawings,
        absent=absent,
    )


def write_run(store: Store, name: str, records: Sequence[Mapping[str, Any]]) -> list[Path]:
    """The page and tables of a run, below the store: quick, without the figures and ratings of
    `arena leaderboard build`."""
    from arena.report.page import write_leaderboard

    board = board_of(store, name, records)
    return write_leaderboard(
        board.records,
        board.pictures,
        store.root / "leaderboard" / name,
        board.metrics,
        board.title,
        board.command,
        board.published,
    )
