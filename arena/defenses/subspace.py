"""Subspace reconstruction: what clean features span does not hold poisoned ones.

Source: SDRM (Xia et al. 2022), section 3.4.3, after Javaheripi et al. 2020, CLEANN: the directions
    that hold 90 % of the energy of some clean features; an input's score is the length of what its
    features have outside of them.
Departs: features are centred on the clean ones' mean, and all classes' clean images are used; the
    text says neither.
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
class Subspace:
    rule: ClassVar[str] = "threshold"  # how scores become flags, see arena.detecting

    level: str = param("deep", "feature level", choices=("shallow", "middle", "deep"))
    energy: float = param(
        0.9, "share of the squared singular values that is kept", above=0, high=1, source="SDRM"
    )

    def score(self, model: Classifier, x: Tensor, clean: Images, rng: Generator) -> Tensor:
        """(N,) lengths of the residuals. Raises BadInput below 2 clean images."""
        if len(clean) < 2:
            raise BadInput(f"subspace needs 2 clean images or more, got {len(clean)}.")
        trusted = flat_features(model, clean.x, self.level).double()
        mean = trusted.mean(0)
        _, values, directions = torch.linalg.svd(trusted - mean, full_matrices=False)
        held = values.square().cumsum(0) / values.square().sum()
        rank = int((held < self.energy - 1e-12).sum()) + 1
        basis = directions[:rank]
        centred = flat_features(model, x, self.level).double() - mean
        return (centred - centred @ basis.T @ basis).norm(dim=1).float()
