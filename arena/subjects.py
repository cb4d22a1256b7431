"""Models to examine: from a cell of a store, or from a file of weights that somebody else made.

Methods that examine them run in processes of their own, which hold the model and a clean set only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arena import data as datasets
from arena.checkpoints import read_weights
from arena.core import foreign, models, training
from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.progress import report
from arena.core.registry import BadInput, code_hash, defenses, files_of, spec_of, split_spec
from arena.core.seeding import stream
from arena.data import Dataset, unlabelled
from arena.identity import method_files, method_identity
from arena.planning import PROTOCOL
from arena.referee import isolate, returned
from arena.referee.answers import check_answer
from arena.referee.sandbox import Limits
from arena.store import Store, file_sha256, save_tensors
from arena.store import digest as json_digest

_TRIED = 16  # images that a model from a file must answer before anything is done with it
MOST_OUT = 2**30  # bytes of scores, or of a trigger, that a job may give back


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, the data that it was made for, and what to call it."""

    model: Classifier  # in evaluation mode, on the CPU
    data: Dataset
    name: str
    digest: str  # of its weights
    seed: int = 0  # of the cell
    poisoned: Tensor | None = None  # rows of the training set that a defender never gets
    self_labelled: bool = False  # the data's labels are this model's own answers
    prefix: str = ""  # of its weights' names that its file does without, as its maker's code does


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
    model = _checked(_built(record["model"], data), weights, key[:12])
    victim = store.artifact(record["parents"]["victim"])
    rows = None if victim is None else victim.tensors("poisoned")["rows"]
    return Subject(model, data, name, digest(weights), int(record["seed"]), rows)


def of_checkpoint(
    file: Path,
    model: str | None,
    dataset: str | Dataset,
    data_dir: Path | None = None,
    *,
    trust_pickle: bool = False,
) -> Subject:
    """A network of the name `model` with the weights in `file` (safetensors, or torch's format with
    plain tensors in it). Raises BadInput.

    model: a network of the arena, `timm:NAME`, or `path/to/net.py:factory` (`arena.core.foreign`).
        None: `file` is a whole pickled model or a folder with one (model.pt), as TrojAI's are; its
        code runs when it is read, so that it is refused unless `trust_pickle`.

    Weights of a bare network of the arena bring no normalisation: it is then that of the training
    images. Foreign networks get none.
    """
    if model is None:
        return _of_pickle(file, dataset, data_dir, trust_pickle)
    if foreign.is_factory(model):
        weights = read_weights(file)
        data = _data(dataset, data_dir)
        network = foreign.build(_absolute(model), data.num_classes, data.shape)
        filled, prefix = _filled(network, weights, file.name)
        return _sound(Subject(filled, data, file.name, digest(weights), prefix=prefix))
    head = _head(model)  # unknown names before any file is read
    weights = read_weights(file)
    data = _data(dataset, data_dir)
    network = _built(model, data)
    if (count := _outputs(weights, head)) not in (None, data.num_classes):
        raise BadInput(
            f"{file.name} tells {count} classes apart, but {data.name} has {data.num_classes}: "
            f"{', '.join(data.classes[:12])}{', …' if data.num_classes > 12 else ''}; give images "
            "of all classes that the model knows, and of no others."
        )
    if not _is_ours(weights):
        models.calibrate(network, data.train)
    filled, prefix = _filled(network, weights, file.name)
    return _sound(Subject(filled, data, file.name, digest(weights), prefix=prefix))


def of_unlabelled(
    file: Path, model: str | None, images: str, *, trust_pickle: bool = False
) -> Subject:
    """As `of_checkpoint`, with images of one's own (`arena.data.unlabelled`) whose labels are the
    model's own answers: of a backdoored model they are right for most clean images.

    Accuracies on such a data set are how often another model agrees with this one.
    """
    pixels = unlabelled.read(images)
    shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
    if model is None:
        count = foreign.classes_of(_trusted(file, trust_pickle), shape)
    elif foreign.is_factory(model):
        count = foreign.classes_of(_absolute(model), shape)
    else:
        head = _head(model)
        found = _outputs(read_weights(file), head)
        if found is None:
            raise BadInput(
                f"{file.name} has no weights {head}.weight, as {model} does; is it its network?"
            )
        count = found
    blank = unlabelled.labelled(images, pixels, torch.arange(len(pixels)) % count, count)
    subject = of_checkpoint(file, model, blank, trust_pickle=trust_pickle)
    answers = training.logits(subject.model, pixels).argmax(1)
    data = unlabelled.labelled(images, pixels, answers, count)
    return replace(subject, data=data, self_labelled=True)


def _head(model: str) -> str:
    """The name of the last layer of a network of the arena. Raises BadInput."""
    try:
        return models.info(model).head
    except ValueError as error:
        raise BadInput(f"There is {error}.") from None


def _outputs(weights: Mapping[str, Tensor], head: str) -> int | None:
    """The classes that a network of the arena tells apart, by its head's weights."""
    for name in (f"{head}.weight", f"body.{head}.weight"):
        if name in weights and weights[name].ndim:
            return len(weights[name])
    return None


