"""Published boards with the submissions that entered them, as `arena leaderboard` shows them."""

from __future__ import annotations

from pathlib import Path

from arena.boards import read_board
from arena.core.registry import BadInput
from arena.report import tables
from arena.report.page import Entry
from arena.report.rows import flatten
from arena.report.site import Board, Card, checked_rows, published_files, read_published
from arena.submissions import entries
from arena.submissions.cards import Altered


def read(folder: Path) -> Board:
    """A published board with its entries. Raises BadInput for files that are none, or altered."""
    return read_published(folder, _cards(folder))


def faults(folder: Path) -> list[str]:
    """What is wrong with a published board, a sentence each: a table that is not what its rows
    make, an entry without a verified card, a cell that two sources have, a paper's figure without
    a row."""
    try:
        board = read(folder)
        found = [note for note in board.notes if " also in " in note]
        found += _unverified(folder)
        if (folder / "results.json").is_file():
            own = read_published(folder)
            found += _unmatched(own)
            for name, text in published_files(own).items():
                path = folder / name
                if not path.is_file() or path.read_text(encoding="utf-8") != text:
                    found.append(
                        f"{folder.name}/{name} is not what results.json makes: "
                        "`arena leaderboard check --fix` writes it anew."
                    )
    except BadInput as error:
        return [str(error)]
    return found


def _unmatched(board: Board) -> list[str]:
    """Papers' figures whose attack, or attack and defense, stand in no row under that spec."""
    rows = {(row["attack"], row["defense"]) for row in map(flatten, board.records)}
    rows |= {(attack, "") for attack, _ in rows}
    return [
        f"{board.name}/about.json: no row has the spec of what "
        f"{tables.clean_text(figure.get('source'))} tells of."
        for figure in board.published
        if (figure.get("attack"), figure.get("defense") or "") not in rows
    ]


def _unverified(folder: Path) -> list[str]:
    """Entries that none of the board's verifiers has signed."""
    if not (folder / "entries").is_dir():
        return []
    board = read_board(folder / "board.toml")
    told = [(path, entries.unverified(value, board)) for path, value in entries.read_all(folder)]
    return [f"{folder.name}/entries/{path.name}: {why}" for path, why in told if why]


def _cards(folder: Path) -> list[Card]:
    """The entries of a published board in words, and the records that they hold. Raises BadInput
    for one that is none, or that was altered."""
    try:
        known = entries.read_all(folder)
    except Altered as error:
        raise BadInput(f"{folder.name}/entries: {error}") from error
    found: list[Card] = []
    for path, value in known:
        card = value["card"]
        state, why = entries.status(value, [other for _, other in known])
        told = {name: card["board"][name] for name in ("name", "version")}
        rows = checked_rows([{**cell, "board": told} for cell in card["cells"]], path)
        for row in rows:
            row["card"] = path.name
        entry = Entry(
            method=tables.clean_text(card["method"]["name"]),
            kind=tables.clean_text(card["method"]["role"]),
            spec=tables.clean_text(card["method"]["spec"]),
            status=state,
            cells=len(rows),
            signed="yes" if card["signature"] else "no",
            note=tables.clean_text(why),
            file=path.name,
        )
        found.append((entry, rows))
    return found
