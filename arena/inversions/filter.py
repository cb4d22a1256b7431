"""Filter: every channel gets another mean and another deviation; the size is by how much.

Source: Tao et al. 2022, MOTH (Model Orthogonalization), appendix X-G: x' = (x - m_x) / s_x * s + m
    with the mean m_x and deviation s_x of each image's channels; the size is |m - mean of the m_x|
    + |s - mean of the s_x|.
Departs: the size is the sum over channels in 1/255. Start, rate and the cut to [0, 1] are not
    published: m and s start up to a fifth of the range off their means, the rate is 0.01.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core.inversion.engine import Family, Search, State
from arena.core.registry import method, param

_LEAST = 1 / 255  # deviation of a channel, where it has one colour


@method
class Filter(Family):
    unit: ClassVar[str] = "levels of mean and deviation"

    start: float = param(
        0.2, "how far mean and deviation start off the images', in [0, 1]", low=0, high=1
    )

    @property
    def usual(self) -> Search:
        return Search(lr=0.01)

    def begin(self, x: Tensor, rng: Generator) -> State:
        mean, deviation = (part.mean((0, 2, 3)) for part in _statistics(x))
        off = self.start * (torch.rand(2, x.shape[1], generator=rng) * 2 - 1)
        return {
            "mean": mean + off[0],
            "deviation": (deviation + off[1]).clamp_min(_LEAST),
            "_mean": mean,
            "_deviation": deviation,
        }

    def stamp(self, at: State, x: Tensor) -> Tensor:
        mean, deviation = _statistics(x)
        wanted = (at[name][:, None, :, None, None] for name in ("mean", "deviation"))
        new_mean, new_deviation = wanted
        return ((x - mean) / deviation * new_deviation + new_mean).clamp(0, 1)

    def penalty(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        return self.size(at, x, stamped)

    def size(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        off = [(at[name] - at[f"_{name}"]).abs() for name in ("mean", "deviation")]
        return 255 * torch.stack(off).sum((0, 2))


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the last two axes, which are kept."""
    mean = x.mean((-2, -1), keepdim=True)
    deviation = x.std((-2, -1), keepdim=True, correction=0).clamp_min(_LEAST)
    return mean, deviation
