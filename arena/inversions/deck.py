"""DECK: the features of an image are changed region by region and decoded back to an image.

A normalisation gives all images one mean and deviation per channel, both learned; an encoder's
features are cut into regions, each with a convolution of its own, learned too; a decoder makes an
image of them. What is generated stays like the original by four losses.

Source: DECK (Model hardening against pervasive backdoors), section IV-B, equations 1, 2 and 7 to
    11; 300 passes; size: mean squared error between the features of original and generated images.
Departs: searches compare sizes by the content loss's features, distances are told by deeper ones
    (`perceived`): the paper names no layer, and ours of the first pooling see little but colour.
    Regions (2 x 2) and kernels (3 px) are not published; nor are the learning rate and the
    losses' first weight, which are those with the smallest triggers on a clean network; nor the
    scale of pixels: losses are those of images in 0 to 255, for which the published weights bring
    the terms to one size. The SSIM loss is 1 - SSIM: as printed it would be maximised. The noise of
    the decoder's upsampling is drawn once per trigger, so that a trigger is a pure map. Start:
    identity kernels and the images' own statistics, with a little noise; kernels are kept as what
    they add to the identity, which bf16 would round away beside a one. Found in bf16 where the
    hardware has it; sizes and success are those in float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, cast
from weakref import ref

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from arena.core import training
from arena.core.inversion.codec import WIDTH, Codec, Upsampling, of_file, shipped
from arena.core.inversion.engine import Family, Search, State
from arena.core.metrics import similarity
from arena.core.registry import BadInput, method, param

_NOISE = 1e-3  # of the start; at ten times as much a clean fastnet is right on half of the images


@method
class Deck(Family):
    unit: ClassVar[str] = "feature MSE"
    sized_by_images: ClassVar[bool] = True

    encoder: str = param(
        "cifar10", "whose features: cifar10 is shipped, trained on CIFAR-10", choices=("cifar10",)
    )
    file: str | None = param(
        None, "file of another encoder with its decoders, see tools/make_codec.py", path=True
    )
    decoder: str = param(
        "random",
        "what upsampling fills cells with: noise, zeros or the value itself; swwae: back to "
        "where the maximum was",
        choices=("random", "zero", "nearest", "swwae"),
        source="random: DECK; the others: its ablation",
    )
    regions: int = param(2, "regions along a side, each with its own convolution", low=1, high=8)
    kernel: int = param(3, "side of the regions' kernels in px of the feature map", low=1, high=9)
    content: float = param(
        0.001, "weight of the features' squared error", low=0, source="DECK; 0: its ablation"
    )
    ssim: float = param(
        100.0, "weight of what structural similarity lacks of 1", low=0, source="DECK"
    )
    smooth: float = param(
        0.05, "weight of the squared distance to the 3 x 3 average", low=0, source="DECK"
    )
    norm: float = param(
        1.0, "weight of what mean and deviation are off the images'", low=0, source="DECK"
    )

    @property
    def usual(self) -> Search:
        return Search(steps=300, cost=1.0, lr=3e-4)

    @cached_property
    def codec(self) -> Codec:
        if self.file is not None:
            return of_file(Path(self.file).expanduser(), _how(self.decoder))
        return shipped(self.encoder, _how(self.decoder))

    def check(self, shape: tuple[int, int, int]) -> None:
        if (wanted := len(self.codec.encoder.mean)) != shape[0]:
            raise BadInput(
                f"deck's encoder takes images of {wanted} channels, these have {shape[0]}; train "
                "one on images like these with tools/make_codec.py, and name its file."
            )

    @property
    def seen_by(self) -> str:
        features = f"pooling {1 + len(self.codec.encoder.further)}"
        if self.file is None:
            return f"{self.encoder}, {features}"
        file = Path(self.file).expanduser()
        return f"{file.stem} (sha256 {sha256(file.read_bytes()).hexdigest()[:12]}), {features}"

    @cached_property
    def _penalised(self) -> dict[str, tuple[ref[Tensor], ref[Tensor], Tensor]]:
        """The last images that `penalty` saw, and the error of their features."""
        return {}

    def begin(self, x: Tensor, rng: Generator) -> State:
        channels, height, width = x.shape[1:]
        kernels = (self.regions**2, WIDTH, WIDTH, self.kernel, self.kernel)
        mean, deviation = x.mean((2, 3)).mean(0), x.std((2, 3), correction=0).mean(0)
        off = torch.randn(2, channels, generator=rng) * _NOISE
        return {
            "kernels": torch.randn(kernels, generator=rng) * _NOISE,
            "mean": mean + off[0],
            "deviation": deviation + off[1],
            "_mean": mean,
            "_deviation": deviation,
            "_noise": torch.randn(WIDTH, height, width, generator=rng),
        }

    def stamp(self, at: State, x: Tensor) -> Tensor:
        codec = self.codec.to(x.device)
        front, size = x.shape[:2], (x.shape[-2], x.shape[-1])
        deviation, mean = torch.std_mean(x, (-2, -1), keepdim=True, correction=0)
        new_mean, new_deviation = (at[k][:, None, :, None, None] for k in ("mean", "deviation"))
        levelled = (x - mean) / deviation.clamp_min(1 / 255) * new_deviation + new_mean
        with _fast(x.device):
            features, places = codec.pooled(levelled.flatten(0, 1))
            more = self._regional(at["kernels"], features.unflatten(0, front))
            changed = features + more.flatten(0, 1)
            decoded = codec.decode(changed, size, at["_noise"], places)
        return decoded.float().view_as(x).clamp(0, 1)

    def _regional(self, kernels: Tensor, features: Tensor) -> Tensor:
        """(K, B, 64, h, w) -> the same, every region convolved with its own kernel, zero-padded."""
        count, batch, width, tall, wide = features.shape
        side = self.regions
        rows, columns = -(-tall // side), -(-wide // side)  # the last regions may be padded
        padded = F.pad(features, (0, columns * side - wide, 0, rows * side - tall))
        split = padded.view(count, batch, width, side, rows, side, columns)
        groups = split.permute(1, 0, 3, 5, 2, 4, 6).reshape(batch, -1, rows, columns)
        out = F.conv2d(groups, kernels.flatten(0, 2), padding="same", groups=count * side * side)
        split = out.view(batch, count, side, side, width, rows, columns)
        whole = split.permute(1, 0, 4, 2, 5, 3, 6).reshape(count, batch, width, rows * side, -1)
        return whole[..., :tall, :wide]

    def penalty(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        if self.content:
            with _fast(x.device):
                content = self._content(x, stamped)
            self._penalised["images"] = ref(x), ref(stamped), content.detach()
            total = total + self.content * content
        if self.ssim:
            likeness = similarity(x.flatten(0, 1), stamped.flatten(0, 1)).view(x.shape[:2])
            total = total + self.ssim * (1 - likeness.mean(1))
        if self.smooth:
            flat = stamped.flatten(0, 1)
            near = F.avg_pool2d(flat, 3, 1, 1, count_include_pad=False)
            rough = (255 * (flat - near)).square().flatten(1).mean(1)
            total = total + self.smooth * rough.view(x.shape[:2]).mean(1)
        if self.norm:
            off = [(at[k] - at[f"_{k}"]).abs().mean(1) for k in ("mean", "deviation")]
            total = total + self.norm * 255 * (off[0] + off[1])
        return total

    def size(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        last = self._penalised.get("images")
        if last is not None and last[0]() is x and last[1]() is stamped:
            return last[2]  # of a pass, to be held against other passes': nothing is encoded twice
        return self._content(x, stamped)

    def perceived(self, x: Tensor, stamped: Tensor) -> Tensor:
        """() mean squared error of the encoder's last features; x, stamped: (N, C, H, W)."""
        encoder = self.codec.to(x.device).encoder
        return F.mse_loss(encoder.perceived(x), encoder.perceived(stamped))

    def _content(self, x: Tensor, stamped: Tensor) -> Tensor:
        """(K,) mean squared error of features, of images in 0 to 255."""
        encoder = self.codec.to(x.device).encoder
        one, two = (255 * encoder(part.flatten(0, 1)).float() for part in (x, stamped))
        return (one - two).square().flatten(1).mean(1).view(x.shape[:2]).mean(1)


def _fast(device: torch.device) -> AbstractContextManager[Any]:
    """Low precision while gradients are wanted, none where a trigger is tried."""
    return training.autocast(device) if torch.is_grad_enabled() else nullcontext()


def _how(decoder: str) -> Upsampling:
    return cast(Upsampling, decoder)
