"""What happens inside a worker: an attack, a repair, or the referee's own measuring.

An attack is given the training images, its settings and a seed; the images on which it is scored
reach it only after its victim is written. A repair is given weights, the network's name, the
clean set, its settings and a seed. That is separation by process and by what a job names, against
peeking by design or by accident; what a hostile method could search the disk for, the sandbox
(`arena.referee.sandbox`) keeps out of its sight.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arena.core import foreign, metrics, models, parts, poisoning, training
from arena.core.contracts import ControlsTraining, Images, Trigger
from arena.core.measures import measures
from arena.core.mmd import mmd_report
from arena.core.progress import report
from arena.core.recipes import recipe_for
from arena.core.registry import BadInput, add_files, attacks, defenses, import_strangers
from arena.core.seeding import stream
from arena.core.triggers import tensors_of
from arena.core.victims import bound
from arena.core.whole import share_refusal
from arena.referee.isolate import Line, Refused, explain
from arena.referee.keeping import FileCheckpoint, LineKeeper
from arena.referee.trial import trial
from arena.store import load_tensors, save_tensors

Job = Mapping[str, Any]
PROBED = 1000  # test images per probe
_REFEREE = ("measure", "examine")  # jobs that are the referee's own


def read_split(files: Mapping[str, str]) -> Images:
    """A data split from its .npy files; nothing is loaded until used, nothing written back."""
    x, y = (torch.from_numpy(np.load(files[name], mmap_mode="c")) for name in ("x", "y"))
    return Images(x, y)


def _checkpoint(folder: Path, call: int) -> FileCheckpoint:
    return FileCheckpoint(folder / f"training-{call}.pt")


def attack(job: Job, line: Line) -> dict[str, Any]:
    """Poison, train the victim, then stamp the test images that the runner hands over."""
    device, folder = _start(job), Path(job["folder"])
    resumed = any(Path(job["scratch"]).glob("training-*.pt"))  # then `seconds` is a part only
    train, seed = read_split(job["train"]), int(job["seed"])
    if device.type != "cpu":
        train = train.to(device)  # attacks stamp images and train their parts where these are
    line.begin()
    started = time.monotonic()
    method = attacks.build(job["spec"])
    try:
        counts = train.y.bincount(minlength=job["classes"]).tolist()
        method.check(tuple(job["shape"]), counts)
    except BadInput as error:
        raise Refused(str(error)) from error
    shape, classes = tuple(job["shape"]), int(job["classes"])
    plan = recipe_for(job["recipe"], job["model"])
    checkpoints = partial(_checkpoint, Path(job["scratch"]))
    fit = bound(job["model"], classes, shape, plan, seed, device, checkpoints)
    with parts.kept(LineKeeper(line, folder, Path(job["scratch"]))):
        trigger = method.prepare(train, stream(seed, "prepare"))
        poisoned = method.poison(train, trigger, stream(seed, "poison"))
        if isinstance(method, ControlsTraining):
            model, trigger = method.train(fit, poisoned, trigger, stream(seed, "fit"))
        else:
            model = fit(poisoned.data, rng=stream(seed, "fit"))
    rows = poisoned.rows
    save_tensors(folder / "weights.safetensors", model.state_dict())
    save_tensors(
        folder / "poisoned.safetensors",
        {"rows": rows, "x": poisoned.data.x[rows], "y": poisoned.data.y[rows]},
    )
    budget = _budget(device, started)
    if trigger is not None:
        names = line.ask("the images to stamp")  # in the folder, from now on
        test = read_split({name: str(folder / file) for name, file in names.items()})
        stamped = poisoning.stamp(test.x.to(device), trigger.stamp)
        save_tensors(folder / "triggered.safetensors", {"x": stamped})
        save_tensors(folder / "trigger.safetensors", tensors_of(trigger))
        probes = _probed(method, trigger, test, classes, device)
        save_tensors(folder / "probes.safetensors", probes)
    return {
        "budget": budget,
        "poisoned_rows": len(rows),
        "training_images": len(poisoned.data),
        "stamped": trigger is not None,
        "resumed": resumed,
    }


def _probed(
    method: Any, trigger: Trigger, test: Images, classes: int, device: torch.device
) -> dict[str, Tensor]:
    """`NAME.x` and `NAME.rows`: test images under each of the trigger's near misses."""
    found = {}
    for name, probe in trigger.probes.items():
        shown = poisoning.wanted(method, test.y, classes) != test.y
        if probe.of is not None:
            shown = test.y == probe.of
        rows = shown.nonzero().flatten()[:PROBED]
        found[f"{name}.rows"] = rows
        found[f"{name}.x"] = poisoning.stamp(test.x[rows].to(device), probe.stamp)
    return found


