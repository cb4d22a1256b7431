"""A process per method: started clean, held in a sandbox, watched, timed out, killed.

Workers are forked from a server process that has imported torch and nothing else, so a method
starts in well under a second and finds nothing of the runner's memory. Each worker is two: the
keeper, trusted code, which forks the method's own process into a sandbox (`arena.referee.sandbox`)
and says how that ended. When the runner dies, even by `kill -9`, both notice and die too.

The line between method and runner carries JSON, of which the runner believes nothing that it can
find out by itself.
"""

from __future__ import annotations

import ctypes
import errno
import json
import logging
import math
import multiprocessing as mp
import os
import re
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from arena.referee import sandbox
from arena.referee.sandbox import Limits

log = logging.getLogger("arena")

Event = Callable[[dict[str, Any]], None]
QUIET = 0.2  # seconds between two progress messages
CLOSING = 10.0  # seconds a worker may take to end after its answer
LONGEST = 2**24  # bytes of one message
INPUTS = (  # what jobs call the files that they read
    "weights", "clean", "sets", "train", "val", "test", "triggered", "probes", "twin", "labels",
)  # fmt: skip


class Failed(Exception):
    """A method failed; `kind` is failed or timeout, the message says why in one sentence."""

    def __init__(self, kind: str, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.kind, self.reason, self.details = kind, reason, details


class Refused(Exception):
    """A method said that it cannot apply here, before anything was computed."""


class Done(dict[str, Any]):
    """A worker's result, and what the referee itself saw of its making."""

    seconds: float = 0.0  # from before the method was imported to its answer
    peak: int | None = None  # the most memory that one of its processes had, in bytes
    isolation: str = ""  # the level in force

    def measured(self, device: str) -> dict[str, float]:
        """Entries of a budget that need not be believed; a GPU's memory only the worker knows."""
        found = {"seconds": self.seconds}
        if self.peak is not None and device == "cpu":
            found["peak_memory_mb"] = self.peak / 1e6
        return found


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
    limits: Limits | None = None,
    level: str | None = None,
    hidden: Sequence[Path | str] = (),
) -> Done:
    """Do `job` in a worker process and return its result.

    job: what the worker gets, JSON-like; tensors travel as files. It may write to job["folder"] and
        job["scratch"] and read what INPUTS and job["method_files"] name: in namespaces it sees no
        other file, and these under names that tell nothing.
    logfile: what the worker prints; in no folder that it may write.
    work: a function at the top of a module that does it; None: the worker's own for job["job"].
    answer: replies to a worker that asks for something (an attack asks for the images to stamp
        only when its victim is trained). The message's "seconds" are the runner's.
    limits: what it may use; level: what holds it (None: the best that there is).
    hidden: folders that it must not see, whatever else lies in them.
    Raises Failed (an error, a death, a timeout, a broken limit), Refused, Interrupted.
    """
    limits = limits or Limits()
    level = level or sandbox.level(str(job.get("device", "cpu")))
    times = [seconds for seconds in (timeout, limits.seconds) if seconds is not None]
    view, told = None, dict(job)
    if level == sandbox.NAMESPACES:
        view, told = sandbox.view_of(job, INPUTS, [str(path) for path in hidden])
    folders = [str(job[key]) for key in ("folder", "scratch") if job.get(key)]
    ours, theirs = mp.Pipe()
    report, reporting = mp.Pipe(duplex=False)
    process = context().Process(
        target=_main,
        args=(theirs, reporting, told, view, limits, [str(logfile), *folders], work),
        name="arena-worker",
        daemon=True,
    )
    started = time.monotonic()
    process.start()
    theirs.close()
    reporting.close()
    ear, begun = _Ear(ours), started
    done: Done | None = None
    closing, ended = math.inf, False
    try:
        while True:
            now = time.monotonic()
            if stop:
                raise Interrupted
            if done is None and times and now - started > min(times):
                raise Failed("timeout", f"it did not end within {min(times):g} seconds")
            if now > closing:  # it has answered, and lives on
                _end(process)
            lines = [report] if done is not None or ear.ended else [ours, report]
            ready = wait(lines, 0.1)
            # what it said goes before how it ended
            for message in ear.messages() if ours in ready or report in ready else ():
                if done is not None:
                    break
                match message["kind"]:
                    case "begin" if begun == started:
                        begun = time.monotonic()
                    case "progress":
                        if on_event is not None:
                            on_event(message)
                    case "ask":
                        if answer is None:
                            raise Failed("failed", f"it asked for {message['what']!r}")
                        reply = answer({**message, "seconds": time.monotonic() - begun})
                        ear.reply(reply)
                    case "refused":
                        raise Refused(message["reason"])
                    case "error":
                        raise Failed("failed", message["reason"], message["details"])
                    case "result":
                        done = Done(message["result"])
                        done.seconds, done.isolation = time.monotonic() - begun, level
                        closing = time.monotonic() + CLOSING
            if ear.ended and closing == math.inf:
                closing = time.monotonic() + CLOSING
            if report not in ready:
                continue
            ending = _ending(report)
            if ending is None:  # the keeper itself was killed
                process.join(CLOSING)
                raise Failed("failed", _death(process.exitcode), tail(logfile))
            if ending.get("error"):
                raise Failed("failed", ending["error"], tail(logfile))
            if ending["breach"]:
                raise Failed("failed", ending["breach"], tail(logfile))
            if done is None:
                raise Failed("failed", _death(ending["code"]), tail(logfile))
            done.peak = ending["peak"]
            ended = True
            return done
    finally:
        if not ended:  # else the keeper is about to: the next job's start sweeps it up
            _end(process)
        ours.close()
        report.close()


