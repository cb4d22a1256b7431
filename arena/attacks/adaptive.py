"""Adaptive: a trigger pattern learned with the victim while the victim is hardened against such.

The attacker knows that the defender will harden the model and does so too, during poisoning: a
pattern over the whole image is optimised to reach the target and to stay small, and meanwhile the
network learns to withstand the small universal perturbations towards every class.

Source: DECK (Model hardening against pervasive backdoors), section V-E and Table V: cross-entropy
    and an L2 loss on the pattern; ResNet-20, CIFAR-10, 20 % and 50 % of the training images
    poisoned. Hardening on universal perturbations with true labels: as in the "Universal" rows of
    MOTH's tables and Shafahi et al. 2020, https://arxiv.org/abs/1811.11304.
Departs: the paper is one paragraph long, all below is an assumption. The pattern is added to the
    image and clipped. The L2 loss is the root mean square of the pattern, so that its weight means
    the same at every size. The attacker hardens with universal perturbations instead of DECK's
    generator: one per class, found by the very loss that finds the trigger (so that the target's
    meets the trigger, the contradiction that the paper sees), shown on a share of the other
    classes' clean images with their true labels. Pattern and perturbations take one Adam step per
    update, with the weights as they are, from the outputs of the very pass that trains the network
    (batch statistics in training mode); their rate falls linearly to 0, so that the network
    settles on the final trigger. The same images are poisoned throughout. They are stamped after
    augmentation: the trigger sits as it does at test time, and the sum is rounded to 8 bits as it
    is then. Network and epochs are the recipe's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from arena.core.contracts import Fit, Images, Poisoned, Step, Trigger
from arena.core.poisoning import check_classes, check_rate, dirty_label, scope
from arena.core.registry import method, param
from arena.core.triggers import Add, rounded

_START = 8 / 255  # the pattern starts as uniform noise of this height


@method
class Adaptive:
    """All fields are the attacker's; the trigger that counts is the one `train` hands back."""

    threat: ClassVar[str] = "controls training"
    scopes: ClassVar[tuple[str, ...]] = ("universal",)
    labels: ClassVar[str] = "changed"
    trigger_kind: ClassVar[str] = "static"
    learned: ClassVar[bool] = True

    target: int = param(0, "class that the trigger forces", low=0)
    rate: float = param(
        0.2, "share of the training set that is poisoned", above=0, high=1,
        source="DECK, Table V: 0.2 and 0.5",
    )  # fmt: skip
    weight: float = param(
        5.0, "weight of the pattern's size, its root mean square in [0, 1], beside cross-entropy",
        low=0,
    )  # fmt: skip
    lr: float = param(
        0.01, "first rate of Adam for the pattern, in brightness per update; falls to 0", above=0
    )
    harden: str = param(
        "universal",
        "universal: train on one perturbation per class, learned on the way, with true labels; "
        "none: learn the trigger only",
        choices=("none", "universal"),
        source="DECK hardens with its own generator",
    )
    harden_share: float = param(
        0.2, "share of the clean images of a batch that hardening perturbs", above=0, high=1
    )
    extend: bool = param(False, "append the poisoned copies and keep their originals")

    @property
    def scope(self) -> str:
        return scope(self)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        check_rate(self, counts, of="train")

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        noise = torch.rand(train.x.shape[1:], generator=rng)
        return Trigger(Add(_START * (2 * noise - 1)))

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        """The images as they are under the target's label: `train` adds the pattern of the day."""
        plain = Trigger(torch.clone)
        return dirty_label(train, plain, self.target, self.rate, rng, extend=self.extend)

    def train(
        self, fit: Fit, poisoned: Poisoned, trigger: Trigger, rng: Generator
    ) -> tuple[nn.Module, Trigger]:
        assert isinstance(trigger.stamp, Add)
        data, classes = poisoned.data, int(poisoned.data.y.max()) + 1
        marks = torch.zeros(len(data), dtype=torch.bool, device=data.y.device)
        marks[poisoned.rows] = True
        patterns = Patterns(trigger.stamp.change, classes)
        game = Game(self, marks, patterns, torch.optim.Adam(patterns.learned(self), lr=self.lr))
        model = fit(
            data,
            rng=rng,
            on_batch=game.perturb,
            extra_loss=game.improve,
            carry={"patterns": patterns, "patterns_optimizer": game.optimizer},
        )
        return model, Trigger(Add(patterns.trigger.detach().cpu()))


