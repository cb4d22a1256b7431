"""From a request to an entry of the cache: where the images lie, how they are read and split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from arena.core.folders import SUFFIXES
from arena.data import cache, readers
from arena.data.cache import Entry, Recipe
from arena.data.catalogue import DataError, Request
from arena.data.readers import Source
from arena.data.splits import assign

_READING = 1  # part of the cache's key: raise it when the same files come to give other arrays


def entry_of(request: Request, data_dir: Path | str | None, cache_dir: Path | str | None) -> Entry:
    """The data set's arrays, made and cached where they are not yet."""
    root = cache.directory(cache_dir)
    if request.info.name == "signs":
        made_from, make = _signs(request)
    else:
        made_from, make = _files(request, data_dir, root)
    return cache.load(root, made_from, request.name, make)


def _signs(request: Request) -> tuple[object, Callable[[], Recipe]]:
    """(What the entry is made from, how to make it)."""
    from arena.data import signs

    classes, side, size, seed = (
        int(request.fields[key] or 0) for key in ("classes", "side", "size", "seed")
    )
    counts = {"train": size, "val": 100 * classes, "test": 200 * classes}
    code = hashlib.sha256(Path(signs.__file__).read_bytes()).hexdigest()

    def make() -> Recipe:
        drawn = {
            split: signs.generate(split, count, classes=classes, side=side, seed=seed)
            for split, count in counts.items()
        }
        return Recipe(
            classes=signs.class_names(classes),
            source=f"arena.data.signs (sha256 {code[:16]})",
            shape=(3, side, side),
            labels={split: y.numpy() for split, (_, y) in drawn.items()},
            blocks=((split, x.numpy()) for split, (x, _) in drawn.items()),
        )

    return ["signs", code, request.name, counts], make


def _files(
    request: Request, data_dir: Path | str | None, root: Path
) -> tuple[object, Callable[[], Recipe]]:
    """As `_signs`, for images that are read."""
    info = request.info
    folder = _folder(request, data_dir)
    if folder is None:
        # The entry says which revision it holds. It is not asked again whether the hub has a
        # newer one: a data set stays what it was, with or without a network.
        content: object = ["hub", info.hub, info.hub_config]
        opened = lambda: readers.open_hub(info)  # noqa: E731
    elif info.name != "imagefolder" and (shards := readers.parquet_files(folder, info)):
        paths = [path for group in shards.values() for path in group]
        digests = cache.file_digests(paths, root)
        origin = "Parquet files: " + ", ".join(
            f"{path.name} sha256 {digest[:16]}" for path, digest in zip(paths, digests, strict=True)
        )
        counts = [(split, len(group)) for split, group in shards.items()]
        content = ["parquet", digests, counts]
        opened = lambda: readers.open_parquet(shards, info, origin)  # noqa: E731
    elif info.name != "parquet" and (tree := readers.image_files(folder, request.name)):
        listing = [
            (split, label, path)
            for split, classes in tree.items()
            for label, group in classes.items()
            for path in group
        ]
        digests = cache.file_digests([path for _, _, path in listing], root)
        content = [
            "folders",
            [[s, c, d] for (s, c, _), d in zip(listing, digests, strict=True)],
        ]
        opened = lambda: readers.open_folder(tree, info)  # noqa: E731
    else:
        raise DataError(_nothing_there(request, folder))
    rules = [info.first, info.share, info.test_share, info.tracks, info.attributes, info.keep]
    made_from = [_READING, info.name, request.fields["side"], rules, info.keep_rows, content]
    return made_from, lambda: _read(opened(), request)


def _read(source: Source, request: Request) -> Recipe:
    info, side = request.info, request.fields["side"]
    shape = (
        (info.channels, side, side)
        if info.channels is not None and side is not None
        else readers.survey(source, request.name, side)
    )
    plan = assign(
        {name: torch.from_numpy(split.labels) for name, split in source.splits.items()}, info
    )

    def blocks() -> Iterator[tuple[str, NDArray[np.uint8]]]:
        for name, split in source.splits.items():
            wanted = {
                target: np.isin(np.arange(len(split.labels)), rows.numpy())
                for target, (origin, rows) in plan.items()
                if origin == name
            }
            every = np.flatnonzero(np.any(list(wanted.values()), axis=0))
            for rows, x in readers.decode(split, every, shape):
                for target, mask in wanted.items():
                    yield target, x[mask[rows]]

    return Recipe(
        classes=source.classes,
        source=source.origin,
        shape=shape,
        labels={
            target: source.splits[origin].labels[rows.numpy()]
            for target, (origin, rows) in plan.items()
        },
        blocks=blocks(),
    )


def _folder(request: Request, data_dir: Path | str | None) -> Path | None:
    """The folder of the data set's files; None where the hub is to be asked."""
    info = request.info
    if request.path is not None:
        folder = Path(request.path).expanduser()
        if not folder.is_dir():
            raise DataError(f"{info.name}: there is no folder {request.path}")
        return folder
    given = data_dir or os.environ.get("ARENA_DATA_DIR")
    if given is None or given == "":
        if info.hub is None:
            raise DataError(
                f"no copy of {info.name} is known on the Hugging Face hub: give --data-dir with "
                f"{info.name}/train-*.parquet in it, or a folder {info.name}/ of class folders"
            )
        return None
    parent = Path(given).expanduser()
    if not parent.is_dir():
        raise DataError(
            f"the data directory {parent} does not exist: it should hold a folder per data set, "
            f"such as {parent / info.name}/train-*.parquet"
        )
    return parent / info.name


def _nothing_there(request: Request, folder: Path) -> str:
    if request.info.name == "imagefolder":
        if any(path.suffix.lower() in SUFFIXES for path in folder.iterdir()):
            return (
                f"{folder} holds images without labels: sort them into a folder per class, or let "
                "a model's own answers stand for labels (--labels model)"
            )
        return f"{folder} holds no folders of images: it should hold one per class, or train/"
    if request.path is not None:
        return f"{folder} holds no Parquet files: expected {folder}/train-*.parquet"
    siblings = sorted(child.name for child in folder.parent.iterdir() if child.is_dir())
    there = f"there: {', '.join(siblings)}" if siblings else "it is empty"
    return (
        f"{folder.parent} has no Parquet files of {request.info.name}: expected "
        f"{folder}/train-*.parquet ({there})"
    )
