"""Input-aware: a network draws another trigger for every image, which works on no other image.

A generator of patterns and one of masks make x' = (1 - m(x)) x + m(x) p(x). A tenth of each batch
is stamped so and gets the target label; another tenth is stamped with the triggers of other images
and keeps its labels. The pattern generator is trained along with the classifier.

Source: Nguyen and Tran 2020, https://arxiv.org/abs/2010.08138; networks, losses and settings are
    written down from memory of the paper and of its public code, with neither at hand.
Departs: one network for all sizes (the authors' for MNIST is smaller). A cross-trigger is that of
    another image of the same batch, where the authors draw a second batch. The classifier follows
    the arena's recipe (theirs: rate 0.01, 600 epochs); the rate of the pattern generator falls at
    the same shares of the run. The mask generator belongs to the data and its settings, so that
    all seeds share it; it sees images as they are stored, not augmented, for 1,000 updates instead
    of 25 epochs (9,800 on CIFAR-10). Stamped images are rounded to 8 bits in training, as at test
    time. The probe takes the trigger of one of 64 training images.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from arena.core.contracts import Fit, Images, Poisoned, Probe, Step, Trigger
from arena.core.encoder_decoder import SMALLEST, EncoderDecoder
from arena.core.hashing import draw_weights, pixel_hashes
from arena.core.parts import trained
from arena.core.poisoning import check_classes, scope, wanted
from arena.core.progress import report
from arena.core.registry import BadInput, method, param
from arena.core.seeding import draw_seed, seeded_globals, stream
from arena.core.training import Checkpoint, autocast, to_float
from arena.core.triggers import rounded

_BETAS = (0.5, 0.9)  # Adam's, for both generators
_DROPS = (1 / 3, 1 / 2, 2 / 3, 5 / 6)  # shares of the run at which the rate is divided by ten …
_MASK_DROPS = (0.4, 0.8)  # … and of the mask generator's training
_MASK_BATCH, _MASK_SAVE = 128, 50  # its images per update, and updates between checkpoints
_OF_MASK = ("diversity", "lr", "mask_density", "mask_norm", "mask_updates")
_DONORS = 64


@method
class InputAware:
    """All fields are the attacker's; the networks are learned, on the training images."""

    threat: ClassVar[str] = "controls training"
    scopes: ClassVar[tuple[str, ...]] = ("universal", "all-to-all")
    labels: ClassVar[str] = "changed"
    trigger_kind: ClassVar[str] = "dynamic"
    learned: ClassVar[bool] = True

    target: int = param(0, "class that the trigger forces; all_to_all has none", low=0)
    mode: str = param(
        "universal",
        "universal: every triggered image to the target; all_to_all: class y to y + 1",
        choices=("universal", "all_to_all"),
    )
    rate: float = param(
        0.1, "share of each batch with its own triggers and the target label", above=0, high=1
    )
    cross_rate: float = param(
        0.1, "share of each batch with other images' triggers and its own labels", above=0, high=1
    )
    diversity: float = param(1.0, "weight of the loss that keeps the triggers apart", low=0)
    lr: float = param(0.01, "Adam's rate for the generators", above=0)
    mask_density: float = param(0.032, "what mask values may have at no cost", low=0, high=1)
    mask_norm: float = param(100.0, "weight of the loss on what they have beyond", low=0)
    mask_updates: int = param(
        1000, "updates of the mask generator, before all else", low=1, under={"smoke": 2}
    )

    def __post_init__(self) -> None:
        if (both := self.rate + self.cross_rate) >= 1:
            raise BadInput(f"input_aware: rate + cross_rate must be below 1, got {both:g}.")

    @property
    def scope(self) -> str:
        return scope(self)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        if (side := min(shape[1:])) < SMALLEST:
            raise BadInput(f"input_aware: images must be {SMALLEST} px a side or more, not {side}.")

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        """Newly initialised generators, and the donors of the probe's triggers."""
        channels = train.x.shape[1]
        with seeded_globals(rng):
            own = Own(EncoderDecoder(channels, channels), EncoderDecoder(channels, 1))
        rows = torch.randperm(len(train), generator=rng)[:_DONORS].to(train.x.device)
        weights = draw_weights(train.x[0].numel(), rng)
        return _trigger(Lent(own, train.x[rows], weights))

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        """The clean set: this attack poisons inside the training."""
        return Poisoned(train, torch.empty(0, dtype=torch.int64, device=train.x.device))

    def train(
        self, fit: Fit, poisoned: Poisoned, trigger: Trigger, rng: Generator
    ) -> tuple[nn.Module, Trigger]:
        data, lent = poisoned.data, trigger.probes["cross"].stamp
        assert isinstance(lent, Lent)
        joint = Joint(self, data, lent.own)
        model = fit(
            data,
            rng=rng,
            on_batch=joint.stamp,
            extra_loss=joint.loss,
            also=(joint.adam,),
            carry={"pattern": joint.pattern, "mask": joint.mask, "adam": joint.adam},
        )
        return model, _trigger(replace(lent, own=Own(joint.pattern, joint.mask)))


def sharpened(values: Tensor) -> Tensor:
    """Masks (N, 1, H, W) in [0, 1], mostly near 0 or 1, from the mask generator's outputs."""
    return (20 * values - 10).tanh() / 2 + 0.5


