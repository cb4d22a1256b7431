"""A quarter of fastnet_robust, for adversarial training on CPUs.

Source: arena.core.networks.fastnet_robust, and what it names; narrower, as fastnet_small is.
A file of its own, since what was made with fastnet_robust is keyed by the code of its file.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from arena.core.networks import Shape
from arena.core.networks.fastnet_robust import NETWORKS as ROBUST
from arena.core.networks.fastnet_robust import FastNetRobust


def fastnet_robust_small(classes: int, shape: Shape) -> nn.Module:
    return FastNetRobust(classes, shape[0], (32, 64, 128))


NETWORKS = {
    "fastnet_robust_small": replace(
        ROBUST["fastnet_robust"],
        build=fastnet_robust_small,
        summary="a quarter of fastnet_robust, for adversarial training on CPUs",
    )
}
