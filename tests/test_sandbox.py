"""Hostile and clumsy methods: each ends as one sentence and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hostile
import misbehaving
import pytest

from arena.referee import answers, isolate, returned, sandbox
from arena.referee.isolate import Failed
from arena.referee.sandbox import LIMITS, NAMESPACES, Limits

needs_namespaces = pytest.mark.skipif(
    sandbox.level() != NAMESPACES, reason=f"no namespaces: {sandbox.why_not()}"
)
LEVELS = [LIMITS, pytest.param(NAMESPACES, marks=needs_namespaces)]


@pytest.fixture(scope="module", autouse=True)
def started(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The fork server, whose start would count as the first job's time."""
    folder = tmp_path_factory.mktemp("first")
    isolate.run({"value": 1}, logfile=folder / "log", work=misbehaving.behaves, level=LIMITS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "job").mkdir()
    return tmp_path / "job"


@pytest.fixture
def run(folder: Path):
    def run(work: isolate.Work, level: str = NAMESPACES, limits: Limits | None = None, **job: Any):
        job = {"folder": str(folder), **job}
        options = {"timeout": 30.0, "hidden": [folder.parent / "store"]}
        return isolate.run(
            job, logfile=folder.parent / "log", work=work, level=level, limits=limits, **options
        )

    return run


def failure(call: Any, *words: Any, **options: Any) -> Failed:
    with pytest.raises(Failed) as caught:
        call(*words, **options)
    assert "\n" not in caught.value.reason
    return caught.value


# ------------------------------------------------------------------------------------- the limits


def test_jobs_side_by_side_share_the_memory() -> None:
    whole = Limits().most_memory
    assert whole is not None
    assert Limits().shared(1) == Limits()
    assert Limits().shared(3).memory == whole // 3
    assert Limits(memory=5).shared(3).memory == 5  # somebody named it


@pytest.mark.parametrize(
    ("groups", "file", "said", "most"),
    [
        ("0::/job", "job/memory.max", "1000000\n", 900_000),
        ("0::/job", "memory.max", "1000000\n", 900_000),  # as containers see their own
        ("4:cpu,memory:/job", "memory/job/memory.limit_in_bytes", "1000000\n", 900_000),
        ("0::/job", "job/memory.max", "max\n", None),
        ("words", "memory.max", "1000000\n", None),
    ],
)
def test_what_a_cluster_leaves_of_the_memory_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, file: str, said: str, most: int
) -> None:
    path = tmp_path / "fs" / file
    path.parent.mkdir(parents=True)
    path.write_text(said)
    (tmp_path / "cgroup").write_text(f"1:pids:/\n{groups}\n")
    monkeypatch.setattr(sandbox, "_GROUPS", (tmp_path / "cgroup", str(tmp_path / "fs")))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * 9 // 10
    assert sandbox._nine_tenths.__wrapped__() == (most or machine)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("work", "limits", "reason"),
    [
        (hostile.forever, Limits(seconds=1), "it did not end within 1 seconds"),
        (hostile.eats_memory, Limits(memory=2**29), "it used more than 512.0 MiB of memory"),
        (hostile.forks, Limits(processes=8), "it had more than 8 processes"),
        (hostile.prints, Limits(output=2**24), "it printed more than 16.0 MiB"),
        (hostile.fills_folder, Limits(disk=2**25), "it wrote more than 32.0 MiB"),
        (hostile.writes_large_file, Limits(disk=2**22), "it wrote more than 4.0 MiB"),
    ],
)
def test_every_limit_ends_as_one_sentence(run, level, work, limits, reason) -> None:
    started = time.monotonic()
    assert failure(run, work, level, limits).reason == reason
    assert time.monotonic() - started < 25
    assert run(misbehaving.behaves, level, value=1)["twice"] == 2, "the next job is as ever"


@pytest.mark.parametrize("field", ["seconds", "memory", "processes", "disk", "output"])
def test_a_limit_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"limit {field} must be above 0"):
        Limits(**{field: 0})


def test_a_log_keeps_its_head_and_its_tail(run, folder: Path) -> None:
    run(hostile.prints_much, LIMITS)
    log = (folder.parent / "log").read_bytes()
    assert log.startswith(b"first words\n")
    assert log.endswith(b"last words\n")
    assert b"of output are left out]" in log
    assert len(log) < sandbox.HEAD + 2 * sandbox.TAIL


@pytest.mark.parametrize("level", LEVELS)
def test_a_daemon_does_not_outlive_its_job(run, folder: Path, level: str) -> None:
    run(hostile.leaves_daemon, level)
    size = (folder / "heartbeat").stat().st_size
    time.sleep(0.3)
    assert (folder / "heartbeat").stat().st_size == size


