"""What a user reads while a run goes on."""

from __future__ import annotations

import pytest

from arena.watch import Lines, duration, outcome


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_outcomes_say_what_happened() -> None:
    metrics = {"acc": 0.9, "acc_before": 0.92, "asr": 0.05, "asr_before": 1.0}
    good = {"status": "ok", "reason": "", "metrics": metrics}
    assert outcome({"error": "", "record": good}) == "ACC 92.0% -> 90.0%, ASR 100.0% -> 5.0%"
    assert outcome({"error": "", "record": {**good, "status": "collapsed"}}).endswith("[collapsed]")
    measures = {"pgd:eps=8": {"name": "pgd", "status": "failed", "reason": "out of memory"}}
    text = outcome({"error": "", "record": {**good, "measures": measures}})
    assert text.endswith("ASR 100.0% -> 5.0% [pgd failed: out of memory]")
    measures["pgd:eps=8"]["status"] = "ok"
    assert outcome({"error": "", "record": {**good, "measures": measures}}).endswith("5.0%")
    lost = {"status": "timeout", "reason": "it did not end within 9 seconds", "metrics": {}}
    assert outcome({"error": "", "record": lost}) == "timeout: it did not end within 9 seconds"
    assert outcome({"error": "out of memory", "record": None}) == "failed: out of memory"
    assert outcome({"error": "", "record": None}) == "trained"


def test_time_left_corrects_the_estimates(capsys, monkeypatch) -> None:
    """Work that takes twice as long as estimated doubles what is left."""
    now = [100.0]
    monkeypatch.setattr("arena.watch.time.monotonic", lambda: now[0])
    lines = Lines()
    lines.on_event({"type": "plan", "seconds": 40.0, "cells": 4, "cached": 1})
    now[0] += 20
    done = {"type": "finished", "name": "patch", "seconds": 10.0, "record": None, "error": ""}
    lines.on_event(done)
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith("4 cells to do, 1 done before, about 40 s")
    assert told[1].endswith("patch: trained (about 1 min 00 s left)")
