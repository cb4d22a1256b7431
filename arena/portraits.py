"""Figures that need a store's weights and data: ASR by class, class distances, training curves, and
where a victim's features of clean and triggered images lie.

Each is drawn where its inputs are at hand; the others are returned with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arena.core.registry import BadInput, attacks
from arena.report import figures
from arena.report.page import Drawing
from arena.report.tables import clean_text
from arena.store import Artifact, Store

if TYPE_CHECKING:
    from torch import Tensor

    from arena.data import Dataset

Record = Mapping[str, Any]
Absent = list[tuple[str, str]]

MOST_VICTIMS = 12  # that get feature maps and lines of curves
SHOWN = 240  # clean images, and as many triggered ones, in a feature map


def portray(
    store: Store, records: Sequence[Record], data_dir: Path | None = None
) -> tuple[list[Drawing], Absent]:
    """All such figures of a board's records, and (title, reason) of those left out."""
    drawn: list[Drawing] = []
    absent: Absent = []
    victims = _victims(store, records)
    for make in (_curves, _distances, _classes, _features):
        made, lost = make(store, records, victims, data_dir)
        drawn += made
        absent += lost
    return drawn, absent


Victims = list[tuple[Record, Artifact]]


def _victims(store: Store, records: Sequence[Record]) -> Victims:
    """One record per victim, with its artifact: the undefended cell where there is one."""
    first: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: record["defense"]["name"] != "none"):
        first.setdefault(record["parents"]["victim"], record)
    found = [(record, store.artifact(key)) for key, record in first.items()]
    return sorted(
        ((record, kept) for record, kept in found if kept is not None),
        key=lambda pair: (pair[0]["attack"]["short"], str(pair[0]["seed"])),
    )


def _name(record: Record) -> str:
    short = "clean twin" if record["attack"]["name"] == "none" else record["attack"]["short"]
    return f"{clean_text(short)}, seed {record['seed']}"


def _curves(
    store: Store, records: Sequence[Record], victims: Victims, data_dir: Path | None
) -> tuple[list[Drawing], Absent]:
    losses = {
        f"{_name(record)}, {record['model']}": [
            (float(e), float(v)) for e, v in kept.meta["losses"]
        ]
        for record, kept in victims
        if kept.meta.get("losses")
    }
    if not losses:
        return [], [("training curves", "no victim of this store kept the losses of its epochs")]
    return [figures.curves(dict(list(losses.items())[:MOST_VICTIMS]))], []


def _distances(
    store: Store, records: Sequence[Record], victims: Victims, data_dir: Path | None
) -> tuple[list[Drawing], Absent]:
    drawn: list[Drawing] = []
    for record in records:
        for entry in (record.get("measures") or {}).values():
            if entry["name"] != "class_distance" or entry["status"] != "ok":
                continue
            if record["defense"]["name"] == "none" or record["seed"] != records[0]["seed"]:
                continue
            names = record["dataset"]["classes"]
            both = [_matrix(store.artifact(entry[k]["artifact"]), len(names)) for k in _SIDES]
            before, after = both
            if before is None or after is None:
                continue
            what = f"{record['defense']['short']} against {record['attack']['short']}"
            drawn.append(
                figures.distance_maps(
                    f"distances-{len(drawn) + 1}",
                    f"Class distances: {clean_text(what)}",
                    before,
                    after,
                    names,
                    entry["columns"].get("distance_unit") or "size",
                )
            )
    if not drawn:
        return [], [("class distances", "no board measure `class_distance` was asked for")]
    return drawn[:MOST_VICTIMS], []


_SIDES = ("before", "after")


def _matrix(kept: Artifact | None, classes: int) -> list[list[float | None]] | None:
    """The readings [victim, target, size] as a matrix, None where no pair was searched."""
    if kept is None:
        return None
    matrix: list[list[float | None]] = [[None] * classes for _ in range(classes)]
    for victim, target, size in kept.meta["each"]:
        matrix[int(victim)][int(target)] = None if size is None or math.isnan(size) else float(size)
    return matrix


def _loaded(records: Sequence[Record], data_dir: Path | None) -> dict[str, Dataset | str]:
    """Data set name -> the set, or why it cannot be had or is not the one that was used."""
    from arena.data import load

    found: dict[str, Dataset | str] = {}
    for record in records:
        name = record["dataset"]["name"]
        if name in found:
            continue
        try:
            dataset = load(name, data_dir=data_dir)
        except BadInput as error:
            found[name] = str(error).rstrip(".")
            continue
        same = dataset.fingerprint == record["dataset"]["fingerprint"]
        found[name] = dataset if same else f"{name} is not the data that was used"
    return found


