"""The command line: a thin skin that parses, calls one function and prints.

Exit codes: 0 done, 1 some cells failed, 2 bad input (one sentence on standard error, nothing
written), 130 stopped by the user, 143 by SIGTERM (as clusters send it), 129 by a terminal that
closed. Heavy modules are imported inside the commands.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arena import submit_cli
from arena.core.registry import BadInput, nearest, split_spec
from arena.leaderboard_cli import DataDirOption, JsonOption, StoreOption, writable
from arena.leaderboard_cli import app as leaderboard_app
from arena.store import check_writable, open_store

if TYPE_CHECKING:
    from arena.boards import Board
    from arena.planning import Plan
    from arena.runner import Runner, Summary
    from arena.store import Store
    from arena.subjects import Subject

UsageError: Any = typer.BadParameter.__mro__[1]  # typer brings its own copy of click

app = typer.Typer(
    name="arena",
    help="Backdoor attacks on image classifiers against the defenses that claim to remove them.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(leaderboard_app, name="leaderboard")

# A model to examine, and how triggers of it are searched.
CellArgument = Annotated[str | None, typer.Argument(help="The first letters of a cell's key.")]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="Weights of your own instead of a cell's.")
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Their network: a name, timm:NAME, or path/to/net.py:factory, a function that returns "
        "a module for images in [0, 1].",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-pickle",
        help="Read --checkpoint as a whole pickled model, or a TrojAI folder with one. Its maker's "
        "code runs.",
    ),
]
DatasetOption = Annotated[str | None, typer.Option("--dataset", "-d", help="Their data set.")]
ImagesOption = Annotated[
    Path | None,
    typer.Option(
        "--images",
        help="Or a folder of images for them, one folder per class; -d imagefolder:PATH.",
    ),
]
LabelsOption = Annotated[
    str,
    typer.Option(
        help="given: by the images' folders; model: for images without labels, the model's own "
        "answers."
    ),
]
MethodRecipeOption = Annotated[
    str, typer.Option("--recipe", help="paper; fast and smoke shorten methods, see `arena info`.")
]
CleanShareOption = Annotated[
    float | None,
    typer.Option(
        help="Share of the training images that the method gets, 0 to 1; else 0.05, and 1 of a "
        "folder of your own."
    ),
]
MethodOption = Annotated[
    str, typer.Option(help="A family of triggers, with fields; see `arena list triggers`.")
]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        help="With deck: a shipped encoder, a file of one, or torchvision:vgg16 (ImageNet)."
    ),
]
RestartsOption = Annotated[int, typer.Option(help="Searches per trigger; the smallest counts.")]
SamplesOption = Annotated[int, typer.Option(help="Images per search.")]
StepsOption = Annotated[
    int | None, typer.Option(help="Passes over them; else as in the method's paper.")
]
StallOption = Annotated[
    int | None,
    typer.Option(
        help="A search ends after so many passes without a trigger smaller by 1 %: faster, for "
        "triggers that may be a little larger. Unless given: as the family has it (nc does)."
    ),
]
AsrOption = Annotated[float | None, typer.Option(help="Success that is asked for, 0 to 1.")]
SplitOption = Annotated[str, typer.Option(help="Images of val or test.")]
SeedOption = Annotated[int, typer.Option("--seed", "-s", help="A seed.")]
MemoryOption = Annotated[
    float | None, typer.Option(help="GB that the search may take; else what is free.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]

# errors that say something of a file or folder that the user named, and nothing of the program
_OF_A_PLACE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENXIO),
)


def main() -> None:
    """The console script: turns every kind of bad input into one sentence and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="arena: %(message)s")
    if isinstance(sys.stdout, io.TextIOWrapper):  # names may hold what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _stoppable() as stopped:
            code = app(prog_name="arena", standalone_mode=False)
            if code == 128 + signal.SIGINT:  # newer typer ends so, without a word
                raise KeyboardInterrupt
    except BadInput as error:
        sys.exit(_complain(str(error)))
    except UsageError as error:
        sys.exit(_complain(_usage(error)))
    except (KeyboardInterrupt, typer.Abort):
        with suppress(OSError):  # the terminal may be gone
            print("Stopped; the same command goes on from here.", file=sys.stderr)
        sys.exit(128 + stopped.get("by", signal.SIGINT))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except OSError as error:
        if type(error).__name__ == "DiskFull":
            sys.exit(_complain(f"{error.strerror}; make room and run the same command again."))
        if error.filename is None or error.errno not in _OF_A_PLACE:
            raise
        place = error.filename2 or error.filename
        sys.exit(_complain(f"{str(place)!r} cannot be used: {error.strerror}; name another place."))
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _stoppable() -> Iterator[dict[str, int]]:
    """Inside, SIGTERM and SIGHUP stop as Ctrl-C does, with what was reached written down; "by" of
    what is yielded is then the signal."""
    told: dict[str, int] = {}

    def stop(number: int, _: object) -> None:
        told["by"] = number
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():  # others cannot set handlers
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's wish stands
                before[number] = signal.signal(number, stop)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _complain(text: str) -> int:
    """One line on standard error, with one full stop or question mark at its end. What the user
    gave may hold anything: what a terminal would obey is escaped, and long words are cut."""
    words = (word if len(word) <= 300 else f"{word[:100]}…{word[-100:]}" for word in text.split())
    sentence = " ".join(words).rstrip(".")
    if len(sentence) > 1500:
        sentence = f"{sentence[:700]} … {sentence[-700:]}"
    sentence = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in sentence)
    print(f"arena: {sentence}{'' if sentence.endswith('?') else '.'}", file=sys.stderr)
    return 2


