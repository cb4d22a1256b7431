"""Detectors asked to tell triggered inputs of a cell from clean ones, as the SDRM study asks them.

All inputs are test images to which the model gives the attack's target: triggered ones, and clean
ones of that class. A detector sees them mixed, with some clean images, and gives scores; which of
them become flags is decided as in the study, with knowledge that nobody has in practice: every
rule but `own` is an oracle's and says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arena.core import poisoning
from arena.core.detection import (
    best_threshold,
    drawn,
    flagging_everything,
    highest,
    scored,
)
from arena.core.registry import (
    BadInput,
    attacks,
    defenses,
    nearest,
    short_spec,
    spec_of,
    split_spec,
)
from arena.core.seeding import stream
from arena.store import Store
from arena.subjects import Subject, ask, of_cell

LEVELS = ("shallow", "middle", "deep")
RULES = {
    "clusters": "oracle: the better of the two labellings",
    "top_k": "oracle: as many as are stamped",
    "threshold": "oracle: the threshold of the best F1",
}


def detectors() -> list[str]:
    return [each.name for each in defenses.describe_all() if "detects" in each.powers]


def check(text: str) -> None:
    """Raise BadInput unless `text` is the spec of a detector; imports no method."""
    name, fields = split_spec(text)
    if name not in (known := detectors()):
        if name in defenses.names():
            powers = " and ".join(defenses.describe(name).powers)
            raise BadInput(f"{name} {powers} but detects nothing; detectors: {', '.join(known)}.")
        raise BadInput(f"There is no detector {name!r}; {nearest(name, known)}")
    if "level" in fields:
        raise BadInput(f"{text}: ask for a level with --level {fields['level']}.")


@dataclass(frozen=True)
class Inputs:
    """Rows of a cell's test set to which its model gives the target."""

    subject: Subject
    stamped: Tensor  # (M, C, H, W) uint8, triggered
    clean: Tensor  # (K, C, H, W) uint8, of the target class
    target: int


def inputs_of(store: Store, prefix: str, data_dir: Any = None) -> Inputs:
    """Raises BadInput on a cell without a trigger or without one target class."""
    subject, record = of_cell(store, prefix, data_dir), store.find(prefix)
    attack = attacks.build(record["attack"]["spec"])
    victim = store.artifact(record["parents"]["victim"])
    kept = store.artifact(record["key"])
    target = getattr(attack, "target", None)
    if victim is None or kept is None or target is None or not victim.path("triggered").exists():
        raise BadInput(
            f"Cell {record['key'][:12]} ({record['attack']['short']}) has no triggered images to "
            "detect; choose one with an attack, see `arena results`."
        )
    test, classes = subject.data.test, subject.data.num_classes
    answers = kept.tensors("predictions")
    counted = poisoning.applies(attack, test.y, classes)
    wanted = poisoning.wanted(attack, test.y, classes)
    if bool((wanted[counted] != target).any()):
        raise BadInput(
            f"{record['attack']['short']} has more than one target class; detectors are asked "
            "about inputs of one."
        )
    fooled = counted & (answers["triggered"] == target)
    honest = (test.y == target) & (answers["clean"] == target)
    triggered = victim.tensors("triggered")["x"]
    return Inputs(subject, triggered[fooled], test.x[honest], int(target))


@dataclass(frozen=True)
class Question:
    methods: Sequence[str]  # specs of detectors; their level is replaced by `levels`
    levels: Sequence[str] = LEVELS
    sizes: Sequence[int] = (100, 500)  # inputs, stamped and clean together
    ratios: Sequence[float] = (1.0, 0.1)  # stamped to clean
    draws: int = 3  # sets of inputs per size and ratio
    clean_share: float = 0.01  # of the training images, that detectors may use

    def __post_init__(self) -> None:
        for level in self.levels:
            if level not in LEVELS:
                raise BadInput(f"There is no feature level {level!r}; {nearest(level, LEVELS)}.")
        for size in self.sizes:
            if size < 4:
                raise BadInput(f"--n must be at least 4 inputs, got {size}.")
        for ratio in self.ratios:
            if not 0 < ratio <= 100:
                raise BadInput(f"--ratio must be above 0 and at most 100, got {ratio:g}.")
        if self.draws < 1:
            raise BadInput(f"--draws must be at least 1, got {self.draws}.")

    @property
    def cases(self) -> list[tuple[int, float]]:
        return [(size, ratio) for size in self.sizes for ratio in self.ratios]


