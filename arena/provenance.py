"""Where results come from: hardware, versions and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from arena.core import training


@cache
def provenance(device: str, threads: int) -> dict[str, Any]:
    """Hardware, versions and commit of this process."""
    where = torch.device(device)
    packages = ("backdoor-arena", "torchvision", "timm", "numpy", "safetensors")
    return {
        "hardware": {
            "device": torch.cuda.get_device_name(where) if where.type == "cuda" else processor(),
            "kind": where.type,
            "bf16": training.has_bf16(where),
            "threads": threads,
            "cpus": os.cpu_count(),
        },
        "versions": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cuda": torch.version.cuda if where.type == "cuda" else None,
            **{name: _version(name) for name in packages},
            "torch": torch.__version__,  # with the build
        },
        "commit": _commit(),
    }


def processor() -> str:
    """The processor's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """The git commit of the arena's own checkout, with a '+' when files differ from it; or ''."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
