"""The trainer as an attacker is handed it: network, recipe, seed and device are bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, nn

from arena.core import models, training
from arena.core.contracts import BatchHook, Fit, Images, LossHook
from arena.core.seeding import stream


def bound(
    name: str,
    classes: int,
    shape: tuple[int, int, int],
    plan: training.Recipe,
    seed: int,
    device: torch.device,
    checkpoints: Callable[[int], training.Checkpoint] | None = None,
) -> Fit:
    """`fit(data, rng=…)`: trains a new network `name`, or `init` further, by `plan`.

    checkpoints: where the n-th call (from 0) keeps its state. Keyword arguments that `fit` does
    not know replace fields of the recipe.
    """
    calls = 0

    def fit(
        data: Images,
        *,
        rng: Generator,
        init: nn.Module | None = None,
        on_image: BatchHook | None = None,
        on_batch: BatchHook | None = None,
        extra_loss: LossHook | None = None,
        levels: Sequence[str] = (),
        also: Sequence[torch.optim.Optimizer] = (),
        carry: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> nn.Module:
        nonlocal calls
        checkpoint = None if checkpoints is None else checkpoints(calls)
        calls += 1
        model = init
        if model is None:
            model = models.build(name, classes, shape, stream(seed, "init"))
            models.calibrate(model, data)
        return training.fit(
            model.to(device),
            data,
            training.changed(plan, changes),
            rng,
            on_image=on_image,
            on_batch=on_batch,
            extra_loss=extra_loss,
            levels=levels,
            also=also,
            carry=carry,
            checkpoint=checkpoint,
        )

    return fit
