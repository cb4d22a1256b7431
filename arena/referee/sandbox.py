"""What holds a method's process: limits everywhere, Linux namespaces where the system has them.

Two levels. `namespaces`: the process sees a root of its own with the interpreter, its packages and
what its job names, all read-only, one scratch folder, and neither a network nor other processes.
`limits`: memory, processes, output, files and time are watched, but the disk can be read. Both
start from a process that is forked already, since starting Python with torch anew costs seconds.

Standard library only: this file is also run as a script, to find out what the system allows.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import functools
import glob
import json
import multiprocessing
import os
import platform
import re
import select
import signal
import site
import subprocess
import sys
import sysconfig
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

NAMESPACES, LIMITS = "namespaces", "limits"
OFF = "ARENA_NO_SANDBOX"  # when set, the strong level is not used
SWITCHED_OFF = "it was switched off"
INSIDE = "/arena"  # where a job's files lie for who runs in namespaces
TICK = 0.1  # seconds between two looks at memory and processes, at most
SOON = 0.005  # the first ones, so that short jobs are looked at, too
DISK_TICK = 1.0  # and at the scratch folder
MOST_FILES = 100_000  # in the scratch folder
HEAD, TAIL = 2**23, 2**18  # bytes of output that a log keeps
SHARED = 2**28  # bytes of /tmp and of /dev/shm each: they lie in memory

_KEPT_VARIABLES = re.compile(
    r"PATH|LANG|LC_\w+|TZ|LD_LIBRARY_PATH|(OMP|MKL|KMP|GOMP|OPENBLAS|CUDA|CUDNN|CUBLAS|NVIDIA|TORCH|"
    r"PYTORCH|ATEN|PYTHON)_?(?!.*(TOKEN|SECRET|KEY|PASSWORD))\w*|COV_CORE_\w+"
)
_ETC = (
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "ld-musl-x86_64.path",
    "alternatives",
    "localtime",
    "os-release",
)
_GROUPS = (Path("/proc/self/cgroup"), "/sys/fs/cgroup")
_NVIDIA = ("/dev/nvidia*", "/dev/nvidia-caps/*", "/dev/dxg")


# ------------------------------------------------------------------------------------- the limits


@dataclass(frozen=True)
class Limits:
    """What one job may use. Sizes are in bytes."""

    seconds: float | None = None  # wall clock; None: no end
    memory: int | None = None  # of all its processes; None: nine tenths of what there is
    processes: int = 64  # at one time; threads do not count
    disk: int = 20 * 2**30  # what its folders may grow to, and the largest file
    output: int = 2**28  # what it may print

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "processes", "disk", "output"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"the limit {name} must be above 0, got {value}")

    @property
    def most_memory(self) -> int | None:
        return self.memory or _nine_tenths()

    def shared(self, jobs: int) -> Limits:
        """These limits for each of `jobs` at one time: memory that nobody named is divided, so that
        one that eats all of its part takes nothing from the others."""
        if self.memory is not None or jobs == 1 or (most := _nine_tenths()) is None:
            return self
        return dataclasses.replace(self, memory=most // jobs)


@functools.cache
def _nine_tenths() -> int | None:
    """Of the machine's memory, or of what a cluster or a container leaves of it."""
    found = []
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):
        groups, root = _GROUPS
        for line in groups.read_text().splitlines():
            _, names, own = line.split(":", 2)
            if "memory" in names.split(","):  # version 1
                found += _numbers(f"{root}/memory", own, "memory.limit_in_bytes")
            elif not names:
                found += _numbers(root, own, "memory.max")
    return min(found) * 9 // 10 if found else None


def _numbers(root: str, own: str, file: str) -> Iterator[int]:
    """What control groups say, the process's own and, as containers show it, the root's."""
    for place in (Path(root) / own.lstrip("/"), Path(root)):
        with suppress(OSError, ValueError):  # "max" is no number
            yield int((place / file).read_text())


