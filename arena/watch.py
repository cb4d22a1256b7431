"""What a user sees while something goes on, and the table at the end of a run."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

_OFTEN = 30.0  # seconds between two lines of a log


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


class Pace:
    """How far some work is, which goes through phases, one after the other, each with a name."""

    def __init__(self) -> None:
        self.started = self._first = self._last = time.monotonic()
        self.what, self.share, self._share = "", 0.0, 0.0  # now, and when the phase first told
        self._figures: dict[str, float] = {}

    def goes_on(
        self, what: str, done: float, total: float, figures: Mapping[str, float] | None = None
    ) -> None:
        share, self._last = min(1.0, done / total) if total else 0.0, time.monotonic()
        if what != self.what or share < self.share:  # the next phase
            self.what, self._first, self._share, self._figures = what, self._last, share, {}
        self.share = share
        self._figures.update(figures or {})

    @property
    def elapsed(self) -> float:
        """Seconds since the work began."""
        return self._last - self.started

    @property
    def left(self) -> float | None:
        """Seconds that the phase will still take, by its pace since it first told: what was before
        may have been a process's start. None: not known yet."""
        made = self.share - self._share
        return (self._last - self._first) / made * (1 - self.share) if made else None

    @property
    def figures(self) -> str:
        """The loss, and the accuracy on the clean images that a method holds out."""
        told = []
        if (loss := self._figures.get("loss")) is not None:
            told.append(f"loss {loss:.3f}")
        if (accuracy := self._figures.get("accuracy")) is not None:
            told.append(f"held-out accuracy {accuracy:.1%}")
        return ", ".join(told)

    def __str__(self) -> str:
        parts = [f"{self.what} {self.share:.0%}", self.figures]
        if self.left:
            parts.append(f"about {duration(self.left)} left")
        return ", ".join(part for part in parts if part)


class _Clock:
    """Time left of a run: the estimates of what is open, corrected by how good they were so far."""

    def __init__(self) -> None:
        self.total, self.done, self.started = 0.0, 0.0, time.monotonic()

    def left(self, under_way: float = 0.0) -> float | None:
        """under_way: seconds of the estimates, as `Lines.under_way`."""
        done = self.done + under_way
        if done <= 0.02 * self.total:
            return self.total or None
        return (time.monotonic() - self.started) / done * max(0.0, self.total - done)


class Lines:
    """Plain lines on standard error, for logs: one per finished task, and now and then one of what
    is under way, with the time left."""

    def __init__(self) -> None:
        self.clock = _Clock()
        self.paces: dict[str, tuple[Pace, float]] = {}  # of the tasks under way, their estimates
        self._lock = threading.Lock()
        self._told: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def on_event(self, event: dict[str, Any]) -> None:
        with self._lock:
            self._event(event)

    @property
    def under_way(self) -> float:
        """Of the estimates of what is being done the part that is done: what the estimates say,
        but no more than the phases show."""
        found = 0.0
        for pace, estimate in self.paces.values():
            if pace.left is not None:
                share = pace.elapsed / max(pace.elapsed + pace.left, 1e-9)
                found += min(pace.elapsed, estimate * share)
        return found

    def left(self) -> float | None:
        """Seconds until the run ends, by its own pace."""
        return self.clock.left(self.under_way)

    def _event(self, event: dict[str, Any]) -> None:
        name = event.get("name", "")
        match event["type"]:
            case "plan":
                self.clock.total = event["seconds"]
                self._say(
                    f"{event['cells']} cells to do, {event['cached']} done before, "
                    f"about {duration(event['seconds'])}"
                )
            case "started":
                self.paces[name] = Pace(), event["seconds"]
            case "progress" if name in self.paces:
                pace, _ = self.paces[name]
                pace.goes_on(event["what"], event["done"], event["total"], event["figures"])
                self._under_way(name, pace)
            case "finished":
                self.paces.pop(name, None)
                self.clock.done += event["seconds"]
                self._say(f"{name}: {outcome(event)}{self._in_all()}")

    def _under_way(self, name: str, pace: Pace) -> None:
        now = time.monotonic()
        if now - self._told.setdefault(name, pace.started) >= _OFTEN:
            self._told[name] = now
            self._say(f"{name}: {pace}{self._in_all()}")

    def _in_all(self) -> str:
        left = self.left()
        return f" (the run: about {duration(left)} left)" if left else ""

    def _say(self, text: str) -> None:
        _print(text)


