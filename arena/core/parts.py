"""Trained parts of attacks (a GAN, a surrogate, an encoder): made once, then found again.

A part belongs to a data set and the settings that it was trained with, not to a cell: all seeds and
all attacks that want it share it. Whoever runs the attack says where parts are kept; where nobody
does, each call trains anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from arena.core.contracts import Images
from arena.core.registry import code_hash
from arena.core.seeding import stream
from arena.core.training import Checkpoint

Make = Callable[[Generator, Checkpoint | None], Mapping[str, Tensor]]
"""(this part's draws, where a stopped training goes on) -> named tensors."""


class Keeper(Protocol):
    """Where parts are kept: finds the part of `key`, or has it made, by one process at a time.

    label: what people read about it: its name, the settings, the data's digest.
    """

    def keep(
        self,
        key: str,
        label: Mapping[str, Any],
        make: Callable[[Checkpoint | None], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]: ...


_keeper: Keeper | None = None


@contextmanager
def kept(keeper: Keeper | None) -> Iterator[None]:
    """Inside, parts are looked for and kept there."""
    global _keeper
    before, _keeper = _keeper, keeper
    try:
        yield
    finally:
        _keeper = before


def trained(
    name: str, settings: Mapping[str, object], data: Images, make: Make, *, seed: int = 0
) -> dict[str, Tensor]:
    """The tensors of a trained part, on the CPU; `make` is called where nobody has made it yet.

    name:     what the part is: "surrogate", "cyclegan".
    settings: all that decides the result beside the data and the code: JSON values.
    data:     the images it is trained on, uint8.
    make:     trains it; must be deterministic given its generator. Its module's code, and what
              that imports of the arena, counts as part of the setting.
    """
    label = {"name": name, "settings": dict(settings), "data": data_digest(data), "seed": seed}
    text = json.dumps({**label, "code": code_hash(make.__module__)}, sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()

    def build(checkpoint: Checkpoint | None) -> Mapping[str, Tensor]:
        made = make(stream(seed, "part", name), checkpoint)
        for tensor_name, value in made.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise FloatingPointError(f"the {name} has non-finite values in {tensor_name}")
        return {k: v.detach().cpu().contiguous() for k, v in made.items()}

    return dict(build(None)) if _keeper is None else _keeper.keep(key, label, build)


def data_digest(data: Images) -> str:
    """sha256 (hex) over the images' shape, pixels and labels."""
    return _digest(data.x, data.y)


@lru_cache(maxsize=4)
def _digest(x: Tensor, y: Tensor) -> str:
    found = hashlib.sha256(repr((tuple(x.shape), str(x.dtype))).encode())
    for part in (*x.split(4096), y):
        found.update(part.cpu().contiguous().numpy().data)
    return found.hexdigest()
