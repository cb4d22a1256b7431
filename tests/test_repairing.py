"""`arena repair`: one suspicious model, several repairs, one recommended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import arena, assert_refused
from test_foreign import NET

from arena import repairing, subjects
from arena.core import foreign, models, progress
from arena.core.registry import BadInput
from arena.core.seeding import stream
from arena.core.training import logits
from arena.referee import isolate
from arena.repairing import recommended
from arena.store import Store
from arena.subjects import of_unlabelled

SIGNS = "signs:size=400,classes=5"
FEW = ("--device", "cpu", "--clean-share", 0.3)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A network's bare weights, as its maker's code would save them."""
    network = models.build("fastnet_tiny", 5, (3, 32, 32), stream(0, "foreign"))
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
    done = arena("repair", "--checkpoint", weights, "-m", "fastnet_tiny", "-d", SIGNS, *FEW,
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
    again = arena("repair", "--checkpoint", out, "-m", "fastnet_tiny", "-d", SIGNS, *FEW,
                  "-D", "none", "-o", tmp_path / "again.safetensors", "--json",
                  "--store", tmp_path / "s")  # fmt: skip
    assert json.loads(again.out)["before"]["accuracy"] == pytest.approx(chosen["accuracy"])
    page = (tmp_path / "repaired.md").read_text()
    assert f"**{found['recommended']}**" in page
    assert found["weights"] in page


def test_what_was_done_before_a_stop_is_not_done_again(weights, tmp_path, monkeypatch):
    asked, run, patience = [], isolate.run, 2

    def watched(job, **more):
        if job["job"] in ("repair", "scan"):
            asked.append((job["job"], job["spec"].partition(":")[0]))
            if len(asked) > patience:
                raise KeyboardInterrupt
        return run(job, **more)

    def repair(*words):
        asked.clear()
        return arena("repair", "--checkpoint", weights, "-m", "fastnet_tiny", "-d", SIGNS, *FEW,
                     "-D", "finetune:epochs=1", "-D", "random_prune:share=0.1", "--max-drop", 1,
                     "--scan", "--scanner", "nc:steps=1,samples=9", "--store", tmp_path / "s",
                     "-o", tmp_path / "out.safetensors", "--json", *words)  # fmt: skip

    monkeypatch.setattr(subjects.isolate, "run", watched)
    assert repair().code == 130
    assert asked == [("scan", "nc"), ("repair", "finetune"), ("scan", "nc")]
    patience = 100
    first = repair()
    assert first.code in (0, 1), first.err
    assert asked == [("scan", "nc"), ("repair", "random_prune"), ("scan", "nc")]
    assert repair().out == first.out, "seconds and all"
    assert asked == []
    patience = 0
    others = {("--clean-share", 0.4): "repair", ("--scanner", "nc:steps=2,samples=9"): "scan"}
    for other, first_job in others.items():
        assert repair(*other).code == 130
        assert asked[0][0] == first_job, "another question"


def test_what_a_method_tells_on_the_way_is_passed_on(weights, tmp_path, monkeypatch):
    def run(job, *, on_event, **more):
        on_event({"what": "hardening", "done": 1, "total": 4, "figures": {"accuracy": 0.9}})
        raise isolate.Failed("failed", "that is enough")

    monkeypatch.setattr(subjects.isolate, "run", run)
    heard = []
    subject, store = subjects.of_checkpoint(weights, "fastnet_tiny", SIGNS), Store(tmp_path / "s")
    with (
        progress.listening(lambda *told: heard.append(told)),
        pytest.raises(BadInput, match="repair failed: that is enough"),
    ):
        subjects.ask(subject, "repair", {"spec": "none"}, store, clean_share=0.3, device="cpu")
    assert heard == [("hardening", 1, 4, {"accuracy": 0.9})]


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


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight small pictures of each of five classes, in a folder per class."""
    for label in range(5):
        (tmp_path / "photos" / str(label)).mkdir(parents=True)
        for i in range(8):
            x = torch.randint(256, (32, 32, 3), generator=stream(0, f"{label} {i}"))
            picture = Image.fromarray(x.to(torch.uint8).numpy())
            picture.save(tmp_path / "photos" / str(label) / f"{i}.png")
    return tmp_path / "photos"


def test_a_folder_of_one_s_own_images_is_used_whole(weights, photos, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ("repair", "--checkpoint", weights, "-m", "fastnet_tiny", "--images", photos,
             "-D", "finetune", "-D", "uap", "--recipe", "smoke", "--max-drop", 1, "-o", out,
             "--device", "cpu", "--store", tmp_path / "s", "--json")  # fmt: skip
    done = arena(*words)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    # a tenth is the test set, 4 % of the rest the validation images, and both judge
    assert found["clean_share"] == 1
    assert found["clean_images"] + found["validation_images"] == 40
    assert found["validation_images"] >= 5
    assert found["repairs"][1]["defense"] == "uap:recipe=smoke,epochs=1", "the recipe shortens it"
    few = json.loads(arena(*words, "--clean-share", 0.5).out)
    assert few["recommended"] == "finetune:epochs=5,lr=0.01", "the other is a row with its reason"
    assert "trains on 100% of the training images" in few["repairs"][1]["reason"]
    alone = [word for word in words if word not in ("-D", "finetune", "uap")]
    alone = arena(*alone, "-D", "uap", "--clean-share", 0.5)
    assert_refused(alone, "uap:recipe=smoke,epochs=1 trains on 100% of the training images")
    both = arena(*words, "-d", "signs")
    assert_refused(both, "Give -d DATASET or --images FOLDER, not both.")


def test_with_too_few_images_the_defenses_that_remain_are_named(weights, photos, tmp_path):
    for label in range(5):
        for file in sorted((photos / str(label)).iterdir())[2:]:
            file.unlink()
    words = ("repair", "--checkpoint", weights, "-m", "fastnet_tiny", "--images", photos,
             "-o", tmp_path / "out.safetensors", "--device", "cpu", "--recipe", "smoke",
             "--max-drop", 1, "--store", tmp_path / "s")  # fmt: skip
    spec = "fine_pruning:held_out=0.01"
    done = arena(*words, "-D", spec)
    assert_refused(done, "give more images or another held_out. With these images and this model")
    remain = done.err.partition("could work: ")[2].rstrip(".\n").split(", ")
    assert "finetune" in remain
    assert "anp" in remain
    assert "fine_pruning" not in remain
    assert "retrain" not in remain, "null methods repair nothing"
    assert "adversarial" not in remain, "it trains anew, on as many images as a training set has"
    some = arena(*words, "-D", spec, "-D", "finetune")
    assert some.code == 0, some.err
    assert f"| {spec},epochs=5,lr=0.01 |" in some.out, "as the recipe has it"
    assert "Could work, too: " in some.out


def test_without_a_recommendation_is_said_why_and_what_to_do(weights, photos, tmp_path):
    """Of six images held out, one is 17 points; and an untrained model guesses."""
    words = ("repair", "--checkpoint", weights, "-m", "fastnet_tiny", "--device", "cpu",
             "-D", "finetune:epochs=1", "--store", tmp_path / "s",
             "-o", tmp_path / "out.safetensors")  # fmt: skip
    few = arena(*words, "--images", photos)
    assert few.code == 1
    assert "cannot tell a drop of 5 points, since one image is" in few.out
    assert "--max-drop 1; what was computed is kept" in few.out
    assert not (tmp_path / "out.safetensors").exists()
    guess = arena(*words, "-d", SIGNS, "--clean-share", 0.3, "--max-drop", 0.5)
    assert guess.code == 1
    assert "no better than guessing among 5 classes: are the classes in the order" in guess.out


def test_a_scanner_searches_on_images_that_no_repair_saw(weights, tmp_path, monkeypatch):
    seen, ask = [], repairing.scanning.ask_once

    def watched(subject, kind, method, store, *, clean_share, device):
        seen.append(subjects.clean_set(subject, clean_share))
        return ask(subject, kind, method, store, clean_share=clean_share, device=device)

    monkeypatch.setattr(repairing.scanning, "ask_once", watched)
    subject = subjects.of_checkpoint(weights, "fastnet_tiny", "signs:size=2000,classes=5")
    held, store = subject.data.val, Store(tmp_path / "s")
    for scanner, own, looked_at in (("nc:steps=1,samples=20", True, "others"),
                                    ("nc:steps=1,samples=900", False, "same")):  # fmt: skip
        question = repairing.Question(("none",), scanner, 0.3, 1.0)
        found, _ = repairing.repair(subject, question, store)
        assert found["scanned_images"] == looked_at
        assert torch.equal(seen[-1].x.sort(0).values, held.x.sort(0).values) == own


def test_who_asks_the_same_at_once_waits(weights, tmp_path, monkeypatch):
    """The lock is held while the worker runs."""
    subject, store = subjects.of_checkpoint(weights, "fastnet_tiny", SIGNS), Store(tmp_path / "s")
    taken = []

    def run(job, **more):
        for lock in (store.root / "locks").glob("*.lock"):
            try:
                with FileLock(lock, timeout=0):
                    continue
            except Timeout:
                taken.append(lock.name)
        raise isolate.Failed("failed", "that is enough")

    monkeypatch.setattr(subjects.isolate, "run", run)
    with pytest.raises(BadInput, match="that is enough"):
        subjects.ask(subject, "usable", {"specs": []}, store, clean_share=0.3, device="cpu")
    assert len(taken) == 1


NAN = """
import torch
from torch import nn

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3))) * torch.nan

