"""Pictures that a user keeps in a folder: image files, and rows of Parquet files as the Hugging
Face hub has them. Pillow and pyarrow are imported when one is read."""

from __future__ import annotations

import hashlib
import io
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arena.core.registry import BadInput

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Place(NamedTuple):
    """Where a picture lies: a file, or a row of a Parquet file."""

    path: Path
    row: int  # -1: the file itself


def places(folder: str) -> list[Place]:
    """The pictures below a folder, and those inside its Parquet files, in a fixed order.

    Raises BadInput where there are none, and for a Parquet file without a column of pictures.
    """
    found: list[Place] = []
    for path in sorted(Path(folder).expanduser().rglob("[!.]*")):
        if not path.is_file():
            continue
        if path.suffix.lower() in SUFFIXES:
            found.append(Place(path, -1))
        elif path.suffix.lower() == ".parquet":
            found += (Place(path, row) for row in range(_table(path)[0].metadata.num_rows))
    if not found:
        raise BadInput(
            f"the folder {folder!r} holds no pictures; it needs image files "
            f"({', '.join(SUFFIXES)}) or Parquet files with a column of encoded images."
        )
    return found


def digest(folder: str) -> str:
    """sha256 (hex) over the names and contents of the files that `places` finds pictures in."""
    root, found = Path(folder).expanduser(), hashlib.sha256()
    for path in sorted({place.path for place in places(folder)}):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        found.update(f"{path.relative_to(root)} {content}\n".encode())
    return found.hexdigest()


def read(place: Place, channels: int, height: int, width: int) -> Tensor:
    """A picture as (channels, height, width) float32 in [0, 1], stretched to fit, antialiased
    (Pillow's Lanczos).

    channels: 3 (RGB) or 1 (its luminance). Raises BadInput where it is no picture of 8 bits.
    """
    from PIL import Image

    name = str(place.path) if place.row < 0 else f"row {place.row} of {place.path}"
    try:
        data = place.path.read_bytes() if place.row < 0 else _row(place)
        with Image.open(io.BytesIO(data)) as picture:
            if picture.mode.startswith(("I", "F")):
                raise BadInput(f"{name} has more than 8 bits per channel; save it with 8.")
            size = (width, height)
            image = picture.convert("RGB" if channels == 3 else "L")
            image = image.resize(size, Image.Resampling.LANCZOS)
    except BadInput:
        raise
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as problem:
        raise BadInput(f"{name} cannot be read as a picture: {problem}.") from None
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(height, width, channels).permute(2, 0, 1).float() / 255


def _table(path: Path) -> tuple[Any, str]:
    """An opened Parquet file and its column of encoded pictures."""
    return _opened(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _opened(path: Path, changed: int) -> tuple[Any, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise BadInput(f"{str(path)!r} cannot be read as a Parquet file: {reason}.") from None
    for field in table.schema_arrow:
        inner = field.type
        if pa.types.is_struct(inner) and inner.get_field_index("bytes") >= 0:
            inner = inner.field("bytes").type
        if pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
            return table, field.name
    names = ", ".join(table.schema_arrow.names)
    raise BadInput(f"{str(path)!r} has no column of encoded images, only {names}.")


@lru_cache(maxsize=1)
def _group(path: Path, changed: int, group: int) -> Any:
    table, column = _table(path)
    return table.read_row_group(group, columns=[column]).column(0)


def _row(place: Place) -> bytes:
    first, changed = 0, place.path.stat().st_mtime_ns
    table, _ = _table(place.path)
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if place.row < first + rows:
            value = _group(place.path, changed, group)[place.row - first].as_py()
            return bytes(value["bytes"] if isinstance(value, dict) else value)
        first += rows
    raise BadInput(f"{place.path} has no row {place.row}.")