def detect(
    inputs: Inputs, question: Question, store: Store, *, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """What `arena detect` prints, as JSON values: a row per method, level, size and ratio.

    Raises BadInput where there are too few inputs of either kind.
    """
    built = [defenses.build(text) for text in question.methods]
    specs = {
        (method, level): spec_of(dataclasses.replace(method, level=level))
        for method in built
        for level in question.levels
    }
    sets, truth = mixed(inputs, question, seed)
    _, scores = ask(
        inputs.subject,
        "detect",
        {"specs": list(specs.values()), "seed": seed},
        store,
        clean_share=question.clean_share,
        device=device,
        sets=sets,
    )
    rows = []
    for place, (method, level) in enumerate(specs):
        for size, ratio in question.cases:
            names = [_name(size, ratio, draw) for draw in range(question.draws)]
            found = [judged(method, scores[f"{place}.{name}"], truth[name]) for name in names]
            rows.append(
                {
                    "method": short_spec(method),
                    "level": level,
                    "n": size,
                    "ratio": ratio,
                    **{key: _mean([one[key] for one in found]) for key in found[0]},
                    "f1_spread": _spread([one["f1"] for one in found]),
                    "everything": flagging_everything(_true_ratio(size, ratio)),
                    "rule": RULES[method.rule],
                }
            )
    return {
        "model": inputs.subject.name,
        "weights": inputs.subject.digest,
        "target": inputs.target,
        "target_name": inputs.subject.data.classes[inputs.target],
        "stamped_images": len(inputs.stamped),
        "clean_images": len(inputs.clean),
        "draws": question.draws,
        "seed": seed,
        "rows": rows,
    }


def judged(method: Any, scores: Tensor, stamped: Tensor) -> dict[str, float]:
    """F1, precision, recall and AUROC of one set; scores, stamped: (N,)."""
    match method.rule:
        case "clusters":
            both = [scores > 0.5, scores <= 0.5]
            found = [scored(flags, flags.float(), stamped) for flags in both]
            best = max(found, key=lambda one: one.f1)
        case "top_k":
            best = scored(highest(scores, int(stamped.sum())), scores, stamped)
        case _:
            best = scored(best_threshold(scores, stamped), scores, stamped)
    return best._asdict()


def _counts(size: int, ratio: float) -> tuple[int, int]:
    stamped = min(size - 1, max(1, round(size * ratio / (1 + ratio))))
    return stamped, size - stamped


def _true_ratio(size: int, ratio: float) -> float:
    stamped, clean = _counts(size, ratio)
    return stamped / clean


def mixed(
    inputs: Inputs, question: Question, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mixed inputs by name, and which of them are stamped."""
    sets, truth = {}, {}
    for size, ratio in question.cases:
        stamped, clean = _counts(size, ratio)
        for kind, need, have in (
            ("triggered", stamped, len(inputs.stamped)),
            ("clean", clean, len(inputs.clean)),
        ):
            if have < need:
                raise BadInput(
                    f"{size} inputs at ratio {ratio:g} need {need} {kind} images with the "
                    f"answer {inputs.subject.data.classes[inputs.target]!r}, but there are "
                    f"{have}; lower --n."
                )
        for draw in range(question.draws):
            rng = stream(seed, "detect", size, ratio, draw)
            one = drawn(torch.arange(len(inputs.stamped)), stamped, rng)
            two = drawn(torch.arange(len(inputs.clean)), clean, rng)
            order = torch.randperm(size, generator=rng)
            name = _name(size, ratio, draw)
            sets[name] = torch.cat([inputs.stamped[one], inputs.clean[two]])[order].contiguous()
            truth[name] = (torch.arange(size) < stamped)[order]
    return sets, truth


def _name(size: int, ratio: float, draw: int) -> str:
    return f"{size}.{ratio:g}.{draw}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return float(torch.tensor(values, dtype=torch.float64).std())
