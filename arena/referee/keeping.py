"""Where work under way and trained parts are kept: checkpoints in a file, parts in a store."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arena.core.progress import report
from arena.core.training import Checkpoint
from arena.store import Store

SAVE_EVERY = 5.0  # seconds between two checkpoints: shorter epochs are cheaper to repeat


class FileCheckpoint:
    """A training's state in one file, replaced whole."""

    def __init__(self, path: Path) -> None:
        self.path, self.saved = path, time.monotonic()

    def load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            return dict(torch.load(self.path, map_location="cpu", weights_only=True))
        except Exception as error:  # damaged in whatever way: train from the start
            print(f"{self.path.name} cannot be read ({error}); training starts again.", flush=True)
            return None

    def save(self, state: dict[str, Any]) -> None:
        if time.monotonic() - self.saved < SAVE_EVERY:
            return
        temporary = self.path.with_suffix(".new")
        torch.save(state, temporary)
        os.replace(temporary, self.path)
        self.saved = time.monotonic()


class StoreKeeper:
    """Trained parts as artifacts of a store; two processes never make the same part at once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.used: dict[str, dict[str, Any]] = {}  # every part handed out: its name and figures

    def keep(
        self,
        key: str,
        label: Mapping[str, Any],
        make: Callable[[Checkpoint | None], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        name = str(label["name"])
        self.store.create()
        lock = self.store.lock(key)
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            report(f"waiting for the {name} that another process trains", 0, 1)
            lock.acquire()
        try:
            if (found := self.store.artifact(key)) is None:
                started = time.monotonic()
                made = make(FileCheckpoint(self.store.scratch(key) / "part.pt"))
                seconds = time.monotonic() - started
                meta = {"kind": "part", **label, "seconds": seconds}
                found = self.store.save(key, {"part": made}, meta)
                self.store.clear_scratch(key)
            tensors = found.tensors("part")
            self.used[key] = {"name": name, "figures": figures_of(tensors)}
            return tensors
        finally:
            lock.release()


def figures_of(part: Mapping[str, Tensor]) -> dict[str, float]:
    """What a part says of itself on images held out: its scalars called `figure.NAME`."""
    marked = {name: value for name, value in part.items() if name.startswith("figure.")}
    return {name.partition(".")[2]: float(value) for name, value in marked.items()}
