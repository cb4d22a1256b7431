"""Kill a run again and again, let it finish, and compare it with a run that was left alone.

    python tests/killed.py --kills 10 --dataset signs:size=2000,classes=5

Only the runner's process is killed (`kill -9`), as the kernel would; its workers must notice. The
moments are drawn from a seeded stream, such that as many kills fall all over one matrix; where it
ends earlier, the kills that are left hit another one. Ends with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Say = Callable[[str], None]


def command(store: Path, options: argparse.Namespace) -> list[str]:
    words = [sys.executable, "-m", "arena.cli", "run", "-d", options.dataset, "-m", options.model]
    words += ["-a", "patch", "-D", "finetune", "-s", "0", "--recipe", options.recipe]
    return [*words, "--device", "cpu", "--store", str(store)]


def start(store: Path, options: argparse.Namespace, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("ab") as stream:
        return subprocess.Popen(
            command(store, options), stdout=stream, stderr=stream, env=environment
        )


def finish(store: Path, options: argparse.Namespace, log: Path) -> float:
    """Run to the end; the seconds it took."""
    started = time.monotonic()
    if code := start(store, options, log).wait():
        raise RuntimeError(f"the run ended with code {code}:\n{log.read_text()[-4000:]}")
    return time.monotonic() - started


def outcome(root: Path) -> dict[str, dict[str, Any]]:
    """By cell, all that must not depend on when a run was stopped."""
    from arena.store import Store

    kept = ("status", "reason", "metrics", "counts", "flags", "weights", "clean_rows", "parents")
    return {
        f"{record['attack']['short']} / {record['defense']['short']} / {record['key']}": {
            name: record.get(name) for name in kept
        }
        for record in Store(root).records()
    }


def compare(options: argparse.Namespace, folder: Path, say: Say) -> list[str]:
    """Run undisturbed and with kills; what differs, one sentence each."""
    calm, log = folder / "calm", folder / "log"
    whole = finish(calm, options, log)
    idle = finish(calm, options, log)  # nothing is left to do: what starting costs
    say(f"undisturbed: {whole:.1f} s, of which starting {idle:.1f} s")
    rng = random.Random(options.seed)
    longest = idle + options.stretch * (whole - idle) / options.kills
    kills, matrix, found = 0, 0, []
    while kills < options.kills:
        matrix += 1
        store = folder / f"killed-{matrix}"
        kills = kill(store, options, log, rng, (0.3 * idle, longest), kills, say)
        say(f"the last run took {finish(store, options, log):.1f} s: {progress(store)}")
        found += differences(outcome(calm), outcome(store))
        found += [f"{path.name} was damaged" for path in sorted((store / "damaged").glob("*"))]
    return found


def kill(
    store: Path,
    options: argparse.Namespace,
    log: Path,
    rng: random.Random,
    stretch: tuple[float, float],
    kills: int,
    say: Say,
) -> int:
    """Start and kill until the matrix is done or there were kills enough; their number by then."""
    while kills < options.kills:
        moment = rng.uniform(*stretch)
        process = start(store, options, log)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            say(f"kill {kills} after {moment:.1f} s: {progress(store)}")
        else:
            say(f"the matrix ended before kill {kills + 1}")
            break
    return kills


def progress(store: Path) -> str:
    artifacts = len(list((store / "artifacts").glob("??/*")))
    checkpoints = len(list((store / "scratch").glob("*/checkpoints/training-*.pt")))
    records = len(list((store / "records").glob("*.json")))
    return f"{records} records, {artifacts} artifacts, {checkpoints} checkpoints"


def differences(one: dict[str, dict[str, Any]], two: dict[str, dict[str, Any]]) -> list[str]:
    if not one:
        return ["the undisturbed run has no records"]
    return [
        f"{cell}: {name} is {one.get(cell, {}).get(name)} and {two.get(cell, {}).get(name)}"
        for cell in sorted(one.keys() | two.keys())
        for name in sorted(one.get(cell, {}).keys() | two.get(cell, {}).keys())
        if one.get(cell, {}).get(name) != two.get(cell, {}).get(name)
    ]


def parsed(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--stretch", type=float, default=2.0, help="the longest run, in shares of the work per kill"
    )
    parser.add_argument("--dataset", default="signs:size=2000,classes=5")
    parser.add_argument("--model", default="fastnet_small")
    parser.add_argument("--recipe", default="smoke")
    return parser.parse_args(words)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = compare(parsed(), Path(folder), lambda line: print(line, flush=True))
    print("\n".join(found) or "equal: statuses, metrics, flags and weights of every cell")
    return 1 if found else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
