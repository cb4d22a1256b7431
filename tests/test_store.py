"""The store: atomic, checked, shared, and nothing is ever silently lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import toys

from arena.core.registry import BadInput
from arena.store import DiskFull, Store, digest, load_tensors, save_tensors, write_atomically

KEY = "ab" + "0" * 62
PARTS = {
    "weights": {"w": torch.arange(6.0).reshape(2, 3), "steps": torch.tensor(7)},
    "poisoned": {"x": torch.arange(12, dtype=torch.uint8).reshape(3, 4)},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    made.create()
    return made


@pytest.fixture
def saved(store: Store) -> Path:
    """The folder of one artifact."""
    return store.save(KEY, PARTS, {"kind": "victim"}).folder


def files_in(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def aside(store: Store) -> list[Path]:
    return sorted((store.root / "damaged").iterdir())


# ------------------------------------------------------------------------------------ round trips


def test_an_artifact_comes_back_as_it_was_saved(store: Store, saved: Path) -> None:
    assert store.has(KEY)
    artifact = store.artifact(KEY)
    assert artifact is not None
    assert artifact.meta["kind"] == "victim"
    for part, tensors in PARTS.items():
        found = artifact.tensors(part)
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
    assert len(artifact.sha256("weights")) == 64
    assert store.artifact("cd" + "0" * 62) is None
    assert aside(store) == []


def test_a_tensor_that_is_a_view_is_saved_whole(tmp_path: Path) -> None:
    value = torch.arange(6.0).reshape(2, 3).T
    save_tensors(tmp_path / "new" / "x.safetensors", {"x": value})
    assert torch.equal(load_tensors(tmp_path / "new" / "x.safetensors")["x"], value)


def test_records_and_boards_come_back(store: Store) -> None:
    for key in ("b" * 64, "a" * 64):
        store.write_record(toys.record(key, metrics={"acc": 0.5, "asr": None}))
    assert store.record("a" * 64) == toys.record("a" * 64, metrics={"acc": 0.5, "asr": None})
    assert [r["key"][0] for r in store.records()] == ["a", "b"]
    assert store.record("c" * 64) is None
    store.write_board("demo", 2, toys.board("demo", 2, cells=["a" * 64]))
    assert store.boards() == [toys.board("demo", 2, cells=["a" * 64])]


def test_the_digest_ignores_the_order_of_keys_only() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    with pytest.raises(ValueError, match="JSON compliant"):
        digest(float("nan"))


def test_opening_creates_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert store.records() == []
    assert store.boards() == []
    assert store.artifact(KEY) is None
    assert store.free_bytes() > 0
    assert not store.root.exists()


# ----------------------------------------------------------------------------------- writing


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("culprit", ["replace", "rename"])
def test_a_full_disk_leaves_nothing_of_an_artifact(
    store: Store, monkeypatch: pytest.MonkeyPatch, culprit: str
) -> None:
    before = files_in(store.root)
    monkeypatch.setattr(Path, culprit, full)
    with pytest.raises(DiskFull, match=r"the disk that holds .* is full"):
        store.save(KEY, PARTS, {})
    monkeypatch.undo()
    assert files_in(store.root) == before
    assert list((store.root / "artifacts").glob(".*")) == []
    assert not store.has(KEY)


def test_a_full_disk_inside_safetensors_is_told_as_such(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors
    import safetensors.torch

    def refuse(*_: object) -> None:
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.torch, "save_file", refuse)
    before = files_in(store.root)
    with pytest.raises(DiskFull):
        store.save(KEY, PARTS, {})
    with pytest.raises(DiskFull):
        save_tensors(store.root / "scratch" / "w.safetensors", PARTS["weights"])
    assert files_in(store.root) == before


def test_a_failing_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, "old")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(DiskFull):
        write_atomically(path, "new")
    monkeypatch.setattr(os, "fsync", lambda _: full())
    with pytest.raises(DiskFull):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert files_in(tmp_path) == ["x.json"]


def test_other_errors_are_not_called_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "replace", denied)
    with pytest.raises(PermissionError):
        write_atomically(tmp_path / "x.json", "new")
    assert files_in(tmp_path) == []


def test_what_a_kill_left_of_an_artifact_goes_with_the_next_one(store: Store) -> None:
    store.create()
    left = store.root / "artifacts" / f".new-{KEY}"
    left.mkdir()
    (left / ".tmp").write_bytes(b"half of the weights")
    artifact = store.save(KEY, PARTS, {})
    assert {path.name for path in artifact.folder.iterdir()} == {
        *artifact.meta["files"],
        "meta.json",
    }
    assert not left.exists()


def test_saving_the_same_again_keeps_the_first(
    store: Store, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = (saved / "meta.json").stat().st_ino
    store.save(KEY, PARTS, {"kind": "victim"})
    assert (saved / "meta.json").stat().st_ino == before
    assert aside(store) == []
    assert caplog.text == ""


def test_saving_other_values_sets_the_first_aside(
    store: Store, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.save(KEY, {"weights": {"w": torch.zeros(2)}}, {})
    artifact = store.artifact(KEY)
    assert artifact is not None
    assert torch.equal(artifact.tensors("weights")["w"], torch.zeros(2))
    assert [p.name[:64] for p in aside(store)] == [KEY]
    assert "other values were computed now" in caplog.text


# ------------------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE = {
    "a flipped byte": lambda f: flip(f / "weights.safetensors"),
    "a truncated file": lambda f: os.truncate(f / "poisoned.safetensors", 20),
    "an empty file": lambda f: os.truncate(f / "weights.safetensors", 0),
    "a missing file": lambda f: (f / "weights.safetensors").unlink(),
    "a missing meta.json": lambda f: (f / "meta.json").unlink(),
    "a broken meta.json": lambda f: (f / "meta.json").write_text("{"),
    "a meta.json of another kind": lambda f: (f / "meta.json").write_text("[1]"),
    "a meta.json that is not text": lambda f: (f / "meta.json").write_bytes(b"\xff\xfe"),
    "an edited meta.json": lambda f: edit(f / "meta.json", kind="twin"),
    "a meta.json without files": lambda f: edit(f / "meta.json", files=None),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_to_an_artifact_is_noticed_said_and_set_aside(
    store: Store, saved: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    DAMAGE[damage](saved)
    left = files_in(saved)
    with caplog.at_level(logging.WARNING, "arena"):
        assert store.artifact(KEY) is None
    assert str(saved) in caplog.text
    assert "set aside" in caplog.text
    (kept,) = aside(store)
    assert files_in(kept) == left  # nothing is deleted
    assert not store.has(KEY)
    assert store.save(KEY, PARTS, {"kind": "victim"}).meta["kind"] == "victim"
    assert len(aside(store)) == 1


RECORD_DAMAGE = {
    "an edited figure": lambda p: p.write_text(p.read_text().replace("0.5", "0.9")),
    "a broken file": lambda p: p.write_text(p.read_text()[:-9]),
    "an empty file": lambda p: p.write_text(""),
    "a list": lambda p: p.write_text("[]"),
    "a number": lambda p: p.write_text("3"),
    "no checksum": lambda p: p.write_text(json.dumps({"key": p.stem})),
    "no text": lambda p: p.write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", RECORD_DAMAGE)
def test_damage_to_a_record_is_noticed_said_and_set_aside(
    store: Store, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    for key in ("a" * 64, "b" * 64):
        store.write_record(toys.record(key, metrics={"acc": 0.5}))
    path = store.root / "records" / f"{'a' * 64}.json"
    RECORD_DAMAGE[damage](path)
    left = path.read_bytes()
    assert [r["key"] for r in store.records()] == ["b" * 64]
    assert "set aside" in caplog.text
    (kept,) = aside(store)
    assert kept.read_bytes() == left
    assert store.record("a" * 64) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dataset": {}}, "it.dataset lacks 'name'"),
        ({"metrics": {"acc": "good"}}, "it.metrics.acc"),
        ({"metrics": {"acc": 10**400}}, "it.metrics.acc is no number"),
        ({"seed": True}, "it.seed is no number"),
        ({"flags": [{"name": "x"}]}, "it.flags[] lacks 'meaning'"),
        ({"intervals": {"acc": [0.1]}}, "it.intervals.acc holds 1 values, not 2"),
        ({"measures": {"pgd": {"status": "ok"}}}, "it.measures.pgd lacks"),
        ({"board": None}, "it.board is no object"),
    ],
)
def test_a_record_of_another_shape_is_not_believed(
    store: Store, caplog: pytest.LogCaptureFixture, change: dict[str, object], told: str
) -> None:
    store.write_record(toys.record("a" * 64, **change))
    store.write_record(toys.record("b" * 64))
    assert [r["key"] for r in store.records()] == ["b" * 64]
    assert told in caplog.text
    assert len(aside(store)) == 1


def test_a_record_under_another_key_is_not_believed(store: Store) -> None:
    store.write_record(toys.record("a" * 64))
    folder = store.root / "records"
    shutil.copy(folder / f"{'a' * 64}.json", folder / f"{'b' * 64}.json")
    assert [r["key"] for r in store.records()] == ["a" * 64]
    assert len(aside(store)) == 1


def test_a_damaged_board_is_set_aside(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    store.write_board("demo", 1, toys.board("demo"))
    edit(store.root / "boards" / "demo@1.json", cells=["a"])
    assert store.boards() == []
    assert len(aside(store)) == 1
    assert "set aside" in caplog.text


def test_damage_in_a_store_that_may_only_be_read_is_said(
    store: Store, saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    flip(saved / "weights.safetensors")
    monkeypatch.setattr(Path, "rename", denied)
    assert store.artifact(KEY) is None
    assert "cannot be set aside" in caplog.text
    assert saved.exists()


# ------------------------------------------------------------------------------- finding, opening


def test_find_by_prefix(store: Store) -> None:
    for key in ("abc" + "0" * 61, "abd" + "0" * 61):
        store.write_record(toys.record(key))
    assert store.find("abc")["key"].startswith("abc")
    assert store.find("ABD0")["key"].startswith("abd")
    with pytest.raises(BadInput, match=r"stands for 2 cells, abc0.* and abd0"):
        store.find("ab")
    for missing in ("x", ""):
        with pytest.raises(BadInput, match="There is no cell"):
            store.find(missing)
    flip(store.root / "records" / f"{'abc' + '0' * 61}.json")
    edit(store.root / "records" / f"{'abd' + '0' * 61}.json", key="z")
    with pytest.raises(BadInput, match="is damaged"):
        store.find("abd")


def test_unknown_formats_and_files_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create()
    Store(tmp_path)
    (tmp_path / "store.json").write_text('{"format": 99}')
    with pytest.raises(BadInput, match="has format 99, this version reads 1"):
        Store(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(BadInput, match="is damaged"):
        Store(tmp_path)
    with pytest.raises(BadInput, match="is a file"):
        Store(tmp_path / "store.json")
    with pytest.raises(BadInput, match="cannot be written"):
        Store(tmp_path / "store.json" / "below").create()


# ------------------------------------------------------------------------------------------ locks


HOLDER = """
import sys, time
from arena.store import Store
with Store(sys.argv[1]).lock(sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(store: Store):
    """Another process that holds the lock of KEY."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(store.root), KEY],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_lock_excludes_other_processes_and_dies_with_its_holder(
    store: Store, holder: subprocess.Popen[bytes]
) -> None:
    with pytest.raises(TimeoutError):
        store.lock(KEY).acquire(timeout=0)
    with store.lock("cd" + "0" * 62).acquire(timeout=0):
        pass  # another key is free
    holder.kill()
    holder.wait()
    with store.lock(KEY).acquire(timeout=5), pytest.raises(TimeoutError):
        store.lock(KEY).acquire(timeout=0)  # nor can one process take it twice


def test_scratch_is_made_and_cleared(store: Store) -> None:
    (store.scratch(KEY) / "x").write_text("half")
    assert (store.scratch(KEY) / "x").exists()
    store.clear_scratch(KEY)
    store.clear_scratch(KEY)
    assert list(store.scratch(KEY).iterdir()) == []


# ------------------------------------------------------------------------------------ refused work


def refuse(store: Store, do: Callable[[], object] = lambda: None) -> None:
    """Work that is refused after it did something."""

    def work() -> None:
        with store.unless_refused():
            store.create()
            with store.lock(KEY):
                store.scratch(KEY)
                do()
            raise BadInput("no")

    with pytest.raises(BadInput, match="no"):
        work()


def test_refused_work_leaves_nothing_behind(tmp_path: Path) -> None:
    refuse(Store(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    refuse(Store(tmp_path / "a" / "b"))
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
    Store(tmp_path / "a" / "b").create()
    refuse(Store(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b" / "store.json").exists(), "it was there before"


def test_refused_work_spares_what_others_keep_or_do(tmp_path: Path) -> None:
    store, other = Store(tmp_path / "new"), "ab" + "1" * 62
    refuse(store, lambda: store.save(other, {"w": {"x": torch.zeros(1)}}, {}))
    assert store.artifact(other) is not None
    store = Store(tmp_path / "newer")
    others = store.lock(other)  # held when this work ends
    refuse(store, others.acquire)
    assert (store.root / "locks" / f"{other}.lock").exists()
    others.release()
