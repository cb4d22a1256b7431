"""A card checked: is it whole, do its figures follow from its weights, do cells come out again?

Metrics are computed again from the weights of a store, where it has those that the card names, and
must be equal. A sample of cells is run again in a fresh store: equal figures are asked for where
hardware, threads and versions are the same (on a CPU the same seed gives the same weights), else
figures within the spread of the card's seeds and of counting test images.
"""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from arena.core.registry import BadInput, spec_of
from arena.planning import Cell, Plan
from arena.provenance import provenance
from arena.referee.isolate import Failed
from arena.store import Store
from arena.submissions import cards, held_back, running, sources
from arena.submissions.cards import Altered, Card
from arena.submissions.running import Order
from arena.submissions.sources import Submission

VERSION = 1
COMPARED = ("acc", "asr", "ra", "acc_before", "asr_before")
EXAMINED = ("score", "auroc")
SPREADS = 3.0  # standard deviations that a figure may lie away
SCORE_SHARE = 0.25  # of a score, where it is compared and no seeds tell of its spread
UNKNOWN_SPREAD = 0.02  # of a share, where one seed tells nothing of its spread


@dataclass(frozen=True)
class Ask:
    """How a card is to be verified."""

    store: Path | None = None  # where its weights may lie
    sample: int | None = None  # cells to be run again; None: 2, or none where all weights are there
    every: bool = False
    seed: int = 0  # of the sample
    device: str = "cpu"
    secret: bytes | None = None
    data_dir: Path | None = None
    key: Path | None = None
    by: str = ""
    require_sandbox: bool = False
    listener: Callable[[dict[str, Any]], None] | None = None


def verify(card: Card, ask: Ask) -> dict[str, Any]:
    """The sealed verification of a card that is whole (`cards.read_card`).

    Raises BadInput where it cannot be run here, Altered where its source is not its method's.
    """
    with tempfile.TemporaryDirectory(prefix="arena-verify-") as name:
        folder = Path(name)
        order, plan = planned(card, ask, folder)
        matched = match(card, order, plan, ask)
        found = _recomputed(card, order, plan, matched, ask)
        chosen = _chosen(card, matched, found, ask)
        if chosen:
            found += _rerun(card, order, plan, chosen, folder, ask)
    judged = [figure for cell in found for figure in cell["figures"].values()]
    how = {kind: sum(cell["how"] == kind for cell in found) for kind in ("weights", "rerun")}
    body = {
        "verification_version": VERSION,
        "card": card["hash"],
        "by": ask.by,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "sample_seed": ask.seed,
        "cells_of_card": len(card["cells"]),
        "how": {kind: count for kind, count in how.items() if count},
        "cells": found,
        "holds": bool(judged) and all(figure["holds"] for figure in judged),
    }
    return cards.sealed(body, ask.key)


def planned(card: Card, ask: Ask, folder: Path) -> tuple[Order, Plan]:
    """The card's matrix, from its own source and board. Raises BadInput, Altered."""
    board = running.board_of(card)
    if card["board"]["held_back"] and ask.secret is None:
        raise BadInput(
            f"This card comes from what the board {board.name!r} holds back; its maintainer "
            "verifies it with --secret."
        )
    against = tuple(_known(told, folder) for told in card["against"])
    submission = _known(card["method"], folder)
    order = Order(
        submission,
        board,
        device=ask.device,
        secret=ask.secret if card["board"]["held_back"] else None,
        against=against,
        data_dir=ask.data_dir,
        command="arena submit verify",
        require_sandbox=ask.require_sandbox,
        listener=ask.listener,
    )
    return order, running.plan_of(order)


def _known(told: Mapping[str, Any], folder: Path) -> Submission:
    if told.get("package"):
        found = sources.find(told["asked"], folder, told["role"])
        if found.sha256 != told["sha256"]:
            raise Altered(f"The installed {found.name} has another source than this card.")
        return found
    return sources.of_source(
        told["name"], told["source"].encode(), folder / "methods", told["asked"], told["role"]
    )


