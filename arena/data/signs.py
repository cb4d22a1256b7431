"""Traffic-sign-like images, drawn from a seed: the embedded data set, with nothing to download.

In the manner of the TrojAI image rounds (Karra et al. 2020, https://arxiv.org/abs/2003.07233): a
synthetic foreground sign on a varied background, seen under random pose, light, blur and weather.

A sign is geometry, not pixels. Its outline is a convex polygon clipped by a circle and its symbol
is up to four strokes; both are signed distances on the warped pixel grid of a whole batch, so the
edges are anti-aliased at any side and no image is handled on its own. Every operation on pixels is
one that IEEE 754 rounds exactly (+ - * / sqrt, comparisons, gathers), and random numbers are
uniform ones: the bytes depend on neither the number of threads nor the vector unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from arena.core.progress import report
from arena.core.seeding import stream

CLASS_LIMITS = (5, 45)
SIDE_LIMITS = (32, 224)

_CHUNK_PIXELS = 2**17  # pixels drawn at a time: bounds the memory, and half a MB fits the cache


# ------------------------------------------------------------------------------ the classes

_COLOURS = {
    "red": (0.77, 0.10, 0.12),
    "orange": (0.93, 0.47, 0.09),
    "yellow": (0.95, 0.78, 0.12),
    "green": (0.05, 0.43, 0.26),
    "blue": (0.09, 0.28, 0.63),
    "brown": (0.42, 0.26, 0.14),
    "white": (0.93, 0.93, 0.92),
    "black": (0.08, 0.08, 0.09),
}


@dataclass(frozen=True)
class _Shape:
    """The outline {p : |p| <= radius and n.p <= c for all edges}; y points down."""

    edges: tuple[tuple[float, float], ...]  # (direction of n in degrees clockwise from right, c)
    radius: float = 1.0
    symbol_size: float = 1.0
    symbol_drop: float = 0.0  # how far below the centre the symbol sits


def _regular(corners: int, first: float, inradius: float) -> tuple[tuple[float, float], ...]:
    return tuple((first + 360 * k / corners, inradius) for k in range(corners))


_SHAPES = {
    "circle": _Shape((), 0.94),
    "octagon": _Shape(_regular(8, 0, 0.9)),
    "triangle": _Shape(_regular(3, 90, 0.56), 1.05, 0.68, 0.02),
    "inverted triangle": _Shape(_regular(3, -90, 0.56), 1.05, 0.68, -0.02),
    "square": _Shape(_regular(4, 0, 0.78), 1.06, 0.95),
    "diamond": _Shape(_regular(4, 45, 0.74), 1.01, 0.85),
    "pentagon": _Shape(_regular(5, 90, 0.8), 0.97, 0.9),
    "hexagon": _Shape(_regular(6, 90, 0.84), 0.96, 0.95),
    "tall plate": _Shape(((0, 0.62), (180, 0.62), (90, 0.9), (-90, 0.9)), 1.06, 0.85),
    "wide plate": _Shape(((0, 0.95), (180, 0.95), (90, 0.62), (-90, 0.62)), 1.1, 0.85),
    "shield": _Shape(
        ((0, 0.76), (180, 0.76), (-90, 0.8), (38, 0.76), (142, 0.76)), 1.05, 0.9, -0.08
    ),
    "dome": _Shape(((90, 0.5),), 0.98, 0.85, -0.12),
}

# A stroke is a segment from (x0, y0) to (x1, y1) of half width r, in units of the sign; y is down.
_Stroke = tuple[float, float, float, float, float]
_STROKES_AT_MOST = 4


def _line(*points: tuple[float, float], r: float = 0.1) -> tuple[_Stroke, ...]:
    return tuple((*a, *b, r) for a, b in pairwise(points))


def _dots(*points: tuple[float, float], r: float) -> tuple[_Stroke, ...]:
    return tuple((*p, *p, r) for p in points)


def _turned(strokes: tuple[_Stroke, ...], quarters: int) -> tuple[_Stroke, ...]:
    """Turned clockwise by so many quarters."""
    for _ in range(quarters):
        strokes = tuple((-y0, x0, -y1, x1, r) for x0, y0, x1, y1, r in strokes)
    return strokes


_BAR = _line((-0.46, 0), (0.46, 0), r=0.14)
_TWO_BARS = _line((-0.44, -0.21), (0.44, -0.21)) + _line((-0.44, 0.21), (0.44, 0.21))
_SLASH = _line((-0.36, 0.36), (0.36, -0.36), r=0.11)
_CHEVRON = _line((-0.4, 0.2), (0, -0.24), (0.4, 0.2), r=0.11)
_ARROW = _line((0, 0.48), (0, -0.44)) + _line((-0.3, -0.14), (0, -0.46), (0.3, -0.14))
_TEE = _line((-0.4, -0.36), (0.4, -0.36)) + _line((0, -0.36), (0, 0.46))
_TURN = _line((0.28, 0.46), (0.28, -0.12), (-0.42, -0.12)) + _line((-0.16, -0.38), (-0.42, -0.12))
_FORK = _line((0, 0.46), (0, 0), (-0.34, -0.4)) + _line((0, 0), (0.34, -0.4))

_SYMBOLS = {
    "blank": (),
    "bar": _BAR,
    "upright": _turned(_BAR, 1),
    "two bars": _TWO_BARS,
    "two uprights": _turned(_TWO_BARS, 1),
    "slash": _SLASH,
    "backslash": _turned(_SLASH, 1),
    "plus": _line((-0.44, 0), (0.44, 0)) + _line((0, -0.44), (0, 0.44)),
    "saltire": _SLASH + _turned(_SLASH, 1),
    "dot": _dots((0, 0), r=0.32),
    "two dots": _dots((-0.27, 0), (0.27, 0), r=0.18),
    "three dots": _dots((-0.28, 0.2), (0.28, 0.2), (0, -0.27), r=0.17),
    "chevron up": _CHEVRON,
    "chevron down": _turned(_CHEVRON, 2),
    "arrow up": _ARROW,
    "arrow right": _turned(_ARROW, 1),
    "arrow down": _turned(_ARROW, 2),
    "arrow left": _turned(_ARROW, 3),
    "turn left": _TURN,
    "turn right": tuple((-x0, y0, -x1, y1, r) for x0, y0, x1, y1, r in _TURN),
    "tee": _TEE,
    "inverted tee": _turned(_TEE, 2),
    "fork": _FORK,
    "merge": _turned(_FORK, 2),
    "zigzag": _line((0.16, -0.46), (-0.22, 0.04), (0.22, -0.04), (-0.16, 0.46)),
    "exclamation mark": _line((0, -0.42), (0, 0.1), r=0.12) + _dots((0, 0.4), r=0.13),
    "frame": _line((-0.36, -0.36), (0.36, -0.36), (0.36, 0.36), (-0.36, 0.36), (-0.36, -0.36)),
    "wedge": _line((-0.42, 0.32), (0, -0.42), (0.42, 0.32), (-0.42, 0.32)),
}

# Class k is row k, whatever the number of classes: (fill, shape, rim, ink, symbol). Neighbours
# differ in one property, most often the symbol, and that from the first five classes on.
_CLASSES = (
    ("white", "circle", "red", "black", "bar"),
    ("white", "circle", "red", "black", "two bars"),
    ("yellow", "diamond", "black", "black", "arrow left"),
    ("yellow", "diamond", "black", "black", "arrow right"),
    ("red", "octagon", "white", "white", "bar"),
    ("white", "triangle", "red", "black", "exclamation mark"),
    ("white", "triangle", "red", "black", "zigzag"),
    ("blue", "circle", "white", "white", "arrow up"),
    ("blue", "circle", "white", "white", "arrow down"),
    ("white", "inverted triangle", "red", "black", "blank"),
    ("blue", "circle", "white", "white", "turn left"),
    ("blue", "circle", "white", "white", "turn right"),
    ("white", "circle", "red", "black", "slash"),
    ("white", "circle", "red", "black", "backslash"),
    ("white", "triangle", "red", "black", "fork"),
    ("white", "triangle", "red", "black", "plus"),
    ("red", "circle", "white", "white", "two bars"),
    ("yellow", "diamond", "black", "black", "tee"),
    ("yellow", "diamond", "black", "black", "fork"),
    ("yellow", "diamond", "black", "black", "plus"),
    ("green", "square", "white", "white", "arrow up"),
    ("green", "square", "white", "white", "chevron up"),
    ("blue", "square", "white", "white", "two uprights"),
    ("blue", "square", "white", "white", "tee"),
    ("orange", "diamond", "black", "black", "arrow left"),
    ("orange", "diamond", "black", "black", "zigzag"),
    ("yellow", "pentagon", "black", "black", "two dots"),
    ("yellow", "pentagon", "black", "black", "three dots"),
    ("white", "circle", "red", "black", "saltire"),
    ("white", "circle", "blue", "black", "saltire"),
    ("brown", "square", "white", "white", "wedge"),
    ("brown", "square", "white", "white", "frame"),
    ("white", "tall plate", "black", "black", "arrow up"),
    ("white", "tall plate", "black", "black", "merge"),
    ("black", "wide plate", "white", "white", "arrow left"),
    ("black", "wide plate", "white", "white", "arrow right"),
    ("blue", "shield", "white", "white", "two bars"),
    ("green", "shield", "white", "white", "two bars"),
    ("red", "hexagon", "white", "white", "upright"),
    ("red", "octagon", "white", "white", "two uprights"),
    ("orange", "dome", "black", "black", "dot"),
    ("orange", "dome", "black", "black", "two dots"),
    ("white", "inverted triangle", "red", "black", "chevron down"),
    ("green", "hexagon", "white", "white", "inverted tee"),
    ("yellow", "triangle", "black", "black", "exclamation mark"),
)


def class_names(classes: int) -> tuple[str, ...]:
    """Names of the first `classes` classes, such as "red octagon, white rim, white bar"."""
    _check_range("classes", classes, CLASS_LIMITS)
    return tuple(
        f"{fill} {shape}, {rim} rim, " + ("blank" if symbol == "blank" else f"{ink} {symbol}")
        for fill, shape, rim, ink, symbol in _CLASSES[:classes]
    )


# ----------------------------------------------------------------------------- the interface


@dataclass(frozen=True)
class Conditions:
    """How strong each nuisance is: 0 leaves it out, 1 is the data set's own strength."""

    shift: float = 1.0  # off-centre, up to slightly beyond the edge
    size: float = 1.0  # radius of the sign, a quarter to 0.45 of the side
    turn: float = 1.0  # rotation, up to 13 degrees
    slant: float = 1.0  # foreshortening, shear and perspective
    scenery: float = 1.0  # backgrounds; at 0 a plain grey
    post: float = 1.0  # the pole that most signs stand on
    wear: float = 1.0  # fading and dirt on the sign
    leaves: float = 1.0  # foliage in front of a third of the signs
    shadow: float = 1.0  # a shadow's edge across half of the scenes
    rain: float = 1.0  # streaks, in a sixth of the images
    fog: float = 1.0  # in another sixth
    snow: float = 1.0  # flakes, in another sixth
    defocus: float = 1.0  # up to a standard deviation of about one pixel at side 32
    motion: float = 1.0  # blur along a line, in half of the images
    exposure: float = 1.0  # brightness
    contrast: float = 1.0
    cast: float = 1.0  # colour of the light
    noise: float = 1.0  # of the sensor, up to 10 levels