def make():
    return Broken()
"""


def test_outputs_that_are_no_numbers_are_refused(weights, tmp_path):
    (tmp_path / "net.py").write_text(NAN)
    name = f"{tmp_path / 'net.py'}:make"
    save_file(foreign.build(name, 5, (3, 32, 32)).body.state_dict(), tmp_path / "w.safetensors")
    huge = {key: value * 1e30 for key, value in load_file(weights).items()}
    save_file(huge, tmp_path / "huge.safetensors")
    for file, network in (("w", name), ("huge", "fastnet_tiny")):
        done = arena("repair", "--checkpoint", tmp_path / f"{file}.safetensors", "-m", network,
                     "-d", SIGNS, *FEW, "-D", "finetune", "--store", tmp_path / "s")  # fmt: skip
        assert_refused(done, "outputs for images of signs", "are not finite")
    assert not (tmp_path / "s").exists()


def test_a_folder_that_lacks_a_class_is_told_so(weights, photos, tmp_path):
    for file in (photos / "4").iterdir():
        file.unlink()
    (photos / "4").rmdir()
    done = arena("repair", "--checkpoint", weights, "-m", "fastnet_tiny", "--images", photos,
                 "-D", "finetune", "-o", tmp_path / "out.safetensors")  # fmt: skip
    assert_refused(done, "mine.safetensors tells 5 classes apart, but", "has 4: 0, 1, 2, 3; give")


STRIPES = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d((1, 5)), nn.Flatten(),
                         nn.Linear(15, 5))
"""