def _usage(error: Any) -> str:
    """One sentence for a wrong option or command, with the nearest valid one."""
    import difflib

    message = error.format_message()
    faults = getattr(error.__context__, "errors", None)  # newer typer does not say what it got
    if faults is not None:
        message += f", got {faults()[0]['input']!r}"
    wrong = getattr(error, "option_name", "") or (
        message.partition("'")[2].partition("'")[0] or message.rpartition(": ")[2].rstrip(".")
    )
    context = getattr(error, "ctx", None)
    if context is not None and message.startswith("No such"):
        command = context.command
        names = list(getattr(command, "commands", {}))
        if message.startswith("No such option"):
            names = [o for p in command.params for o in getattr(p, "opts", ())]
            message = f"{context.command_path} has no option {wrong!r}"
        else:
            message = f"There is no command {wrong!r}"
        near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"see `{context.command_path} --help`"
        return f"{message}; {hint}"
    return message


# ------------------------------------------------------------------------------------ running


@app.command()
def quickstart(
    store: StoreOption = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Train, attack, repair and rank on the embedded data set; a few minutes without a GPU."""
    from arena.boards import QUICKSTART

    folder = store or Path("runs/quickstart")
    raise typer.Exit(_run(QUICKSTART, folder, device, 1, None, False, False))


@app.command()
def run(
    board: Annotated[Path | None, typer.Argument(help="A board.toml; or use the flags.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option("--dataset", "-d", help="A data set; may be repeated.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option("--model", "-m", help="A network; may be repeated.")
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option("--attack", "-a", help="NAME or NAME:field=value,…; may be repeated."),
    ] = None,
    defense: Annotated[
        list[str] | None,
        typer.Option("--defense", "-D", help="NAME or NAME:field=value,…; may be repeated."),
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option("--seed", "-s", help="A seed; may be repeated.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="smoke, fast or paper; fields: fast:epochs=20.")
    ] = None,
    clean_share: Annotated[
        float | None, typer.Option(help="The defender's share of the training set, in (0, 1].")
    ] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that one method may take.")] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            "--measure", help="Also measure NAME or NAME:field=value,…; see `arena list measures`."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Methods that run side by side.")] = 1,
    data_dir: DataDirOption = None,
    store: StoreOption = None,
    require_sandbox: Annotated[
        bool,
        typer.Option(
            "--require-sandbox", help="Refuse to run methods where namespaces cannot hold them."
        ),
    ] = False,
    no_sandbox: Annotated[
        bool,
        typer.Option(
            "--no-sandbox",
            envvar="ARENA_NO_SANDBOX",
            help="Hold methods by limits alone, to look into one that fails; it is recorded.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan only.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run a board, or every combination of the flags. Run again, it goes on where it stopped."""
    from arena.boards import board_from, read_board

    given = {
        "dataset": dataset,
        "model": model,
        "attack": attack,
        "defense": defense,
        "seed": seed,
        "recipe": recipe,
        "clean_share": clean_share,
        "timeout": timeout,
        "measure": measure,
    }
    flags = {key: value for key, value in given.items() if value is not None and value != []}
    if board is not None:
        changed = sorted(set(flags) - {"timeout"})
        if changed:
            raise BadInput(
                f"A board fixes its matrix, so --{changed[0].replace('_', '-')} cannot be given "
                "with it; leave the board out or edit its file."
            )
        chosen: Board = read_board(board)
    else:
        chosen = board_from(flags, "the command line")
    folder = store or Path("runs") / chosen.name
    raise typer.Exit(
        _run(
            chosen,
            folder,
            device,
            workers,
            data_dir,
            dry_run,
            as_json,
            require_sandbox=require_sandbox,
            use_sandbox=not no_sandbox,
        )
    )


def _run(
    board: Board,
    folder: Path,
    device: str,
    workers: int,
    data_dir: Path | None,
    dry_run: bool,
    as_json: bool,
    require_sandbox: bool = False,
    use_sandbox: bool = True,
) -> int:
    from arena.boards import check_names
    from arena.store import Store

    check_names(board)  # before torch and the data are loaded
    store = Store(folder)
    from arena.planning import make_plan
    from arena.runner import Runner

    where = _device(device)
    with _status("loading the data", quiet=as_json):
        try:
            plan = make_plan(board, data_dir)
        except BadInput:
            raise
        except ValueError as error:  # a network that is unknown, or too deep for the images
            raise BadInput(str(error)) from error
    command = _told(sys.argv[1:])
    runner = Runner(
        plan,
        store,
        where,
        workers,
        command=command,
        require_sandbox=require_sandbox,
        use_sandbox=use_sandbox,
    )
    if dry_run:
        _print_plan(runner, as_json)
        return 0
    summary = _watched(runner, quiet=as_json)
    return _close(plan, store, summary, as_json)


def _told(words: list[str]) -> str:
    """The command as a table names it: without what only says where things lie on this machine."""
    import shlex

    here, told, skip = ("--store", "--data-dir", "--workers"), [], False
    for word in words:
        if not skip and word.partition("=")[0] not in here:
            told.append(shlex.quote(word))
        skip = word in here and not skip
    return "arena " + " ".join(told)


def _device(name: str) -> str:
    """A torch device that exists. Raises BadInput."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise BadInput(f"There is no device {name!r}; {nearest(name, ('auto', 'cpu', 'cuda'))}.")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise BadInput(f"--device {name}: no GPU can be used here; `--device cpu` works.")
        if index and int(index) >= count:
            raise BadInput(f"--device {name}: the last of {count} GPUs is cuda:{count - 1}.")
    return name


submit_cli.mount(app, leaderboard_app, _device)


def _status(what: str, quiet: bool) -> AbstractContextManager[None]:
    from arena.watch import status

    return nullcontext() if quiet else status(what)


def _watched(runner: Runner, quiet: bool) -> Summary:
    """Run with two bars (the matrix with its time left, the work at hand), or plain lines."""
    from arena.watch import Bars, Lines

    if quiet:
        return runner.run()
    show: Bars | Lines = Bars() if sys.stderr.isatty() else Lines()
    with show:
        runner.listener = show.on_event
        return runner.run()


def _print_plan(runner: Runner, as_json: bool) -> None:
    from arena.report.tables import clean_text
    from arena.watch import duration

    estimates = runner.estimate()
    victims, cells = runner.todo()
    trained = {v.key for v in victims}
    open_cells = {c.key for c in cells}
    lines = [
        {
            "kind": "victim",
            "name": v.name,
            "model": v.setting.model,
            "cached": v.key not in trained,
            "seconds": round(estimates[v.key].seconds, 1) if v.key in estimates else 0.0,
            "key": v.key,
        }
        for v in runner.plan.victims
    ] + [
        {
            "kind": "cell",
            "name": c.name,
            "model": c.victim.setting.model,
            "cached": c.key not in open_cells,
            "seconds": round(estimates[c.key].seconds, 1) if c.key in estimates else 0.0,
            "key": c.key,
        }
        for c in runner.plan.cells
    ]
    seconds = sum(e.seconds for e in estimates.values()) / runner.workers
    disk = sum(e.disk_bytes for e in estimates.values())
    if as_json:
        print(json.dumps({"seconds": seconds, "disk_bytes": disk, "tasks": lines}, indent=1))
        return
    for line in lines:
        state = "cached" if line["cached"] else f"about {duration(float(str(line['seconds'])))}"
        print(
            f"{line['kind']:<7} {str(line['key'])[:10]}  {clean_text(line['model']):<12} "
            f"{clean_text(line['name'])}  [{state}]"
        )
    print(
        f"{len(runner.plan.cells)} cells, {len(runner.plan.cells) - len(cells)} cached; "
        f"{len(victims)} models to train; about {duration(seconds)} and {disk / 1e9:.2f} GB; "
        f"{runner.store.free_bytes() / 1e9:.0f} GB free."
    )


def _close(plan: Plan, store: Store, summary: Summary, as_json: bool) -> int:
    """Write the leaderboard, show it, and say how the run ended."""
    from arena.measuring import lacking
    from arena.report.rows import aligned, flatten
    from arena.site import write_run
    from arena.watch import print_table

    keys = {cell.key for cell in plan.cells}
    board = plan.board
    records = [r for r in store.board_records(board.name, board.version) if r["key"] in keys]
    paths = write_run(store, board.name, records)
    rows = [flatten(record) for record in records]
    if as_json:
        print(json.dumps(aligned(rows), indent=1, allow_nan=False))
    else:
        print_table(rows)
        print(f"\n{summary.done} cells done, {summary.cached} were there before.")
        print("Leaderboard: " + ", ".join(str(path) for path in paths))
    for record in summary.failed:
        print(
            f"arena: {record['defense']['short']} against {record['attack']['short']}, seed "
            f"{record['seed']}: {record['status']}: {record['reason']}",
            file=sys.stderr,
        )
    for record in summary.unmeasured:
        for asked in lacking(record, plan.measures):
            why = record["measures"][asked.spec]["reason"]
            print(
                f"arena: {record['defense']['short']} against {record['attack']['short']}, seed "
                f"{record['seed']}: {asked.name} failed: {why}",
                file=sys.stderr,
            )
    return 1 if summary.failed or summary.unmeasured else 0


# ---------------------------------------------------------------------------------- looking around

KINDS = (
    "attacks",
    "defenses",
    "scanners",
    "detectors",
    "triggers",
    "measures",
    "datasets",
    "models",
    "metrics",
    "boards",
)


@app.command("list")
def list_(
    kind: Annotated[str, typer.Argument(help=" | ".join(KINDS))],
    as_json: JsonOption = False,
) -> None:
    """List what the arena knows."""
    from arena import listing

    if kind not in KINDS:
        raise BadInput(f"There is no list of {kind!r}; {nearest(kind, KINDS)}")
    lines = listing.LISTS[kind]()
    if as_json:
        print(json.dumps(lines, indent=1))
    elif lines:
        print(listing.columns(lines))
    else:
        print(f"There are no {kind} yet.")


@app.command()
def info(
    name: Annotated[
        str, typer.Argument(help="An attack, defense, measure, data set, model or metric.")
    ],
    as_json: JsonOption = False,
) -> None:
    """What a method does: its fields with units, ranges, defaults, and its source."""
    from arena import listing

    found = listing.describe(name)
    print(json.dumps(found, indent=1) if as_json else listing.page(found))


@app.command()
def show(
    cell: Annotated[str, typer.Argument(help="The first letters of a cell's key.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
    picture: Annotated[
        Path | None, typer.Option(callback=writable, help="Where to write the pictures (PNG).")
    ] = None,
) -> None:
    """One cell: metrics, provenance, pictures."""
    from arena import listing

    opened = open_store(store)
    record = opened.find(cell)
    if as_json:
        print(json.dumps(record, indent=1))
        return
    print(listing.cell(record))
    from arena.gallery import strip
    from arena.store import write_atomically

    image = strip(opened, record)
    if image is not None:
        path = picture or opened.root / "pictures" / f"{record['key'][:12]}.png"
        write_atomically(path, image)
        print(f"\npictures (clean, triggered, difference): {path}")


@app.command()
def preview(
    attack: Annotated[str, typer.Argument(help="NAME or NAME:field=value,…")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="A data set.")] = "signs",
    seed: Annotated[int, typer.Option("--seed", "-s", help="A seed.")] = 0,
    data_dir: DataDirOption = None,
    store: StoreOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", callback=writable, help="Where to write (PNG).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What an attack's trigger does to 8 images, without training a victim."""
    from arena.core.registry import attacks

    attacks.describe(split_spec(attack)[0])  # unknown names before torch is loaded
    from arena import data as datasets
    from arena.core import parts
    from arena.gallery import preview as draw
    from arena.referee.keeping import StoreKeeper
    from arena.store import Store, write_atomically

    method = attacks.build(attack)
    folder = store or Path("runs") / "adhoc"
    with _status("loading the data", quiet=as_json):
        loaded = datasets.load(dataset, data_dir=data_dir)
        method.check(loaded.shape, loaded.counts)
        with parts.kept(StoreKeeper(Store(folder))):
            picture, apart = draw(method, loaded, seed)
    path = out or folder / "pictures" / f"preview-{method.method_name}.png"
    write_atomically(path, picture)
    if as_json:
        print(json.dumps({"picture": str(path), "stealth": apart}, indent=1))
        return
    figures = ", ".join(f"{k} {v:.4g}" for k, v in apart.items() if v is not None)
    print(f"{figures} (500 test images)\npictures (clean, triggered, difference): {path}")
    if getattr(method, "learned", False):
        print(
            f"{method.method_name} learns its trigger with the victim: this is what it starts "
            "from. `arena show CELL` shows the learned one."
        )


@app.command()
def distance(
    cell: CellArgument = None,
    checkpoint: CheckpointOption = None,
    model: ModelOption = None,
    trust_pickle: TrustOption = False,
    dataset: DatasetOption = None,
    images: ImagesOption = None,
    labels: LabelsOption = "given",
    method: MethodOption = "nc",
    encoder: EncoderOption = None,
    pairs: Annotated[
        str, typer.Option(help="all, sample:20, or victim:target pairs such as 0:1,3:5.")
    ] = "all",
    restarts: RestartsOption = 3,
    samples: SamplesOption = 100,
    steps: StepsOption = None,
    stall: StallOption = None,
    asr: AsrOption = None,
    baseline: Annotated[
        str | None, typer.Option(help="Another cell, to give the improvement over.")
    ] = None,
    split: SplitOption = "val",
    seed: SeedOption = 0,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", callback=writable, help="The heat map (PNG).")
    ] = None,
    data_dir: DataDirOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """How far a model's classes are from each other: the smallest trigger from one to another."""
    from arena.core.inversion.families import families

    families.describe(split_spec(method)[0])  # unknown names before torch is loaded
    from arena import inverting, listing
    from arena.gallery import heat_map
    from arena.store import write_atomically

    allowed = _allowed(memory)
    question = inverting.Question(method, restarts, samples, steps, asr, seed, split, stall)
    opened, subject = _subject(
        cell, checkpoint, model, _named(dataset, images), data_dir, store, trust_pickle, labels
    )
    other = None
    if baseline is not None:
        from arena.subjects import of_cell

        other = of_cell(opened, baseline, data_dir)
    with _status("inverting triggers", quiet=as_json), opened.unless_refused():
        if encoder is not None:
            method = inverting.with_encoder(method, encoder, subject, opened)
            question = dataclasses.replace(question, method=method)
        found = inverting.class_distances(
            subject, question, pairs, opened,
            baseline=other,
            device=_device(device),
            memory=allowed,
        )  # fmt: skip
    title = f"{found['method']} distances of {subject.name}"
    name = f"distance-{subject.digest[:12]}-{method.partition(':')[0]}.png"
    place = out or opened.root / "pictures" / name
    drawn = heat_map(found["distances"], found["classes"], title=title, unit=found["unit"])
    write_atomically(place, drawn)
    found["picture"] = str(place)
    print(json.dumps(found, indent=1) if as_json else listing.distances(found))


@app.command()
def invert(
    target: Annotated[int, typer.Option("--target", "-t", help="Class that it leads to.")],
    cell: CellArgument = None,
    checkpoint: CheckpointOption = None,
    model: ModelOption = None,
    trust_pickle: TrustOption = False,
    dataset: DatasetOption = None,
    images: ImagesOption = None,
    labels: LabelsOption = "given",
    victim: Annotated[
        int | None, typer.Option("--victim", "-v", help="Class that it works on; else all.")
    ] = None,
    method: MethodOption = "nc",
    encoder: EncoderOption = None,
    restarts: RestartsOption = 3,
    samples: SamplesOption = 100,
    steps: StepsOption = None,
    stall: StallOption = None,
    asr: AsrOption = None,
    prune_to: Annotated[
        list[int] | None, typer.Option(help="Also what is left of it at so many pixels.")
    ] = None,
    split: SplitOption = "val",
    seed: SeedOption = 0,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", callback=writable, help="Where to write, without an ending."),
    ] = None,
    data_dir: DataDirOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """The smallest trigger that leads a model to a class: picture, numbers, robustness."""
    from arena.core.inversion.families import families

    families.describe(split_spec(method)[0])  # unknown names before torch is loaded
    from arena import inverting, listing
    from arena.gallery import figure
    from arena.store import save_tensors, write_atomically

    allowed = _allowed(memory)
    question = inverting.Question(method, restarts, samples, steps, asr, seed, split, stall)
    opened, subject = _subject(
        cell, checkpoint, model, _named(dataset, images), data_dir, store, trust_pickle, labels
    )
    with _status("inverting a trigger", quiet=as_json), opened.unless_refused():
        if encoder is not None:
            method = inverting.with_encoder(method, encoder, subject, opened)
            question = dataclasses.replace(question, method=method)
        found = inverting.inverted(
            subject, question, victim, target, opened,
            prune_to=prune_to or (),
            device=_device(device),
            memory=allowed,
        )  # fmt: skip
    names = subject.data.classes
    name = f"invert-{subject.digest[:12]}-{method.partition(':')[0]}-{victim}-{target}"
    place = out or opened.root / "pictures" / name
    picture = figure(
        found.clean,
        found.stamped,
        titles=[names[int(label)] for label in found.y],
        answers=[(names[int(one)], names[int(two)]) for one, two in found.answers],
        heading=f"{method} trigger to {names[target]}, of {subject.name}; below: its answers",
    )
    write_atomically(place.with_name(f"{place.name}.png"), picture)
    save_tensors(place.with_name(f"{place.name}.safetensors"), found.trigger)
    files = {kind: f"{place}.{kind}" for kind in ("png", "safetensors")}
    facts = {**found.facts, "files": files}
    print(json.dumps(facts, indent=1) if as_json else listing.trigger(facts, names))


@app.command()
def scan(
    cell: CellArgument = None,
    checkpoint: CheckpointOption = None,
    model: ModelOption = None,
    trust_pickle: TrustOption = False,
    dataset: DatasetOption = None,
    images: ImagesOption = None,
    labels: LabelsOption = "given",
    method: Annotated[str, typer.Option(help="See `arena list scanners`.")] = "nc",
    clean_share: CleanShareOption = None,
    recipe: MethodRecipeOption = "paper",
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", callback=writable, help="The trigger's picture.")
    ] = None,
    data_dir: DataDirOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Whether a model has a backdoor: verdict, anomaly index per class, the trigger's picture."""
    from arena import listing, scanning

    scanning.check(method, recipe)  # unknown names before any model is read
    from arena.gallery import png
    from arena.store import write_atomically

    dataset = _named(dataset, images)
    share = _share(clean_share, checkpoint, dataset)
    opened, subject = _subject(
        cell, checkpoint, model, dataset, data_dir, store, trust_pickle, labels
    )
    with _status("scanning", quiet=as_json), opened.unless_refused():
        found, trigger = scanning.scan(
            subject, method, opened, clean_share=share, recipe=recipe, device=_device(device)
        )
    if trigger is not None:
        name = f"scan-{subject.digest[:12]}-{method.partition(':')[0]}.png"
        path = out or opened.root / "pictures" / name
        write_atomically(path, png((trigger * 255).round().byte()))
        found["picture"] = str(path)
    print(json.dumps(found, indent=1) if as_json else listing.verdict(found))


@app.command()
def repair(
    cell: CellArgument = None,
    checkpoint: CheckpointOption = None,
    model: ModelOption = None,
    trust_pickle: TrustOption = False,
    dataset: DatasetOption = None,
    images: ImagesOption = None,
    labels: LabelsOption = "given",
    defense: Annotated[
        list[str] | None,
        typer.Option("--defense", "-D", help="How to repair; several are compared."),
    ] = None,
    scan: Annotated[bool, typer.Option("--scan", help="Scan before and after.")] = False,
    scanner: Annotated[str, typer.Option(help="See `arena list scanners`.")] = "nc",
    clean_share: CleanShareOption = None,
    recipe: MethodRecipeOption = "paper",
    max_drop: Annotated[
        float, typer.Option(help="Accuracy that a repair may cost to be recommended, 0 to 1.")
    ] = 0.05,
    device: DeviceOption = "auto",
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", callback=writable, help="The repaired weights; the report beside them."
        ),
    ] = Path("repaired.safetensors"),
    data_dir: DataDirOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Repair a suspicious model in one or several ways, compare, and keep the best."""
    from arena import listing, repairing
    from arena.data import unlabelled
    from arena.store import save_tensors, write_atomically
    from arena.subjects import as_given

    dataset = _named(dataset, images)
    share = _share(clean_share, checkpoint, dataset)
    report = out.with_suffix(".md")
    if report == out:
        raise BadInput(f"{str(out)!r} is where the report goes; name a .safetensors file.")
    check_writable(report)
    question = repairing.Question(
        tuple(defense or ()), scanner if scan else None, share, max_drop, recipe
    )
    repairing.check(question)  # unknown names before any model is read
    asking = labels == "given" and dataset is not None and unlabelled.holds(dataset)
    opened, subject = _subject(
        cell, checkpoint, model, dataset, data_dir, store, trust_pickle,
        "model" if asking else labels,
    )  # fmt: skip
    with _status("repairing", quiet=as_json), opened.unless_refused():
        if asking:
            raise BadInput(repairing.unlabelled(subject, question, opened, device=_device(device)))
        found, weights = repairing.repair(subject, question, opened, device=_device(device))
    found["report"] = str(report)
    if weights is not None:
        save_tensors(out, as_given(subject, weights))
        found["file"] = str(out)
    page = listing.repairs(found)
    write_atomically(report, f"{page}\n".encode())
    print(json.dumps(found, indent=1) if as_json else page)
    if not as_json:
        print(f"\nreport: {report}" + (f"\nweights: {out}" if weights is not None else ""))
    raise typer.Exit(0 if weights is not None else 1)


@app.command()
def detect(
    cell: Annotated[str, typer.Argument(help="The first letters of a cell's key.")],
    method: Annotated[
        list[str] | None, typer.Option(help="See `arena list detectors`; default: all of them.")
    ] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="shallow, middle or deep; default: each of them.")
    ] = None,
    n: Annotated[list[int] | None, typer.Option("--n", help="Inputs; default: 100, 500.")] = None,
    ratio: Annotated[
        list[float] | None, typer.Option(help="Triggered to clean ones; default: 1.0, 0.1.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Sets of inputs that figures are means of.")] = 3,
    clean_share: Annotated[
        float, typer.Option(help="Share of the training images that detectors get, 0 to 1.")
    ] = 0.01,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    data_dir: DataDirOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Whether detectors tell a cell's triggered inputs from clean ones: F1, precision, AUROC."""
    from arena import detecting, listing

    for name in method or ():
        detecting.check(name)  # unknown names before any model is read
    question = detecting.Question(
        method or detecting.detectors(),
        level or detecting.LEVELS,
        n or (100, 500),
        ratio or (1.0, 0.1),
        draws,
        clean_share,
    )
    opened = open_store(store)
    with _status("detecting", quiet=as_json):
        inputs = detecting.inputs_of(opened, cell, data_dir)
        found = detecting.detect(inputs, question, opened, device=_device(device), seed=seed)
    print(json.dumps(found, indent=1) if as_json else listing.detections(found))


