"""Residual networks in their CIFAR form: a 3x3 stem of stride 1 and no max-pooling.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition", arXiv 1512.03385:
section 4.2 for resnet20 and resnet32 (widths 16, 32, 64), table 1 for resnet18 and resnet50.
Departs: resnet18 and resnet50 have the stem above, as is usual for images of 32 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arena.core.networks import Network, Shape


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def he_init(body: nn.Module) -> None:
    """He et al. 2015 (arXiv 1502.01852): normal weights scaled for ReLU; zero biases."""
    for module in body.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class PadShortcut(nn.Module):
    """Option A of the paper: every second pixel, and zeros for the new channels; no weights."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


def projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    """Option B of the paper: a strided 1x1 convolution."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    EXPANSION = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    EXPANSION = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: nn.Module) -> None:
        super().__init__()
        outputs = width * self.EXPANSION
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = shortcut
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out)) + self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    """Stage i has depths[i] blocks of width widths[i]; stages from the second on halve the map."""

    def __init__(
        self,
        classes: int,
        channels: int,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        padded_shortcuts: bool = False,
    ) -> None:
        super().__init__()
        grow = PadShortcut if padded_shortcuts else projection
        self.conv1 = conv3x3(channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.stages = nn.Sequential()
        inputs = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            outputs = width * block.EXPANSION
            blocks = nn.Sequential()
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                same = stride == 1 and inputs == outputs
                shortcut = nn.Identity() if same else grow(inputs, outputs, stride)
                blocks.append(block(inputs, width, stride, shortcut))
                inputs = outputs
            self.stages.append(blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.relu(self.bn1(self.conv1(x))))
        return self.head(torch.flatten(self.pool(x), 1))


WIDE, NARROW = (64, 128, 256, 512), (16, 32, 64)
SOURCE = "He et al. 2016, arXiv 1512.03385"


def resnet18(classes: int, shape: Shape) -> nn.Module:
    return ResNet(classes, shape[0], BasicBlock, (2, 2, 2, 2), WIDE)


def resnet50(classes: int, shape: Shape) -> nn.Module:
    return ResNet(classes, shape[0], Bottleneck, (3, 4, 6, 3), WIDE)


def resnet20(classes: int, shape: Shape) -> nn.Module:
    return ResNet(classes, shape[0], BasicBlock, (3, 3, 3), NARROW, padded_shortcuts=True)


def resnet32(classes: int, shape: Shape) -> nn.Module:
    return ResNet(classes, shape[0], BasicBlock, (5, 5, 5), NARROW, padded_shortcuts=True)


LAST_OF_FOUR = ("stages.1", "stages.2", "stages.3")
ALL_THREE = ("stages.0", "stages.1", "stages.2")

NETWORKS = {
    "resnet18": Network(
        build=resnet18,
        levels=LAST_OF_FOUR,
        head="head",
        summary="18 layers, widths 64 to 512, 3x3 stem; 11.2 M weights",
        source=SOURCE,
        sides=(8, 224),
    ),
    "resnet50": Network(
        build=resnet50,
        levels=LAST_OF_FOUR,
        head="head",
        summary="50 layers of bottlenecks, 3x3 stem; 23.5 M weights",
        source=SOURCE,
        sides=(8, 224),
    ),
    "resnet20": Network(
        build=resnet20,
        levels=ALL_THREE,
        head="head",
        summary="20 layers, widths 16 to 64, padded shortcuts (option A); 0.27 M weights",
        source=SOURCE + ", section 4.2",
        sides=(8, 224),
    ),
    "resnet32": Network(
        build=resnet32,
        levels=ALL_THREE,
        head="head",
        summary="32 layers, widths 16 to 64, padded shortcuts (option A); 0.46 M weights",
        source=SOURCE + ", section 4.2",
        sides=(8, 224),
    ),
}
