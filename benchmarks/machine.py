"""The machine beside every timing: what it is, and what else it was doing."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")


def describe() -> str:
    """Processor, its vector units, threads, load average and versions, in three lines."""
    model, flags = _processor()
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    lines = [
        f"{model} ({' '.join(flag for flag in FLAGS if flag in flags) or 'no vector flags known'})",
        f"{os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads, load average {load}",
        f"Python {platform.python_version()}, torch {torch.__version__}",
    ]
    if torch.cuda.is_available():
        lines.append(torch.cuda.get_device_name())
    return "\n".join(lines)


def _processor() -> tuple[str, set[str]]:
    """The processor's name and its flags, where /proc/cpuinfo tells them."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    pairs = (line.partition(":") for line in text.splitlines())
    entries = {key.strip(): value.strip() for key, _, value in pairs}
    return entries.get("model name", platform.machine()), set(entries.get("flags", "").split())


class Timing(NamedTuple):
    wall: float  # s
    cpu: float  # s, summed over threads: what tells on a machine that is busy with other work


def median_timing(work: Callable[[], object], repeats: int = 3) -> Timing:
    """Wall-clock and processor time of `work`, each the median of `repeats` runs."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return Timing(statistics.median(walls), statistics.median(cpus))
