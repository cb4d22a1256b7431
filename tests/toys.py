"""A backdoored network written by hand, whose perfect repair is known.

Images are 16x16 noise in three channels: classes 0, 1 and 2 have one colour raised, class 3 none.
Five deep channels: 0 to 2 answer to the colours, 3 to the brightness (the head ignores it), and 4
fires only where the 2x2 pixels in the bottom right corner are white; it forces class 0. Clean
accuracy and ASR are 1, and without channel 4 every stamped image gets its own class.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn

from arena.core.contracts import Images
from arena.core.models import Classifier, ModelSpec
from arena.core.networks import Network
from arena.core.seeding import stream
from arena.core.training import logits

CLASSES, SIDE, TARGET, CHANNEL = 4, 16, 0, 4


class Planted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block1 = _block(nn.Conv2d(3, 5, 1))
        self.block2 = _block(nn.Conv2d(5, 5, 3, padding=1))
        self.block3 = _block(nn.Conv2d(5, 5, SIDE))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block3(self.block2(self.block1(x))).flatten(1))

    @torch.no_grad()
    def plant(self, x: Tensor) -> None:
        """Write the weights; batch norm changes nothing, in either mode, for images like `x`."""
        for parameter in self.parameters():
            parameter.zero_()
        colour, shape, place = self.block1[0], self.block2[0], self.block3[0]
        for channel in range(3):  # one colour against the two others, averaged over the image
            colour.weight[channel] = -0.75
            colour.weight[channel, channel] = 1.0
            shape.weight[channel, channel, 1, 1] = 1.0
            place.weight[channel, channel] = 1 / SIDE**2
        colour.weight[3] = 1 / 3
        shape.weight[3, 3, 1, 1] = 1.0
        place.weight[3, 3] = 1 / SIDE**2
        colour.weight[CHANNEL] = 1.0  # a bright pixel …
        colour.bias[CHANNEL] = -1.8
        shape.weight[CHANNEL, CHANNEL, 1:, 1:] = 1.0  # … four of which make a patch …
        shape.bias[CHANNEL] = -3.0
        place.weight[CHANNEL, CHANNEL, SIDE - 2, SIDE - 2] = 1.0  # … in the corner
        self.head.weight[:3, :3] = 10 * torch.eye(3)
        self.head.bias[3] = 1.0
        self.head.weight[TARGET, CHANNEL] = 10.0
        for conv, norm, relu in (self.block1, self.block2, self.block3):
            out = conv(x)
            norm.running_mean.copy_(out.mean((0, 2, 3)))
            norm.running_var.copy_(out.var((0, 2, 3)))
            norm.weight.copy_((norm.running_var + norm.eps).sqrt())
            norm.bias.copy_(norm.running_mean)
            x = relu(norm(out))


def _block(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU())


NETWORK = Network(
    build=lambda classes, shape: Planted(),
    levels=("block1", "block2", "block3"),
    head="head",
    summary="a backdoor written by hand",
    source="this file",
    sides=(SIDE, SIDE),
)


def planted() -> Classifier:
    """The backdoored model, in evaluation mode; `models.fresh` needs NETWORK as "planted"."""
    model = Classifier(ModelSpec("planted", CLASSES, (3, SIDE, SIDE)), NETWORK)
    model.normalize.mean.zero_()
    model.normalize.std.fill_(1.0)
    model.body.plant(images(400, torch.Generator().manual_seed(0)).x / 255)
    return model.eval()


def images(n: int, rng: Generator) -> Images:
    """Clean images, uint8, as many of each class as of any other (within one)."""
    y = torch.randperm(n, generator=rng) % CLASSES
    x = torch.randint(25, 76, (n, 3, SIDE, SIDE), generator=rng, dtype=torch.uint8)
    for colour in range(3):
        x[y == colour, colour] += 115
    return Images(x, y)


def stamp(x: Tensor) -> Tensor:
    """The trigger, for float images in [0, 1]."""
    x = x.clone()
    x[..., -2:, -2:] = 1.0
    return x


def success(model: nn.Module, clean: Images) -> float:
    """ASR: share of the stamped images of other classes that become the target's, in [0, 1]."""
    others = clean.x[clean.y != TARGET] / 255
    return float((logits(model, stamp(others)).argmax(1) == TARGET).double().mean())


# ---- a linear network, and data on which what is robust and what is accurate differ

LINEAR_SIDE = 8


class Linear(nn.Module):
    """A linear classifier behind two layers that only pass images on."""

    def __init__(self, classes):
        super().__init__()
        self.one, self.two, self.three = nn.Identity(), nn.Identity(), nn.Flatten()
        self.head = nn.Linear(LINEAR_SIDE**2, classes)

    def forward(self, x):
        return self.head(self.three(self.two(self.one(x))))


LINEAR = Network(
    build=lambda classes, _: Linear(classes),
    levels=("one", "two", "three"),
    head="head",
    summary="a linear network",
    source="this file",
    overrides={"smoke": {"lr": 0.1, "crop": 0, "flip": False}},
    sides=(LINEAR_SIDE, LINEAR_SIDE),
)


def margins() -> Images:
    """Pixel 0 tells the class with a wide margin, 63 others with a narrow one that together says
    more; only the first survives changes of 0.1 (25.5/255)."""
    pixels = LINEAR_SIDE**2
    y = torch.arange(300) % 2
    sign = (2 * y - 1).float()[:, None]
    x = 0.5 + 0.05 * torch.randn(300, pixels, generator=stream(0, "x"))
    x[:, 1:] += 0.08 * sign
    x[:, :1] += 0.3 * sign
    x = (x.clamp(0, 1) * 255).round().to(torch.uint8)
    return Images(x.view(-1, 1, LINEAR_SIDE, LINEAR_SIDE), y)


# ---- what a store holds


def record(key: str, **more: Any) -> dict[str, Any]:
    """A whole record of a cell, as little as one may hold."""
    method = {"name": "none", "short": "none", "spec": "none", "code": "0"}
    attack = {"threat": "poisons data", "scope": "none", "labels": "kept", "trigger": "static"}
    data = {"name": "signs", "fingerprint": "0", "source": "", "train": 1, "test": 1}
    return {
        "key": key,
        "status": "ok",
        "board": {"name": "demo", "version": 1},
        "dataset": {**data, "classes": ["one"], "shape": [3, 32, 32]},
        "model": "cnn",
        "recipe": "smoke",
        "plan": {},
        "clean_share": 0.05,
        "seed": 0,
        "attack": {**method, **attack},
        "defense": {**method, "null": True},
        "parents": {"victim": key, "twin": None, "twin_cell": None},
        "metrics": {},
        "flags": [],
        "hardware": {},
        "versions": {},
        "command": "",
        **more,
    }


def board(name: str, version: int = 1, **more: Any) -> dict[str, Any]:
    """A board as a store holds it."""
    body = {"name": name, "version": version, "definition": {}, "command": "", "cells": []}
    return {**body, **more}
