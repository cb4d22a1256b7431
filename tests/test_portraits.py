"""Figures from a store: drawn where their inputs are, named with a reason where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from arena import portraits
from arena.data import load
from arena.report.page import Drawing
from arena.store import Store

NAME = "signs:classes=5,size=600"
VICTIM, REPAIRED, BEFORE, AFTER = (letters * 32 for letters in ("ab", "cd", "ef", "01"))


@pytest.fixture
def store(tmp_path) -> Store:
    made = Store(tmp_path / "store")
    made.create()
    reading = {"x": torch.zeros(1)}
    made.save(BEFORE, {"reading": reading}, {"each": [[0, 1, 5.0], [1, 0, None]]})
    made.save(AFTER, {"reading": reading}, {"each": [[0, 1, 8.0], [1, 0, 3.0]]})
    made.save(VICTIM, {"weights": reading}, {"losses": [[1, 2.0], [2, 0.5]]})
    return made


def record(**changes: Any) -> dict:
    base = {
        "key": REPAIRED,
        "attack": {"name": "patch", "short": "patch", "spec": "patch:target=0"},
        "defense": {"name": "moth", "short": "moth"},
        "dataset": {"name": NAME, "classes": ["stop", "yield", "turn", "go", "left"]},
        "model": "fastnet_tiny",
        "seed": 0,
        "parents": {"victim": VICTIM},
        "measures": {
            "class_distance": {
                "name": "class_distance",
                "status": "ok",
                "before": {"artifact": BEFORE},
                "after": {"artifact": AFTER},
                "columns": {"distance_unit": "mask L1 (nc)"},
            }
        },
    }
    return base | changes


def test_readings_become_a_matrix_with_holes(store: Store) -> None:
    matrix = portraits._matrix(store.artifact(BEFORE), 2)
    assert matrix == [[None, 5.0], [None, None]]
    assert portraits._matrix(None, 2) is None


def test_what_a_store_holds_is_drawn_and_the_rest_has_its_reason(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def maps(name: str, title: str, before: Any, after: Any, *rest: Any) -> Drawing:
        seen.update(title=title, before=before, after=after, rest=rest)
        return Drawing(name, title, "", b"", b"", 1, 1)

    def curves(losses: Any) -> Drawing:
        seen["losses"] = losses
        return Drawing("curves", "", "", b"", b"", 1, 1)

    monkeypatch.setattr("arena.report.figures.distance_maps", maps)
    monkeypatch.setattr("arena.report.figures.curves", curves)
    monkeypatch.setattr(portraits, "_loaded", lambda records, folder: {NAME: "no such data"})
    drawn, absent = portraits.portray(store, [record()])
    assert [drawing.name for drawing in drawn] == ["curves", "distances-1"]
    assert seen["losses"] == {"patch, seed 0, fastnet_tiny": [(1.0, 2.0), (2.0, 0.5)]}
    assert (seen["before"][0][1], seen["after"][0][1]) == (5.0, 8.0)
    assert "moth against patch" in seen["title"]
    assert dict(absent) == {
        "ASR by class": "no such data",
        "feature maps": "no attacked victim of this store kept its weights",
    }
    bare, why = portraits.portray(Store(store.root.parent / "other"), [record(measures={})])
    assert bare == []
    assert {"training curves", "class distances"} <= dict(why).keys()


def test_asr_by_class_counts_each_class_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(NAME)
    y = data.test.y
    fooled = torch.where(y == 1, 0, y)  # class 1 goes to the target, the others stay
    store.save(REPAIRED, {"predictions": {"clean": y, "triggered": fooled.short()}}, {})
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "arena.report.figures.per_class",
        lambda shares, names: seen.update(shares) or Drawing("x", "", "", b"", b"", 1, 1),
    )
    monkeypatch.setattr(portraits, "_loaded", lambda records, folder: {NAME: data})
    portraits._classes(store, [record()], portraits._victims(store, [record()]), None)
    assert seen == {"patch × moth": [None, 1.0, 0.0, 0.0, 0.0]}


def test_maps_are_drawn() -> None:
    from arena.report import figures

    holes = [[None, 5.0], [3.0, None]]
    for drawing in (
        figures.distance_maps("d", "t", holes, [[None] * 2] * 2, ["a", "$b"], "mask"),
        figures.per_class({"patch × none": [None, 1.0]}, ["a", "b"]),
        figures.curves({"patch": [(1, 0.5), (2, 0.1)]}),
        figures.feature_map(
            "f", "t", "c", {"deep": ([[0, 1], [1, 0]], [0, 1], [False, True])}, ["a", "b"], 0
        ),
    ):
        assert drawing.png.startswith(b"\x89PNG")
        assert drawing.width > 200
