"""What works on this machine, what does not, and the mend. Looks only; writes nothing."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from arena.data.catalogue import CATALOGUE

PACKAGES = (
    "numpy",
    "safetensors",
    "PIL",
    "pyarrow",
    "datasets",
    "pandas",
    "tabulate",
    "jinja2",
    "typer",
    "rich",
    "filelock",
    "platformdirs",
)
TIGHT, FULL = 5e9, 5e8  # bytes of free disk below which it is said, and below which runs fail
LITTLE_MEMORY = 2e9  # bytes


class Finding(NamedTuple):
    """One line of the doctor's report."""

    state: Literal["ok", "note", "bad"]
    what: str
    found: str
    mend: str = ""  # one sentence, where there is something to mend


def examine(data_dir: Path | str | None = None, store: Path | str | None = None) -> list[Finding]:
    """All findings; `bad` means that something the arena needs does not work."""
    return [
        _python(),
        *_torch(),
        _packages(),
        *_processor(),
        _gpu(),
        _memory(),
        _isolation(),
        _data(data_dir),
        *_disk(store),
    ]


# ---------------------------------------------------------------------------------------- software


def _python() -> Finding:
    # pip refuses older versions, so there is nothing to judge
    return Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")


def _torch() -> list[Finding]:
    versions = {name: _imported(name) for name in ("torch", "torchvision", "timm")}
    broken = {name: what for name, what in versions.items() if isinstance(what, Exception)}
    findings = [
        Finding(
            "bad",
            name,
            f"cannot be imported: {_first_line(error)}",
            f"Install a pair of torch and torchvision that fit (`pip install -U {name}`).",
        )
        for name, error in broken.items()
    ]
    sound = {name: str(what) for name, what in versions.items() if name not in broken}
    if sound:
        text = ", ".join(f"{name} {version}" for name, version in sound.items())
        mend = _mismatch(sound["torch"]) if "torch" in sound else ""
        findings.append(Finding("note" if mend else "ok", "torch", text, mend))
    return findings


def _imported(module: str) -> str | Exception:
    try:
        return str(getattr(importlib.import_module(module), "__version__", ""))
    except Exception as error:  # a broken binary raises anything
        return error


def _mismatch(torch: str) -> str:
    """The mend where torchvision was made for another torch than this; else ''."""
    with suppress(importlib.metadata.PackageNotFoundError):
        for need in importlib.metadata.requires("torchvision") or ():
            name, _, wanted = need.partition(";")[0].replace(" ", "").partition("==")
            if name == "torch" and wanted and wanted.partition("+")[0] != torch.partition("+")[0]:
                return f"This torchvision was made for torch {wanted}; install that pair."
    return ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _packages() -> Finding:
    lacking = {name: e for name in PACKAGES if isinstance(e := _imported(name), Exception)}
    if not lacking:
        return Finding("ok", "packages", f"all {len(PACKAGES)} can be imported")
    found = "; ".join(f"{name}: {_first_line(error)}" for name, error in lacking.items())
    return Finding("bad", "packages", found, "Run `pip install -U backdoor-arena` again.")


# ---------------------------------------------------------------------------------------- hardware


def _processor() -> list[Finding]:
    import torch

    from arena.core.training import has_bf16
    from arena.provenance import processor

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads, load = torch.get_num_threads(), _load()
    found = f"{processor()}; {cores} cores, {threads} torch threads, load {load:.1f}"
    mend = ""
    if load > 0.5 * (cores or 1):
        mend = "Other processes use the cores, so expect longer times than estimated."
    elif threads < (cores or 1) // 2:
        mend = "torch uses fewer threads than there are cores; unset OMP_NUM_THREADS."
    flags = _cpu_flags()
    units = {"AVX2": "avx2", "AVX512": "avx512f", "AVX512-bf16": "avx512_bf16", "AMX": "amx_bf16"}
    have = [name for name, flag in units.items() if flag in flags]
    bf16 = has_bf16(torch.device("cpu"))
    text = f"{', '.join(have) or 'no AVX2'}; training on the CPU uses {'bf16' if bf16 else 'fp32'}"
    slow = "" if bf16 else "A CPU with AVX512-bf16 or AMX, or a GPU, trains several times faster."
    return [
        Finding("note" if mend else "ok", "processor", found, mend),
        Finding("note" if slow else "ok", "bf16", text, slow),
    ]


