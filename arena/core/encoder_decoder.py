"""A convolutional encoder and decoder from images to images, for triggers drawn for each image.

Source: the generators of Nguyen and Tran 2020, https://arxiv.org/abs/2010.08138, for 32 px: levels
    of 32, 64 and 128 channels without skip connections, max-pooling down, bilinear interpolation
    up, batch norm after every convolution.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

SMALLEST = 8  # px a side: they are halved three times


class EncoderDecoder(nn.Module):
    """(N, C, H, W) in [0, 1] -> (N, out, H, W) float32 in [0, 1]; H and W are at least 8."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [_convs(channels, 32, 32), _convs(32, 64, 64), _convs(64, 128, 128)]
        )
        self.middle = _convs(128, 128)
        self.up = nn.ModuleList([_convs(128, 128, 64), _convs(64, 64, 32), _convs(32, 32)])
        self.last = _convs(32, out)[:-1]  # without its ReLU

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for block in self.down:
            x = block(x)
            sides.append(x.shape[2:])
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = block(F.interpolate(x, size=sides.pop(), mode="bilinear"))
        return self.last(x).float().tanh() / 2 + 0.5


def _convs(*widths: int) -> nn.Sequential:
    """3x3 convolutions from each width to the next, each with batch norm and a ReLU."""
    parts: list[nn.Module] = []
    for one, two in pairwise(widths):
        parts += [nn.Conv2d(one, two, 3, padding=1), nn.BatchNorm2d(two), nn.ReLU()]
    return nn.Sequential(*parts)
