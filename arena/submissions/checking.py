"""`arena submit check`: what a submission must fulfil, what was seen of it, and the mend.

The file is read here; its code runs in workers only. First what can be seen without running it,
then a smoke run on `signs` under the referee, then a trial that calls the method four times.
"""

from __future__ import annotations

import ast
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arena.boards import Board
from arena.core.registry import (
    READ_BY_REFEREE,
    BadInput,
    attacks,
    defenses,
    files_of,
    read_method_file,
    spec_of,
)
from arena.core.seeding import stream
from arena.data import draw_clean
from arena.identity import method_files
from arena.planning import Plan, make_plan
from arena.referee import isolate
from arena.referee.sandbox import Limits
from arena.referee.trial import ranges_of
from arena.runner import Runner
from arena.store import Store, save_tensors
from arena.submissions import sources
from arena.submissions.sources import Submission

SIGNS = "signs:size=400,classes=5"
SIGNATURES = {
    "repair": ("self", "model", "clean", "rng"),
    "scan": ("self", "model", "clean", "rng"),
    "score": ("self", "model", "x", "clean", "rng"),
    "prepare": ("self", "train", "rng"),
    "poison": ("self", "train", "trigger", "rng"),
    "train": ("self", "fit", "poisoned", "trigger", "rng"),
    "check": (),  # an attack's and a repair's differ
}
POWER = {"attack": "poison", "repair": "repair", "scan": "scan", "detect": "score"}
MENDS = {
    "build": "Make the file importable on its own; `python -c 'import …'` shows the error.",
    "range": "State the range that the class accepts (low, high, above, choices), no wider one.",
    "call": "Return what arena/core/contracts.py says for this function.",
    "purity": "Work on copies (deepcopy the model, clone tensors) and take hooks off again.",
    "determinism": "Draw from `rng` alone: torch.rand(…, generator=rng), never a global generator.",
    "no memory": "Keep nothing between calls: no globals, no caches, nothing stored on the class.",
}


@dataclass(frozen=True)
class Check:
    name: str
    state: str  # passed, failed or skipped
    seen: str
    mend: str = ""


@dataclass(frozen=True)
class Report:
    method: str
    role: str
    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        return any(check.state == "failed" for check in self.checks)

    def describe(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "role": self.role,
            "passed": not self.failed,
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }


def check(
    text: str,
    folder: Path,
    *,
    role: str | None = None,
    seconds: float = 300.0,
    memory: float = 8.0,
    device: str = "cpu",
    listener: Callable[[dict[str, Any]], None] | None = None,
) -> Report:
    """All checks of the method in the file `text` (or of an installed one).

    folder: for what is computed meanwhile. seconds, memory (GB): what the smoke run may take.
    Raises BadInput where there is no such file.
    """
    name = Path(text.partition(".py:")[0]).stem
    if text.endswith(".py"):
        read_method_file(Path(text).expanduser())
    try:
        submission = sources.find(text, folder / "methods", role)
        _built(submission)
    except BadInput as error:
        mend = "Mend this first; `arena new` writes a file that passes."
        return Report(name, role or "", (Check("contract", "failed", str(error), mend),))
    checks = list(_static(submission))
    if all(each.state != "failed" for each in checks):
        checks += _dynamic(submission, folder, seconds, memory, device, listener)
    else:
        checks.append(Check("smoke run", "skipped", "something before it failed"))
    return Report(submission.name, submission.role, tuple(checks))


def _built(submission: Submission) -> Any:
    registry = attacks if submission.kind == "attack" else defenses
    return registry.build(submission.spec, "smoke")


# ------------------------------------------------------------------------------ without running it


