"""Network in network: each convolution is followed by two of 1x1; no linear layer.

Source: Lin et al. 2013, arXiv 1312.4400, the CIFAR-10 network (192 filters, three mlpconv blocks,
dropout of one half between them, global average pooling). He initialisation, arXiv 1502.01852.
Departs: no ReLU after the class convolution, so that logits may be negative; a pooling window of 3
with stride 2 is padded, so that sides halve.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arena.core.networks import NO_BATCHNORM, Network, Shape
from arena.core.networks.resnet import he_init


def mlpconv(inputs: int, kernel: int, *widths: int) -> nn.Sequential:
    """A convolution of `kernel` and one of 1x1 for each further width, all with ReLU."""
    block = nn.Sequential()
    for width in widths:
        block.append(nn.Conv2d(inputs, width, kernel, padding=kernel // 2))
        block.append(nn.ReLU(inplace=True))
        inputs, kernel = width, 1
    return block


class NetworkInNetwork(nn.Module):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.block1 = mlpconv(channels, 5, 192, 160, 96)
        self.pool1 = nn.MaxPool2d(3, 2, padding=1)
        self.block2 = mlpconv(96, 5, 192, 192, 192)
        self.pool2 = nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)
        self.block3 = mlpconv(192, 3, 192, 192)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Conv2d(192, classes, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.pool1(self.block1(x)))
        x = self.drop(self.pool2(self.block2(x)))
        return torch.flatten(self.pool(self.head(self.block3(x))), 1)


def nin(classes: int, shape: Shape) -> nn.Module:
    return NetworkInNetwork(classes, shape[0])


NETWORKS = {
    "nin": Network(
        build=nin,
        levels=("block1", "block2", "block3"),
        head="head",
        summary="network in network: nine convolutions, no batch norm, dropout; 0.97 M weights",
        source="Lin et al. 2013, arXiv 1312.4400",
        overrides=NO_BATCHNORM,
        sides=(8, 224),
    ),
}
