"""The arena's contracts: what a method is given is all that it can use.

The type signature is the threat model. No defense is ever handed the test set, the trigger, the
target class or the poisoned rows; no method reports its own numbers, the referee measures them.

Images are stored as uint8 (N, C, H, W). Every function that changes images works on float32
batches in [0, 1] on the caller's device; normalisation is the first layer of every model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Generator, Tensor, nn

ImageMap = Callable[[Tensor], Tensor]
"""(N, C, H, W) float32 in [0, 1] -> same shape, range and device; pure."""


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images. As stored: uint8; inside a batch: float32 in [0, 1]."""

    x: Tensor  # (N, C, H, W) uint8 in [0, 255], or float32 in [0, 1] inside a batch
    y: Tensor  # (N,) int64 class ids
    rows: Tensor | None = None  # (N,) int64, inside a batch of `fit`: rows of the data it got
    stamped: Tensor | None = None  # (N,) bool, where a hook knows: which images carry the trigger

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Tensor) -> Images:
        """The images at `rows` (K,) int64, or where a (N,) bool mask holds, in that order."""
        return self._each(lambda part: part[rows])

    def to(self, device: torch.device | str) -> Images:
        return self._each(lambda part: part.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Images:
        extra = [None if part is None else change(part) for part in (self.rows, self.stamped)]
        return replace(self, x=change(self.x), y=change(self.y), rows=extra[0], stamped=extra[1])


class Poisoned(NamedTuple):
    """What the victim trains on, and the ground truth for detectors (which no defense gets)."""

    data: Images  # uint8; the training set with the poisoned rows in it
    rows: Tensor  # (K,) int64: the rows of `data` whose image or label the attacker changed


class Probe(NamedTuple):
    """An image map that must *not* fire: the referee measures what the victim answers to it."""

    stamp: ImageMap
    of: int | None = None  # only test images of this class are shown; None: of all but the target


@dataclass(frozen=True)
class Trigger:
    """A trigger. Everything random about it was drawn in `prepare`: all maps are pure.

    `stamp` is used at evaluation, `embed` at training where the two differ; `probes` are near
    misses (WaNet's noise mode, a composite attack's same-class mixes), by a short name.
    """

    stamp: ImageMap
    embed: ImageMap | None = None
    probes: Mapping[str, Probe] = field(default_factory=dict)

    @property
    def training_map(self) -> ImageMap:
        return self.embed or self.stamp


class Verdict(NamedTuple):
    """A scanner's answer about one model."""

    score: float  # higher = more likely backdoored; thresholds belong to the table
    target: int | None = None  # the class blamed, where the method names one
    per_class: Tensor | None = None  # (classes,) suspicion per class
    trigger: Tensor | None = None  # (C, H, W) in [0, 1], the inverted trigger's picture


BatchHook = Callable[[Images, Generator], Images]
"""(float batch, this step's generator) -> the batch to train on, of the same size."""


@dataclass(frozen=True, eq=False)
class Step:
    """One update as `extra_loss` sees it, after the forward pass and before the backward one."""

    model: nn.Module  # in training mode
    batch: Images  # float, as the model saw it
    logits: Tensor  # (N, classes) float32
    loss: Tensor  # scalar: the recipe's cross-entropy, to which the hook's result is added
    features: Mapping[str, Tensor]  # level -> its output in this pass, for the levels asked for
    rng: Generator  # this step's draws
    done: float  # share of the updates behind us, in [0, 1)


LossHook = Callable[[Step], Tensor]
"""What is known of this update -> scalar added to its loss."""


class Fit(Protocol):
    """The one trainer, as a function: model, recipe, device and progress are bound by the arena.

    See `arena.core.training.fit` for the hooks; `changes` replace fields of the recipe.
    """

    def __call__(
        self,
        data: Images,
        *,
        rng: Generator,
        init: nn.Module | None = None,
        on_image: BatchHook | None = None,
        on_batch: BatchHook | None = None,
        extra_loss: LossHook | None = None,
        levels: Sequence[str] = (),
        also: Sequence[torch.optim.Optimizer] = (),
        carry: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> nn.Module: ...


@runtime_checkable
class Attack(Protocol):
    """Poisons training data. `check` raises BadInput, before anything is computed, where images
    of `shape` (C, H, W) with `counts` training images per class cannot be attacked so.

    Optional attributes:

    target: int         the class that the trigger should force
    victim: int | None  the only class that the trigger must work on (label-specific); None: all
    keeps_labels: bool  clean-label: the poisoned images keep their (target) label
    learned: bool       `prepare` gives what the trigger starts from; `train` learns it
    stamps_unseen: bool the training images are stamped inside the loss, where no hook sees them
    """

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None: ...
    def prepare(self, train: Images, rng: Generator) -> Trigger | None: ...
    def poison(self, train: Images, trigger: Trigger | None, rng: Generator) -> Poisoned: ...


@runtime_checkable
class ControlsTraining(Protocol):
    """The stronger threat model: the attacker runs the training. Having `train` declares it.

    The trigger handed back is the one that counts: some attacks learn theirs with the victim.
    """

    def train(
        self, fit: Fit, poisoned: Poisoned, trigger: Trigger, rng: Generator
    ) -> tuple[nn.Module, Trigger]: ...


@runtime_checkable
class Repairs(Protocol):
    """Returns a repaired copy of the model; the argument is left as it was.

    Optional attributes:

    check(model, clean) raises BadInput, before anything is computed, where the model or the clean
                        set cannot be used; `repair` refuses the same
    needs_share: float  the smallest share of the training images that it works with as clean set
    """

    def repair(self, model: nn.Module, clean: Images, rng: Generator) -> nn.Module: ...


@runtime_checkable
class Scans(Protocol):
    def scan(self, model: nn.Module, clean: Images, rng: Generator) -> Verdict: ...


@runtime_checkable
class Detects(Protocol):
    """(N,) suspicion of the uint8 images `x`; higher = more likely stamped."""

    def score(self, model: nn.Module, x: Tensor, clean: Images, rng: Generator) -> Tensor: ...
