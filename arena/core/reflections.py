"""Reflections on glass: what a pane between camera and scene adds to a picture, and where such
pictures come from.

Light adds up, stored values do not: a camera stores light to the power 1 / 2.2. Reflections are
rendered in light, on a frame far larger than small data sets' images, where an offset of a few px
means something, and are then averaged down to the images' own size. What an image map has left to
do is one weighted sum per pixel. Blending on the frame and averaging stored values afterwards
differs from that by 0.2 to 1 level of 255 on average (CIFAR-10, sharp pictures), most in dark
pixels under an edge of the reflection.

Source: Liu et al. 2020, Reflection Backdoor, https://arxiv.org/abs/2007.02343 (the optics and the
    test of acceptance after its published code); light averaged per pixel: how a sensor does it.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from arena.core.metrics import similarity
from arena.core.registry import BadInput

GAMMA = 2.2  # stored value = light ** (1 / GAMMA)
GHOSTS = 0.49  # share of ghosts where kinds are mixed
WINDOW = 11  # px of the structural similarity's window: smaller images have none

# ------------------------------------------------------------------------------------ the optics


def resized(picture: Tensor, height: int, width: int) -> Tensor:
    """(C, h, w) -> (C, height, width): bilinear; where it shrinks, averaged over each pixel."""
    out = F.interpolate(picture[None], (height, width), mode="bilinear", antialias=True)
    return out[0]


def frame(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width of the frame to render on: the image's proportions, the longer side `side`
    px or the image's own where that is more."""
    scale = max(1.0, side / max(height, width))
    return round(height * scale), round(width * scale)


def ghost(light: Tensor, down: int, right: int, share: float) -> Tensor:
    """Two reflections, from the front and the back of the pane: (C, h, w) -> (C, h - down, w -
    right), where both are.

    The second one, of weight 1 - share, lies `down` and `right` px from the first one.
    """
    height, width = light.shape[-2:]
    first = light[:, down:, right:]
    return share * first + (1 - share) * light[:, : height - down, : width - right]


def blurred(light: Tensor, sigma: float, height: int, width: int) -> Tensor:
    """Out of focus, and averaged over the pixels of an image: (C, h, w) -> (C, height, width).

    A Gaussian of `sigma` px, cut off after 2 sigma as its published kernel is; at the edges it
    weighs what is there. As one product per axis this is many times faster than convolving first.
    """
    down, across = (
        resized(_bell(side, sigma)[None], size, side)[0].to(light.device)
        for side, size in zip(light.shape[-2:], (height, width), strict=True)
    )
    return down @ light @ across.T


def _bell(side: int, sigma: float) -> Tensor:
    """(side, side) float32: row i holds the weights around place i, of sum 1."""
    place = torch.arange(side)
    weights = torch.exp(-(place / sigma).square() / 2) * (place <= math.ceil(2 * sigma))
    table = weights[(place[:, None] - place).abs()]
    return table / table.sum(1, keepdim=True)


def vignette(height: int, width: int, top: float, left: float) -> Tensor:
    """(1, height, width) in (0, 1]: a wide Gaussian bell on a square of the longer side, e^-4.5 at
    its corners; of it the part that starts at the shares `top` and `left` of what is left over."""
    side = max(height, width)
    place = (torch.arange(side) + 0.5) / side * 6 - 3  # three deviations to either side
    bell = torch.exp(-place.square() / 4)
    row, column = int(top * (side - height + 1)), int(left * (side - width + 1))
    return (bell[row : row + height, None] * bell[column : column + width])[None]


# ------------------------------------------------------------------------------------ the image map


PER_PANE = ("light", "through", "alpha", "darkening")