def size(count: float) -> str:
    """Bytes for people: '4.0 GiB'."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def too_large(limits: Limits) -> str:
    return f"it wrote more than {size(limits.disk)}"


# -------------------------------------------------------------------------------------- the level


def level(device: str = "cpu") -> str:
    """What holds methods on this machine: "namespaces" or "limits". Tried once per process."""
    return LIMITS if _switched_off() else _tried(device.partition(":")[0])[0]


def why_not(device: str = "cpu") -> str:
    """Why the strong level is not in force, for people; '' where it is."""
    if _switched_off():
        return SWITCHED_OFF
    return _tried(device.partition(":")[0])[1]


def _switched_off() -> bool:
    return os.environ.get(OFF, "").lower() not in ("", "0", "false", "no")


@functools.cache
def _tried(kind: str) -> tuple[str, str]:
    """The level, and what stands in the way of the strong one. Builds a sandbox and leaves it."""
    if sys.platform != "linux" or not hasattr(os, "fork"):
        return LIMITS, f"{platform.system()} has no namespaces"
    command = [sys.executable, "-I", __file__, kind]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return LIMITS, f"the trial failed: {error}"
    if done.returncode == 0:
        return NAMESPACES, ""
    lines = done.stderr.strip().splitlines() or [f"the trial ended with {done.returncode}"]
    return LIMITS, lines[-1]


# --------------------------------------------------------------------------- what a job may see


@dataclass
class View:
    """What a job in namespaces sees beside the system: pairs of (path outside, path inside)."""

    reads: list[tuple[str, str]] = field(default_factory=list)
    writes: list[tuple[str, str]] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)  # folders that no other entry may bring in
    folder: str = "/tmp"  # inside: where the job starts
    gpu: bool = False

    def clear(self) -> None:
        """Forget the paths outside: the method's code could look through its own memory."""
        for each in (self.reads, self.writes, self.hidden):
            each.clear()


def view_of(
    job: Mapping[str, Any], files: Sequence[str], hidden: Sequence[str] = ()
) -> tuple[View, dict[str, Any]]:
    """The view that a job needs, and the job with its paths as they are inside.

    files: the job's keys that name input files: a path, or name -> path; None is left as it is.
    `folder` and `scratch` may be written. The files and folders of `method_files` are seen under
    their own paths, and a file of Python code can be imported; those of `registered` keep their
    last name alone.
    """
    view, told = View(gpu=str(job.get("device", "cpu")).startswith("cuda")), dict(job)
    for key in ("folder", "scratch"):
        if job.get(key):
            told[key] = f"{INSIDE}/{'job' if key == 'folder' else key}"
            view.writes.append((os.path.realpath(job[key]), told[key]))
    view.folder = told.get("folder", "/tmp")
    for key in files:
        given = job.get(key)
        if isinstance(given, Mapping):
            told[key] = {}
            for name, path in given.items():
                told[key][name] = f"{INSIDE}/in/{key}.{name}{Path(path).suffix}"
                view.reads.append((os.path.realpath(path), told[key][name]))
        elif given is not None:
            told[key] = f"{INSIDE}/in/{key}{Path(given).suffix}"
            # a part of an attempt that came to nothing may be named and not be there
            if os.path.exists(given):
                view.reads.append((os.path.realpath(given), told[key]))
    registered = list(job.get("registered", ()))  # may lie where everything else is hidden
    told["registered"] = [
        f"{INSIDE}/methods/{place}/{Path(path).name}" for place, path in enumerate(registered)
    ]
    view.reads += zip(map(os.path.realpath, registered), told["registered"], strict=True)
    told["method_files"] = [p for p in job.get("method_files", ()) if p not in registered]
    view.reads += [(os.path.realpath(p), os.path.abspath(p)) for p in told["method_files"]]
    view.hidden += [os.path.realpath(path) for path in hidden]
    return view, told


def _system(gpu: bool) -> Iterator[tuple[str, str]]:
    """What every process needs: (outside, inside)."""
    for path in ("/usr", "/bin", "/sbin", "/nix/store", *glob.glob("/lib*")):
        if os.path.exists(path):
            yield path, path
    for name in _ETC:
        if os.path.exists(f"/etc/{name}"):
            yield os.path.realpath(f"/etc/{name}"), f"/etc/{name}"
    # torch asks for the processor's cores and caches
    for path in ("/sys",) if gpu else ("/sys/devices/system/cpu", "/sys/devices/system/node"):
        if os.path.exists(path):
            yield path, path
    for place in os.environ.get("LD_LIBRARY_PATH", "").split(":"):
        if os.path.isabs(place) and os.path.isdir(place):
            yield os.path.realpath(place), place