# --------------------------------------------------------------------------------------- the line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nothing",
        "[]",
        "{}",
        '{"kind": "start"}',
        '{"kind": "result"}',
        '{"kind": "result", "result": 3}',
        '{"kind": "refused", "reason": null}',
        '{"kind": "progress", "what": "x", "done": "1", "total": 2, "figures": {}}',
        '{"kind": "progress", "what": "x", "done": NaN, "total": 2, "figures": {}}',
        '{"kind": "progress", "what": "x", "done": 1, "total": 2, "figures": {"a": []}}',
        "[" * 100_000,
        "\ud800",
    ],
)
def test_what_is_no_message_is_a_failure(text: str) -> None:
    with pytest.raises(Failed, match="something that is no message"):
        isolate._checked(text.encode(errors="surrogatepass"))


def test_texts_are_cut_and_cannot_move_the_cursor() -> None:
    found = isolate._checked(b'{"kind": "refused", "reason": "a\\u001b[2J\\nb' + b"c" * 999 + b'"}')
    assert found["reason"].startswith("a [2J b")
    assert len(found["reason"]) <= 300


def test_a_pickle_on_the_line_is_not_opened(run, folder: Path) -> None:
    found = failure(run, hostile.sends_pickle, LIMITS, bomb=str(folder / "bomb"))
    assert found.reason == "it sent the referee something that is no message"
    assert not (folder / "bomb").exists()


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (hostile.sends_without_end, "it sent a message of more than 16.0 MiB"),
        (hostile.sends_half, "it did not end within 1 seconds"),
        (hostile.asks_and_does_not_listen, "it asked for 'the images'"),
    ],
)
def test_a_line_that_is_misused_holds_up_nobody(run, work, reason) -> None:
    assert failure(run, work, LIMITS, Limits(seconds=1)).reason == reason


def test_a_worker_that_never_listens_is_ended(run, folder: Path) -> None:
    with pytest.raises(Failed, match="asks and does not listen"):
        isolate.run(
            {"folder": str(folder)},
            logfile=folder.parent / "log",
            work=hostile.asks_and_does_not_listen,
            answer=lambda question: {"x": "y" * 1000},
            timeout=20,
            level=LIMITS,
        )


BUDGET = {
    "seconds": 1.0, "peak_memory_mb": None, "forward_images": 1, "backward_images": 0,
    "clean_images": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("job", "answer", "fault"),
    [
        ("repair", {}, "'budget' is missing or too much"),
        ("repair", {"budget": BUDGET, "acc": 1.0}, "'acc' is missing or too much"),
        ("repair", {"budget": []}, "budget has no entries"),
        ("repair", {"budget": {**BUDGET, "seconds": "1"}}, "seconds is not a number"),
        ("repair", {"budget": {**BUDGET, "clean_images": -1}}, "clean_images is not a count"),
        ("scan", {"score": 1.0, "target": 1.5, "per_class": None, "budget": BUDGET}, "target is"),
        ("scan", {"score": 1.0, "target": 1, "per_class": ["x"], "budget": BUDGET}, "per_class is"),
        ("usable", {"reasons": {"nad": 3}}, "reasons is not a text"),
    ],
)
def test_an_answer_has_its_entries_and_no_others(job, answer, fault) -> None:
    with pytest.raises(Failed, match=f"its answer is not one: {fault}"):
        answers.check_answer(job, answer)
    answers.check_answer("repair", {"budget": BUDGET})
    matrix = [[0.0, 1.0], [float("nan"), 2]]
    answers.check_answer(
        "scan", {"score": 1, "target": None, "per_class": matrix, "budget": BUDGET}
    )


# ----------------------------------------------------------------------------- what is given back


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("nothing", "it gave back no weights.safetensors"),
        ("nan", "it gave back weights with non-finite values in a.bias"),
        ("shape", "it gave back a.weight of the shape (3, 2) instead of (2, 3)"),
        ("dtype", "it gave back a.weight as float16 not float32"),
        (
            "architecture",
            "it gave back the weights of another architecture: a.weight is missing",
        ),
        ("more", "it gave back the weights of another architecture: 'c.weight' is not in it"),
        ("link", "it gave back a link in place of weights.safetensors"),
        ("fifo", "it gave back no plain file in place of weights.safetensors"),
        ("folder", "it gave back no plain file in place of weights.safetensors"),
        (
            "sparse",
            "it gave back a weights.safetensors of 1024.0 GiB, where at most 4.0 MiB are expected",
        ),
        ("pickle", "it gave back a weights.safetensors that is none"),
    ],
)
def test_weights_that_are_none_are_said_in_one_sentence(run, folder, level, what, reason) -> None:
    run(hostile.gives_back, level, Limits(disk=2**41), what=what)
    shapes = returned.shapes(hostile.WEIGHTS)
    assert failure(returned.weights, folder, shapes).reason == reason


def test_sound_weights_are_taken(run, folder: Path) -> None:
    run(hostile.gives_back, LIMITS, what="sound")
    found = returned.weights(folder, returned.shapes(hostile.WEIGHTS))
    assert all(found[name].equal(value) for name, value in hostile.WEIGHTS.items())


