"""Randomness is an argument: one named stream per purpose."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream(seed: int, *purpose: object) -> torch.Generator:
    """An independent CPU generator per (seed, purpose).

    A new draw for one purpose never shifts another's. Draws are made on the CPU and moved to the
    device, so that a CPU and a GPU run draw alike.
    """
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def draw_seed(rng: torch.Generator) -> int:
    """One integer from `rng`, to found a family of streams on."""
    return int(torch.randint(2**53, (), generator=rng))


@contextmanager
def seeded_globals(rng: torch.Generator) -> Iterator[None]:
    """Inside, torch's global generator follows `rng`: for library code (weight initialisation)
    that takes no generator. Outside, the global state is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw_seed(rng))
        yield