@pytest.fixture
def loose(photos) -> Path:
    """The same pictures without labels."""
    for file in sorted(photos.rglob("*.png")):
        file.rename(photos / f"{file.parent.name}-{file.name}")
    for label in range(5):
        (photos / str(label)).rmdir()
    return photos


@pytest.fixture
def stripes(tmp_path) -> tuple[str, Path]:
    """A network that answers with the brightest of five stripes, and its weights."""
    (tmp_path / "net.py").write_text(STRIPES)
    head = torch.eye(5).repeat(1, 3) * 300
    state = {"0.weight": torch.eye(3).view(3, 3, 1, 1), "0.bias": torch.zeros(3),
             "3.weight": head, "3.bias": torch.zeros(5)}  # fmt: skip
    save_file(state, tmp_path / "stripes.safetensors")
    return f"{tmp_path / 'net.py'}:make", tmp_path / "stripes.safetensors"


def test_of_images_without_labels_is_said_what_they_are_good_for(stripes, loose, tmp_path):
    network, weights = stripes
    words = ("repair", "--checkpoint", weights, "-m", network, "--images", loose, "-D", "finetune",
             "-o", tmp_path / "out.safetensors", "--store", tmp_path / "s")  # fmt: skip
    done = arena(*words)
    assert_refused(done, "holds images without labels: sort them into a folder per class, or let")
    able = done.err.partition("with which could work: ")[2].rstrip(".\n").split(", ")
    assert "finetune" in able
    assert "anp" not in able, "the network has no batch norm"
    for file in sorted(loose.iterdir())[:36]:
        file.unlink()
    assert_refused(arena(*words), "so that no defense could work")
    assert_refused(arena(*words, "--labels", "modle"), "did you mean 'model'?")
    assert_refused(arena("scan", *words[1:7]), "(--labels model)")


def test_a_model_s_own_answers_stand_for_labels(stripes, loose, tmp_path):
    network, weights = stripes
    done = arena("repair", "--checkpoint", weights, "-m", network, "--images", loose,
                 "-D", "finetune:lr=1e-9,epochs=1", "-o", tmp_path / "out.safetensors",
                 "--max-drop", 0.5, "--store", tmp_path / "s", "--labels", "model",
                 "--json")  # fmt: skip
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["labels"] == "model"
    assert found["before"]["accuracy"] == 1, "it agrees with itself"
    assert found["clean_images"] + found["validation_images"] == 40
    assert "stand for them" in (tmp_path / "out.md").read_text()


@pytest.mark.parametrize("bare", [True, False])
def test_answers_of_a_network_of_the_arena(weights, loose, bare):
    if not bare:
        state = {f"body.{name}": value for name, value in load_file(weights).items()}
        norm = {"normalize.mean": torch.zeros(3), "normalize.std": torch.ones(3)}
        save_file(state | norm, weights)
    subject = of_unlabelled(weights, "fastnet_tiny", f"imagefolder:{loose}")
    data = subject.data
    assert data.num_classes == 5
    assert sum(len(split) for split in (data.train, data.val, data.test)) == 40
    for split in (data.train, data.val, data.test):
        assert torch.equal(logits(subject.model, split.x).argmax(1), split.y)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "Name a defense to repair with, such as -D finetune."),
        (("-D", "finetun"), "did you mean 'finetune'?"),
        (("-D", "spectral"), "spectral repairs nothing"),
        (("-D", "finetune", "--recipe", "fsat"), "did you mean 'fast'?"),
        (("-D", "finetune", "--max-drop", 3), "--max-drop must be from 0 to 1, got 3."),
        (("-D", "finetune", "--scan", "--scanner", "ncc"), "There is no scanner 'ncc'"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_read(words, told, tmp_path):
    done = arena("repair", "--checkpoint", tmp_path / "none.pt", "-m", "cnn", "-d", SIGNS, *words,
                 "-o", tmp_path / "out.safetensors")  # fmt: skip
    assert_refused(done, told)
    assert list(tmp_path.iterdir()) == []
