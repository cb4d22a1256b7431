"""A method tried out on one model: what `arena submit check` asks in a worker.

An author's own look at a method, not a referee's: the method shares the process with what looks at
it, and could lie. Nothing that is found here enters a card.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arena.core import poisoning
from arena.core.contracts import Images, Poisoned, Trigger, Verdict
from arena.core.registry import BadInput, attacks, defenses, show_value
from arena.core.seeding import stream
from arena.store import load_tensors

Build = Callable[[str], nn.Module]
BEYOND = 1.0  # how far beyond a bound a value is tried


def trial(job: Mapping[str, Any], device: torch.device, build: Build) -> dict[str, Any]:
    """`checks`: name, whether it passed, what was seen; `seconds` of one call.

    job: spec, power (poison, repair, scan or score), weights, clean (a file), ranges (as
    `ranges_of` gives them).
    """
    kind = attacks if job["power"] == "poison" else defenses
    found: list[dict[str, Any]] = []

    def told(name: str, passed: bool, seen: str) -> None:
        found.append({"name": name, "passed": passed, "seen": seen})

    try:
        method = kind.build(job["spec"])
    except Exception as error:
        told("build", False, f"{type(error).__name__}: {error}")
        return {"checks": found, "seconds": None}
    told("build", True, "the file is imported and its class built")
    for text, inside in job["ranges"]:
        try:
            kind.build(text)
            told("range", inside, f"{text} is built")
        except BadInput as error:
            told("range", not inside, f"{text}: {error}")
        except Exception as error:
            told("range", False, f"{text}: {type(error).__name__}: {error}")
    tensors = load_tensors(Path(job["clean"]))
    clean = Images(tensors["x"], tensors["y"])
    if job["power"] == "poison":
        once = _attacked(method, clean)
    else:
        once = _asked(method, lambda: build(job["weights"]).to(device), clean, job)
    seconds = _compare(once, told)
    return {"checks": found, "seconds": seconds}


Once = Callable[[int], tuple[dict[str, Tensor], list[str], list[str]]]
"""seed -> (what came out by name, what is wrong with it, what it changed of its arguments)"""


def _compare(once: Once, told: Callable[[str, bool, str], None]) -> float | None:
    """Call the method with seeds 0, 1 and 0 again, other global generators each time."""
    outcomes, changed, seconds = [], [], None
    for call, seed in enumerate((0, 0, 1, 0)):
        with _global_seeds(call):
            started = time.monotonic()
            try:
                out, wrong, touched = once(seed)
            except Exception as error:
                told("call", False, f"{type(error).__name__}: {error}")
                return seconds
            seconds = seconds or time.monotonic() - started
        if wrong:
            told("call", False, "; ".join(wrong))
            return seconds
        outcomes.append(out)
        changed += touched
    told("call", True, "its results have the shapes, types and ranges of the contract")
    told("purity", not changed, ", ".join(dict.fromkeys(changed)) or "its arguments are untouched")
    first, again, _, last = outcomes
    told("determinism", _same(first, again), _difference(first, again))
    if _same(first, again):
        told("no memory", _same(first, last), _difference(first, last))
    return seconds


def _asked(
    method: Any, fresh: Callable[[], nn.Module], clean: Images, job: Mapping[str, Any]
) -> Once:
    power = str(job["power"])

    def once(seed: int) -> tuple[dict[str, Tensor], list[str], list[str]]:
        model = fresh()  # or an impure method would meet what it left the last time
        before, images = _state(model), clean.x.clone()
        modes = [(name, m.training) for name, m in model.named_modules()]
        hooks = _hooks(model)
        rng, wrong = stream(seed, power, job["spec"]), []
        if power == "repair":
            repaired = method.repair(model, clean, rng)
            if not isinstance(repaired, nn.Module):
                return {}, [f"repair gave a {type(repaired).__name__}, not a module"], []
            out = _state(repaired)
            if {k: v.shape for k, v in out.items()} != {k: v.shape for k, v in before.items()}:
                wrong.append("repair gave a network with other names or shapes of weights")
            wrong += [f"{k} has values that are not finite" for k, v in out.items() if _bad(v)]
            if _hooks(repaired):
                wrong.append("the repaired model carries hooks; fold what they do into weights")
        elif power == "scan":
            verdict = method.scan(model, clean, rng)
            if not isinstance(verdict, Verdict):
                return {}, [f"scan gave a {type(verdict).__name__}, not a Verdict"], []
            out = {"score": torch.tensor(float(verdict.score))}
            out |= {"target": torch.tensor(-1 if verdict.target is None else verdict.target)}
            if verdict.per_class is not None:
                out["per_class"] = verdict.per_class.detach().cpu().clone()
            wrong += [f"{k} is not finite" for k, v in out.items() if k == "score" and _bad(v)]
        else:
            scores = method.score(model, clean.x, clean, rng)
            if not isinstance(scores, Tensor) or scores.shape != (len(clean),):
                return {}, [f"score must give one number for each of {len(clean)} images"], []
            out = {"scores": scores.detach().float().cpu().clone()}
            wrong += ["scores are not finite"] if _bad(out["scores"]) else []
        touched = [f"weights {k}" for k, v in _state(model).items() if not v.equal(before[k])][:2]
        touched += [] if images.equal(clean.x) else ["the clean images"]
        touched += [] if _hooks(model) == hooks else ["the model's hooks"]
        now = [(name, m.training) for name, m in model.named_modules()]
        touched += [] if now == modes else ["the model's training mode"]
        return out, wrong, touched

    return once


def _attacked(method: Any, train: Images) -> Once:
    def once(seed: int) -> tuple[dict[str, Tensor], list[str], list[str]]:
        x, y = train.x.clone(), train.y.clone()
        counts = y.bincount().tolist()
        method.check(tuple(x.shape[1:]), counts)
        trigger = method.prepare(train, stream(seed, "prepare"))
        if not isinstance(trigger, Trigger):
            return {}, [f"prepare gave a {type(trigger).__name__}, not a Trigger"], []
        poisoned = method.poison(train, trigger, stream(seed, "poison"))
        if not isinstance(poisoned, Poisoned):
            return {}, [f"poison gave a {type(poisoned).__name__}, not Poisoned"], []
        wrong = []
        data = poisoned.data
        if data.x.dtype != torch.uint8 or data.x.shape[1:] != x.shape[1:]:
            wrong.append("poison must give uint8 images of the shape of the training images")
        if len(data.x) != len(data.y) or int(data.y.max()) >= len(counts) or int(data.y.min()) < 0:
            wrong.append("poison must give one label of the data set for each image")
        raw = trigger.stamp(train.x[:64].float() / 255)
        if float(raw.min()) < -1e-4 or float(raw.max()) > 1 + 1e-4:
            wrong.append("stamp must give values in [0, 1]")
        one, two = (poisoning.stamp(train.x[:64], trigger.stamp) for _ in range(2))
        if not one.equal(two):
            wrong.append("stamp gave two results for the same images; draw in prepare")
        out = {"stamped": one, "rows": poisoned.rows, "y": data.y, "x": data.x}
        touched = [] if x.equal(train.x) and y.equal(train.y) else ["the training images"]
        return {k: v.detach().cpu().clone() for k, v in out.items()}, wrong, touched

    return once


def ranges_of(name: str, fields: Any) -> list[tuple[str, bool]]:
    """Specs at each bound of each field, and beyond it; True where it must be built."""
    found = []
    for field in fields:
        whole = field.type.split("|")[0].strip() == "int"
        for bound, away in ((field.low, -BEYOND), (field.high, BEYOND)):
            if bound is not None:
                value = int(bound) if whole else bound
                found.append((f"{name}:{field.name}={value}", True))
                found.append(
                    (f"{name}:{field.name}={value + (int(away) if whole else away)}", False)
                )
        if field.above is not None:
            found.append(
                (f"{name}:{field.name}={int(field.above) if whole else field.above}", False)
            )
        for choice in field.choices or ():
            found.append((f"{name}:{field.name}={show_value(choice)}", True))
        if field.choices and isinstance(field.choices[0], str):
            found.append((f"{name}:{field.name}=no_such_choice", False))
    return found


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _hooks(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(m, name)) for m in model.modules() for name in names)


def _bad(value: Tensor) -> bool:
    return value.is_floating_point() and not bool(value.isfinite().all())


def _same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)


def _difference(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> str:
    if _same(one, two):
        return "the same seed gives the same result"
    other = [name for name in one if name not in two or not one[name].equal(two[name])]
    return f"the same seed gave another {other[0] if other else 'set of results'}"


@contextmanager
def _global_seeds(seed: int) -> Iterator[None]:
    """Other global generators each time, so that whoever draws from them is found out."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - it is the global one that is meant
    torch.manual_seed(seed)
    yield
