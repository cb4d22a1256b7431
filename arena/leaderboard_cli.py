"""`arena leaderboard`: build, diff, check and publish the tables. A thin skin, as arena.cli is."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arena.core.registry import BadInput
from arena.store import check_writable

if TYPE_CHECKING:
    from arena.report.site import Board


def writable(context: typer.Context, path: Path | None) -> Path | None:
    """Of an option that names an output file: refused at once where none could be written."""
    return path if path is None or context.resilient_parsing else check_writable(path)


app = typer.Typer(no_args_is_help=True, help="Build, compare, check and publish leaderboards.")

StoreOption = Annotated[
    Path | None,
    typer.Option("--store", envvar="ARENA_STORE", help="Folder of artifacts and records."),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="ARENA_DATA_DIR",
        help="Folder with one folder per data set (Parquet files); without it the hub is asked.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
BoardsArgument = Annotated[list[str] | None, typer.Argument(help="Boards by name; all without.")]
PublishedOption = Annotated[
    Path | None,
    typer.Option(
        "--published", help="A folder of published boards, such as leaderboards, not a store."
    ),
]


@app.command()
def build(
    board: BoardsArgument = None,
    store: StoreOption = None,
    published: PublishedOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write to; else leaderboard/ in the store, or site."),
    ] = None,
    data_dir: DataDirOption = None,
) -> None:
    """A site that opens from disk: one page per board with figures and ratings, one over all."""
    from arena.report.site import write_site

    boards, usual = _boards(board, store, published, data_dir)
    for path in write_site(boards, out or usual):
        print(path)


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="results.json, a published board, or a store.")],
    after: Annotated[str, typer.Argument(help="What it is compared with.")],
    board: Annotated[
        str | None, typer.Option(help="Only this board, of stores with several.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What changed between two tables, and why: code, data, seed, version. Exit 1 if anything."""
    from arena.report.changes import as_text, changes

    found = changes(_rows_of(before, board), _rows_of(after, board))
    if as_json:
        print(json.dumps([change._asdict() for change in found], indent=1, allow_nan=False))
    else:
        print(as_text(found))
    raise typer.Exit(1 if found else 0)


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="The folder of published boards.")] = Path(
        "leaderboards"
    ),
    fix: Annotated[
        bool, typer.Option("--fix", help="Write the tables anew from results.json.")
    ] = False,
) -> None:
    """Whether published boards hold together: tables made from rows, verified cards as entries."""
    from arena.published import faults
    from arena.report.site import published_files, published_names, read_published
    from arena.store import write_atomically

    names = published_names(folder)
    if fix:
        for name in names:
            own = folder / name
            if (own / "results.json").is_file():
                board = read_published(own)
                for file, text in published_files(board).items():
                    write_atomically(own / file, text)
    found = [fault for name in names for fault in faults(folder / name)]
    print("\n".join(found) if found else f"{len(names)} boards hold together.")
    raise typer.Exit(1 if found else 0)


@app.command()
def publish(
    to: Annotated[str, typer.Option("--to", help="A folder, or hf://OWNER/NAME (a data set).")],
    board: BoardsArgument = None,
    store: StoreOption = None,
    published: PublishedOption = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Really do it; else only say what would be.")
    ] = False,
    data_dir: DataDirOption = None,
) -> None:
    """Build the site and put it into a folder for any static host, or a Hugging Face data set."""
    from arena.publishing import publish as send
    from arena.report.site import write_site

    boards, _ = _boards(board, store, published, data_dir)
    with tempfile.TemporaryDirectory() as folder:
        write_site(boards, folder)
        told = send(Path(folder), to, really=yes)
    size = f"{len(told.files)} files, {told.bytes / 1e6:.1f} MB"
    if told.done:
        print(f"Published {size} to {to}.")
    else:
        print("\n".join(told.files))
        print(f"Dry run: {size} would go to {to}; --yes does it.")


def _boards(
    names: list[str] | None, store: Path | None, published: Path | None, data_dir: Path | None
) -> tuple[list[Board], Path]:
    """The boards asked for, and where their site usually goes. Raises BadInput."""
    from arena.published import read
    from arena.report.site import chosen, published_names

    if published is not None:
        known = published_names(published)
        asked = chosen(names or (), known, str(published))
        return [read(published / name) for name in asked], Path("site")
    from arena.site import board_of
    from arena.store import open_store

    opened = open_store(store)
    known = list(dict.fromkeys(found["name"] for found in opened.boards()))
    if not known:
        raise BadInput(f"There is no board in {str(opened.root)!r} yet; run one first.")
    asked = chosen(names or (), known, str(opened.root))
    made = [board_of(opened, name, portraits=True, data_dir=data_dir) for name in asked]
    return made, opened.root / "leaderboard"


def _rows_of(word: str, board: str | None) -> list[dict[str, Any]]:
    """Flat rows of a results.json, a published board, a folder of them, or a store."""
    from arena.published import read
    from arena.report.rows import flatten, unflatten
    from arena.report.site import published_names, read_rows

    path = Path(word)
    if (path / "store.json").is_file():
        from arena.store import Store

        return [flatten(record) for record in Store(path).board_records(board)]
    if path.is_file():
        rows = [flatten(row) for row in read_rows(path)]
    elif (path / "results.json").is_file() or (path / "entries").is_dir():
        rows = [flatten(unflatten(row)) for row in read(path).records]
    elif path.is_dir():
        boards = [read(path / name) for name in published_names(path)]
        rows = [flatten(unflatten(row)) for each in boards for row in each.records]
    else:
        raise BadInput(f"There is no results.json, published board or store {word!r}.")
    return [row for row in rows if board in (None, row["board"])]