# ---------------------------------------------------------------------------------- the namespaces


@pytest.fixture
def listener() -> Iterator[tuple[str, int]]:
    """A port of this machine that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[:2]


@needs_namespaces
def test_a_job_sees_what_it_names_and_nothing_else(
    run, folder: Path, tmp_path: Path, listener: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store" / "artifacts-of-patch"
    store.mkdir(parents=True)
    (store / "trigger.safetensors").write_text("secret")
    (tmp_path / "weights-of-patch").write_text("weights")
    monkeypatch.setenv("HF_TOKEN", "hush")
    looks = [
        *map(str, (tmp_path, store, store / "trigger.safetensors", tmp_path / "log", Path.cwd())),
        *("/home", "/root", "/var", "/etc/shadow", "/etc/hostname", "/dev/sda", "/dev/mem", "/old"),
        str(Path(__file__).parents[1] / "README.md"),
        os.path.expanduser("~/.bashrc"),
    ]
    weights = str(tmp_path / "weights-of-patch")
    found = run(hostile.looks_around, looks=looks, port=listener, weights=weights)
    # folders above the interpreter are there, with nothing else in them
    above = {str(path) for code in (sys.prefix, sys.base_prefix, sandbox.__file__)
             for path in Path(os.path.realpath(code)).parents}  # fmt: skip
    assert [path for path in found["seen"] if path not in above] == []
    assert found["written"] == []
    assert not found["connects"]
    assert found["processes"] <= 2
    assert not found["mounts"]
    assert not found["namespaces"]
    assert [int(right, 16) for right in found["rights"]] == [0, 0, 0, 1]
    assert found["cwd"] == "/arena/job"
    assert {"arena", "dev", "proc", "tmp"} <= set(found["root"])
    assert not {"home", "var", "mnt", "srv", "media", "run", "boot"} & set(found["root"])
    for word, what in (
        ("hush", "somebody's keys"),
        ("weights-of-patch", "what files are called outside"),
        ("pytest", "the command line"),
    ):
        assert word not in found["told"].replace(repr(looks), ""), what


@needs_namespaces
def test_the_same_can_be_seen_without_namespaces(run, tmp_path: Path, listener: Any) -> None:
    looks = [str(tmp_path), "/etc/passwd"]
    found = run(hostile.looks_around, LIMITS, looks=looks, port=listener)
    assert found["seen"] == looks, "the test of what is hidden could not fail"
    assert found["connects"]


@needs_namespaces
def test_nothing_is_left_for_the_next_job(run) -> None:
    first = run(hostile.leaves_word)
    assert first["left"], "there was no place to leave anything"
    second = run(hostile.leaves_word)
    assert set(second["found"]) <= {"/arena/job/word"}, "its own folder, here shared by the test"


@needs_namespaces
def test_programs_run_as_ever(run) -> None:
    assert run(hostile.starts_program)["said"] == "42\n"


@needs_namespaces
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_can_build_it_too(tmp_path: Path) -> None:
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip("no interpreter that all may read")
    copy = Path("/tmp") / f"arena-trial-{os.getpid()}.py"
    copy.write_bytes(Path(sandbox.__file__).read_bytes())
    copy.chmod(0o644)
    try:
        done = subprocess.run(
            [python, "-I", str(copy), "cpu"],
            user=65534, group=65534, extra_groups=[], capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        copy.unlink()
    if "namespaces" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")


# --------------------------------------------------------------------------------------- the level


def test_the_strong_level_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sandbox.OFF, "1")
    assert sandbox.level() == LIMITS
    assert sandbox.why_not() == "it was switched off"
    monkeypatch.setenv(sandbox.OFF, "0")
    assert sandbox.level() == sandbox._tried("cpu")[0]


def test_where_it_cannot_be_built_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(sandbox.OFF, raising=False)
    sandbox._tried.cache_clear()
    refused = subprocess.CompletedProcess([], 1, "", "namespaces: Operation not permitted\n")
    monkeypatch.setattr(sandbox.subprocess, "run", lambda *words, **options: refused)
    try:
        assert sandbox.level() == LIMITS
        assert sandbox.why_not() == "namespaces: Operation not permitted"
    finally:
        sandbox._tried.cache_clear()


def test_of_a_folder_of_code_nothing_but_code_is_shown(tmp_path, monkeypatch):
    """A checkout on the path may hold stores beside its packages."""
    for name in ("runs/mine", "package"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "package/__init__.py").touch()
    (tmp_path / "module.py").touch()
    (tmp_path / "secret.json").touch()
    monkeypatch.syspath_prepend(tmp_path)
    shown = [inside for _, inside in sandbox._code() if inside.startswith(str(tmp_path))]
    assert sorted(shown) == [str(tmp_path / "module.py"), str(tmp_path / "package")]