def _sound(subject: Subject) -> Subject:
    """The subject. Raises BadInput where its model answers images with what are no numbers."""
    data = subject.data
    x = (data.val if len(data.val) else data.train).x[:_TRIED]
    if not bool(training.logits(subject.model, x).isfinite().all()):
        raise BadInput(
            f"{subject.name}: the model's outputs for images of {data.name} are not finite; its "
            "weights are damaged or far too large, or it wants images in another range than [0, 1]."
        )
    return subject


def ask_once(
    subject: Subject,
    kind: str,
    method: Any,
    store: Store,
    *,
    clean_share: float,
    device: str,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As `ask` about a method; what was answered before, by the same code about the same model with
    the same images, is read from the store. Work that is stopped goes on behind the last answer."""
    clean = clean_set(subject, clean_share)
    key = json_digest(
        {
            "kind": kind,
            "weights": digest(subject.model.state_dict()),
            "network": _network_identity(subject.model),
            "clean": digest({"x": clean.x, "y": clean.y}),
            "seed": subject.seed,
            "method": method_identity(method),
            "protocol": PROTOCOL,
            "bf16": training.has_bf16(torch.device(device)),
        }
    )
    store.create()
    with store.lock(key):
        known = store.artifact(key)
        if known is None:
            answer, tensors = ask(
                subject, kind, {"spec": spec_of(method)}, store,
                clean_share=clean_share, device=device,
            )  # fmt: skip
            text = json.dumps(dict(answer))  # a store's own JSON has no NaN, a scanner's may
            meta = {"kind": kind, "method": spec_of(method), "answer": text}
            known = store.save(key, {"out": tensors} if tensors else {}, meta)
    found: dict[str, Any] = json.loads(known.meta["answer"])
    return found, known.tensors("out") if known.path("out").exists() else {}


def _network_identity(model: Classifier) -> dict[str, str]:
    name = model.spec.name
    if foreign.is_foreign(name):
        return {"file": file_sha256(Path(foreign.file_of(name))), "layers": str(model)}
    return {"name": name, "code": code_hash(models.info(name).build.__module__)}


def clean_set(subject: Subject, share: float) -> Images:
    """The clean images that a defense of the subject's cell would get. Raises BadInput."""
    data, rows = subject.data, subject.poisoned
    if not 0 < share <= 1:
        raise BadInput(f"--clean-share must be above 0 and at most 1, got {share:g}.")
    try:
        chosen = datasets.draw_clean(
            data.train.y,
            share,
            stream(subject.seed, "clean"),
            exclude=None if rows is None else rows[rows < len(data.train)],
        )
    except ValueError as error:
        raise BadInput(f"{error}.") from None
    return data.train.take(chosen)


def ask(
    subject: Subject,
    kind: str,
    question: Mapping[str, Any],
    store: Store,
    *,
    clean_share: float,
    device: str,
    sets: Mapping[str, Tensor] | None = None,
    limits: Limits | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Do a worker's job about a model, with the clean set that a defense of its cell would get.

    kind, question: the job and its own settings (`arena.referee.worker`); sets: tensors for it.
    limits: what it may use.
    Returns its answer and the tensors that it wrote (weights, where it repairs). Raises BadInput
    where it fails.
    """
    clean = clean_set(subject, clean_share)
    store.create()
    key = json_digest([kind, subject.digest, question, clean_share])
    with store.lock(key):  # two who ask the same at once would share a folder
        place = store.scratch(key)
        return _asked(subject, kind, question, store, clean, place, device, sets, limits)


def _asked(
    subject: Subject,
    kind: str,
    question: Mapping[str, Any],
    store: Store,
    clean: Images,
    place: Path,
    device: str,
    sets: Mapping[str, Tensor] | None,
    limits: Limits | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shutil.rmtree(place, ignore_errors=True)
    inputs, folder = place / "in", place / "job"  # the job may write to its folder alone
    for each in (inputs, folder):
        each.mkdir(parents=True)
    parts = {"clean": {"x": clean.x, "y": clean.y}, "model": subject.model.state_dict()}
    for name, tensors in (parts | ({"sets": sets} if sets else {})).items():
        save_tensors(inputs / f"{name}.safetensors", tensors)
    specs = [question["spec"]] if "spec" in question else question.get("specs", ())
    files, registered = _files(specs)
    if foreign.is_foreign(subject.model.spec.name):
        files.append(foreign.file_of(subject.model.spec.name))
    job = {
        "job": kind,
        "folder": str(folder),
        "device": device,
        "threads": torch.get_num_threads(),
        "seed": subject.seed,
        "model": subject.model.spec.name,
        "classes": subject.data.num_classes,
        "shape": list(subject.data.shape),
        "weights": str(inputs / "model.safetensors"),
        "clean": str(inputs / "clean.safetensors"),
        "sets": str(inputs / "sets.safetensors"),
        "method_files": files,
        "registered": registered,
        **question,
    }
    try:
        answer = isolate.run(
            job,
            logfile=place / f"{kind}.log",
            hidden=(store.root,),
            limits=limits,
            on_event=lambda event: report(
                event["what"], event["done"], event["total"], **event["figures"]
            ),
        )
        check_answer(kind, answer)
        if "budget" in answer:
            answer["budget"] |= answer.measured(device)
        if kind == "repair":
            shapes = returned.shapes(subject.model.state_dict())
            return answer, returned.weights(folder, shapes)
        there = os.path.lexists(folder / "out.safetensors")
        return answer, returned.tensors(folder, "out", MOST_OUT) if there else {}
    except isolate.Failed as error:
        raise BadInput(f"{kind} failed: {error}") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _files(specs: Iterable[str]) -> tuple[list[str], list[str]]:
    """What the process of some defenses must see, and of that the files that it must register."""
    seen, registered = [], []
    for spec in specs:
        try:
            name, values = split_spec(spec)
            if not values and not defenses.is_strange(name):  # most bring nothing
                continue
            method = defenses.build(spec)
            seen += method_files(method)
            registered += files_of(method)
        except Exception:  # its own process will say what is wrong with it
            continue
    return seen, registered


def digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over names and values."""
    sha = hashlib.sha256()
    for name, value in sorted(weights.items()):
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def with_weights(subject: Subject, weights: Mapping[str, Tensor], name: str) -> Subject:
    """The same network with other weights, after the defense `name`."""
    model = models.load_weights(deepcopy(subject.model), weights).eval()
    return replace(
        subject, model=model, name=f"{subject.name} after {name}", digest=digest(weights)
    )


def as_given(subject: Subject, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that the subject's own file used."""
    front = subject.prefix
    own = {key: value for key, value in weights.items() if key.startswith(front)}
    return {key.removeprefix(front): value.contiguous() for key, value in own.items()}


def _built(model: str, data: Dataset) -> Classifier:
    try:
        return models.build(model, data.num_classes, data.shape, stream(0, "shell"))
    except ValueError as error:
        raise BadInput(f"{error}.") from None


def _is_ours(weights: Mapping[str, Tensor]) -> bool:
    """Whether the arena saved them: with the normalisation in front."""
    return any(key.startswith("body.") for key in weights)


def _filled(
    network: Classifier, weights: Mapping[str, Tensor], name: str
) -> tuple[Classifier, str]:
    """The network with these weights, and the prefix that their names do without.

    Where somebody's factory puts a normalisation in front of a published network, the file names
    the weights of that network alone. What it lacks then is what the factory made, if no training
    changes it; so is the normalisation of a network of the arena, and old files' count of batches.
    """
    if _is_ours(weights):
        return _checked(network, weights, name), ""
    own = network.state_dict()
    prefix = _prefix(own, weights)
    learned = {key for key, _ in network.named_parameters()}
    outer = [key for key in own if not key.startswith(prefix) and key not in learned]
    counts = [key for key in own if key.endswith(".num_batches_tracked")]
    kept = {key: own[key] for key in (*outer, *counts)}
    named = {f"{prefix}{key}": value for key, value in weights.items()}
    return _checked(network, kept | named, name), prefix


def _prefix(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """The shortest one with which all names of `weights` are names of `own`, else the body's."""
    last = max(weights, key=len)
    fronts = sorted((key.removesuffix(last) for key in own if key.endswith(f".{last}")), key=len)
    fitting = (front for front in fronts if all(f"{front}{key}" in own for key in weights))
    return next(fitting, "body.")


def _checked(network: Classifier, weights: Mapping[str, Tensor], name: str) -> Classifier:
    try:
        return models.load_weights(network, weights).eval()
    except ValueError as error:
        raise BadInput(f"{name}: {error}.") from None


def _of_pickle(file: Path, dataset: str | Dataset, data_dir: Path | None, trusted: bool) -> Subject:
    """A whole model, as TrojAI gives them."""
    whole = _trusted(file, trusted)
    file = Path(whole.removeprefix(foreign.PICKLE))
    data = _data(dataset, data_dir)
    network = foreign.build(whole, data.num_classes, data.shape)
    weights = network.state_dict()
    if bad := [name for name, value in weights.items() if not bool(value.isfinite().all())]:
        raise BadInput(f"{file.name}: weights have non-finite {bad[0]}.")
    name = file.parent.name if file.name == "model.pt" else file.name
    return _sound(Subject(network, data, name, digest(weights), prefix="body."))


def _trusted(file: Path, trusted: bool) -> str:
    """The foreign name of a pickled model: a folder with model.pt, or that file."""
    file = file / "model.pt" if file.is_dir() else file
    if not file.is_file():
        raise BadInput(f"There is no file {str(file)!r}.")
    if not trusted:
        raise BadInput(
            f"{str(file)!r} without --model is taken as a whole pickled model, which runs its "
            "maker's code when it is read: add --trust-pickle if you trust its source, or name its "
            "network with --model."
        )
    return f"{foreign.PICKLE}{file.resolve()}"


def _data(dataset: str | Dataset, data_dir: Path | None) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    return datasets.load(dataset, data_dir=data_dir)


def _absolute(model: str) -> str:
    """A factory's name by which a process in another folder finds it as well."""
    file, _, function = model.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{function}"