def _named(dataset: str | None, images: Path | None) -> str | None:
    """The spec of the data set that a user means. Raises BadInput."""
    if images is None:
        return dataset
    if dataset is not None:
        raise BadInput("Give -d DATASET or --images FOLDER, not both.")
    return f"imagefolder:{images}"


def _allowed(memory: float | None) -> float | None:
    """Bytes of GB that a search may take. Raises BadInput."""
    if memory is None:
        return None
    if not 0 < memory < float("inf"):
        raise BadInput(f"--memory must be a number of GB above 0, got {memory:g}.")
    return memory * 1e9


def _share(given: float | None, checkpoint: Path | None, dataset: str | None) -> float:
    """The share of clean images: of somebody's own folder all are meant to be used."""
    if given is not None:
        return given
    own = checkpoint is not None and (dataset or "").startswith("imagefolder:")
    return 1.0 if own else 0.05


def _subject(
    cell: str | None,
    checkpoint: Path | None,
    model: str | None,
    dataset: str | None,
    data_dir: Path | None,
    store: Path | None,
    trust_pickle: bool = False,
    labels: str = "given",
) -> tuple[Store, Subject]:
    """The model that a user means, and the store to keep answers in. Raises BadInput."""
    from arena.data import unlabelled
    from arena.store import Store
    from arena.subjects import of_cell, of_checkpoint, of_unlabelled

    if (cell is None) == (checkpoint is None):
        raise BadInput(
            "Name a cell, or a file of weights with --checkpoint FILE --model NAME and -d DATASET "
            "or --images FOLDER."
        )
    if labels not in (known := ("given", "model")):
        raise BadInput(f"There are no labels {labels!r}; {nearest(labels, known)}.")
    if cell is not None:
        opened = open_store(store)
        return opened, of_cell(opened, cell, data_dir)
    assert checkpoint is not None
    if dataset is None or (model is None and not trust_pickle and checkpoint.is_file()):
        raise BadInput(
            "--checkpoint needs --model NAME and -d DATASET or --images FOLDER, which the file "
            "cannot say; a whole pickled model runs its maker's code when it is read and needs "
            "--trust-pickle in the model's place."
        )
    opened = Store(store or Path("runs") / "adhoc")
    if labels == "model":
        if not dataset.startswith("imagefolder:") or not unlabelled.holds(dataset):
            raise BadInput("--labels model is for --images FOLDER of images without labels.")
        return opened, of_unlabelled(checkpoint, model, dataset, trust_pickle=trust_pickle)
    return opened, of_checkpoint(checkpoint, model, dataset, data_dir, trust_pickle=trust_pickle)


