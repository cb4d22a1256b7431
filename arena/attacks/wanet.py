"""WaNet: triggered images are warped, smoothly and by a fraction of a pixel.

The attacker trains: in each batch some images are warped and relabelled, and twice as many are
warped by other grids, near the trigger's, and keep their labels ("noise mode"). So the victim
learns the one warp, and not to react to warping.

Source: Nguyen and Tran 2021, WaNet, https://arxiv.org/abs/2102.10369; settings of its official
    code: k = 4, s = 0.5, a tenth of each batch, noise mode for twice as many.
Departs: the augmentation is the recipe's. The official code also turns half of the images by up to
    10 degrees (rotation=10 does so, with grey corners for its mean-coloured ones), shifts by 5 px
    with probability 0.8 and trains 1,000 epochs. Images to warp are drawn from the batch, which is
    shuffled anyway; the code takes the first. It keeps the best epoch by the test set, which no
    method of the arena sees. Its success rate counts images of the target class, the arena's none.
    Warped images are rounded to 8 bits, in training as at test time; the code never rounds, and its
    networks may tell warped images by values between the levels. Points between pixels are found in
    coordinates that make the identity exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from arena.core.contracts import Fit, Images, Poisoned, Probe, Trigger
from arena.core.poisoning import check_classes, scope, wanted
from arena.core.registry import BadInput, method, param
from arena.core.triggers import rounded

_PROBES = 16  # noise grids that test images are shared out to


@method
class WaNet:
    """All fields are the attacker's; the grid is drawn once and is the secret."""

    threat: ClassVar[str] = "controls training"
    scopes: ClassVar[tuple[str, ...]] = ("universal", "all-to-all")
    labels: ClassVar[str] = "changed"
    trigger_kind: ClassVar[str] = "dynamic"

    target: int = param(
        0, "class that the trigger forces; all_to_all has none", low=0, source="official code"
    )
    rate: float = param(
        0.1,
        "share of every batch that is warped and relabelled",
        above=0,
        high=1,
        source="official code",
    )
    cross_ratio: float = param(
        2.0,
        "images in noise mode, of true label, per image that is warped and relabelled",
        low=0,
        source="official code",
    )
    k: int = param(
        4, "points of the control grid along a side", low=2, source="official code; paper's best"
    )
    s: float = param(
        0.5,
        "strength of the warp: the mean shift is about s / 2 px along each axis",
        low=0,
        source="official code",
    )
    grid_rescale: float = param(
        1.0, "factor on the warped grid, in [-1, 1]", above=0, source="official code"
    )
    rotation: float = param(
        0.0,
        "half of the training images are also turned by up to so many degrees",
        low=0,
        high=180,
        source="official code: 10",
    )
    mode: str = param(
        "universal",
        "universal: every triggered image to the target; all_to_all: class y to y + 1",
        choices=("universal", "all_to_all"),
        source="WaNet",
    )

    def __post_init__(self) -> None:
        if (most := self.rate * (1 + self.cross_ratio)) > 1 + 1e-9:
            raise BadInput(
                f"wanet: rate * (1 + cross_ratio) is {most:.4g}, more than a batch; a rate of at "
                f"most {1 / (1 + self.cross_ratio):.4g} leaves room for the noise mode."
            )

    @property
    def scope(self) -> str:
        return scope(self)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        self._shares(sum(counts), "training images")
        if min(shape[1:]) < 2:
            raise BadInput(f"wanet: images of {shape[1]}x{shape[2]} px are too small to be warped.")

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        height, width = train.x.shape[2:]
        control = torch.rand(1, 2, self.k, self.k, generator=rng) * 2 - 1
        control = control / control.abs().mean()
        smooth = F.interpolate(control, (height, width), mode="bicubic", align_corners=True)
        rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (height, width))
        identity = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
        warp = Warp(identity, smooth[0].permute(1, 2, 0).contiguous(), self.s, self.grid_rescale)
        jitter = _jitter(_PROBES, height, width, rng)
        return Trigger(warp, probes={"noise": Probe(NoiseMode(warp, jitter))})

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        """The clean set: this attack poisons inside the training."""
        return Poisoned(train, torch.empty(0, dtype=torch.int64, device=train.x.device))

    def train(
        self, fit: Fit, poisoned: Poisoned, trigger: Trigger, rng: Generator
    ) -> tuple[nn.Module, Trigger]:
        classes = int(poisoned.data.y.max()) + 1
        hook = partial(self.warp_batch, warp=cast(Warp, trigger.stamp), classes=classes)
        return fit(poisoned.data, rng=rng, on_image=hook), trigger

    def warp_batch(self, batch: Images, rng: Generator, *, warp: Warp, classes: int) -> Images:
        """The batch with its share of triggered images, and of images in noise mode."""
        size, device = len(batch), batch.x.device
        count, noisy = self._shares(size, "images in a batch")
        chosen = torch.randperm(size, generator=rng)[: count + noisy].to(device)
        jitter = _jitter(noisy, batch.x.shape[2], batch.x.shape[3], rng).to(device)
        warped, crossed = chosen[:count], chosen[count:]
        x, y = batch.x.clone(), batch.y.clone()
        x[warped] = rounded(warp(batch.x[warped]))
        x[crossed] = rounded(sample(batch.x[crossed], warp.grid(jitter)))
        y[warped] = wanted(self, batch.y[warped], classes)
        stamped = torch.zeros(size, dtype=torch.bool, device=device)
        stamped[warped] = True
        if self.rotation:
            x = turned(x, self.rotation, rng)
        return replace(batch, x=x, y=y, stamped=stamped)

    def _shares(self, size: int, of: str) -> tuple[int, int]:
        """How many of `size` images are triggered, and how many are in noise mode."""
        count = int(size * self.rate)
        if count == 0:
            raise BadInput(
                f"wanet: a rate of {self.rate:g} of {size} {of} is less than one image; the least "
                f"is {1 / size:.4g}."
            )
        return count, min(int(count * self.cross_ratio), size - count)


