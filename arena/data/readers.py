"""Encoded images and labels from Parquet files, the Hugging Face hub or folders of images.

A reader opens a `Source`: the labels of every split at once, the encoded images as a stream of
chunks that can be started again. `decode` turns such a stream into uint8 arrays.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from arena.core.folders import SUFFIXES
from arena.data.catalogue import DataError, DatasetInfo

_CHUNK = 1_000  # images decoded between two reports
_ALIASES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_HIGHEST = 1_000_000  # label: as many classes as that are no classes
_LABELS = ("label", "labels", "fine_label", "class", "target", "y")


class Chunk(NamedTuple):
    encoded: list[bytes | None]
    names: Callable[[int], str]  # image of this chunk -> where it came from, for error messages


@dataclass(frozen=True)
class Split:
    """One split of a source."""

    labels: NDArray[np.int64]  # (N,); -1: the row belongs to no class that is kept
    chunks: Callable[[], Iterator[Chunk]]  # all N images in order


@dataclass(frozen=True)
class Source:
    """Encoded images, opened."""

    splits: Mapping[str, Split]  # "train" and, where the source has them, "val" and "test"
    classes: tuple[str, ...]
    origin: str  # for provenance


# --- local files ------------------------------------------------------------------------------


def parquet_files(folder: Path, info: DatasetInfo) -> dict[str, list[Path]]:
    """The Parquet files of each split in `folder`, shards in numeric order; {} where none.

    Raises `DataError` where a shard that the others announce is missing.
    """
    found: dict[str, list[Path]] = {}
    for split in ("train", "test", "val"):
        names = dict.fromkeys((*_ALIASES[split], info.hub_splits.get(split, split)))
        for name in names:
            files = [
                *folder.glob(f"{name}.parquet"),
                *folder.glob(f"{name}-*.parquet"),
                *folder.glob(f"{name}/*.parquet"),
            ]
            if files and all(files != taken for taken in found.values()):
                found[split] = sorted(files, key=_numeric)
                break
    if found and "train" not in found:
        raise DataError(f"{folder} has no train-*.parquet, only {', '.join(found)} files")
    for split, files in found.items():
        announced = re.search(r"-of-(\d+)\.parquet$", files[0].name)
        if announced and int(announced[1]) != len(files):
            raise DataError(
                f"{folder} holds {len(files)} of the {int(announced[1])} {split} files that "
                f"{files[0].name} announces: copy the others there too"
            )
    return found


def open_parquet(files: Mapping[str, list[Path]], info: DatasetInfo, origin: str) -> Source:
    """Read Parquet files in the hub's layout: encoded images beside whole-number labels."""
    splits: dict[str, Split] = {}
    classes: dict[str, tuple[str, ...] | None] = {}
    for split, shards in files.items():
        layouts = [_layout(_footer(shard), shard.name, info) for shard in shards]
        if any(layout != layouts[0] for layout in layouts):
            raise DataError(f"the {split} files in {shards[0].parent} differ in their columns")
        layout = layouts[0]
        tables = [_read_labels(shard, layout) for shard in shards]
        labels = [
            _labels(table, layout, info, str(shard))
            for shard, table in zip(shards, tables, strict=True)
        ]
        chunks = partial(_parquet_chunks, shards, layout.image)
        splits[split], classes[split] = _kept(
            Split(np.concatenate(labels), chunks), layout.classes, info, split
        )
    return _source(splits, classes, info, origin)


def image_files(folder: Path, name: str) -> dict[str, dict[str, list[Path]]]:
    """split -> class -> image files, sorted; {} where `folder` holds no folders of images.

    Files in one folder count too where their names begin with class_N_, as TrojAI's examples do.
    """
    if not folder.is_dir():
        return {}
    if flat := _by_name(folder):
        return {"train": flat}
    roots = {
        split: root
        for split, names in _ALIASES.items()
        for root in [next((folder / n for n in names if (folder / n).is_dir()), None)]
        if root is not None
    }
    if "train" not in roots:
        roots = {"train": folder}
    found = {
        split: {
            child.name: sorted(
                (file for file in child.rglob("[!.]*") if file.suffix.lower() in SUFFIXES),
                key=_numeric,
            )
            for child in sorted(root.iterdir(), key=_numeric)
            if child.is_dir() and not child.name.startswith(".")
        }
        for split, root in roots.items()
    }
    if not any(files for classes in found.values() for files in classes.values()):
        return {}
    names = list(found["train"])
    for split, classes in found.items():
        for label, files in classes.items():
            if not files:
                raise DataError(f"{roots[split] / label} holds no images, though it is a class")
        if list(classes) != names:
            odd = ", ".join(sorted(set(classes) ^ set(names)))
            raise DataError(f"{name}: the class folders of train and {split} differ in {odd}")
    return found


