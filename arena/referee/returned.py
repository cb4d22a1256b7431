"""What methods give back: tensors in plain files, checked before anybody believes them.

A file may be a link to somewhere else, a pipe that never ends, or larger than any disk; weights may
be those of another network, or no numbers. Each is said in one sentence, as Failed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from arena.data import Dataset
from arena.referee.isolate import Failed
from arena.referee.sandbox import size

Shapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
HEADER = 2**22  # bytes that names and shapes may take
_MOST_TENSORS = 10_000


def tensors(folder: Path, part: str, most: int) -> dict[str, Tensor]:
    """The tensors of FOLDER/PART.safetensors, of at most `most` bytes. Raises Failed."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    name = f"{part}.safetensors"
    content = _content(folder / name, most + HEADER)
    try:
        found = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise Failed("failed", f"it gave back a {name} that is none") from error
    if len(found) > _MOST_TENSORS:
        raise Failed("failed", f"it gave back more than {_MOST_TENSORS} tensors in {name}")
    return dict(found)


def _content(path: Path, most: int) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        number = os.open(path, flags)
    except OSError as error:
        why = {
            errno.ENOENT: f"it gave back no {path.name}",
            errno.ELOOP: f"it gave back a link in place of {path.name}",
            errno.EMLINK: f"it gave back a link in place of {path.name}",
        }.get(error.errno or 0, f"it gave back no plain file in place of {path.name}")
        raise Failed("failed", why) from error
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode):
        os.close(number)
        raise Failed("failed", f"it gave back no plain file in place of {path.name}")
    with os.fdopen(number, "rb") as stream:
        if found.st_size > most:
            raise Failed(
                "failed",
                f"it gave back a {path.name} of {size(found.st_size)}, where at most {size(most)} "
                "are expected",
            )
        return stream.read(most)


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(value.shape), value.dtype) for name, value in state.items()}


def weights(folder: Path, expected: Shapes) -> dict[str, Tensor]:
    """The weights that a job wrote for a network with tensors of the shapes `expected`.

    Raises Failed."""
    sizes = (torch.Size(shape).numel() * kind.itemsize for shape, kind in expected.values())
    found = tensors(folder, "weights", sum(sizes))
    lacking, surplus = sorted(expected.keys() - found), sorted(found.keys() - expected.keys())
    if lacking or surplus:
        what = f"{lacking[0]} is missing" if lacking else f"{surplus[0][:100]!r} is not in it"
        raise Failed("failed", f"it gave back the weights of another architecture: {what}")
    for name, (shape, kind) in expected.items():
        value = found[name]
        if tuple(value.shape) != shape:
            raise Failed(
                "failed",
                f"it gave back {name} of the shape {tuple(value.shape)} instead of {shape}",
            )
        if value.dtype != kind:
            raise Failed("failed", f"it gave back {name} as {_name(value.dtype)} not {_name(kind)}")
        if not bool(torch.isfinite(value).all()):
            raise Failed("failed", f"it gave back weights with non-finite values in {name}")
    return found


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def poisoned(folder: Path, data: Dataset) -> dict[str, Tensor]:
    """The poisoned training images: rows (K,), x (K, C, H, W) uint8, y (K,). Raises Failed."""
    most = 2 * (data.train.x.numel() + 16 * len(data.train))
    found = tensors(folder, "poisoned", most)
    good = found.keys() == {"rows", "x", "y"}
    if good:
        rows, x, y = found["rows"], found["x"], found["y"]
        good = rows.dtype == y.dtype == torch.int64 and x.dtype == torch.uint8
        good = good and rows.shape == y.shape == (len(x),) and tuple(x.shape[1:]) == data.shape
        good = good and (not len(x) or 0 <= int(y.min()) <= int(y.max()) < data.num_classes)
    if not good:
        raise Failed("failed", "it gave back poisoned images that do not fit the data set")
    return found


def triggered(folder: Path, data: Dataset) -> dict[str, Tensor]:
    """The test images with the trigger: x (N, C, H, W) uint8. Raises Failed."""
    test = data.test.x
    found = tensors(folder, "triggered", test.numel())
    x = found.get("x")
    if x is None or len(found) > 1 or x.shape != test.shape or x.dtype != torch.uint8:
        raise Failed("failed", "it gave back triggered images that do not fit the test set")
    return found
