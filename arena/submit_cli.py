"""`arena new`, `arena submit …` and the entries of `arena leaderboard`: parse, call, print.

Mounted by arena.cli; heavy modules are imported inside the commands.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arena.core.registry import BadInput
from arena.leaderboard_cli import writable

if TYPE_CHECKING:
    from arena.boards import Board
    from arena.submissions.cards import Card
    from arena.submissions.sources import Submission

submit_app = typer.Typer(
    no_args_is_help=True, help="Check a method of yours, run it on a board, verify a result card."
)
BOARDS = Path("leaderboards")

StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Folder of artifacts and records.")
]
DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", envvar="ARENA_DATA_DIR", help="Folder with Parquet data sets."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
BoardsOption = Annotated[Path, typer.Option("--to", help="The folder of the boards.")]
RoleOption = Annotated[
    str | None,
    typer.Option("--as", help="repair, scan or detect, of a class that can do several."),
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="A private key; `arena submit key` makes one.")
]
SecretOption = Annotated[
    Path | None, typer.Option("--secret", help="What the board's held-back part is drawn from.")
]
SandboxOption = Annotated[
    bool,
    typer.Option(
        "--require-sandbox", help="Refuse to run methods where namespaces cannot hold them."
    ),
]
MethodArgument = Annotated[
    str, typer.Argument(help="mine.py, mine.py:field=value, or the name of an installed method.")
]


def mount(app: typer.Typer, leaderboard: typer.Typer, device: Callable[[str], str]) -> None:
    """Add these commands; device: a name's torch device that exists, or BadInput."""
    _found["device"] = device
    app.command("new")(new)
    app.add_typer(submit_app, name="submit")
    for name, command in (("add", add), ("withdraw", withdraw), ("entries", entries)):
        leaderboard.command(name)(command)


_found: dict[str, Callable[[str], str]] = {}


def _device(name: str) -> str:
    return _found["device"](name)


