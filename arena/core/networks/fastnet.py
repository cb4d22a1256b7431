"""A small, fast convolutional network for CPU runs: about 90 % on CIFAR-10 in minutes on two cores.

Source: the CIFAR-10 speed-run line of networks (Page, "How to train your ResNet", 2018; Jordan,
"94% on CIFAR-10 in 3.29 seconds on a single GPU", 2024, arXiv 2404.00498, section 3): a fixed
whitening convolution, three groups of two convolutions, max-pooling, batch norm without a scale,
a scaled linear head.
Departs: ReLU instead of GELU (cheaper on CPUs, and channel-pruning defenses assume it); pooling
rounds sizes up, since rounding down makes the network all but blind to the image's bottom and right
border, where most patch triggers sit (patch ASR 96 % instead of over 99 %).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arena.core.networks import Network
from arena.core.training import SPEEDRUN

HEAD_SCALE = 1 / 9  # keeps the logits small under label smoothing
WHITEN_EPS = 5e-4  # variance floor of the whitening, in normalised units


class Group(nn.Module):
    """Convolution, pooling, norm, ReLU, convolution, norm, ReLU; halves the side (rounded up)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2, ceil_mode=True)  # floor would drop the last row and column
        self.norm1 = nn.BatchNorm2d(outputs, momentum=0.4, eps=1e-5)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs, momentum=0.4, eps=1e-5)
        for conv in (self.conv1, self.conv2):  # start as the identity where the widths allow it
            nn.init.dirac_(conv.weight[: conv.in_channels])
        for norm in (self.norm1, self.norm2):  # scale and next convolution would say the same twice
            norm.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.pool(self.conv1(x))))
        return F.relu(self.norm2(self.conv2(x)))


class FastNet(nn.Module):
    def __init__(self, classes: int, channels: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        whitened = 2 * channels * 2 * 2
        self.whiten = nn.Conv2d(channels, whitened, 2)
        self.whiten.weight.requires_grad_(False)
        self.group1 = Group(whitened, widths[0])
        self.group2 = Group(widths[0], widths[1])
        self.group3 = Group(widths[1], widths[2])
        self.pool = nn.AdaptiveMaxPool2d(1)
        self.head = nn.Linear(widths[2], classes, bias=False)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the whitening filters to the scaled principal 2x2 patches of `x` (N, C, H, W)."""
        conv = self.whiten
        channels, side = conv.in_channels, conv.kernel_size[0]
        patches = x.unfold(2, side, 1).unfold(3, side, 1)  # (N, C, H', W', s, s)
        flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * side * side).double()
        values, vectors = torch.linalg.eigh(torch.cov(flat.T))
        filters = (vectors / (values + WHITEN_EPS).sqrt()).T.flip(0)
        filters = filters.reshape(-1, channels, side, side).to(conv.weight)
        conv.weight.copy_(torch.cat([filters, -filters]))  # both signs: ReLU loses none
        assert conv.bias is not None
        conv.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.whiten(x))
        x = self.group3(self.group2(self.group1(x)))
        return self.head(self.pool(x).flatten(1)) * HEAD_SCALE


def _sized(widths: tuple[int, int, int], summary: str, source: str) -> Network:
    return Network(
        build=lambda classes, shape: FastNet(classes, shape[0], widths),
        levels=("group1", "group2", "group3"),
        head="head",
        summary=summary,
        source=source,
        overrides={"fast": SPEEDRUN, "smoke": {"lr": 0.4, "bias_lr": 16.0}},
        sides=(16, 224),
    )


NETWORKS = {
    "fastnet": _sized(
        (64, 256, 256),
        "fast network for CPU runs, widths 64/256/256, 1.97 million weights",
        "Jordan 2024, arXiv 2404.00498; with ReLU and ceiling pooling",
    ),
    "fastnet_small": _sized(
        (32, 64, 128),
        "a quarter of fastnet for tests and demonstrations, widths 32/64/128",
        "Jordan 2024, arXiv 2404.00498; narrower",
    ),
    "fastnet_tiny": _sized(
        (8, 16, 32),
        "to see that things run, widths 8/16/32",
        "Jordan 2024, arXiv 2404.00498; narrower still",
    ),
}
