"""Spectral signatures: poisoned inputs stand out along the features' first singular direction.

Source: Tran, Li and Madry 2018, https://arxiv.org/abs/1811.00636, algorithm 1: the squared product of
    the centred features with their top right singular vector.
Departs: the released code centres for the vector but scores features that are not centred; here
    both are, as in the paper. How many of the highest scores are removed is left to whoever asks.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core.contracts import Images
from arena.core.detection import flat_features
from arena.core.models import Classifier
from arena.core.registry import BadInput, method, param


@method
class Spectral:
    rule: ClassVar[str] = "top_k"  # how scores become flags, see arena.detecting

    level: str = param(
        "deep", "feature level", choices=("shallow", "middle", "deep"), source="deep: Tran et al."
    )

    def score(self, model: Classifier, x: Tensor, clean: Images, rng: Generator) -> Tensor:
        """(N,) squared distances along the direction. Raises BadInput below 2 inputs."""
        if len(x) < 2:
            raise BadInput(f"spectral needs 2 inputs or more, got {len(x)}.")
        found = flat_features(model, x, self.level).double()
        centred = found - found.mean(0)
        direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
        return (centred @ direction).square().float()
