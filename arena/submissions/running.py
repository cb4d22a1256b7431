"""A submission on a board's fixed matrix, ending in a result card."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from arena import data as datasets
from arena import detecting
from arena.boards import Board, board_from, folder_of, read_board
from arena.core.registry import (
    BadInput,
    attacks,
    code_hash,
    defenses,
    nearest,
    short_spec,
    spec_of,
)
from arena.identity import describe_defense, method_identity
from arena.planning import Cell, Plan, Victim, make_plan
from arena.provenance import provenance
from arena.referee.sandbox import Limits
from arena.runner import Runner
from arena.store import Store, digest
from arena.subjects import Subject, ask, of_cell
from arena.submissions import cards, held_back
from arena.submissions.cards import Card
from arena.submissions.sources import Submission

SECONDS = 3600.0  # that one method may take where the board does not say
MEMORY = 16.0  # GB, likewise
DETECTED = 100  # inputs per victim on which a detector is judged, half of them stamped
_KEPT = (
    "key", "dataset", "model", "recipe", "attack", "defense", "clean_share", "seed", "status",
    "reason", "metrics", "counts", "intervals", "flags", "probes", "mmd", "measures", "weights",
    "budget", "victim_budget", "clean_rows", "poisoned_rows", "parents", "victim_made", "hardware",
    "versions", "commit", "started", "finished", "isolation",
)  # fmt: skip

Listener = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Order:
    """What is to be run, and what the card shall say."""

    submission: Submission
    board: Board
    device: str = "cpu"
    workers: int = 1
    author: str = ""
    claims: tuple[Mapping[str, Any], ...] = ()
    secret: bytes | None = None
    against: tuple[Submission, ...] = ()  # defenses on the board, which an attack has to face
    data_dir: Path | None = None
    command: str = ""
    require_sandbox: bool = False
    listener: Listener | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.author) > 200 or not (self.author == "" or self.author.isprintable()):
            raise BadInput("--author is one line of at most 200 letters.")


def find_board(text: str, boards: Path) -> Board:
    """The board of a board.toml, or of the folder of that name under `boards`. Raises BadInput."""
    path = Path(text)
    if path.suffix == ".toml" or path.is_file():
        return read_board(path)
    if (path / "board.toml").is_file():
        return read_board(path / "board.toml")
    return read_board(folder_of(text, boards) / "board.toml")


# ------------------------------------------------------------------------------------- the matrix


def matrix(order: Order) -> Board:
    """The board as it is run: the submission in the place of its attacks or of its defenses."""
    board, submission = order.board, order.submission
    name = f"{board.name[:30]}-{submission.name[:30]}".rstrip("-_")
    board = replace(
        board,
        name=name,
        published=(),
        timeout=board.timeout or SECONDS,
        memory=board.memory or MEMORY,
    )
    if submission.role == "attack":
        entered = (each.spec for each in order.against)
        against = tuple(dict.fromkeys((*board.defense, *entered)))
        made = replace(board, attack=(submission.spec,), defense=against)
    elif submission.role == "repair":
        made = replace(board, defense=(submission.spec,))
    else:
        made = replace(board, defense=("none",))
    if order.secret is None:
        return made
    sets = [datasets.load(spec, data_dir=order.data_dir) for spec in board.dataset]
    classes = min(each.num_classes for each in sets)
    # drawn under the board's own name, so that all submissions meet the same victims
    return replace(
        held_back.drawn(replace(made, name=order.board.name), order.secret, classes), name=name
    )


def plan_of(order: Order) -> Plan:
    """All cells of the submission's matrix. Raises BadInput."""
    plan = make_plan(matrix(order), order.data_dir)
    if order.submission.role in ("scan", "detect"):  # their models are the undefended ones
        kept = tuple(c for c in plan.cells if c.defense.method_name == "none")
        return dataclasses.replace(plan, cells=kept)
    return plan