def closeness(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    """Mean over pairs (N, ...) of images' distance by their patterns' or masks' distance.

    A distance is the root of the mean square, and at least 1e-4.
    """
    squares = [(x - y).square().flatten(1).mean(1) + 1e-8 for x, y in ((a, b), (of_a, of_b))]
    return (squares[0].sqrt() / squares[1].sqrt()).mean()


def _trigger(lent: Lent) -> Trigger:
    """With copies of the generators: frozen, in evaluation mode, on the CPU."""
    nets = (lent.own.pattern, lent.own.mask)
    own = Own(*(copy.deepcopy(net).cpu().eval().requires_grad_(False) for net in nets))
    return Trigger(own, probes={"cross": Probe(replace(lent, own=own))})


@dataclass(frozen=True, eq=False)
class Own:
    """The image map that stamps each image with its own trigger."""

    pattern: EncoderDecoder
    mask: EncoderDecoder

    @torch.no_grad()
    def drawn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Patterns (N, C, H, W) and masks (N, 1, H, W) for `x`."""
        return self.pattern.to(x.device)(x), sharpened(self.mask.to(x.device)(x))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.lerp(x, *self.drawn(x)).clamp_(0, 1)


@dataclass(frozen=True, eq=False)
class Lent:
    """The image map that stamps each image with the trigger of a donor, which its pixels pick."""

    own: Own
    donors: Tensor  # (K, C, H, W) uint8
    weights: Tensor  # (1, C*H*W) of the hash that picks

    def __call__(self, x: Tensor) -> Tensor:
        donor = pixel_hashes(x, self.weights)[:, 0] % len(self.donors)
        patterns, masks = self.own.drawn(to_float(self.donors.to(x.device)))
        return torch.lerp(x, patterns[donor], masks[donor]).clamp_(0, 1)


class Joint:
    """Trains the pattern generator along with the classifier, as hooks of `fit`."""

    def __init__(self, attack: InputAware, data: Images, own: Own) -> None:
        self.attack, self.data, self.ready = attack, data, False
        self.pattern = copy.deepcopy(own.pattern).train().requires_grad_(True)
        self.mask = copy.deepcopy(own.mask)
        self.adam = torch.optim.Adam(self.pattern.parameters(), lr=attack.lr, betas=_BETAS)
        self.classes = int(data.y.max()) + 1

    def stamp(self, batch: Images, rng: Generator) -> Images:
        """The batch with own triggers on its first images, and others' on the next ones."""
        x, y, n = batch.x, batch.y, len(batch)
        if not self.ready:
            self._move(x.device)
        own, lent = (max(1, round(s * n)) for s in (self.attack.rate, self.attack.cross_rate))
        others = x.roll(-lent, 0)[own : own + lent]
        shown = torch.cat([x[:own], others])
        with autocast(x.device):
            patterns, masks = self.pattern(shown), sharpened(self.mask(shown))
        pairs = min(own, len(others))
        self.close = closeness(x[:pairs], others[:pairs], patterns[:pairs], patterns[own:][:pairs])
        stamped = rounded(torch.lerp(x[: own + lent], patterns, masks).clamp(0, 1))
        aims = wanted(self.attack, y[:own], self.classes)
        flags = torch.arange(n, device=y.device) < own
        x, y = torch.cat([stamped, x[own + lent :]]), torch.cat([aims, y[own:]])
        return replace(batch, x=x, y=y, stamped=flags)

    def loss(self, step: Step) -> Tensor:
        """The diversity loss of the batch just stamped."""
        for group in self.adam.param_groups:
            group["lr"] = self.attack.lr * 0.1 ** sum(step.done >= at for at in _DROPS)
        return self.attack.diversity * self.close

    def _move(self, device: torch.device) -> None:
        """Have the mask generator, and move all to the device on which `fit` turns out to work."""

        def make(rng: Generator, checkpoint: Checkpoint | None) -> Mapping[str, Tensor]:
            return train_mask(self.attack, self.data, device, rng, checkpoint).state_dict()

        settings = {name: getattr(self.attack, name) for name in _OF_MASK}
        self.mask.load_state_dict(trained("mask generator", settings, self.data, make))
        self.mask.to(device)
        self.pattern.to(device)
        self.adam.load_state_dict(self.adam.state_dict())  # moves its moments along
        self.ready = True


def train_mask(
    attack: InputAware,
    data: Images,
    device: torch.device,
    rng: Generator,
    checkpoint: Checkpoint | None = None,
) -> EncoderDecoder:
    """The mask generator: masks differ as much as the images do, and cover little."""
    seed, total, done = draw_seed(rng), attack.mask_updates, 0
    with seeded_globals(stream(seed, "init")):
        net = EncoderDecoder(data.x.shape[1], 1).to(device)
    adam = torch.optim.Adam(net.parameters(), lr=attack.lr, betas=_BETAS)
    sample = to_float(data.x[:: max(1, len(data) // 1000)].to(device))
    spread = sample.std((0, 2, 3)).clamp_min(1 / 255)[:, None, None]
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        done = int(state["done"])
        net.load_state_dict(state["net"])
        adam.load_state_dict(state["adam"])
    for update in range(done, total):
        drops = sum(update >= share * total for share in _MASK_DROPS)
        adam.param_groups[0]["lr"] = attack.lr * 0.1**drops
        order = torch.randperm(len(data), generator=stream(seed, "batch", update))
        x = to_float(data.x[order[:_MASK_BATCH].to(data.x.device)].to(device))
        with autocast(device):
            masks = sharpened(net(x))
        close = closeness(x / spread, x.roll(1, 0) / spread, masks, masks.roll(1, 0))
        beyond = F.relu(masks - attack.mask_density).mean()
        adam.zero_grad(set_to_none=True)
        (attack.mask_norm * beyond + attack.diversity * close).backward()
        adam.step()
        report("mask generator", update + 1, total)
        if checkpoint is not None and (update + 1) % _MASK_SAVE == 0:
            states = {"net": net.state_dict(), "adam": adam.state_dict()}
            checkpoint.save({"done": update + 1, **states})
    return net.eval()