def _code() -> Iterator[tuple[str, str]]:
    """The interpreter, its packages and this one: (outside, inside)."""
    package = str(Path(__file__).resolve().parents[1])
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sysconfig.get_path("stdlib")}
    prefixes.add(str(Path(os.path.realpath(sys.executable)).parents[1]))
    whole = {*prefixes, *(p for p in sys.path if p.endswith(("-packages", ".zip"))), package}
    with suppress(AttributeError):
        whole.add(site.getusersitepackages())
    covered = [os.path.realpath(path) for path in whole if path not in ("", "/")]
    for path in sorted(whole - {"", "/"}):
        if os.path.exists(path):
            yield os.path.realpath(path), os.path.abspath(path)
            if os.path.realpath(path) != os.path.abspath(path):
                yield os.path.realpath(path), os.path.realpath(path)
    for path in sys.path:
        real = os.path.realpath(path or ".")
        if os.path.isdir(real) and not any(_within(real, parent) for parent in covered):
            # code alone: stores and data may lie beside it, in a checkout on PYTHONPATH, say
            for name in sorted(os.listdir(real)):
                if _is_code(os.path.join(real, name)):
                    yield os.path.join(real, name), os.path.join(os.path.abspath(path), name)


def _is_code(path: str) -> bool:
    return path.endswith((".py", ".so", ".dist-info", ".egg-info")) or os.path.isfile(
        os.path.join(path, "__init__.py")
    )


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