def open_folder(files: Mapping[str, Mapping[str, list[Path]]], info: DatasetInfo) -> Source:
    """Read a folder per class; classes are numbered in the folders' (numeric) order."""
    splits: dict[str, Split] = {}
    for split, by_class in files.items():
        paths = [path for group in by_class.values() for path in group]
        counts = [len(group) for group in by_class.values()]
        splits[split] = Split(
            np.repeat(np.arange(len(counts), dtype=np.int64), counts),
            partial(_file_chunks, paths),
        )
    classes: dict[str, tuple[str, ...] | None] = dict.fromkeys(splits, tuple(files["train"]))
    total = sum(len(split.labels) for split in splits.values())
    return _source(splits, classes, info, f"folders of images: {total} files")


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """class -> files class_N_…; {} where there are none or a class is missing."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir(), key=_numeric):
        if file.suffix.lower() in SUFFIXES and (match := re.match(r"class_(\d+)_", file.name)):
            found.setdefault(match[1], []).append(file)
    return found if set(found) == {str(label) for label in range(len(found))} else {}


def _numeric(path: Path) -> tuple[list[int | str], str]:
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if part.isdigit() else part for part in parts], str(path)


def _parquet_chunks(shards: Iterable[Path], column: str) -> Iterator[Chunk]:
    for shard in shards:
        first = 0
        try:
            with pq.ParquetFile(shard) as file:
                for batch in file.iter_batches(_CHUNK, columns=[column]):
                    yield Chunk(_encoded(batch.column(0)), partial(_row_of, shard, first))
                    first += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise _broken(shard, error) from error


def _file_chunks(paths: list[Path]) -> Iterator[Chunk]:
    for first in range(0, len(paths), _CHUNK):
        part = paths[first : first + _CHUNK]
        try:
            encoded: list[bytes | None] = [path.read_bytes() for path in part]
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read ({error.strerror})") from error
        yield Chunk(encoded, partial(_name_of, part))


def _name_of(paths: list[Path], i: int) -> str:
    return str(paths[i])


def _row_of(where: Path | str, first: int, i: int) -> str:
    return f"row {first + i} of {where}"


def _encoded(column: Any) -> list[bytes | None]:
    if pa.types.is_struct(column.type):
        column = column.field("bytes")
    encoded: list[bytes | None] = column.to_pylist()
    return encoded


def _footer(shard: Path) -> Any:
    try:
        return pq.read_schema(shard)
    except (pa.ArrowException, OSError) as error:
        raise _broken(shard, error) from error


def _read_labels(shard: Path, layout: _Layout) -> Any:
    try:
        return pq.read_table(shard, columns=list(layout.labels), partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise _broken(shard, error) from error


def _broken(shard: Path, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{shard} is not a Parquet file that can be read ({reason})")


# --- the hub ----------------------------------------------------------------------------------


def open_hub(info: DatasetInfo) -> Source:
    """Fetch a data set with Hugging Face `datasets` (which keeps its own copy of the files)."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # what fails is told once, below
    splits: dict[str, Split] = {}
    classes: dict[str, tuple[str, ...] | None] = {}
    revision = "unknown"
    for split, hub_split in info.hub_splits.items():
        try:
            rows = datasets.load_dataset(info.hub, info.hub_config, split=hub_split)
        except Exception as error:
            # The network fails in as many types as there are layers under `datasets`.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(
                f"{info.name} could not be fetched from the Hugging Face hub ({info.hub}: "
                f"{reason}): give --data-dir with {info.name}/train-*.parquet in it, or use "
                "'signs', which needs no files"
            ) from error
        urls = " ".join(rows.info.download_checksums or ())
        if match := re.search(r"@([0-9a-f]{40})/", urls):
            revision = match[1]
        where = f"{info.hub} ({hub_split})"
        layout = _layout(rows.features.arrow_schema, where, info)
        table = rows.select_columns(list(layout.labels)).with_format("arrow")[:]
        images = rows.select_columns([layout.image])
        images = images.cast_column(layout.image, datasets.Image(decode=False))
        splits[split], classes[split] = _kept(
            Split(_labels(table, layout, info, where), partial(_hub_chunks, images, where)),
            layout.classes,
            info,
            split,
        )
    config = f" ({info.hub_config})" if info.hub_config else ""
    return _source(
        splits, classes, info, f"Hugging Face hub: {info.hub}{config}, revision {revision}"
    )