def runner_of(order: Order, plan: Plan, store: Store) -> Runner:
    """The one place where a submission's runner, with its limits, is made."""
    return Runner(
        plan,
        store,
        order.device,
        order.workers,
        order.listener,
        command=order.command,
        limits=_limits(plan.board),
        require_sandbox=order.require_sandbox,
    )


def _limits(board: Board) -> Limits:
    memory = int((board.memory or MEMORY) * 1e9)
    return Limits(seconds=board.timeout or SECONDS, memory=memory)


# ---------------------------------------------------------------------------------------- the run


def run(order: Order, store: Store, key: Path | None = None) -> Card:
    """Run the submission's matrix in `store` and return its sealed card.

    Cells that fail are on the card with their reasons. Raises BadInput where nothing can be run.
    """
    plan, started = plan_of(order), _now()
    runner = runner_of(order, plan, store)
    runner.run()
    if order.submission.role in ("scan", "detect"):
        cells = [examined(order, plan, store, cell) for cell in plan.cells if is_asked(order, cell)]
    else:
        found = (store.record(cell.key) for cell in plan.cells)
        cells = [cell_of(record) for record in found if record is not None]
    return made(order, plan, cells, started, key)


def is_asked(order: Order, cell: Cell) -> bool:
    """Whether the cell is one of the card: a detector has nothing to find in a clean twin."""
    return order.submission.role != "detect" or cell.victim.twin is not None


def cell_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a card keeps of a record."""
    kept = {name: record[name] for name in _KEPT if name in record}
    if "details" in record:
        kept["details"] = record["details"][-2000:]
    return kept


def made(
    order: Order,
    plan: Plan,
    cells: Sequence[Mapping[str, Any]],
    started: str,
    key: Path | None,
) -> Card:
    """The sealed card of these cells."""
    submission, board = order.submission, order.board
    if order.secret is not None:
        cells = _published(order, plan, cells)
    built = _built(submission, board)
    short = short_spec(built)
    summary = cards.summary_of(cells)
    provided = provenance(runner_device(order.device), torch.get_num_threads())
    definition = board.definition()
    body = {
        "card_version": cards.VERSION,
        "board": {
            "name": board.name,
            "version": board.version,
            "definition": definition,
            "hash": digest(definition),
            "held_back": order.secret is not None,
        },
        "method": {
            **_told(submission),
            "kind": submission.kind,
            "short": short,
            **_identity(built),
            "file": f"{submission.name}.py",
        },
        "author": order.author,
        "claims": cards.claims_with_measured(
            filled(order.claims, submission, board, short), summary, short
        ),
        "budget": {
            "clean_share": board.clean_share,
            "seconds": plan.board.timeout,
            "memory_gb": plan.board.memory,
        },
        "isolation": _weakest(cells),
        "scoring": code_hash("arena.core.metrics", "arena.core.checks"),
        "against": [_told(each) for each in order.against],
        **provided,
        "seeds": list(board.seed),
        "cells": list(cells),
        "summary": summary,
        "command": "" if order.secret is not None else order.command,
        "started": started,
        "finished": _now(),
    }
    return cards.sealed(body, key)


def _told(submission: Submission) -> dict[str, Any]:
    """What a card keeps of where a method came from."""
    return {
        "name": submission.name,
        "role": submission.role,
        "asked": submission.spec,
        "package": submission.package,
        "sha256": submission.sha256,
        "source": submission.source,
    }


def _built(submission: Submission, board: Board) -> Any:
    registry = attacks if submission.kind == "attack" else defenses
    return registry.build(submission.spec, board.recipe)


def _identity(built: Any) -> dict[str, Any]:
    found = method_identity(built)
    found.pop("file", None)  # the card's `sha256`
    return found


def runner_device(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def _weakest(cells: Sequence[Mapping[str, Any]]) -> str:
    levels = {str(cell.get("isolation", "limits")) for cell in cells}
    return "limits" if "limits" in levels else sorted(levels)[0]


def _published(
    order: Order, plan: Plan, cells: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Cells without what was drawn."""
    assert order.secret is not None
    shown, places = shown_of(order, plan), seeds_of(order, plan)
    return held_back.told_apart(cells, order.secret, shown, places)


