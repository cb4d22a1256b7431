"""Distances between a model's classes, and triggers of it, as users ask for them: kept and resumed.

An answer is an artifact of the store, keyed by the weights, the images, the family with its code,
and the search; asked for again it is read, stopped on the way it goes on.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from arena.core.inversion import distances as measures
from arena.core.inversion.engine import Family, Found, Problem, Search, invert
from arena.core.inversion.families import families
from arena.core.inversion.frozen import Frozen
from arena.core.registry import BadInput, code_hash, short_spec, spec_of
from arena.referee.keeping import FileCheckpoint
from arena.store import Store, digest
from arena.subjects import Subject


@dataclass(frozen=True)
class Question:
    """How triggers are asked for."""

    method: str = "nc"  # spec of a trigger family
    restarts: int = 3  # searches per problem, of which the smallest counts
    samples: int = 100  # validation images per problem
    steps: int | None = None  # passes over them; None: the family's
    asr: float | None = None  # success asked for; None: the family's
    seed: int = 0
    split: str = "val"  # where the images come from

    def __post_init__(self) -> None:
        for name, least in (("restarts", 1), ("samples", 1), ("steps", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise BadInput(f"--{name} must be at least {least}, got {value}.")
        if self.asr is not None and not 0 < self.asr <= 1:
            raise BadInput(f"--asr must be above 0 and at most 1, got {self.asr:g}.")
        if self.split not in ("val", "test"):
            raise BadInput(f"--split must be val or test, got {self.split!r}.")

    @property
    def family(self) -> Family:
        family: Family = families.build(self.method)
        return family

    @property
    def search(self) -> Search:
        usual = self.family.usual
        return replace(
            usual,
            samples=self.samples,
            steps=usual.steps if self.steps is None else self.steps,
            asr=usual.asr if self.asr is None else self.asr,
        )


def answers(
    subject: Subject,
    question: Question,
    problems: Sequence[Problem],
    store: Store,
    *,
    device: str = "cpu",
    memory: float | None = None,
) -> tuple[list[Found], float]:
    """The engine's answers and the seconds that they took. Raises BadInput."""
    family, search = question.family, question.search
    key = digest(
        {
            "kind": "inversion",
            "weights": subject.digest,
            "data": subject.data.fingerprint,
            "split": question.split,
            "family": spec_of(family),
            "code": code_hash(type(family).__module__),
            "search": dataclasses.asdict(search),
            "problems": [dataclasses.astuple(problem) for problem in problems],
            "seed": question.seed,
            "bf16": Frozen(subject.model).dtype == torch.bfloat16,
        }
    )
    store.create()
    with store.lock(key):
        kept = store.artifact(key)
        if kept is None:
            started = time.monotonic()
            checkpoint = FileCheckpoint(store.scratch(key) / "inversion.pt")
            found = invert(
                Frozen(subject.model.to(device)),
                family,
                problems,
                getattr(subject.data, question.split),
                search,
                seed=question.seed,
                memory=memory,
                checkpoint=checkpoint,
            )
            figures = [(one.size, one.asr, one.steps) for one in found]
            triggers = {
                f"{place}.{name}": value.contiguous()
                for place, one in enumerate(found)
                for name, value in one.trigger.items()
            }
            meta = {"kind": "inversion", "figures": figures, "method": spec_of(family)}
            seconds = time.monotonic() - started
            kept = store.save(key, {"triggers": triggers}, {**meta, "seconds": seconds})
            store.clear_scratch(key)
    tensors = kept.tensors("triggers")
    found = []
    for place, (size, asr, steps) in enumerate(kept.meta["figures"]):
        own = f"{place}."
        trigger = {k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)}
        found.append(Found(problems[place], size, asr, trigger, steps))
    return found, float(kept.meta["seconds"])


def class_distances(
    subject: Subject,
    question: Question,
    pairs: str,
    store: Store,
    *,
    baseline: Subject | None = None,
    device: str = "cpu",
    memory: float | None = None,
) -> dict[str, Any]:
    """What `arena distance` prints: JSON values, `null` where a pair has no distance.

    baseline: a model of the same data, measured alike, that the improvement is relative to.
    """
    classes = subject.data.num_classes
    chosen = measures.parse_pairs(pairs, classes, question.seed)
    problems = measures.problems_of(chosen, question.restarts)
    found, seconds = answers(subject, question, problems, store, device=device, memory=memory)
    matrix = measures.distances(found, classes)
    family = question.family
    out: dict[str, Any] = {
        "model": subject.name,
        "weights": subject.digest,
        "method": short_spec(family),
        "unit": family.unit,
        "encoder": getattr(family, "encoder", None),
        "classes": list(subject.data.classes),
        "distances": _listed(matrix.size),
        "spread": _listed(matrix.spread),
        "asr": _listed(matrix.asr),
        "mean": matrix.mean,
        "also": _also(family, matrix.mean),
        "pairs": len(chosen),
        "unreached": [list(pair) for pair in matrix.unreached],
        "restarts": question.restarts,
        "samples": question.samples,
        "split": question.split,
        "steps": question.search.steps,
        "asked_asr": question.search.asr,
        "seed": question.seed,
        "seconds": seconds,
    }
    if baseline is not None:
        if baseline.data.fingerprint != subject.data.fingerprint:
            raise BadInput(
                f"The baseline is of {baseline.data.name.partition(':')[0]}, the model of "
                f"{subject.data.name.partition(':')[0]}; distances compare on one data set."
            )
        old, more = answers(baseline, question, problems, store, device=device, memory=memory)
        before = measures.distances(old, classes)
        out["baseline"] = {"model": baseline.name, "mean": before.mean, "seconds": more}
        out["improvement"] = measures.improvement(matrix.size, before.size)
    return out


def _also(family: Family, mean: float | None) -> dict[str, Any] | None:
    if family.also is None or mean is None:
        return None
    unit, factor = family.also
    return {"unit": unit, "mean": factor * mean}


def _listed(matrix: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(v) else v for v in row] for row in matrix.tolist()]
