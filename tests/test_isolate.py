"""Workers: whatever a method does, the runner gets a result or one sentence, and goes on."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import misbehaving
import pytest

from arena.referee import isolate, sandbox
from arena.referee.isolate import Failed, Interrupted, Refused, Stop

LEVELS = [
    sandbox.LIMITS,
    pytest.param(
        sandbox.NAMESPACES,
        marks=pytest.mark.skipif(
            sandbox.level() != sandbox.NAMESPACES, reason=f"no namespaces: {sandbox.why_not()}"
        ),
    ),
]


@pytest.fixture(params=LEVELS)
def run(tmp_path: Path, request: pytest.FixtureRequest):
    (tmp_path / "job").mkdir()

    def run(work: isolate.Work, job: dict[str, Any] | None = None, **options: Any) -> Any:
        job = {"folder": str(tmp_path / "job"), **(job or {})}
        return isolate.run(job, logfile=tmp_path / "log", work=work, level=request.param, **options)

    return run


def alive(file: Path) -> bool:
    """Whether the process that locked the file still runs."""
    with file.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def within(seconds: float, condition: Any) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_result_comes_from_another_process(run) -> None:
    result = run(misbehaving.behaves, {"value": 21})
    assert result["twice"] == 42
    assert result["pid"] != os.getpid()


def test_a_refusal_is_no_failure(run) -> None:
    with pytest.raises(Refused, match=r"^it needs two classes$"):
        run(misbehaving.refuses)


@pytest.mark.parametrize(
    ("work", "job", "reason"),
    [
        (misbehaving.raises, {}, r"KeyError: 'the weights\nand more'"),
        (misbehaving.exits, {}, "SystemExit: 3"),
        (misbehaving.leaves, {}, "its process ended with exit code 7 and no answer"),
        (
            misbehaving.dies,
            {"signal": "SIGKILL"},
            "its process was killed by SIGKILL, most likely for want of memory",
        ),
        (misbehaving.dies, {"signal": "SIGSEGV"}, "its process was killed by SIGSEGV"),
        (misbehaving.hungry, {}, "out of memory"),
    ],
)
def test_every_end_has_a_reason_of_one_sentence(run, work, job, reason) -> None:
    with pytest.raises(Failed) as caught:
        run(work, job)
    assert caught.value.kind == "failed"
    assert caught.value.reason.replace("\n", "") == reason.replace("\n", "")
    assert "\n" not in caught.value.reason


def test_a_failure_carries_its_traceback_and_a_death_the_end_of_its_log(run) -> None:
    with pytest.raises(Failed) as caught:
        run(misbehaving.raises)
    assert "misbehaving.py" in caught.value.details
    with pytest.raises(Failed) as caught:
        run(misbehaving.dies, {"signal": "SIGKILL"})
    assert caught.value.details.endswith("last words\n")


def test_a_result_that_cannot_be_sent_is_a_failure_with_a_reason(run) -> None:
    with pytest.raises(Failed, match="not JSON serializable"):
        run(misbehaving.answers_what_cannot_be_sent)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
         "out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        (MemoryError(), "out of memory"),
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError(), "ValueError"),
    ],
)  # fmt: skip
def test_errors_are_explained_in_one_line(error: Exception, sentence: str) -> None:
    assert isolate.explain(error) == sentence


def test_a_method_that_hangs_is_ended_in_time(run, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(Failed, match="within 1 seconds") as caught:
        run(misbehaving.hangs, timeout=1)
    assert caught.value.kind == "timeout"
    assert time.monotonic() - started < 3
    assert not (begun := tmp_path / "job/begun").exists() or not alive(begun)


def test_output_goes_to_the_log(run, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run(misbehaving.chatters)
    log = tmp_path / "log"
    assert log.stat().st_size == 2**20 + len("the end\n")
    assert capfd.readouterr() == ("", "")
    assert isolate.tail(log, 8) == "the end\n"
    assert isolate.tail(tmp_path / "none") == ""


def test_progress_arrives_thinned_out_with_its_last_word(run) -> None:
    events: list[dict[str, Any]] = []
    run(misbehaving.reports, on_event=events.append)
    steps = [e["done"] for e in events if e["what"] == "steps"]
    assert 1 <= len(steps) < 50
    assert steps[-1] == 1000
    assert events[-1]["figures"] == {"loss": 0.5}


def test_a_worker_may_ask(run) -> None:
    asked: list[str] = []

    def answer(message: dict[str, Any]) -> dict[str, Any]:
        asked.append(message["what"])
        return {"x": "here.npy"}

    assert run(misbehaving.asks, answer=answer) == {"got": "here.npy"}
    assert asked == ["the images"]


def test_ctrl_c_is_left_to_the_runner(run) -> None:
    assert run(misbehaving.interrupted) == {"lived": True}


def test_stopping_ends_the_worker(run, tmp_path: Path) -> None:
    stop, begun = Stop(threading.Event()), tmp_path / "job/begun"

    def wait_then_stop() -> None:
        within(10, lambda: begun.exists() and begun.read_text())
        stop.event.set()

    thread = threading.Thread(target=wait_then_stop)
    thread.start()
    with pytest.raises(Interrupted):
        run(misbehaving.hangs, stop=stop)
    thread.join()
    assert not alive(begun)


RUNNER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import misbehaving
from arena.referee import isolate, sandbox
if __name__ == "__main__":
    folder = Path(sys.argv[2])
    job, log = {"folder": str(folder / "job")}, folder / "log"
    isolate.run(job, logfile=log, work=misbehaving.hangs, level=sys.argv[3])
"""


@pytest.mark.parametrize("level", LEVELS)
def test_a_worker_dies_with_a_killed_runner(tmp_path: Path, level: str) -> None:
    script, begun = tmp_path / "runner.py", tmp_path / "job/begun"
    begun.parent.mkdir()
    script.write_text(RUNNER)
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent)}
    runner = subprocess.Popen(
        [sys.executable, str(script), str(tests), str(tmp_path), level], env=environment
    )
    try:
        assert within(60, lambda: begun.exists() and begun.read_text())
        assert alive(begun)
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        assert within(3, lambda: not alive(begun))
    finally:
        runner.kill()
        runner.wait()
