"""Images per second of `fit` against a plain PyTorch loop, same network, same run.

    python benchmarks/fit.py [--networks resnet20 resnet18] [--images 2048] [--repeats 3]
        [--keep-memory]

The plain loop is what most code of the field does: a DataLoader with two workers, torchvision's
transforms on one PIL image after the other (random crop, flip, to tensor, normalise), float32,
SGD, default memory layout. One untimed batch goes ahead on both sides, and start-up of the workers
is not timed. Ours and theirs alternate, and a ratio is the median over the pairs.
Aims on a two-core CPU with bf16: 2.5x on resnet20, 3.2x on resnet18.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from arena.core import models, progress
from arena.core.contracts import Images
from arena.core.seeding import stream
from arena.core.training import Recipe, fit, has_bf16
from arena.referee.isolate import keep_freed_memory

AIMS = {"resnet20": 2.5, "resnet18": 3.2}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Pictures(Dataset):
    """PIL images, transformed one by one when asked for."""

    def __init__(self, data: Images) -> None:
        self.x, self.y = data.x.permute(0, 2, 3, 1).contiguous().numpy(), data.y
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, 4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.x[row])), int(self.y[row])


def plain(body: nn.Module, data: Images, batch: int, device: torch.device) -> float:
    """Images per second of the plain loop over one epoch."""
    loader = DataLoader(
        Pictures(data),
        batch,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        pin_memory=device.type == "cuda",
    )
    optimizer = torch.optim.SGD(body.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    body.train()
    start = 0.0
    for step, (x, y) in enumerate(loader):
        loss = F.cross_entropy(body(x.to(device)), y.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if step == 0:
            start = time.perf_counter()
    return (len(loader) - 1) * batch / (time.perf_counter() - start)


def ours(model: nn.Module, data: Images, batch: int, device: torch.device) -> float:
    """Images per second of `fit` over one epoch."""
    marks: list[float] = []

    def mark(what: str, done: float, total: float, figures: dict[str, float]) -> None:
        if done == 1 or figures:  # after the first update, and when the epoch's loss has arrived
            marks.append(time.perf_counter())

    with progress.listening(mark):
        fit(model, data, Recipe(epochs=1, batch=batch, lr=0.01), stream(0))
    return (len(data) // batch - 1) * batch / (marks[-1] - marks[0])


def cifar(images: int) -> tuple[Images, str]:
    """The first CIFAR-10 training images where they are at hand, else noise."""
    root = Path(os.environ.get("ARENA_DATA_DIR") or Path(__file__).parents[2] / "shared/data")
    files = sorted((root / "cifar10").glob("train-*.parquet"))
    if not files:
        x = torch.randint(256, (images, 3, 32, 32), generator=stream(0), dtype=torch.uint8)
        return Images(x, torch.randint(10, (images,), generator=stream(1))), "random images"
    rows: list[dict[str, Any]] = []
    for file in files:
        rows += parquet.read_table(file).slice(0, images - len(rows)).to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["img"]["bytes"]))) for row in rows])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Images(x, torch.tensor([row["label"] for row in rows])), "CIFAR-10"


def compare(name: str, data: Images, batch: int, repeats: int, device: torch.device) -> str:
    """One line: both rates and the median of the ratios of neighbouring runs."""

    def model() -> models.Classifier:
        return models.build(name, 10, (3, 32, 32), stream(0)).to(device)

    pairs = []
    for repeat in range(repeats):
        runs: dict[str, Callable[[], float]] = {
            "plain": lambda: plain(model().body, data, batch, device),
            "ours": lambda: ours(model(), data, batch, device),
        }
        order = list(runs) if repeat % 2 == 0 else list(runs)[::-1]
        rates = {side: runs[side]() for side in order}
        pairs.append((rates["plain"], rates["ours"]))
    ratios = [mine / theirs for theirs, mine in pairs]
    theirs, mine = (statistics.median(side) for side in zip(*pairs, strict=True))
    aim = f", aim {AIMS[name]:g}x" if name in AIMS else ""
    return (
        f"{name}: plain {theirs:.1f} images/s, ours {mine:.1f} images/s, "
        f"ratio {statistics.median(ratios):.2f}x (of {len(ratios)}: "
        f"{min(ratios):.2f} to {max(ratios):.2f}{aim})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet18"])
    parser.add_argument("--images", type=int, default=2048, help="images of an epoch")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="let glibc keep freed buffers, on both sides, as the arena's workers do",
    )
    options = parser.parse_args()
    if options.images < 2 * options.batch:
        parser.error("--images must be at least twice --batch: the first batch is not timed")
    if options.keep_memory:
        keep_freed_memory()
    device = torch.device(options.device)
    data, what = cifar(options.images)
    print(
        f"{what}, {len(data)} images, batch {options.batch}, {device}, torch {torch.__version__}; "
        f"load average {os.getloadavg()[0]:.2f}, {torch.get_num_threads()} threads, "
        f"bf16 {'yes' if has_bf16(device) else 'no'}, "
        f"freed memory {'kept' if options.keep_memory else 'as glibc likes'}",
        flush=True,
    )
    for name in options.networks:
        print(compare(name, data, options.batch, options.repeats, device), flush=True)
    print(f"load average at the end {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    main()
