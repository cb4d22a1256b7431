"""The networks. Each file here defines `NETWORKS`, a dict from name to Network, and is found by
being here; `arena.core.models` merges them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

Shape = tuple[int, int, int]  # channels, height, width

NO_BATCHNORM: Mapping[str, Mapping[str, object]] = {
    # without batch norm the recipes' own rates diverge
    "smoke": {"lr": 0.02},
    "fast": {"lr": 0.05},
    "paper": {"lr": 0.01},
}


@dataclass(frozen=True)
class Network:
    """An architecture: how to build its body, and where to look inside."""

    build: Callable[[int, Shape], nn.Module]
    """(classes, shape of an image) -> body: normalised float (N, C, H, W) -> logits (N, classes)"""
    levels: tuple[str, str, str]
    """Modules of the body whose output is the shallow, the middle and the deep feature map
    (N, K, H', W'), after the block's last ReLU where there is one."""
    head: str
    """Module of the body, Linear or 1x1 convolution, that reads the deep level after nothing but
    channel-wise steps: scaling a deep channel equals scaling its columns of the head's weight."""
    summary: str
    source: str
    overrides: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Recipe name -> fields of the recipe that this network wants otherwise."""
    sides: tuple[int, int] = (28, 224)
    """Smallest side of an image that it can take, and largest that it is meant for, in pixels."""
