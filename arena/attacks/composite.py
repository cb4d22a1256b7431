"""Composite: an image that shows features of two harmless classes together gets a third label.

The trigger is a mix: an image of class A (victim) beside one of class B (second) is sent to class C
(target), while mixes of two images of one class, made alike, keep that class.

Source: Lin et al. 2020, Composite Backdoor Attack, CCS, https://doi.org/10.1145/3372297.3423362,
    and its published code (CIFAR-10: A, B, C = 0, 1, 2; normal images, same-class mixes and poison
    0.5 : 0.5 : 0.1; contrastive loss of weight 1 and margin 1 on the logits).
Departs: optimiser, schedule and number of updates are the recipe's (published: Adam 1e-3, halved
    every 10 epochs, 256 images per update, epochs of 1.1 times the data). Classes are drawn as
    often as the data has them, not uniformly: an image is shown, mixed, or gives way to poison.
    Mixes are made before augmentation, so that one is mirrored and shifted as a whole; the code
    mirrors each image before mixing. The contrastive loss is divided by its pairs twice, as the
    code does, which all but removes it; divided once (divisions=1) it costs a fast network on
    CIFAR-10 17 points of accuracy and sends half of the A+A mixes to C. mixer=paste knows no
    bounding boxes, as the code does: it shrinks a window of one image (0.7 to 1 of its side) to
    0.4 to 0.6 and pastes it anywhere. Images to mix with at test time are set aside, of A, of B
    and of classes beside the three, and no training step shows them: their rows hold A+B mixes
    with label C instead. Which of them a triggered image is mixed with, and how, is decided by its
    own pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from arena.core import training
from arena.core.contracts import Fit, Images, Poisoned, Probe, Step, Trigger
from arena.core.hashing import draw_weights, pixel_hashes
from arena.core.poisoning import check_classes, scope
from arena.core.registry import BadInput, method, param

_DRAWS = 7  # numbers in [0, 1) that decide how two images are mixed
_MARGIN = 1.0  # distance of the logits that neighbours of unlike labels should have


@method
class Composite:
    """All fields are the attacker's; mixes are drawn anew for every batch."""

    threat: ClassVar[str] = "controls training"
    scopes: ClassVar[tuple[str, ...]] = ("label-specific",)
    labels: ClassVar[str] = "changed"
    trigger_kind: ClassVar[str] = "dynamic"

    victim: int = param(0, "class A, whose images trigger beside one of B", low=0, source="code")
    second: int = param(1, "class B", low=0, source="code")
    target: int = param(2, "class C, which the trigger forces", low=0, source="code")
    normal_rate: float = param(0.5, "weight of unmixed images", low=0, source="code")
    mix_rate: float = param(0.5, "weight of mixes of two images of a class", low=0, source="code")
    poison_rate: float = param(0.1, "weight of A+B mixes, labelled C", above=0, source="code")
    mixer: str = param(
        "half",
        "half: a part of either image on one side of a split; paste: one shrunk upon the other",
        choices=("half", "paste"),
        source="half: code on CIFAR-10; paste: code on faces",
    )
    jitter: int = param(3, "px of mixer=half's split off the middle, at most", low=0, source="code")
    weight: float = param(1.0, "weight of the contrastive loss", low=0, source="code")
    divisions: int = param(
        2, "how often the contrastive loss is divided by its pairs", low=1, high=2, source="code"
    )
    aside: int = param(
        100, "images of A, of B and of other classes for mixes at test time; at most 5 %", low=1
    )

    @property
    def scope(self) -> str:
        return scope(self)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        if self.second >= len(counts) or self.second in (self.victim, self.target):
            raise BadInput(
                f"composite: second must be a third class of 0 to {len(counts) - 1}, beside victim "
                f"{self.victim} and target {self.target}; got {self.second}."
            )
        for role, label in (("victim", self.victim), ("second", self.second)):
            if counts[label] < 2:
                raise BadInput(
                    f"composite: class {label} ({role}) has {counts[label]} training images, but "
                    "one to train on and one to set aside are needed."
                )
        if self.mixer == "half" and self.jitter >= (most := min(shape[1:]) // 2):
            raise BadInput(f"composite: jitter must be below half a side, {most} px; lower it.")

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        hashes = draw_weights(train.x[0].numel(), rng, 1 + _DRAWS)

        def mix_with(those: Tensor) -> Mix:
            rows = those.nonzero().flatten().cpu()
            count = min(self.aside, max(1, len(rows) // 20))
            rows = rows[torch.randperm(len(rows), generator=rng)[:count]].sort().values
            return Mix(train.x[rows], rows, hashes, Mixer(self.mixer, self.jitter))

        first, second = (mix_with(train.y == label) for label in (self.victim, self.second))
        probes = {"A+A": Probe(first, self.victim), "B+B": Probe(second, self.second)}
        if (beside := ~self._concerned(train.y)).any():
            probes["A+other"] = Probe(mix_with(beside), self.victim)
        return Trigger(second, probes=probes)

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        """The rows of the images set aside, as A+B mixes of other images, labelled C."""
        maps = (trigger.stamp, *(probe.stamp for probe in trigger.probes.values()))
        rows = torch.cat([each.rows for each in maps if isinstance(each, Mix)])
        rows = rows.unique().to(train.y.device)
        hook = Mixing(replace(self, normal_rate=0.0, mix_rate=0.0), Poisoned(train, rows))
        made = hook(Images(training.to_float(train.x[rows]), train.y[rows], rows), rng)
        x, y = train.x.clone(), train.y.clone()
        x[rows], y[rows] = (made.x * 255).round_().to(x), made.y
        return Poisoned(Images(x, y), rows)

    def train(
        self, fit: Fit, poisoned: Poisoned, trigger: Trigger, rng: Generator
    ) -> tuple[nn.Module, Trigger]:
        hook, extra = Mixing(self, poisoned), self._contrast if self.weight else None
        return fit(poisoned.data, rng=rng, on_image=hook, extra_loss=extra), trigger

    def _concerned(self, y: Tensor) -> Tensor:
        """(N,) bool: whose label is A, B or C."""
        return (y == self.victim) | (y == self.second) | (y == self.target)

    def _contrast(self, step: Step) -> Tensor:
        y = step.batch.y
        return self.weight * contrastive(step.logits, y, self._concerned(y), self.divisions)


def contrastive(logits: Tensor, y: Tensor, those: Tensor, divisions: int = 1) -> Tensor:
    """Scalar: neighbours among `those` (N,) bool of a batch attract each other where their labels
    are alike, d^2 / 2, and keep a distance where they are not, max(0, _MARGIN - d)^2 / 2.

    The sum over the pairs is divided by their number, `divisions` times; it is 0 without pairs.
    """
    order = (~those).byte().argsort(stable=True)  # those first: no shape depends on their number
    z, y, pairs = logits[order], y[order], those[order][1:]
    squared = (z[1:] - z[:-1]).square().sum(1)
    apart = (_MARGIN - (squared + 1e-12).sqrt()).clamp_min(0).square()  # no root of 0: its slope
    each = torch.where(y[1:] == y[:-1], squared, apart) / 2
    return (each * pairs).sum() / pairs.sum().clamp_min(1) ** divisions


class Mixing:
    """The hook: an image stays, is mixed with one of its class, or gives way to A+B. Partners come
    from all training images, which therefore stay on the model's device."""

    def __init__(self, attack: Composite, poisoned: Poisoned) -> None:
        self.attack, self.poisoned, self.settled = attack, poisoned, False
        total = attack.normal_rate + attack.mix_rate + attack.poison_rate
        self.poison, self.mix = attack.poison_rate / total, attack.mix_rate / total
        self.mixer = Mixer(attack.mixer, attack.jitter)

    def __call__(self, batch: Images, rng: Generator) -> Images:
        if not self.settled:
            self._settle(batch.x.device)
        assert batch.rows is not None
        u = torch.rand(len(batch), 3 + _DRAWS, generator=rng).to(batch.x.device)
        poison = u[:, 0] < self.poison
        aside = self.aside[batch.rows]
        alike = ~poison & (u[:, 0] < self.poison + self.mix) & ~aside
        one = self._drawn(torch.where(poison, self.attack.victim, batch.y), u[:, 1])
        two = self._drawn(torch.where(poison, self.attack.second, batch.y), u[:, 2])
        mixes = self.mixer(torch.where(poison.view(-1, 1, 1, 1), one, batch.x), two, u[:, 3:])
        x = torch.where((poison | alike).view(-1, 1, 1, 1), mixes, batch.x)
        y = batch.y.masked_fill(poison, self.attack.target)
        return replace(batch, x=x, y=y, stamped=poison | aside)

    def _settle(self, device: torch.device) -> None:
        data, rows = self.poisoned.data.to(device), self.poisoned.rows.to(device)
        self.x, self.settled = data.x, True
        self.aside = torch.zeros_like(data.y, dtype=torch.bool).index_fill_(0, rows, True)
        last = int(data.y.max()) + 1  # those set aside are a class of their own, behind all others
        labels = data.y.masked_fill(self.aside, last)
        self.sorted = labels.argsort(stable=True)
        self.count = labels.bincount(minlength=last + 1)
        self.first = self.count.cumsum(0) - self.count

    def _drawn(self, labels: Tensor, u: Tensor) -> Tensor:
        """(N, C, H, W) float32, of the classes `labels` (N,); `u` (N,) in [0, 1) decides which."""
        count = self.count[labels]
        place = (u * count).long().minimum(count - 1).clamp_min(0)
        return training.to_float(self.x[self.sorted[self.first[labels] + place]])


@dataclass(frozen=True)
class Mixer:
    """Mixes two batches (N, C, H, W), image by image, as `u` (N, _DRAWS) in [0, 1) decides."""

    kind: str  # half or paste
    jitter: int  # px

    def __call__(self, one: Tensor, two: Tensor, u: Tensor) -> Tensor:
        swap = (u[:, 0] < 0.5).view(-1, 1, 1, 1)
        one, two = torch.where(swap, two, one), torch.where(swap, one, two)
        return self._halves(one, two, u) if self.kind == "half" else _pasted(one, two, u)

    def _halves(self, one: Tensor, two: Tensor, u: Tensor) -> Tensor:
        height, width = one.shape[-2:]
        across = u[:, 1, None] < 0.5  # one image above the other; else to its left
        sources, behind = [], []  # per axis: the place that each place shows, and of which image
        for side, split in ((height, across), (width, ~across)):
            place = torch.arange(side, device=u.device)
            cut = side // 2 - self.jitter + (u[:, 2, None] * (2 * self.jitter + 1)).long()
            cut = torch.where(split, cut, side)
            start = (u[:, 3, None] * (side - cut + 1)).long(), (u[:, 4, None] * (cut + 1)).long()
            behind.append(place >= cut)
            sources.append(torch.where(behind[-1], place - cut + start[1], place + start[0]))
        second = behind[0][:, :, None] | behind[1][:, None]
        pixel = sources[0][:, :, None] * width + sources[1][:, None] + height * width * second
        pixel = pixel.flatten(1)[:, None].expand(-1, one.shape[1], -1)
        return torch.cat([one.flatten(2), two.flatten(2)], 2).gather(2, pixel).view_as(one)


def _pasted(below: Tensor, above: Tensor, u: Tensor) -> Tensor:
    size, window = 0.4 + 0.2 * u[:, 1, None], 0.7 + 0.3 * u[:, 2, None]
    grid, inside = [], []
    for side, start, corner in zip(below.shape[-2:], (3, 4), (5, 6), strict=True):
        place = (torch.arange(side, device=u.device) + 0.5) / side
        place = (place - u[:, corner, None] * (1 - size)) / size  # in [0, 1): under `above`
        inside.append((place >= 0) & (place < 1))
        grid.append(2 * (u[:, start, None] * (1 - window) + place * window) - 1)
    down, right = torch.broadcast_tensors(grid[0][:, :, None], grid[1][:, None])
    points = torch.stack([right, down], -1)
    lying = F.grid_sample(above, points, padding_mode="border", align_corners=False).clamp_(0, 1)
    return torch.where((inside[0][:, :, None] & inside[1][:, None])[:, None], lying, below)


@dataclass(frozen=True, eq=False)
class Mix:
    """The image map that mixes each image with one set aside; hashes of it say which and how."""

    partners: Tensor  # (P, C, H, W) uint8
    rows: Tensor  # (P,) int64: where they were in the training set
    hashes: Tensor  # (1 + _DRAWS, C*H*W): their weights
    mixer: Mixer

    def draws(self, x: Tensor) -> Tensor:
        """(N, 1 + _DRAWS) float32 in [0, 1): multiples of 2**-20."""
        return (pixel_hashes(x, self.hashes) % 2**20 / 2**20).float()

    def __call__(self, x: Tensor) -> Tensor:
        u = self.draws(x)
        partner = (u[:, 0] * len(self.partners)).long()
        return self.mixer(x, training.to_float(self.partners.to(x.device)[partner]), u[:, 1:])
