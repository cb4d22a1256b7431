"""Decoded data sets on disk: written once, whole or not at all, then mapped into memory.

An entry is a folder of six .npy files (train, val, test; x and y) and a meta.json. Its name is a
digest of all that it was made from, so that an entry never goes stale. `CACHE/sha256` remembers
the digests of source files by path, size and time of change.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from arena.core.progress import report
from arena.data.catalogue import DataError

FORMAT = 1
SPLITS = ("train", "val", "test")
_log = logging.getLogger("arena")


@dataclass(frozen=True)
class Recipe:
    """What is to be written: shapes and labels up front, pixels as a stream."""

    classes: tuple[str, ...]
    source: str
    shape: tuple[int, int, int]  # (C, H, W)
    labels: Mapping[str, NDArray[np.int64]]  # of each of SPLITS
    blocks: Iterable[tuple[str, NDArray[np.uint8]]]  # (split, (n, C, H, W)): each split in order


@dataclass(frozen=True)
class Entry:
    """What was written, mapped copy-on-write: pixels are read when they are used."""

    classes: tuple[str, ...]
    source: str
    fingerprint: str
    arrays: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.int64]]]  # split -> (x, y)
    folder: Path  # with {split}_x.npy and {split}_y.npy in it


def directory(cache_dir: Path | str | None) -> Path:
    """The argument, else ARENA_CACHE_DIR, else the user's cache folder; made if need be."""
    given = cache_dir or os.environ.get("ARENA_CACHE_DIR")
    if not given:
        from platformdirs import user_cache_dir

        given = user_cache_dir("backdoor-arena")
    root = Path(given).expanduser()
    with _disk_errors(root):
        (root / "sha256").mkdir(parents=True, exist_ok=True)
    return root


def file_digests(files: Sequence[Path], root: Path) -> list[str]:
    """The sha256 (hex) of each file; read again only where a path, size or time has changed."""
    with _readable():
        stats = [(str(file.resolve()), file.stat()) for file in files]
    stamp = _digest([(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    memory = root / "sha256" / f"{stamp}.json"
    try:
        known = json.loads(memory.read_text())
        if len(known) == len(files) and all(len(digest) == 64 for digest in known):
            return [str(digest) for digest in known]
    except (OSError, ValueError, TypeError):
        pass
    digests = []
    for file in files:
        with _readable(), file.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    with _disk_errors(root):
        handle, name = tempfile.mkstemp(dir=memory.parent)
        with os.fdopen(handle, "w") as out:
            json.dump(digests, out)
        os.replace(name, memory)
    return digests


def load(root: Path, made_from: Any, name: str, make: Callable[[], Recipe]) -> Entry:
    """The entry made from `made_from` (anything JSON); `make` is called where there is none.

    Safe with several processes at once: one makes it, the others wait. An entry that is damaged
    is reported to the "arena" logger and made anew.
    """
    key = _digest([FORMAT, made_from])
    folder = root / key[:32]
    entry = _open(folder, name)
    if entry is None:
        with _disk_errors(root), FileLock(f"{folder}.lock"):
            entry = _open(folder, name, quiet=True)
            if entry is None:
                _write(folder, make(), name)
                entry = _open(folder, name)
    if entry is None:
        raise DataError(f"the cache {root} does not keep what is written to it")
    return entry


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _open(folder: Path, name: str, quiet: bool = False) -> Entry | None:
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for file, size in meta["sizes"].items():
            if (actual := (folder / file).stat().st_size) != size:
                raise ValueError(f"{file} has {actual} bytes instead of {size}")
        arrays = {
            split: (
                np.load(folder / f"{split}_x.npy", mmap_mode="c"),
                np.load(folder / f"{split}_y.npy"),
            )
            for split in SPLITS
        }
        return Entry(tuple(meta["classes"]), meta["source"], meta["fingerprint"], arrays, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if not quiet:
            _log.warning(
                "the cached copy of %s in %s is damaged (%s): made anew", name, folder, error
            )
        return None


def _write(folder: Path, recipe: Recipe, name: str) -> None:
    """Write beside the place, then rename; the caller holds the lock of `folder`."""
    for stale in folder.parent.glob(f"{folder.name}.tmp*"):  # whoever made these is gone
        shutil.rmtree(stale, ignore_errors=True)
    pixels = int(np.prod(recipe.shape))
    total = sum(len(y) for y in recipe.labels.values())
    free = shutil.disk_usage(folder.parent).free
    if free < total * pixels:
        raise _full(folder.parent, f"{name} needs {total * pixels / 1e6:.0f} MB")
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp", dir=folder.parent))
    try:
        digests = {split: hashlib.sha256() for split in SPLITS}
        outputs = {split: (temporary / f"{split}_x.npy").open("wb") for split in SPLITS}
        written = dict.fromkeys(SPLITS, 0)
        try:
            for split, out in outputs.items():
                shape = (len(recipe.labels[split]), *recipe.shape)
                np.lib.format.write_array_header_1_0(
                    out, {"descr": "|u1", "fortran_order": False, "shape": shape}
                )
            for split, x in recipe.blocks:
                block = np.ascontiguousarray(x)
                outputs[split].write(block.data)
                digests[split].update(block.data)
                written[split] += len(block)
                report(name, sum(written.values()), total)
            for out in outputs.values():
                out.flush()
                os.fsync(out.fileno())  # a crash must not leave a full-sized file of zeros
        finally:
            for out in outputs.values():
                out.close()
        if written != {split: len(recipe.labels[split]) for split in SPLITS}:
            raise DataError(f"{name} gave other numbers of images than of labels: {written}")
        for split in SPLITS:
            np.save(temporary / f"{split}_y.npy", recipe.labels[split])
        meta = {
            "name": name,
            "classes": recipe.classes,
            "source": recipe.source,
            "fingerprint": _fingerprint(recipe, digests),
            "sizes": {file.name: file.stat().st_size for file in sorted(temporary.iterdir())},
        }
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fingerprint(recipe: Recipe, digests: Mapping[str, Any]) -> str:
    """sha256 (hex) over pixels, labels and class count; class names and file names are not in."""
    whole = hashlib.sha256(f"classes={len(recipe.classes)}".encode())
    for split in SPLITS:
        y = np.ascontiguousarray(recipe.labels[split], dtype="<i8")
        whole.update(f";{split}={(len(y), *recipe.shape)};".encode())
        whole.update(digests[split].digest())
        whole.update(hashlib.sha256(y.data).digest())
    return whole.hexdigest()


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read ({error.strerror})") from error


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(root, "more is needed") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise DataError(
                f"the cache folder {root} cannot be written ({error.strerror}): "
                "set ARENA_CACHE_DIR to one that can"
            ) from error
        raise


def _full(root: Path, need: str) -> DataError:
    free = shutil.disk_usage(root).free
    return DataError(
        f"no room in the cache {root}: {need} and {free / 1e6:.0f} MB are free "
        "(set ARENA_CACHE_DIR to a folder on another disk)"
    )
