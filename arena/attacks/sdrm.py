"""SDRM: any attack, trained so that stamped images look like the target class inside the network.

The squared maximum mean discrepancy (MMD²) between the features of a batch's stamped images and of
its clean target-class images is added to the loss at one or three levels of the network.

Source: Xia, Niu, Li, Li, A Statistical Difference Reduction Method for Escaping Backdoor Detection.
    Default: SDRM-A (all three levels) with lambda 0.3 over a patch on copies of 10 % of the
    training images, originals kept.
Departs: the paper gives neither the features' scale nor the mixture behind its figures; here sigma
    counts in standard deviations of the batch's two parts and the kernel is GMK2, with which
    intra-class figures (0.012 for `fast` victims on CIFAR-10) resemble those of the paper's Table 2
    (0.010 to 0.018). The printed estimator keeps pairs of a feature with itself; they do not change
    the gradient. The mean over levels is that of Algorithm 1 (equation 4 has their sum).
    Cross-entropy is one mean over the batch, so that lambda 0 is the base attack's own victim, bit
    for bit; weighting=parts is Algorithm 1, one mean over the clean images and one over the
    stamped, without the recipe's label smoothing. A batch with fewer than 2 images of either kind
    adds nothing. Images that a base changes in other ways (WaNet's noise mode) count as clean.
    Network, epochs and rates are the recipe's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from arena.core.contracts import ControlsTraining, Fit, Images, LossHook, Poisoned, Step, Trigger
from arena.core.mmd import masked_mmd2
from arena.core.models import LEVELS
from arena.core.poisoning import scope
from arena.core.registry import BadInput, attacks, method, param, short_spec, spec_of


@method
class SDRM:
    """Trigger, target, poisoned rows and test-time behaviour are those of the base attack."""

    threat: ClassVar[str] = "controls training"
    scopes: ClassVar[tuple[str, ...]] = ("universal", "label-specific")
    labels: ClassVar[str] = "changed"  # with the default base; each instance has its base's
    trigger_kind: ClassVar[str] = "static"

    base: str = param(
        "patch:extend=true",
        "spec of the attack whose victim is trained so: any with one target class",
        spec="attack",
        source="SDRM: patch, blend, sig, wanet",
    )
    lam: float = param(
        0.3, "lambda, the weight of the MMD² in the loss; 0: the base attack alone", low=0
    )
    levels: str = param(
        "all",
        "all: the mean over shallow, middle and deep features (SDRM-A); last: deep ones (SDRM-L)",
        choices=("all", "last"),
        source="SDRM, section 5",
    )
    kernel: str = param(
        "gmk2",
        "gk: one Gaussian; gmk: a sum of 3, 5 or 7 whose widths are powers of 2 (1 to 3) or of 3 "
        "(4 to 6); lk: linear",
        choices=("gk1", "gk2", "gk3", "gmk1", "gmk2", "gmk3", "gmk4", "gmk5", "gmk6", "lk"),
        source="SDRM, Table 3",
    )
    estimator: str = param(
        "unbiased",
        "unbiased: pairs of two different images only; biased: of an image with itself too, never "
        "below 0",
        choices=("unbiased", "biased"),
        source="SDRM, equation 3",
    )
    weighting: str = param(
        "joint",
        "joint: the recipe's cross-entropy, one mean over the batch; parts: the clean images' mean "
        "plus the stamped images' mean",
        choices=("joint", "parts"),
        source="SDRM, Algorithm 1: parts",
    )
    ramp: float = param(
        0.0, "share of the training over which lambda rises from 0; 0: never", low=0, high=1
    )

    def __post_init__(self) -> None:
        base = self._base
        if base.method_name == "sdrm" or getattr(base, "null", False):
            raise BadInput(f"sdrm: base cannot be {base.method_name}; name an attack to hide.")
        if scope(base) == "all-to-all" or getattr(base, "target", None) is None:
            raise BadInput(
                f"sdrm: base={short_spec(base)} has no one target class to hide among; give it one."
            )
        if getattr(base, "stamps_unseen", False):
            raise BadInput(
                f"sdrm: base={short_spec(base)} stamps images inside its own loss, where nothing "
                "can hide them; name another attack, such as wanet."
            )
        object.__setattr__(self, "base", spec_of(base))  # one attack, one spelling
        for trait in ("labels", "trigger_kind"):  # what records say of this instance
            object.__setattr__(self, trait, getattr(base, trait, getattr(self, trait)))

    @property
    def _base(self) -> Any:
        return attacks.build(self.base)

    @property
    def target(self) -> int:
        return int(self._base.target)

    @property
    def victim(self) -> int | None:
        victim: int | None = getattr(self._base, "victim", None)
        return victim

    @property
    def keeps_labels(self) -> bool:
        return bool(getattr(self._base, "keeps_labels", False))

    @property
    def scope(self) -> str:
        return scope(self._base)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        base = self._base
        base.check(shape, counts)
        left = counts[base.target]
        if self.keeps_labels and not getattr(base, "extend", False):
            left -= round(base.rate * left)
        if left < 2:
            raise BadInput(
                f"sdrm: {left} images of target class {base.target} stay clean, but stamped images "
                "need 2 or more to hide among; lower the rate or choose another target."
            )

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        trigger: Trigger = self._base.prepare(train, rng)
        return trigger

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        poisoned: Poisoned = self._base.poison(train, trigger, rng)
        return poisoned

    def train(
        self, fit: Fit, poisoned: Poisoned, trigger: Trigger, rng: Generator
    ) -> tuple[nn.Module, Trigger]:
        base, hiding = self._base, self._hiding(fit, poisoned)
        if isinstance(base, ControlsTraining):
            return base.train(hiding, poisoned, trigger, rng)
        return hiding(poisoned.data, rng=rng), trigger

    def _hiding(self, fit: Fit, poisoned: Poisoned) -> Fit:
        """`fit` with this attack's loss beside whatever hooks the base attack brings."""
        if not self.lam and self.weighting == "joint":
            return fit
        matched = LEVELS if self.levels == "all" else LEVELS[-1:]

        def hiding(
            data: Images,
            *,
            rng: Generator,
            extra_loss: LossHook | None = None,
            levels: Sequence[str] = (),
            **more: Any,
        ) -> nn.Module:
            hide = Hide(self, self.target, matched, _marks(data, poisoned))

            def both(step: Step) -> Tensor:
                return hide(step) if extra_loss is None else extra_loss(step) + hide(step)

            watched = tuple(dict.fromkeys((*levels, *matched)))
            return fit(data, rng=rng, extra_loss=both, levels=watched, **more)

        return hiding


