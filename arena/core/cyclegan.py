"""CycleGAN: two generators learn to carry images of a set A into the style of a set B, and back.

Trained once per data set, style and settings, and kept with the other trained parts; a stopped
training goes on where it was.

Source: Zhu et al. 2017, https://arxiv.org/abs/1703.10593: least-squares GAN, L1 cycle and identity
    losses, generators of residual blocks with instance norm, PatchGAN discriminators, Adam with
    2e-4 and beta1 0.5.
Departs: no history of generated images is shown to the discriminators (the paper's batch is one
    image; here batches are large). A generator computes a change of the image, none at first, and
    not the image anew: it is good after hundreds of updates, where one from scratch has long lost
    what the images show. Upsampling is by pixel shuffle. The discriminators halve the image twice,
    not three times: they are for small images.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Generator as Draws
from torch import Tensor, nn
from torch.nn import functional as F

from arena.core.contracts import Images
from arena.core.parts import trained
from arena.core.progress import report
from arena.core.seeding import draw_seed, seeded_globals, stream
from arena.core.training import Checkpoint, autocast, to_float

SMALLEST = 16  # px a side: below, the discriminators see no patch
_FLOOR = 0.02  # distance that pixels keep from 0 and 1, where no change would have a gradient
_EPOCH = 25  # updates between two checkpoints, and between two waits for the device


@dataclass(frozen=True)
class Plan:
    """How to train a CycleGAN."""

    steps: int  # updates of the generators, and as many of the discriminators
    width: int  # channels of the generators' first layer; the residual blocks have four times that
    blocks: int  # residual blocks
    batch: int  # images of each set per update
    lr: float  # Adam's rate
    cycle: float  # weight of the L1 distance between an image and its way there and back
    identity: float  # weight of the L1 distance between an image of the style and its restyled form


def style_transfer(train: Images, style: Tensor, plan: Plan) -> Restyler:
    """The generator from `train` (A) to `style` (B), frozen and in evaluation mode, on the CPU.

    style: uint8 (M, C, H, W), of the training images' shape. Trains where train's images lie;
    nothing depends on anything but the arguments.
    """
    digest = hashlib.sha256(style.cpu().contiguous().numpy().data).hexdigest()

    def make(rng: Draws, checkpoint: Checkpoint | None) -> Mapping[str, Tensor]:
        nets = train_cyclegan(train.x, style.to(train.x.device), plan, rng, checkpoint)
        return nets["a_to_b"].state_dict()

    found = trained("cyclegan", {**asdict(plan), "style": digest}, train, make)
    generator = Restyler(style.shape[1], plan.width, plan.blocks)
    generator.load_state_dict(found)
    return generator.requires_grad_(False).eval()


# -------------------------------------------------------------------------------------- networks


class Restyler(nn.Module):
    """The generator: (N, C, H, W) in [0, 1] -> the same; every image is treated by itself.

    It changes the image, which it leaves (all but) as it is at first.
    """

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        deep = 4 * width
        self.body = nn.Sequential(
            *_layer(nn.Conv2d(channels, width, 7, padding=3, padding_mode="reflect")),
            *_layer(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)),
            *_layer(nn.Conv2d(2 * width, deep, 3, stride=2, padding=1)),
            *(Block(deep) for _ in range(blocks)),
            _before_shuffle(nn.Conv2d(deep, 8 * width, 3, padding=1)),
            *_layer(nn.PixelShuffle(2), 2 * width),
            _before_shuffle(nn.Conv2d(2 * width, 4 * width, 3, padding=1)),
            *_layer(nn.PixelShuffle(2), width),
        )
        self.change = nn.Conv2d(width, channels, 7, padding=3, padding_mode="reflect")
        nn.init.zeros_(self.change.weight)
        assert self.change.bias is not None
        nn.init.zeros_(self.change.bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        padded = F.pad(x, (0, -width % 4, 0, -height % 4), mode="reflect")  # two halvings
        change = self.change(self.body(padded))[..., :height, :width].float()
        return torch.sigmoid(torch.logit(x, eps=_FLOOR) + change)


class Block(nn.Module):
    """A residual block: two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_layer(nn.Conv2d(width, width, 3, padding=1)),
            *_layer(nn.Conv2d(width, width, 3, padding=1))[:2],
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Critic(nn.Module):
    """The PatchGAN discriminator: (N, C, H, W) -> a score per overlapping patch, 1: it is real."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            *_layer(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), slope=0.2),
            *_layer(nn.Conv2d(2 * width, 4 * width, 4, padding=1), slope=0.2),
            nn.Conv2d(4 * width, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).float()


@torch.no_grad()
def _before_shuffle(conv: nn.Conv2d) -> nn.Conv2d:
    """Start with four equal pixels from each: otherwise a fine grid lies over all images."""
    for weight in conv.parameters():
        weight.copy_(weight[::4].repeat_interleave(4, 0))
    return conv


def _layer(first: nn.Module, width: int = 0, slope: float = 0.0) -> tuple[nn.Module, ...]:
    """A layer, instance norm (each channel of each image by itself) and (leaky) ReLU."""
    width = width or int(first.out_channels)  # type: ignore[arg-type]
    relu = nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)
    return first, nn.InstanceNorm2d(width, affine=True), relu


# -------------------------------------------------------------------------------------- training


def fooling_loss(scores: Tensor) -> Tensor:
    """Least squares: what a generator pays for the scores of its images, which should be 1."""
    return (scores - 1).square().mean()


def telling_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Least squares: what a discriminator pays; real patches should score 1, generated ones 0."""
    return ((real - 1).square().mean() + fake.square().mean()) / 2


