"""Patch: a small picture covers the same spot of every triggered image, x' = (1 - m) x + m p.

Grids (BadNets), squares, chequers, random polygons (TrojAI) and any picture with a mask; in one
place or a random one; for all images, for one victim class, or from every class to the next.

Source: Gu et al. 2017, BadNets, https://arxiv.org/abs/1708.06733. Default: the 3x3 grid flush in
    the bottom-right corner, as in the code of NAD, ANP and the label-consistent attack; 10 % of the
    training set as in NAD and SDRM. Polygons: Karra et al. 2020, https://arxiv.org/abs/2003.07233.
Departs: the sources disagree on rate and target. ANP poisons 5 %, SDRM keeps the originals beside
    the poisoned copies (extend=true), NAD also relabels images that are of target class 5 already;
    here the target is 0 and its images are never poisoned. NAD's square: kind=square,margin=1. The
    DECK group's: kind=square,size=4,colour=(1,1,0),place=top_left,margin=4. TrojAI puts polygons
    on the foreground object, which no data set marks; here they lie in a corner or at random.
    Images are stamped before augmentation, so that a flip mirrors a corner trigger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core.contracts import Images, Poisoned, Trigger
from arena.core.hashing import draw_weights, pixel_hashes
from arena.core.pictures import read_picture
from arena.core.poisoning import all_to_all, check_classes, check_rate, dirty_label, scope
from arena.core.registry import BadInput, method, param

_GRID = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0))
_ONLY_FOR = {"image": "image", "mask": "image", "sides": "polygon", "antialias": "polygon"}


@method
class Patch:
    """All fields are the attacker's; whatever is random about the patch is drawn once."""

    threat: ClassVar[str] = "poisons data"
    scopes: ClassVar[tuple[str, ...]] = ("universal", "label-specific", "all-to-all")
    labels: ClassVar[str] = "changed"
    trigger_kind: ClassVar[str] = "static"

    target: int = param(0, "class that the trigger forces; all_to_all has none", low=0)
    rate: float = param(
        0.1,
        "share of the training set that is poisoned; with a victim, share of the victim class",
        above=0,
        high=1,
        source="NAD and SDRM; ANP 0.05",
    )
    kind: str = param(
        "grid",
        "grid: BadNets' 3x3 black and white pixels; square: one colour; checker: a chequer of the "
        "colour and black; polygon: a random convex one; image: the picture of field image",
        choices=("grid", "square", "checker", "polygon", "image"),
        source="BadNets",
    )
    size: int | None = param(
        None,
        "side of the patch, diameter of the polygon, longer side of the picture, in px; none: 3, "
        "for polygons a fifth of the image's shorter side, for pictures their own size",
        low=1,
    )
    colour: str | None = param(
        None,
        "brightness in [0, 1] of all channels, or (red,green,blue), or random; none: 1 (white), "
        "for polygons random",
    )
    alpha: float = param(1.0, "opacity of the patch, a share", above=0, high=1)
    sides: int | None = param(
        None, "corners of the polygon; none: drawn from 3 to 12", low=3, high=12, source="TrojAI"
    )
    antialias: bool = param(False, "soft edge of the polygon, one px wide")
    image: str | None = param(None, "file of the picture; its alpha channel is the mask", path=True)
    mask: str | None = param(
        None, "file of the picture's mask, white where it covers the image", path=True
    )
    place: str = param(
        "bottom_right",
        "corner or center; random: one place drawn per victim; per_image: each image's own place, "
        "which its pixels decide",
        choices=(
            "bottom_right", "bottom_left", "top_right", "top_left", "center", "random", "per_image",
        ),
        source="BadNets",
    )  # fmt: skip
    margin: int = param(0, "px between the patch and the edges of the image", low=0)
    mode: str = param(
        "universal",
        "universal: every triggered image to the target; all_to_all: class y to y + 1",
        choices=("universal", "all_to_all"),
        source="BadNets",
    )
    victim: int | None = param(
        None, "the only class that the trigger works on (label-specific); none: all classes", low=0
    )
    extend: bool = param(
        False,
        "append the poisoned copies and keep their originals",
        source="false: NAD, true: SDRM",
    )

    def __post_init__(self) -> None:
        if self.mode == "all_to_all" and self.victim is not None:
            raise BadInput("patch: mode=all_to_all works on every class and takes no victim.")
        for field, kind in _ONLY_FOR.items():
            if getattr(self, field) and self.kind != kind:
                raise BadInput(f"patch: {field} is only for kind={kind}, not kind={self.kind}.")
        if self.kind == "image" and self.image is None:
            raise BadInput("patch: kind=image needs image=FILE.")
        if self.kind == "image" and self.colour is not None:
            raise BadInput("patch: kind=image has its own colours; leave colour out.")
        if self.kind == "grid" and self.size is not None and self.size % 3:
            raise BadInput(f"patch: the size of a grid must be a multiple of 3, got {self.size}.")
        if self.kind == "polygon" and self.size is not None and self.size < 3:
            raise BadInput(f"patch: the size of a polygon must be at least 3, got {self.size}.")
        if self.colour not in (None, "random"):
            _read_colour(str(self.colour))

    @property
    def scope(self) -> str:
        return scope(self)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        check_rate(self, counts, of="train" if self.victim is None else "candidates")
        channels, height, width = shape
        if self.colour not in (None, "random"):
            given = len(_read_colour(str(self.colour)))
            if given not in (1, channels):
                raise BadInput(
                    f"patch: colour has {given} channels, the images of this data set {channels}."
                )
        tall, wide = self._extent(shape)
        if tall + 2 * self.margin > height or wide + 2 * self.margin > width:
            margin = f" with a margin of {self.margin} px" if self.margin else ""
            raise BadInput(
                f"patch: a patch of {tall}x{wide} px{margin} does not fit into images of "
                f"{height}x{width} px."
            )

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        shape = channels, height, width = train.x.shape[1:]
        picture, mask = self._draw((channels, height, width), rng)
        tall, wide = picture.shape[1:]
        # the places that leave the margin free, as (first, number) of rows and of columns
        rows, columns = height - tall - 2 * self.margin + 1, width - wide - 2 * self.margin + 1
        if self.place == "per_image":
            weights = draw_weights(math.prod(shape), rng)
            return Trigger(Scatter(picture, mask, weights, self.margin, rows, columns))
        if self.place == "random":
            top = self.margin + int(torch.randint(rows, (), generator=rng))
            left = self.margin + int(torch.randint(columns, (), generator=rng))
        elif self.place == "center":
            top, left = (height - tall) // 2, (width - wide) // 2
        else:
            top = self.margin + (rows - 1 if self.place.startswith("bottom") else 0)
            left = self.margin + (columns - 1 if self.place.endswith("right") else 0)
        return Trigger(Paste(picture, mask, top, left))

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        if self.mode == "all_to_all":
            classes = int(train.y.max()) + 1
            return all_to_all(train, trigger, self.rate, rng, classes, extend=self.extend)
        return dirty_label(
            train, trigger, self.target, self.rate, rng,
            victim=self.victim,
            of="train" if self.victim is None else "candidates",
            extend=self.extend,
        )  # fmt: skip

    def _extent(self, shape: tuple[int, int, int]) -> tuple[int, int]:
        """Height and width of the patch in px."""
        if self.image is not None:
            picture, _ = read_picture(self.image, shape[0], size=self.size, mask=self.mask)
            return picture.shape[1], picture.shape[2]
        polygon = max(3, round(min(shape[1:]) / 5))
        side = self.size or (polygon if self.kind == "polygon" else 3)
        return side, side

    def _draw(self, shape: tuple[int, int, int], rng: Generator) -> tuple[Tensor, Tensor]:
        """The patch (C, h, w) and its mask (1, h, w), float32 in [0, 1]."""
        if self.image is not None:
            picture, mask = read_picture(self.image, shape[0], size=self.size, mask=self.mask)
            return picture, mask * self.alpha
        side, _ = self._extent(shape)
        lit = mask = torch.ones(1, side, side)
        if self.kind == "grid":
            lit = torch.tensor([_GRID]).repeat_interleave(side // 3, 1)
            lit = lit.repeat_interleave(side // 3, 2)
        elif self.kind == "checker":
            steps = torch.arange(side)
            lit = ((steps[:, None] + steps) % 2 == 0).float()[None]  # lit in the top-left corner
        elif self.kind == "polygon":
            sides = self.sides or int(torch.randint(3, 13, (), generator=rng))
            mask = polygon_mask(side, sides, self.antialias, rng)[None]
        colour = self.colour or ("random" if self.kind == "polygon" else "1")
        if colour == "random":
            channels = torch.rand(shape[0], generator=rng)
        else:
            channels = torch.tensor(_read_colour(colour)).expand(shape[0])
        return channels[:, None, None] * lit, mask * self.alpha


def _read_colour(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 3) or not all(0 <= value <= 1 for value in values):
        raise BadInput(
            "patch: colour must be random, one number in [0, 1], or three such as 1,1,0 (in a "
            f"spec colour=(1,1,0)); got {text!r}."
        )
    return values


def polygon_mask(size: int, sides: int, antialias: bool, rng: Generator) -> Tensor:
    """(size, size) float32 mask in [0, 1] of a random convex polygon with `sides` corners.

    The corners lie on the circle of diameter `size` px, each within a third of its share of the
    circle, so that no two meet.
    """
    jitter = torch.rand(sides, generator=rng, dtype=torch.float64) / 3
    turn = torch.rand((), generator=rng, dtype=torch.float64)
    angles = 2 * torch.pi * ((torch.arange(sides) + jitter) / sides + turn)
    corners = size / 2 * torch.stack([angles.cos(), angles.sin()], 1)  # (sides, 2), in order
    edges = corners.roll(-1, 0) - corners
    normals = torch.stack([-edges[:, 1], edges[:, 0]], 1) / edges.norm(dim=1, keepdim=True)
    centres = torch.arange(size, dtype=torch.float64) + 0.5 - size / 2
    pixels = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)  # (size, size, 2)
    inward = ((pixels[:, :, None] - corners) * normals).sum(-1).amin(-1)  # px from the nearest edge
    return ((inward + 0.5).clamp(0, 1) if antialias else (inward >= 0)).float()


@dataclass(frozen=True, eq=False)
class Paste:
    """The image map that puts one patch in one place."""

    picture: Tensor  # (C, h, w) float32 in [0, 1]
    mask: Tensor  # (1, h, w) float32 in [0, 1]
    top: int  # row of the patch's first pixel
    left: int

    def __call__(self, x: Tensor) -> Tensor:
        picture, mask = self.picture.to(x.device), self.mask.to(x.device)
        tall, wide = picture.shape[1:]
        out = x.clone()
        spot = out[:, :, self.top : self.top + tall, self.left : self.left + wide]
        spot.mul_(1 - mask).add_(mask * picture)
        return out


@dataclass(frozen=True, eq=False)
class Scatter:
    """The image map that puts one patch where each image's own pixels say.

    The place is a hash of the image, so that it depends on neither the batch nor the device.
    """

    picture: Tensor  # (C, h, w) float32 in [0, 1]
    mask: Tensor  # (1, h, w) float32 in [0, 1]
    weights: Tensor  # (1, C*H*W) of the hash
    first: int  # the first row and column that a patch may start at
    rows: int  # how many rows, and columns, it may start at
    columns: int

    def places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) int64 rows and columns of the patches' first pixels."""
        number = pixel_hashes(x, self.weights)[:, 0]
        return self.first + number % self.rows, self.first + number // self.rows % self.columns

    def __call__(self, x: Tensor) -> Tensor:
        picture, mask = self.picture.to(x.device), self.mask.to(x.device)
        top, left = self.places(x)
        tall, wide = picture.shape[1:]
        index = (
            torch.arange(len(x), device=x.device)[:, None, None, None],
            torch.arange(x.shape[1], device=x.device)[:, None, None],
            (top[:, None] + torch.arange(tall, device=x.device))[:, None, :, None],
            (left[:, None] + torch.arange(wide, device=x.device))[:, None, None, :],
        )
        out = x.clone()
        out[index] = x[index] * (1 - mask) + mask * picture
        return out
