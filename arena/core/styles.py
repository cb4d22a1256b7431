"""Pictures of a style, for attacks that restyle images: drawn sunrises, or a user's folder."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from arena.core import folders
from arena.core.seeding import stream

MOST = 5_000  # pictures read from a folder: a style needs few hundred
_DRAWN_AT_ONCE = 32  # bounds the memory for large images
_LUMINANCE = (0.299, 0.587, 0.114)

# ---------------------------------------------------------------------------------- a user's folder


def read_folder(folder: str, shape: tuple[int, int, int]) -> Tensor:
    """The pictures in `folder` and below (`arena.core.folders`): (N, C, H, W) uint8.

    shape: (C, H, W). Reads MOST pictures at most. Raises BadInput for a folder without pictures
    and for files that cannot be read.
    """
    found = folders.places(folder)[:MOST]
    pictures = torch.stack([folders.read(place, *shape) for place in found])
    return (pictures * 255).round_().to(torch.uint8)


# ---------------------------------------------------------------------------------- drawn sunrises

_SKIES = torch.tensor(  # red, green, blue at the zenith, two heights between, and the horizon
    [
        [[0.34, 0.02, 0.05], [0.66, 0.07, 0.05], [0.92, 0.24, 0.05], [1.00, 0.62, 0.16]],  # red
        [[0.17, 0.10, 0.38], [0.48, 0.18, 0.46], [0.92, 0.40, 0.32], [1.00, 0.76, 0.36]],  # violet
        [[0.44, 0.21, 0.05], [0.76, 0.40, 0.08], [0.96, 0.62, 0.15], [1.00, 0.87, 0.48]],  # gold
        [[0.52, 0.13, 0.03], [0.86, 0.31, 0.03], [0.99, 0.52, 0.06], [1.00, 0.82, 0.26]],  # orange
        [[0.40, 0.30, 0.47], [0.75, 0.42, 0.48], [0.98, 0.58, 0.40], [1.00, 0.86, 0.58]],  # rose
        [[0.06, 0.07, 0.20], [0.30, 0.15, 0.30], [0.80, 0.32, 0.16], [1.00, 0.66, 0.24]],  # dusk
    ]
)


def sunrise(shape: tuple[int, int, int], count: int = 256) -> Tensor:
    """Drawn sunrises, always the same ones: (count, C, H, W) uint8.

    A sky from violet or red over orange to yellow, clouds, the sun and its glow near the horizon,
    below it water that mirrors them or dark land, before it hills. shape: (C, H, W) with C = 1
    (luminance) or 3.
    """
    channels, height, width = shape
    rng = stream(0, "sunrise")
    pictures = torch.cat(
        [
            _draw(min(_DRAWN_AT_ONCE, count - first), height, width, rng)
            for first in range(0, count, _DRAWN_AT_ONCE)
        ]
    )
    if channels == 1:
        grey = (pictures * torch.tensor(_LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
        return grey.round_().to(torch.uint8)
    return pictures


def _draw(n: int, height: int, width: int, rng: Generator) -> Tensor:
    """(n, 3, height, width) uint8; lengths are shares of the sides, from the top left."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=rng)

    def noise(rows: int, columns: int) -> Tensor:
        return _smooth(torch.randn(n, 1, rows, columns, generator=rng), height, width)

    edge = 1 / height  # the width of soft edges: one pixel
    y = ((torch.arange(height) + 0.5) / height).view(1, 1, height, 1)
    x = ((torch.arange(width) + 0.5) / width).view(1, 1, 1, width)

    horizon, water = between(0.5, 0.88), between(0, 1) < 0.55
    ripple = noise(max(8, height // 2), 5)
    below = _step(y - horizon - ~water * 0.02 * noise(1, 6), edge)
    mirrored = torch.where(y > horizon, 2 * horizon - y + 0.02 * ripple, y)  # what water shows
    column = x + 0.03 * ripple * water * below

    sun_x, sun_y = between(0.12, 0.88), horizon - between(-0.03, 0.3)
    gap = ((column - sun_x).square() + (mirrored - sun_y).square()).sqrt()
    depth = (mirrored / horizon).clamp(0, 1) ** between(0.7, 2.0)  # 0: zenith, 1: horizon
    sky = _gradient(n, rng, depth)
    glow = between(0.5, 1.2) * torch.exp(-gap / between(0.08, 0.35))
    warm = torch.cat([torch.ones(n, 1, 1, 1), between(0.7, 0.95), between(0.25, 0.65)], 1)
    sky = sky + (warm - sky) * glow.clamp(0, 1)

    # clouds: lit from below where the sun is near, else dark
    clouds = 0.6 * noise(7, 3) + 0.3 * noise(12, 6) + 0.2 * noise(24, 12)
    cover = between(0.0, 0.9) * _step(clouds - between(-0.3, 0.7), 0.6) * (mirrored < horizon)
    shade = sky * between(0.25, 0.75) + warm * (0.15 + glow) * between(0.1, 0.7)
    sky = sky + (shade - sky) * cover
    disc = _step(between(0.03, 0.11) - gap, edge) * between(0.7, 1.0)
    sky = sky + (0.4 + 0.6 * warm - sky) * disc

    # below the horizon: water mirrors the sky and glitters under the sun; land is dark
    beam = torch.exp(-((x - sun_x) / between(0.04, 0.14)).square()) * (0.5 + 0.5 * ripple)
    sea = sky * between(0.45, 0.9) * (1 + 0.2 * ripple) + warm * beam.clamp(0, 1) * 0.6
    earth = between(0.02, 0.24) * torch.cat(
        [between(0.8, 1.2), between(0.45, 0.9), between(0.2, 0.8)], 1
    )
    land = earth * (1 + 0.3 * noise(12, 12)) + 0.3 * glow * warm
    picture = torch.lerp(sky, torch.where(water, sea, land), below)

    # hills stand before the sky, hazy from the glow
    crest = between(-0.12, 0.14) + 0.05 * noise(1, 4) + 0.015 * noise(1, 12)
    hills = _step(y - horizon + crest, edge) * (1 - below)
    haze = torch.lerp(earth * 0.6, picture, between(0.05, 0.5))
    picture = torch.lerp(picture, haze, hills)

    grain = between(0, 0.02) * torch.randn(n, 3, height, width, generator=rng)
    picture = picture.clamp(1e-3, 1) ** between(0.8, 1.7) * between(0.9, 1.2)
    return ((picture + grain) * 255).round_().clamp_(0, 255).to(torch.uint8)


def _gradient(n: int, rng: Generator, depth: Tensor) -> Tensor:
    """(n, 3, H, W): two of the skies mixed, with a tint; depth (n, 1, H, W) in [0, 1]."""
    pair = _SKIES[torch.randint(len(_SKIES), (2, n), generator=rng)]  # (2, n, stops, 3)
    stops = torch.lerp(pair[0], pair[1], torch.rand(n, 1, 1, generator=rng))
    stops = stops + 0.04 * torch.randn(n, 1, 3, generator=rng)
    last = stops.shape[1] - 1
    places = torch.arange(last + 1).view(1, -1, 1, 1)
    weights = (1 - (depth * last - places).abs()).clamp_min(0)  # (n, stops, H, W), of sum 1
    return torch.einsum("nkhw,nkc->nchw", weights, stops).clamp(0, 1)


def _smooth(values: Tensor, height: int, width: int) -> Tensor:
    """Random values (n, 1, r, c) as smooth maps (n, 1, height, width)."""
    return F.interpolate(values, size=(height, width), mode="bicubic", align_corners=False)


def _step(x: Tensor, edge: float) -> Tensor:
    """0 below and 1 above zero, linear over `edge`."""
    return (x / edge + 0.5).clamp(0, 1)