# ------------------------------------------------------------------------------------ system calls

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT = 1, 2, 4, 8, 32
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH, _AT_RECURSIVE, _AT_FDCWD = 2, 0x8000, -100
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 36, 38, 47
_MOUNT_SETATTR = 442  # on all machines
_OWN_CALLS = {  # (pivot_root, keyctl) by machine
    "x86_64": (155, 250),
    "aarch64": (41, 219),
    "riscv64": (41, 219),
    "ppc64le": (203, 271),
    "s390x": (217, 280),
}


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _must(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    words = [None if word is None else os.fsencode(word) for word in (source, target, kind)]
    done = _libc().mount(*words, ctypes.c_ulong(flags), data.encode() or None)
    _must(done, f"mounting {target}")


def _unshare(flags: int) -> None:
    _must(_libc().unshare(flags), "namespaces")


def _prctl(option: int, value: int = 0) -> int:
    return int(_libc().prctl(option, ctypes.c_ulong(value), 0, 0, 0))


class _Attributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user")]


def _seal(path: str, flags: int) -> None:
    """Flags of a mount and of all that is mounted below it."""
    wanted = _Attributes(set=flags)
    done = _libc().syscall(
        _MOUNT_SETATTR,
        ctypes.c_long(_AT_FDCWD),
        os.fsencode(path),
        ctypes.c_long(_AT_RECURSIVE),
        ctypes.byref(wanted),
        ctypes.c_long(ctypes.sizeof(wanted)),
    )
    _must(done, f"sealing {path}")


def _map_users(uid: int, gid: int, proc: str | int) -> None:
    """In a new user namespace: this user is who it was, nobody else exists."""

    def write(name: str, text: str) -> None:
        where = {} if isinstance(proc, str) else {"dir_fd": proc}
        path = f"{proc}/self/{name}" if isinstance(proc, str) else f"self/{name}"
        stream = os.open(path, os.O_WRONLY, **where)
        try:
            os.write(stream, text.encode())
        finally:
            os.close(stream)

    write("setgroups", "deny")
    write("uid_map", f"{uid} {uid} 1")
    write("gid_map", f"{gid} {gid} 1")


# -------------------------------------------------------------------------------- the namespaces


def leave() -> bool:
    """Called by the keeper, alone in its process: what it forks next is in new namespaces, except
    for the file system, which `enter` does. Returns whether a user namespace was needed."""
    uid, gid = os.getuid(), os.getgid()
    others = _NEWPID | _NEWNET | _NEWIPC | _NEWUTS
    with suppress(OSError):
        _unshare(others)  # a privileged user keeps its rights over its own files this way
        return False
    _unshare(_NEWUSER | others)
    _map_users(uid, gid, "/proc")
    return True


def enter(view: View, user: bool) -> None:
    """Called by the first process of the new namespaces: build the root, go there, drop rights."""
    pivot, keyctl = _OWN_CALLS.get(platform.machine(), (0, 0))
    if not pivot:
        raise OSError(errno.ENOSYS, f"the system calls of {platform.machine()} are not known")
    uid, gid = os.getuid(), os.getgid()
    home = os.path.realpath(os.path.expanduser("~"))
    private = [*view.hidden, os.path.realpath(os.getcwd()), home]
    private = [path for path in private if path != "/"]
    system, code = list(_system(view.gpu)), list(_code())
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    _unshare(_NEWNS)
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=16m")
    os.chdir("/tmp")
    os.mkdir("old")
    _must(_libc().syscall(pivot, b".", b"old"), "pivot_root")
    os.chdir("/")
    sealed = _MS_NOSUID | _MS_NODEV
    for source, target in system:
        _show(source, target)
    for path in private:
        _cover(path)
    os.makedirs("/tmp", exist_ok=True)
    os.makedirs("/dev/shm", exist_ok=True)
    for place in ("/tmp", "/dev/shm"):
        _mount("tmpfs", place, "tmpfs", sealed, f"mode=1777,size={SHARED},nr_inodes={MOST_FILES}")
    for source, target in [*code, *view.reads]:
        _show(source, target)
    for path in view.hidden:
        _cover(path)
    for source, target in view.writes:
        _show(source, target, write=True)
    _devices(view.gpu)
    os.makedirs("/etc", exist_ok=True)
    for name, text in (
        ("passwd", f"arena:x:{uid}:{gid}:::/bin/sh\n"),
        ("group", f"arena:x:{gid}:\n"),
        ("hosts", "127.0.0.1 localhost\n"),
    ):
        Path("/etc", name).write_text(text)
    os.makedirs("/proc", exist_ok=True)
    _mount("proc", "/proc", "proc", sealed | _MS_NOEXEC)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    _seal("/proc", _ATTR_RDONLY)
    _must(_libc().umount2(b"/old", _MNT_DETACH), "leaving the old root")
    os.rmdir("/old")
    _mount(None, "/", None, _MS_REMOUNT | _MS_RDONLY | sealed)
    os.chdir(view.folder)
    _libc().sethostname(b"arena", ctypes.c_size_t(5))
    _libc().syscall(keyctl, ctypes.c_long(1), None)  # a session keyring of its own
    if not user:  # a privileged user becomes an ordinary one of a user namespace
        with suppress(OSError):
            _unshare(_NEWUSER)
            _map_users(uid, gid, proc)
    with suppress(OSError):  # no user namespaces below this one
        stream = os.open("sys/user/max_user_namespaces", os.O_WRONLY, dir_fd=proc)
        os.write(stream, b"0")
        os.close(stream)
    os.close(proc)
    _drop_rights()


def _show(source: str, target: str, write: bool = False) -> None:
    """Bind what lies at `source` of the old root to `target` of the new one."""
    old = f"/old{source}"
    if os.path.islink(old):  # /lib, say, where it is a part of /usr
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with suppress(FileExistsError):
            os.symlink(os.readlink(old), target)
        return
    if os.path.isdir(old):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb"):
            pass
    _mount(old, target, None, _MS_BIND | _MS_REC)
    _seal(target, _ATTR_NOSUID | _ATTR_NODEV | (0 if write else _ATTR_RDONLY))


def _cover(path: str) -> None:
    """Put an empty folder over what lies at `path`, where anything does."""
    if os.path.isdir(path) and os.listdir(path):
        _mount("tmpfs", path, "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755,size=1m")


def _devices(gpu: bool) -> None:
    paths = [f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")]
    for pattern in _NVIDIA if gpu else ():
        paths += [path.removeprefix("/old") for path in glob.glob(f"/old{pattern}")]
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb"):
            pass
        _mount(f"/old{path}", path, None, _MS_BIND)
        _mount(None, path, None, _MS_BIND | _MS_REMOUNT | _MS_NOSUID)
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        os.symlink(f"/proc/self/fd/{number}", f"/dev/{name}")
    os.symlink("/proc/self/fd", "/dev/fd")


def _drop_rights() -> None:
    _prctl(_PR_CAP_AMBIENT, 4)  # clear all
    for capability in range(64):
        if _prctl(_PR_CAPBSET_DROP, capability):
            break
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _must(_libc().capset(head, (ctypes.c_uint32 * 6)()), "dropping rights")
    _must(_prctl(_PR_SET_NO_NEW_PRIVS, 1), "no new rights")


# --------------------------------------------------------------------------------- the processes


class Ending(NamedTuple):
    """How a job's process ended, as its keeper saw it."""

    code: int | None = None  # exit code, negative for a signal; None: it was ended by its keeper
    breach: str = ""  # the limit that it broke
    peak: int | None = None  # the most memory that one of its processes had, in bytes


def keep(
    work: Callable[[], None],
    *,
    view: View | None,
    limits: Limits,
    folders: list[str],
    log: int,
    runner: int,
) -> Ending:
    """Fork a process for `work`, watch it until it ends, and end all that it has started.

    Called in a process of one thread. view: what the job sees; None: limits alone. folders: what it
    may write; log: descriptor of its log; runner: one that becomes readable when the runner dies.
    Raises OSError where namespaces cannot be had.
    """
    user = False if view is None else leave()
    with suppress(OSError, AttributeError):
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # daemons come back to their keeper
    heard, out = os.pipe()
    told, tell = os.pipe()
    first = os.fork()
    if first == 0:
        try:
            os.close(heard)
            os.close(told)
            folders.clear()
            _first(work, view, user, limits, out, tell)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(out)
    os.close(tell)
    return _Keeper(first, view is not None, limits, folders, log, runner).watch(heard, told)


def _first(
    work: Callable[[], None], view: View | None, user: bool, limits: Limits, out: int, tell: int
) -> None:
    """The job's process itself, or in namespaces the one that starts it and sweeps up."""
    os.setsid()
    with suppress(OSError, AttributeError):
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (1, 2):
        os.dup2(out, number)
    if view is None:
        os.close(tell)
        _work(work, limits)
        return
    try:
        enter(view, user)
        view.clear()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # changed rights may have undone it
    except OSError as error:
        os.write(tell, json.dumps({"refused": str(error.strerror or error)}).encode())
        return
    child = os.fork()
    if child == 0:
        os.close(tell)
        try:
            _work(work, limits)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _prctl(_PR_SET_DUMPABLE, 0)  # nobody inside looks into this process
    for number in range(3):  # nor waits for it to end its output
        os.close(number)
    os.close(out)
    while True:
        ended, status = os.wait()
        if ended == child:
            break
    os.write(tell, json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
    os._exit(0)


def _work(work: Callable[[], None], limits: Limits) -> None:
    _set_limits(limits)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    work()


def _set_limits(limits: Limits) -> None:
    import resource

    wanted = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, limits.disk)]
    if os.getuid() != 0 and hasattr(resource, "RLIMIT_NPROC"):
        # counts the threads of the user, and never those of root
        wanted.append((resource.RLIMIT_NPROC, _threads_of_user() + limits.processes + 1024))
    for what, value in wanted:
        with suppress(OSError, ValueError):
            most = resource.getrlimit(what)[1]
            value = value if most == resource.RLIM_INFINITY else min(value, most)
            resource.setrlimit(what, (value, value))


def _threads_of_user() -> int:
    count, uid = 0, os.getuid()
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            with suppress(OSError):
                if os.stat(f"/proc/{name}").st_uid == uid:
                    count += len(os.listdir(f"/proc/{name}/task"))
    return count


def close_all_but(kept: Sequence[int]) -> None:
    """Close every descriptor but these: the server's pipes are no business of a method."""
    try:
        most = max(map(int, os.listdir("/proc/self/fd"))) + 1
    except (OSError, ValueError):
        most = min(os.sysconf("SC_OPEN_MAX"), 65536)
    low = 0
    for number in (*sorted(kept), most):
        if low < number:  # Python 3.11 takes an empty range that starts at 0 for everything
            os.closerange(low, number)
        low = number + 1


def forget_origin(folder: str, temporary: str) -> None:
    """Leave nothing of the runner's command line and of most of its environment in this process:
    both tell what is being compared, and the second may hold somebody's keys."""
    kept = {name: value for name, value in os.environ.items() if _KEPT_VARIABLES.fullmatch(name)}
    for name in list(os.environ):
        del os.environ[name]
    with suppress(OSError, ValueError, IndexError):
        # the originals, which /proc/self/environ and /proc/self/cmdline show
        text = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        for start, end in (text[45:47], text[47:49]):
            if 0 < int(start) < int(end):
                ctypes.memset(int(start), 0, int(end) - int(start))
    os.environ.update(kept | {"HOME": folder, "TMPDIR": temporary, "USER": "arena"})
    sys.argv[:] = [""]
    multiprocessing.current_process().authkey = b""  # opens the runner's own pipes
    frame = sys._getframe()
    while (above := frame.f_back) is not None:
        frame = above
        if isinstance(found := frame.f_locals.get("preparation_data"), dict):
            found.clear()  # how the runner was started, and where


class _Keeper:
    """Watches one job from outside; everything here is beyond the job's reach in namespaces."""

    def __init__(
        self,
        first: int,
        inside: bool,
        limits: Limits,
        folders: Sequence[str],
        log: int,
        runner: int,
    ) -> None:
        self.first, self.inside, self.limits = first, inside, limits
        self.folders, self.log, self.runner = folders, log, runner
        self.printed, self.tail = 0, deque[bytes]()
        self.next_tick = self.next_disk = 0.0
        self.tick = SOON

    def watch(self, heard: int, told: int) -> Ending:
        ended, breach, code = False, "", None
        woken, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.signal(signal.SIGTERM, _raise_stopped)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)  # the end of a child ends `select`
        waiting = [heard, self.runner, told if self.inside else woken]
        try:
            if not self.inside:  # it may be over already
                ended, code = self._ended()
            while not (ended or breach):
                ready, _, _ = select.select(waiting, (), (), self.tick)
                if self.runner in ready:
                    raise _Stopped
                if heard in ready:
                    self._copy(heard)
                if told in ready:  # what the first process inside has to say, or its sudden end
                    found = json.loads(os.read(told, 4096) or b"{}")
                    if "refused" in found:
                        raise OSError(errno.EPERM, found["refused"])
                    ended, code = True, found.get("code")
                if not self.inside:
                    ended, code = self._ended()
                breach = self._breach()
        except _Stopped:
            code = None
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.set_wakeup_fd(-1)
            last = self._end_all()
        if ended and code is None:
            code = last
        self._drain(heard)
        if not breach and self.printed > self.limits.output:
            breach = self._printed_too_much()
        self._close_log()
        return Ending(None if breach else code, breach, _peak())

    def _ended(self) -> tuple[bool, int | None]:
        if not self.first:
            return True, None
        pid, status = os.waitpid(self.first, os.WNOHANG)
        if not pid:
            return False, None
        self.first = 0
        return True, os.waitstatus_to_exitcode(status)

    def _end_all(self) -> int | None:
        """Kill the job and all that it left behind, and wait until they are gone."""
        code = None
        if self.first:
            with suppress(ProcessLookupError):
                os.kill(self.first, signal.SIGKILL)  # in namespaces this ends them all
        if not self.inside and self.first:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.first, signal.SIGKILL)
        if self.first:
            with suppress(ChildProcessError):
                code = os.waitstatus_to_exitcode(os.waitpid(self.first, 0)[1])
        end = time.monotonic() + 5
        while time.monotonic() < end:  # daemons, which are this process's children by now
            for pid in tree(os.getpid()):
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break
            time.sleep(0.01)
        return code

    # ------------------------------------------------------------------------------------- limits

    def _breach(self) -> str:
        now, limits = time.monotonic(), self.limits
        if self.printed > limits.output:
            return self._printed_too_much()
        if now < self.next_tick:
            return ""
        found = tree(os.getpid())
        if self.inside:
            found.pop(self.first, None)
        self.tick = min(TICK, 2 * self.tick)
        self.next_tick = time.monotonic() + max(self.tick, 5 * (time.monotonic() - now))
        if len(found) > limits.processes:
            return f"it had more than {limits.processes} processes"
        most = limits.most_memory
        if most is not None and sum(found.values()) > most:
            exact = sum(_share(pid, rough) for pid, rough in found.items())
            if exact > most:
                return f"it used more than {size(most)} of memory"
        if now >= self.next_disk:
            used, files = _used(self.folders)
            self.next_disk = time.monotonic() + max(DISK_TICK, 10 * (time.monotonic() - now))
            if used > limits.disk:
                return too_large(limits)
            if files > MOST_FILES:
                return f"it wrote more than {MOST_FILES} files"
        return ""

    def _printed_too_much(self) -> str:
        return f"it printed more than {size(self.limits.output)}"

    # ----------------------------------------------------------------------------------- its log

    def _copy(self, heard: int) -> bool:
        text = os.read(heard, 2**16)
        head = max(0, HEAD - self.printed)
        self.printed += len(text)
        with suppress(OSError):  # a full disk: the log is the least loss
            if text[:head]:
                os.write(self.log, text[:head])
        if text[head:]:
            self.tail.append(text[head:])
            while sum(map(len, self.tail)) - len(self.tail[0]) > TAIL:
                self.tail.popleft()
        return bool(text)

    def _drain(self, heard: int) -> None:
        os.set_blocking(heard, False)
        with suppress(BlockingIOError):
            while self.printed <= self.limits.output + HEAD and self._copy(heard):
                pass

    def _close_log(self) -> None:
        last = b"".join(self.tail)
        missing = self.printed - HEAD - len(last)
        with suppress(OSError):
            if missing > 0:
                os.write(self.log, f"\n[{size(missing)} of output are left out]\n".encode())
            os.write(self.log, last)


