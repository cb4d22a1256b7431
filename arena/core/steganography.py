"""Hiding a bit string in images: an encoder that adds a residual, a decoder that reads it back.

Source: StegaStamp, Tancik et al. 2020, https://arxiv.org/abs/1904.05343 (a U-Net sees the image and
    the string, spread over a grid), as ISSBA, Li et al. 2021, https://arxiv.org/abs/2012.03816,
    and its form for 32x32 images in BackdoorBox use it.
Departs: it is trained at the data's own resolution, with 8-bit rounding in the loop. SSIM takes the
    place of LPIPS, whose weights would have to be downloaded and expect larger images. There is no
    critic: at its published rate (1e-5) it learns next to nothing in the updates that a CPU can
    afford. Adam's rate and batch are larger and the updates fewer, with a falling rate, and the
    image losses set in gradually.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from arena.core import metrics, parts, training
from arena.core.adversarial import split_held
from arena.core.contracts import Images
from arena.core.progress import report
from arena.core.seeding import draw_seed, seeded_globals, stream
from arena.core.triggers import rounded

ROUND = 100  # updates between two checkpoints
BATCH = 64  # images per update
LR = 2e-3  # Adam's first rate; it falls to zero along half a cosine
RAMP = 0.5  # share of the updates after the first phase along which the image losses set in
WIDTH = 32  # channels of the encoder at full resolution


@dataclass(frozen=True)
class Plan:
    """How an encoder is trained."""

    bits: int = 20  # length of the secret
    updates: int = 2000
    secret_updates: int = 200  # the first ones, in which only the secret counts
    l2_weight: float = 2.0  # of the residual's mean square
    perceptual_weight: float = 1.5  # of 1 - SSIM
    secret_weight: float = 1.5  # of the bits' cross-entropy


class Encoder(nn.Module):
    """(N, C, H, W) images in [0, 1], (N, bits) secrets of 0 and 1 -> residual (N, C, H, W)."""

    def __init__(self, shape: tuple[int, int, int], bits: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.grid = (channels, math.ceil(height / 4), math.ceil(width / 4))
        self.spread = nn.Linear(bits, math.prod(self.grid))
        self.at_full = _conv(2 * channels, WIDTH)
        self.at_half = _conv(WIDTH, 2 * WIDTH, stride=2)
        self.at_quarter = _conv(2 * WIDTH, 2 * WIDTH, stride=2)
        self.back_half = _conv(4 * WIDTH, WIDTH)
        self.back_full = _conv(2 * WIDTH, WIDTH)
        self.out = nn.Conv2d(WIDTH, channels, 1)

    def forward(self, x: Tensor, secret: Tensor) -> Tensor:
        spread = self.spread(secret * 2 - 1).view(-1, *self.grid)
        full = self.at_full(torch.cat([x * 2 - 1, _as_large(spread, x)], 1))
        half = self.at_half(full)
        quarter = self.at_quarter(half)
        half = self.back_half(torch.cat([_as_large(quarter, half), half], 1))
        full = self.back_full(torch.cat([_as_large(half, full), full], 1))
        residual: Tensor = self.out(full)
        return residual


class Decoder(nn.Module):
    """(N, C, H, W) images in [0, 1] -> (N, bits) logits."""

    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(channels, WIDTH),
            _conv(WIDTH, WIDTH, stride=2),
            _conv(WIDTH, 2 * WIDTH, stride=2),
            _conv(2 * WIDTH, 2 * WIDTH, stride=2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * WIDTH, bits),
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x * 2 - 1)
        return logits


class Steganograph(nn.Module):
    """An encoder and its decoder; `figures` are those of the images held out, once trained."""

    figures: Tensor  # (2,) bit accuracy in [0, 1], peak signal-to-noise ratio in dB

    def __init__(self, shape: tuple[int, int, int], bits: int) -> None:
        super().__init__()
        self.encoder = Encoder(shape, bits)
        self.decoder = Decoder(shape[0], bits)
        self.register_buffer("figures", torch.zeros(2))

    def forward(self, x: Tensor, secret: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] that carry the secrets (N, bits), not yet at 8 bits."""
        return (x + self.encoder(x, secret).float()).clamp(0, 1)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU())


def _as_large(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:])  # nearest


