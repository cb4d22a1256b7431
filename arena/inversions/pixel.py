"""Pixel: two positive changes per value, one added and one taken away; the size is in pixels.

Source: Tao et al. 2022, Better Trigger Inversion Optimization in Backdoor Scanning
    (PixelBackdoor), section 4, and its published code: form=tanh for scanning poisoned models,
    form=clip, faster, for natural triggers; variables start uniform in [0, 1]; after every pass
    values below 1/255 are cut off, and a trigger is better where both its loss and its pixels are
    fewer.
Departs: in form=tanh the search goes on from variables whose tanh is the trigger; the published
    code goes on from the trigger's values as if they were variables, so that the trigger jumps. It
    is the default for clean models, too, where it was never the larger of the two on the four pairs
    that were tried (fastnet_small, CIFAR-10: on average 22 pixels, clip 25.5, NC 34).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core.inversion.engine import Family, State
from arena.core.registry import method, param

_CUT = 1 / 255  # smaller changes do not survive 8 bits
_SOFT = 10.0  # divides the variables in the loss alone: its slope reaches far


@method
class Pixel(Family):
    unit: ClassVar[str] = "pixels"

    form: str = param(
        "tanh",
        "tanh: changes are a smooth function of the variables; clip: variables cut to [0, 1]",
        choices=("tanh", "clip"),
        source="PixelBackdoor: tanh for poisoned models, clip for natural triggers",
    )

    def begin(self, x: Tensor, rng: Generator) -> State:
        return {name: torch.rand(x.shape[1:], generator=rng) for name in ("plus", "minus")}

    def stamp(self, at: State, x: Tensor) -> Tensor:
        change = (self._shown(at["plus"]) - self._shown(at["minus"]))[:, None]
        return (x + change).clamp(0, 1)

    def penalty(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        return _soft(at["plus"]) + _soft(at["minus"])

    def size(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        changed = (self._shown(at["plus"]) >= _CUT) | (self._shown(at["minus"]) >= _CUT)
        return changed.any(1).flatten(1).sum(1).float()

    def record(self, at: State, size: Tensor, loss: Tensor) -> Tensor:
        """Pixels that change, and the loss's own measure."""
        return torch.stack([size, _soft(at["plus"]) + _soft(at["minus"])], 1)

    def kept(self, at: State) -> State:
        return {name: self._cut(value) for name, value in at.items()}

    def _shown(self, free: Tensor) -> Tensor:
        return free.clamp(0, 1) if self.form == "clip" else free.tanh() / 2 + 0.5

    def _cut(self, free: Tensor) -> Tensor:
        shown = self._shown(free)
        shown = shown.where(shown >= _CUT, 0)
        if self.form == "clip":
            return shown
        return torch.atanh((2 * shown - 1).clamp(-1 + 1e-6, 1 - 1e-6))


def _soft(free: Tensor) -> Tensor:
    """(K,): the sum over pixels of the largest (tanh(b / 10) + 1) / 2 of the channels."""
    return ((free / _SOFT).tanh() / 2 + 0.5).amax(1).flatten(1).sum(1)