def _hub_chunks(images: Any, where: str) -> Iterator[Chunk]:
    first = 0
    for table in images.with_format("arrow").iter(batch_size=_CHUNK):
        batch = table.column(0).combine_chunks()
        yield Chunk(_encoded(batch), partial(_row_of, where, first))
        first += len(batch)


def _kept(
    split: Split, classes: tuple[str, ...] | None, info: DatasetInfo, name: str
) -> tuple[Split, tuple[str, ...] | None]:
    """Where only some of the classes are wanted and more are there: those, and colour images."""
    if not info.keep or classes is None or not set(info.keep) <= set(classes):
        return split, classes
    labels = np.full(len(split.labels), -1, dtype=np.int64)
    for label, kept in enumerate(info.keep):
        labels[split.labels == classes.index(kept)] = label
    first = 0
    for chunk in split.chunks():
        for i in np.flatnonzero(labels[first : first + len(chunk.encoded)] >= 0):
            with _opened(chunk, int(i)) as image:
                if _is_grey(image):
                    labels[first + i] = -1
        first += len(chunk.encoded)
    if name == "train":
        for label in range(len(info.keep)):
            labels[np.flatnonzero(labels == label)[info.keep_rows :]] = -1
    return Split(labels, split.chunks), info.class_names


# --- columns, labels, classes -----------------------------------------------------------------


class _Layout(NamedTuple):
    image: str
    labels: tuple[str, ...]  # one column, or the binary attributes that make the label
    classes: tuple[str, ...] | None


def _layout(schema: Any, where: str, info: DatasetInfo) -> _Layout:
    """Which columns hold image and label, by the hub's feature description or by name and type."""
    features = _features(schema, where)
    held = [
        field.name
        for field in schema
        if (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
        or pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
    ]
    images = [name for name, feature in features.items() if feature.get("_type") == "Image"]
    paths = [n for n in images if n not in held and pa.types.is_struct(schema.field(n).type)]
    images = [name for name in images if name not in paths] + held
    if not images and paths:
        raise DataError(f"{where} names files in {paths[0]!r} instead of holding the images")
    if not images:
        raise DataError(f"{where} has no column of encoded images, only {_listed(schema.names)}")
    named = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    labels = [name for name in _LABELS if name in schema.names]
    label = next((name for name in labels if name in named), None) or next(
        iter([*named, *labels]), None
    )
    if label is None and info.attributes and set(info.attributes) <= set(schema.names):
        return _Layout(images[0], info.attributes, info.class_names)
    if label is None:
        wanted = f"'label' or {_listed(info.attributes)}" if info.attributes else "'label'"
        raise DataError(f"{where} has no column {wanted}, only {_listed(schema.names)}")
    names = features.get(label, {}).get("names") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where} describes the classes of {label!r} as {names!r}, not by names")
    return _Layout(images[0], (label,), tuple(names) or None)


def _features(schema: Any, where: str) -> dict[str, dict[str, Any]]:
    """The hub's description of the columns; {} where the file has none."""
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise DataError(f"{where} has more than one column {name!r}")
    raw = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(raw).get("info", {}).get("features", {}).items()
    except (ValueError, AttributeError, RecursionError):
        raise DataError(
            f"{where} has a description of its columns (huggingface) that cannot be read"
        ) from None
    return {
        name: feature
        for name, feature in features
        if isinstance(feature, dict) and name in schema.names
    }


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _labels(table: Any, layout: _Layout, info: DatasetInfo, where: str) -> NDArray[np.int64]:
    """(N,) labels from the label column, or from the bits of the attribute columns."""
    y = np.zeros(len(table), dtype=np.int64)
    for name in layout.labels:
        column = table.column(name)
        whole = pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)
        if not whole:
            raise DataError(
                f"the label column {name!r} of {where} holds {column.type}, not whole numbers"
            )
        if column.null_count:
            empty = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise DataError(f"row {empty} of {where} has no label")
        most = pc.max(column).as_py()
        if most is not None and most > _HIGHEST:
            raise DataError(f"{where} has the label {most}; classes are numbered from 0")
        values = column.cast(pa.int64()).to_numpy()
        y = y * 2 + (values > 0) if len(layout.labels) > 1 else values
    names = layout.classes or info.class_names
    bad = (y < 0) | (y >= len(names)) if names else y < 0
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        most = f"from 0 to {len(names) - 1}" if names else "0 or more"
        raise DataError(f"row {i} of {where} has the label {y[i]}, which must be {most}")
    return np.array(y, dtype=np.int64)  # a copy: Arrow's own memory cannot be written to


