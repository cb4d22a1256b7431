"""The pre-activation residual network in its CIFAR form.

Source: He et al. 2016, "Identity Mappings in Deep Residual Networks", arXiv 1603.05027; blocks
(2, 2, 2, 2) of widths 64 to 512.
Departs: shallow and middle levels are the sums at the ends of the stages, which are not rectified;
the deep level follows the final batch norm and ReLU, which common re-implementations leave out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arena.core.networks import Network, Shape
from arena.core.networks.resnet import WIDE, conv3x3, he_init


class PreActBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = (
            None
            if stride == 1 and inputs == outputs
            else nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        return self.conv2(F.relu(self.bn2(self.conv1(active)))) + kept


class PreActResNet18(nn.Module):
    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, WIDE[0])
        self.stages = nn.Sequential()
        inputs = WIDE[0]
        for stage, width in enumerate(WIDE):
            first = PreActBlock(inputs, width, 2 if stage > 0 else 1)
            self.stages.append(nn.Sequential(first, PreActBlock(width, width, 1)))
            inputs = width
        self.bn = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stages(self.conv1(x))))
        return self.head(torch.flatten(self.pool(x), 1))


def preact_resnet18(classes: int, shape: Shape) -> nn.Module:
    return PreActResNet18(classes, shape[0])


NETWORKS = {
    "preact_resnet18": Network(
        build=preact_resnet18,
        levels=("stages.1", "stages.2", "relu"),
        head="head",
        summary="18 layers with norm and ReLU before each convolution; 11.2 M weights",
        source="He et al. 2016, arXiv 1603.05027",
        sides=(8, 224),
    ),
}
