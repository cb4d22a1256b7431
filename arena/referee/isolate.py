"""A process per method: started clean, watched, timed out, killed; it holds what it was sent.

Workers are forked from a server process that has imported torch and nothing else, so a method
starts in well under a second and finds nothing of the runner's memory. When the runner dies, even
by `kill -9`, its workers notice and die too.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

log = logging.getLogger("arena")

Event = Callable[[dict[str, Any]], None]
QUIET = 0.2  # seconds between two progress messages
CLOSING = 10.0  # seconds a worker may take to end after its answer


class Failed(Exception):
    """A method failed; `kind` is failed or timeout, the message says why in one sentence."""

    def __init__(self, kind: str, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.kind, self.reason, self.details = kind, reason, details


class Refused(Exception):
    """A method said that it cannot apply here, before anything was computed."""


@dataclass
class Stop:
    """Shared by all workers of a run; set when the user wants to end it."""

    event: threading.Event

    def __bool__(self) -> bool:
        return self.event.is_set()


class Interrupted(BaseException):
    """The run was stopped while a worker was at work."""


def context() -> Any:
    """How workers start: from a fork server where there is one, else spawned."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    made = mp.get_context("forkserver")
    # torch imports the compiler's front end with the first optimiser: for seconds, in every worker
    made.set_forkserver_preload(["torch._dynamo", "arena.referee.worker"])
    return made


def run(
    job: Mapping[str, Any],
    *,
    logfile: Path,
    timeout: float | None = None,
    on_event: Event | None = None,
    stop: Stop | None = None,
    answer: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    work: Work | None = None,
) -> dict[str, Any]:
    """Do `job` in a worker process and return its result.

    job: what the worker gets, JSON-like; tensors travel as files.
    work: a function at the top of a module that does it; None: the worker's own for job["job"].
    answer: replies to a worker that asks for something (an attack asks for the images to stamp
        only when its victim is trained).
    Raises Failed (an error, a death, a timeout), Refused, Interrupted.
    """
    ours, theirs = mp.Pipe()
    process = context().Process(
        target=_main, args=(theirs, dict(job), str(logfile), work), name="arena-worker", daemon=True
    )
    started = time.monotonic()
    process.start()
    theirs.close()
    try:
        while True:
            if stop:
                raise Interrupted
            if timeout is not None and time.monotonic() - started > timeout:
                raise Failed("timeout", f"it did not end within {timeout:g} seconds")
            if not ours.poll(0.1):
                continue
            try:
                message = ours.recv()
            except (EOFError, ConnectionResetError):
                process.join(CLOSING)
                raise Failed("failed", _death(process.exitcode), tail(logfile)) from None
            match message["kind"]:
                case "progress":
                    if on_event is not None:
                        on_event(message)
                case "ask":
                    assert answer is not None
                    ours.send(answer(message))
                case "refused":
                    raise Refused(message["reason"])
                case "error":
                    raise Failed("failed", message["reason"], message["details"])
                case "result":
                    process.join(CLOSING)
                    return dict(message["result"])
    finally:
        if process.is_alive():
            process.kill()
        process.join()
        ours.close()


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", most likely for want of memory" if name == "SIGKILL" else ""
        return f"its process was killed by {name}{hint}"
    return f"its process ended with exit code {code} and no answer"


def tail(path: Path, size: int = 4000) -> str:
    """The last `size` characters of a log."""
    with suppress(OSError):
        return path.read_text(errors="replace")[-size:]
    return ""


# --------------------------------------------------------------------------- inside the worker


class Line:
    """A worker's line to the runner."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._last = 0.0

    def send(self, kind: str, **content: Any) -> None:
        with self._lock:
            self._connection.send({"kind": kind, **content})

    def progress(self, what: str, done: float, total: float, figures: dict[str, float]) -> None:
        now = time.monotonic()
        if figures or 0 < total <= done or now - self._last >= QUIET:
            self._last = now
            self.send("progress", what=what, done=done, total=total, figures=figures)

    def ask(self, what: str) -> dict[str, Any]:
        """Ask the runner for something and wait for it."""
        self.send("ask", what=what)
        return dict(self._replies())

    def _replies(self) -> Any:
        return self._connection.recv()


Work = Callable[[Mapping[str, Any], Line], dict[str, Any]]


def _main(connection: Connection, job: dict[str, Any], logfile: str, work: Work | None) -> None:
    """A worker's life: redirect output, do the job, answer, end."""
    stream = open(logfile, "ab", buffering=0)  # noqa: SIM115 - lives as long as the process
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle
    _die_with_runner()
    keep_freed_memory()
    from arena.core import progress
    from arena.referee import worker

    line = Line(connection)
    try:
        with progress.listening(line.progress):
            result = (work or worker.JOBS[job["job"]])(job, line)
        line.send("result", result=result)
    except Refused as error:
        line.send("refused", reason=str(error))
    except BaseException as error:  # whatever a method does, its cell gets a reason
        traceback.print_exc()
        line.send("error", reason=explain(error), details=traceback.format_exc()[-4000:])
    finally:
        sys.stdout.flush()
        connection.close()
        os._exit(0)  # no clean-up of a stranger's making


def explain(error: BaseException) -> str:
    """One sentence for a record."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    name = type(error).__name__
    if name in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in first:
        return f"out of memory: {first}" if first else "out of memory"
    return f"{name}: {first}" if first else name


def _die_with_runner() -> None:
    """End this process when the runner ends, however it ends.

    The worker's parent is the fork server and the line is silent while the worker is busy, so the
    runner's own sentinel is watched.
    """
    runner = mp.parent_process()
    assert runner is not None

    def watch() -> None:
        runner.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def keep_freed_memory() -> None:
    """Let glibc keep freed buffers, since fresh pages for every activation cost time.

    `benchmarks/fit.py --keep-memory` tells how much; without glibc nothing happens.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-3, 2**31 - 1), (-1, 2**31 - 1), (-4, 0)):  # mmap threshold, trim…
            libc.mallopt(option, value)
