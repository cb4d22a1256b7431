"""Scanners asked about one model, each in a process that holds the model and a clean set only."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arena import data as datasets
from arena.core.inversion.distances import ANOMALY
from arena.core.progress import report
from arena.core.registry import BadInput, defenses, nearest, short_spec, spec_of
from arena.core.seeding import stream
from arena.referee import isolate
from arena.store import Store, digest, load_tensors, save_tensors
from arena.subjects import Subject


def scanners() -> list[str]:
    return [each.name for each in defenses.describe_all() if "scans" in each.powers]


def check(text: str) -> None:
    """Raise BadInput unless `text` is the spec of a scanner; imports no method."""
    name = text.partition(":")[0]
    if name not in (known := scanners()):
        if name in defenses.names():
            powers = " and ".join(defenses.describe(name).powers)
            raise BadInput(f"{name} {powers} but scans nothing; scanners: {', '.join(known)}.")
        raise BadInput(f"There is no scanner {name!r}; {nearest(name, known)}")


def scan(
    subject: Subject,
    text: str,
    store: Store,
    *,
    clean_share: float = 0.05,
    device: str = "cpu",
) -> tuple[dict[str, Any], Tensor | None]:
    """What `arena scan` prints, as JSON values, and the trigger's picture (C, H, W) in [0, 1].

    The clean set is the one that a defense of the cell would get. Raises BadInput.
    """
    method, data = defenses.build(text), subject.data
    rows = subject.poisoned
    exclude = None if rows is None else rows[rows < len(data.train)]
    try:
        chosen = datasets.draw_clean(
            data.train.y, clean_share, stream(subject.seed, "clean"), exclude=exclude
        )
    except ValueError as error:
        raise BadInput(f"{error}.") from None
    store.create()
    folder = store.scratch(digest([subject.digest, spec_of(method), clean_share])) / "job"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    clean = data.train.take(chosen)
    save_tensors(folder / "clean.safetensors", {"x": clean.x, "y": clean.y})
    save_tensors(folder / "model.safetensors", subject.model.state_dict())
    job = {
        "job": "scan",
        "folder": str(folder),
        "device": device,
        "threads": torch.get_num_threads(),
        "seed": subject.seed,
        "model": subject.model.spec.name,
        "classes": data.num_classes,
        "shape": list(data.shape),
        "spec": spec_of(method),
        "weights": str(folder / "model.safetensors"),
        "clean": str(folder / "clean.safetensors"),
    }
    try:
        found = isolate.run(
            job,
            logfile=folder / "scan.log",
            on_event=lambda event: report(
                event["what"], event["done"], event["total"], **event.get("figures", {})
            ),
        )
    except isolate.Failed as error:
        raise BadInput(f"{short_spec(method)} failed: {error}.") from error
    trigger = None
    if found["pictured"]:
        trigger = load_tensors(Path(folder) / "trigger.safetensors")["trigger"]
    shutil.rmtree(folder, ignore_errors=True)
    each = found["per_class"]
    return {
        "model": subject.name,
        "weights": subject.digest,
        "method": short_spec(method),
        "backdoored": found["target"] is not None,
        "score": found["score"],
        "threshold": ANOMALY,
        "target": found["target"],
        "target_name": None if found["target"] is None else data.classes[found["target"]],
        "per_class": None if each is None else [None if math.isnan(v) else v for v in each],
        "classes": list(data.classes),
        "clean_images": len(clean),
        "seed": subject.seed,
        "budget": found["budget"],
    }, trigger