def shown_of(order: Order, plan: Plan) -> dict[str, tuple[str, str]]:
    """Full spec of an attack of the plan -> the short and the full spec that a card gives it."""
    public = matrix(replace(order, secret=None))
    pairs = zip(plan.board.attacks(), public.attacks(), strict=True)
    return {spec_of(ran): (short_spec(told), spec_of(told)) for ran, told in pairs}


def seeds_of(order: Order, plan: Plan) -> dict[int, int]:
    """Seed of the plan -> the seed that a card gives it."""
    return dict(zip(plan.board.seed, order.board.seed, strict=True))


# ------------------------------------------------------------------------- scanners and detectors


def examined(order: Order, plan: Plan, store: Store, cell: Cell) -> dict[str, Any]:
    """A scanner's or detector's cell: what it said of one undefended model."""
    submission, board = order.submission, plan.board
    method, started = _built(submission, board), _now()
    victim = cell.victim
    head = store.record(cell.key) or {}
    kept: dict[str, Any] = {
        **{k: v for k, v in cell_of(head).items() if k not in ("defense", "flags", "intervals")},
        "key": digest(["examined", cell.key, _identity(method)]),
        "model_cell": cell.key,
        "defense": describe_defense(method),
        "backdoored": victim.twin is not None,
        "metrics": {},
        "started": started,
    }
    kept.pop("counts", None)
    if head.get("status") in ("failed", "timeout", "not_applicable"):
        return kept | {"finished": _now()}
    kept |= {"status": head.get("status", "failed"), "reason": head.get("reason", "")}
    metrics = {f"{name}_before": head.get("metrics", {}).get(name) for name in ("acc", "asr")}
    try:
        subject = of_cell(store, cell.key, order.data_dir)
        if submission.role == "scan":
            found = _scanned(order, store, subject, method, board)
        else:
            found = _detected(order, store, cell, method, board)
        kept |= found | {"metrics": {**metrics, **found["metrics"]}}
    except BadInput as error:
        kept |= {"status": "failed", "reason": str(error), "metrics": metrics}
    return kept | {"finished": _now()}


def _scanned(
    order: Order, store: Store, subject: Subject, method: Any, board: Board
) -> dict[str, Any]:
    question = {"spec": spec_of(method)}
    answer, _ = ask(
        subject,
        "scan",
        question,
        store,
        clean_share=board.clean_share,
        device=order.device,
        limits=_limits(board),
    )
    return {
        "metrics": {"score": answer["score"]},
        "target": answer["target"],
        "budget": answer["budget"],
    }


def _detected(order: Order, store: Store, cell: Cell, method: Any, board: Board) -> dict[str, Any]:
    inputs = detecting.inputs_of(store, cell.key, order.data_dir)
    size = min(DETECTED, 2 * min(len(inputs.stamped), len(inputs.clean)))
    question = detecting.Question((), sizes=(max(4, size),), ratios=(1.0,), draws=1)
    sets, truth = detecting.mixed(inputs, question, 0)
    spec = spec_of(method)
    _, scores = ask(
        inputs.subject,
        "detect",
        {"specs": [spec], "seed": cell.victim.seed},
        store,
        clean_share=board.clean_share,
        device=order.device,
        sets=sets,
        limits=_limits(board),
    )
    areas = [auroc(scores[f"0.{name}"].tolist(), truth[name].tolist()) for name in sets]
    return {"metrics": {"auroc": sum(areas) / len(areas)}, "inputs": size}


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """The share of (positive, negative) pairs that the scores put in order; ties count half."""
    ups = [score for score, up in zip(scores, positive, strict=True) if up]
    downs = [score for score, up in zip(scores, positive, strict=True) if not up]
    won = sum((up > down) + (up == down) / 2 for up in ups for down in downs)
    return won / (len(ups) * len(downs))