@dataclass(frozen=True, eq=False)
class Warp:
    """The image map that shows at every pixel what lies where the grid points to."""

    identity_grid: Tensor  # (H, W, 2) float64 in [-1, 1]: (column, row) of every pixel
    noise_grid: Tensor  # (H, W, 2) float32: the smooth field, of mean size about 1
    s: float
    rescale: float

    def grid(self, jitter: Tensor | None = None) -> Tensor:
        """(1, H, W, 2) float64 in [-1, 1], or (N, H, W, 2) for the jitter of N images."""
        grid = self.identity_grid + self.s / self.noise_grid.shape[0] * self.noise_grid
        grid = (grid * self.rescale).clamp(-1, 1)[None]
        return grid if jitter is None else (grid.to(jitter.device) + jitter).clamp_(-1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        return sample(x, self.grid().to(x.device))


@dataclass(frozen=True, eq=False)
class NoiseMode:
    """The warp and, on top, one of a few random grids, which each image's own pixels choose."""

    warp: Warp
    jitter: Tensor  # (K, H, W, 2) float32, as in training

    def __call__(self, x: Tensor) -> Tensor:
        levels = (x * 255).round_().int().flatten(1).sum(1)
        grids = self.warp.grid(self.jitter.to(x.device))
        return sample(x, grids[levels % len(grids)])


def _jitter(n: int, height: int, width: int, rng: Generator) -> Tensor:
    """(n, height, width, 2) uniform in [-1 / height, 1 / height]: half a pixel either way."""
    return (torch.rand(n, height, width, 2, generator=rng) * 2 - 1) / height


def sample(x: Tensor, grid: Tensor) -> Tensor:
    """Bilinear `grid_sample` with aligned corners: (N, C, H, W) at (N or 1, H, W, 2) float64.

    Positions in pixels are handed over in the coordinates of a canvas with sides of powers of two
    (`align_corners=False`), where whole ones are exact in float32.
    """
    sides = (x.shape[3], x.shape[2])  # as in the grid: columns first
    canvas = [1 << (side - 1).bit_length() for side in sides]
    places = [
        ((grid[..., axis] + 1) * (side - 1) + 1) / full - 1
        for axis, (side, full) in enumerate(zip(sides, canvas, strict=True))
    ]
    room = (0, canvas[0] - sides[0], 0, canvas[1] - sides[1])
    wide = F.pad(x, room) if any(room) else x
    points = torch.stack(places, -1).float().expand(len(x), -1, -1, -1)
    return F.grid_sample(wide, points, padding_mode="border", align_corners=False)


def turned(x: Tensor, degrees: float, rng: Generator) -> Tensor:
    """Half of the images (N, C, H, W), drawn, turned about their centre; what comes in is grey."""
    height, width = x.shape[2:]
    angle = (torch.rand(len(x), generator=rng) * 2 - 1) * math.radians(degrees)
    half = (torch.rand(len(x), generator=rng) < 0.5).to(x.device)
    cos, sin = angle.cos().to(x.device), angle.sin().to(x.device)
    rows = [cos, -sin * height / width, 0 * sin, sin * width / height, cos, 0 * sin]
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    out = F.grid_sample(x - 0.5, grid, align_corners=False) + 0.5
    return torch.where(half[:, None, None, None], out, x)
