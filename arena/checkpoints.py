"""Weights out of the files that people publish; nothing in them is executed.

Published checkpoints are seldom plain tensors: they hold numpy numbers, parsed arguments, whole
data sets, or the pickled model itself. torch's restricted unpickler refuses such files altogether.
Here it reads them with an empty stand-in for every class and function that it does not know, so
that the tensors are there and nothing else is. A pickled model's weights are then those that its
parts were saved with.
"""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2's names, as torch maps them
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from arena.core.registry import BadInput
from arena.store import load_tensors

# what weights are usually under; netC: the classifier beside a trigger's generators
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "netC")
_PREFIXES = ("module.", "_orig_mod.")  # of data parallel and of compiled networks
_OLD_PICKLES = 4  # in front of the numbers in a file of torch before 1.6


class _StandIn:
    """What every unknown class and function becomes: it takes anything and does nothing."""

    said: Any = None  # what the pickle says of the object

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        self.said = state


def read_weights(file: Path) -> dict[str, Tensor]:
    """Named tensors of a checkpoint: safetensors, or torch's format, or a folder with a model.pt of
    that. Raises BadInput.

    They may be under a usual name (state_dict, model, net, netC …), under the only name that has
    any, or those of a pickled model, whose code is not needed. Prefixes that data parallel and
    compiled networks put in front are taken away.
    """
    file = file / "model.pt" if file.is_dir() else file  # as TrojAI's are
    if not file.is_file():
        raise BadInput(f"There is no file {str(file)!r}.")
    try:
        ours = file.suffix == ".safetensors"
        content = load_tensors(file) if ours else _restricted(file)
        found, several = _weights(content), {}
        if not found and isinstance(content, Mapping):
            several = {str(name): w for name, value in content.items() if (w := _weights(value))}
            found = next(iter(several.values())) if len(several) == 1 else {}
    except Exception as error:  # whatever a damaged or hostile file does to its reader
        raise BadInput(
            f"{str(file)!r} cannot be read as plain tensors; save the model's state_dict() with "
            "torch.save or as safetensors."
        ) from error
    if not found:
        more = f"; there are some under each of {', '.join(several)}" if several else ""
        raise BadInput(f"{str(file)!r} holds no state_dict: named tensors are wanted{more}.")
    return {_shortened(str(name)): value for name, value in found.items()}


def _weights(found: Any) -> Mapping[Any, Tensor]:
    """`found` itself, those under a usual name in it, or a pickled model's; empty if none."""
    if isinstance(found, _StandIn):
        return dict(_parts(found))
    if not isinstance(found, Mapping):
        return {}
    if all(isinstance(value, Tensor) for value in found.values()):
        return found
    inside = (_weights(found[name]) for name in _WRAPPERS if name in found)
    return next((weights for weights in inside if weights), {})


def _parts(module: _StandIn, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """A pickled module's parameters and buffers, as its state_dict() names them."""
    said = module.said if isinstance(module.said, Mapping) else {}
    passing = said.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in (said.get(kind) or {}).items():
            if isinstance(value, Tensor) and name not in passing:
                yield f"{prefix}{name}", value
    for name, part in (said.get("_modules") or {}).items():
        if isinstance(part, _StandIn):
            yield from _parts(part, f"{prefix}{name}.")


def _shortened(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _restricted(file: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of formats: what cannot be read is told in a sentence
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # it names what torch does not know
            with safe_globals([(_StandIn, name) for name in _named(file)]):
                return torch.load(file, map_location="cpu", weights_only=True)


def _named(file: Path) -> set[str]:
    """The classes and functions that a checkpoint's pickles name. None of them is imported."""
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            return {name for _ in range(_OLD_PICKLES) for name in _globals(stream)}
    with zipfile.ZipFile(file) as archive:
        inside = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(inside) as stream:
            return set(_globals(stream))


def _globals(stream: IO[bytes]) -> Iterator[str]:
    """Of the pickle at the stream's place, to its end."""
    for code, argument, _ in pickletools.genops(stream):
        if code.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            module, name = NAME_MAPPING.get((module, name), (module, name))
            yield f"{IMPORT_MAPPING.get(module, module)}.{name}"
