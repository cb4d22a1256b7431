"""What hostile methods may try in their worker; each stands in for a job."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from arena.referee.isolate import Line

Job = Mapping[str, Any]
WEIGHTS = {"a.weight": torch.ones(2, 3), "a.bias": torch.zeros(3)}


def forever(job: Job, line: Line) -> dict[str, Any]:
    while True:
        time.sleep(1)


def eats_memory(job: Job, line: Line) -> dict[str, Any]:
    held = []
    while True:
        held.append(bytearray(os.urandom(1) * 2**24))


def forks(job: Job, line: Line) -> dict[str, Any]:
    while True:
        try:
            os.fork()
        except OSError:
            time.sleep(0.05)


def prints(job: Job, line: Line) -> dict[str, Any]:
    os.write(1, b"first words\n")
    for _ in range(2**10):
        os.write(1, b"x" * 2**20)
    return {}


def prints_much(job: Job, line: Line) -> dict[str, Any]:
    os.write(1, b"first words\n")
    for _ in range(20):
        os.write(1, b"x" * 2**20)
    os.write(1, b"last words\n")
    return {}


def fills_folder(job: Job, line: Line) -> dict[str, Any]:
    for number in range(10_000):
        Path(job["folder"], f"{number}").write_bytes(b"x" * 2**20)
    return {}


def writes_large_file(job: Job, line: Line) -> dict[str, Any]:
    with open(Path(job["folder"], "large"), "wb") as stream:
        while True:
            stream.write(b"x" * 2**20)


def leaves_daemon(job: Job, line: Line) -> dict[str, Any]:
    """A daemon by the book; it appends to a file as long as it lives."""
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        while True:
            with open(Path(job["folder"], "heartbeat"), "a") as stream:
                stream.write("x")
            time.sleep(0.02)
    while not Path(job["folder"], "heartbeat").exists():
        time.sleep(0.01)
    return {}


class Bomb:
    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return (open, (self.place, "w"))


def _raw(line: Line, data: bytes) -> dict[str, Any]:
    line._connection.send_bytes(data)
    time.sleep(60)
    return {}


def sends_pickle(job: Job, line: Line) -> dict[str, Any]:
    return _raw(line, pickle.dumps({"kind": "result", "result": Bomb(job["bomb"])}))


def sends_text(job: Job, line: Line) -> dict[str, Any]:
    return _raw(line, job["text"].encode())


def sends_half(job: Job, line: Line) -> dict[str, Any]:
    os.write(line._connection.fileno(), struct.pack("!i", 1000) + b"{")
    time.sleep(60)
    return {}


def sends_without_end(job: Job, line: Line) -> dict[str, Any]:
    os.write(line._connection.fileno(), struct.pack("!i", 2**31 - 1))
    time.sleep(60)
    return {}


def asks_and_does_not_listen(job: Job, line: Line) -> dict[str, Any]:
    while True:
        line.send("ask", what="the images")


def looks_around(job: Job, line: Line) -> dict[str, Any]:
    """What can be seen, read, written and reached from here."""

    def can_write(path: str) -> bool:
        try:
            Path(path, "here").write_text("x")
        except OSError:
            return False
        return True

    def connects(where: tuple[str, int]) -> bool:
        try:
            socket.create_connection(where, timeout=1).close()
        except OSError:
            return False
        return True

    libc = ctypes.CDLL(None, use_errno=True)
    folders = ["/", "/usr", "/etc", "/proc/sys/kernel", os.path.dirname(torch.__file__)]
    mounted = libc.mount(None, b"/", None, ctypes.c_ulong(32), None)  # writable again
    try:
        processes = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        processes = []
    memory = " ".join(
        Path(f"/proc/self/{name}").read_bytes().decode(errors="replace")
        for name in ("environ", "cmdline")
    )
    frame, frames = sys._getframe(), []
    while frame is not None:
        frames.append(repr(frame.f_locals))
        frame = frame.f_back
    return {
        "seen": [path for path in job["looks"] if os.path.exists(path)],
        "written": [path for path in folders if can_write(path)],
        "connects": connects(tuple(job["port"])),
        "processes": len(processes),
        "mounts": mounted == 0,
        "namespaces": libc.unshare(0x10000000) == 0,
        "told": memory + " ".join(frames) + " ".join(sys.argv) + repr(dict(os.environ)),
        "rights": [
            line.split()[1]
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(("CapPrm", "CapEff", "CapBnd", "NoNewPrivs"))
        ],
        "cwd": os.getcwd(),
        "root": sorted(os.listdir("/")),
    }


def leaves_word(job: Job, line: Line) -> dict[str, Any]:
    """Leave something for the next job, and tell what the one before left."""
    places = ["/tmp/word", "/dev/shm/word", "/var/tmp/word", os.path.expanduser("~/word")]
    found = [path for path in places if os.path.exists(path)]
    for path in places:
        with contextlib.suppress(OSError):
            Path(path).write_text("it was the patch")
    return {"found": found, "left": [path for path in places if os.path.exists(path)]}


def starts_program(job: Job, line: Line) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, check=True)
    return {"said": done.stdout.decode()}


def gives_back(job: Job, line: Line) -> dict[str, Any]:
    """Weights that are none, of the kind job["what"]."""
    file = Path(job["folder"], "weights.safetensors")
    state = {name: value.clone() for name, value in WEIGHTS.items()}
    match job["what"]:
        case "nothing":
            return {}
        case "nan":
            state["a.bias"][1] = float("nan")
        case "shape":
            state["a.weight"] = torch.ones(3, 2)
        case "dtype":
            state["a.weight"] = state["a.weight"].half()
        case "architecture":
            state = {"b.weight": torch.ones(2, 3), "a.bias": torch.zeros(3)}
        case "more":
            state["c.weight"] = torch.ones(1)
    save_file(state, file)
    match job["what"]:
        case "link":
            file.rename(file.with_name("other"))
            file.symlink_to("/etc/passwd")
        case "fifo":
            file.unlink()
            os.mkfifo(file)
        case "folder":
            file.unlink()
            file.mkdir()
        case "sparse":
            os.truncate(file, 2**40)
        case "pickle":
            file.write_bytes(pickle.dumps(WEIGHTS))
    return {}


def attacks_twice(job: Job, line: Line) -> dict[str, Any]:
    """The attack of the arena, which changes its victim when it has seen the test images."""
    from arena.referee import worker
    from arena.store import load_tensors, save_tensors

    found = worker.attack(job, line)
    file = Path(job["folder"], "weights.safetensors")
    state = {name: torch.zeros_like(value) for name, value in load_tensors(file).items()}
    save_tensors(file, state)
    Path(job["folder"], "test.x.npy").unlink()
    return found


def repairs_by(what: str) -> Any:
    return {"unchanged": returns_victim, "link": repairs_with_link, "boasts": boasts}[what]


def returns_victim(job: Job, line: Line) -> dict[str, Any]:
    Path(job["folder"], "weights.safetensors").write_bytes(Path(job["weights"]).read_bytes())
    return {"budget": BUDGET}


def repairs_with_link(job: Job, line: Line) -> dict[str, Any]:
    Path(job["folder"], "weights.safetensors").symlink_to(job["weights"])
    return {"budget": BUDGET}


def boasts(job: Job, line: Line) -> dict[str, Any]:
    return {**returns_victim(job, line), "metrics": {"asr": 0.0}}


BUDGET = {
    "seconds": 1e-9, "peak_memory_mb": 0.0, "forward_images": 0, "backward_images": 0,
    "clean_images": 0,
}  # fmt: skip
