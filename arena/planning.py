"""From a board to what must be run: victims and cells with their keys, and how long they take."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from arena import data as datasets
from arena.boards import Board
from arena.core import models, training
from arena.core.recipes import recipe_for
from arena.core.registry import BadInput, code_hash, short_spec, spec_of
from arena.core.seeding import stream
from arena.core.whole import share_refusal
from arena.data import Dataset
from arena.identity import method_identity
from arena.measuring import Asked
from arena.referee import returned
from arena.store import Store, digest

PROTOCOL = 2  # of training and scoring inside arena.referee.worker; raised when results change


@dataclass(frozen=True, eq=False)
class Setting:
    """What the victims of one board share."""

    dataset: Dataset
    model: str
    recipe: str
    plan: training.Recipe
    flops: float  # of one image's forward pass
    shapes: returned.Shapes  # of its weights

    @property
    def weights_bytes(self) -> int:
        return sum(math.prod(shape) * kind.itemsize for shape, kind in self.shapes.values())

    def describe(self) -> dict[str, Any]:
        return {
            "data": self.dataset.fingerprint,
            "model": self.model,
            "recipe": dataclasses.asdict(self.plan),
            "network": code_hash("arena.core.victims", models.info(self.model).build.__module__),
            "protocol": PROTOCOL,
        }


@dataclass(frozen=True, eq=False)
class Victim:
    """A model to be trained: backdoored, or the clean twin (attack `none`)."""

    key: str
    setting: Setting
    attack: Any
    seed: int
    twin: Victim | None  # None: it is the twin itself
    refusal: str = ""  # why the attack cannot apply to this data set

    @property
    def name(self) -> str:
        return f"{self.label} on {self.setting.dataset.name.partition(':')[0]}, seed {self.seed}"

    @property
    def label(self) -> str:
        return "clean twin" if self.twin is None else short_spec(self.attack)


@dataclass(frozen=True, eq=False)
class Cell:
    """One row: a victim and the defense that repairs it."""

    key: str
    victim: Victim
    defense: Any
    twin_cell: Cell | None  # the same defense on the clean twin

    @property
    def name(self) -> str:
        return f"{short_spec(self.defense)} against {self.victim.name}"


@dataclass(frozen=True)
class Plan:
    board: Board
    victims: tuple[Victim, ...]  # by seed, twins first
    cells: tuple[Cell, ...]  # by seed, those of the twins first
    measures: tuple[Asked, ...] = ()


def make_plan(board: Board, data_dir: Path | str | None = None) -> Plan:
    """All victims and cells of a board. Loads the data sets. Raises BadInput."""
    attacks, defenses = board.attacks(), board.defenses()
    measures = tuple(Asked(measure, method_identity(measure)) for measure in board.measures())
    known_models = [models.info(name) for name in board.model]  # unknown names before any data
    assert known_models
    sets = [datasets.load(spec, data_dir=data_dir) for spec in board.dataset]
    for asked in measures:
        for dataset in sets:
            for seed in board.seed:
                asked.method.check(dataset.val, dataset.test, dataset.num_classes, seed)
    victims: list[Victim] = []
    cells: list[Cell] = []
    refusals: dict[str, list[str]] = {}
    for dataset in sets:
        for model in board.model:
            setting = make_setting(dataset, model, board.recipe)
            for seed in board.seed:
                twin: Victim | None = None
                twin_cells: dict[Any, Cell] = {}
                for attack in attacks:
                    victim = make_victim(setting, attack, seed, twin)
                    refusals.setdefault(spec_of(attack), []).append(victim.refusal)
                    victims.append(victim)
                    for defense in defenses:
                        cell = make_cell(victim, defense, board, twin_cells.get(defense))
                        cells.append(cell)
                        if twin is None:
                            twin_cells[defense] = cell
                    twin = twin or victim
    for reasons in refusals.values():
        if all(reasons):
            raise BadInput(reasons[0])
    too_few = [
        share_refusal(defense, board.clean_share)
        for defense in defenses
        if not getattr(defense, "null", False)
    ]
    if too_few and all(too_few):
        raise BadInput(too_few[0])
    # seed by seed, so that a run cut short leaves whole tables; twins first, others wait for them
    return Plan(
        board,
        tuple(sorted(victims, key=lambda victim: (victim.seed, victim.twin is not None))),
        tuple(sorted(cells, key=lambda c: (c.victim.seed, c.twin_cell is not None))),
        measures,
    )


def make_setting(dataset: Dataset, model: str, recipe: str) -> Setting:
    network = models.build(model, dataset.num_classes, dataset.shape, stream(0, "shell"))
    return Setting(
        dataset=dataset,
        model=model,
        recipe=recipe,
        plan=recipe_for(recipe, model),
        flops=_flops(network, dataset.shape),
        shapes=returned.shapes(network.state_dict()),
    )


def make_victim(setting: Setting, attack: Any, seed: int, twin: Victim | None) -> Victim:
    refusal = ""
    try:
        attack.check(setting.dataset.shape, setting.dataset.counts)
    except BadInput as error:
        refusal = str(error)
    key = digest(
        {**setting.describe(), "kind": "victim", "seed": seed, "attack": method_identity(attack)}
    )
    return Victim(key, setting, attack, seed, twin, refusal)


def make_cell(victim: Victim, defense: Any, board: Board, twin_cell: Cell | None) -> Cell:
    key = digest(
        {
            "kind": "cell",
            "victim": victim.key,
            "defense": method_identity(defense),
            "clean_share": board.clean_share,
            "scoring": code_hash("arena.core.metrics", "arena.core.checks"),
            "protocol": PROTOCOL,
        }
    )
    return Cell(key, victim, defense, twin_cell)


def _flops(network: torch.nn.Module, shape: tuple[int, int, int]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, *shape))
    return float(counter.get_total_flops())


# ------------------------------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Estimate:
    seconds: float
    disk_bytes: float


@cache
def device_rate(device: str) -> float:
    """FLOP/s that training may reach there: half of a measured matrix product."""
    where = torch.device(device)
    size = 4096 if where.type == "cuda" else 1024
    kind = torch.bfloat16 if training.has_bf16(where) else torch.float32
    a = torch.ones(size, size, device=where, dtype=kind)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 2


def estimate(task: Victim | Cell, board: Board, device: str, past: Mapping[str, float]) -> Estimate:
    """Seconds and bytes that a task will take: as before where it was seen, else by FLOPs."""
    victim = task.victim if isinstance(task, Cell) else task
    setting = victim.setting
    n, test = len(setting.dataset.train), len(setting.dataset.test)
    image = setting.dataset.train.x[0].numel()
    rate = device_rate(device)
    scoring = 2 + 3 * test * setting.flops / rate
    if isinstance(task, Victim):
        steps = max(1, n // setting.plan.batch)
        epochs = max(setting.plan.epochs, -(-setting.plan.min_steps // steps))
        train = 3 * epochs * n * setting.flops / rate
        if hasattr(victim.attack, "train"):  # it has more to do in every step
            train *= 2
        name = victim.attack.method_name if hasattr(victim.attack, "train") else "victim"
        train = past.get(f"{_where(setting)}/{name}", train)
        bytes_ = setting.weights_bytes + test * image + 0.1 * n * image
        return Estimate(train + scoring, bytes_)
    work = 3 * 30 * board.clean_share * n * setting.flops / rate
    if task.defense.method_name in ("none", "random_prune"):
        work = 0.5
    spent = past.get(f"{_where(setting)}/{board.clean_share:g}/{spec_of(task.defense)}", work)
    return Estimate(spent + scoring, setting.weights_bytes)


def measuring_seconds(
    asked: Asked, setting: Setting, device: str, past: Mapping[str, float]
) -> float:
    """What a measure of one model will take: as before where it was seen, else by FLOPs."""
    passes = asked.method.passes(setting.dataset.num_classes)
    guess = 1 + passes * setting.flops / device_rate(device)
    return past.get(f"{_where(setting)}/measure/{asked.spec}", guess)


def _where(setting: Setting) -> str:
    return f"{setting.dataset.fingerprint}/{setting.model}/{setting.recipe}"


def past_seconds(store: Store) -> dict[str, float]:
    """How long victims, defenses and measures took in this store, by data, model and recipe, and
    defenses by their share of clean images."""
    found: dict[str, float] = {}
    for record in store.records():
        with suppress(KeyError, TypeError):
            where = f"{record['dataset']['fingerprint']}/{record['model']}/{record['recipe']}"
            attack = record["attack"]
            controls = attack["threat"] == "controls training"
            trained = f"{where}/{attack['name'] if controls else 'victim'}"
            found[trained] = float(record["victim_budget"]["seconds"])
            repair = f"{record['clean_share']:g}/{record['defense']['spec']}"
            found[f"{where}/{repair}"] = float(record["budget"]["seconds"])
            for spec, measured in record.get("measures", {}).items():
                if measured["status"] == "ok" and not measured["after"]["resumed"]:
                    found[f"{where}/measure/{spec}"] = float(measured["after"]["seconds"])
    return found
