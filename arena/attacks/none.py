"""No attack: the clean twin, trained like the victims on the same images.

Source: this arena. It shows what a defense costs a model that needs none, and what a clean model
    makes of every trigger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Generator

from arena.core.contracts import Images, Poisoned
from arena.core.poisoning import check_classes
from arena.core.registry import method


@method
class NoAttack:
    """Leaves the training set as it is. There is no trigger."""

    null: ClassVar[bool] = True
    threat: ClassVar[str] = "none"
    scopes: ClassVar[tuple[str, ...]] = ()
    labels: ClassVar[str] = "kept"
    trigger_kind: ClassVar[str] = "none"

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        """Raise BadInput unless the data set can be attacked at all."""
        check_classes(self, counts)

    def prepare(self, train: Images, rng: Generator) -> None:
        return None

    def poison(self, train: Images, trigger: None, rng: Generator) -> Poisoned:
        return Poisoned(train, torch.empty(0, dtype=torch.int64, device=train.x.device))
