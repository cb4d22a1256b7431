"""Where work under way and trained parts are kept: checkpoints in a file, parts in a store.

A worker sees no store: it asks for parts over its line (`LineKeeper`), and the runner finds them,
or keeps what the worker makes (`Desk`).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from arena.core.progress import report
from arena.core.training import Checkpoint
from arena.referee import returned
from arena.referee.isolate import Failed, Line
from arena.store import Store, digest, load_tensors, save_tensors

if TYPE_CHECKING:
    from filelock import FileLock

MOST_PART = 2**33  # bytes of a part
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


class LineKeeper:
    """A worker's parts: asked for over its line, exchanged through its folder."""

    def __init__(self, line: Line, folder: Path, scratch: Path) -> None:
        self.line, self.folder, self.scratch = line, folder, scratch

    def keep(
        self,
        key: str,
        label: Mapping[str, Any],
        make: Callable[[Checkpoint | None], Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        while (said := self.line.ask("a part", key=key, label=dict(label))["state"]) == "waiting":
            report(f"waiting for the {label['name']} that another process trains", 0, 1)
            time.sleep(0.5)
        file = self.folder / f"part-{key}.safetensors"
        if said == "absent":
            place = self.scratch / f"part-{key}.pt"
            save_tensors(file, make(FileCheckpoint(place)))
            place.unlink(missing_ok=True)
            self.line.ask("to keep a part", key=key)
        return load_tensors(file)


class Desk:
    """The runner's side of `LineKeeper`, for one job."""

    def __init__(self, store: Store, folder: Path, origin: str = "") -> None:
        """origin: '' for methods of the arena, which share their parts; else something that tells
        a stranger's code from all others, whose parts it must not be able to replace."""
        self.store, self.folder, self.origin = store, folder, origin
        self.used: dict[str, dict[str, Any]] = {}  # every part handed out: its name and figures
        self._making: dict[str, tuple[FileLock, dict[str, Any], float]] = {}

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a worker's question about a part. Raises Failed where it makes no sense."""
        asked = message.get("key")
        if not isinstance(asked, str) or not re.fullmatch(r"[0-9a-f]{64}", asked):
            raise Failed("failed", "it asked for a part without a key")
        key = digest(["part", self.origin, asked]) if self.origin else asked
        if message["what"] == "a part":
            return self._find(asked, key, message.get("label"))
        if message["what"] == "to keep a part" and key in self._making:
            return self._keep(asked, key)
        raise Failed("failed", f"it asked for {message['what']!r}")

    def close(self) -> None:
        """Let others make what this job has not finished."""
        for lock, _, _ in self._making.values():
            lock.release()
        self._making.clear()

    def _find(self, asked: str, key: str, label: Any) -> dict[str, Any]:
        if not isinstance(label, dict) or not isinstance(label.get("name"), str):
            raise Failed("failed", "it asked for a part without a name")
        try:
            digest(label)  # what cannot be written is no label
        except (ValueError, TypeError) as error:
            raise Failed("failed", "it asked for a part with settings that are no JSON") from error
        self.store.create()
        lock = self.store.lock(key)
        try:
            lock.acquire(timeout=0)
        except TimeoutError:
            return {"state": "waiting"}
        kept = self.store.artifact(key)
        if kept is None:
            self._making[key] = (lock, dict(label), time.monotonic())
            return {"state": "absent"}
        tensors = kept.tensors("part")
        lock.release()
        self._note(key, label["name"], tensors)
        save_tensors(self.folder / f"part-{asked}.safetensors", tensors)
        return {"state": "kept"}

    def _keep(self, asked: str, key: str) -> dict[str, Any]:
        tensors = returned.tensors(self.folder, f"part-{asked}", MOST_PART)
        lock, label, started = self._making.pop(key)
        try:
            meta = {"kind": "part", **label, "seconds": time.monotonic() - started}
            self.store.save(key, {"part": tensors}, meta)
        finally:
            lock.release()
        self._note(key, label["name"], tensors)
        return {"state": "kept"}

    def _note(self, key: str, name: str, tensors: Mapping[str, Tensor]) -> None:
        try:
            self.used[key] = {"name": name, "figures": figures_of(tensors)}
        except (ValueError, RuntimeError) as error:
            raise Failed("failed", f"the {name} has figures that are no numbers") from error


def figures_of(part: Mapping[str, Tensor]) -> dict[str, float]:
    """What a part says of itself on images held out: its scalars called `figure.NAME`."""
    marked = {name: value for name, value in part.items() if name.startswith("figure.")}
    return {name.partition(".")[2]: float(value) for name, value in marked.items()}
