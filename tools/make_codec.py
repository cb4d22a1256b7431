"""Train the encoder and the decoders that DECK's triggers are made with: an asset of the arena.

    python tools/make_codec.py DATASET NAME [--encoder torchvision:vgg16] [--data-dir DIR]

One encoder of two blocks, and a decoder from the first for each way to upsample, stored in half
precision. The mean squared error of images that the training did not see stands beside each.
--keep leaves what the asset has but the second block, which is trained anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from arena import data as datasets
from arena.core import training
from arena.core.inversion.codec import (
    WIDTH,
    Codec,
    Upsampling,
    of_file,
    packed,
    train_codec,
    train_further,
    vgg_encoder,
)
from arena.core.progress import listening
from arena.core.seeding import stream

KINDS: tuple[Upsampling, ...] = ("random", "zero", "nearest", "swwae")


def main(options: argparse.Namespace) -> None:
    data = datasets.load(options.dataset, data_dir=options.data_dir)
    place = Path(__file__).parents[1] / "arena" / "assets" / f"codec-{options.name}.safetensors"
    codecs = []
    encoder = None
    if options.encoder is not None:
        encoder = vgg_encoder(options.encoder.removeprefix("torchvision:"))
    for kind in KINDS:
        if options.keep:
            codecs.append(of_file(place, kind))
            continue
        with listening(_tell):
            codec = train_codec(
                data.train, stream(0, "codec", kind),
                how=kind, encoder=encoder,
                encoder_updates=options.updates, decoder_updates=options.updates * 3 // 5,
            )  # fmt: skip
        encoder = codec.encoder
        print(
            f"{kind}: mean squared error {error(codec, data.val.x[:500]):.5f} in [0, 1]",
            flush=True,
        )
        codecs.append(codec)
    if options.encoder is None:
        with listening(_tell):
            whole = train_further(codecs[0].encoder, data.train, stream(0, "codec", "further"))
        for codec in codecs:
            codec.encoder = whole
    save_file(packed(codecs), place)
    print(f"written: {place} ({place.stat().st_size / 1e6:.2f} MB)")


@torch.no_grad()
def error(codec: Codec, x: torch.Tensor) -> float:
    """Of images there and back, clipped as they would be shown."""
    shown = training.to_float(x)
    noise = torch.randn(1, WIDTH, *x.shape[2:], generator=stream(0, "noise"))
    back = codec(shown, noise if codec.how == "random" else None).clamp(0, 1)
    return float((back - shown).square().mean())


def _tell(what: str, done: float, total: float, figures: dict[str, float]) -> None:
    if done % 200 == 0 or done == total:
        print(f"{what}: {done:.0f} of {total:.0f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the codec of DECK's triggers.")
    parser.add_argument("dataset")
    parser.add_argument("name")
    parser.add_argument("--encoder", help="torchvision:vgg16, say; else it is trained here")
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--updates", type=int, default=5000, help="of the encoder")
    parser.add_argument("--keep", action="store_true", help="train the second block alone")
    main(parser.parse_args())