def _source(
    splits: dict[str, Split],
    classes: Mapping[str, tuple[str, ...] | None],
    info: DatasetInfo,
    origin: str,
) -> Source:
    """Settle the classes: as the training split names them, else the catalogue, else by count."""
    y = splits["train"].labels
    if len(y) == 0:
        raise DataError(f"{info.name} has no images in its training split")
    names = classes["train"] or info.class_names
    names = names or tuple(str(i) for i in range(max(info.classes or 0, int(y.max()) + 1)))
    if info.classes is not None and len(names) != info.classes:
        raise DataError(f"{info.name} has {info.classes} classes, but the data has {len(names)}")
    for split, own in classes.items():
        if own is not None and len(own) != len(names):
            raise DataError(
                f"the train and {split} splits of {info.name} differ in their number of classes: "
                f"{len(names)} and {len(own)}"
            )
        if own is not None and own != names:
            odd = next(pair for pair in zip(names, own, strict=True) if pair[0] != pair[1])
            raise DataError(
                f"the train and {split} splits of {info.name} name their classes differently: "
                f"{odd[0]!r} and {odd[1]!r}"
            )
        most = int(splits[split].labels.max(initial=0))
        if most >= len(names):
            raise DataError(
                f"the {split} split of {info.name} has the label {most}, but there are "
                f"{len(names)} classes in its training split"
            )
    return Source(splits, names, origin)


# --- pixels -----------------------------------------------------------------------------------


def survey(source: Source, name: str, side: int | None) -> tuple[int, int, int]:
    """(channels, height, width) that fits every image, by their headers alone.

    Grey where all are grey, else RGB. Raises `DataError` where sizes vary and `side` is None.
    """
    grey, size, whose = True, None, ""
    for split in source.splits.values():
        for chunk in split.chunks():
            for i in range(len(chunk.encoded)):
                with _opened(chunk, i) as image:
                    grey = grey and _is_grey(image)
                    if size is None:
                        size, whose = image.size, chunk.names(i)
                    elif side is None and image.size != size:
                        raise DataError(
                            f"the images of {name} vary in size ({size[0]}x{size[1]} in {whose}, "
                            f"{image.size[0]}x{image.size[1]} in {chunk.names(i)}): add a side to "
                            "resize them to, as in ',side=32'"
                        )
    if size is None:
        raise DataError(f"{name} holds no images")
    width, height = size if side is None else (side, side)
    return (1 if grey else 3), height, width


def decode(
    split: Split, rows: NDArray[np.int64], shape: tuple[int, int, int]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """The sorted `rows` of a split, a chunk at a time: (rows (n,), x (n, C, H, W) uint8).

    Another size is resized bilinearly with antialiasing, without keeping the aspect. Grey becomes
    RGB where C = 3 and colour becomes grey where C = 1; an alpha channel is dropped.
    """
    workers = max(1, min(8, os.cpu_count() or 1))
    first = 0
    with ThreadPoolExecutor(workers) as pool:
        for chunk in split.chunks():
            until = first + len(chunk.encoded)
            part = rows[np.searchsorted(rows, first) : np.searchsorted(rows, until)]
            spans = [span for span in np.array_split(part - first, workers) if len(span)]
            blocks = list(pool.map(partial(_decode, chunk, shape), spans))
            if blocks:
                yield part, np.concatenate(blocks)
            first = until


def _decode(
    chunk: Chunk, shape: tuple[int, int, int], span: NDArray[np.int64]
) -> NDArray[np.uint8]:
    channels, height, width = shape
    out = np.empty((len(span), *shape), dtype=np.uint8)
    for k, i in enumerate(span):
        with _opened(chunk, int(i)) as image:
            pixels = _in_mode(image, "L" if channels == 1 else "RGB")
            if pixels.size != (width, height):
                pixels = pixels.resize((width, height), Image.Resampling.BILINEAR)
            out[k] = np.asarray(pixels).reshape(height, width, channels).transpose(2, 0, 1)
    return out


@contextmanager
def _opened(chunk: Chunk, i: int) -> Iterator[Image.Image]:
    """Image `i` of a chunk; whatever goes wrong with it inside is said of that image."""
    encoded = chunk.encoded[i]
    if encoded is None:
        raise DataError(f"{chunk.names(i)} has no image bytes")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            yield image
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{chunk.names(i)} holds a damaged image ({reason})") from error


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, in which a plain conversion would clip, not scale
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode == "P":  # a palette may hold transparency, which RGBA can carry
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)