def _end(process: Any) -> None:
    """Have the keeper kill all that the job has started, and end."""
    if process.is_alive():
        process.terminate()
        process.join(CLOSING)
    if process.is_alive():
        process.kill()
    process.join()


def _ending(report: Connection) -> dict[str, Any] | None:
    try:
        return dict(json.loads(report.recv_bytes()))
    except (EOFError, OSError):
        return None


def _death(code: int | None) -> str:
    if code is None:
        return "its process was ended"
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", most likely for want of memory" if name == "SIGKILL" else ""
        return f"its process was killed by {name}{hint}"
    return f"its process ended with exit code {code} and no answer"


def tail(path: Path, size: int = 4000) -> str:
    """The last `size` characters of a log."""
    with suppress(OSError), path.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4 * size))
        return stream.read().decode(errors="replace")[-size:]
    return ""


# ------------------------------------------------------------------------------ what a worker says


_TEXT, _NUMBER = "text", "number"
_MESSAGES: dict[str, dict[str, Any]] = {
    "begin": {},
    "progress": {"what": _TEXT, "done": _NUMBER, "total": _NUMBER, "figures": {}},
    "ask": {"what": _TEXT},
    "refused": {"reason": _TEXT},
    "error": {"reason": _TEXT, "details": _TEXT},
    "result": {"result": {}},
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


class _Ear:
    """The runner's end of a line. A worker that sends half a message, or one without end, or does
    not listen to an answer, makes nobody wait."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.ended, self._heard = connection, False, bytearray()
        self._raw = os.name == "posix"
        if self._raw:
            os.set_blocking(connection.fileno(), False)

    def messages(self) -> list[dict[str, Any]]:
        """Those that have arrived whole. Raises Failed at what is no message."""
        return [_checked(raw) for raw in (self._framed() if self._raw else self._received())]

    def _received(self) -> list[bytes]:
        found = []
        try:
            while self.connection.poll():
                found.append(self.connection.recv_bytes(LONGEST))
        except (EOFError, OSError):
            self.ended = True
        return found

    def _framed(self) -> list[bytes]:
        found: list[bytes] = []
        for _ in range(256):  # then it is somebody else's turn
            try:
                heard = os.read(self.connection.fileno(), 2**16)
            except BlockingIOError:
                break
            except ConnectionResetError:
                heard = b""
            if not heard:
                self.ended = True
                break
            self._heard += heard
        while len(self._heard) >= 4:
            (length,) = struct.unpack("!i", self._heard[:4])  # as Connection.send_bytes writes it
            if not 0 <= length <= LONGEST:
                raise Failed("failed", f"it sent a message of more than {sandbox.size(LONGEST)}")
            if len(self._heard) < 4 + length:
                break
            found.append(bytes(self._heard[4 : 4 + length]))
            del self._heard[: 4 + length]
        return found

    def reply(self, content: Mapping[str, Any]) -> None:
        data = json.dumps(content).encode()
        try:
            if self._raw:
                frame = struct.pack("!i", len(data)) + data
                if os.write(self.connection.fileno(), frame) == len(frame):
                    return
            else:
                self.connection.send_bytes(data)
                return
        except BlockingIOError:
            pass
        except OSError:  # it is gone; its end will tell more
            return
        raise Failed("failed", "it asks and does not listen to the answers")


def _checked(raw: bytes) -> dict[str, Any]:
    """A message of a worker. Raises Failed where it is none."""
    try:
        message = json.loads(raw)
        wanted = _MESSAGES[message["kind"]]
        found: dict[str, Any] = {"kind": message["kind"]}
        if message["kind"] == "ask":  # what else is asked is for who answers to judge
            found.update(message)
        for name, kind in wanted.items():
            value = message[name]
            if kind is _TEXT:
                limit = 4000 if name == "details" else 300
                value = str(value) if isinstance(value, str) else _no(name)
                value = value[-limit:] if name == "details" else _CONTROL.sub(" ", value[:limit])
            elif kind is _NUMBER:
                value = float(value) if _is_number(value) and math.isfinite(value) else _no(name)
            elif not isinstance(value, dict):
                _no(name)
            found[name] = value
        figures = found.get("figures", {})
        if len(figures) > 100 or not all(_is_number(value) for value in figures.values()):
            _no("figures")
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise Failed("failed", "it sent the referee something that is no message") from error
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _no(name: str) -> Any:
    raise TypeError(name)


# --------------------------------------------------------------------------- inside the worker


class Line:
    """A worker's line to the runner."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._lock = connection, threading.Lock()
        self._last = 0.0

    def send(self, kind: str, **content: Any) -> None:
        data = json.dumps({"kind": kind, **content}).encode()
        with self._lock:
            self._connection.send_bytes(data)

    def begin(self) -> None:
        """Say that the method's own work begins: before its code is imported."""
        self.send("begin")

    def progress(self, what: str, done: float, total: float, figures: dict[str, float]) -> None:
        now = time.monotonic()
        if figures or 0 < total <= done or now - self._last >= QUIET:
            self._last = now
            self.send("progress", what=what, done=done, total=total, figures=figures)

    def ask(self, what: str, **content: Any) -> dict[str, Any]:
        """Ask the runner for something and wait for it."""
        self.send("ask", what=what, **content)
        return dict(json.loads(self._connection.recv_bytes()))


Work = Callable[[Mapping[str, Any], Line], dict[str, Any]]


def _main(
    connection: Connection,
    reporting: Connection,
    job: dict[str, Any],
    view: sandbox.View | None,
    limits: Limits,
    places: list[str],
    work: Work | None,
) -> None:
    """The keeper's life: have the job done in a process of its own, and tell how that ended.

    places: the log and the folders that the job may write, outside; forgotten inside.
    """
    stream = os.open(places.pop(0), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(stream, number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle
    runner = mp.parent_process()
    assert runner is not None
    inside = view is not None
    if not hasattr(os, "fork"):

        def end_with_runner() -> None:
            runner.join()
            os._exit(1)

        threading.Thread(target=end_with_runner, daemon=True).start()
        _work(connection, job, work, limits, inside)
    report: dict[str, Any]
    try:
        ending = sandbox.keep(
            lambda: _work(connection, job, work, limits, inside),
            view=view,
            limits=limits,
            folders=places,
            log=stream,
            runner=int(runner.sentinel),
        )
        report = ending._asdict()
    except OSError as error:
        report = {"error": f"the sandbox could not be built: {error.strerror or error}"}
    with suppress(OSError):
        reporting.send_bytes(json.dumps(report).encode())
    os._exit(0)


def _work(
    connection: Connection,
    job: dict[str, Any],
    work: Work | None,
    limits: Limits,
    inside: bool,
) -> None:
    """The life of the process that holds the method: do the job, answer, end."""
    line = Line(connection)
    try:
        if hasattr(os, "fork"):
            sandbox.close_all_but((0, 1, 2, connection.fileno()))
        folder = str(job.get("folder") or tempfile.gettempdir())
        sandbox.forget_origin(folder, "/tmp" if inside else folder)
        for file in job.get("method_files", ()):
            if file.endswith(".py"):
                sys.path.append(os.path.dirname(file))
        keep_freed_memory()
        from arena.core import progress
        from arena.referee import worker

        with progress.listening(line.progress):
            result = (work or worker.JOBS[job["job"]])(job, line)
        line.send("result", result=result)
    except Refused as error:
        line.send("refused", reason=str(error))
    except BaseException as error:  # whatever a method does, its cell gets a reason
        traceback.print_exc()
        reason = explain(error)
        if getattr(error, "errno", None) == errno.EFBIG:
            reason = sandbox.too_large(limits)
        line.send("error", reason=reason, details=traceback.format_exc()[-4000:])
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        connection.close()
        os._exit(0)  # no clean-up of a stranger's making


def explain(error: BaseException) -> str:
    """One sentence for a record."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    name = type(error).__name__
    if name in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in first:
        return f"out of memory: {first}" if first else "out of memory"
    if name == "BadInput" and first:  # a sentence for users already
        return first
    return f"{name}: {first}" if first else name


def keep_freed_memory() -> None:
    """Let glibc keep freed buffers, since fresh pages for every activation cost time.

    `benchmarks/fit.py --keep-memory` tells how much; without glibc nothing happens.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-3, 2**31 - 1), (-1, 2**31 - 1), (-4, 0)):  # mmap threshold, trim…
            libc.mallopt(option, value)
