"""`arena repair`: one suspicious model, several repairs, one recommended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import arena, assert_refused
from test_foreign import NET

from arena.core import foreign, models
from arena.core.seeding import stream
from arena.repairing import recommended

SIGNS = "signs:size=400,classes=5"
FEW = ("--device", "cpu", "--clean-share", 0.3)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A network's bare weights, as its maker's code would save them."""
    network = models.build("fastnet_small", 5, (3, 32, 32), stream(0, "foreign"))
    save_file(network.body.state_dict(), tmp_path / "mine.safetensors")
    return tmp_path / "mine.safetensors"


def row(defense: str, accuracy: float, **scan) -> dict:
    found = {"defense": defense, "status": "ok", "accuracy": accuracy}
    found["accuracy_drop"] = 0.9 - accuracy
    return found | ({"scan": {"backdoored": False, "score": 1.0, **scan}} if scan else {})


BEFORE = {"accuracy": 0.9}
SUSPECT = BEFORE | {"scan": {"backdoored": True, "score": 5.0}}


@pytest.mark.parametrize(
    ("before", "rows", "chosen", "why"),
    [
        (BEFORE, [row("a", 0.86), row("b", 0.88)], "b", "without --scan nothing is known"),
        (BEFORE, [row("a", 0.80)], None, "costs more than 5 points"),
        (
            SUSPECT,
            [row("a", 0.89, backdoored=True, score=4.0), row("b", 0.86, score=0.5),
             row("c", 0.87, score=1.5)],
            "b",
            "suspicion is gone",
        ),
        (SUSPECT, [row("a", 0.7, score=0.1), row("b", 0.86, score=1.9)], "b", "is gone"),
        (SUSPECT, [row("a", 0.89, backdoored=True)], None, "still suspects"),
        (
            BEFORE | {"scan": {"backdoored": False, "score": 1.0}},
            [row("a", 0.86, score=0.1), row("b", 0.88, score=0.9)],
            "b",
            "no repair may be needed",
        ),
        (BEFORE, [{"defense": "x", "status": "failed"}, row("a", 0.85)], "a", "costs least"),
    ],
)  # fmt: skip
def test_what_is_recommended(before, rows, chosen, why):
    assert recommended(before, rows, 0.05)[0] == chosen
    assert why in recommended(before, rows, 0.05)[1]


def test_weights_come_back_as_they_were_named(weights, tmp_path):
    out = tmp_path / "repaired.safetensors"
    done = arena("repair", "--checkpoint", weights, "-m", "fastnet_small", "-d", SIGNS, *FEW,
                 "-D", "random_prune:share=0.1", "-D", "finetune:epochs=1", "-o", out,
                 "--max-drop", 1, "--store", tmp_path / "s", "--json")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    before, after = load_file(weights), load_file(out)
    assert before.keys() == after.keys()
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert [one["status"] for one in found["repairs"]] == ["ok", "ok"]
    assert found["recommended"] in ("random_prune:share=0.1", "finetune:epochs=1")
    chosen = next(one for one in found["repairs"] if one["defense"] == found["recommended"])
    again = arena("repair", "--checkpoint", out, "-m", "fastnet_small", "-d", SIGNS, *FEW,
                  "-D", "none", "-o", tmp_path / "again.safetensors", "--json",
                  "--store", tmp_path / "s")  # fmt: skip
    assert json.loads(again.out)["before"]["accuracy"] == pytest.approx(chosen["accuracy"])
    page = (tmp_path / "repaired.md").read_text()
    assert f"**{found['recommended']}**" in page
    assert found["weights"] in page


def test_a_cell_is_scanned_and_a_repair_that_cannot_be_is_a_row(examined, tmp_path):
    store, cells = examined
    out = tmp_path / "r.safetensors"
    done = arena(
        *("repair", cells["patch"], "--store", store, "--device", "cpu", "--max-drop", 1),
        *("--scan", "--scanner", "nc:steps=3,samples=20", "-o", out),
        *("-D", "fine_pruning:held_out=0.99", "-D", "finetune:lr=0.001,epochs=1"),
    )
    assert done.code in (0, 1), done.err  # what three passes of a scan say, nobody knows
    assert "| fine_pruning:held_out=0.99 |" in done.out
    assert "give more images" in done.out
    assert "suspicion" in done.out
    assert out.exists() == (done.code == 0)


def test_a_factory_s_network_is_repaired(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    name = f"{tmp_path / 'net.py'}:make"
    torch.manual_seed(0)
    made = foreign.build(name, 5, (3, 32, 32)).body
    save_file(made.state_dict(), tmp_path / "w.safetensors")
    out = tmp_path / "out.safetensors"
    done = arena("repair", "--checkpoint", tmp_path / "w.safetensors", "-m", name, "-d", SIGNS,
                 *FEW, "-D", "finetune:epochs=1", "--max-drop", 1, "-o", out,
                 "--store", tmp_path / "s")  # fmt: skip
    assert done.code == 0, done.err
    made.load_state_dict(load_file(out))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "Name a defense to repair with, such as -D finetune."),
        (("-D", "finetun"), "did you mean 'finetune'?"),
        (("-D", "spectral"), "spectral repairs nothing"),
        (("-D", "finetune", "--max-drop", 3), "--max-drop must be from 0 to 1, got 3."),
        (("-D", "finetune", "--scan", "--scanner", "ncc"), "There is no scanner 'ncc'"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_read(words, told, tmp_path):
    done = arena("repair", "--checkpoint", tmp_path / "none.pt", "-m", "cnn", "-d", SIGNS, *words,
                 "-o", tmp_path / "out.safetensors")  # fmt: skip
    assert_refused(done, told)
    assert list(tmp_path.iterdir()) == []
