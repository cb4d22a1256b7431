"""What a user reads while a run goes on."""

from __future__ import annotations

import pytest

from arena.core.progress import report
from arena.watch import Bars, Lines, Pace, duration, outcome, status


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


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless it is set."""
    found = [100.0]
    monkeypatch.setattr("arena.watch.time.monotonic", lambda: found[0])
    return found


def progress(name: str, what: str, done: float, total: float = 10, **figures: float) -> dict:
    told = {"what": what, "done": done, "total": total, "figures": figures}
    return {"type": "progress", "name": name, **told}


def test_time_left_corrects_the_estimates(capsys, now) -> None:
    """Work that takes twice as long as estimated doubles what is left."""
    lines = Lines()
    lines.on_event({"type": "plan", "seconds": 40.0, "cells": 4, "cached": 1})
    now[0] += 20
    done = {"type": "finished", "name": "patch", "seconds": 10.0, "record": None, "error": ""}
    lines.on_event(done)
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith("4 cells to do, 1 done before, about 40 s")
    assert told[1].endswith("patch: trained (the run: about 1 min 00 s left)")


def test_phases_have_paces_of_their_own(now) -> None:
    pace = Pace()
    now[0] += 10  # a process starts
    pace.goes_on("teacher", 1, 4, {"loss": 0.5})
    assert (pace.left, str(pace)) == (None, "teacher 25%, loss 0.500"), "once tells no pace"
    now[0] += 20
    pace.goes_on("teacher", 2, 4)
    assert (pace.left, str(pace)) == (40, "teacher 50%, loss 0.500, about 40 s left")
    now[0] += 45
    pace.goes_on("student", 1, 5, {"accuracy": 0.915, "epoch": 1})
    now[0] += 5
    pace.goes_on("student", 2, 5)
    assert str(pace) == "student 40%, held-out accuracy 91.5%, about 15 s left"
    assert pace.elapsed == 80
    now[0] += 3
    pace.goes_on("student", 0, 5)
    assert (pace.left, str(pace)) == (None, "student 0%"), "the same again is another phase"


def test_work_under_way_corrects_the_estimates(capsys, now) -> None:
    """A run whose first cell takes far longer than thought says so before that ends."""
    lines = Lines()
    lines.on_event({"type": "plan", "seconds": 600.0, "cells": 2, "cached": 0})
    lines.on_event({"type": "started", "name": "deck", "seconds": 300.0})
    lines.on_event(progress("deck", "hardening", 0))
    now[0] += 20
    lines.on_event(progress("deck", "hardening", 1))
    now[0] += 580
    lines.on_event(progress("deck", "hardening", 2, loss=0.25))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2, "after 20 seconds there is nothing to tell"
    left = "about 40 min 00 s left (the run: about 1 h 30 min left)"
    assert told[1].endswith(f"deck: hardening 20%, loss 0.250, {left}")
    # a phase that ends soon does not mean that the task does: its estimate tells more
    lines.on_event({"type": "started", "name": "nad", "seconds": 300.0})
    lines.on_event(progress("nad", "teacher", 0))
    now[0] += 10
    lines.on_event(progress("nad", "teacher", 9))
    assert lines.under_way == pytest.approx(60 + 10)
    assert lines.left() == pytest.approx(610 / 70 * (600 - 70))


def test_bars_say_how_far_the_work_at_hand_is(now, capsys) -> None:
    with Bars() as bars:
        bars.on_event({"type": "plan", "seconds": 600.0, "cells": 2, "cached": 0})
        bars.on_event({"type": "started", "name": "deck", "seconds": 300.0})
        bars.on_event(progress("deck", "hardening", 0))
        now[0] += 600
        bars.on_event(progress("deck", "hardening", 2, accuracy=0.9))
        whole, part = bars.bar.tasks
        assert (whole.percentage, whole.fields["note"]) == (10, "about 1 h 30 min left")
        note = "hardening, held-out accuracy 90.0%, about 40 min 00 s left"
        assert (part.description, part.percentage, part.fields["note"]) == ("deck", 20, note)
        done = {"type": "finished", "name": "deck", "seconds": 300.0, "record": None, "error": ""}
        bars.on_event(done)
        assert len(bars.bar.tasks) == 1
    assert "hardening" not in capsys.readouterr().err, "bars need no lines beside them"


def test_long_work_tells_its_share_and_the_time_left(capsys, now) -> None:
    with status("repairing"):
        for seconds, done in ((10, 1), (30, 4), (1, 5)):  # a line at 4
            now[0] += seconds
            report("the gan", done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, "one in 30 seconds"
    assert lines[0].endswith("the gan 40%, about 1 min 00 s left")