class _Stopped(Exception):
    pass


def _raise_stopped(number: int, frame: object) -> None:
    raise _Stopped


def tree(root: int) -> dict[int, int]:
    """The processes that `root` started, and theirs: id -> resident bytes."""
    if not os.path.isdir("/proc/self/task"):
        return _listed(root)
    found: dict[int, int] = {}
    waiting = [root]
    page = os.sysconf("SC_PAGE_SIZE")
    while waiting:
        pid = waiting.pop()
        with suppress(OSError, ValueError, IndexError):
            if pid != root:
                found[pid] = int(_read(f"/proc/{pid}/statm").split()[1]) * page
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                with suppress(OSError):
                    children = _read(f"/proc/{pid}/task/{thread}/children")
                    waiting += [child for child in map(int, children.split()) if child not in found]
    return found


def _listed(root: int) -> dict[int, int]:
    """The same by `ps`, where there is no /proc."""
    done = subprocess.run(
        ["ps", "-axo", "pid=,ppid=,rss="], capture_output=True, text=True, check=False
    )
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    found: dict[int, int] = {}
    waiting = [root]
    while waiting:
        parent = waiting.pop()
        for pid, above, kib in rows:
            if above == parent and pid not in found:
                found[pid] = kib * 1024
                waiting.append(pid)
    return found


