"""Models to examine: from a cell of a store, or from a file of weights that somebody else made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arena import data as datasets
from arena.core import models
from arena.core.models import Classifier
from arena.core.registry import BadInput
from arena.core.seeding import stream
from arena.data import Dataset
from arena.store import Store, load_tensors

_WRAPPERS = ("state_dict", "model", "model_state_dict", "net")  # where checkpoints hide weights


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, the data that it was made for, and what to call it."""

    model: Classifier  # in evaluation mode, on the CPU
    data: Dataset
    name: str
    digest: str  # of its weights
    seed: int = 0  # of the cell
    poisoned: Tensor | None = None  # rows of the training set that a defender never gets


def of_cell(store: Store, prefix: str, data_dir: Path | None = None) -> Subject:
    """The model of a cell, as its defense left it. Raises BadInput."""
    record = store.find(prefix)
    key = record["key"]
    artifact = store.artifact(key)
    if artifact is None:
        raise BadInput(
            f"Cell {key[:12]} has no model ({record['status']}: {record.get('reason', '')}); "
            "choose one that ended well, see `arena results`."
        )
    data = datasets.load(record["dataset"]["name"], data_dir=data_dir)
    if data.fingerprint != record["dataset"]["fingerprint"]:
        raise BadInput(
            f"The data set {data.name!r} is not the one that cell {key[:12]} was made from; give "
            "the same files with --data-dir."
        )
    name = f"{record['attack']['short']} / {record['defense']['short']}, seed {record['seed']}"
    weights = artifact.tensors("weights")
    model = _filled(record["model"], data, weights, key[:12])
    victim = store.artifact(record["parents"]["victim"])
    rows = None if victim is None else victim.tensors("poisoned")["rows"]
    return Subject(model, data, name, digest(weights), int(record["seed"]), rows)


def of_checkpoint(file: Path, model: str, dataset: str, data_dir: Path | None = None) -> Subject:
    """A network of the name `model` with the weights in `file` (safetensors, or torch's format with
    plain tensors in it). Raises BadInput.

    Weights of the bare network bring no normalisation: it is then that of the training images.
    """
    try:
        models.info(model)  # unknown names before any file is read
    except ValueError as error:
        raise BadInput(f"There is {error}.") from None
    weights = read_weights(file)
    data = datasets.load(dataset, data_dir=data_dir)
    return Subject(_filled(model, data, weights, file.name), data, file.name, digest(weights))


def read_weights(file: Path) -> dict[str, Tensor]:
    """Named tensors of a checkpoint; nothing in it is executed. Raises BadInput."""
    if not file.is_file():
        raise BadInput(f"There is no file {str(file)!r}.")
    try:
        if file.suffix == ".safetensors":
            return load_tensors(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file does to its reader
        raise BadInput(
            f"{str(file)!r} cannot be read as plain tensors; save the model's state_dict() with "
            "torch.save or as safetensors."
        ) from error
    for name in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    tensors = isinstance(found, Mapping) and all(isinstance(v, Tensor) for v in found.values())
    if not tensors or not found:
        raise BadInput(f"{str(file)!r} holds no state_dict: named tensors are wanted.")
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names and values."""
    sha = hashlib.sha256()
    for name, value in sorted(weights.items()):
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _filled(model: str, data: Dataset, weights: Mapping[str, Tensor], name: str) -> Classifier:
    try:
        network = models.build(model, data.num_classes, data.shape, stream(0, "shell"))
    except ValueError as error:
        raise BadInput(f"{error}.") from None
    if not any(key.startswith("body.") for key in weights):
        models.calibrate(network, data.train)
        own = {f"normalize.{k}": v for k, v in network.normalize.state_dict().items()}
        weights = {**own, **{f"body.{key}": value for key, value in weights.items()}}
    try:
        return models.load_weights(network, weights).eval()
    except ValueError as error:
        raise BadInput(f"{name}: {error}.") from None