Matched = list[tuple[dict[str, Any], Cell]]


def match(card: Card, order: Order, plan: Plan, ask: Ask) -> Matched:
    """Each cell of the card with that of the plan. Raises Altered where a cell is of no matrix of
    this board, or one of the matrix is missing on the card."""
    cells = {cell.key: cell for cell in plan.cells if running.is_asked(order, cell)}
    public = _public_names(order, plan)
    found: Matched = []
    for told in card["cells"]:
        name = (
            told["dataset"]["name"],
            told["model"],
            told["attack"]["spec"],
            told["defense"]["spec"] if order.submission.role in ("attack", "repair") else "",
            told["seed"],
        )
        place = public.get(name)
        if place is None or place not in cells:
            raise Altered(
                f"The card has a cell that its board does not: {told['attack']['short']}, "
                f"{told['defense']['short']}, seed {told['seed']}."
            )
        found.append((told, cells.pop(place)))
    if cells:
        raise Altered(
            f"The card lacks {len(cells)} cells of its board, {next(iter(cells.values())).name} "
            "among them."
        )
    return found


def _public_names(order: Order, plan: Plan) -> dict[tuple[Any, ...], str]:
    """How a card names a cell -> the cell's key."""
    shown, seeds = running.shown_of(order, plan), running.seeds_of(order, plan)
    both = order.submission.role in ("attack", "repair")
    return {
        (
            cell.victim.setting.dataset.name,
            cell.victim.setting.model,
            shown[spec_of(cell.victim.attack)][1],
            spec_of(cell.defense) if both else "",
            seeds[cell.victim.seed],
        ): cell.key
        for cell in plan.cells
    }


# ------------------------------------------------------------------------------ from stored weights


def _recomputed(
    card: Card, order: Order, plan: Plan, matched: Matched, ask: Ask
) -> list[dict[str, Any]]:
    """Cells whose weights the store has, measured again."""
    if ask.store is None or order.submission.role in ("scan", "detect"):
        return []
    store = Store(ask.store)
    runner = running.runner_of(order, plan, store)
    found = []
    for told, cell in matched:
        if "weights" not in told:
            continue
        try:
            again = runner.scored_again(cell, ask.device)
        except Failed as error:
            raise BadInput(f"{cell.name} cannot be measured again: {error.reason}") from error
        except (LookupError, TypeError, ValueError, OSError) as error:  # a store of strangers
            raise BadInput(f"{cell.name} cannot be measured again: {error}.") from error
        if again is None:
            continue
        if again["weights"] != told["weights"]:
            figures = {"weights": {"card": told["weights"]["after"], "found": "others",
                                   "within": 0.0, "holds": False}}  # fmt: skip
        else:
            exact = _same_machine(told, order, plan)
            figures = _figures(card, told, again["metrics"], 0.0 if exact else None, COMPARED)
        found.append(_line(told, "weights", figures))
    return found


# ------------------------------------------------------------------------------------ run again


def _chosen(card: Card, matched: Matched, found: Sequence[Mapping[str, Any]], ask: Ask) -> Matched:
    """The cells to be run again: of the submission, drawn by the seed."""
    method = card["method"]["name"]
    own = [
        (told, cell)
        for told, cell in matched
        if method in (told["attack"]["name"], told["defense"]["name"])
        and told["status"] in cards.FINAL
    ]
    if ask.every:
        return own
    # without being asked, a card whose weights are all there needs no cell to be run again
    number = ask.sample if ask.sample is not None else (0 if len(found) == len(matched) else 2)
    return random.Random(ask.seed).sample(own, min(number, len(own)))


