"""The clean-label attack: labels, rows, the bound after rounding, and the grids pixel by pixel."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_adversarial import SMALL, Shelf

from arena.attacks.clean_label import CleanLabel
from arena.core import adversarial, models, parts, poisoning
from arena.core.contracts import Images
from arena.core.progress import listening
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream

QUICK = {"surrogate": "small", "surrogate_epochs": 1, "surrogate_updates": 1, "steps": 4}
RIGHT = [[0, 0, 1], [0, 1, 0], [1, 0, 1]]  # the published grid of the bottom right corner
LEFT = [[1, 0, 0], [0, 1, 0], [1, 0, 1]]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(models._catalogue(), "small", SMALL)


def images(n=60, channels=3, side=12, classes=4):
    shape = (n, channels, side, side)
    x = torch.randint(256, shape, generator=stream(0, "images"), dtype=torch.uint8)
    return Images(x, torch.arange(n) % classes)


def poisoned(attack, train, seed=0):
    trigger = attack.prepare(train, stream(seed, "trigger"))
    return trigger, attack.poison(train, trigger, stream(seed, "poison"))


def grey(level=100, channels=1, height=8, width=10):
    return torch.full((1, channels, height, width), level, dtype=torch.uint8)


def stamped(attack, x):
    train = Images(x, torch.zeros(len(x), dtype=torch.long))
    return poisoning.stamp(x, attack.prepare(train, stream(0, "trigger")).stamp)


# ------------------------------------------------------------------------------------- the grids


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("corner", "rows", "columns", "grid"),
    [
        ("bottom_right", slice(-3, None), slice(-3, None), RIGHT),
        ("bottom_left", slice(-3, None), slice(3), LEFT),
        ("top_right", slice(3), slice(-3, None), RIGHT),
        ("top_left", slice(3), slice(3), LEFT),
    ],
)
def test_one_grid_by_hand(channels, corner, rows, columns, grid):
    x = grey(channels=channels)
    out = stamped(CleanLabel(corners=corner), x)
    expected = torch.tensor(grid, dtype=torch.uint8) * 255
    assert torch.equal(out[0, :, rows, columns], expected.expand(channels, 3, 3))
    out[:, :, rows, columns] = 100
    assert torch.equal(out, x)


def test_four_grids_by_hand():
    out = stamped(CleanLabel(), grey())[0, 0]
    assert (out[:3] // 255 * (out[:3] != 100)).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        [0, 1, 0, 0, 0, 0, 0, 0, 1, 0],
        [1, 0, 1, 0, 0, 0, 0, 1, 0, 1],
    ]
    assert torch.equal(out[-3:], out[:3])
    assert (out[3:5] == 100).all()
    assert (out[:, 3:7] == 100).all()
    assert int((out != 100).sum()) == 36


@pytest.mark.parametrize("amplitude", [255, 32])
@pytest.mark.parametrize("size", [2, 3])
def test_four_grids_do_not_mind_a_flip(amplitude, size):
    x = images().x
    attack = CleanLabel(amplitude=amplitude, size=size)
    assert torch.equal(stamped(attack, x.flip(-1)), stamped(attack, x).flip(-1))
    one = CleanLabel(amplitude=amplitude, size=size, corners="bottom_right")
    assert not torch.equal(stamped(one, x.flip(-1)), stamped(one, x).flip(-1))


def test_a_reduced_amplitude_is_added_or_taken_and_clipped():
    out = stamped(CleanLabel(corners="bottom_right", amplitude=32), grey(100))[0, 0, -3:, -3:]
    assert out.tolist() == [[68, 68, 132], [68, 132, 68], [132, 68, 132]]
    out = stamped(CleanLabel(corners="bottom_right", amplitude=32), grey(240))[0, 0, -3:, -3:]
    assert out.tolist() == [[208, 208, 255], [208, 255, 208], [255, 208, 255]]


def test_the_grid_of_two_by_two():
    attack = attacks.build("clean_label:corners=top_left,size=2")
    out = stamped(attack, grey())
    assert out[0, 0, :2, :2].tolist() == [[0, 255], [255, 0]]
    assert int((out != 100).sum()) == 4
    right = stamped(CleanLabel(corners="bottom_right", size=2), grey())[0, 0, -2:, -2:]
    assert right.tolist() == [[255, 0], [0, 255]]


def test_the_trigger_is_a_pure_map():
    trigger = CleanLabel().prepare(images(), stream(0, "trigger"))
    x = images().x[:5].float() / 255
    before = x.clone()
    out = trigger.stamp(x)
    assert torch.equal(x, before)
    assert torch.equal(out, trigger.stamp(x))
    assert trigger.embed is None
    assert out.dtype == torch.float32
    assert 0 <= out.min() <= out.max() <= 1


# ------------------------------------------------------------------------------------ the poison


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("norm", "bound"), [("linf", 8), ("l2", 300)])
def test_only_target_images_change_within_the_bound(channels, norm, bound):
    train = images(channels=channels)
    before = train.x.clone()
    attack = CleanLabel(**QUICK, norm=norm)
    _, (data, rows) = poisoned(attack, train)
    assert torch.equal(train.x, before), "the training set was written to"
    assert torch.equal(data.y, train.y)
    assert len(rows) == 8  # half of 15, to even
    assert (train.y[rows] == 3).all()
    rest = torch.ones(len(train), dtype=torch.bool)
    rest[rows] = False
    assert torch.equal(data.x[rest], train.x[rest])
    inside = torch.ones(12, 12, dtype=torch.bool)
    for place in (slice(3), slice(-3, None)):
        inside[place, :3] = inside[place, -3:] = False
    moved = (data.x[rows].double() - train.x[rows].double())[:, :, inside].flatten(1)
    length = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    assert (length <= bound).all()
    assert (length >= (8 if norm == "linf" else 150)).all(), "hardly perturbed"
    corner = torch.tensor(RIGHT, dtype=torch.uint8) * 255
    assert torch.equal(data.x[rows][:, :, -3:, -3:], corner.expand(8, channels, 3, 3))


def test_a_bound_between_levels_is_kept():
    train = images()
    _, (data, rows) = poisoned(CleanLabel(**QUICK, eps=2.6, corners="top_left"), train)
    moved = (data.x[rows].int() - train.x[rows].int())[:, :, 3:, 3:]
    assert moved.abs().max() == 2


@pytest.mark.parametrize(("rate", "count"), [(0.2, 3), (1.0, 15)])
def test_the_rate_is_a_share_of_the_target_class(rate, count):
    _, (_, rows) = poisoned(CleanLabel(**QUICK, rate=rate, target=1), images())
    assert len(rows) == len(rows.unique()) == count
    assert (images().y[rows] == 1).all()


def test_the_perturbation_leads_away_from_the_class():
    train, shelf = images(), Shelf()
    bright = 80 + 20 * train.y.view(-1, 1, 1, 1)  # the class is the brightness
    train = Images((bright + train.x % 16).to(torch.uint8), train.y)
    plain = {"surrogate_epochs": 40, "surrogate_steps": 0, "rate": 1.0, "eps": 20.0}
    attack = CleanLabel(**{**QUICK, **plain})
    with parts.kept(shelf):
        _, (data, rows) = poisoned(attack, train)
        model = adversarial.surrogate("small", train, epochs=40, updates=1)
    assert len(shelf.kept) == 1, "another surrogate than the attack's"
    with torch.no_grad():
        plain, hard = (
            model(x / 255).softmax(1)[:, 3].mean()
            for x in (stamped(attack, train.x[rows]), data.x[rows])
        )
    assert hard < plain - 0.1


def test_the_images_are_perturbed_before_the_grids_are_put_on(monkeypatch):
    shown = []

    def spy(model, x, y, **settings):
        shown.append((x.clone(), y, settings))
        return x

    monkeypatch.setattr(adversarial, "pgd", spy)
    monkeypatch.setattr(CleanLabel, "_surrogate", lambda self, train: None)
    train = images()
    _, (data, rows) = poisoned(CleanLabel(), train)
    x, y, settings = shown[0]
    assert torch.equal((x * 255).round().to(torch.uint8), train.x[rows])
    assert (y == 3).all()
    assert torch.equal(data.x[rows], stamped(CleanLabel(), train.x[rows]))
    assert settings["norm"] == "linf"
    assert settings["eps"] == pytest.approx(8 / 255)
    assert settings["step"] == pytest.approx(1.5 / 255)
    assert settings["steps"] == 100
    assert not settings.get("targeted", False)
    assert settings.get("random_start", True)
    poisoned(CleanLabel(norm="l2", step=20.0), train)
    assert shown[1][2]["eps"] == pytest.approx(300 / 255)
    assert shown[1][2]["step"] == pytest.approx(20 / 255)


def test_without_steps_there_is_no_surrogate(monkeypatch):
    monkeypatch.setattr(CleanLabel, "_surrogate", lambda self, train: pytest.fail("trained"))
    attack, train = CleanLabel(steps=0), images()
    _, (data, rows) = poisoned(attack, train)
    assert torch.equal(data.x[rows], stamped(attack, train.x[rows]))


def test_the_same_seed_makes_the_same_poison_and_seeds_share_a_surrogate():
    train, shelf, told = images(), Shelf(), []

    def listener(what, done, total, figures):
        if what == "perturbing images":
            told.append((done, total))

    with parts.kept(shelf), listening(listener):
        (_, one), (_, two), (_, other) = (
            poisoned(CleanLabel(**QUICK), train, s) for s in (1, 1, 2)
        )
    assert torch.equal(one.data.x, two.data.x)
    assert torch.equal(one.rows, two.rows)
    assert not torch.equal(one.rows, other.rows)
    assert len(shelf.kept) == 1
    assert shelf.labels[0]["name"] == "surrogate"
    assert shelf.labels[0]["settings"]["steps"] == 2
    assert told == [(8, 8)] * 3


def test_the_surrogate_is_the_one_asked_for(monkeypatch):
    asked = []

    def made(name, train, **settings):
        asked.append((name, settings))
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(adversarial, "surrogate", made)
    train = images()
    CleanLabel()._surrogate(train)
    CleanLabel(surrogate="small", surrogate_steps=0)._surrogate(train)
    usual = {"epochs": 8, "updates": 300, "eps": 8 / 255, "steps": 2}
    assert asked == [("fastnet_robust", usual), ("small", {**usual, "eps": 0.0, "steps": 0})]


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "shape", "counts", "message"),
    [
        ({"target": 4}, (3, 32, 32), [9] * 4, "target 4 is not a class"),
        ({}, (3, 32, 32), [9], "at least two classes"),
        ({"rate": 0.01}, (3, 32, 32), [9] * 4, "less than one image"),
        ({}, (3, 32, 32), [9, 9, 9, 0], "less than one image"),
        ({"surrogate": "smal"}, (3, 32, 32), [9] * 4, "no network 'smal'"),
        ({"surrogate": "fastnet"}, (3, 12, 32), [9] * 4, "fastnet takes images of 16 px"),
        ({"steps": 0}, (1, 5, 32), [9] * 4, "6 px a side and more, these are 5x32"),
        ({"steps": 0, "corners": "top_left"}, (1, 32, 2), [9] * 4, "3 px a side and more"),
    ],
)
def test_what_cannot_work_is_refused(fields, shape, counts, message):
    with pytest.raises(BadInput, match=message):
        CleanLabel(**fields).check(shape, counts)


def test_what_can_work_is_not_refused():
    CleanLabel().check((3, 32, 32), [100] * 10)
    CleanLabel(steps=0, surrogate="none such").check((1, 6, 6), [4] * 4)
    CleanLabel(steps=0, size=2, corners="bottom_left").check((1, 2, 2), [4] * 4)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clean_label:size=4", "at most 3"),
        ("clean_label:corners=centre", "corners cannot be 'centre'"),
        ("clean_label:eps=0", "above 0"),
        ("clean_label:norm=l1", "norm cannot be"),
        ("clean_label:amplitude=300", "at most 255"),
    ],
)
def test_impossible_fields_are_refused(spec, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec)


def test_the_catalogue_knows_it_as_clean_label():
    described = attacks.describe("clean_label")
    assert described.traits["labels"] == "kept"
    assert described.powers == ("poisons data",)
    assert {f.name for f in dataclasses.fields(CleanLabel)} == {f.name for f in described.fields}
