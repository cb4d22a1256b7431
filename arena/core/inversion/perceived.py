"""Sizes as distances are told: seen by features that searches are too fast to look at.

A family whose triggers change whole images may say by `perceived` how far two sets of images are
from each other (DECK: in an encoder's deeper features). What a search compares its passes by stays
`size`, which the loss knows already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from arena.core import training
from arena.core.contracts import Images
from arena.core.inversion.engine import Family, Found, State, rows_of, stamped


@runtime_checkable
class Perceiving(Protocol):
    """A family with a measure of its own for distances."""

    def perceived(self, x: Tensor, stamped: Tensor) -> Tensor:
        """() how far images with the trigger are from those without, (N, C, H, W) in [0, 1]."""
        ...


def retold(
    found: Sequence[Found], family: Family, images: Images, samples: int, seed: int
) -> list[Found]:
    """Answers with the sizes that distances are told in, on the images that they were found on.

    images, samples, seed: those of the search. Other families' answers stay as they are.
    """
    if not isinstance(family, Perceiving):
        return list(found)
    told = []
    for one in found:
        if one.size is not None:
            rows = rows_of(one.problem, images.y.cpu(), samples, seed)
            one = replace(
                one, size=size_of(family, one.trigger, images.x[rows.to(images.x.device)])
            )
        told.append(one)
    return told


@torch.no_grad()
def size_of(family: Family, trigger: State, x: Tensor) -> float:
    """How far a trigger moves images, uint8 (N, C, H, W), as distances are told."""
    shown = training.to_float(x)
    changed = stamped(family, trigger, shown)
    if isinstance(family, Perceiving):
        return float(family.perceived(shown, changed))
    at = {name: value[None].to(x.device) for name, value in trigger.items()}
    return float(family.size(at, shown[None], changed[None]))
