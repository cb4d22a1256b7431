"""Models to examine: cells and foreign files, and their class distances on the command line."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_cli import arena, assert_refused

from arena import inverting, subjects
from arena.core import models
from arena.core.inversion import codec
from arena.core.inversion.codec import Codec
from arena.core.inversion.families import families
from arena.core.registry import BadInput
from arena.core.seeding import stream
from arena.inverting import Question, pruned, rescaled, rotated, with_encoder
from arena.store import Store
from arena.subjects import of_cell, of_checkpoint

FEW = ("--samples", 5, "--steps", 3, "--restarts", 2, "--pairs", "0:1,2:0", "--device", "cpu")


@pytest.fixture
def store(examined) -> Path:
    return examined[0]


@pytest.fixture
def cells(examined) -> dict[str, str]:
    return examined[1]


@pytest.fixture
def network() -> models.Classifier:
    return models.build("fastnet_small", 5, (3, 32, 32), stream(0, "foreign"))


# -------------------------------------------------------------------------------- foreign weights


def test_the_bare_network_is_given_the_data_s_normalisation(tmp_path, network):
    file = tmp_path / "bare.pt"
    torch.save(network.body.state_dict(), file)
    subject = of_checkpoint(file, "fastnet_small", "signs:size=400,classes=5")
    x = subject.data.train.x / 255
    assert torch.allclose(subject.model.normalize.mean, x.mean((0, 2, 3)), atol=1e-3)
    head = network.state_dict()["body.head.weight"]
    assert torch.equal(subject.model.state_dict()["body.head.weight"], head)


def test_weights_that_do_not_fit_are_named(tmp_path, network):
    state = network.state_dict()
    del state["body.head.weight"]
    state["body.extra"] = torch.zeros(1)
    state["body.whiten.bias"] = torch.full_like(state["body.whiten.bias"], torch.nan)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(BadInput, match=r"lack body.head.weight .*unexpected body.extra .*finite"):
        of_checkpoint(tmp_path / "odd.safetensors", "fastnet_small", "signs:size=400,classes=5")


# ------------------------------------------------------------------------------- arena distance


def test_distances_of_a_cell(store, cells):
    key = cells["patch"]
    words = ("distance", key[:10], "--store", store, *FEW, "--asr", 0.01)
    answer = arena(*words, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["unit"] == "mask L1"
    assert found["method"] == "nc"
    assert found["encoder"] is None
    assert found["start"] is None
    assert len(found["classes"]) == 5
    assert found["pairs"] == 2
    known = {(s, t) for s in range(5) for t in range(5) if found["distances"][s][t] is not None}
    assert known | {tuple(pair) for pair in found["unreached"]} == {(0, 1), (2, 0)}
    assert found["also"] is None or found["also"]["mean"] == pytest.approx(3 * found["mean"])
    assert found["seconds"] > 0
    assert Path(found["picture"]).read_bytes().startswith(b"\x89PNG")
    again = json.loads(arena(*words, "--json").out)
    assert again == found, "computed anew, not read"
    table = arena(*words).out
    assert "mask L1" in table
    assert "(2 pairs, 2 restarts each)" in table


def test_the_improvement_over_a_baseline(store, cells):
    one, two = cells["patch"], cells["none"]
    words = ("--store", store, *FEW, "--asr", 0.01, "--json")
    found = json.loads(arena("distance", one, "--baseline", two, *words).out)
    other = json.loads(arena("distance", two, *words).out)
    assert found["baseline"]["mean"] == other["mean"]
    pairs = [(0, 1), (2, 0)]
    ratios = [
        found["distances"][s][t] / other["distances"][s][t] - 1
        for s, t in pairs
        if found["distances"][s][t] is not None and other["distances"][s][t] is not None
    ]
    assert found["improvement"] == pytest.approx(sum(ratios) / len(ratios))


def test_a_baseline_of_other_data_is_refused_before_anything_is_searched(
    store, cells, tmp_path, network, monkeypatch
):
    file = tmp_path / "other.pt"
    torch.save(network.body.state_dict(), file)
    monkeypatch.setattr(inverting, "answers", lambda *_, **__: pytest.fail("searched"))
    given = ("--checkpoint", file, "--model", "fastnet_small", "-d", "signs:size=420,classes=5")
    answer = arena("distance", *given, "--baseline", cells["none"], "--store", store, *FEW)
    assert_refused(answer, "distances compare on one data set")


def test_pairs_without_a_trigger_are_no_distance(store, cells):
    words = ("distance", cells["none"], "--store", store, "--samples", 5, "--steps", 1)
    answer = arena(*words, "--restarts", 1, "--pairs", "0:1", "--asr", 1.0, "--json")
    found = json.loads(answer.out)
    assert found["unreached"] == [[0, 1]]
    assert found["distances"][0][1] is None
    assert found["mean"] is None
    table = arena(*words, "--restarts", 1, "--pairs", "0:1", "--asr", 1.0).out
    assert "no trigger reached 100% for 1" in table


def test_an_encoder_of_one_s_own(store, cells, tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "own.safetensors"
    save_file(codec.packed([Codec(3)]), file)
    # what an untrained decoder makes of images is one class to the model, whichever that is
    pairs = ("--pairs", "1:0,0:1,0:2,0:3,0:4")
    words = ("distance", cells["patch"], "--store", store, *FEW, *pairs, "--asr", 0.01, "--json")
    deck = ("--method", "deck:regions=1", "--encoder", file)
    found = json.loads(arena(*words, *deck).out)
    assert found["encoder"].startswith("own (sha256 ")
    assert found["unit"] == "feature MSE"
    assert found["mean"] > 0
    assert [size is not None for size in found["start"]] == [True, True, False, False, False]
    victims = [s for s in range(5) for size in found["distances"][s] if size is not None]
    mean = sum(found["start"][s] for s in victims) / len(victims)
    said = f"images differ by {mean:.2f} before anything is learned"
    assert said in arena(*words[:-1], *deck).out
    torch.manual_seed(1)  # another encoder in a file of the same name: nothing is read from before
    save_file(codec.packed([Codec(3)]), file)
    again = json.loads(arena(*words, *deck).out)
    assert again["encoder"] != found["encoder"]
    assert again["mean"] != found["mean"]
    assert again["start"] != found["start"]


def test_distances_are_seen_by_the_encoder_s_last_block(store, cells, tmp_path):
    torch.manual_seed(0)
    made, file = Codec(3, further=[(4,)]), tmp_path / "own.safetensors"
    few = ("--pairs", "1:0,0:1,0:2,0:3,0:4", "--asr", 0.01, "--json")
    words = ("distance", cells["patch"], "--store", store, *FEW, *few)
    deck = ("--method", "deck:regions=1", "--encoder", file)
    found = []
    for _ in range(2):
        save_file(codec.packed([made]), file)
        found.append(json.loads(arena(*words, *deck).out))
        for value in made.encoder.further.parameters():
            value.data *= 2  # features twice as large, by which no image is made
    assert found[0]["encoder"].endswith(", pooling 2")
    assert found[1]["mean"] == pytest.approx(4 * found[0]["mean"], rel=0.01)
    assert found[1]["start"][0] == pytest.approx(4 * found[0]["start"][0], rel=0.01)


def test_what_starts_as_no_change_at_all_starts_at_no_distance(store, cells):
    words = ("distance", cells["patch"], "--store", store, "--samples", 5, "--restarts", 1)
    few = ("--method", "abs_filter", "--steps", 1, "--pairs", "1:0", "--json")
    found = json.loads(arena(*words, *few).out)
    assert found["start"] == [None, pytest.approx(0, abs=1e-6), None, None, None]


def test_a_network_s_encoder_gets_a_decoder_for_the_data_once(store, cells, monkeypatch):
    made = []

    def train(images, rng, *, how, encoder):
        made.append((len(images), how, encoder))
        torch.manual_seed(0)
        trained = Codec(3, how)
        trained.encoder.load_state_dict(encoder.state_dict())
        return trained

    monkeypatch.setattr(codec, "vgg_encoder", lambda name: Codec(3).encoder)
    monkeypatch.setattr(codec, "train_codec", train)
    opened = Store(store)
    subject = subjects.of_cell(opened, cells["patch"])
    method = "deck:regions=1,decoder=zero"
    spec = with_encoder(method, "torchvision:vgg16", subject, opened)
    assert spec == with_encoder(method, "torchvision:vgg16", subject, opened)
    assert [(count, how) for count, how, _ in made] == [(len(subject.data.train), "zero")]
    family = families.build(spec)
    assert (family.regions, family.decoder) == (1, "zero")
    assert family.seen_by.startswith("torchvision-vgg16-signs (sha256 ")
    trained = codec.of_file(Path(family.file), "zero").encoder.conv1.weight
    assert torch.allclose(trained, made[0][2].conv1.weight, atol=1e-3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "Name a cell, or a file of weights"),
        (("abc",), "There is no cell 'abc'"),
        (("--checkpoint", "x.pt"), "--checkpoint needs --model NAME and -d DATASET or --images"),
        (("--checkpoint", "x.pt", "-m", "fastnett", "-d", "signs"), "There is no network"),
        (("--checkpoint", "x.pt", "-m", "fastnet", "-d", "signs"), "There is no file 'x.pt'"),
        (("CELL", "--method", "nx"), "no trigger family 'nx'; did you mean 'nc'?"),
        (("CELL", "--method", "nc:nudge=9"), "nudge must be at most 0.5"),
        (("CELL", "--pairs", "0:9"), "There is no class 9; classes are 0 to 4"),
        (("CELL", "--pairs", "2:2"), "are one class"),
        (("CELL", "--samples", 9999), "images, but 9999 are asked for"),
        (("CELL", "--samples", 0), "--samples must be at least 1"),
        (("CELL", "--stall", 0), "--stall must be at least 1"),
        (("CELL", "--asr", 0), "--asr must be above 0"),
        (("CELL", "--split", "train"), "--split must be val or test"),
        (("CELL", "--memory", 0.00001), "One problem needs about"),
        (("CELL", "--device", "cuda:9"), "--device cuda:9"),
        (("CELL", "--encoder", "cifar10"), "--encoder is for --method deck"),
        (("CELL", "--method", "deck", "--encoder", "cifar11"), "did you mean 'cifar10'?"),
        (("CELL", "--method", "deck", "--encoder", "no.safetensors"), "no.safetensors"),
        (("CELL", "--method", "deck", "--encoder", "torchvision:vgg11"), "no such first block"),
    ],
)
def test_bad_questions(store, cells, words, told):
    words = [cells["none"] if word == "CELL" else word for word in words]
    before = sorted(path.name for path in (store / "artifacts").rglob("*"))
    answer = arena("distance", *words, "--store", store)
    assert_refused(answer, told)
    assert sorted(path.name for path in (store / "artifacts").rglob("*")) == before


def test_a_question_knows_its_family_s_settings():
    assert Question("uap").search.rule == "sign"
    assert Question("filter", steps=7).search.steps == 7
    assert Question("nc", asr=0.5).search.asr == 0.5
    assert Question("nc").search.asr == 0.9
    assert Question("nc").search.stall == 50
    assert Question("nc", stall=7).search.stall == 7


def test_a_search_that_stalls_ends_early(store, cells):
    words = ("distance", cells["patch"], "--store", store, "--samples", 5, "--steps", 400)
    words += ("--restarts", 1, "--pairs", "0:1", "--device", "cpu", "--json")
    words += ("--method", "nc:weight=steps")  # whose searches go on to the end
    whole, short = (json.loads(arena(*words, *more).out) for more in ((), ("--stall", 5)))
    assert (whole["stall"], short["stall"]) == (None, 5)
    assert short["passes"] < whole["passes"] == 400
    assert short["distances"][0][1] >= whole["distances"][0][1]


def test_distances_hold_few_triggers_at_once_and_go_on_behind_the_last_portion(
    store, cells, monkeypatch, tmp_path
):
    each = (1 + 3) * 32 * 32 * 4  # bytes: mask and pattern
    subject = of_cell(Store(store), cells["patch"])
    question = Question("nc", restarts=2, samples=5, steps=3, asr=0.01)
    asked, seen, real, told = [], [], inverting.invert, inverting.retold

    def remembered(found):
        seen.extend(weakref.ref(value) for one in found for value in one.trigger.values())
        return found

    def watched(model, family, problems, *rest, **more):
        assert not any(value() is not None for value in seen), "triggers of a part before"
        if fails and asked:
            raise KeyboardInterrupt
        asked.append((len(problems), more["what"]))
        return remembered(real(model, family, problems, *rest, **more))

    def read(*args):
        searched = len(seen)
        assert not any(value() is not None for value in seen), "held twice"
        found = remembered(told(*args))
        assert len(seen) > searched
        return found

    def measured(place):
        asked.clear()
        found = inverting.class_distances(subject, question, "0:1,2:0", Store(tmp_path / place))
        return {name: value for name, value in found.items() if name != "seconds"}

    fails = False
    monkeypatch.setattr(inverting, "invert", watched)
    monkeypatch.setattr(inverting, "retold", read)
    whole = measured("whole")
    assert asked == [(4, "inverting triggers")]
    monkeypatch.setattr(inverting, "_HELD", 3 * each)
    fails = True
    with pytest.raises(KeyboardInterrupt):
        measured("parts")
    assert asked == [(3, "inverting triggers, part 1 of 2")]
    fails = False
    assert measured("parts") == whole
    assert asked == [(1, "inverting triggers, part 2 of 2")]
    problems = inverting.measures.problems_of([(0, 1), (2, 0)], 2)
    sizes, seconds = inverting.sizes(subject, question, problems, Store(tmp_path / "parts"))
    assert [one.trigger for one in sizes] == [{}] * 4
    assert seconds > 0
    for memory, count in ((None, 3), (2.5 * each, 2), (9 * each, 3), (1, 1)):
        held = inverting._portion(question, subject.data.val, problems[0], memory)
        assert held == count


def test_images_of_all_pairs_are_there_before_any_portion_is_searched(store, cells, monkeypatch):
    monkeypatch.setattr(inverting, "_HELD", 1)
    monkeypatch.setattr(inverting, "answers", lambda *_, **__: pytest.fail("searched"))
    subject = of_cell(Store(store), cells["patch"])
    few = replace(subject.data.val, y=subject.data.val.y.clamp_max(3))  # none of class 4
    subject = replace(subject, data=replace(subject.data, val=few))
    with pytest.raises(BadInput, match="no images of class 4"):
        inverting.class_distances(subject, Question("nc", samples=5), "0:1,4:0", Store(store))


# ---------------------------------------------------------------------------------- arena invert


def test_a_trigger_as_picture_and_numbers(store, cells, tmp_path):
    key, place = cells["patch"], tmp_path / "found"
    words = ("--samples", 20, "--steps", 60, "--restarts", 1, "--device", "cpu", "--asr", 0.8)
    words = ("invert", key, "-t", 0, "--store", store, *words, "-o", place, "--prune-to", 4)
    answer = arena(*words, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["victim"] is None
    assert 0 <= found["clean_asr"] <= 1
    assert list(found["rescaled"]) == ["0.98", "0.96", "0.88", "0.8"]
    assert list(found["rotated"]) == ["1", "2", "3", "4", "5"]
    assert list(found["pruned"]) == ["4"]
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    trigger = load_file(tmp_path / "found.safetensors")
    assert trigger["mask"].shape == (1, 32, 32)
    told = arena(*words).out
    assert "all classes to" in told
    assert "ASR on test" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-t", 7), "There is no class 7; classes are 0 to 4"),
        (("-t", 1, "-v", 1), "are both class 1"),
        (("-t", 1, "--prune-to", 0), "--prune-to must be 1 to 1024 pixels, got 0"),
    ],
)
def test_triggers_that_cannot_be(store, cells, words, told):
    answer = arena("invert", cells["none"], *words, "--store", store, "--device", "cpu")
    assert_refused(answer, told)


def test_a_trigger_is_tried_on_no_image_that_it_was_searched_on(store, cells):
    words = ("invert", cells["none"], "-t", 0, "-v", 1, "--store", store, "--device", "cpu")
    words += ("--steps", 2, "--restarts", 1, "--json")
    unseen, held = (
        json.loads(arena(*words, "--samples", count, "--split", split).out)
        for count, split in ((5, "val"), (5, "test"))
    )
    assert held["test_images"] == unseen["test_images"] - 5
    assert (unseen["split"], held["split"], held["steps"]) == ("val", "test", 2)
    answer = arena(*words, "--samples", unseen["test_images"], "--split", "test")
    assert_refused(answer, "No test image is left")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("distance", "--samples", 9999, "--pairs", "0:1"), "but 9999 are asked for"),
        (("invert", "-t", 1, "-v", 1), "are both class 1"),
        (("distance", "--memory", "nan"), "--memory must be"),
        (("invert", "-t", 1, "--memory", -1), "--memory must be"),
        (("distance", "--memory", 0.00001), "One problem needs about"),
        (("invert", "-t", 1, "--memory", 0.00001), "One problem needs about"),
        (("distance", "--method", "abs", "--pairs", "0:1"), "no inner convolution"),
        (("scan", "--method", "abs"), "no inner convolution"),
        (("repair", "-D", "anp"), "batch norm"),
    ],
)
def test_what_cannot_be_searched_leaves_no_store(tmp_path, words, told):
    """Of a network whose only layer is that of its logits."""
    lines = "from torch import nn", "def make():"
    lines += ("    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))",)
    brought, made = tmp_path / "brought", tmp_path / "made"  # Python may keep bytecode in the first
    for folder in (brought, made):
        folder.mkdir()
    (brought / "net.py").write_text("\n".join(lines))
    weights = {"1.weight": torch.zeros(5, 3 * 32 * 32), "1.bias": torch.arange(5.0)}
    save_file(weights, brought / "net.safetensors")
    given = ("--checkpoint", brought / "net.safetensors", "--model", f"{brought}/net.py:make")
    given += ("-d", "signs:size=400,classes=5", "--device", "cpu", "--store", made / "a" / "b")
    if words[0] == "repair":
        given += ("-o", made / "out.safetensors")
    assert_refused(arena(words[0], *given, *words[1:]), told)
    assert list(made.iterdir()) == []


def test_what_is_left_of_a_pruned_trigger():
    x = torch.zeros(2, 3, 2, 2)
    shown = x.clone()
    shown[:, 0, 0, 0], shown[:, 2, 1, 1], shown[0, 1, 0, 1] = 0.5, 0.9, 0.8
    left = pruned(x, shown, 2)
    assert (left[:, 0, 0, 0] == 0.5).all()
    assert (left[:, 2, 1, 1] == 0.9).all()
    assert left[0, 1, 0, 1] == 0  # 0.4 on average
    assert torch.equal(pruned(x, shown, 4), shown)


def test_rescaling_enlarges_the_middle_and_rotation_turns_about_it():
    ramp = torch.linspace(0, 1, 20).expand(1, 1, 20, 20)
    out = rescaled(ramp, 0.5)
    assert float(out[0, 0, 5, 0]) == pytest.approx(float(ramp[0, 0, 0, 5]), abs=0.03)
    assert float(out[0, 0, 5, 19]) == pytest.approx(float(ramp[0, 0, 0, 14]), abs=0.03)
    assert torch.allclose(rescaled(ramp, 1.0), ramp, atol=1e-6)
    turned = rotated(ramp, 90)
    assert torch.allclose(turned.squeeze(), ramp.squeeze().T, atol=1e-5) or torch.allclose(
        turned.squeeze(), ramp.squeeze().T.flip(0), atol=1e-5
    )
    assert torch.allclose(rotated(ramp, 0), ramp, atol=1e-6)


# ------------------------------------------------------------------------------------ arena scan


def test_a_verdict_on_a_cell(store, cells, tmp_path):
    words = ("scan", cells["patch"], "--store", store, "--device", "cpu", "--clean-share", 0.2)
    words = (*words, "--method", "nc:steps=40,samples=16", "-o", tmp_path / "trigger.png")
    answer = arena(*words, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert found["threshold"] == 2
    assert len(found["per_class"]) == 5
    assert found["backdoored"] == (found["score"] > 2)
    assert (found["target"] is None) == (not found["backdoored"])
    assert (tmp_path / "trigger.png").exists() == found["backdoored"]
    assert found["budget"]["backward_images"] > 0
    assert 100 < found["clean_images"] < 170
    told = arena(*words).out
    assert "suspicious above 2" in told
    assert found["classes"][4] in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--method", "pixl"), "There is no scanner 'pixl'; did you mean 'pixel'?"),
        (("--method", "finetune"), "finetune repairs but scans nothing; scanners: abs, k_arm, nc"),
        (("--method", "nc:asr=2"), "asr must be at most 1"),
        (("--clean-share", 0), "--clean-share must be above 0"),
        (("--clean-share", 0.005), "clean set"),
    ],
)
def test_scans_that_cannot_be(store, cells, words, told):
    answer = arena("scan", cells["none"], *words, "--store", store, "--device", "cpu")
    assert_refused(answer, told)
