"""The runner: what is done is kept, what is missing or damaged is done again, failures are told."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import killed
import pytest
import torch

from arena import api
from arena.boards import Board
from arena.core.registry import attacks
from arena.core.seeding import stream
from arena.data import draw_clean
from arena.referee import isolate
from arena.runner import (
    Cell,
    Plan,
    Runner,
    Summary,
    Victim,
    board_records,
    describe_attack,
    make_plan,
)
from arena.store import Store, digest, load_tensors

TINY = Board(
    name="tiny",
    dataset=("signs:size=200,classes=5",),
    model=("cnn",),
    attack=("patch",),
    defense=("finetune:epochs=1",),
    recipe="smoke",
)
KEPT = ("none", "random_prune", "finetune")  # retraining takes longer than all the rest
Job = dict[str, Any]


def small(board: Board = TINY) -> Plan:
    """The board's plan without `retrain`."""
    plan = make_plan(board)
    cells = tuple(cell for cell in plan.cells if cell.defense.method_name in KEPT)
    return dataclasses.replace(plan, cells=cells)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Plan, Store, Summary]]:
    """A finished run: two victims, six cells."""
    folder = tmp_path_factory.mktemp("runner")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARENA_CACHE_DIR", str(folder / "cache"))
        plan, store = small(), Store(folder / "store")
        summary = Runner(plan, store, command="arena run tiny").run()
        yield plan, store, summary


@pytest.fixture
def plan(done: tuple[Plan, Store, Summary]) -> Plan:
    return done[0]