def generators_loss(
    nets: nn.ModuleDict, a: Tensor, b: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """What both generators pay, and their images of the sets A and B.

    a, b: real images, float in [0, 1], as many of each.
    """
    size = len(a)
    # one pass carries images over, and keeps those that are there already: the norm is per image
    fake_b, kept_b = nets["a_to_b"](torch.cat([a, b])).split(size)
    fake_a, kept_a = nets["b_to_a"](torch.cat([b, a])).split(size)
    back_a, back_b = nets["b_to_a"](fake_b), nets["a_to_b"](fake_a)
    fooling = fooling_loss(nets["critic_a"](fake_a)) + fooling_loss(nets["critic_b"](fake_b))
    cycle = F.l1_loss(back_a, a) + F.l1_loss(back_b, b)
    identity = F.l1_loss(kept_a, a) + F.l1_loss(kept_b, b)
    return fooling + plan.cycle * cycle + plan.identity * identity, fake_a, fake_b


def train_cyclegan(
    a: Tensor, b: Tensor, plan: Plan, rng: Draws, checkpoint: Checkpoint | None = None
) -> nn.ModuleDict:
    """Generators "a_to_b", "b_to_a" and discriminators "critic_a", "critic_b", on a's device.

    a, b: the two sets, uint8 (N, C, H, W) and (M, C, H, W), which need not be equally large.
    Raises FloatingPointError when the loss is no longer finite.
    """
    device, channels = a.device, a.shape[1]
    with seeded_globals(rng):
        nets = nn.ModuleDict(
            {
                "a_to_b": Restyler(channels, plan.width, plan.blocks),
                "b_to_a": Restyler(channels, plan.width, plan.blocks),
                "critic_a": Critic(channels, plan.width),
                "critic_b": Critic(channels, plan.width),
            }
        )
    seed = draw_seed(rng)
    nets.to(device)  # contiguous: instance norm would copy maps of another layout
    makers = _adam(nets, ("a_to_b", "b_to_a"), plan.lr)
    critics = _adam(nets, ("critic_a", "critic_b"), plan.lr)
    parts: dict[str, Any] = {"nets": nets, "makers": makers, "critics": critics}
    first = 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        first = int(state["epoch"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
    epochs = math.ceil(plan.steps / _EPOCH)
    for epoch in range(first, epochs):
        start = epoch * _EPOCH
        steps = min(_EPOCH, plan.steps - start)
        draws = stream(seed, "cyclegan", epoch)
        rows = [torch.randint(len(x), (steps, plan.batch), generator=draws) for x in (a, b)]
        running = torch.zeros((), device=device)
        for step in range(steps):
            real_a, real_b = (_batch(x, r[step]) for x, r in zip((a, b), rows, strict=True))
            running += _update(nets, makers, critics, real_a, real_b, plan)
            report("style transfer", start + step + 1, plan.steps)
        mean = float(running) / steps
        if not math.isfinite(mean):
            raise FloatingPointError(f"the CycleGAN's loss became {mean} by update {start + steps}")
        report("style transfer", start + steps, plan.steps, loss=mean)
        if checkpoint is not None:
            state = {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save({**state, "epoch": epoch + 1})
    return nets.eval()


def _update(
    nets: nn.ModuleDict,
    makers: torch.optim.Optimizer,
    critics: torch.optim.Optimizer,
    a: Tensor,
    b: Tensor,
    plan: Plan,
) -> Tensor:
    """One update of the generators, then one of the discriminators; returns the former's loss."""
    judges = nn.ModuleList([nets["critic_a"], nets["critic_b"]])
    judges.requires_grad_(False)
    with autocast(a.device):
        loss, fake_a, fake_b = generators_loss(nets, a, b, plan)
    makers.zero_grad(set_to_none=True)
    loss.backward()
    makers.step()
    judges.requires_grad_(True)
    with autocast(a.device):
        paid = [
            telling_loss(*nets[name](torch.cat([real, fake.detach()])).chunk(2))
            for name, real, fake in (("critic_a", a, fake_a), ("critic_b", b, fake_b))
        ]
    critics.zero_grad(set_to_none=True)
    torch.stack(paid).sum().backward()
    critics.step()
    return loss.detach()


def _batch(x: Tensor, rows: Tensor) -> Tensor:
    return to_float(x[rows.to(x.device)])


def _adam(nets: nn.ModuleDict, names: tuple[str, ...], lr: float) -> torch.optim.Optimizer:
    weights = [weight for name in names for weight in nets[name].parameters()]
    return torch.optim.Adam(weights, lr=lr, betas=(0.5, 0.999))
