"""How long the embedded signs take, beside drawing comparable scenes one by one with PIL.

    python benchmarks/signs.py [--count 20000] [--pil 400]

Both run in the same process, the PIL loop between two runs of ours; its time is scaled up from a
few hundred images. PIL draws twice as large and reduces, which is its way to anti-aliased edges.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter
from PIL.Image import Resampling, Transform

from arena.data.signs import generate

SIDE = 32


def draw_with_pil(rng: random.Random) -> np.ndarray:
    """One scene: textured background, post, sign with rim and symbol, tilt, light, blur, noise."""
    big = 2 * SIDE

    def colour(low: int, high: int) -> tuple[int, int, int]:
        return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)

    image = Image.new("RGB", (big, big), colour(40, 220))
    for cells in (2, 4, 8, 16):
        texture = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (cells, cells, 3))
        octave = Image.fromarray(texture.astype(np.uint8)).resize((big, big), Resampling.BILINEAR)
        image = Image.blend(image, octave, 0.25)
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, rng.randint(24, 56), big, big), fill=colour(40, 160))
    pen.rectangle((big // 2 - 2, big // 2, big // 2 + 1, big), fill=colour(80, 160))

    sign = Image.new("RGBA", (big, big))
    pen = ImageDraw.Draw(sign)
    for radius, fill in ((26, "white"), (22, "firebrick")):
        turns = [math.pi / 8 + k * math.pi / 4 for k in range(8)]
        corners = [(32 + radius * math.cos(t), 32 + radius * math.sin(t)) for t in turns]
        pen.polygon(corners, fill=fill)
    pen.line((20, 32, 44, 32), fill="white", width=6)
    scale, angle = rng.uniform(1.0, 1.8), rng.uniform(-0.25, 0.25)
    cos, sin, shear = scale * math.cos(angle), scale * math.sin(angle), rng.uniform(-0.1, 0.1)
    dx, dy = rng.uniform(20, 44), rng.uniform(20, 44)
    warp = (
        cos,
        sin + shear,
        32 - cos * dx - (sin + shear) * dy,
        -sin,
        cos,
        32 + sin * dx - cos * dy,
    )
    sign = sign.transform((big, big), Transform.AFFINE, warp, Resampling.BILINEAR)
    image.paste(sign, (0, 0), sign)

    image = image.resize((SIDE, SIDE), Resampling.BOX)
    image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.55, 1.3))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.6, 1.25))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    noise = np.random.default_rng(rng.getrandbits(32)).uniform(-5, 5, (SIDE, SIDE, 3))
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the embedded signs.")
    parser.add_argument("--count", type=int, default=20_000, help="images to generate")
    parser.add_argument("--pil", type=int, default=400, help="images to draw with PIL")
    options = parser.parse_args()
    rng = random.Random(0)

    def pil() -> list[np.ndarray]:
        return [draw_with_pil(rng) for _ in range(options.pil)]

    load = os.getloadavg()
    generate("warm-up", 256)
    first = seconds(lambda: generate("train", options.count))
    drawn = seconds(pil) * options.count / options.pil
    second = seconds(lambda: generate("train", options.count))
    ours = min(first, second)
    print(f"threads {torch.get_num_threads()} of {os.cpu_count()} CPUs, torch {torch.__version__}")
    print(f"load average before {load[0]:.2f}, after {os.getloadavg()[0]:.2f}")
    print(f"signs  {options.count} images of {SIDE} px: {first:.2f} s and {second:.2f} s")
    print(f"PIL    {options.count} images of {SIDE} px: {drawn:.2f} s (from {options.pil} images)")
    print(f"PIL / signs: {drawn / ours:.2f}")


if __name__ == "__main__":
    main()
