"""Spectral signatures: poisoned inputs stand out along the features' first singular direction.

Source: Tran, Li and Madry 2018, https://arxiv.org/abs/1811.00636, algorithm 1.
Departs: how many of the highest scores are removed is left to whoever asks. form=paper takes the
    squared product of the centred features with their top right singular vector; form=released,
    the paper's code, the absolute value of that of features as they are. Both presume few poisoned
    inputs: where half are stamped, as in the SDRM study, both halves lie equally far from the mean
    of all, and without centring either half may lie farther from zero. The default therefore
    counts from the mean of trusted clean images of the class that the inputs are taken for.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core import training
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
        "trusted",
        "trusted: squares of products, less that of clean images of the inputs' class; paper: less "
        "that of all inputs; released: absolute values of products",
        choices=("trusted", "paper", "released"),
    )

    def score(self, model: Classifier, x: Tensor, clean: Images, rng: Generator) -> Tensor:
        """(N,) distances along the direction, squared or not. Raises BadInput below 2 inputs, and
        without a clean image of their class."""
        if len(x) < 2:
            raise BadInput(f"spectral needs 2 inputs or more, got {len(x)}.")
        found = flat_features(model, x, self.level).double()
        centre = found.mean(0)
        direction = torch.linalg.svd(found - centre, full_matrices=False).Vh[0]
        if self.form == "released":
            return (found @ direction).abs().float()
        if self.form == "trusted":
            centre = (
                flat_features(model, self._trusted(model, x, clean), self.level).double().mean(0)
            )
        return ((found - centre) @ direction).square().float()

    @staticmethod
    def _trusted(model: Classifier, x: Tensor, clean: Images) -> Tensor:
        """Clean images of the class that most inputs are taken for."""
        label = int(training.logits(model, x).argmax(1).mode().values)
        own = clean.x[clean.y == label]
        if not len(own):
            raise BadInput(
                f"spectral has no clean image of class {label}, which the inputs are taken for; "
                "raise the clean share or choose form=paper."
            )
        return own
