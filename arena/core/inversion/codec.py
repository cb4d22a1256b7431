"""An encoder and a decoder back from its first pooling: where DECK changes what images look like.

Source: DECK (Model hardening against pervasive backdoors), sections IV-A and V-F: the first block
    of a VGG, fixed, and its mirror image, trained to reconstruct (mean squared error). What pooling
    lost is filled in by upsampling: random (each value in the top left of its cell, the others
    drawn from a Gaussian of mean 0), zero, nearest, or swwae (the value goes back to where the
    maximum was).
Departs: the encoder is the first block of a small network trained on the data at hand, not of a VGG
    trained on ImageNet; it learns to classify and to lose little that the decoder needs, since a
    small classifier's first block alone loses so much that a third of the images are taken for
    others when they come back. The Gaussian has one deviation per channel, that of what pooling
    leaves out. Distances are seen by deeper features (`perceived`), since the paper does not say
    which of a pre-trained encoder's its distances are of: of a VGG the third pooling's, of ours the
    second's, which agree best with them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from copy import deepcopy
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from arena.core import training
from arena.core.contracts import Images
from arena.core.progress import report
from arena.core.registry import BadInput, nearest
from arena.core.seeding import draw_seed, seeded_globals, stream

WIDTH = 64  # channels of the features
_VGG_BLOCKS = 3  # distances are seen by the last one's pooling
_BLOCK, _TOP = (128, 128), (256, 256)  # widths: a block for distances, and one to classify by it
_RATE = 2e-3  # of Adam, at first
_FAITHFUL = 100.0  # weight of what images lack that come back from features, beside a classifier's
_MEASURE_EVERY = 50  # updates of the encoder between two measurements of what pooling leaves out
_DRAWS = 8  # of noise per update, shared out to its images: drawing costs more than decoding
Upsampling = Literal["random", "zero", "nearest", "swwae"]


class Encoder(nn.Module):
    """float (N, C, H, W) in [0, 1] -> features (N, 64, H / 2, W / 2), sizes rounded up.

    further: the widths of the convolutions in each block after the first.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, further: Sequence[Sequence[int]] = ()) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((channels, 1, 1), 0.25))
        self.conv1 = nn.Conv2d(channels, WIDTH, 3, padding=1)
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.further = nn.ModuleList()
        before = WIDTH
        for widths in further:
            ins = [before, *widths[:-1]]
            convs = (nn.Conv2d(i, o, 3, padding=1) for i, o in zip(ins, widths, strict=True))
            self.further.append(nn.ModuleList(convs))
            before = widths[-1]

    def maps(self, x: Tensor) -> Tensor:
        """Before pooling, (N, 64, H, W)."""
        return F.relu(self.conv2(F.relu(self.conv1((x - self.mean) / self.std))))

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # which pooling is fastest in, too
        return F.max_pool2d(self.maps(x), 2, ceil_mode=True)

    def perceived(self, x: Tensor) -> Tensor:
        """Features of the last block's pooling, (N, width, h, w): halved once more by each."""
        features: Tensor = self(x)
        for block in _blocks(self):
            for conv in block:
                features = F.relu(conv(features))
            features = F.max_pool2d(features, 2, ceil_mode=True)
        return features


