"""Progress without printing: long work reports, whoever runs it decides what to show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
Reporter = Callable[[str, float, float, dict[str, float]], None]

_reporter: Reporter | None = None


def report(what: str, done: float, total: float, **figures: float) -> None:
    """Say that `done` of `total` units of `what` are finished; silent when nobody listens."""
    if _reporter is not None:
        _reporter(what, done, total, figures)


def track(items: Iterable[T], what: str) -> Iterator[T]:
    """Iterate over a sized iterable and report after each item."""
    total = len(items) if isinstance(items, Sized) else 0
    for done, item in enumerate(items, start=1):
        yield item
        report(what, done, total)


@contextmanager
def listening(reporter: Reporter | None) -> Iterator[None]:
    """Inside, `reporter(what, done, total, figures)` receives every report."""
    global _reporter
    before, _reporter = _reporter, reporter
    try:
        yield
    finally:
        _reporter = before


@contextmanager
def ending(what: str, total: float) -> Iterator[None]:
    """Inside, reports of `what` are of `total` units: it ends there, before its loop does."""
    listener = _reporter

    def cut(name: str, done: float, whole: float, figures: dict[str, float]) -> None:
        if listener is not None:
            ends = name == what
            listener(name, min(done, total) if ends else done, total if ends else whole, figures)

    with listening(cut):
        yield