ORDINARY = Conditions()
CLEAR = Conditions(**{field.name: 0.0 for field in fields(Conditions)})
"""The sign alone: centred, upright, new, on grey."""


def generate(
    split: str, count: int, *, classes: int = 10, side: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The first `count` images of a split.

    Args:
        split: any name; two names share no random stream, so no image either.
        count: at least 1. A larger count begins with the same images.
        classes: 5 to 45; class k looks the same for any number of classes.
        side: 32 to 224 pixels.
        seed: names the data set; the same seed gives the same bytes.

    Returns:
        x: (count, 3, side, side) uint8.
        y: (count,) int64 class ids in random order; every run of `classes` images from the start
           holds each class once, so that class sizes differ by at most one.

    Raises:
        ValueError: an argument is out of range.
    """
    if not split:
        raise ValueError("The split needs a name, such as 'train'.")
    if count < 1:
        raise ValueError(f"The count of images must be at least 1, got {count}.")
    _check_range("classes", classes, CLASS_LIMITS)
    _check_range("side", side, SIDE_LIMITS)

    size = max(1, _CHUNK_PIXELS // side**2)
    blocks = math.ceil((count + size) / classes)
    order = torch.rand(blocks, classes, generator=stream(seed, "signs", split, "labels", classes))
    labels = order.argsort(dim=1, stable=True).flatten()

    x = torch.empty(count, 3, side, side, dtype=torch.uint8)

    def draw_chunk(start: int) -> int:
        # A whole chunk even where only its head is wanted: a shorter one would draw differently.
        chunk = render(labels[start : start + size], side=side, seed=seed, key=(split, start))
        stop = min(start + size, count)
        x[start:stop] = chunk[: stop - start]
        return stop

    with _one_thread_per_operation() as threads, ThreadPoolExecutor(threads) as pool:
        for stop in pool.map(draw_chunk, range(0, count, size)):
            report("signs", stop, count)
    return x, labels[:count].clone()


def render(
    labels: Tensor,
    *,
    side: int = 32,
    seed: int = 0,
    key: tuple[object, ...] = (),
    conditions: Conditions = ORDINARY,
) -> Tensor:
    """One image for each class id in `labels` (N,): (N, 3, side, side) uint8.

    Every nuisance draws from a stream of its own, named by `seed` and `key`, so that leaving one
    out changes nothing else. Memory grows with N; `generate` calls this chunk by chunk.
    """
    on, n = conditions, len(labels)
    draw = _Draws(seed, key, n)
    px = (torch.arange(side) + 0.5) * (2 / side) - 1  # pixel centres: the image is [-1, 1]^2
    x, y = px.view(1, 1, side), px.view(1, side, 1)
    rough = _noise(draw.rng("texture"), n, side, roughness=0.8)
    smooth = _noise(draw.rng("clouds"), n, side, roughness=0.5)

    pose = _pose(draw, on)
    image = _scenery(draw, x, y, rough, on.scenery)
    _post(image, draw, x, y, pose, on.post)
    _sign(image, labels, draw, x, y, pose, smooth, on.wear)
    _leaves(image, draw, rough.flip(-1), on.leaves)
    _shadow(image, draw, x, y, on.shadow)
    _weather(image, draw, x, y, smooth, on)
    image = _blur(image, draw, on)
    return _camera(image, draw, on)


@contextmanager
def _one_thread_per_operation() -> Iterator[int]:
    """Gives the number of threads that torch had. A chunk's operations are too short to share out:
    on busy cores they would wait for one another, and whole chunks run in parallel without that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _check_range(what: str, value: int, limits: tuple[int, int]) -> None:
    low, high = limits
    if not low <= value <= high:
        nearest = min(max(value, low), high)
        raise ValueError(
            f"The signs data set has {low} to {high} for {what}, got {value}; "
            f"the nearest is {nearest}."
        )


# --------------------------------------------------------------------------------- randomness


@dataclass(frozen=True)
class _Draws:
    """Uniform draws for a batch of n images: one stream per purpose."""

    seed: int
    key: tuple[object, ...]
    n: int

    def rng(self, purpose: str) -> Generator:
        return stream(self.seed, "signs", *self.key, purpose)

    def __call__(self, purpose: str, *ranges: tuple[float, float]) -> Iterator[Tensor]:
        """One (n, 1, 1) tensor per range, uniform in it."""
        return _uniform(self.rng(purpose), self.n, *ranges)


def _uniform(rng: Generator, n: int, *ranges: tuple[float, float]) -> Iterator[Tensor]:
    values = torch.rand(len(ranges), n, 1, 1, generator=rng)
    return (low + (high - low) * value for (low, high), value in zip(ranges, values, strict=True))


def _colour(
    rng: Generator, n: int, low: tuple[float, float, float], high: tuple[float, float, float]
) -> Tensor:
    """(n, 3, 1, 1), on the line from low to high give or take 0.06 a channel."""
    a, b = torch.tensor(low).view(3, 1, 1), torch.tensor(high).view(3, 1, 1)
    along = torch.rand(n, 1, 1, 1, generator=rng)
    off = torch.rand(n, 3, 1, 1, generator=rng) * 0.12 - 0.06
    return a + (b - a) * along + off


def _noise(rng: Generator, n: int, side: int, roughness: float) -> Tensor:
    """(n, side, side) value noise in [0, 1]: an octave has `roughness` times the last one's say."""
    total, weight, say, cells = torch.zeros(n, side, side), 0.0, 1.0, 2
    while cells <= side // 2:
        lattice = torch.rand(n, cells + 2, cells + 2, generator=rng)
        # The lattice is shifted from chunk to chunk, or its knots would be a faint fixed pattern.
        shift = torch.rand(2, 1, generator=rng)
        at = torch.arange(side) * (cells / side) + shift
        (i, j), t = at.long(), at - at.floor()
        v, u = t * t * (3 - 2 * t)
        upper, lower = lattice.index_select(1, i), lattice.index_select(1, i + 1)
        rows = upper + (lower - upper) * v.unsqueeze(1)
        left, right = rows.index_select(2, j), rows.index_select(2, j + 1)
        total += right.sub_(left).mul_(u).add_(left).mul_(say)
        weight, say, cells = weight + say, say * roughness, cells * 2
    return total / weight


def _cell(table: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """table[:, i, j] (n, H, W) for a table (n, K, K) that repeats; i, j: whole floats."""
    n, k, _ = table.shape
    shape = torch.broadcast_shapes(i.shape, j.shape)
    at = ((i - (i / k).floor() * k) * k + (j - (j / k).floor() * k)).long()
    return table.flatten(1).gather(1, at.expand(n, *shape[1:]).flatten(1)).view(n, *shape[1:])


def _paint(image: Tensor, colour: Tensor, alpha: Tensor) -> None:
    """Cover `image` (n, 3, H, W) with `colour` (broadcast to it) where `alpha` (n, H, W) is 1."""
    image += (colour - image) * alpha.unsqueeze(1)


# ------------------------------------------------------------------------------------ the sign


def _geometry() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per class: edges (45, 8, 3) as (nx, ny, c), radius (45,), strokes (45, 4, 5) as
    (x, y, dx, dy, r), colours (45, 3, 3) of rim, fill and ink."""
    edges = torch.zeros(len(_CLASSES), 8, 3)
    edges[..., 2] = 9.0  # no edge, no stroke: farther off than any pixel
    strokes = torch.zeros(len(_CLASSES), _STROKES_AT_MOST, 5)
    strokes[..., 4] = -9.0
    for k, (_, shape_name, _, _, symbol) in enumerate(_CLASSES):
        shape = _SHAPES[shape_name]
        for e, (degrees, c) in enumerate(shape.edges):
            angle = math.radians(degrees)
            edges[k, e] = torch.tensor((math.cos(angle), math.sin(angle), c))
        for s, (x0, y0, x1, y1, r) in enumerate(_SYMBOLS[symbol]):
            size, drop = shape.symbol_size, shape.symbol_drop
            strokes[k, s] = torch.tensor((x0, y0 + drop / size, x1 - x0, y1 - y0, r)) * size
    radius = torch.tensor([_SHAPES[shape].radius for _, shape, _, _, _ in _CLASSES])
    colours = torch.tensor(
        [[_COLOURS[rim], _COLOURS[fill], _COLOURS[ink]] for fill, _, rim, ink, _ in _CLASSES]
    )
    return edges, radius, strokes, colours


_EDGES, _RADIUS, _STROKES, _CLASS_COLOURS = _geometry()
_RIM = 0.13


@dataclass(frozen=True)
class _Pose:
    """Where the sign is and how it is turned; every field (n, 1, 1)."""

    radius: Tensor
    cx: Tensor
    cy: Tensor
    tan_half: Tensor  # tan(angle / 2), which gives sine and cosine without a transcendental
    narrow: Tensor
    shear: Tensor
    tip_x: Tensor
    tip_y: Tensor

    def local(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Pixel coordinates -> the sign's own, in which its radius is 1."""
        x, y = (x - self.cx) / self.radius, (y - self.cy) / self.radius
        depth = (1 + x * self.tip_x + y * self.tip_y).clamp_(min=0.3)
        x, y = x / depth, y / depth
        square = self.tan_half * self.tan_half
        cos, sin = (1 - square) / (1 + square), 2 * self.tan_half / (1 + square)
        x, y = x * cos + y * sin, y * cos - x * sin
        return (x + y * self.shear) / self.narrow, y


def _pose(draw: _Draws, on: Conditions) -> _Pose:
    (size,) = draw("size", (-1, 1))
    shift_x, shift_y = draw("shift", (-1, 1), (-1, 1))
    (turn,) = draw("turn", (-0.115, 0.115))
    narrow, shear, tip_x, tip_y = draw("slant", (0, 0.28), (-0.1, 0.1), (-0.13, 0.13), (-0.1, 0.1))
    radius = 0.7 + 0.2 * size * on.size
    room = (1.06 - radius) * on.shift
    return _Pose(
        radius,
        shift_x * room,
        shift_y * room,
        turn * on.turn,
        1 - narrow * on.slant,
        shear * on.slant,
        tip_x * on.slant,
        tip_y * on.slant,
    )


def _outline(labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the sign's edge, negative inside."""
    distance = (x * x + y * y).sqrt_() - _RADIUS[labels].view(-1, 1, 1)
    for nx, ny, c in _EDGES[labels].permute(1, 2, 0).unsqueeze(-1).unsqueeze(-1).unbind(0):
        distance = torch.maximum(distance, (x * nx).add_(y * ny).sub_(c))
    return distance


def _symbol(labels: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the nearest stroke's edge, negative on the stroke."""
    distance = torch.full_like(x, 9.0)
    strokes = _STROKES[labels].permute(1, 2, 0).unsqueeze(-1).unsqueeze(-1)
    for x0, y0, dx, dy, r in strokes.unbind(0):
        square = (dx * dx + dy * dy).clamp(min=1e-9)  # a dot is a segment of no length
        px, py = x - x0, y - y0
        along = ((px * dx).add_(py * dy)).div_(square).clamp_(0, 1)
        px -= along * dx
        py -= along * dy
        distance = torch.minimum(distance, (px * px).add_(py * py).sqrt_().sub_(r))
    return distance


def _sign(
    image: Tensor,
    labels: Tensor,
    draw: _Draws,
    x: Tensor,
    y: Tensor,
    pose: _Pose,
    dirt: Tensor,
    wear: float,
) -> None:
    u, v = pose.local(x, y)
    sharp = pose.radius * (image.shape[-1] / 2)  # pixels per unit of the sign
    outline, symbol = _outline(labels, u, v), _symbol(labels, u, v)

    (fade, grime, slope) = draw("wear", (0, 0.35), (0, 0.9), (-0.22, 0.22))
    bleached = torch.rand(draw.n, 3, 1, generator=draw.rng("bleach")) * 0.3 + 0.4
    colours = _CLASS_COLOURS[labels].transpose(1, 2)  # (n, channel, part)
    colours = colours + (bleached - colours) * (fade * wear)
    rim, fill, ink = colours.unsqueeze(-1).unsqueeze(-1).unbind(2)

    face = rim.expand_as(image).clone()
    inside = (0.5 - (outline + _RIM) * sharp).clamp_(0, 1)
    _paint(face, fill, inside)
    _paint(face, ink, (0.5 - symbol * sharp).clamp_(0, 1).mul_(inside))
    shade = 1 + ((dirt - 0.6) * grime + v * slope) * wear
    face *= shade.unsqueeze(1)
    _paint(image, face, (0.5 - outline * sharp).clamp_(0, 1))


def _post(image: Tensor, draw: _Draws, x: Tensor, y: Tensor, pose: _Pose, on: float) -> None:
    stands, width, lean = draw("post", (0, 1), (0.03, 0.08), (-0.1, 0.1))
    colour = _colour(draw.rng("post colour"), draw.n, (0.25, 0.22, 0.2), (0.7, 0.7, 0.72))
    off = (x - pose.cx - (y - pose.cy) * lean).abs()
    pixels = image.shape[-1] / 2
    alpha = (0.5 - (off - width) * pixels).clamp_(0, 1)
    alpha *= (y > pose.cy) * (stands < 0.7) * on
    # Lit from one side, as a cylinder is.
    _paint(image, colour * (0.8 + (x - pose.cx) * 0.8 / width).clamp(0.6, 1.1).unsqueeze(1), alpha)


# ------------------------------------------------------------------------------ the background

# Each scene: (rng, x (1, 1, W), y (1, H, 1), texture (n, H, W)) -> (n, 3, H, W).


def _flat_gradient(rng: Generator, x: Tensor, y: Tensor, texture: Tensor) -> Tensor:
    n = len(texture)
    first = _colour(rng, n, (0.1, 0.1, 0.1), (0.9, 0.9, 0.9))
    second = _colour(rng, n, (0.1, 0.1, 0.1), (0.9, 0.9, 0.9))
    hue = torch.rand(n, 3, 1, 1, generator=rng) * 0.3 - 0.15
    dx, dy, amount = _uniform(rng, n, (-0.5, 0.5), (-0.5, 0.5), (0.1, 0.8))
    along = (0.5 + x * dx + y * dy + (texture - 0.5) * amount).clamp_(0, 1)
    return first + hue + (second - first) * along.unsqueeze(1)


def _foliage(rng: Generator, x: Tensor, y: Tensor, texture: Tensor) -> Tensor:
    n = len(texture)
    dark = _colour(rng, n, (0.03, 0.08, 0.03), (0.2, 0.2, 0.08))
    light = _colour(rng, n, (0.3, 0.5, 0.15), (0.75, 0.7, 0.35))
    steep, dy = _uniform(rng, n, (2.0, 5.0), (-0.3, 0.2))
    along = ((texture - 0.5) * steep + 0.45 + y * dy).clamp_(0, 1)
    return dark + (light - dark) * along.unsqueeze(1)


def _sky(rng: Generator, n: int, y: Tensor, texture: Tensor) -> Tensor:
    top = _colour(rng, n, (0.2, 0.42, 0.75), (0.6, 0.62, 0.66))
    bottom = _colour(rng, n, (0.66, 0.78, 0.9), (0.9, 0.84, 0.74))
    (clouds,) = _uniform(rng, n, (0.0, 2.0))
    along = (0.5 + y * 0.4 + (texture - 0.5) * clouds).clamp_(0, 1)
    return top + (bottom - top) * along.unsqueeze(1)


def _road(rng: Generator, x: Tensor, y: Tensor, texture: Tensor) -> Tensor:
    n, pixels = len(texture), x.shape[-1] / 2
    image = _sky(rng, n, y, texture)
    ground = _colour(rng, n, (0.2, 0.36, 0.12), (0.62, 0.55, 0.38))
    asphalt = _colour(rng, n, (0.22, 0.22, 0.24), (0.5, 0.5, 0.5))
    paint = _colour(rng, n, (0.85, 0.85, 0.85), (0.9, 0.75, 0.25))
    horizon, vanish, width, side, ridge = _uniform(
        rng, n, (-0.35, 0.45), (-0.7, 0.7), (0.5, 1.4), (-1.0, 1.0), (0.0, 0.5)
    )
    grain = ((texture - 0.5) * 0.9 + 1).unsqueeze(1)
    hills = horizon - ridge * texture[:, :1, :]
    _paint(image, ground * 0.6 * grain, (0.5 + (y - hills) * pixels).clamp_(0, 1))
    _paint(image, ground * grain, (0.5 + (y - horizon) * pixels).clamp_(0, 1))
    below = (y - horizon).clamp_(min=0)
    off = (x - vanish - below * side).abs()
    _paint(image, asphalt * grain, (0.5 + (below * width - off) * pixels).clamp_(0, 1))
    _paint(image, paint, (0.5 + (below * 0.06 - off) * pixels).clamp_(0, 1) * (below > 0.05))
    return image


def _buildings(rng: Generator, x: Tensor, y: Tensor, texture: Tensor) -> Tensor:
    n, k = len(texture), 16
    image = _sky(rng, n, y, texture)
    wall = _colour(rng, n, (0.3, 0.24, 0.2), (0.75, 0.7, 0.66))
    pane = _colour(rng, n, (0.1, 0.12, 0.16), (0.75, 0.75, 0.6))
    columns, phase, floors, opening = _uniform(rng, n, (0.9, 2.5), (0, 8), (2.5, 6.0), (0.25, 0.7))
    table = torch.rand(n, k, k, generator=rng)
    across = x * columns + phase
    column = across.floor()
    roof = _cell(table, torch.zeros_like(y), column) * 1.3 - 1.1
    shade = _cell(table, torch.ones_like(y), column) * 0.6 + 0.6
    i, j = y * floors, across * 3
    window = ((i - i.floor()) < opening) & ((j - j.floor()) < opening)
    glass = _cell(table, i.floor(), j.floor()) * window
    body = wall * (shade + (texture - 0.5) * 0.3).unsqueeze(1)
    _paint(body, pane, glass)
    _paint(image, body, (0.5 + (y - roof) * (x.shape[-1] / 2)).clamp_(0, 1))
    return image


def _bricks(rng: Generator, x: Tensor, y: Tensor, texture: Tensor) -> Tensor:
    n, k = len(texture), 16
    brick = _colour(rng, n, (0.5, 0.2, 0.14), (0.72, 0.66, 0.58))
    mortar = _colour(rng, n, (0.4, 0.38, 0.36), (0.85, 0.83, 0.8))
    rows, phase_x, phase_y, gap = _uniform(rng, n, (2.5, 6.0), (0, 8), (0, 8), (0.08, 0.2))
    table = torch.rand(n, k, k, generator=rng)
    i = y * rows + phase_y
    row = i.floor()
    j = x * rows * 0.45 + phase_x + (row - (row / 2).floor() * 2) * 0.5
    column = j.floor()
    tone = _cell(table, row, column) * 0.5 + 0.55 + texture * 0.4
    joint = ((i - row) < gap) | ((j - column) < gap * 0.45)
    image = brick * tone.unsqueeze(1)
    _paint(image, mortar, joint * 0.8)
    return image


def _fence(rng: Generator, x: Tensor, y: Tensor, texture: Tensor) -> Tensor:
    n, k = len(texture), 16
    image = _foliage(rng, x, y, texture)
    wood = _colour(rng, n, (0.3, 0.22, 0.15), (0.8, 0.78, 0.75))
    planks, phase, lean, gap, top = _uniform(
        rng, n, (1.5, 5.0), (0, 8), (-0.08, 0.08), (0.08, 0.6), (-1.3, 0.3)
    )
    table = torch.rand(n, k, k, generator=rng)
    j = (x + y * lean) * planks + phase
    column = j.floor()
    tone = _cell(table, torch.zeros_like(y), column) * 0.5 + 0.6 + (texture - 0.5) * 0.6
    plank = ((j - column) > gap) & (y > top)
    _paint(image, wood * tone.unsqueeze(1), plank.float())
    return image


_SCENES: tuple[Callable[[Generator, Tensor, Tensor, Tensor], Tensor], ...] = (
    _flat_gradient,
    _foliage,
    _road,
    _buildings,
    _bricks,
    _fence,
)


def _scenery(draw: _Draws, x: Tensor, y: Tensor, texture: Tensor, on: float) -> Tensor:
    image = torch.empty(draw.n, 3, x.shape[-1], x.shape[-1])
    kind = torch.randint(len(_SCENES), (draw.n,), generator=draw.rng("scene"))
    for k, scene in enumerate(_SCENES):
        rows = (kind == k).nonzero().squeeze(1)
        image[rows] = scene(draw.rng(f"scene {k}"), x, y, texture[rows])
    return image.clamp_(0, 1).sub_(0.5).mul_(on).add_(0.5)


# --------------------------------------------------------------------- between sign and camera


def _leaves(image: Tensor, draw: _Draws, texture: Tensor, on: float) -> None:
    present, reach, dense = draw("leaves", (0, 1), (0.56, 0.7), (0.6, 1))
    colour = _colour(draw.rng("leaf colour"), draw.n, (0.08, 0.18, 0.04), (0.5, 0.46, 0.22))
    alpha = ((texture - reach) * 25).clamp_(0, 1) * (dense * (present < 0.35) * on)
    _paint(image, colour * (0.5 + texture).unsqueeze(1), alpha)


def _shadow(image: Tensor, draw: _Draws, x: Tensor, y: Tensor, on: float) -> None:
    present, dx, dy, offset, edge, depth = draw(
        "shadow", (0, 1), (-1, 1), (-1, 1), (-0.7, 0.7), (2, 20), (0.25, 0.65)
    )
    dark = ((x * dx + y * dy + offset * 0.6) * edge).clamp_(0, 1) * (depth * (present < 0.5) * on)
    image *= (1 - dark).unsqueeze(1)


def _weather(
    image: Tensor, draw: _Draws, x: Tensor, y: Tensor, clouds: Tensor, on: Conditions
) -> None:
    kind = torch.randint(6, (draw.n,), generator=draw.rng("weather"))
    kinds = ((_rain, on.rain), (_fog, on.fog), (_snow, on.snow))
    for k, (fall, amount) in enumerate(kinds):
        rows = (kind == k).nonzero().squeeze(1)
        part = image[rows]
        rng = draw.rng(f"weather {k}")
        grey = _colour(rng, len(rows), (0.62, 0.64, 0.66), (0.92, 0.93, 0.94))
        _paint(part, grey, fall(rng, x, y, clouds[rows]) * amount)
        image[rows] = part


def _rain(rng: Generator, x: Tensor, y: Tensor, clouds: Tensor) -> Tensor:
    n, k = len(clouds), 32
    lanes, wind, speed, dense, bright = _uniform(
        rng, n, (6, 14), (-0.5, 0.5), (1.2, 3), (0.15, 0.4), (0.35, 0.75)
    )
    table = torch.rand(n, k, k, generator=rng)
    across = (x + y * wind) * lanes + 99
    lane = across.floor()
    along = y * speed + _cell(table, torch.zeros_like(y), lane) * 8
    drop = _cell(table, along.floor(), lane) < dense
    return (1 - ((across - lane) * 2 - 1).abs()) * drop * bright


def _fog(rng: Generator, x: Tensor, y: Tensor, clouds: Tensor) -> Tensor:
    thick, uneven, rise = _uniform(rng, len(clouds), (0.2, 0.65), (0, 0.8), (-0.2, 0.1))
    return (thick + (clouds - 0.5) * uneven + y * rise).clamp_(0, 0.8)


def _snow(rng: Generator, x: Tensor, y: Tensor, clouds: Tensor) -> Tensor:
    n, k = len(clouds), 32
    cells, phase, radius, bright = _uniform(rng, n, (3, 6.5), (0, 8), (0.12, 0.3), (0.6, 1))
    down, right, big, slide = torch.rand(4, n, k, k, generator=rng)
    i = y * cells + phase
    row = i.floor()
    j = x * cells + phase + _cell(slide, row, torch.zeros_like(y))  # no flakes in columns
    column = j.floor()
    dy = i - row - 0.2 - 0.6 * _cell(down, row, column)
    dx = j - column - 0.2 - 0.6 * _cell(right, row, column)
    edge = radius * _cell(big, row, column) - (dx * dx + dy * dy).sqrt_()
    return (0.5 + edge * (x.shape[-1] / 2) / cells).clamp_(0, 1) * bright


# ---------------------------------------------------------------------------------- the camera


def _smear(image: Tensor, weight: Tensor, dy: int, dx: int) -> Tensor:
    """Each pixel with `weight` (n, 1, 1, 1) of either neighbour at distance (dy, dx)."""
    ry, rx, (h, w) = abs(dy), abs(dx), image.shape[-2:]
    padded = F.pad(image, (rx, rx, ry, ry), mode="replicate")
    one = padded[..., ry - dy : ry - dy + h, rx - dx : rx - dx + w]
    other = padded[..., ry + dy : ry + dy + h, rx + dx : rx + dx + w]
    return (one + other).mul_(weight).add_(image * (1 - 2 * weight))


def _blur(image: Tensor, draw: _Draws, on: Conditions) -> Tensor:
    # Smears at distances 1, 1, 2, 4, ... add up to a smooth kernel as wide as the side asks.
    steps = [1] + [2**k for k in range(math.ceil(math.log2(image.shape[-1] / 32)) + 1)]

    (defocus,) = draw("defocus", (0, 0.25))
    weight = (defocus * on.defocus).unsqueeze(1)
    for step in steps:
        image = _smear(_smear(image, weight, step, 0), weight, 0, step)

    (motion,) = draw("motion", (-1 / 3, 1 / 3))
    weight = (motion.clamp(min=0) * on.motion).unsqueeze(1)
    way = torch.randint(4, (draw.n,), generator=draw.rng("motion way"))
    for k, (dy, dx) in enumerate(((0, 1), (1, 0), (1, 1), (1, -1))):
        rows = ((way == k) & (weight.flatten() > 0)).nonzero().squeeze(1)
        part = image[rows]
        for step in steps:
            part = _smear(part, weight[rows], dy * step, dx * step)
        image[rows] = part
    return image


def _camera(image: Tensor, draw: _Draws, on: Conditions) -> Tensor:
    (exposure,) = draw("exposure", (-0.45, 0.3))
    (contrast,) = draw("contrast", (-0.4, 0.25))
    cast = torch.rand(draw.n, 3, 1, 1, generator=draw.rng("cast")) * 0.3 - 0.15
    slope = (1 + contrast * on.contrast).unsqueeze(1)
    gain = (1 + exposure * on.exposure).unsqueeze(1) * (1 + cast * on.cast) * slope
    image = image * (gain * 255) + (1 - slope) * (0.45 * 255)

    (grain,) = draw("noise", (0, 10))
    static = torch.rand(image.shape, generator=draw.rng("static"))
    image += (static - 0.5) * (2 * grain * on.noise).unsqueeze(1)
    return image.add_(0.5).clamp_(0, 255).to(torch.uint8)