class Bars(Lines):
    """Two bars in a terminal: the matrix with the time left, and the work at hand."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self.bar = Progress(
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self.whole = self.bar.add_task("matrix", total=None, note="")
        self.parts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def _event(self, event: dict[str, Any]) -> None:
        super()._event(event)
        name = event.get("name", "")
        match event["type"]:
            case "plan":
                self.bar.update(self.whole, total=max(event["seconds"], 1e-9))
            case "started":
                self.parts[name] = self.bar.add_task(name, total=None, note="")
            case "finished" if name in self.parts:
                self.bar.remove_task(self.parts.pop(name))
        left = self.left()
        self.bar.update(
            self.whole,
            completed=self.clock.done + self.under_way,
            note=f"about {duration(left)} left" if left else "",
        )

    def _under_way(self, name: str, pace: Pace) -> None:
        self.bar.update(self.parts[name], completed=pace.share, total=1.0, note=_note(pace))

    def _say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)


@contextmanager
def status(what: str) -> Iterator[None]:
    """A progress bar, or plain lines, for work that reports through arena.core.progress."""
    from arena.core import progress

    if not sys.stderr.isatty():
        with progress.listening(_Now()):
            yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    bar = Progress(
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    )
    pace = Pace()
    with bar:
        task = bar.add_task(what, total=None)

        def show(what: str, done: float, total: float, figures: dict[str, float]) -> None:
            pace.goes_on(what, done, total, figures)
            bar.update(task, description=_note(pace), completed=pace.share, total=1.0)

        with progress.listening(show):
            yield


class _Now:
    """A line on standard error now and then for long work, with its share and the time left."""

    def __init__(self) -> None:
        self.pace = Pace()
        self._told = self.pace.started

    def __call__(self, what: str, done: float, total: float, figures: dict[str, float]) -> None:
        self.pace.goes_on(what, done, total, figures)
        if self.pace.share and (now := time.monotonic()) - self._told >= _OFTEN:
            self._told = now
            _print(str(self.pace))


def _note(pace: Pace) -> str:
    """Beside a bar, which shows the share."""
    left = f"about {duration(pace.left)} left" if pace.left else ""
    return ", ".join(part for part in (pace.what, pace.figures, left) if part)


def _print(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def outcome(event: dict[str, Any]) -> str:
    """What came out of a task, in a few words."""
    if event["error"]:
        return f"failed: {event['error']}"
    record = event["record"]
    if record is None:
        return "trained"
    metrics = record["metrics"]
    if metrics.get("acc") is None:
        return f"{record['status']}: {record['reason']}"
    text = f"ACC {metrics['acc_before']:.1%} -> {metrics['acc']:.1%}"
    if metrics.get("asr") is not None:
        text += f", ASR {metrics['asr_before']:.1%} -> {metrics['asr']:.1%}"
    notes = [record["status"]] if record["status"] != "ok" else []
    measures = record.get("measures") or {}
    notes += [
        f"{e['name']} failed: {e['reason']}" for e in measures.values() if e["status"] != "ok"
    ]
    return " ".join([text, *(f"[{note}]" for note in notes)])


def print_table(rows: list[dict[str, Any]]) -> None:
    """The leaderboard, and the cells behind it, on standard output."""
    from rich.console import Console

    from arena.report import tables

    console = Console(width=None if sys.stdout.isatty() else 160)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in tables.CONTEXT), []).append(row)
    if not groups:
        print("There are no rows yet.")
    for group in groups.values():
        if any(map(tables.is_attacked, group)):
            console.print("\nDefenses, over all attacks:", style="bold")
            console.print(tables.render(tables.leaderboard(group), "table"))
            console.print("\nEvery attack and defense, over seeds:", style="bold")
            console.print(tables.render(tables.cells(group), "table"))
        clean = tables.unattacked(group)
        if len(clean):
            console.print("\nWithout a backdoor, the clean twin:", style="bold")
            console.print(tables.render(clean, "table"))
        weak = tables.not_established(group)
        if len(weak):
            console.print("\nAttack not established (not counted above):", style="bold")
            console.print(tables.render(weak, "table"))
        broken = tables.failures(group)
        if len(broken):
            console.print("\nCollapsed, failed or not run:", style="bold")
            console.print(tables.render(broken, "table"))