def _static(submission: Submission) -> Iterator[Check]:
    tree = ast.parse(submission.source)
    [node] = [
        each
        for each in tree.body
        if isinstance(each, ast.ClassDef)
        and any(ast.unparse(mark).rpartition(".")[2] == "method" for mark in each.decorator_list)
    ]
    described = submission.described
    functions = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    powers = " and ".join(described.powers)
    yield Check("contract", "passed", f"one @method class, which {powers}")

    wrong = [
        f"{name}({', '.join(wanted)})"
        for name, wanted in SIGNATURES.items()
        if wanted and name in functions and _arguments(functions[name]) != wanted
    ]
    missing = []
    if submission.kind == "attack":
        missing = [name for name in ("check", "prepare", "poison") if name not in functions]
    yield _of(
        "signatures",
        [f"{text} is written otherwise" for text in wrong] + [f"{m} is missing" for m in missing],
        "its functions take what the contract gives",
        "Write each as arena/core/contracts.py does: "
        + (", ".join(wrong) or ", ".join(f"{m}(…)" for m in missing)),
    )

    unclear = [name for name in READ_BY_REFEREE if name in functions]
    known = {field.name for field in described.fields} | set(described.traits)
    if submission.kind == "attack" and "target" not in known:
        unclear.append("target")
    yield _of(
        "fields",
        [f"{name} must be a field or a literal ClassVar" for name in unclear],
        f"{len(described.fields)} fields, with literal defaults in their ranges",
        "The referee reads these without running the file, so they cannot be computed.",
    )

    documented = [f.name for f in described.fields if not f.doc]
    problems = [] if described.source else ["its docstring has no `Source:`"]
    problems += [f"field {name} has no description" for name in documented]
    yield _of(
        "documentation",
        problems,
        "a source, and a description of each field",
        'Begin the file with """What it does. Source: paper.""" and write fields with param().',
    )

    strange = sorted(set(_arena_imports(tree)))
    yield _of(
        "imports",
        [f"it imports {name}" for name in strange],
        "of the arena it imports arena.core only",
        "Import arena.core only: methods, the store, the runner and the data are out of reach.",
    )


def _of(name: str, problems: list[str], fine: str, mend: str) -> Check:
    if problems:
        return Check(name, "failed", "; ".join(problems), mend)
    return Check(name, "passed", fine)


def _arguments(function: ast.FunctionDef) -> tuple[str, ...]:
    found = function.args
    return tuple(each.arg for each in (*found.posonlyargs, *found.args))


def _arena_imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            module = str(node.module or "")
            names = [
                f"{module}.{alias.name}" if module == "arena" else module for alias in node.names
            ]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] == "arena" and not f"{name}.".startswith("arena.core."):
                yield name


# ------------------------------------------------------------------------------------ running it


def _dynamic(
    submission: Submission,
    folder: Path,
    seconds: float,
    memory: float,
    device: str,
    listener: Callable[[dict[str, Any]], None] | None,
) -> Iterator[Check]:
    method = _built(submission)
    share = max(0.25, float(getattr(method, "needs_share", 0.0)))
    board = Board(
        name="check",
        dataset=(SIGNS,),
        model=("fastnet_tiny",),
        attack=(submission.spec if submission.kind == "attack" else "patch",),
        defense=(submission.spec if submission.role == "repair" else "none",),
        recipe="smoke",
        clean_share=share,
        timeout=seconds,
        memory=memory,
    )
    try:
        plan = _without_nulls(make_plan(board), spec_of(method))
    except BadInput as error:
        yield Check(
            "smoke run", "failed", str(error), "Let `check` accept the data or say why not."
        )
        return
    store = Store(folder)
    held = Limits(memory=int(1.5 * memory * 1e9))  # a little more than it may use is told, not cut
    command = "arena submit check"
    Runner(plan, store, device, listener=listener, command=command, limits=held).run()
    records = [record for cell in plan.cells if (record := store.record(cell.key)) is not None]
    own = [r for r in records if _is_own(r, submission)]
    bad = [f"{r['attack']['short']}: {r['reason']}" for r in own if r["status"] in _BAD]
    where = f"{board.dataset[0]} with {board.model[0]}"
    told = "; ".join(_figures(record) for record in own)
    yield _of(
        "smoke run",
        bad,
        f"{where}: {told}",
        "The referee says what went wrong; run the generated test, or the method in a notebook.",
    )
    if bad:
        return
    yield from _spent(submission, own, seconds, memory)
    yield from _tried(submission, method, plan, store, device, seconds)


