"""Folders of images without labels, as users of a downloaded model have them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arena.core.contracts import Images
from arena.core.folders import SUFFIXES
from arena.data import Dataset, readers
from arena.data.catalogue import parse
from arena.data.splits import assign


def holds(spec: str) -> bool:
    """Whether `spec`, "imagefolder:PATH" with fields, names a folder of images none of which is
    labelled by its folder's or its own name."""
    request = parse(spec)
    folder = Path(request.path or "").expanduser()
    if request.info.name != "imagefolder" or not folder.is_dir():
        return False
    return bool(_files(folder)) and not readers.image_files(folder, request.name)


def read(spec: str) -> Tensor:
    """All images of such a folder, in the order of their names: uint8 (N, C, H, W).

    Raises DataError where one cannot be read, and where sizes vary and `spec` has no side.
    """
    request = parse(spec)
    files = _files(Path(request.path or "").expanduser())
    source = readers.open_folder({"train": {"unlabelled": files}}, request.info)
    shape = readers.survey(source, request.name, request.fields["side"])
    rows = np.arange(len(files), dtype=np.int64)
    blocks = [x for _, x in readers.decode(source.splits["train"], rows, shape)]
    return torch.from_numpy(np.concatenate(blocks))


def labelled(spec: str, x: Tensor, y: Tensor, classes: int) -> Dataset:
    """The images as a data set, split as a folder of labelled ones would be.

    x: uint8 (N, C, H, W); y: int64 (N,) in [0, classes). Raises DataError for too few images.
    """
    request = parse(spec)
    whole = Images(x, y)
    rows_of = {name: rows for name, (_, rows) in assign({"train": y}, request.info).items()}
    content = hashlib.sha256(f"classes={classes};{tuple(x.shape)}".encode())
    content.update(x.numpy().tobytes())
    content.update(y.numpy().tobytes())
    return Dataset(
        name=request.name,
        **{name: whole.take(rows) for name, rows in rows_of.items()},
        classes=tuple(str(label) for label in range(classes)),
        fingerprint=content.hexdigest(),
        source=f"{len(x)} images without labels",
        files={},
    )


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))