def _load() -> float:
    """Processes that ran or waited in the last minute, on average; 0 where nobody counts."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _cpu_flags() -> set[str]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def _gpu() -> Finding:
    import torch

    from arena.core.training import has_bf16

    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            kind = "bf16" if has_bf16(torch.device("cuda", index)) else "fp32"
            name = torch.cuda.get_device_name(index)
            found.append(f"cuda:{index} {name}, {_gb(free)} of {_gb(total)} free, {kind}")
        return Finding("ok", "gpu", "; ".join(found))
    if torch.version.cuda is None:
        return Finding(
            "note",
            "gpu",
            "none: this torch was built without CUDA",
            "With an NVIDIA GPU, install torch for CUDA from pytorch.org; else nothing is amiss.",
        )
    return Finding(
        "note",
        "gpu",
        f"none that torch (CUDA {torch.version.cuda}) can use",
        "With an NVIDIA GPU, install its driver and see that `nvidia-smi` lists it.",
    )


def _memory() -> Finding:
    sizes: dict[str, float] = {}
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            sizes[name] = 1024 * float(rest.split()[0])
    if "MemTotal" not in sizes:
        return Finding("note", "memory", "unknown", "Watch it yourself: this system does not say.")
    free = sizes.get("MemAvailable", sizes.get("MemFree", 0.0))
    found = f"{_gb(free)} of {_gb(sizes['MemTotal'])} available"
    if free < LITTLE_MEMORY:
        return Finding("note", "memory", found, "Close other programs or choose a smaller model.")
    return Finding("ok", "memory", found)


def _isolation() -> Finding:
    import torch

    from arena.referee import isolate, sandbox

    start = isolate.context().get_start_method()
    if start != "forkserver":
        return Finding(
            "note",
            "isolation",
            f"a process per method, started by {start}",
            "Methods start more slowly without a fork server; Linux and macOS have one.",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if sandbox.level(device) == sandbox.NAMESPACES:
        return Finding("ok", "isolation", "namespaces: no network, no files but a method's own")
    return Finding(
        "note",
        "isolation",
        f"limits alone: no namespaces ({sandbox.why_not(device)})",
        f"Do not set {sandbox.OFF}."
        if sandbox.why_not(device) == sandbox.SWITCHED_OFF
        else "For methods of strangers, use a Linux that lets its users make namespaces.",
    )


# ------------------------------------------------------------------------------------ data and disk


def _data(data_dir: Path | str | None) -> Finding:
    given = data_dir or os.environ.get("ARENA_DATA_DIR")
    if not given:
        return Finding(
            "note",
            "data",
            "no data directory: data sets come from the Hugging Face hub",
            "To work offline, give --data-dir or set ARENA_DATA_DIR; `signs` needs neither.",
        )
    folder = Path(given).expanduser()
    if not folder.is_dir():
        mend = "Name a folder with one folder per data set, such as DIR/cifar10/train-*.parquet."
        return Finding("bad", "data", f"{folder} is not a folder", mend)
    there = [name for name in CATALOGUE if _holds_images(folder / name)]
    if there:
        return Finding("ok", "data", f"{folder}: {', '.join(there)}")
    return Finding(
        "note",
        "data",
        f"{folder} holds no data set that the arena knows",
        "Put the Parquet files of a data set into a folder of its name, such as cifar10/.",
    )


def _holds_images(folder: Path) -> bool:
    """Whether Parquet files or class folders are in it."""
    return folder.is_dir() and any(
        path.is_dir() or path.suffix == ".parquet" for path in folder.iterdir()
    )


def _disk(store: Path | str | None) -> list[Finding]:
    cache = _cache_folder()
    size = sum(_size(path) for path in cache.rglob("*")) if cache.is_dir() else 0
    return [
        _room("cache", cache, f"{_gb(size)} used", "set ARENA_CACHE_DIR to another folder"),
        _room("store", Path(store or "runs").expanduser(), "", "name another folder with --store"),
    ]


def _cache_folder() -> Path:
    """As arena.data.cache.directory says, which would make it."""
    if given := os.environ.get("ARENA_CACHE_DIR"):
        return Path(given).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("backdoor-arena")


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size if path.is_file() else 0
    return 0


def _room(what: str, folder: Path, used: str, otherwise: str) -> Finding:
    standing = folder.absolute()
    while not standing.exists():
        standing = standing.parent
    if not standing.is_dir() or not os.access(standing, os.W_OK | os.X_OK):
        return Finding("bad", what, f"{folder} cannot be written", f"{_upper(otherwise)}.")
    free = shutil.disk_usage(standing).free
    found = ", ".join(part for part in (str(folder), used, f"{_gb(free)} free") if part)
    if free < TIGHT:
        mend = f"Make room or {otherwise}."
        return Finding("bad" if free < FULL else "note", what, found, mend)
    return Finding("ok", what, found)


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _gb(size: Any) -> str:
    return f"{float(size) / 1e9:.1f} GB"