def _share(pid: int, rough: int) -> int:
    """Bytes of a process where pages that several have count in parts."""
    with suppress(OSError, ValueError, IndexError):
        for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return rough


def _read(path: str) -> str:
    with open(path) as stream:
        return stream.read()


def _used(folders: Sequence[str]) -> tuple[int, int]:
    """Bytes on disk and number of files below the folders; links are not followed."""
    total, files = 0, 0
    waiting = [os.fspath(folder) for folder in folders]
    while waiting:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                files += 1
                if files > MOST_FILES:
                    return total, files
                with suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total, files


def _peak() -> int | None:
    with suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    return None


# ----------------------------------------------------------------------------------- the trial


def _trial(kind: str) -> None:
    """Build a whole sandbox for a process that does nothing; with a GPU it asks the driver."""

    def work() -> None:
        if kind == "cuda":
            driver = ctypes.CDLL("libcuda.so.1")
            if driver.cuInit(0) != 0:
                os._exit(3)
        os._exit(0)

    quiet = os.open(os.devnull, os.O_RDWR)
    never, _ = os.pipe()
    view = View(gpu=kind == "cuda")
    ending = keep(work, view=view, limits=Limits(), folders=[], log=quiet, runner=never)
    if ending.code != 0:
        raise OSError(errno.ENODEV, "the GPU cannot be used in namespaces")


if __name__ == "__main__":
    try:
        _trial(sys.argv[1])
    except OSError as error:
        sys.exit(error.strerror or str(error))
