"""A random share of the deepest channels is silenced: what pruning does without any knowledge.

Source: a null method of this arena, beside fine-pruning and the other pruning defenses. The share
    is arbitrary; no paper stands behind it.
"""

from __future__ import annotations

from copy import deepcopy
from typing import ClassVar

import torch
from torch import Generator

from arena.core.contracts import Images
from arena.core.features import fold_mask, mean_activation
from arena.core.models import Classifier
from arena.core.registry import method, param


@method
class RandomPrune:
    null: ClassVar[bool] = True

    share: float = param(0.5, "share of the deep level's channels that is silenced", low=0, high=1)

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        model = deepcopy(model)
        channels = len(mean_activation(model, clean.take(torch.arange(1))))
        mask = torch.ones(channels)
        mask[torch.randperm(channels, generator=rng)[: round(self.share * channels)]] = 0
        fold_mask(model, mask)
        return model
