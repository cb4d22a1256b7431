"""Silencing deep channels one after another, and what the head reads of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arena.core.features import masked
from arena.core.models import Classifier
from arena.core.training import device_of, logits, to_float

_BATCH = 500


@torch.no_grad()
def silencings(model: Classifier, x: Tensor, order: Tensor, channels: int) -> Iterator[Tensor]:
    """The classes (N,) given to `x` with none, the first, the first two … of `order` silenced.

    x: (N, C, H, W) uint8; order: of the deep level's `channels`; model: in evaluation mode. Where
    nothing but the head lies behind the deep level the model runs once, since the head's scores are
    sums over channels; else once for every channel.
    """
    head = model.get_submodule(model.head)
    inputs, answers = head_inputs(model, head, x)
    assert isinstance(head, nn.Linear | nn.Conv2d)
    weight = head.weight.flatten(1)  # (classes, D)
    scores = F.linear(inputs, weight, head.bias) if inputs.shape[1] == weight.shape[1] else None
    if scores is not None and torch.equal(scores.argmax(1), answers):
        width = weight.shape[1] // channels  # columns of the head per channel
        yield answers
        for first in (order * width).tolist():
            columns = slice(first, first + width)
            scores -= inputs[:, columns] @ weight[:, columns].T
            yield scores.argmax(1)
    else:
        mask = torch.ones(channels, device=answers.device)
        yield logits(model, x, _BATCH).argmax(1)
        for channel in order:
            mask[channel] = 0
            with masked(model, mask):
                found = logits(model, x, _BATCH).argmax(1)
            yield found


@torch.no_grad()
def head_inputs(model: Classifier, head: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `head` reads (N, D), averaged over places if it is a map, and the classes given (N,)."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].flatten(2).mean(2) if args[0].ndim > 2 else args[0])

    device = device_of(model)
    hook = head.register_forward_pre_hook(keep)
    try:
        answers = [model(to_float(part.to(device))).argmax(1) for part in x.split(_BATCH)]
    finally:
        hook.remove()
    return torch.cat(seen), torch.cat(answers)
