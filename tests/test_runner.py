"""The runner: what is done is kept, what is missing or damaged is done again, failures are told."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostile
import killed
import pytest
import torch
import toys

from arena import api, inverting, listing
from arena.boards import Board
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream
from arena.data import draw_clean
from arena.defenses.finetune import FineTune
from arena.identity import describe_attack, method_identity
from arena.measuring import key_of, lacking
from arena.planning import Cell, Plan, Victim, make_plan, past_seconds
from arena.referee import isolate, sandbox
from arena.report.rows import COLUMNS, MEASURED, flatten
from arena.runner import Runner, Summary
from arena.site import write_run
from arena.store import Store, digest, load_tensors
from arena.subjects import of_cell

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
    assert len(store.board_records("tiny")) == 6
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
        "weights", "clean", "method_files", "registered",
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
    expected = [("repair", c.key) for c in plan.cells] + [("measure", c.key) for c in plan.cells]
    expected += [("attack", victim), ("measure", victim)]
    named = [f"{kind} {store.scratch(key).name}" for kind, key in expected]
    assert sorted(line for log in logs for line in log) == sorted(named)
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


def test_a_repair_takes_as_long_as_it_did_with_as_many_images(
    done: tuple[Plan, Store, Summary], tmp_path: Path
) -> None:
    known, store = done[1].record(cell_of(done[0], "patch", "finetune").key), Store(tmp_path / "s")
    assert known is not None
    store.create()
    store.write_record({**known, "budget": {**known["budget"], "seconds": 1e6}})
    for share, least, most in ((TINY.clean_share, 1e6, 1e6 + 60), (0.5, 0, 60)):
        again = small(dataclasses.replace(TINY, seed=(1,), clean_share=share))
        found = Runner(again, store).estimate()[cell_of(again, "patch", "finetune").key]
        assert least <= found.seconds <= most


def test_a_key_changes_with_what_makes_the_result(plan: Plan) -> None:
    def keys(**changes: Any) -> set[str]:
        return {cell.key for cell in small(dataclasses.replace(TINY, **changes)).cells}

    same = {cell.key for cell in plan.cells}
    assert keys() == same
    assert keys(name="other", version=2, timeout=9.0, title="x") == same
    assert keys(measure=("pgd", "class_distance")) == same
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


# ------------------------------------------------------------------------------------- measures

DISTANCE = "class_distance:pairs=(0:1,2:3),samples=20,steps=40"
PGD = "pgd:images=40,steps=2"
MEASURED_TINY = dataclasses.replace(TINY, measure=(DISTANCE, PGD))


@pytest.fixture(scope="module")
def measured(
    done: tuple[Plan, Store, Summary], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Store, Summary, list[Job]]:
    """The finished run after its board has come to ask for two measures."""
    store = Store(shutil.copytree(done[1].root, tmp_path_factory.mktemp("measured") / "store"))
    plan = small(MEASURED_TINY)
    seen: list[Job] = []
    original = isolate.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolate, "run", lambda job, **o: (seen.append(job), original(job, **o))[1])
        summary = Runner(plan, store).run()
    return plan, store, summary, seen


def entry_of(store: Store, cell: Cell, name: str) -> dict[str, Any]:
    (found,) = (e for e in record_of(store, cell)["measures"].values() if e["name"] == name)
    return dict(found)


def test_without_measures_nothing_tells_of_them(done: tuple[Plan, Store, Summary]) -> None:
    plan, store, _ = done
    for record in store.board_records("tiny"):
        assert "measures" not in record
        assert tuple(flatten(record)) == COLUMNS
    assert "measure" not in store.boards()[0]["definition"]
    assert plan.measures == ()


def test_a_measure_added_later_repairs_nothing_again(
    done: tuple[Plan, Store, Summary], measured: tuple[Plan, Store, Summary, list[Job]]
) -> None:
    plan, store, summary, jobs = measured
    assert (summary.done, summary.cached, summary.failed, summary.unmeasured) == (6, 0, [], [])
    assert {job["job"] for job in jobs} == {"examine"}
    weights = {record["weights"]["after"] for record in store.records()}
    assert len(weights) == 6, "each cell has a model of its own"
    assert len(jobs) == 2 * len(weights), "victims are measured once, null defenses for nothing"
    for cell in plan.cells:
        record = record_of(store, cell)
        entries = record.pop("measures")
        assert {entry["status"] for entry in entries.values()} == {"ok"}
        assert record == record_of(done[1], cell), "a figure that was there before has moved"
    assert list((store.root / "scratch").iterdir()) == []
    assert store.boards()[0]["definition"]["measure"] == [each.spec for each in plan.measures]
    assert Runner(plan, store).estimate() == {}
    assert Runner(plan, store).run() == Summary(done=0, cached=6)


def test_the_gain_is_that_of_the_readings_by_hand(
    measured: tuple[Plan, Store, Summary, list[Job]],
) -> None:
    plan, store, _, _ = measured
    for attack in ("none", "patch"):
        for defense in KEPT:
            found = entry_of(store, cell_of(plan, attack, defense), "class_distance")
            sizes = []
            for when in ("before", "after"):
                artifact = store.artifact(found[when]["artifact"])
                assert artifact is not None
                sizes.append([size for _, _, size in artifact.meta["each"]])
            ratios = [new / old - 1 for old, new in zip(*sizes, strict=True) if old and new]
            assert ratios, "no pair has a distance: the test tells nothing"
            columns = found["columns"]
            assert columns["distance_gain"] == pytest.approx(sum(ratios) / len(ratios))
            assert columns["distance_gain"] == 0 or defense != "none"
            row = flatten(record_of(store, cell_of(plan, attack, defense)))
            assert [row[name] for name in MEASURED[:3]] == [columns[n] for n in MEASURED[:3]]
            assert row["distance_unit"] == "mask L1 (nc)"
            assert 0 <= row["robust_acc"] <= row["acc"] + 0.5
    before = {
        entry_of(store, cell_of(plan, "patch", name), "class_distance")["before"]["artifact"]
        for name in KEPT
    }
    assert len(before) == 1


def test_the_distance_is_that_of_arena_distance(
    measured: tuple[Plan, Store, Summary, list[Job]],
) -> None:
    plan, store, _, _ = measured
    cell = cell_of(plan, "patch", "finetune")
    question = inverting.Question("nc", restarts=1, samples=20, steps=40)
    found = inverting.class_distances(of_cell(store, cell.key), question, "0:1,2:3", store)
    figures = entry_of(store, cell, "class_distance")["after"]
    assert figures["distance"] == found["mean"]
    assert figures["pairs"] == 2


def test_a_new_cell_is_repaired_and_measured(
    measured: tuple[Plan, Store, Summary, list[Job]], tmp_path: Path, jobs: list[Job]
) -> None:
    plan = measured[0]
    store = Store(shutil.copytree(measured[1].root, tmp_path / "copy"))
    cell = cell_of(plan, "patch", "finetune")
    before = record_of(store, cell)["measures"]
    forget(store, cell)
    after = before[plan.measures[0].spec]["after"]["artifact"]
    shutil.rmtree(store.root / "artifacts" / after[:2] / after)
    assert Runner(plan, store).run().done == 1
    assert [job["job"] for job in jobs] == ["repair", "measure", "examine"]
    assert not {"measure", "measures", "test", "val"} & jobs[0].keys(), "the defense is told"
    again = record_of(store, cell)["measures"]
    assert {s: e["columns"] for s, e in again.items()} == {
        s: e["columns"] for s, e in before.items()
    }


def test_a_failing_measure_keeps_the_cell_and_is_tried_again(
    plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch, jobs: list[Job]
) -> None:
    plan = small(dataclasses.replace(TINY, measure=(PGD,)))
    before, cell = killed.outcome(store.root), cell_of(plan, "patch", "finetune")
    bad, spec = str(cell.key), plan.measures[0].spec
    original = isolate.run

    def run(job: Job, **options: Any) -> Job:
        if job["job"] == "examine" and bad in job["weights"]:
            raise isolate.Failed("failed", "out of memory", "a long story")
        return original(job, **options)

    with monkeypatch.context() as patch:
        patch.setattr(isolate, "run", run)
        summary = Runner(plan, store).run()
    assert (summary.done, summary.failed) == (6, [])
    assert [record["key"] for record in summary.unmeasured] == [cell.key]
    assert killed.outcome(store.root) == before, "an outcome was lost"
    assert list((store.root / "scratch").iterdir()) == [], "what it failed on is kept"
    entry = record_of(store, cell)["measures"][spec]
    assert (entry["status"], entry["details"]) == ("failed", "a long story")
    assert entry["reason"] == "of the repaired model: out of memory"
    row = flatten(record_of(store, cell))
    assert row["unmeasured"] == ["pgd: of the repaired model: out of memory"]
    assert "robust_acc" not in row
    assert "robust_acc" in flatten(record_of(store, cell_of(plan, "patch", "random_prune")))

    del jobs[:]
    summary = Runner(plan, store).run()
    assert (summary.done, summary.cached, summary.unmeasured) == (1, 5, [])
    assert [job["job"] for job in jobs] == ["examine"], "only what had failed"
    assert lacking(record_of(store, cell), plan.measures) == []


def test_a_model_that_was_lost_is_repaired_again_to_be_measured(
    store: Store, jobs: list[Job], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = small(dataclasses.replace(TINY, measure=(PGD,)))
    before = killed.outcome(store.root)
    one, two = cell_of(plan, "patch", "finetune"), cell_of(plan, "patch", "random_prune")
    other = {"name": "other", "short": "other", "spec": "other", "code": "", "status": "ok"}
    other |= {"reason": "", "columns": {}, "before": {}}
    other |= {"after": {"seconds": 1.0, "device": "cpu", "resumed": False}}
    store.write_record({**record_of(store, one), "measures": {"other": other}})
    for cell in (one, two):
        shutil.rmtree(store.root / "artifacts" / cell.key[:2] / cell.key)
    repairs = isolate.run

    def run(job: Job, **options: Any) -> Job:
        if job["job"] == "repair" and job["spec"].startswith("random_prune"):
            raise isolate.Failed("failed", "no luck")
        return repairs(job, **options)

    with monkeypatch.context() as patch:
        patch.setattr(isolate, "run", run)
        summary = Runner(plan, store).run()
    assert [job["job"] for job in jobs].count("repair") == 1
    assert killed.outcome(store.root) == before, "a final record was overwritten by a failure"
    assert lacking(record_of(store, one), plan.measures) == []
    assert record_of(store, one)["measures"]["other"] == other, "another board's figures are lost"
    assert [record["key"] for record in summary.unmeasured] == [two.key]
    assert (
        "no longer in the store"
        in summary.unmeasured[0]["measures"][plan.measures[0].spec]["reason"]
    )
    assert "could not be repaired again: no luck" in caplog.text


def test_boards_show_what_they_ask_for(
    measured: tuple[Plan, Store, Summary, list[Job]], tmp_path: Path
) -> None:
    store = Store(shutil.copytree(measured[1].root, tmp_path / "copy"))
    fewer = small(dataclasses.replace(TINY, name="fewer", measure=(PGD,)))
    Runner(fewer, store).run()
    Runner(small(dataclasses.replace(TINY, name="plain")), store).run()
    names = {
        board: {
            e["name"] for r in store.board_records(board) for e in r.get("measures", {}).values()
        }
        for board in ("tiny", "fewer", "plain")
    }
    assert names == {"tiny": {"class_distance", "pgd"}, "fewer": {"pgd"}, "plain": set()}
    assert all("measures" not in record for record in store.board_records("plain"))

    Runner(small(dataclasses.replace(TINY, name="adhoc", measure=(PGD,))), store).run()
    Runner(small(dataclasses.replace(TINY, name="adhoc")), store).run()
    assert all(record["measures"] for record in store.board_records("adhoc")), "runs add up"


def test_estimates_of_measures(
    plan: Plan, store: Store, measured: tuple[Plan, Store, Summary, list[Job]]
) -> None:
    asking = small(MEASURED_TINY)
    found = Runner(asking, store).estimate()
    assert found.keys() == {cell.key for cell in asking.cells}, "no model is trained for it"
    assert all(e.seconds > 0 and 0 < e.disk_bytes < 1e6 for e in found.values())
    more = dataclasses.replace(TINY, measure=("class_distance:pairs=all,samples=20", PGD))
    larger = Runner(small(more), store).estimate()
    assert all(larger[key].seconds > e.seconds for key, e in found.items())
    known = measured[1]
    again = dataclasses.replace(MEASURED_TINY, seed=(1,))  # other cells: as long as these took
    past = past_seconds(known)
    took = sum(seconds for name, seconds in past.items() if "/measure/" in name)
    asked, plain = (
        Runner(small(board), known).estimate()
        for board in (again, dataclasses.replace(again, measure=()))
    )
    cell = cell_of(small(again), "patch", "none").key
    assert took > 0
    assert asked[cell].seconds - plain[cell].seconds == pytest.approx(took)


def test_what_cannot_be_measured_is_refused_before_training() -> None:
    for spec, words in (
        ("class_distance:samples=101", "has 100 images, but 101 are asked for"),
        ("class_distance:pairs=(0:5)", "no class 5"),
    ):
        with pytest.raises(BadInput, match=words):
            make_plan(dataclasses.replace(TINY, measure=(spec,)))


def test_a_reading_is_kept_by_what_makes_it(
    measured: tuple[Plan, Store, Summary, list[Job]],
) -> None:
    asked, other = measured[0].measures
    same: dict[str, Any] = {"data": "d", "network": ("n", "c"), "seed": 0, "bf16": False}
    keys = [
        key_of(asked, "w", **same),
        key_of(other, "w", **same),
        key_of(asked, "v", **same),
        *(
            key_of(asked, "w", **{**same, name: value})
            for name, value in (("data", "e"), ("network", ("m", "c")), ("seed", 1), ("bf16", True))
        ),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(asked, "w", **same) == keys[0]


def test_waiting_for_a_reading_ends_with_the_run(plan: Plan, store: Store) -> None:
    told: list[str] = []
    runner = Runner(plan, store, listener=lambda event: told.append(event.get("what", "")))
    with store.lock("reading"):
        runner.stop.event.set()
        with pytest.raises(isolate.Interrupted), runner._waited("reading", "cell", "pgd"):
            pass
        runner.stop.event.clear()
        later = threading.Timer(1.2, runner.stop.event.set)
        later.start()
        with pytest.raises(isolate.Interrupted), runner._waited("reading", "cell", "pgd"):
            pass
        later.join()
    assert "waiting for the pgd of the same weights" in told
    with runner._waited("reading", "cell", "pgd"), pytest.raises(TimeoutError):
        store.lock("reading").acquire(timeout=0)


def test_of_a_board_s_versions_the_newest_stands_in_tables(tmp_path):
    """Versions share cells: with both, every shared cell would be there twice."""
    opened = Store(tmp_path / "store")
    opened.create()
    for key in ("a" * 64, "b" * 64):
        opened.write_record(toys.record(key))
    opened.write_board("demo", 1, toys.board("demo", 1, cells=["a" * 64, "b" * 64]))
    opened.write_board("demo", 2, toys.board("demo", 2, cells=["a" * 64]))
    opened.write_board("other", 1, toys.board("other", 1, cells=["a" * 64]))

    def rows(*which: Any) -> list[tuple[str, int, str]]:
        found = opened.board_records(*which)
        return [(r["board"]["name"], r["board"]["version"], r["key"][0]) for r in found]

    assert rows("demo") == [("demo", 2, "a")]
    assert rows("demo", 1) == [("demo", 1, "a"), ("demo", 1, "b")]
    assert rows() == [("demo", 2, "a"), ("other", 1, "a")]


def test_pages_carry_the_title_of_their_own_version(tmp_path, monkeypatch):
    opened = Store(tmp_path / "store")
    opened.create()
    for version in (9, 10):
        board = {"name": "demo", "version": version, "cells": [], "command": "arena run demo"}
        opened.write_board("demo", version, {**board, "definition": {"title": f"of {version}"}})
    titles = []
    monkeypatch.setattr("arena.gallery.pictures", lambda store, records: {})
    monkeypatch.setattr(
        "arena.report.page.write_leaderboard",
        lambda records, pictures, out, metrics, title, *rest: titles.append(title) or [],
    )
    monkeypatch.setattr("arena.report.rows.flatten", lambda record: {})
    for version in (9, 10):
        write_run(opened, "demo", [{"board": {"name": "demo", "version": version}}])
    assert titles == ["of 9", "of 10"]


def test_a_natural_victim_counts_the_code_of_the_family_that_finds_its_trigger():
    found = method_identity(attacks.build("natural:method=(pixel:form=tanh)"))
    assert found["wrapped"]["method"]["spec"].startswith("pixel:form=tanh")
    assert found["wrapped"]["method"]["code"]


# --------------------------------------------------------------------------------- shares of images


def test_a_defense_that_needs_all_images_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(FineTune, "needs_share", 1.0, raising=False)
    with pytest.raises(BadInput, match=r"finetune:epochs=1,\S+ trains on 100% .* to 1, not 0\.05"):
        make_plan(TINY)
    assert make_plan(dataclasses.replace(TINY, clean_share=1.0)).cells


def test_among_others_it_is_a_row_with_a_reason(store, monkeypatch):
    monkeypatch.setattr(FineTune, "needs_share", 0.5, raising=False)
    plan = make_plan(dataclasses.replace(TINY, defense=("finetune:epochs=1", "fine_pruning")))
    record = Runner(plan, store)._defend(cell_of(plan, "patch", "finetune"), "cpu", {})
    assert record["status"] == "not_applicable"
    assert "50% of the training images" in record["reason"]


def test_from_python_it_is_refused_too(monkeypatch):
    monkeypatch.setattr(FineTune, "needs_share", 1.0, raising=False)
    with pytest.raises(BadInput, match=r"to 1, not 0\.05"):
        api.repair(SimpleNamespace(recipe="fast"), "finetune")


# ------------------------------------------------------------------------------- hostile methods


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("unchanged", ""),
        ("link", "it gave back a link in place of weights.safetensors"),
        ("boasts", "its answer is not one: 'metrics' is missing or too much"),
    ],
)
def test_a_repair_that_cheats_gains_nothing(
    plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch, what: str, reason: str
) -> None:
    before = killed.outcome(store.root)
    cell = cell_of(plan, "patch", "finetune")
    forget(store, cell)
    shutil.rmtree(store.root / "artifacts" / cell.key[:2] / cell.key)
    original = isolate.run

    def run(job: Job, **options: Any) -> Job:
        work = hostile.repairs_by(what) if job["job"] == "repair" else None
        return original(job, work=work, **options)

    monkeypatch.setattr(isolate, "run", run)
    Runner(plan, store).run()
    record = record_of(store, cell)
    if reason:
        assert (record["status"], record["reason"]) == ("failed", reason)
        assert record["metrics"] == {}
    else:  # its figures are those of the null defense, its budget is the referee's
        null = record_of(store, cell_of(plan, "patch", "none"))
        assert {n: record["metrics"][n] for n in ("acc", "asr", "ra")} == {
            n: null["metrics"][n] for n in ("acc", "asr", "ra")
        }
        assert record["budget"]["seconds"] > 1e-3
        assert record["budget"]["peak_memory_mb"] > 10
    monkeypatch.undo()
    forget(store, cell)
    shutil.rmtree(store.root / "artifacts" / cell.key[:2] / cell.key, ignore_errors=True)
    Runner(plan, store).run()
    assert killed.outcome(store.root) == before, "a trace was left"


def test_a_victim_is_taken_before_its_attack_sees_the_test_images(
    plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = victim_of(plan, "patch").key
    before = store.artifact(victim).sha256("weights")
    for cell in plan.cells:
        if cell.victim.key == victim:
            forget(store, cell)
    shutil.rmtree(store.root / "artifacts" / victim[:2] / victim)
    original = isolate.run

    def run(job: Job, **options: Any) -> Job:
        work = hostile.attacks_twice if job["job"] == "attack" else None
        return original(job, work=work, **options)

    monkeypatch.setattr(isolate, "run", run)
    assert not Runner(plan, store).run().failed
    assert store.artifact(victim).sha256("weights") == before


def test_records_say_what_held_their_methods(plan: Plan, store: Store) -> None:
    for record in store.records():
        assert record["isolation"] == record["victim_made"]["isolation"] == sandbox.level()
    cell = cell_of(plan, "patch", "none")
    forget(store, cell)
    Runner(plan, store, use_sandbox=False).run()
    record = record_of(store, cell)
    assert record["isolation"] == "limits"
    assert record["isolation_note"] == "it was switched off"
    assert "isolation limits, it was switched off" in " ".join(listing.cell(record).split())


def test_a_limit_of_the_run_is_a_reason_of_the_cell(plan: Plan, store: Store) -> None:
    cell = cell_of(plan, "none", "random_prune")
    forget(store, cell)
    summary = Runner(plan, store, limits=sandbox.Limits(memory=2**20)).run()
    assert [record["reason"] for record in summary.failed] == [
        "it used more than 1.0 MiB of memory"
    ]


def test_without_namespaces_a_sandbox_cannot_be_required(
    plan: Plan, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sandbox.OFF, "1")
    with pytest.raises(BadInput, match=r"cannot be held in namespaces here \(it was switched off"):
        Runner(plan, store, require_sandbox=True)