@pytest.fixture
def store(done: tuple[Plan, Store, Summary], tmp_path: Path) -> Store:
    """A copy of the finished store, to be spoilt."""
    return Store(shutil.copytree(done[1].root, tmp_path / "copy"))


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that workers are given from now on."""
    seen: list[Job] = []
    original = isolate.run

    def run(job: Job, **options: Any) -> Job:
        clean = {"clean images": load_tensors(Path(job["clean"]))} if "clean" in job else {}
        seen.append({**job, **clean})
        return original(job, **options)

    monkeypatch.setattr(isolate, "run", run)
    return seen


def cell_of(plan: Plan, attack: str, defense: str) -> Cell:
    (found,) = (
        cell
        for cell in plan.cells
        if (cell.victim.attack.method_name, cell.defense.method_name) == (attack, defense)
    )
    return found


def victim_of(plan: Plan, attack: str) -> Victim:
    return cell_of(plan, attack, "none").victim


def record_of(store: Store, cell: Cell) -> dict[str, Any]:
    record = store.record(cell.key)
    assert record is not None
    return record


def forget(store: Store, cell: Cell) -> None:
    (store.root / "records" / f"{cell.key}.json").unlink()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_run_leaves_complete_records(done: tuple[Plan, Store, Summary]) -> None:
    plan, store, summary = done
    assert (summary.done, summary.cached, summary.failed) == (6, 0, [])
    for cell in plan.cells:
        record = record_of(store, cell)
        assert record["status"] in ("ok", "not_established", "collapsed")
        assert record["command"] == "arena run tiny"
        assert record["board"] == {"name": "tiny", "version": 1}
        assert record["seed"] == 0
        assert record["dataset"]["fingerprint"] == plan.cells[0].victim.setting.dataset.fingerprint
        assert record["parents"]["victim"] == cell.victim.key
        assert record["versions"]["torch"] == torch.__version__
        assert {"hardware", "commit", "started", "finished", "budget", "plan"} <= record.keys()
        assert record["counts"]["test"] == 1000
        assert 0 <= record["metrics"]["acc"] <= 1
        victim, repaired = store.artifact(cell.victim.key), store.artifact(cell.key)
        assert victim is not None
        assert repaired is not None
        assert record["weights"]["before"] == victim.sha256("weights")
        assert record["weights"]["after"] == repaired.sha256("weights")
    assert [board["cells"] for board in store.boards()] == [[cell.key for cell in plan.cells]]
    assert len(board_records(store, "tiny")) == 6
    assert list((store.root / "scratch").iterdir()) == []
    assert list((store.root / "damaged").iterdir()) == []


def test_the_null_defense_moves_no_figure(done: tuple[Plan, Store, Summary]) -> None:
    plan, store, _ = done
    for attack in ("none", "patch"):
        record = record_of(store, cell_of(plan, attack, "none"))
        found = record["metrics"]
        assert all(found[n] == found[f"{n}_before"] for n in ("acc", "asr", "ra"))
        assert (found["asr"] is None) == (attack == "none")
    assert record["weights"]["before"] == record["weights"]["after"]


def test_a_second_run_does_nothing(plan: Plan, store: Store, jobs: list[Job]) -> None:
    summary = Runner(plan, store).run()
    assert (summary.done, summary.cached, jobs) == (0, 6, [])


def test_a_missing_record_is_made_again_alone(
    plan: Plan, store: Store, jobs: list[Job], caplog: pytest.LogCaptureFixture
) -> None:
    cell = cell_of(plan, "patch", "finetune")
    before = killed.outcome(store.root)
    forget(store, cell)
    assert Runner(plan, store).run().done == 1
    assert [job["job"] for job in jobs] == ["repair", "measure"]
    assert killed.outcome(store.root) == before
    assert caplog.text == ""
    assert list((store.root / "damaged").iterdir()) == []


def test_a_defense_is_given_clean_images_only(plan: Plan, store: Store, jobs: list[Job]) -> None:
    cell = cell_of(plan, "patch", "random_prune")
    recorded = record_of(store, cell)["clean_rows"]
    forget(store, cell)
    Runner(plan, store).run()
    given = jobs[0]
    assert set(given) - {"clean images"} == {
        "job", "folder", "device", "threads", "seed", "model", "classes", "shape", "spec",
        "weights", "clean",
    }  # fmt: skip
    artifact = store.artifact(cell.victim.key)
    assert artifact is not None
    poisoned = artifact.tensors("poisoned")["rows"]
    assert len(poisoned) > 0
    train = cell.victim.setting.dataset.train
    rows = draw_clean(train.y, TINY.clean_share, stream(0, "clean"), exclude=poisoned)
    assert digest(rows.tolist()) == recorded
    assert not torch.isin(rows, poisoned).any()
    assert torch.equal(given["clean images"]["x"], train.x[rows])
    assert torch.equal(given["clean images"]["y"], train.y[rows])


def test_a_damaged_victim_is_trained_again_to_the_same_weights(
    plan: Plan, store: Store, jobs: list[Job], caplog: pytest.LogCaptureFixture
) -> None:
    cell = cell_of(plan, "patch", "none")
    before = killed.outcome(store.root)
    artifact = store.artifact(cell.victim.key)
    assert artifact is not None
    flip(artifact.path("weights"))
    forget(store, cell)
    Runner(plan, store).run()
    assert [job["job"] for job in jobs] == ["attack", "measure", "repair", "measure"]
    assert "set aside" in caplog.text
    assert len(list((store.root / "damaged").iterdir())) == 1
    assert killed.outcome(store.root) == before


def test_a_failing_method_is_recorded_and_the_rest_goes_on(
    plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = killed.outcome(store.root)
    slow, other = cell_of(plan, "none", "finetune"), cell_of(plan, "patch", "random_prune")
    forget(store, slow)
    forget(store, other)
    original = isolate.run

    def run(job: Job, **options: Any) -> Job:
        if job.get("spec", "").startswith("finetune"):
            options["timeout"] = 0.01
        return original(job, **options)

    monkeypatch.setattr(isolate, "run", run)
    summary = Runner(plan, store).run()
    assert summary.done == 2
    assert [record["key"] for record in summary.failed] == [slow.key]
    failed = record_of(store, slow)
    assert failed["status"] == "timeout"
    assert failed["reason"] == "it did not end within 0.01 seconds"
    assert failed["metrics"] == {}
    assert record_of(store, other)["status"] in ("ok", "not_established", "collapsed")

    monkeypatch.undo()  # a failure is tried again
    assert not Runner(plan, store).run().failed
    assert killed.outcome(store.root) == before


def share(store: Path, log: Path) -> None:
    """One of two runners: run the plan and write down each job."""
    original: Callable[..., Job] = isolate.run

    def run(job: Job, **options: Any) -> Job:
        with log.open("a") as stream:
            stream.write(f"{job['job']} {Path(job['folder']).parent.name}\n")
        return original(job, **options)

    isolate.run = run  # type: ignore[assignment]
    Runner(small(), Store(store)).run()


def test_two_runners_share_a_store(plan: Plan, store: Store, tmp_path: Path) -> None:
    before = killed.outcome(store.root)
    for cell in plan.cells:
        forget(store, cell)
        shutil.rmtree(store.root / "artifacts" / cell.key[:2] / cell.key)
    victim = victim_of(plan, "patch").key
    shutil.rmtree(store.root / "artifacts" / victim[:2] / victim)
    tests = Path(__file__).parent
    program = (
        "import sys; from pathlib import Path; import test_runner; "
        "test_runner.share(*map(Path, sys.argv[1:]))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(store.root), str(tmp_path / f"log{number}")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        )
        for number in range(2)
    ]
    assert [process.wait() for process in both] == [0, 0]
    logs = [p.read_text().splitlines() for p in sorted(tmp_path.glob("log*"))]
    expected = [f"{kind} {c.key}" for c in plan.cells for kind in ("repair", "measure")]
    expected += [f"attack {victim}", f"measure {victim}"]
    assert sorted(line for log in logs for line in log) == sorted(expected)
    assert killed.outcome(store.root) == before
    assert list((store.root / "damaged").iterdir()) == []


def test_python_trains_the_same_victim(plan: Plan, done: tuple[Plan, Store, Summary]) -> None:
    victim = victim_of(plan, "patch")
    made = api.train(victim.setting.dataset, "cnn", "patch", recipe="smoke", seed=0, device="cpu")
    artifact = done[1].artifact(victim.key)
    assert artifact is not None
    weights, found = artifact.tensors("weights"), made.model.state_dict()
    assert weights.keys() == found.keys()
    assert all(torch.equal(weights[name], found[name]) for name in weights)
    assert api.evaluate(made)["acc"] == artifact.meta["measured"]["metrics"]["acc"]


def test_estimates_cover_all_that_is_to_do_and_write_nothing(plan: Plan, tmp_path: Path) -> None:
    store = Store(tmp_path / "new")
    found = Runner(plan, store).estimate()
    assert found.keys() == {v.key for v in plan.victims} | {c.key for c in plan.cells}
    assert all(e.seconds > 0 and e.disk_bytes > 0 for e in found.values())
    assert not store.root.exists()


def test_a_key_changes_with_what_makes_the_result(plan: Plan) -> None:
    def keys(**changes: Any) -> set[str]:
        return {cell.key for cell in small(dataclasses.replace(TINY, **changes)).cells}

    same = {cell.key for cell in plan.cells}
    assert keys() == same
    assert keys(name="other", version=2, timeout=9.0, title="x") == same
    for change in ({"seed": (1,)}, {"clean_share": 0.1}, {"recipe": "fast"}):
        assert not keys(**change) & same
    assert len(keys(attack=("patch:size=6",)) & same) == 3  # those of the clean twin
    assert len(keys(defense=("finetune:epochs=2",)) & same) == 4  # the null defenses


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    lines: list[str] = []
    assert killed.compare(killed.parsed([]), tmp_path, lines.append) == []
    assert sum(line.startswith("kill ") for line in lines) == 10


# -------------------------------------------------------- what else is kept and said about a victim


def test_the_trigger_is_kept_with_its_victim(plan: Plan, store: Store) -> None:
    artifact = store.artifact(victim_of(plan, "patch").key)
    assert artifact is not None
    kept = artifact.tensors("trigger")
    assert set(kept) == {"stamp.picture", "stamp.mask"}
    assert kept["stamp.picture"].shape == (3, 3, 3)
    assert artifact.meta["result"]["parts"] == {}, "a patch has no trained parts"


def test_records_say_how_far_stamped_images_are_from_the_target(plan: Plan, store: Store) -> None:
    found = record_of(store, cell_of(plan, "patch", "none"))["mmd"]
    assert set(found) == {"shallow", "middle", "deep"}
    assert all(set(row) == {"stamped", "intra", "inter"} for row in found.values())
    assert record_of(store, cell_of(plan, "none", "none"))["mmd"] == {}


@pytest.mark.parametrize(
    ("spec", "labels"),
    [
        ("patch", "changed"),
        ("sig", "kept"),
        ("none", "kept"),
        ("reflection", "kept"),
        ("reflection:label=dirty", "changed"),
        ("sdrm:base=sig", "kept"),
        ("sdrm:base=blend", "changed"),
    ],
)
def test_records_say_whether_this_attack_keeps_labels(spec: str, labels: str) -> None:
    assert describe_attack(attacks.build(spec))["labels"] == labels