@app.command()
def results(
    store: StoreOption = None,
    format: Annotated[str, typer.Option(help="table, md, csv, json or latex.")] = "table",
    board: Annotated[str | None, typer.Option(help="Only this board.")] = None,
    attack: Annotated[str | None, typer.Option("--attack", "-a", help="Only this attack.")] = None,
    defense: Annotated[
        str | None, typer.Option("--defense", "-D", help="Only this defense.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", "-s", help="Only this seed.")] = None,
) -> None:
    """The rows of a store: one per cell for scripts (json), means over seeds for people."""
    from arena.report import tables
    from arena.report.rows import aligned, flatten
    from arena.watch import print_table

    if format not in tables.FORMATS:
        raise BadInput(f"There is no format {format!r}; {nearest(format, tables.FORMATS)}")
    rows = [flatten(record) for record in open_store(store).board_records(board)]
    for key, wanted in (("attack", attack), ("defense", defense)):
        if wanted is not None:
            names = {row[f"{key}_name"] for row in rows}
            if wanted.partition(":")[0] not in names:
                raise BadInput(f"No row has the {key} {wanted!r}; {nearest(wanted, names)}")
            rows = [r for r in rows if wanted in (r[f"{key}_name"], r[f"{key}_short"], r[key])]
    if seed is not None:
        rows = [row for row in rows if row["seed"] == seed]
    if format == "json":
        print(json.dumps(aligned(rows), indent=1, allow_nan=False))
    elif format == "table":
        print_table(rows)
    else:
        print(tables.render(tables.cells(rows), format))


@app.command()
def doctor(
    data_dir: DataDirOption = None, store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """Check versions, devices, data and disk: what works, what does not, and the mend."""
    from arena.doctor import examine

    findings = examine(data_dir, store)
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=1))
    else:
        for finding in findings:
            print(f"{finding.state:<5} {finding.what:<16} {finding.found}")
            if finding.mend:
                print(f"      {'':<16} mend: {finding.mend}")
    raise typer.Exit(1 if any(finding.state == "bad" for finding in findings) else 0)


if __name__ == "__main__":
    main()
