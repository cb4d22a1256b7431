"""Pictures that a user names, as tensors. Pillow is imported when one is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from arena.core.registry import BadInput

if TYPE_CHECKING:
    from PIL import Image


def read_picture(
    path: str,
    channels: int,
    *,
    size: tuple[int, int] | int | None = None,
    mask: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A picture (C, h, w) and its opacity (1, h, w), both float32 in [0, 1].

    channels: 3 (RGB) or 1 (its luminance).
    size:     (h, w) px, stretched to fit; or one number for the longer side, which keeps the
              proportions; None: as stored. Antialiased (Pillow's Lanczos).
    mask:     another file of the same size, white where the picture is opaque; without it the
              picture's alpha channel, or opaque all over.

    Raises BadInput for a file that is no picture, a mask of another size, or other channels.
    """
    from PIL import Image

    if channels not in (1, 3):
        raise BadInput(f"a picture has 1 or 3 channels, the images of this data set {channels}.")
    picture = _open(path).convert("RGBA")
    if mask is not None:
        opacity = _open(mask).convert("L")
        if opacity.size != picture.size:
            raise BadInput(
                f"the mask {mask!r} is {_extent(opacity)} px, its picture {path!r} "
                f"{_extent(picture)} px; they must be alike."
            )
        picture.putalpha(opacity)
    if size is not None:
        if isinstance(size, int):
            scale = size / max(picture.size)
            width, height = (max(1, round(side * scale)) for side in picture.size)
        else:
            height, width = size
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    colours = picture.convert("RGB")
    return _tensor(colours if channels == 3 else colours.convert("L")), _tensor(
        picture.getchannel("A")
    )


def _open(path: str) -> Image.Image:
    from PIL import Image

    try:
        with Image.open(Path(path).expanduser()) as picture:
            if picture.mode.startswith(("I", "F")):
                raise BadInput(f"{path!r} has more than 8 bits per channel; save it with 8.")
            return picture.copy()
    except BadInput:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as problem:
        raise BadInput(f"{path!r} cannot be read as a picture: {problem}.") from None


def _extent(picture: Image.Image) -> str:
    return f"{picture.height}x{picture.width}"


def _tensor(picture: Image.Image) -> Tensor:
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    image = values.view(picture.height, picture.width, len(picture.getbands()))
    return image.permute(2, 0, 1).float() / 255