def _classes(
    store: Store, records: Sequence[Record], victims: Victims, data_dir: Path | None
) -> tuple[list[Drawing], Absent]:
    import torch

    from arena.core import poisoning

    shares: dict[str, list[float | None]] = {}
    names: Sequence[str] = ()
    loaded = _loaded([record for record, _ in victims], data_dir)
    reasons = {text for text in loaded.values() if isinstance(text, str)}
    for record in records:
        data = loaded.get(record["dataset"]["name"])
        kept = store.artifact(record["key"])
        if data is None or isinstance(data, str) or kept is None:
            continue
        if record["seed"] != records[0]["seed"] or record["dataset"] != records[0]["dataset"]:
            continue
        answers = kept.tensors("predictions")
        if "triggered" not in answers:
            continue
        attack, y = attacks.build(record["attack"]["spec"]), data.test.y
        names = data.classes
        wanted = poisoning.wanted(attack, y, len(names))
        counted = poisoning.applies(attack, y, len(names))
        hit = answers["triggered"].to(torch.int64) == wanted
        label = (
            f"{clean_text(record['attack']['short'])} × {clean_text(record['defense']['short'])}"
        )
        shares[label] = [
            None if not (own := counted & (y == c)).any() else float(hit[own].double().mean())
            for c in range(len(names))
        ]
    if not shares:
        why = "; ".join(sorted(reasons)) or "no repaired model of this store kept its answers"
        return [], [("ASR by class", why)]
    return [figures.per_class(dict(list(shares.items())[:40]), names)], []


def _features(
    store: Store, records: Sequence[Record], victims: Victims, data_dir: Path | None
) -> tuple[list[Drawing], Absent]:
    attacked = [(r, kept) for r, kept in victims if kept.path("triggered").exists()]
    if not attacked:
        return [], [("feature maps", "no attacked victim of this store kept its weights")]
    loaded = _loaded([record for record, _ in attacked], data_dir)
    drawn: list[Drawing] = []
    absent: Absent = []
    for record, kept in attacked[:MOST_VICTIMS]:
        data = loaded[record["dataset"]["name"]]
        if isinstance(data, str):
            absent.append((f"feature maps of {_name(record)}", data))
            continue
        for way in _ways():
            levels = _planes(record, kept, data, way)
            target = getattr(attacks.build(record["attack"]["spec"]), "target", 0)
            drawn.append(
                figures.feature_map(
                    f"features-{way.lower()}-{len(drawn) + 1}",
                    f"Features of {_name(record)} ({way})",
                    "The victim's activations for clean and triggered test images at three levels, "
                    "averaged over places, in a plane of their own for each level.",
                    levels,
                    data.classes,
                    int(target),
                )
            )
    if not any(way == "UMAP" for way in _ways()):
        absent.append(("feature maps by UMAP", "umap-learn is not installed; PCA is shown"))
    return drawn, absent


def _ways() -> tuple[str, ...]:
    from importlib.util import find_spec

    return ("PCA", "UMAP") if find_spec("umap") else ("PCA",)


def _planes(record: Record, kept: Artifact, data: Dataset, way: str) -> dict[str, Any]:
    """level -> (plane (N, 2), true classes (N,), triggered (N,))."""
    import torch

    from arena.core import models, poisoning
    from arena.core.features import LEVELS, evaluating, features
    from arena.core.seeding import stream
    from arena.core.training import to_float

    attack = attacks.build(record["attack"]["spec"])
    test, classes = data.test, data.num_classes
    counted = poisoning.applies(attack, test.y, classes).nonzero().flatten()
    rows = torch.linspace(0, len(test) - 1, min(SHOWN, len(test))).long()
    stamped = counted[torch.linspace(0, len(counted) - 1, min(SHOWN, len(counted))).long()]
    images = torch.cat([test.x[rows], kept.tensors("triggered")["x"][stamped]])
    labels = torch.cat([test.y[rows], test.y[stamped]])
    model = models.build(record["model"], classes, data.shape, stream(0, "portrait"))
    model.load_state_dict(kept.tensors("weights"))
    with torch.no_grad(), evaluating(model):
        parts = [features(model, to_float(x)) for x in images.split(120)]
    triggered = [False] * len(rows) + [True] * len(stamped)
    return {
        level: (
            _plane(_flat(torch.cat([p[level] for p in parts])), way),
            labels.tolist(),
            triggered,
        )
        for level in LEVELS
    }


def _flat(found: Tensor) -> Tensor:
    return found.flatten(2).mean(2) if found.ndim > 2 else found


def _plane(found: Tensor, way: str) -> Any:
    """(N, K) -> (N, 2)."""
    values = found.double().numpy()
    if way == "UMAP":
        from umap import UMAP

        return UMAP(random_state=0, n_jobs=1).fit_transform(values)
    from sklearn.decomposition import PCA

    return PCA(2, random_state=0).fit_transform(values)