def repair(job: Job, line: Line) -> dict[str, Any]:
    """Repair a model with a clean set."""
    device, folder = _start(job), Path(job["folder"])
    model = _network(job, job["weights"]).to(device)
    tensors = load_tensors(Path(job["clean"]))
    clean = Images(tensors["x"], tensors["y"])
    line.begin()
    method = defenses.build(job["spec"])
    skip = getattr(method, "skip", None)
    if skip is not None and (reason := skip(model, clean)):
        raise Refused(reason)
    models.passes.reset()
    started = time.monotonic()
    repaired = method.repair(model, clean, stream(int(job["seed"]), "repair", job["spec"]))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    budget = _budget(device, started)
    state = repaired.state_dict()
    for name, value in state.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"the repaired model has non-finite values in {name}")
    save_tensors(folder / "weights.safetensors", state)
    return {"budget": {**budget, "clean_images": len(clean)}}


def usable(job: Job, line: Line) -> dict[str, Any]:
    """Why each of several defenses cannot work with a model and a clean set; empty where it can."""
    device = _start(job)
    model = _network(job, job["weights"]).to(device)
    tensors = load_tensors(Path(job["clean"]))
    clean = Images(tensors["x"], tensors["y"])

    def reason(spec: str) -> str:
        method = defenses.build(spec, job["recipe"])
        if refusal := share_refusal(method, job["clean_share"]):
            return refusal
        if hasattr(method, "check"):
            method.check(model, clean)
        return ""

    reasons = {}
    for spec in job["specs"]:
        try:
            reasons[spec] = reason(spec)
        except BadInput as error:
            reasons[spec] = str(error)
        except Exception as error:  # one that is broken says nothing of the others
            reasons[spec] = explain(error)
    return {"reasons": reasons}


def scan(job: Job, line: Line) -> dict[str, Any]:
    """Ask a scanner about a model, with a clean set."""
    device, folder = _start(job), Path(job["folder"])
    model = _network(job, job["weights"]).to(device)
    tensors = load_tensors(Path(job["clean"]))
    clean = Images(tensors["x"], tensors["y"])
    line.begin()
    method = defenses.build(job["spec"])
    models.passes.reset()
    started = time.monotonic()
    found = method.scan(model, clean, stream(int(job["seed"]), "scan", job["spec"]))
    if found.trigger is not None:
        save_tensors(folder / "out.safetensors", {"trigger": found.trigger.cpu()})
    each = None if found.per_class is None else found.per_class.double().cpu().tolist()
    return {
        "score": float(found.score),
        "target": found.target,
        "per_class": each,
        "budget": {**_budget(device, started), "clean_images": len(clean)},
    }


def detect(job: Job, line: Line) -> dict[str, Any]:
    """Have a detector score sets of inputs; which of them are stamped, it is not told."""
    device, folder = _start(job), Path(job["folder"])
    model = _network(job, job["weights"]).to(device)
    tensors = load_tensors(Path(job["clean"]))
    clean = Images(tensors["x"], tensors["y"])
    sets = load_tensors(Path(job["sets"]))
    found: dict[str, Tensor] = {}
    for place, spec in enumerate(job["specs"]):
        method = defenses.build(spec)
        for name, x in sorted(sets.items()):
            rng = stream(int(job["seed"]), "detect", spec, name)
            scores = method.score(model, x, clean, rng).float().cpu()
            if scores.shape != (len(x),) or not torch.isfinite(scores).all():
                raise ValueError(f"{spec} gave no finite score for each of {len(x)} inputs")
            found[f"{place}.{name}"] = scores
            report("detecting", len(found), len(job["specs"]) * len(sets))
    save_tensors(folder / "out.safetensors", found)
    return {}


def measure(job: Job, line: Line) -> dict[str, Any]:
    """The referee's own figures for one model on the whole test set and on its triggered form.

    No code of an attack runs here: which labels it wants, and of which images, comes in a file.
    """
    device = _start(job)
    model = _network(job, job["weights"]).to(device)
    test = read_split(job["test"])
    answers, facts = _answers(model, test.x)
    out: dict[str, Any] = {
        "metrics": {"acc": metrics.accuracy(answers, test.y)},
        "counts": {"test": len(test)},
        **facts,
    }
    predictions = {"clean": answers.to(torch.int16)}
    if job["triggered"] is not None:
        labels = load_tensors(Path(job["labels"]))
        wanted, counted = labels["wanted"], labels["counted"]
        triggered = load_tensors(Path(job["triggered"]))["x"]
        fooled, _ = _answers(model, triggered)
        predictions["triggered"] = fooled.to(torch.int16)
        out["metrics"]["asr"] = metrics.asr(fooled, wanted, counted)
        out["metrics"]["ra"] = metrics.ra(fooled, test.y, counted)
        out["counts"]["triggered"] = int(counted.sum())
        if job.get("twin") is not None:
            twin = _network(job, job["twin"]).to(device)
            seen, _ = _answers(twin, triggered)
            out["twin"] = {
                "clean_twin_asr": metrics.asr(seen, wanted, counted),
                "clean_twin_ra": metrics.ra(seen, test.y, counted),
            }
            out["probes"] = _probe_answers(job, model, test.y, wanted)
            if (target := job["target"]) is not None:
                out["mmd"] = mmd_report(model, triggered[counted], test, target, stream(0, "mmd"))
            out["stealth"] = stealth(test.x[counted], triggered[counted])
            rows = shown_rows(test.y, counted)
            shown = {"clean": test.x[rows], "triggered": triggered[rows]}
            save_tensors(
                Path(job["folder"]) / "gallery.safetensors",
                {"rows": rows, "y": test.y[rows], **shown},
            )
    save_tensors(Path(job["folder"]) / "predictions.safetensors", predictions)
    return out


