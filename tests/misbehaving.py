"""What methods may do to their worker; each stands in for a job."""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arena.core import progress
from arena.referee.isolate import Line, Refused

Job = Mapping[str, Any]


def behaves(job: Job, line: Line) -> dict[str, Any]:
    return {"twice": 2 * job["value"], "pid": os.getpid()}


def refuses(job: Job, line: Line) -> dict[str, Any]:
    raise Refused("it needs two classes")


def raises(job: Job, line: Line) -> dict[str, Any]:
    raise KeyError("the weights\nand more")


def exits(job: Job, line: Line) -> dict[str, Any]:
    raise SystemExit(3)


def leaves(job: Job, line: Line) -> dict[str, Any]:
    os._exit(7)


def dies(job: Job, line: Line) -> dict[str, Any]:
    print("last words", flush=True)
    os.kill(os.getpid(), signal.Signals[job["signal"]])
    time.sleep(60)
    return {}


def hungry(job: Job, line: Line) -> dict[str, Any]:
    raise MemoryError


def hangs(job: Job, line: Line) -> dict[str, Any]:
    stream = open(Path(job["folder"]) / "begun", "w")  # noqa: SIM115
    fcntl.flock(stream, fcntl.LOCK_EX)  # dies with this process
    stream.write("yes")
    stream.flush()
    while True:
        pass


def chatters(job: Job, line: Line) -> dict[str, Any]:
    for _ in range(1024):
        print("x" * 1023, flush=True)
    os.write(2, b"the end\n")
    return {}


def interrupted(job: Job, line: Line) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.1)
    return {"lived": True}


def reports(job: Job, line: Line) -> dict[str, Any]:
    for done in range(1000):
        progress.report("steps", done, 1000)
    progress.report("steps", 1000, 1000)
    progress.report("epoch", 1, 5, loss=0.5)
    return {}


def asks(job: Job, line: Line) -> dict[str, Any]:
    return {"got": line.ask("the images")["x"]}


def answers_what_cannot_be_sent(job: Job, line: Line) -> dict[str, Any]:
    return {"value": lambda: 0}