_BAD = ("failed", "timeout", "not_applicable")


def _is_own(record: dict[str, Any], submission: Submission) -> bool:
    if submission.kind == "attack":
        return bool(record["attack"]["name"] == submission.name)
    return submission.role != "repair" or bool(record["defense"]["name"] == submission.name)


def _without_nulls(plan: Plan, spec: str) -> Plan:
    kept = tuple(
        cell
        for cell in plan.cells
        if cell.defense.method_name == "none" or spec_of(cell.defense) == spec
    )
    return dataclasses.replace(plan, cells=kept)


def _figures(record: dict[str, Any]) -> str:
    shown = [
        f"{name} {100 * value:.1f} %"
        for name in ("acc", "asr")
        if (value := record["metrics"].get(name)) is not None
    ]
    return f"{record['attack']['short']}: {', '.join(shown)}"


def _spent(
    submission: Submission, records: list[dict[str, Any]], seconds: float, memory: float
) -> Iterator[Check]:
    name = "victim_budget" if submission.kind == "attack" else "budget"
    budgets = [record[name] for record in records if name in record]
    if not budgets or submission.role in ("scan", "detect"):
        return
    took = max(budget["seconds"] for budget in budgets)
    used = max((budget["peak_memory_mb"] or 0.0) / 1000 for budget in budgets)
    problems = [f"{took:.1f} seconds"] if took > seconds else []
    problems += [f"{used:.1f} GB"] if used > memory else []
    yield _of(
        "time and memory",
        problems,
        f"{took:.1f} of {seconds:g} seconds, {used:.1f} of {memory:g} GB",
        "Let fields shorten it under the recipe smoke: param(…, under={'smoke': 1}).",
    )


def _tried(
    submission: Submission, method: Any, plan: Plan, store: Store, device: str, seconds: float
) -> Iterator[Check]:
    victim = next(cell.victim for cell in plan.cells if cell.victim.twin is not None)
    artifact = store.artifact(victim.key)
    if artifact is None:
        yield Check("trial", "skipped", "there is no victim to try it on")
        return
    setting = victim.setting
    train = setting.dataset.train
    if submission.kind == "defense":
        rows = artifact.tensors("poisoned")["rows"]
        share = plan.board.clean_share
        chosen = draw_clean(train.y, share, stream(0, "clean"), exclude=rows[rows < len(train)])
        train = train.take(chosen)
    key = "trial"
    scratch = store.scratch(key)
    shutil.rmtree(scratch, ignore_errors=True)
    folder = scratch / "job"  # all that the method may write to
    folder.mkdir(parents=True)
    save_tensors(scratch / "clean.safetensors", {"x": train.x, "y": train.y})
    shutil.copyfile(artifact.path("weights"), scratch / "victim.safetensors")
    job = {
        "job": "trial",
        "folder": str(folder),
        "device": device,
        "threads": 1,
        "seed": 0,
        "model": setting.model,
        "classes": setting.dataset.num_classes,
        "shape": list(setting.dataset.shape),
        "method_files": method_files(method),
        "registered": files_of(method),
        "power": POWER[submission.role],
        "spec": spec_of(method),
        "ranges": ranges_of(submission.name, submission.described.fields),
        "weights": str(scratch / "victim.safetensors"),
        "clean": str(scratch / "clean.safetensors"),
    }
    try:
        found = isolate.run(
            job, logfile=scratch / "trial.log", timeout=4 * seconds, hidden=(store.root,)
        )
    except (isolate.Failed, isolate.Refused) as error:
        yield Check("trial", "failed", str(error), "The method ended its worker; see what it does.")
        return
    finally:
        store.clear_scratch(key)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for each in found["checks"]:
        by_name.setdefault(each["name"], []).append(each)
    for name, members in by_name.items():
        bad = [each["seen"] for each in members if not each["passed"]]
        fine = members[0]["seen"] if len(members) == 1 else f"{len(members)} values as they should"
        yield _of(_TITLES.get(name, name), bad[:3], fine, MENDS[name])


_TITLES = {"call": "results", "range": "configuration ranges", "build": "class"}
