"""Models: a normalisation layer and a network's body, with three named feature levels."""

from __future__ import annotations

import difflib
import math
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from arena.core import networks
from arena.core.contracts import Images
from arena.core.networks import Network, Shape
from arena.core.networks.timm_models import HINTS, find
from arena.core.seeding import seeded_globals

LEVELS = ("shallow", "middle", "deep")
CALIBRATION_IMAGES = 10_000
CALIBRATION_PIXELS = CALIBRATION_IMAGES * 32 * 32  # bounds the float sample of large images


class Passes:
    """Work done by all models of this process, in images; copies of a model count here too."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.forward = 0  # images that went through a model
        self.backward = 0  # images whose logits received a gradient

    def saw_gradient(self, grad: Tensor) -> None:
        self.backward += len(grad)


passes = Passes()


def _count(logits: Tensor) -> None:
    passes.forward += len(logits)
    if logits.requires_grad:
        logits.register_hook(passes.saw_gradient)


# Traced, it would be compiled anew whenever the count changed. Unlike torch.compiler.disable, this
# does not import the compiler (seconds) until a model is compiled.
_count_untraced = torch._disable_dynamo(_count)


class Normalize(nn.Module):
    """(x - mean) / std for each channel; the statistics are buffers and travel with the weights."""

    mean: Tensor  # (C,)
    std: Tensor  # (C,)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((channels,), 0.5))
        self.register_buffer("std", torch.full((channels,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]


class ModelSpec(NamedTuple):
    name: str  # of the network
    classes: int
    shape: Shape  # channels, height, width of an image


class Classifier(nn.Module):
    """float (N, C, H, W) in [0, 1] -> logits (N, classes).

    levels: "shallow", "middle", "deep" -> path of the module whose output is that feature map
    head: path of the layer that reads the deep level
    """

    def __init__(self, spec: ModelSpec, network: Network) -> None:
        super().__init__()
        self.spec = spec
        self.levels = {k: f"body.{path}" for k, path in zip(LEVELS, network.levels, strict=True)}
        self.head = f"body.{network.head}"
        self.normalize = Normalize(spec.shape[0])
        self.body = network.build(spec.classes, spec.shape)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.body(self.normalize(x))
        if torch.compiler.is_compiling():
            _count_untraced(logits)
        else:
            _count(logits)
        return logits


def merge(tables: Mapping[str, Mapping[str, Network]]) -> dict[str, Network]:
    """One table from those of several files; ValueError where two files use one name."""
    origin: dict[str, str] = {}
    merged: dict[str, Network] = {}
    for file, table in tables.items():
        for name, network in table.items():
            if name in merged:
                raise ValueError(f"network {name!r} is defined in both {origin[name]} and {file}")
            merged[name], origin[name] = network, file
    return merged


@cache
def _catalogue() -> dict[str, Network]:
    files = sorted(file.name for file in pkgutil.iter_modules(networks.__path__))
    return merge({f: import_module(f"{networks.__name__}.{f}").NETWORKS for f in files})


def names() -> list[str]:
    """Networks by name, sorted; besides these there are `timm:NAME` and `torchvision:NAME`."""
    return sorted(_catalogue())


def info(name: str) -> Network:
    """The network of that name. Raises ValueError with the nearest name."""
    if ":" in name:
        return find(name)
    known = _catalogue()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), [*HINTS, *known], n=1, cutoff=0)[0]
    raise ValueError(
        f"no network {name!r}; the nearest is {HINTS.get(near, near)!r} "
        "(any other: 'timm:NAME' or 'torchvision:NAME')"
    )


def build(name: str, classes: int, shape: Shape, rng: Generator) -> Classifier:
    """A newly initialised model in evaluation mode, on the CPU; its weights follow `rng`.

    shape: (channels, height, width) of an image.
    Raises ValueError on an unknown name, and where the network cannot take such images.
    """
    if classes < 1 or len(shape) != 3 or min(shape) < 1:
        raise ValueError(
            f"a model needs 1 class or more and a shape (C, H, W), got {classes=} {shape=}"
        )
    network = info(name)
    smallest, (_, height, width) = network.sides[0], shape
    if min(height, width) < smallest:
        raise ValueError(
            f"{name} takes images of {smallest} pixels a side and more, not {height} x {width}"
        )
    with seeded_globals(rng):
        model = Classifier(ModelSpec(name, classes, shape), network)
    return model.eval()


def fresh(model: Classifier, rng: Generator) -> Classifier:
    """The same architecture newly initialised, in evaluation mode, on the same device.

    Keeps the normalisation; `calibrate` again where the body starts from data.
    """
    new = build(*model.spec, rng)
    new.normalize.load_state_dict(model.normalize.state_dict())
    return new.to(model.normalize.mean.device)


@torch.no_grad()
def calibrate(model: Classifier, data: Images) -> None:
    """Set the normalisation to mean and deviation of `data` (uint8), in place.

    Reads at most 10,000 images, evenly spread; a body with a method `initialise` is then handed
    such a sample, normalised, on its device (fewer of large images).
    """
    if len(data) == 0:
        raise ValueError("calibration needs at least 1 image, got 0")
    x = data.x[_spread(len(data), CALIBRATION_IMAGES)]
    shades = torch.arange(256, dtype=torch.float64, device=x.device) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in x.unbind(1)])
    share = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    mean = share @ shades
    deviation = (share @ shades.square() - mean.square()).clamp_min(0).sqrt()
    model.normalize.mean.copy_(mean)
    model.normalize.std.copy_(deviation.clamp_min(1 / 255))  # a constant channel has none
    initialise = getattr(model.body, "initialise", None)
    if initialise is not None:
        room = max(1, CALIBRATION_PIXELS // math.prod(x.shape[2:]))
        sample = x[_spread(len(x), room)].to(model.normalize.mean.device)
        initialise(model.normalize(sample.float() / 255))


def _spread(n: int, most: int) -> Tensor:
    """At most `most` rows of `n`, evenly spaced."""
    return torch.arange(min(n, most)) * n // min(n, most)


@torch.no_grad()
def load_weights(model: Classifier, state: Mapping[str, Tensor]) -> Classifier:
    """Copy `state` into `model` and return it; nothing is copied unless everything fits.

    Raises ValueError naming the first keys that are missing, unexpected, of another shape, sparse
    or complex, or not finite in the model's type.
    """
    own = model.state_dict()
    shared = [k for k in own if k in state]
    fitting = [k for k in shared if state[k].shape == own[k].shape]
    plain = [k for k in fitting if _is_plain(state[k])]
    faults = {
        "lack": [k for k in own if k not in state],
        "have unexpected": [k for k in state if k not in own],
        "have misshapen": [
            f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
            for k in shared
            if state[k].shape != own[k].shape
        ],
        "have other than plain real": [k for k in fitting if k not in plain],
        "have non-finite": [
            k for k in plain if not bool(torch.isfinite(state[k].to(own[k].dtype)).all())
        ],
    }
    if found := [f"{fault} {_first(keys)}" for fault, keys in faults.items() if keys]:
        raise ValueError(f"weights for {model.spec.name} {' and '.join(found)}")
    model.load_state_dict(state)
    return model


def _is_plain(value: Tensor) -> bool:
    """Whether its numbers are there, all of them, and real."""
    return value.layout == torch.strided and not (
        value.is_meta or value.is_quantized or value.is_complex()
    )


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
