"""Workers: whatever a method does, the runner gets a result or one sentence, and goes on."""

from __future__ import annotations

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

from arena.referee import isolate
from arena.referee.isolate import Failed, Interrupted, Refused, Stop


@pytest.fixture
def run(tmp_path: Path):
    def run(work: isolate.Work, job: dict[str, Any] | None = None, **options: Any) -> Any:
        return isolate.run(job or {}, logfile=tmp_path / "log", work=work, **options)

    return run


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
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
    assert not alive(result["pid"])


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
    with pytest.raises(Failed, match="pickle"):
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
        run(misbehaving.hangs, {"pid_file": str(tmp_path / "pid")}, timeout=1)
    assert caught.value.kind == "timeout"
    assert time.monotonic() - started < 3
    assert not alive(int((tmp_path / "pid").read_text() or 0))


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
    stop, pid = Stop(threading.Event()), tmp_path / "pid"

    def wait_then_stop() -> None:
        within(10, lambda: pid.exists() and pid.read_text())
        stop.event.set()

    thread = threading.Thread(target=wait_then_stop)
    thread.start()
    with pytest.raises(Interrupted):
        run(misbehaving.hangs, {"pid_file": str(pid)}, stop=stop)
    thread.join()
    assert not alive(int(pid.read_text()))


RUNNER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import misbehaving
from arena.referee import isolate
if __name__ == "__main__":
    folder = Path(sys.argv[2])
    isolate.run({"pid_file": str(folder / "pid")}, logfile=folder / "log", work=misbehaving.hangs)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_a_worker_dies_with_a_killed_runner(tmp_path: Path) -> None:
    script, pid = tmp_path / "runner.py", tmp_path / "pid"
    script.write_text(RUNNER)
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(tests.parent)}
    runner = subprocess.Popen(
        [sys.executable, str(script), str(tests), str(tmp_path)], env=environment
    )
    try:
        assert within(60, lambda: pid.exists() and pid.read_text())
        worker = int(pid.read_text())
        assert alive(worker)
        runner.send_signal(signal.SIGKILL)
        runner.wait()
        assert within(3, lambda: not alive(worker))
    finally:
        runner.kill()
        runner.wait()
