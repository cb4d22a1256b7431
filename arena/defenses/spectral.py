"""Spectral signatures: poisoned inputs stand out along the features' first singular direction.

Source: Tran, Li and Madry 2018, https://arxiv.org/abs/1811.00636, algorithm 1: the squared product
    of the centred features with their top right singular vector. form=released: their code, which
    centres for the vector but takes the product's absolute value of features as they are; where
    half of the inputs are stamped, both halves lie equally far from the mean, and only this form
    can tell them apart.
Departs: how many of the highest scores are removed is left to whoever asks.
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

    form: str = param(
        "paper",
        "paper: squares of centred features' products; released: absolute values of products that "
        "are not centred",
        choices=("paper", "released"),
    )

    def score(self, model: Classifier, x: Tensor, clean: Images, rng: Generator) -> Tensor:
        """(N,) distances along the direction, squared or not. Raises BadInput below 2 inputs."""
        if len(x) < 2:
            raise BadInput(f"spectral needs 2 inputs or more, got {len(x)}.")
        found = flat_features(model, x, self.level).double()
        centred = found - found.mean(0)
        direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
        if self.form == "released":
            return (found @ direction).abs().float()
        return (centred @ direction).square().float()