def new(
    kind: Annotated[str, typer.Argument(help="attack, defense, scanner or detector.")],
    name: Annotated[str, typer.Argument(help="Its name: small letters, digits and '_'.")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write to.")] = Path("."),
    package: Annotated[
        bool,
        typer.Option("--package", help="As a package that pip installs, with its entry point."),
    ] = False,
) -> None:
    """Write one documented method and one test, ready to run."""
    from arena.submissions.templates import new

    for path in new(kind, name, to, package=package):
        print(path)


@submit_app.command()
def check(
    method: MethodArgument,
    role: RoleOption = None,
    seconds: Annotated[float, typer.Option(min=1, help="That one call may take.")] = 300.0,
    memory: Annotated[float, typer.Option(help="GB that one call may take.")] = 8.0,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Contract, purity, determinism, ranges and a smoke run: what failed, and the mend."""
    import tempfile

    from arena.submissions import checking

    if not memory > 0:
        raise BadInput(f"--memory must be above 0 GB, got {memory:g}.")
    with tempfile.TemporaryDirectory(prefix="arena-check-") as folder:
        report = checking.check(
            method,
            Path(folder),
            role=role,
            seconds=seconds,
            memory=memory,
            device=_device(device),
            listener=None if as_json else _told,
        )
    if as_json:
        print(json.dumps(report.describe(), indent=1, allow_nan=False))
    else:
        for each in report.checks:
            print(f"{each.state:8}{each.name}: {each.seen}")
            if each.state == "failed" and each.mend:
                print(f"        mend: {each.mend}")
        failed = sum(each.state == "failed" for each in report.checks)
        print(f"\n{report.method}: " + (f"{failed} checks failed." if failed else "all passed."))
    raise typer.Exit(1 if report.failed else 0)


@submit_app.command()
def run(
    method: MethodArgument,
    board: Annotated[str, typer.Option("--board", help="A board.toml, or a board's name.")],
    claim: Annotated[
        list[str] | None,
        typer.Option(help="What the paper says: FILE.toml, or attack=patch,asr=3.2 in percent."),
    ] = None,
    key: KeyOption = None,
    author: Annotated[str, typer.Option(help="Who submits it.")] = "",
    role: RoleOption = None,
    secret: SecretOption = None,
    device: DeviceOption = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Methods that run side by side.")] = 1,
    data_dir: DataDirOption = None,
    store: StoreOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", callback=writable, help="The card, a JSON file.")
    ] = None,
    require_sandbox: SandboxOption = False,
    boards: BoardsOption = BOARDS,
    as_json: JsonOption = False,
) -> None:
    """Run a method on a board's fixed matrix; ends in a result card."""
    from arena.store import Store
    from arena.submissions import cards, held_back, running, sources

    claims = tuple(each for text in claim or () for each in running.read_claims(text))
    chosen = running.find_board(board, boards)
    drawn_from = None if secret is None else held_back.read_secret(secret, chosen)
    if key is not None:
        cards.signature("", key)  # before hours are spent
    folder = store or Path("runs") / "submissions" / chosen.name
    submission = sources.find(method, folder / "methods", role)
    target = out or Path(f"{submission.name}.card.json")
    order = running.Order(
        submission,
        chosen,
        device=_device(device),
        workers=workers,
        author=author,
        claims=claims,
        secret=drawn_from,
        against=_entered(submission, chosen, boards, folder),
        data_dir=data_dir,
        require_sandbox=require_sandbox,
        command=f"arena submit run {submission.name} --board {chosen.name}",
        listener=None if as_json else _told,
    )
    running.filled(claims, submission, chosen, submission.name)  # unknown attacks, before the run
    card = running.run(order, Store(folder), key)
    cards.write(target, card)
    if as_json:
        print(json.dumps({"card": str(target), "hash": card["hash"], "summary": card["summary"]}))
    else:
        _print_summary(card)
        print(f"\nCard: {target}\nNext: arena submit verify {target}")
    raise typer.Exit(1 if any(c["status"] in ("failed", "timeout") for c in card["cells"]) else 0)


def _entered(
    submission: Submission, board: Board, boards: Path, folder: Path
) -> tuple[Submission, ...]:
    """The defenses that stand on the board, where an attack is submitted."""
    from arena.submissions import entries, sources

    if submission.role != "attack" or not (boards / board.name / "board.toml").is_file():
        return ()
    try:
        cards = entries.entered_defenses(boards / board.name, board)
    except entries.Altered as error:
        raise BadInput(str(error)) from error
    return tuple(
        sources.find(told["asked"], folder, "repair")
        if told["package"]
        else sources.of_source(
            told["name"], told["source"].encode(), folder / "methods", told["asked"], "repair"
        )
        for told in (card["method"] for card in cards)
    )


@submit_app.command()
def verify(
    card: Annotated[Path, typer.Argument(help="A card that `arena submit run` wrote.")],
    sample: Annotated[
        int | None, typer.Option(min=0, help="Cells to be run again, drawn at random.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Run all of its cells again.")] = False,
    seed: Annotated[int, typer.Option("--seed", "-s", help="Of the sample.")] = 0,
    key: KeyOption = None,
    by: Annotated[str, typer.Option(help="Who verifies it.")] = "",
    signed_by: Annotated[
        str | None, typer.Option(help="Public key (hex) that must have signed the card.")
    ] = None,
    secret: SecretOption = None,
    device: DeviceOption = "auto",
    data_dir: DataDirOption = None,
    store: StoreOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", callback=writable, help="The verified card.")
    ] = None,
    require_sandbox: SandboxOption = False,
    as_json: JsonOption = False,
) -> None:
    """Refuse an altered card; measure its weights again, run cells again, compare."""
    from arena.submissions import cards

    if every and sample is not None:
        raise BadInput("--all runs every cell again, so --sample cannot be given with it.")
    if store is not None and not store.is_dir():
        raise BadInput(f"There is no store {str(store)!r}.")
    try:
        found = cards.read_card(card)
        public = cards.check_seal(found)
        if signed_by is not None and public != signed_by:
            raise cards.Altered(f"The card is not signed by {signed_by[:16]}.")
        target, verification = _verified(
            card,
            found,
            out,
            secret,
            store=store,
            sample=sample,
            every=every,
            seed=seed,
            device=_device(device),
            data_dir=data_dir,
            key=key,
            by=by,
            require_sandbox=require_sandbox,
            listener=None if as_json else _told,
        )
    except cards.Altered as error:
        print(f"arena: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"verified": str(target), **verification}, indent=1))
    else:
        _print_verification(verification)
        print(f"\nVerified card: {target}")
    raise typer.Exit(0 if verification["holds"] else 1)


def _verified(
    card: Path, found: Card, out: Path | None, secret: Path | None, **asked: Any
) -> tuple[Path, dict[str, Any]]:
    """The verified card's file, written, and what it says. Raises BadInput, Altered."""
    from arena.submissions import cards, verifying

    ask = verifying.Ask(secret=verifying.read_secret(secret, found), **asked)
    verification = verifying.verify(found, ask)
    target = out or card.with_name(card.name.removesuffix(".json") + ".verified.json")
    cards.write(target, {"card": found, "verification": verification})
    return target, verification


@submit_app.command("key")
def key_(
    out: Annotated[Path, typer.Argument(callback=writable, help="The private key's file.")],
) -> None:
    """Make an Ed25519 key to sign cards with; its public half goes beside it (.pub)."""
    from arena.submissions import cards

    print(cards.new_key(out))


def add(
    card: Annotated[Path, typer.Argument(help="A card, best one that is verified.")],
    boards: BoardsOption = BOARDS,
    key: KeyOption = None,
    by: Annotated[str, typer.Option(help="Who verifies it.")] = "",
    secret: SecretOption = None,
    device: DeviceOption = "auto",
    data_dir: DataDirOption = None,
    require_sandbox: SandboxOption = False,
) -> None:
    """Enter a card into its board, as one JSON file; one that is not verified is verified first:
    two of its cells are run again."""
    from arena.submissions import cards, entries

    try:
        if not entries.is_verified(cards.read_json(card, "card")):
            found = cards.read_card(card)
            entries.check_open(found, boards, key)  # before hours are spent
            card, verification = _verified(
                card,
                found,
                None,
                secret,
                device=_device(device),
                data_dir=data_dir,
                key=key,
                by=by,
                require_sandbox=require_sandbox,
                listener=_told,
            )
            if not verification["holds"]:
                _print_verification(verification)
                raise typer.Exit(1)
        print(entries.add(card, boards))
    except cards.Altered as error:
        print(f"arena: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def withdraw(
    entry: Annotated[str, typer.Argument(help="An entry's name or file.")],
    reason: Annotated[str, typer.Option(help="Why, in one line.")],
    boards: BoardsOption = BOARDS,
) -> None:
    """Take an entry back; it stays readable, with the reason."""
    from arena.submissions import cards, entries

    try:
        print(entries.withdraw(entry, reason, boards))
    except cards.Altered as error:
        print(f"arena: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def entries(
    board: Annotated[str, typer.Argument(help="A board's name.")],
    boards: BoardsOption = BOARDS,
    as_json: JsonOption = False,
) -> None:
    """The entries of a board with their status: claimed, reproduced, broken, withdrawn."""
    from arena.core.registry import nearest
    from arena.submissions import cards, entries

    known = sorted(path.parent.name for path in boards.glob("*/board.toml"))
    if board not in known:
        raise BadInput(f"There is no board {board!r} in {str(boards)!r}; {nearest(board, known)}.")
    try:
        rows = entries.rows(boards / board)
    except cards.Altered as error:
        print(f"arena: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps(rows, indent=1, allow_nan=False))
        return
    for row in rows:
        old = "" if row["current"] else f", version {row['version']}"
        figures = ", ".join(
            f"{name} {_percent(row[name])}"
            for name in ("acc", "asr", "auroc")
            if row[name] is not None
        )
        print(f"{row['entry']}: {row['method']}{old}: {row['status']} ({row['why']}); {figures}")
    if not rows:
        print(f"The board {board} has no entries yet.")


# ---------------------------------------------------------------------------------------- printing

_last = 0.0


def _told(event: dict[str, Any]) -> None:
    """One line per finished task, and now and then one for what is under way."""
    global _last
    if event["type"] == "finished":
        error = f" ({event['error']})" if event["error"] else ""
        print(f"done: {event['name']}{error}", file=sys.stderr)
    elif event["type"] == "progress" and time.monotonic() - _last > 30:
        _last = time.monotonic()
        print(f"… {event['name']}: {event['what']}", file=sys.stderr)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _print_summary(card: dict[str, Any]) -> None:
    for group in card["summary"]:
        figures = ", ".join(
            f"{name} {_percent(told['mean'])}" if name != "score" else f"score {told['mean']:.3g}"
            for name in ("acc", "asr", "score", "auroc")
            if (told := group["figures"].get(name))
        )
        statuses = ", ".join(f"{n} {name}" for name, n in group["statuses"].items())
        against = f"{group['defense'] or 'undefended'} against {group['attack']}"
        print(f"{against} ({group['dataset']}, {group['model']}): {figures or '-'} [{statuses}]")
    for claim in card["claims"]:
        for name in ("acc", "asr"):
            if claim[name] is not None:
                found = claim["measured"][name]
                told = "was not measured" if found is None else f"{found:.1f} % measured"
                print(f"claimed {name} {claim[name]:g} % on {claim['attack']}: {told}")
    signed = card["signature"] and f", signed by {card['signature']['public_key'][:16]}"
    print(f"level of isolation: {card['isolation']}; hash {card['hash'][:16]}{signed or ''}")


def _print_verification(found: dict[str, Any]) -> None:
    print(f"sample drawn with seed {found['sample_seed']}")
    for cell in found["cells"]:
        print(f"{cell['defense']} against {cell['attack']}, seed {cell['seed']} ({cell['how']}):")
        for name, figure in cell["figures"].items():
            verdict = "holds" if figure["holds"] else "DOES NOT HOLD"
            within = "" if not figure["within"] else f" (within {figure['within']:.3g})"
            card, again = _shown(figure["card"]), _shown(figure["found"])
            print(f"  {name}: card {card}, found {again}{within}: {verdict}")
    print("All figures hold." if found["holds"] else "Not all figures hold.")


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)[:40]
