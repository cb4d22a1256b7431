"""Numbers that an image's own pixels draw, for triggers that differ from image to image.

An image map must be pure: what it does to an image may depend on neither the batch nor the device.
So its choices are hashes of the image at 8 bits, in whole numbers, which are exact in any order.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

_BOUND = 2**23  # of a weight: times 255, summed over 2**22 values, still exact in float64


def draw_weights(values: int, rng: Generator, hashes: int = 1) -> Tensor:
    """(hashes, values) int32: what `pixel_hashes` multiplies images of that many values with."""
    return torch.randint(_BOUND, (hashes, values), generator=rng, dtype=torch.int32)


def pixel_hashes(x: Tensor, weights: Tensor) -> Tensor:
    """(N, hashes) int64, not negative, of float images x (N, C, H, W) in [0, 1]."""
    levels = (x * 255).round_().double().flatten(1)
    return (levels @ weights.to(x.device).double().T).long()
