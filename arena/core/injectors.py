"""Compromised neurons, and feature injectors: networks that switch such a neuron on.

An injector is what a scanner in the manner of ABS could find instead of the trigger: a mild change
of the image that raises one neuron and sends images to the target. An attacker who trains on its
images under their true labels takes that handle away (controlled detoxification).

Source: Cheng et al., AAAI 2021 (DFST), https://arxiv.org/abs/2012.11212, and its public code; the
    loss to the target and the share of images that an injector must fool are BackdoorVault's.
Departs: neurons are looked for in the outputs of the model's three feature levels. The published
    rule compares activations summed over a map (of 32x32 pixels, in the first layers) with five
    times the layer's largest; here it is their mean over the map, so that maps of every size are
    judged alike: 5 of 1024 pixels make a share of 0.005. The U-Net is smaller (3x3 convolutions,
    two sizes) and starts from the unchanged image, so that a hundred updates do. Activations are
    measured in units of the neuron's rise under the trigger, which makes the loss's weights
    independent of network and resolution; the target's term is a tenth of BackdoorVault's (the
    paper has none), since it would soon draw the target class instead of raising the neuron. The
    smoothness term is left to the similarity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from arena.core.adversarial import frozen
from arena.core.contracts import Images
from arena.core.features import features
from arena.core.metrics import similarity
from arena.core.models import LEVELS, Classifier
from arena.core.poisoning import stamp
from arena.core.progress import report
from arena.core.seeding import seeded_globals
from arena.core.training import autocast, device_of, logits, to_float

RATE = 1e-3  # of Adam, for injectors
ALIKE = 0.6  # SSIM with the image that an injector must keep
_WINDOW = 11  # px, of the SSIM; smaller images have a window of their own size
_FAR, _NEAR = 1000.0, 1.0  # weight of the SSIM below ALIKE and above; the paper: 1e5 and 100
_OTHERS = 0.01  # weight of the mean change of the level's other neurons
_TARGET = 0.1  # weight of the cross-entropy to the target class
_FLOOR = 0.02  # distance that pixels keep from 0 and 1, where no change would have a gradient


class Neuron(NamedTuple):
    """A channel of a feature level, and how far the trigger raises its mean activation."""

    level: str
    channel: int
    rise: float


# -------------------------------------------------------------------------- compromised neurons


@torch.no_grad()
def compromised(
    model: Classifier, clean: Tensor, stamped: Tensor, *, share: float, most: int
) -> list[Neuron]:
    """The neurons of each level that the trigger raises most, at most `most` per level.

    clean, stamped: uint8 (N, C, H, W) each. A neuron counts where its activation (mean over images
    and pixels, negative ones taken as 0) rises by more than `share` of the level's largest, and by
    more than it is on clean images.
    """
    found = []
    for level in LEVELS:
        before, largest = _activation(model, clean, level)
        after, _ = _activation(model, stamped, level)
        rise = after - before
        rise[(rise <= share * largest) | (rise <= before)] = 0
        strongest, channels = rise.topk(min(most, len(rise)))
        pairs = zip(channels.tolist(), strongest.tolist(), strict=True)
        found += [Neuron(level, channel, value) for channel, value in pairs if value > 0]
    return found


def _activation(
    model: Classifier, x: Tensor, level: str, batch: int = 250
) -> tuple[Tensor, Tensor]:
    """Mean activation of each channel (K,) and the level's largest one, of uint8 images."""
    device = device_of(model)
    sums, tops = [], []
    for part in x.split(batch):
        with autocast(device):
            out = features(model, to_float(part.to(device)), (level,))[level].float().relu()
        sums.append(_means(out).sum(0))
        tops.append(out.amax())
    return torch.stack(sums).sum(0) / len(x), torch.stack(tops).amax()


def _means(out: Tensor) -> Tensor:
    """(N, K, ...) -> (N, K), the mean over pixels."""
    return out.flatten(2).mean(2) if out.ndim > 2 else out


# ------------------------------------------------------------------------------ feature injectors


class Injector(nn.Module):
    """A small U-Net: images (N, C, H, W) in [0, 1] -> the same, changed; at first hardly at all."""

    def __init__(self, channels: int, width: int = 16) -> None:
        super().__init__()
        self.enter = _layer(channels, width)
        self.down = _layer(width, 2 * width, stride=2)
        self.deep = _layer(2 * width, 2 * width)
        self.up = _layer(3 * width, width)
        self.change = nn.Conv2d(width, channels, 3, padding=1)
        nn.init.zeros_(self.change.weight)
        assert self.change.bias is not None
        nn.init.zeros_(self.change.bias)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.enter(x)
        coarse = F.interpolate(self.deep(self.down(fine)), size=x.shape[-2:], mode="nearest")
        change = self.change(self.up(torch.cat([fine, coarse], 1))).float()
        return torch.sigmoid(torch.logit(x, eps=_FLOOR) + change)


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
    return nn.Sequential(conv, nn.InstanceNorm2d(outputs, affine=True), nn.ReLU(inplace=True))


def image_similarity(a: Tensor, b: Tensor) -> Tensor:
    """SSIM of each pair of images, (N,), in [-1, 1]; 1 where they are the same."""
    return similarity(a, b, window=min(_WINDOW, *a.shape[-2:]))


