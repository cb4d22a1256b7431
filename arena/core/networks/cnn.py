"""A small network for traffic signs: three convolutions and one linear layer.

Source: LISA-CNN of Eykholt et al. 2018, "Robust Physical-World Attacks on Deep Learning Visual
Classification", arXiv 1707.08945 (the basic convolutional model of the CleverHans library), which
MOTH (Tao et al. 2022) and its successors train on LISA.
Departs: an adaptive 2x2 average stands before the linear layer; it changes nothing at 32 pixels,
where the last map has 2x2 pixels already.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arena.core.networks import NO_BATCHNORM, Network, Shape
from arena.core.networks.resnet import he_init


class SignCNN(nn.Module):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(channels, 64, 8, 2, padding=3), nn.ReLU(inplace=True))
        self.block2 = nn.Sequential(nn.Conv2d(64, 128, 6, 2), nn.ReLU(inplace=True))
        self.block3 = nn.Sequential(nn.Conv2d(128, 128, 5), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(128 * 2 * 2, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(x)))
        return self.head(torch.flatten(self.pool(x), 1))


def cnn(classes: int, shape: Shape) -> nn.Module:
    return SignCNN(classes, shape[0])


NETWORKS = {
    "cnn": Network(
        build=cnn,
        levels=("block1", "block2", "block3"),
        head="head",
        summary="three convolutions and one linear layer, no batch norm; 0.7 M weights",
        source="Eykholt et al. 2018, arXiv 1707.08945 (LISA-CNN)",
        overrides=NO_BATCHNORM,
        sides=(28, 224),
    ),
}
