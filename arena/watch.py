"""What a user sees while a run goes on, and the table at its end."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


class _Clock:
    """Time left: the estimates of what is open, corrected by how good they were so far."""

    def __init__(self) -> None:
        self.total, self.done, self.started = 0.0, 0.0, time.monotonic()

    def left(self, under_way: float = 0.0) -> float | None:
        done = self.done + under_way
        if done <= 0.02 * self.total:
            return self.total or None
        return (time.monotonic() - self.started) / done * max(0.0, self.total - done)


class Lines:
    """Plain lines on standard error, for logs: one per finished task, with the time left."""

    def __init__(self) -> None:
        self.clock = _Clock()
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

    def _event(self, event: dict[str, Any]) -> None:
        match event["type"]:
            case "plan":
                self.clock.total = event["seconds"]
                self._say(
                    f"{event['cells']} cells to do, {event['cached']} done before, "
                    f"about {duration(event['seconds'])}"
                )
            case "progress":
                now = time.monotonic()
                if now - self._told.setdefault(event["name"], now) >= 30:
                    self._told[event["name"]] = now
                    self._say(f"{event['name']}: {_share(event)}")
            case "finished":
                self.clock.done += event["seconds"]
                left = self.clock.left()
                self._say(
                    f"{event['name']}: {outcome(event)}"
                    + (f" (about {duration(left)} left)" if left else "")
                )

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


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
        self.parts: dict[str, tuple[Any, float]] = {}

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
                self.parts[name] = (self.bar.add_task(name, total=None, note=""), 0.0)
            case "progress" if name in self.parts:
                loss = event["figures"].get("loss")
                note = event["what"] + (f", loss {loss:.3f}" if loss is not None else "")
                self.bar.update(
                    self.parts[name][0],
                    completed=event["done"],
                    total=event["total"],
                    note=note,
                )
            case "finished":
                if name in self.parts:
                    self.bar.remove_task(self.parts.pop(name)[0])
        left = self.clock.left()
        self.bar.update(
            self.whole,
            completed=self.clock.done,
            note=f"about {duration(left)} left" if left else "",
        )

    def _say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)


def _share(event: dict[str, Any]) -> str:
    share = event["done"] / event["total"] if event["total"] else 0.0
    return f"{event['what']} {share:.0%}"


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
        console.print("\nDefenses, over all attacks:", style="bold")
        console.print(tables.render(tables.leaderboard(group), "table"))
        console.print("\nEvery attack and defense, over seeds:", style="bold")
        console.print(tables.render(tables.cells(group), "table"))
        weak = tables.not_established(group)
        if len(weak):
            console.print("\nAttack not established (not counted above):", style="bold")
            console.print(tables.render(weak, "table"))
        broken = tables.failures(group)
        if len(broken):
            console.print("\nCollapsed, failed or not run:", style="bold")
            console.print(tables.render(broken, "table"))
