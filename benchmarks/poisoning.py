"""Poisoning 50,000 images of 32x32 px: whole batches beside the per-image way of public toolboxes.

The per-image way is theirs: each image goes from PIL to NumPy, through the trigger, is clipped to
8 bits and becomes a PIL image again. Patch, blend and sig are NumPy there, with patterns made once;
wanet is PyTorch, one image at a time. The photo filters run the arena's own functions on one image
at a time: public code calls ImageMagick for them. Both ways make the same bytes (but for one level
in one of 10,000 values, where float32 and float64 round apart), which is checked before the clock.
The per-image way is timed on a part of the images and scaled to all of them.

    python benchmarks/poisoning.py [IMAGES] [--only NAME]... [--per-image IMAGES]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from machine import Timing, describe, median_timing
from PIL import Image
from torch.nn import functional as F

from arena.core.contracts import Images, Trigger
from arena.core.poisoning import stamp
from arena.core.registry import attacks
from arena.core.seeding import stream

SIDE = 32
AIM_RATIO, AIM_SECONDS = 5.0, 1.0
SPECS = {  # a name for the table -> the attack
    "patch": "patch",
    "blend": "blend",
    "sig": "sig",
    "wanet": "wanet",
    "gotham": "filter:kind=gotham",
    "nashville": "filter:kind=nashville",
    "kelvin": "filter:kind=kelvin",
    "lomo": "filter:kind=lomo",
    "toaster": "filter:kind=toaster",
}

Array = np.ndarray
Stamp = Callable[[Array], Array]  # (H, W, C) in [0, 255] -> the same


def per_image(pictures: list[Image.Image], trigger: Stamp) -> list[Image.Image]:
    return [
        Image.fromarray(np.clip(np.rint(trigger(np.array(picture))), 0, 255).astype(np.uint8))
        for picture in pictures
    ]


def patch_stamp(attack: Any, trigger: Trigger) -> Stamp:
    grid = trigger.stamp(torch.zeros(1, 3, SIDE, SIDE))[0]
    picture, mask = canvas(grid), np.zeros((SIDE, SIDE, 3))
    mask[-3:, -3:] = 1
    return lambda image: image * (1 - mask) + picture * mask


def blend_stamp(attack: Any, trigger: Trigger) -> Stamp:
    pattern = canvas(tensor_of(trigger, "pattern"))
    return lambda image: (1 - attack.alpha) * image + attack.alpha * pattern


def sig_stamp(attack: Any, trigger: Trigger) -> Stamp:
    columns = np.arange(SIDE)[None, :, None]
    wave = attack.delta * np.sin(2 * np.pi * attack.frequency * columns / SIDE)
    return lambda image: image + wave


def wanet_stamp(attack: Any, trigger: Trigger) -> Stamp:
    noise = tensor_of(trigger, "noise_grid")
    across = torch.linspace(-1, 1, SIDE)
    identity = torch.stack(torch.meshgrid(across, across, indexing="xy"), -1)
    grid = (identity + attack.s * noise / SIDE).clamp(-1, 1)[None]

    def warp(x: torch.Tensor) -> torch.Tensor:
        return F.grid_sample(x, grid, align_corners=True)

    return single(warp)


def filter_stamp(attack: Any, trigger: Trigger) -> Stamp:
    return single(trigger.stamp)


def single(image_map: Callable[[torch.Tensor], torch.Tensor]) -> Stamp:
    """A map of PyTorch batches as one of single NumPy images."""

    def apply(image: Array) -> Array:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float().div(255)
        return canvas(image_map(x)[0])

    return apply


def canvas(chw: torch.Tensor) -> Array:
    return chw.permute(1, 2, 0).numpy() * 255


def tensor_of(trigger: Trigger, name: str) -> torch.Tensor:
    found = getattr(trigger.stamp, name)
    assert isinstance(found, torch.Tensor)
    return found


BY_HAND: Mapping[str, Callable[[Any, Trigger], Stamp]] = {
    "patch": patch_stamp,
    "blend": blend_stamp,
    "sig": sig_stamp,
    "wanet": wanet_stamp,
    "filter": filter_stamp,
}


def same(ours: Array, theirs: Array) -> bool:
    """Whether two pictures agree, but for one level in at most one of 10,000 values."""
    off = np.abs(ours.astype(int) - theirs)
    return bool(off.max() <= 1 and (off > 0).mean() < 1e-4)


def main(count: int, names: list[str], part: int) -> None:
    rng = stream(0, "benchmark")
    x = torch.randint(256, (count, 3, SIDE, SIDE), generator=rng, dtype=torch.uint8)
    train = Images(x, torch.arange(count) % 10)
    pictures = [Image.fromarray(image) for image in x[:part].permute(0, 2, 3, 1).numpy()]
    scale = count / len(pictures)

    print(describe())
    print(
        f"{count:,} images of {SIDE}x{SIDE}x3, median of 3 runs; per image timed on "
        f"{len(pictures):,}, scaled to all\n"
    )
    heads = ("trigger", "batch s", "(cpu)", "per image s", "(cpu)", "ratio", "(cpu)")
    print("{:9} {:>8} {:>8} {:>12} {:>8} {:>6} {:>6}".format(*heads))
    for name in names:
        attack = attacks.build(SPECS[name])
        trigger = attack.prepare(train, stream(0, "trigger"))
        by_hand = BY_HAND[attack.method_name](attack, trigger)
        ours = stamp(x[:1000], trigger.stamp).permute(0, 2, 3, 1).numpy()
        theirs = np.stack([np.array(p) for p in per_image(pictures[:1000], by_hand)])
        if not same(ours[: len(theirs)], theirs):
            raise SystemExit(f"{name}: the two ways make different images")
        batch = median_timing(partial(stamp, x, trigger.stamp))
        timed = median_timing(partial(per_image, pictures, by_hand))
        slow = Timing(timed.wall * scale, timed.cpu * scale)
        ratio = Timing(slow.wall / batch.wall, slow.cpu / batch.cpu)
        print(
            f"{name:9} {batch.wall:8.3f} {batch.cpu:8.3f} {slow.wall:12.3f} {slow.cpu:8.3f} "
            f"{ratio.wall:6.1f} {ratio.cpu:6.1f}  "
            f"{'met' if ratio.wall >= AIM_RATIO and batch.wall < AIM_SECONDS else 'missed'}"
        )
    print(f"aims: at least {AIM_RATIO:g} times as fast, and under {AIM_SECONDS:g} s")
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"load average at the end: {load}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Time whole batches beside single images.")
    parser.add_argument("count", type=int, nargs="?", default=50_000, help="images to stamp")
    parser.add_argument("--only", action="append", choices=SPECS, help="a trigger; may be repeated")
    parser.add_argument("--per-image", type=int, default=5000, help="images timed one at a time")
    options = parser.parse_args()
    main(options.count, options.only or list(SPECS), options.per_image)
