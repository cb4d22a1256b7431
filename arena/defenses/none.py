"""No defense: the model as it came, so that every table shows what the others start from.

Source: a null method of this arena; whatever the referee measures on it is its own error.
"""

from __future__ import annotations

from copy import deepcopy
from typing import ClassVar

from torch import Generator, nn

from arena.core.contracts import Images
from arena.core.registry import method


@method
class Nothing:
    null: ClassVar[bool] = True

    def repair(self, model: nn.Module, clean: Images, rng: Generator) -> nn.Module:
        return deepcopy(model)