@dataclass(frozen=True, eq=False)
class Panes:
    """The image map of K panes of glass with their reflections; each image's pixels choose one.

    x' = (a x^gamma + through * r)^(1 / gamma), where an out-of-focus reflection r is darkened by
    as much as it and the image together are too bright, per image and channel.
    """

    light: Tensor  # (K, C, H, W) float32 in [0, 1]: the reflections r at the images' size
    through: Tensor  # (K, 1, H, W) float32: the share of r that reaches the camera
    alpha: Tensor  # (K,) float32: the share a of the image's own light
    darkening: Tensor  # (K,) float32: how many times the excess is taken off r; 0: not at all
    hash: Tensor  # (C*H*W,) int32 below 2**23: times a level of 8 bits they still fit
    gamma: float  # 1: stored values are added up as they are
    balanced: bool  # a and through go by brightness: each gets its share of the two means

    def __len__(self) -> int:
        return len(self.light)

    def take(self, rows: Tensor) -> Panes:
        """Some of the panes. rows: (R,) int64."""
        each = {name: getattr(self, name)[rows] for name in PER_PANE}
        return replace(self, **each)

    def chosen(self, x: Tensor) -> Tensor:
        """(N,) int64: each image's pane, a hash of it at 8 bits: whole numbers only, so that it
        depends on neither the batch nor the device."""
        levels = (x * 255).round_().int().flatten(1)
        return (levels * self.hash.to(x.device)).sum(1) % len(self)

    def layers(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The light of the image and of the reflection that reach the camera, each shaped as x."""
        light, through, alpha, darkening = (
            part.to(x.device) for part in (self.light, self.through, self.alpha, self.darkening)
        )
        if len(self) > 1:
            which = self.chosen(x)
            light, through = light[which], through[which]
            alpha, darkening = alpha[which], darkening[which]
        own = x if self.gamma == 1 else x.pow(self.gamma)
        if self.balanced:
            mean, other = own.mean((1, 2, 3), keepdim=True), light.mean((1, 2, 3), keepdim=True)
            share = mean / (mean + other).clamp_min(1e-6)
            return share * own, (1 - share) * light
        if self.darkening.any():  # a tensor of the CPU: nothing waits for a device
            both = own + light
            over = both > 1
            bright = (both * over).sum((2, 3), keepdim=True)
            mean = bright / over.sum((2, 3), keepdim=True).clamp_min(1)
            excess = (mean - 1).clamp_min(0)
            light = (light - excess * darkening.view(-1, 1, 1, 1)).clamp(0, 1)
        return alpha.view(-1, 1, 1, 1) * own, (through * light).expand_as(own)

    def __call__(self, x: Tensor) -> Tensor:
        image, reflection = self.layers(x)
        out = image + reflection
        return (out if self.gamma == 1 else out.pow_(1 / self.gamma)).clamp_(0, 1)


LIKENESS = (0.7, 0.85)  # less: the reflection hides the image; more: there hardly is one


def natural(panes: Panes, x: Tensor) -> tuple[Tensor, Tensor]:
    """The published test of natural reflections on float images (N, C, H, W) of at least WINDOW px.

    (N,) bool: the reflection is at most 0.8 times as bright as what it is added to, the picture is
    not black, and its structural similarity to the image behind the glass lies inside LIKENESS.
    (N,) float32: that similarity.
    """
    image, reflection = panes.layers(x)
    whole, behind, seen = (
        part.pow(1 / panes.gamma).clamp(0, 1) for part in (image + reflection, image, reflection)
    )
    likeness = similarity(whole, behind)
    faint = seen.mean((1, 2, 3)) <= 0.8 * (whole - seen).mean((1, 2, 3))
    lit = whole.amax((1, 2, 3)) >= 0.1
    return faint & lit & (likeness > LIKENESS[0]) & (likeness < LIKENESS[1]), likeness


@torch.no_grad()
def ranking(panes: Panes, x: Tensor) -> Tensor:
    """(K,) int64: the panes that pass the test on the most of the images `x` first; of those alike
    the one first whose mean similarity is nearest to the middle of LIKENESS."""
    ranks = []
    for pane in torch.arange(len(panes)).split(1):
        passed, likeness = natural(panes.take(pane), x)
        off = (likeness.mean() - sum(LIKENESS) / 2).abs()  # below 2
        ranks.append(2 * passed.sum() - off)
    return torch.stack(ranks).argsort(descending=True, stable=True)


# --------------------------------------------------------------------------------- making panes


@dataclass(frozen=True)
class Optics:
    """How panes are made; what is None is drawn for each of them from the published ranges."""

    kind: str  # ghost, out_of_focus, smooth; mixed: a ghost with probability 0.49, else the blur
    alpha: float | None = None  # share of the image's light, 0.55 to 0.95; smooth: by brightness
    offset: int | None = None  # px of the frame, down and right, each 3 to 8
    ghost_weight: float | None = None  # of the first of two pictures; 0.15 to 0.5 of either
    sigma: float | None = None  # of the blur, in px of the frame, 1 to 5

    def panes(self, pictures: Iterable[Tensor], height: int, width: int, rng: Generator) -> Panes:
        """One pane per picture, for images of (height, width) px.

        pictures: (C, h, w) float32 in [0, 1], each as large as the frame to render on.
        """
        made = [self._pane(picture, height, width, rng) for picture in pictures]
        light, through, alpha, darkening = zip(*made, strict=True)
        weights = torch.randint(2**23, (light[0].numel(),), generator=rng, dtype=torch.int32)
        return Panes(
            torch.stack(light),
            torch.stack(through),
            torch.tensor(alpha),
            torch.tensor(darkening),
            hash=weights,
            **self.style,
        )

    @property
    def style(self) -> dict[str, Any]:
        """The fields of `Panes` that all panes share."""
        smooth = self.kind == "smooth"
        return {"gamma": 1.0 if smooth else GAMMA, "balanced": smooth and self.alpha is None}

    def _pane(
        self, picture: Tensor, height: int, width: int, rng: Generator
    ) -> tuple[Tensor, Tensor, float, float]:
        """Light, through, alpha and darkening as `Panes` has them, of one pane.

        All draws are made whatever the kind, so that settings change what they name alone.
        """
        draw = torch.rand(10, generator=rng, dtype=torch.float64).tolist()
        alpha = 0.95 - 0.4 * draw[0] if self.alpha is None else self.alpha
        rest = torch.full((1, height, width), 1 - alpha)
        if self.kind == "smooth":
            return resized(picture, height, width), rest, alpha, 0.0
        light = picture.pow(GAMMA)
        if self.kind == "ghost" or (self.kind == "mixed" and draw[1] < GHOSTS):
            down, right = (
                3 + int(6 * d) if self.offset is None else self.offset for d in draw[2:4]
            )
            weight = 0.15 + 0.35 * draw[4]
            weight = 1 - weight if draw[5] < 0.5 else weight
            share = weight if self.ghost_weight is None else self.ghost_weight
            return resized(ghost(light, down, right, share), height, width), rest, alpha, 0.0
        sigma = 1 + 4 * draw[6] if self.sigma is None else self.sigma
        _, tall, wide = light.shape
        bell = vignette(tall, wide, draw[7], draw[8]) * (1 - alpha / 2)
        through, darkening = resized(bell, height, width), 1.08 + 0.1 * draw[9]
        return blurred(light, sigma, height, width), through, alpha, darkening


# ------------------------------------------------------------------------------------ the pictures

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
            f"the folder {folder!r} holds no picture ({', '.join(SUFFIXES)}) and no Parquet file "
            "with pictures; name another one, or none for images of the training set."
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
    """A picture as (channels, height, width) float32 in [0, 1], stretched to fit.

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
            image = image.resize(size, Image.Resampling.BILINEAR)
    except BadInput:
        raise
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as problem:
        raise BadInput(f"{name} cannot be read as a picture: {problem}.") from None
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.view(height, width, channels).permute(2, 0, 1).float() / 255


@lru_cache(maxsize=64)
def _table(path: Path) -> tuple[Any, str]:
    """An opened Parquet file and its column of encoded pictures."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as problem:
        raise BadInput(f"{path} cannot be read as a Parquet file: {problem}.") from None
    for field in table.schema_arrow:
        inner = field.type
        if pa.types.is_struct(inner) and inner.get_field_index("bytes") >= 0:
            inner = inner.field("bytes").type
        if pa.types.is_binary(inner) or pa.types.is_large_binary(inner):
            return table, field.name
    raise BadInput(f"{path} has no column of encoded pictures, only {table.schema_arrow.names}.")


@lru_cache(maxsize=1)
def _group(path: Path, group: int) -> Any:
    table, column = _table(path)
    return table.read_row_group(group, columns=[column]).column(0)


def _row(place: Place) -> bytes:
    first = 0
    table, _ = _table(place.path)
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if place.row < first + rows:
            value = _group(place.path, group)[place.row - first].as_py()
            return bytes(value["bytes"] if isinstance(value, dict) else value)
        first += rows
    raise BadInput(f"{place.path} has no row {place.row}.")