def train_injector(
    model: Classifier, neuron: Neuron, seeds: Tensor, target: int, steps: int, rng: Generator
) -> Injector | None:
    """An injector that raises `neuron` and sends images to `target`; None where none was found.

    seeds: float images in [0, 1] that it learns on, none of the target class, on the model's
    device. The model, in evaluation mode, stays as it is. Kept are the weights, of all updates,
    that fool most seeds while the mean SSIM is above ALIKE and the neuron rises by more than half
    of its clean activation.
    """
    device = seeds.device
    with seeded_globals(rng):
        injector = Injector(seeds.shape[1])
    injector.to(device)
    weights = list(injector.parameters())
    best = [weight.detach().clone() for weight in weights]
    most = torch.full((), -1.0, device=device)
    optimizer = torch.optim.Adam(weights, lr=RATE)
    wanted = torch.full((len(seeds),), target, device=device)
    with frozen(model):
        with torch.no_grad():
            plain, _ = _look(model, neuron, seeds)
        for _ in range(steps):
            with autocast(device):
                changed = injector(seeds)
            now, out = _look(model, neuron, changed)
            alike = image_similarity(seeds, changed).mean()
            loss, gain = injector_loss(now, plain, neuron, alike)
            loss = loss + _TARGET * F.cross_entropy(out, wanted)
            with torch.no_grad():  # judged before the update: these weights made these images
                hits = (out.argmax(1) == target).float().mean()
                lit = gain > plain[:, neuron.channel].relu().mean() / 2
                better = (hits >= most) & (alike > ALIKE) & lit
                most = torch.where(better, hits, most)
                for kept, weight in zip(best, weights, strict=True):
                    kept.copy_(torch.where(better, weight, kept))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    if most < 0:
        return None
    with torch.no_grad():
        for kept, weight in zip(best, weights, strict=True):
            weight.copy_(kept)
    return injector.requires_grad_(False).eval()


def injector_loss(
    now: Tensor, plain: Tensor, neuron: Neuron, alike: Tensor
) -> tuple[Tensor, Tensor]:
    """What an injector pays, beside the cross-entropy to the target; and the neuron's rise.

    now, plain: (N, K) mean activations of the neuron's level for the changed and the unchanged
    images; alike: mean SSIM of the two.
    """
    moved = now - plain
    gain = moved[:, neuron.channel].mean()
    sizes = moved.abs().mean(0)
    others = (sizes.sum() - sizes[neuron.channel]) / max(1, len(sizes) - 1)
    weight = torch.where(alike < ALIKE, _FAR, _NEAR)
    return (_OTHERS * others - gain) / neuron.rise - weight * alike, gain


def _look(model: Classifier, neuron: Neuron, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean activations (N, K) of the neuron's level, and the logits."""
    seen: list[Tensor] = []
    module = model.get_submodule(model.levels[neuron.level])
    hook = module.register_forward_hook(lambda _, __, out: seen.append(out.float()))
    try:
        with autocast(x.device):
            out = model(x).float()
    finally:
        hook.remove()
    return _means(seen[0]), out


# ---------------------------------------------------------------------------------- one round


def find_injectors(
    model: Classifier,
    clean: Tensor,
    stamped: Tensor,
    target: int,
    rng: Generator,
    *,
    share: float,
    most: int,
    steps: int,
    keep: float,
    seeds: int = 100,
) -> list[Injector]:
    """Injectors for the model's compromised neurons that send over `keep` of `clean` to `target`.

    clean, stamped: uint8 (N, C, H, W), images of other classes and the same under the trigger;
    injectors learn on the first `seeds` of them. share, most: as of `compromised`.
    """
    device = device_of(model)
    neurons = compromised(model, clean, stamped, share=share, most=most)
    learned_on = to_float(clean[:seeds].to(device))
    kept: list[Injector] = []
    for done, neuron in enumerate(neurons):
        report("feature injectors", done, len(neurons), kept=len(kept))
        injector = train_injector(model, neuron, learned_on, target, steps, rng)
        if injector is None:
            continue
        fooled = logits(model, inject(clean, injector)).argmax(1) == target
        if float(fooled.float().mean()) > keep:
            kept.append(injector)
    report("feature injectors", len(neurons), len(neurons), kept=len(kept))
    return kept


@torch.no_grad()
def inject(x: Tensor, injector: Injector) -> Tensor:
    """uint8 images (N, C, H, W) through an injector, rounded to 8 bits, on x's device."""
    device = device_of(injector)
    return stamp(x, lambda images: injector(images.to(device)).to(images.device))


def detoxified(clean: Images, injectors: list[Injector], count: int, rng: Generator) -> Images:
    """`count` random images of `clean`, shared out to the injectors, with their true labels."""
    rows = torch.randperm(len(clean), generator=rng)[:count].to(clean.y.device)
    chosen = clean.take(rows)
    parts = chosen.x.tensor_split(len(injectors))
    pairs = zip(parts, injectors, strict=True)
    return Images(torch.cat([inject(part, injector) for part, injector in pairs]), chosen.y)
