"""Data sets as uint8 tensors: one call, whatever the images come from.

Importing this package and reading the catalogue is cheap; torch, pyarrow, Pillow and `datasets`
are imported by the first `load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arena.data.catalogue import DataError, DatasetInfo, describe, parse

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from arena.core.contracts import Images

__all__ = ["DataError", "Dataset", "DatasetInfo", "describe", "draw_clean", "load"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits of labelled images: x uint8 (N, C, H, W) in [0, 255], y int64 (N,)."""

    name: str  # the canonical spec, such as "signs:classes=10,side=32,size=8000,seed=0"
    train: Images
    val: Images
    test: Images
    classes: tuple[str, ...]
    fingerprint: str  # sha256 (hex) over pixels, labels and class count
    source: str  # where it came from
    files: Mapping[str, Mapping[str, str]]  # split -> {"x": file, "y": file}: the mapped .npy files

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.x.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def counts(self) -> tuple[int, ...]:
        """Training images of each class."""
        return tuple(self.train.y.bincount(minlength=self.num_classes).tolist())


def load(
    spec: str, *, data_dir: Path | str | None = None, cache_dir: Path | str | None = None
) -> Dataset:
    """Load a data set by its spec (see `describe` and `arena.data.catalogue`).

    Args:
        spec: such as "cifar10", "gtsrb:side=48", "signs:classes=20" or "imagefolder:PATH,side=64".
        data_dir: a folder with one folder per data set, of Parquet files as on the Hugging Face
            hub (``DIR/cifar10/train-*.parquet``) or of class folders; else ARENA_DATA_DIR; where
            neither is given, the hub is asked.
        cache_dir: where decoded images are kept; else ARENA_CACHE_DIR, else the user's cache
            folder.

    Returns:
        Pixels mapped from the cache, read from disk when used; changing them changes no file.

    Raises:
        DataError: (a ValueError) one sentence that names the culprit.
    """
    import torch

    from arena.core.contracts import Images
    from arena.data.loading import entry_of

    request = parse(spec)
    entry = entry_of(request, data_dir, cache_dir)
    splits = {
        split: Images(torch.from_numpy(x), torch.from_numpy(y))
        for split, (x, y) in entry.arrays.items()
    }
    return Dataset(
        name=request.name,
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        classes=entry.classes,
        fingerprint=entry.fingerprint,
        source=entry.source,
        files={
            split: {part: str(entry.folder / f"{split}_{part}.npy") for part in ("x", "y")}
            for split in splits
        },
    )


def draw_clean(y: Tensor, share: float, rng: Generator, exclude: Tensor | None = None) -> Tensor:
    """The defender's clean images: (K,) int64 sorted rows of the training set.

    Args:
        y: (N,) int64 labels of the whole training set.
        share: in (0, 1]; K = round(share * N). 1: all rows that are not excluded.
        rng: the same seed with another `exclude` draws as nearly the same rows as can be.
        exclude: (P,) int64 rows, or a (N,) bool mask: the poisoned rows, which are never drawn.

    Rows are drawn in the proportions of the classes by largest remainder, at least one of every
    class that has a row left (where K allows).

    Raises:
        ValueError: the share is out of range, comes to no image, or to more than are clean.
    """
    from arena.data.splits import draw_rows

    if not 0 < share <= 1:
        raise ValueError(f"the share of clean images must be in (0, 1], got {share}")
    return draw_rows(y, None if share == 1 else round(share * len(y)), rng, exclude)
