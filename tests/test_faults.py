"""What happens to a store while it is used: kills, a full disk, company, damage, clocks, removal.

After each of them the same command goes on, and the table equals that of an undisturbed run.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import killed
import pytest
from test_cli import arena
from test_runner import cell_of, small, victim_of

from arena import runner
from arena.core.registry import BadInput
from arena.planning import Plan
from arena.runner import Runner
from arena.store import DiskFull, Store

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
WORK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_runner import small
from arena.runner import Runner
from arena.store import Store
plan = small()
print("ready", flush=True)
Runner(plan, Store(Path(sys.argv[1])), command="arena run tiny").run()
"""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Plan, Path, float]]:
    """An undisturbed run: its plan, its store, and how long it took."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARENA_CACHE_DIR", str(folder / "cache"))
        plan, began = small(), time.monotonic()
        Runner(plan, Store(folder / "store"), command="arena run tiny").run()
        yield plan, folder / "store", time.monotonic() - began


@pytest.fixture
def store(calm: tuple[Plan, Path, float], tmp_path: Path) -> Store:
    """A copy of the finished store, to be spoilt."""
    return Store(shutil.copytree(calm[1], tmp_path / "store"))


def assert_equal(calm: tuple[Plan, Path, float], root: Path, lost: int = 0) -> None:
    """As the undisturbed run left it, after going on; `lost` things were damaged on the way."""
    summary = Runner(calm[0], Store(root), command="arena run tiny").run()
    assert summary.failed == []
    assert killed.differences(killed.outcome(calm[1]), killed.outcome(root)) == []
    assert len(list((root / "damaged").iterdir())) == lost
    assert list((root / "artifacts").glob(".new-*")) == []


def started(root: Path) -> subprocess.Popen[str]:
    """A runner in a session of its own, when it begins to work."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORK, str(root), str(TESTS)],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as told:  # it says nothing more
        assert told.readline() == "ready\n"
    return process


def kill_tree(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)  # the fork server and the workers are in it
        except (ProcessLookupError, PermissionError):
            return
        time.sleep(0.05)
    raise AssertionError("a process outlived the kill of its group")


@pytest.mark.parametrize("kills", [2, 50], ids=["two", "fifty"])
def test_the_whole_tree_killed(calm: tuple[Plan, Path, float], tmp_path: Path, kills: int) -> None:
    rng, done, matrix = random.Random(kills), 0, 0
    while done < kills:
        matrix += 1
        root = tmp_path / f"store{matrix}"
        while done < kills:
            process = started(root)
            try:
                process.wait(rng.uniform(0, calm[2]))  # less, and none passes its longest step
                break  # it had ended: the next kill hits another matrix
            except subprocess.TimeoutExpired:
                kill_tree(process)
                done += 1
        assert_equal(calm, root)


# ---------------------------------------------------------------------------------------- the disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small disk, or mounts it again with other options."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        again = ["-o", f"remount,{options}"] if os.path.ismount(place) else ["-o", options]
        words = ["mount", "-t", "tmpfs", *again, "tmpfs", str(place)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        return place

    if shutil.which("mount") is None:
        pytest.skip("no disk can be mounted here: there is no mount")
    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


@pytest.mark.parametrize("room", ["600k", "3m", "5m", "8m"])
def test_the_disk_fills_up(
    calm: tuple[Plan, Path, float],
    disk: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    room: str,
) -> None:
    root = disk(f"size={room}") / "store"
    with monkeypatch.context() as patch:
        patch.setattr(Store, "free_bytes", lambda self: 1 << 40)  # it looked empty at first
        with suppress(DiskFull):  # where no record can be written, the run ends and says so
            summary = Runner(calm[0], Store(root), command="arena run tiny").run()
            assert summary.failed
            assert all(record["reason"] for record in summary.failed)
    left = Store(root)
    assert all(left.artifact(path.name) for path in (root / "artifacts").glob("??/*"))
    assert len(left.records()) == len(list((root / "records").glob("*.json")))
    disk("size=64m")
    assert_equal(calm, root)


def test_a_store_that_may_only_be_read(
    calm: tuple[Plan, Path, float], disk: Callable[[str], Path]
) -> None:
    root = disk("size=64m") / "store"
    shutil.copytree(calm[1], root)
    disk("ro")
    cell = calm[0].cells[-1].key[:12]
    assert arena("results", "--store", root, "--format", "json").code == 0
    for words in (("show", cell), ("leaderboard", "build")):
        answer = arena(*words, "--store", root)
        assert answer.code == 2
        assert "Read-only file system" in answer.err
        assert answer.err.count("\n") == 1
    for changed in (False, True):
        with pytest.raises(BadInput, match="cannot be written"):
            Runner(calm[0], Store(root if not changed else root / "new")).run()


def test_the_store_is_removed_in_the_middle(calm: tuple[Plan, Path, float], tmp_path: Path) -> None:
    root, finished = tmp_path / "store", []

    def remove(event: dict[str, Any]) -> None:
        if event["type"] == "finished":
            finished.append(event["name"])
            if len(finished) == 4:
                shutil.rmtree(root)

    with suppress(BadInput):
        Runner(calm[0], Store(root), listener=remove).run()
    assert len(finished) >= 4
    assert_equal(calm, root)


# ----------------------------------------------------------------------------- company and damage


def test_two_runners_and_a_reader(calm: tuple[Plan, Path, float], tmp_path: Path) -> None:
    root = tmp_path / "store"
    runners = [started(root) for _ in range(2)]
    reads = 0
    while any(process.poll() is None for process in runners):
        if not (root / "store.json").exists():
            continue
        for words in (("results", "--format", "json"), ("leaderboard", "build")):
            answer = arena(*words, "--store", root, *(["--out", tmp_path / "o"] * (len(words) < 3)))
            assert answer.code in (0, 2)
            assert "damaged" not in answer.err
            reads += answer.code == 0
    assert [process.returncode for process in runners] == [0, 0]
    assert reads
    assert_equal(calm, root)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "emptied": lambda path: path.write_bytes(b""),
    "changed": lambda path: path.write_bytes(path.read_bytes()[:-3] + b"\x00}\n"),
}


@pytest.mark.parametrize("how", ["cut", "emptied", "changed"])
def test_damage_between_runs(calm: tuple[Plan, Path, float], store: Store, how: str) -> None:
    cell = cell_of(calm[0], "patch", "finetune")
    victim = victim_of(calm[0], "patch")
    DAMAGE[how](store.root / "records" / f"{cell.key}.json")
    lost = [store.root / "artifacts" / key[:2] / key for key in (cell.key, victim.key)]
    DAMAGE[how](lost[0] / "weights.safetensors")
    DAMAGE[how](lost[1] / "meta.json")
    assert_equal(calm, store.root, lost=3)


def test_a_clock_that_jumps_back(
    calm: tuple[Plan, Path, float], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files from the future, and records that are finished before they are started."""
    for path in store.root.rglob("*"):
        os.utime(path, (2**31, 2**31))
    years = iter(range(2024, 1900, -1))
    monkeypatch.setattr(runner, "_now", lambda: f"{next(years)}-01-01T00:00:00+00:00")
    cell = cell_of(calm[0], "patch", "finetune")
    (store.root / "records" / f"{cell.key}.json").unlink()
    assert_equal(calm, store.root)
    record = store.record(cell.key)
    assert record is not None
    assert record["finished"] < record["started"]
    assert arena("leaderboard", "build", "--store", store.root).code == 0