def _probe_answers(
    job: Job, model: nn.Module, y: Tensor, wanted: Tensor
) -> dict[str, dict[str, float]]:
    """What the victim makes of near misses: they should keep their class, not reach the target."""
    kept = load_tensors(Path(job["probes"]))
    found = {}
    for name in sorted({key.rpartition(".")[0] for key in kept}):
        rows = kept[f"{name}.rows"]
        answers, _ = _answers(model, kept[f"{name}.x"])
        found[name] = {
            "ra": metrics.accuracy(answers, y[rows]),
            "asr": metrics.accuracy(answers, wanted[rows]),
            "images": len(rows),
        }
    return found


def examine(job: Job, line: Line) -> dict[str, Any]:
    """One of the board's measures, of one model; no method ever runs in such a process."""
    device, place = _start(job), Path(job["scratch"]) / "measure.pt"
    model = _network(job, job["weights"]).to(device)
    val, test = (read_split(job[name]) for name in ("val", "test"))
    resumed = place.exists()  # then `seconds` is a part only
    line.begin()
    started = time.monotonic()
    method = measures.build(job["spec"])
    try:
        found = method.measure(model, val, test, int(job["seed"]), FileCheckpoint(place))
    except BadInput as error:  # for want of memory, say
        raise Refused(str(error)) from error
    return {
        "figures": found.figures,
        "each": found.each,
        "seconds": time.monotonic() - started,
        "resumed": resumed,
    }


def stealth(clean: Tensor, triggered: Tensor, limit: int = 2000) -> dict[str, float | None]:
    """How far the triggered images are from the clean ones (uint8), on the first `limit`."""
    one, two = training.to_float(clean[:limit]), training.to_float(triggered[:limit])
    ratio = metrics.psnr(one, two)
    return {
        "psnr": ratio if math.isfinite(ratio) else None,  # the trigger changes nothing
        "ssim": metrics.ssim(one, two),
        "l2": metrics.l2(one, two),
        "linf": metrics.linf(one, two),
    }


def shown_rows(y: Tensor, counted: Tensor, limit: int = 8) -> Tensor:
    """(K,) rows for the pictures: the first triggered image of each class, then the next ones."""
    rows = counted.nonzero().flatten()
    firsts = [int(rows[y[rows] == c][0]) for c in y[rows].unique()]
    rest = [int(row) for row in rows[: limit + len(firsts)] if int(row) not in set(firsts)]
    return torch.tensor((firsts + rest)[:limit])


def _answers(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Predicted classes (N,) and what is suspicious about the outputs."""
    out = training.logits(model, x).cpu()
    if not torch.isfinite(out).all():
        raise ValueError("the model's outputs are not finite")
    answers = out.argmax(1)
    again = training.logits(model, x[: min(len(x), 200)]).cpu()
    rows = out.double()
    probabilities = bool(rows.min() >= 0) and bool(((rows.sum(1) - 1).abs() < 1e-2).all())
    top = float(answers.bincount(minlength=out.shape[1]).max()) / len(answers)
    return answers, {
        "top_class_share": top,
        "probabilities": probabilities,
        "repeatable": bool(torch.equal(again.argmax(1), answers[: len(again)])),
    }


def _network(job: Job, weights: str) -> models.Classifier:
    shape = tuple(job["shape"])
    if foreign.is_foreign(job["model"]):
        model = foreign.build(job["model"], job["classes"], shape)
    else:
        model = models.build(job["model"], job["classes"], shape, stream(0, "shell"))
    return models.load_weights(model, load_tensors(Path(weights))).eval()


def _start(job: Job) -> torch.device:
    add_files(job.get("registered", ()))
    if job["job"] not in _REFEREE:  # there methods are described, and none of them runs
        import_strangers()
    torch.set_num_threads(int(job["threads"]))
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
        # the referee's own passes must repeat exactly, or the null defense would move numbers
        torch.backends.cudnn.benchmark = job["job"] not in _REFEREE
        torch.backends.cudnn.deterministic = job["job"] in _REFEREE
    return device


def _budget(device: torch.device, started: float) -> dict[str, Any]:
    return {
        "seconds": time.monotonic() - started,
        "peak_memory_mb": _peak_memory(device),
        "forward_images": models.passes.forward,
        "backward_images": models.passes.backward,
    }


def _peak_memory(device: torch.device) -> float | None:
    """Peak memory in MB (10^6 bytes): the device's own on a GPU, the process's on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


JOBS: dict[str, Callable[[Job, Line], dict[str, Any]]] = {
    "attack": attack,
    "repair": repair,
    "usable": usable,
    "scan": scan,
    "detect": detect,
    "measure": measure,
    "examine": examine,
    "trial": lambda job, line: trial(job, _start(job), lambda path: _network(job, path)),
}