def _rerun(
    card: Card, order: Order, plan: Plan, chosen: Matched, folder: Path, ask: Ask
) -> list[dict[str, Any]]:
    cells = [cell for _, cell in chosen]
    wanted = {c.key: c for cell in cells for c in (cell.twin_cell, cell) if c is not None}
    part = dataclasses.replace(
        plan,
        cells=tuple(
            sorted(wanted.values(), key=lambda c: (c.victim.seed, c.twin_cell is not None))
        ),
        victims=running.victims_of(cells),
        measures=(),
    )
    store = Store(folder / "store")
    runner = running.runner_of(order, part, store)
    runner.run()
    examined = order.submission.role in ("scan", "detect")
    found = []
    for told, cell in chosen:
        if examined:
            again = running.examined(order, plan, store, cell)
        else:
            again = store.record(cell.key) or {"status": "failed", "metrics": {}}
        exact = _same_machine(told, order, plan)
        names = EXAMINED if examined else COMPARED
        figures = _figures(card, told, again["metrics"], 0.0 if exact else None, names)
        same = again["status"] == told["status"]
        # statuses are thresholds: where figures may differ, so may they
        figures["status"] = {
            "card": told["status"],
            "found": again["status"],
            "within": None,
            "holds": same or (not exact and again["status"] in cards.FINAL),
        }
        found.append(_line(told, "rerun", figures))
    return found


def _line(told: Mapping[str, Any], how: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": told["key"],
        "attack": told["attack"]["short"],
        "defense": told["defense"]["short"],
        "seed": told["seed"],
        "how": how,
        "figures": dict(figures),
    }


def _same_machine(told: Mapping[str, Any], order: Order, plan: Plan) -> bool:
    """Whether determinism is promised: a CPU, the same one, the same threads and torch."""
    here = provenance(running.runner_device(order.device), torch.get_num_threads())
    there = told.get("hardware") or {}
    names = ("device", "kind", "bf16", "threads")
    alike = all(there.get(name) == here["hardware"].get(name) for name in names)
    torch_there = (told.get("versions") or {}).get("torch")
    return alike and here["hardware"]["kind"] == "cpu" and torch_there == here["versions"]["torch"]


def _figures(
    card: Card,
    told: Mapping[str, Any],
    found: Mapping[str, Any],
    within: float | None,
    names: Sequence[str],
) -> dict[str, Any]:
    """Each figure of the card beside what was found; within: None: as far as seeds spread."""
    result = {}
    for name in names:
        one, two = told["metrics"].get(name), found.get(name)
        if one is None and two is None:
            continue
        allowed = _allowed(card, told, name) if within is None else within
        holds = one is not None and two is not None and abs(one - two) <= allowed + 1e-12
        result[name] = {"card": one, "found": two, "within": allowed, "holds": holds}
    return result


def _allowed(card: Card, told: Mapping[str, Any], name: str) -> float:
    """How far a figure may lie away when it was computed elsewhere."""
    value = told["metrics"].get(name)
    group = next(
        (g for g in card["summary"] if cards.group_of(told) == _group(g)),
        None,
    )
    spread = ((group or {"figures": {}})["figures"].get(name) or {}).get("sd")
    if name == "score":
        return SPREADS * spread if spread else SCORE_SHARE * abs(value or 0.0)
    counts = told.get("counts") or {}
    n = counts.get("triggered" if name.startswith(("asr", "ra")) else "test") or 100
    share = min(max(value or 0.0, 0.0), 1.0)
    counting = math.sqrt(2 * max(share * (1 - share), 1 / n) / n)
    known = UNKNOWN_SPREAD if spread is None else spread
    return SPREADS * math.sqrt(known**2 + counting**2)


def _group(group: Mapping[str, Any]) -> tuple[str, str, str, str]:
    return (group["dataset"], group["model"], group["attack"], group["defense"])


def read_secret(path: Path | None, card: Card) -> bytes | None:
    """The secret for a card's board. Raises BadInput."""
    return None if path is None else held_back.read_secret(path, running.board_of(card))
