"""Poisoning 50,000 images of 32x32 px: whole batches beside the per-image way of public toolboxes.

The per-image way is theirs: each image goes from PIL to NumPy, through the trigger, is clipped to
8 bits and becomes a PIL image again. Both make the same bytes; that is checked before the clock.

    python benchmarks/poisoning.py [IMAGES]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from machine import Timing, describe, median_timing
from PIL import Image

from arena.core.contracts import Images
from arena.core.poisoning import stamp
from arena.core.registry import attacks
from arena.core.seeding import stream

SIDE = 32
AIM_RATIO, AIM_SECONDS = 5.0, 1.0

Array = np.ndarray
Stamp = Callable[[Array], Array]  # (H, W, C) in [0, 255] -> the same


def per_image(pictures: list[Image.Image], trigger: Stamp) -> list[Image.Image]:
    return [
        Image.fromarray(np.clip(np.rint(trigger(np.array(picture))), 0, 255).astype(np.uint8))
        for picture in pictures
    ]


def patch_stamp(picture: Array, mask: Array) -> Stamp:
    return lambda image: image * (1 - mask) + picture * mask


def blend_stamp(pattern: Array, alpha: float) -> Stamp:
    return lambda image: (1 - alpha) * image + alpha * pattern


def canvas(chw: torch.Tensor) -> Array:
    return chw.permute(1, 2, 0).numpy() * 255


def main(count: int) -> None:
    rng = stream(0, "benchmark")
    x = torch.randint(256, (count, 3, SIDE, SIDE), generator=rng, dtype=torch.uint8)
    train = Images(x, torch.arange(count) % 10)
    pictures = [Image.fromarray(image) for image in x.permute(0, 2, 3, 1).numpy()]

    patch, blend = attacks.build("patch"), attacks.build("blend")
    triggers = {a.method_name: a.prepare(train, stream(0, "trigger")) for a in (patch, blend)}
    grid = triggers["patch"].stamp(torch.zeros(1, 3, SIDE, SIDE))[0]
    mask = torch.zeros(3, SIDE, SIDE)
    mask[:, -3:, -3:] = 1
    by_hand = {
        "patch": patch_stamp(canvas(grid), canvas(mask) / 255),
        "blend": blend_stamp(canvas(triggers["blend"].stamp.pattern), blend.alpha),
    }

    print(describe())
    print(f"{count:,} images of {SIDE}x{SIDE}x3, median of 3 runs\n")
    heads = ("trigger", "batch s", "(cpu)", "per image s", "(cpu)", "ratio", "(cpu)")
    print("{:8} {:>8} {:>8} {:>12} {:>8} {:>6} {:>6}".format(*heads))
    for name, trigger in triggers.items():
        ours = stamp(x[:1000], trigger.stamp).permute(0, 2, 3, 1).numpy()
        theirs = np.stack([np.array(p) for p in per_image(pictures[:1000], by_hand[name])])
        if not np.array_equal(ours, theirs):
            raise SystemExit(f"{name}: the two ways make different images")
        batch = median_timing(partial(stamp, x, trigger.stamp))
        single = median_timing(partial(per_image, pictures, by_hand[name]))
        ratio = Timing(single.wall / batch.wall, single.cpu / batch.cpu)
        print(
            f"{name:8} {batch.wall:8.3f} {batch.cpu:8.3f} {single.wall:12.3f} {single.cpu:8.3f} "
            f"{ratio.wall:6.1f} {ratio.cpu:6.1f}  "
            f"{'met' if ratio.wall >= AIM_RATIO and batch.wall < AIM_SECONDS else 'missed'}"
        )
    print(f"aims: at least {AIM_RATIO:g} times as fast, and under {AIM_SECONDS:g} s")
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"load average at the end: {load}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