# ----------------------------------------------------------------------------------------- claims


def read_claims(text: str) -> tuple[dict[str, Any], ...]:
    """Claims from a TOML file ([[claim]] with attack, defense, acc, asr in percent, source), or one
    as `attack=patch,asr=3.2,source=paper`. Raises BadInput."""
    if text.endswith(".toml"):
        try:
            raw = tomllib.loads(Path(text).read_text(encoding="utf-8"))
        except OSError as error:
            raise BadInput(f"The claims {text!r} cannot be read ({error.strerror}).") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadInput(f"The claims {text!r} are no TOML: {error}.") from error
        given = raw.get("claim")
        if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
            raise BadInput(f"{text}: claims are written as tables, [[claim]].")
    else:
        pairs = [part.partition("=") for part in re.split(r",(?=\w+=)", text)]
        if not all(equals for _, equals, _ in pairs):
            raise BadInput(
                f"{text!r} is no claim; write attack=patch,asr=3.2 or name a .toml file."
            )
        given = [{name.strip(): value.strip() for name, _, value in pairs}]
    return tuple(_claim(each) for each in given)


def _claim(given: Mapping[str, Any]) -> dict[str, Any]:
    known = ("attack", "defense", "acc", "asr", "source")
    for name in given:
        if name not in known:
            raise BadInput(f"A claim has no key {name!r}; {nearest(name, known)}.")
    found: dict[str, Any] = {"source": str(given.get("source", ""))}
    for name in ("attack", "defense"):
        found[name] = str(given[name]) if name in given else None
    for name in ("acc", "asr"):
        try:
            found[name] = float(given[name]) if name in given else None
        except (TypeError, ValueError) as error:
            raise BadInput(f"A claim's {name} is a percentage, got {given[name]!r}.") from error
        if found[name] is not None and not 0 <= found[name] <= 100:
            raise BadInput(f"A claim's {name} is a percentage, got {given[name]}.")
    if found["acc"] is None and found["asr"] is None:
        raise BadInput("A claim says acc or asr, in percent.")
    return found


def filled(
    claims: Sequence[Mapping[str, Any]], submission: Submission, board: Board, short: str
) -> list[dict[str, Any]]:
    """Claims under the short specs that cells have. Raises BadInput on attacks that are not the
    board's."""
    known = {text: short_spec(attacks.build(text, board.recipe)) for text in board.attack}
    found = []
    for claim in claims:
        if submission.role == "attack":
            found.append({**claim, "attack": short, "defense": claim["defense"] or "none"})
            continue
        named = claim["attack"] or next(iter(known))
        if named not in known and named not in known.values():
            raise BadInput(
                f"The board {board.name!r} has no attack {named!r}; {nearest(named, known)}."
            )
        found.append({**claim, "attack": known.get(named, named), "defense": short})
    return found


# --------------------------------------------------------------------------------- from a card


def board_of(card: Card) -> Board:
    """The board that a card tells of. Raises BadInput."""
    told = {k: v for k, v in card["board"]["definition"].items() if v is not None}
    try:
        if (held := told.get("held_back")) is not None:
            choices: dict[str, dict[str, Any]] = {}
            for attack, name, values in held.get("choices", ()):
                choices.setdefault(attack, {})[name] = list(values)
            told["held_back"] = {**held, "choices": choices}
        return board_from({**told, "name": card["board"]["name"]}, "the card's board")
    except (AttributeError, LookupError, TypeError) as error:
        raise BadInput(f"The card's board is no board: {error}.") from error


def victims_of(cells: Sequence[Cell]) -> tuple[Victim, ...]:
    """Their victims and the clean twins of these, twins first."""
    found: dict[str, Victim] = {}
    for cell in cells:
        for victim in (cell.victim.twin, cell.victim):
            if victim is not None:
                found[victim.key] = victim
    return tuple(sorted(found.values(), key=lambda v: (v.seed, v.twin is not None)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