class Patterns(nn.Module):
    """What is learned beside the network, in brightness to add: the trigger and, for hardening, a
    universal perturbation towards each class."""

    def __init__(self, start: Tensor, classes: int) -> None:
        super().__init__()
        self.trigger = nn.Parameter(start.clone())  # (C, H, W)
        self.universal = nn.Parameter(start.new_zeros(classes, *start.shape))

    def learned(self, attack: Adaptive) -> list[nn.Parameter]:
        return [self.trigger] if attack.harden == "none" else [self.trigger, self.universal]


@dataclass(eq=False)
class Game:
    """The hooks of a training in which trigger, perturbations and network change side by side."""

    attack: Adaptive
    marks: Tensor  # (N,) bool: the poisoned training images
    patterns: Patterns
    optimizer: torch.optim.Adam
    aims: Tensor | None = None  # (B,) int64: classes that the batch's perturbations aim at
    hardened: Tensor | None = None  # (B,) bool: the images of the batch that have one

    def perturb(self, batch: Images, rng: Generator) -> Images:
        """`on_batch`: the trigger on poisoned images, perturbations on some of the others."""
        self._move(batch.x.device)
        assert batch.rows is not None
        stamped = self.marks[batch.rows]
        added = stamped[:, None, None, None] * self.patterns.trigger
        if self.attack.harden != "none":
            added = added + self._universal(batch, stamped, rng)
        x = rounded((batch.x + added).clamp(0, 1)).contiguous(memory_format=torch.channels_last)
        return replace(batch, x=x, stamped=stamped)

    def _universal(self, batch: Images, stamped: Tensor, rng: Generator) -> Tensor:
        """What hardening adds to the batch, (B, C, H, W): nothing, or an other class's pattern."""
        size, device, classes = len(batch), batch.x.device, len(self.patterns.universal)
        chosen = torch.rand(size, generator=rng) < self.attack.harden_share
        further = torch.randint(1, classes, (size,), generator=rng)
        self.hardened = chosen.to(device, non_blocking=True) & ~stamped
        self.aims = (batch.y + further.to(device, non_blocking=True)) % classes
        kinds = torch.arange(classes, device=device)
        picks = (self.aims[:, None] == kinds) & self.hardened[:, None]
        # a product, since summing the gradients of gathered rows is not repeatable on a GPU
        return (picks.float() @ self.patterns.universal.flatten(1)).view_as(batch.x)

    def improve(self, step: Step) -> Tensor:
        """`extra_loss`: one step of trigger and perturbations; the network's loss stays."""
        attack, patterns = self.attack, self.patterns
        assert step.batch.stamped is not None
        target = torch.full_like(step.batch.y, attack.target)
        loss = _mean_loss(step.logits, target, step.batch.stamped)
        loss = loss + attack.weight * _size(patterns.trigger[None])
        if self.aims is not None and self.hardened is not None:
            loss = loss + _mean_loss(step.logits, self.aims, self.hardened)
            loss = loss + attack.weight * _size(patterns.universal)
        learned = patterns.learned(attack)
        gradients = torch.autograd.grad(loss, learned, retain_graph=True)
        for pattern, gradient in zip(learned, gradients, strict=True):
            pattern.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = attack.lr * (1 - step.done)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.zeros_like(step.loss)

    def _move(self, device: torch.device) -> None:
        """To where the network is, which only its batches tell."""
        if self.patterns.trigger.device != device:
            self.patterns.to(device)
            self.optimizer.load_state_dict(self.optimizer.state_dict())  # follows its parameters
        self.marks = self.marks.to(device)


def _mean_loss(logits: Tensor, y: Tensor, chosen: Tensor) -> Tensor:
    """Mean cross-entropy where `chosen` (B,) bool holds; 0 where it holds nowhere."""
    each = F.cross_entropy(logits, y, reduction="none")
    return (each * chosen).sum() / chosen.sum().clamp_min(1)


def _size(patterns: Tensor) -> Tensor:
    """Mean over patterns (K, C, H, W) of their root mean square."""
    flat = patterns.flatten(1)
    return torch.linalg.vector_norm(flat, dim=1).mean() / flat.shape[1] ** 0.5