class Decoder(nn.Module):
    """Features, upsampled to the images' size -> images (N, C, H, W), not clipped."""

    deviation: Tensor  # (64, 1, 1) of what fills the cells

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.ones(WIDTH, 1, 1))
        self.conv2 = nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1)
        self.conv1 = nn.ConvTranspose2d(WIDTH, channels, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.conv1(F.relu(self.conv2(maps)))

    def spread(self, features: Tensor, size: tuple[int, int], fill: Tensor | None) -> Tensor:
        """Images from features whose values stand in the top left of cells of 2 x 2.

        That and a transposed convolution are one with a stride, at a quarter of the cost; what
        fills the other pixels (None: zeros) is convolved apart, since many images share it.
        fill: (K, 64, H, W), each for as many images in a row; the top left does not count.
        """
        beyond = [side - (2 * few - 1) for side, few in zip(size, features.shape[-2:], strict=True)]
        conv, features = self.conv2, features.contiguous(memory_format=torch.channels_last)
        maps = F.conv_transpose2d(features, conv.weight, conv.bias, 2, 1, beyond)
        if fill is not None:
            corner = torch.zeros(size, dtype=torch.bool, device=fill.device)
            corner[::2, ::2] = True
            fill = fill.masked_fill(corner, 0).contiguous(memory_format=torch.channels_last)
            filled = F.conv_transpose2d(fill, conv.weight, padding=1)
            maps = (maps.unflatten(0, (len(filled), -1)) + filled[:, None]).flatten(0, 1)
        return self.conv1(F.relu(maps))


def upsampled(features: Tensor, size: tuple[int, int], places: Tensor | None) -> Tensor:
    """(…, h, w) -> (…, H, W), every value in a cell of 2 x 2: in each of its pixels, or alone.

    places: which of the four pixels of its cell each value belongs to, (…, h, w) int64 in [0, 4);
    None: all of them.
    """
    height, width = size
    if places is None:
        whole = features.repeat_interleave(2, -2).repeat_interleave(2, -1)
    else:
        spread = torch.zeros(*features.shape, 4, dtype=features.dtype, device=features.device)
        whole = _woven(spread.scatter(-1, places[..., None], features[..., None]))
    return whole[..., :height, :width]


def _woven(cells: Tensor) -> Tensor:
    """(…, h, w, 4) -> (…, 2h, 2w)."""
    *front, height, width, _ = cells.shape
    split = cells.reshape(*front, height, width, 2, 2).transpose(-3, -2)
    return split.reshape(*front, 2 * height, 2 * width)


def cells_of(maps: Tensor) -> Tensor:
    """(…, H, W) -> (…, h, w, 4): the pixels of every cell; beyond the edge -inf."""
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (0, width % 2, 0, height % 2), value=-torch.inf)
    *front, tall, wide = padded.shape
    split = padded.reshape(*front, tall // 2, 2, wide // 2, 2).transpose(-3, -2)
    return split.reshape(*front, tall // 2, wide // 2, 4)


class Codec(nn.Module):
    """Both, with the upsampling between them."""

    def __init__(
        self, channels: int, how: Upsampling = "random", further: Sequence[Sequence[int]] = ()
    ) -> None:
        super().__init__()
        self.how, self.channels = how, channels
        self.encoder, self.decoder = Encoder(channels, further), Decoder(channels)

    def decode(
        self, features: Tensor, size: tuple[int, int], noise: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """noise: for `random` alone, of mean 0 and deviation 1, (K, 64, H, W), each for N / K
        images in a row. places: for `swwae` alone."""
        if self.how in ("nearest", "swwae"):
            return self.decoder(upsampled(features, size, places))
        if noise is None or self.how == "zero":
            return self.decoder.spread(features, size, None)
        return self.decoder.spread(features, size, noise * self.decoder.deviation)

    def pooled(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features of images, and for `swwae` their places."""
        if self.how != "swwae":
            return self.encoder(x), None
        features, places = cells_of(self.encoder.maps(x)).max(-1)
        return features, places

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images there and back."""
        features, places = self.pooled(x)
        return self.decode(features, (x.shape[-2], x.shape[-1]), noise, places)


@cache
def shipped(name: str, how: Upsampling) -> Codec:
    """A codec that travels with the arena (`arena/assets`, made by tools/make_codec.py), frozen.

    Raises BadInput where there is none of that name.
    """
    folder = Path(__file__).parents[2] / "assets"
    if not (file := folder / f"codec-{name}.safetensors").is_file():
        known = [path.stem.removeprefix("codec-") for path in sorted(folder.glob("codec-*"))]
        raise BadInput(f"There is no encoder {name!r}; {nearest(name, known)}")
    return of_file(file, how)


def of_file(file: Path, how: Upsampling) -> Codec:
    """A codec from safetensors as `packed` makes them, frozen. Raises BadInput on other files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        kept = {key: value.float() for key, value in load_file(file).items()}
        with torch.random.fork_rng(devices=[]):  # layers draw weights, which are overwritten
            encoder = _below(kept, "encoder")
            codec = Codec(len(encoder["mean"]), how, _widths(encoder))
        codec.encoder.load_state_dict(encoder)
        codec.decoder.load_state_dict(_below(kept, how))
    except (SafetensorError, KeyError, RuntimeError, OSError) as error:
        raise BadInput(
            f"{file.name} holds no encoder with a decoder for {how!r} "
            f"({str(error).splitlines()[0]}); make one with tools/make_codec.py."
        ) from None
    return codec.eval().requires_grad_(False)


def packed(codecs: Iterable[Codec]) -> dict[str, Tensor]:
    """Codecs of one encoder as tensors for one file, in half precision."""
    kept: dict[str, Tensor] = {}
    for codec in codecs:
        kept |= {f"encoder.{name}": v for name, v in codec.encoder.state_dict().items()}
        kept |= {f"{codec.how}.{name}": v for name, v in codec.decoder.state_dict().items()}
    return {name: value.half().cpu().contiguous() for name, value in kept.items()}


def _below(kept: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.partition(".")[2]: v for k, v in kept.items() if k.partition(".")[0] == prefix}


def _widths(encoder: Mapping[str, Tensor]) -> list[list[int]]:
    """Of the convolutions of each further block, from an encoder's weights."""
    widths: list[list[int]] = []
    for name, value in sorted(encoder.items()):
        if found := re.fullmatch(r"further\.(\d+)\.\d+\.bias", name):
            if int(found[1]) == len(widths):
                widths.append([])
            widths[-1].append(len(value))
    return widths


_VGGS = ("vgg13", "vgg16", "vgg19")  # whose first block has two convolutions


def vgg_encoder(name: str) -> Encoder:
    """Three blocks of a torchvision VGG with its ImageNet weights, which are downloaded where they
    are not in torch's cache. Raises BadInput on another network and where they cannot be had.
    """
    from torchvision import models

    if name not in _VGGS:
        raise BadInput(f"torchvision:{name} has no such first block; {nearest(name, _VGGS)}")
    try:
        with redirect_stdout(sys.stderr):  # where torch tells what it downloads
            features = models.get_model(name, weights="IMAGENET1K_V1").features
    except OSError as error:
        raise BadInput(
            f"The weights of torchvision's {name} cannot be had ({error}); use the shipped encoder."
        ) from None
    blocks: list[list[nn.Conv2d]] = [[]]
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            blocks[-1].append(layer)
        elif isinstance(layer, nn.MaxPool2d):
            blocks.append([])
    further = blocks[1:_VGG_BLOCKS]
    encoder = Encoder(3, [[conv.out_channels for conv in block] for block in further])
    encoder.mean.copy_(torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
    encoder.std.copy_(torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))
    own = [[encoder.conv1, encoder.conv2], *_blocks(encoder)]
    for mine, theirs in zip(chain(*own), chain(blocks[0], *further), strict=True):
        mine.load_state_dict(theirs.state_dict())
    return encoder.requires_grad_(False)


def _blocks(encoder: Encoder) -> list[list[nn.Conv2d]]:
    """The convolutions of each further block."""
    return [
        [cast(nn.Conv2d, conv) for conv in cast(nn.ModuleList, block)] for block in encoder.further
    ]


def train_codec(
    images: Images,
    rng: Generator,
    *,
    how: Upsampling = "random",
    encoder_updates: int = 5000,
    decoder_updates: int = 3000,
    batch: int = 16,
    encoder: Encoder | None = None,
) -> Codec:
    """A codec for images like these (uint8, labelled), on their device, frozen.

    encoder: one that is there already; else it is trained as the first block of a classifier.
    """
    device, channels = images.x.device, images.x.shape[1]
    seed = draw_seed(rng)
    classes = int(images.y.max()) + 1
    with seeded_globals(stream(seed, "codec")):
        codec = Codec(channels, how).to(device)
        rest = nn.Sequential(
            nn.Conv2d(WIDTH, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(128, 256, 3, padding=1), nn.BatchNorm2d(256), nn.ReLU(),
            nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(256, classes),
        ).to(device)  # fmt: skip
    sample = training.to_float(images.x[:: max(1, len(images) // 2000)])
    codec.encoder.mean.copy_(sample.mean((0, 2, 3)).view(-1, 1, 1))
    codec.encoder.std.copy_(sample.std((0, 2, 3)).clamp_min(1 / 255).view(-1, 1, 1))
    size = (int(images.x.shape[2]), int(images.x.shape[3]))

    def noise(update: int, count: int) -> Tensor | None:
        draws = stream(seed, "noise", update)
        few = torch.randn(_DRAWS, WIDTH, *size, generator=draws).to(device)
        return few[torch.arange(count, device=device) % _DRAWS] if how == "random" else None

    if encoder is not None:
        codec.encoder = deepcopy(encoder).to(device)
    else:
        both = [*codec.parameters(), *rest.parameters()]
        least = float(sample.var())  # the error of one grey for all
        adam = torch.optim.Adam(both, lr=_RATE)
        for update, (x, y) in enumerate(_batches(images, encoder_updates, batch, seed)):
            _slow(adam, update / encoder_updates)
            if update % _MEASURE_EVERY == 0:
                codec.decoder.deviation.copy_(_left_out(codec.encoder, sample[:256]))
            with training.autocast(device):
                features, places = codec.pooled(x)
                logits = rest(features)
                back = codec.decode(features, size, noise(update, len(x)), places)
            lost = F.mse_loss(back.float(), x) / least
            loss = F.cross_entropy(logits.float(), y) + _FAITHFUL * lost
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
            report("encoder", update + 1, encoder_updates)
    codec.encoder.requires_grad_(False)
    codec.decoder.deviation.copy_(_left_out(codec.encoder, sample[:256]))
    adam = torch.optim.Adam(codec.decoder.parameters(), lr=_RATE)
    for update, (x, _) in enumerate(_batches(images, decoder_updates, batch, seed + 1)):
        _slow(adam, update / decoder_updates)
        with training.autocast(device):
            back = codec(x, noise(encoder_updates + update, len(x)))
        loss = F.mse_loss(back.float(), x)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        report("decoder", update + 1, decoder_updates)
    return codec.eval().requires_grad_(False)


def train_further(
    encoder: Encoder, images: Images, rng: Generator, *, updates: int = 2250, batch: int = 128
) -> Encoder:
    """The encoder with a second block, frozen: that of a classifier of three blocks for images like
    these (uint8, labelled), which is trained on top of the first one. On the images' device."""
    device, seed = images.x.device, draw_seed(rng)
    channels, classes = len(encoder.mean), int(images.y.max()) + 1
    with seeded_globals(stream(seed, "further")):
        whole = Encoder(channels, [_BLOCK, _TOP])
        norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (*_BLOCK, *_TOP))
        last = nn.Linear(_TOP[-1], classes)
    whole.load_state_dict(encoder.state_dict(), strict=False)
    nn.ModuleList([whole, norms, last]).to(device)
    nn.ModuleList([whole.conv1, whole.conv2]).requires_grad_(False)

    def logits(x: Tensor) -> Tensor:
        features, scales = whole(x), iter(norms)
        for block in _blocks(whole):
            for conv in block:
                features = F.relu(next(scales)(conv(features)))
            features = F.max_pool2d(features, 2, ceil_mode=True)
        answers: Tensor = last(features.amax((2, 3)))
        return answers

    learned = [p for p in [*whole.parameters(), *norms.parameters()] if p.requires_grad]
    adam = torch.optim.Adam([*learned, *last.parameters()], lr=_RATE)
    for update, (x, y) in enumerate(_batches(images, updates, batch, seed)):
        _slow(adam, update / updates)
        with training.autocast(device):
            answers = logits(x)
        loss = F.cross_entropy(answers.float(), y)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        report("second block", update + 1, updates)
    made = Encoder(channels, [_BLOCK]).to(device)
    made.load_state_dict(encoder.state_dict(), strict=False)
    for own, conv, norm in zip(_blocks(made)[0], _blocks(whole)[0], norms.eval(), strict=False):
        fused = fuse_conv_bn_eval(conv.eval(), cast(nn.BatchNorm2d, norm))
        own.load_state_dict(fused.state_dict())
    return made.eval().requires_grad_(False)


def _slow(adam: torch.optim.Adam, done: float) -> None:
    """The rate rises for a twentieth of the training, without which units die, then falls to 0."""
    for group in adam.param_groups:
        group["lr"] = _RATE * min(20 * done, 1 - done)


@torch.no_grad()
def _left_out(encoder: Encoder, x: Tensor) -> Tensor:
    """(64, 1, 1) deviation of the values that pooling drops."""
    maps = encoder.maps(x)
    whole = maps[..., : maps.shape[-2] // 2 * 2, : maps.shape[-1] // 2 * 2]  # whole cells
    dropped = cells_of(whole).sort(-1).values[..., :3]
    return dropped.std((0, 2, 3, 4), correction=0).clamp_min(1e-3).view(-1, 1, 1)


def _batches(
    images: Images, updates: int, batch: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of float images and labels, mirrored half of the time."""
    for update in range(updates):
        draws = stream(seed, "batch", update)
        rows = torch.randint(len(images), (min(batch, len(images)),), generator=draws)
        x = training.to_float(images.x[rows.to(images.x.device)])
        if torch.rand((), generator=draws) < 0.5:
            x = x.flip(3)
        yield x, images.y[rows.to(images.y.device)]