def _marks(data: Images, poisoned: Poisoned) -> Tensor | None:
    """(N,) bool: the poisoned images in `data`; None where they are not the stored ones."""
    rows = poisoned.rows
    if data.stamped is not None or not len(rows) or len(data) < len(poisoned.data):
        return data.stamped
    if data is not poisoned.data and not torch.equal(data.x[rows], poisoned.data.x[rows]):
        return None
    marks = torch.zeros(len(data), dtype=torch.bool, device=rows.device)
    marks[rows] = True
    return marks


@dataclass(eq=False)
class Hide:
    """A hook for `extra_loss`: what SDRM adds to one update's loss."""

    attack: SDRM
    target: int
    levels: Sequence[str]
    marks: Tensor | None  # (N,) bool: the training images that are stamped; None: hooks say it

    def __call__(self, step: Step) -> Tensor:
        stamped, wanted = self._stamped(step.batch), step.batch.y == self.target
        added = torch.zeros_like(step.loss)
        lam = self.attack.lam * min(1.0, step.done / self.attack.ramp if self.attack.ramp else 1.0)
        if lam:
            biased = self.attack.estimator == "biased"
            differences = [
                masked_mmd2(
                    step.features[level],
                    stamped & wanted,
                    ~stamped & wanted,
                    self.attack.kernel,
                    biased=biased,
                )
                for level in self.levels
            ]
            added = added + lam * torch.stack(differences).mean()
        if self.attack.weighting == "parts":
            each = F.cross_entropy(step.logits, step.batch.y, reduction="none")
            parts = sum(
                (each * part).sum() / part.sum().clamp_min(1) for part in (stamped, ~stamped)
            )
            added = added + parts - step.loss  # the trainer adds its own mean, without effect now
        return added

    def _stamped(self, batch: Images) -> Tensor:
        """(N,) bool on the batch's device: what a hook says, else where the rows are marked."""
        if batch.stamped is not None:
            return batch.stamped
        if self.marks is None or batch.rows is None:
            raise BadInput(
                f"sdrm: base={short_spec(self.attack._base)} does not say which images of a batch "
                "it stamps; its hooks must set `stamped`."
            )
        self.marks = self.marks.to(batch.y.device)
        return self.marks[batch.rows]
