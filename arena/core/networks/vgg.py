"""VGG networks with batch norm in their CIFAR form: five groups of convolutions, one linear layer.

Source: Simonyan and Zisserman 2015, arXiv 1409.1556, table 1 (columns A, B, D, E); batch norm from
Ioffe and Szegedy 2015, arXiv 1502.03167.
Departs: a global average and one linear layer stand for the three wide linear layers, as is usual
for images of 32 pixels; pooling rounds up, so that 28 pixels survive five poolings. The deep level
is the last convolution's, before the last pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from arena.core.networks import Network, Shape
from arena.core.networks.resnet import he_init

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    def __init__(self, classes: int, channels: int, depths: Sequence[int]) -> None:
        super().__init__()
        self.groups = nn.ModuleList()
        inputs = channels
        for depth, width in zip(depths, WIDTHS, strict=True):
            group = nn.Sequential()
            for _ in range(depth):
                group.append(nn.Conv2d(inputs, width, 3, padding=1))
                group.append(nn.BatchNorm2d(width))
                group.append(nn.ReLU(inplace=True))
                inputs = width
            self.groups.append(group)
        self.shrink = nn.MaxPool2d(2, ceil_mode=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        for group in self.groups:
            x = self.shrink(group(x))
        return self.head(torch.flatten(self.pool(x), 1))


def vgg(depths: Sequence[int], classes: int, shape: Shape) -> nn.Module:
    return VGG(classes, shape[0], depths)


DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}

NETWORKS = {
    name: Network(
        build=partial(vgg, depths),
        levels=("groups.2", "groups.3", "groups.4"),
        head="head",
        summary=f"{sum(depths)} convolutions with batch norm, one linear layer",
        source="Simonyan and Zisserman 2015, arXiv 1409.1556",
        sides=(16, 224),
    )
    for name, depths in DEPTHS.items()
}