def steganograph(train: Images, plan: Plan) -> Steganograph:
    """The pair for images like `train` (uint8), trained once per data set and plan (a kept part).

    In evaluation mode and frozen, on the images' device. The share of bits that its decoder reads
    from images that it was not trained on is reported, and the images' PSNR in dB.
    """
    shape = (train.x.shape[1], train.x.shape[2], train.x.shape[3])

    def make(rng: Generator, checkpoint: training.Checkpoint | None) -> Mapping[str, Tensor]:
        pair = fitted(train, plan, rng, checkpoint)
        accuracy, ratio = (figure.clone() for figure in pair.figures)  # files share no memory
        return {**pair.state_dict(), "figure.bit_accuracy": accuracy, "figure.psnr": ratio}

    part = parts.trained("encoder", asdict(plan), train, make)
    part = {name: value for name, value in part.items() if not name.startswith("figure.")}
    pair = Steganograph(shape, plan.bits)
    pair.load_state_dict(part)
    accuracy, ratio = pair.figures.tolist()
    report("encoder", 1, 1, bit_accuracy=accuracy, psnr=ratio)
    return pair.to(train.x.device).eval().requires_grad_(False)


def fitted(
    train: Images, plan: Plan, rng: Generator, checkpoint: training.Checkpoint | None = None
) -> Steganograph:
    """A newly trained pair; with a checkpoint, a training that was stopped goes on there."""
    seen, held = split_held(train, rng)
    seed, device = draw_seed(rng), train.x.device
    with seeded_globals(stream(seed, "init")):
        pair = Steganograph((train.x.shape[1], train.x.shape[2], train.x.shape[3]), plan.bits)
    pair.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    adam = torch.optim.Adam(pair.parameters(), lr=LR)
    start = 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        start = int(state["updates"])
        pair.load_state_dict(state["pair"])
        adam.load_state_dict(state["adam"])
    for first in range(start, plan.updates, ROUND):
        last = min(first + ROUND, plan.updates)
        _round(pair, adam, seen, plan, range(first, last), stream(seed, "round", first))
        if checkpoint is not None:
            state = {"pair": pair.state_dict(), "adam": adam.state_dict(), "updates": last}
            checkpoint.save(state)
    pair.figures.copy_(torch.tensor(measured(pair.eval(), held, stream(seed, "held"))))
    return pair


def _round(
    pair: Steganograph,
    adam: torch.optim.Adam,
    seen: Images,
    plan: Plan,
    updates: range,
    rng: Generator,
) -> None:
    device = seen.x.device
    rows = torch.randint(len(seen), (len(updates), BATCH), generator=rng).to(device)
    secrets = torch.randint(2, (len(updates), BATCH, plan.bits), generator=rng).float().to(device)
    right = torch.zeros((), device=device)
    for update, row, secret in zip(updates, rows, secrets, strict=True):
        for group in adam.param_groups:
            group["lr"] = LR * (1 + math.cos(math.pi * update / plan.updates)) / 2
        x = training.to_float(seen.x[row]).contiguous(memory_format=torch.channels_last)
        with training.autocast(device):
            hidden = pair(x, secret)
            logits = pair.decoder(rounded(hidden)).float()
        loss = plan.secret_weight * F.binary_cross_entropy_with_logits(logits, secret)
        if share := _image_share(update, plan):
            loss = loss + share * _visible(x, hidden, plan)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        right += ((logits > 0) == secret.bool()).float().mean()
        report("encoder", update + 1, plan.updates)
    accuracy = float(right) / len(updates)  # the round's one wait for the device
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the encoder's loss became {loss.item()}")
    report("encoder", updates[-1] + 1, plan.updates, bit_accuracy=accuracy)


def _image_share(update: int, plan: Plan) -> float:
    """Weight of the image losses, in [0, 1]: 0 in the first phase, then rising."""
    rise = RAMP * (plan.updates - plan.secret_updates)
    return min(1.0, max(0, update - plan.secret_updates) / max(1.0, rise))


def _visible(x: Tensor, hidden: Tensor, plan: Plan) -> Tensor:
    """What the eye sees of the change: its mean square, and 1 - SSIM."""
    window = min(11, *x.shape[-2:])
    unlike = 1 - metrics.similarity(x, hidden, window=window).mean()
    return plan.l2_weight * (hidden - x).square().mean() + plan.perceptual_weight * unlike


@torch.no_grad()
def measured(pair: Steganograph, images: Images, rng: Generator) -> tuple[float, float]:
    """Share of bits read from `images` (uint8) after 8-bit rounding, in [0, 1]; PSNR in dB."""
    device = images.x.device
    bits = pair.encoder.spread.in_features
    secrets = torch.randint(2, (len(images), bits), generator=rng).float().to(device)
    right, ratio = torch.zeros((), device=device), 0.0
    for x, secret in zip(images.x.split(500), secrets.split(500), strict=True):
        clean = training.to_float(x)
        hidden = rounded(pair(clean, secret))
        right += ((pair.decoder(hidden) > 0) == secret.bool()).float().sum()
        ratio += metrics.psnr(clean, hidden) * len(x)
    return float(right) / (bits * len(images)), ratio / len(images)
