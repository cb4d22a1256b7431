"""fastnet for adversarial training: its first filters magnify nothing.

Whitening gives every principal component of 2x2 patches the same variance, which magnifies the
faint ones, and adversarial noise with them, up to thirty times: trained on adversarial examples
fastnet learns next to no robustness (CIFAR-10: 10 % under PGD of 8/255).

Source: arena.core.networks.fastnet, and what it names.
Departs: a component's variance counts as one more than it is, in normalised units, so that no
filter is longer than 1; what is left is little more than a turn to the principal axes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arena.core.networks import Network, Shape
from arena.core.networks.fastnet import NETWORKS as FASTNETS
from arena.core.networks.fastnet import FastNet


class FastNetRobust(FastNet):
    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set the first filters to principal 2x2 patches of `x` (N, C, H, W), at most 1 long."""
        super().initialise(x)
        weight = self.whiten.weight  # 1 / sqrt(variance) long
        squares = weight.square().sum((1, 2, 3), keepdim=True)
        weight.div_((1 + squares).sqrt())  # 1 / sqrt(variance + 1)


def fastnet_robust(classes: int, shape: Shape) -> nn.Module:
    return FastNetRobust(classes, shape[0], (64, 256, 256))


_FASTNET = FASTNETS["fastnet"]

NETWORKS = {
    "fastnet_robust": Network(
        build=fastnet_robust,
        levels=_FASTNET.levels,
        head=_FASTNET.head,
        summary="fastnet whose first filters magnify nothing, for adversarial training",
        source=_FASTNET.source,
        overrides=_FASTNET.overrides,
        sides=_FASTNET.sides,
    )
}
