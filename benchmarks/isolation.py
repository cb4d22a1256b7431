"""What holding a method costs: a job that does nothing, with namespaces, with limits, and bare.

    python benchmarks/isolation.py [--repeats 20] [--jobs 2]

All three take turns in one process with one warm fork server. Bare is a process of the fork server
and nothing else: no keeper, no sandbox, no watching. A cell has two jobs: the method's and the
referee's measuring. What a job does itself is no part of these times.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from machine import describe

from arena.referee import isolate, sandbox
from arena.referee.isolate import Line


def nothing(job: Mapping[str, Any], line: Line) -> dict[str, Any]:
    return {}


def idle() -> None:
    pass


def bare() -> None:
    process = isolate.context().Process(target=idle, daemon=True)
    process.start()
    process.join()


def held(level: str, folder: Path) -> Callable[[], None]:
    (folder / "job").mkdir(exist_ok=True)
    inputs = {name: str(folder / name) for name in ("weights", "clean")}
    for file in inputs.values():
        Path(file).touch()
    job = {"folder": str(folder / "job"), **inputs}

    def once() -> None:
        isolate.run(job, logfile=folder / "log", work=nothing, level=level)

    return once


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="of a cell")
    options = parser.parse_args()
    levels = [sandbox.LIMITS]
    if sandbox.level() == sandbox.NAMESPACES:
        levels.append(sandbox.NAMESPACES)
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        ways = {"bare": bare} | {level: held(level, Path(folder)) for level in levels}
        for way in ways.values():  # starts the fork server, fills caches
            way()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.repeats):
            for name, way in ways.items():
                started = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - started)
    print(f"\n{'':<12}{'s per job (median)':>20}{'(worst)':>10}{'s per cell':>12}")
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"{name:<12}{middle:>20.3f}{max(found):>10.3f}{options.jobs * middle:>12.3f}")


if __name__ == "__main__":
    main()
