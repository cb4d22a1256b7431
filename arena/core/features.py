"""Looking inside a model: activations by level, channel masks, batch-norm re-estimation.

Every hook comes off again, whatever happens in between.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from arena.core.contracts import Images
from arena.core.models import LEVELS, Classifier
from arena.core.training import evaluating, to_float


def level_module(model: Classifier, level: str) -> nn.Module:
    """The module whose output is the feature map of `level`. Raises ValueError on another name."""
    if level not in model.levels:
        near = difflib.get_close_matches(level, model.levels, n=1, cutoff=0)
        raise ValueError(f"no feature level {level!r}; the nearest is {near[0]!r}")
    return model.get_submodule(model.levels[level])


def features(model: Classifier, x: Tensor, levels: Sequence[str] = LEVELS) -> dict[str, Tensor]:
    """Level -> its feature map (N, K, H', W') for the float images `x`, in [0, 1].

    Gradients flow, and the model runs in the mode that it is in.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for level in levels:

            def keep(_: nn.Module, __: object, out: Tensor, level: str = level) -> None:
                found[level] = out

            hooks.callback(level_module(model, level).register_forward_hook(keep).remove)
        model(x)
    return {level: found[level] for level in levels}


@torch.no_grad()
def mean_activation(
    model: Classifier, images: Images, level: str = "deep", batch: int = 512
) -> Tensor:
    """Mean over images and pixels of each channel of `level`, in evaluation mode.

    images: uint8 (N, C, H, W). Returns (K,) float32 on the model's device.
    """
    if len(images) == 0:
        raise ValueError("a mean activation needs at least 1 image, got 0")
    device = _device(model)
    with evaluating(model):
        sums = []
        for part in images.x.split(batch):
            out = features(model, to_float(part.to(device)), (level,))[level].double()
            sums.append(out.flatten(2).mean(2).sum(0) if out.ndim > 2 else out.sum(0))
    total = torch.stack(sums).sum(0)
    return (total / len(images)).float()


@contextmanager
def masked(model: Classifier, mask: Tensor, level: str = "deep") -> Iterator[Classifier]:
    """Inside, the channels of `level` are multiplied by `mask` (K,).

    Raises ValueError, at the first forward pass, where the level has another number of channels.
    """

    def multiply(_: nn.Module, __: object, out: Tensor) -> Tensor:
        if mask.shape != out.shape[1:2]:
            raise ValueError(
                f"the {level} level has {out.shape[1]} channels, the mask {tuple(mask.shape)}"
            )
        return out * mask.to(out).view(1, -1, *[1] * (out.ndim - 2))

    hook = level_module(model, level).register_forward_hook(multiply)
    try:
        yield model
    finally:
        hook.remove()


@torch.no_grad()
def fold_mask(model: Classifier, mask: Tensor) -> None:
    """Write a mask (K,) of the deep level into the head's weight, in place.

    The model then computes what it computed inside `masked(model, mask)`, with plain weights.
    Raises ValueError where the head's inputs are no multiple of K.
    """
    weight = model.get_submodule(model.head).weight
    assert isinstance(weight, Tensor)
    pixels, rest = divmod(weight.shape[1], mask.numel())
    if mask.ndim != 1 or rest:
        raise ValueError(
            f"the head reads {weight.shape[1]} inputs, which a mask of shape "
            f"{tuple(mask.shape)} does not divide"
        )
    columns = mask.to(weight).repeat_interleave(pixels)  # a map is flattened channel by channel
    weight.mul_(columns.view(1, -1, *[1] * (weight.ndim - 2)))


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, images: Images, batch: int = 512) -> None:
    """Replace the running statistics of every batch norm by those of `images` (uint8), in place.

    Each is the plain average over batches of about `batch` images. Weights, modes and momenta stay
    as they were; a model without batch norm stays as it is.
    """
    if len(images) < 2:
        raise ValueError(f"batch statistics need at least 2 images, got {len(images)}")
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    device, parts = _device(model), math.ceil(len(images) / max(2, batch))
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        try:
            for first in range(parts if norms else 0):
                # every parts-th image: batches stay mixed where images are sorted by class
                model(to_float(images.x[first::parts].to(device)))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
