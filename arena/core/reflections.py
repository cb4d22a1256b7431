"""Reflections on glass: what a pane between camera and scene adds to a picture.

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

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from arena.core.hashing import draw_weights, pixel_hashes
from arena.core.metrics import similarity

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
    hash: Tensor  # (1, C*H*W): the weights of a hash
    gamma: float  # 1: stored values are added up as they are
    balanced: bool  # a and through go by brightness: each gets its share of the two means

    def __len__(self) -> int:
        return len(self.light)

    def take(self, rows: Tensor) -> Panes:
        """Some of the panes. rows: (R,) int64."""
        each = {name: getattr(self, name)[rows] for name in PER_PANE}
        return replace(self, **each)

    def chosen(self, x: Tensor) -> Tensor:
        """(N,) int64: each image's pane, by a hash of it."""
        return pixel_hashes(x, self.hash)[:, 0] % len(self)

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
        return Panes(
            torch.stack(light),
            torch.stack(through),
            torch.tensor(alpha),
            torch.tensor(darkening),
            hash=draw_weights(light[0].numel(), rng),
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
