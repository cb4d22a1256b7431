"""What inverted triggers repair: unlearning and pruning, and the scanners that do them."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import test_scanning
import torch
import toys
from torch import Tensor

from arena.core import features, pruning, training, unlearning
from arena.core.contracts import Images, Repairs, Scans
from arena.core.inversion.engine import Found, Problem
from arena.core.inversion.families import families
from arena.core.models import Classifier
from arena.core.registry import BadInput, defenses
from arena.core.seeding import stream
from arena.core.training import accuracy, logits
from arena.defenses import abs as abs_defense
from arena.defenses import nc as nc_defense
from arena.defenses.abs import ABS
from arena.defenses.nc import NC

GENTLE = {  # clean images alone leave the toy's backdoor where it is
    "lr": 0.003, "epochs": 4, "batch": 32, "momentum": 0.9, "weight_decay": 0.0, "crop": 0,
    "flip": False,
}  # fmt: skip


def white(x: Tensor) -> Tensor:
    return torch.ones_like(x)


def black(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def silent(model: Classifier) -> list[int]:
    """Channels that the head no longer reads (it never reads the toy's brightness, 3)."""
    return (model.body.head.weight == 0).all(0).nonzero().flatten().tolist()


# ------------------------------------------------------------------------------------ the stamping


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.2, 40), (0.333, 67), (1.0, 200)])
def test_exactly_the_share_is_stamped_and_labels_stay(share, count, clean, rng):
    before = clean.x.clone()
    part = unlearning.partly_stamped(clean, [toys.stamp], share, rng)
    changed = (part.x != before).flatten(1).any(1)
    assert int(changed.sum()) == count
    assert (part.x[changed][..., -2:, -2:] == 255).all()
    assert torch.equal(part.y, clean.y)
    assert torch.equal(clean.x, before), "the clean images themselves were stamped"


def test_several_triggers_are_dealt_evenly_to_drawn_images(clean, rng):
    part = unlearning.partly_stamped(clean, [white, black], 0.25, rng)
    marks = [(part.x == shade).flatten(1).all(1).nonzero().flatten() for shade in (255, 0)]
    assert [len(rows) for rows in marks] == [25, 25]
    assert all(len(clean.y[rows].unique()) == toys.CLASSES for rows in marks)
    again = unlearning.partly_stamped(clean, [white, black], 0.25, stream(0, "test"))
    other = unlearning.partly_stamped(clean, [white, black], 0.25, stream(1, "test"))
    assert torch.equal(again.x, part.x)
    assert not torch.equal(other.x, part.x)


# ------------------------------------------------------------------------------------- unlearning


@pytest.mark.parametrize("share", [0.2, 0.0])
def test_stamped_images_with_true_labels_are_what_unlearns(share, planted, clean, images, rng):
    unlearning.unlearn(planted, clean, [toys.stamp], rng, share=share, **GENTLE)
    assert accuracy(planted, images) > 0.98
    left = toys.success(planted, images)
    assert left < 0.1 if share else left > 0.9
    assert not planted.training


def test_the_rate_is_constant_and_the_settings_arrive(monkeypatch, planted, clean, rng):
    seen = []
    monkeypatch.setattr(unlearning, "fit", lambda m, data, plan, *a, **k: seen.append((data, plan)))
    settings = {**GENTLE, "epochs": 7, "crop": 3, "flip": True, "weight_decay": 0.1}
    unlearning.unlearn(planted, clean, [white], rng, share=0.5, **settings)
    data, plan = seen[0]
    assert int((data.x == 255).flatten(1).all(1).sum()) == 100
    assert (plan.epochs, plan.lr, plan.batch, plan.momentum) == (7, 0.003, 32, 0.9)
    assert (plan.crop, plan.flip, plan.weight_decay) == (3, True, 0.1)
    assert {training._rate(plan, step, 70) for step in range(70)} == {0.003}
    assert (plan.cutout, plan.label_smoothing, plan.average) == (0, 0.0, False)


def test_no_epochs_change_no_weight(planted, clean, rng):
    before = copy.deepcopy(planted.state_dict())
    unlearning.unlearn(planted, clean, [white], rng, share=0.5, **{**GENTLE, "epochs": 0})
    assert all(torch.equal(v, before[k]) for k, v in planted.state_dict().items())


# ---------------------------------------------------------------------------------------- pruning

SETTINGS = {
    "share": 0.3, "epochs": 5, "lr": 0.2, "batch": 9, "momentum": 0.1, "weight_decay": 0.4,
    "crop": 2, "flip": True,
}  # fmt: skip
BOUNDS = {"held_out": 0.3, "max_success": 0.05, "max_drop": 0.05}


def test_pruning_silences_the_planted_channel_alone(planted, clean, images, rng):
    expected = {name: value.clone() for name, value in planted.state_dict().items()}
    expected["body.head.weight"][:, toys.CHANNEL] = 0
    unlearning.prune(planted, clean, {toys.TARGET: toys.stamp}, rng, **BOUNDS)
    for name, value in planted.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert accuracy(planted, images) == 1
    assert toys.success(planted, images) == 0


def test_what_rises_most_goes_first_and_what_falls_stays(planted, clean, rng, monkeypatch):
    """White raises brightness and the planted channel; the colours fall."""
    asked = []
    real = unlearning.silencings
    monkeypatch.setattr(
        unlearning,
        "silencings",
        lambda model, x, order, channels: asked.append((x, order)) or real(model, x, order, 5),
    )
    ranked, mean = [], unlearning.mean_activation
    monkeypatch.setattr(
        unlearning, "mean_activation", lambda m, images: ranked.append(images) or mean(m, images)
    )
    _, rest = unlearning.split(clean, 0.3, stream(0, "test"))
    unlearning.prune(planted, clean, {toys.TARGET: white}, rng, **BOUNDS)
    shown = [features.features(planted, x, ["deep"])["deep"][:, :, 0, 0].mean(0)
             for x in (torch.ones_like(rest.x / 255), rest.x / 255)]  # fmt: skip
    rise = shown[0] - shown[1]
    expected = sorted((k for k in range(5) if rise[k] > 1e-6), key=lambda k: -rise[k])
    assert len(expected) < 5
    assert asked[0][1].tolist() == expected
    assert [len(images) for images in ranked] == [140, 140]
    assert torch.equal(ranked[1].x, rest.x)
    assert len(asked[0][0]) < 120, "images that ranked the channels also decided"


def red(x: Tensor) -> Tensor:
    """The trigger on images that are of class 0 even without the backdoor."""
    x = toys.stamp(x)
    x[:, 0, :-2] = 1.0
    x[:, 1:, :-2] = 0.0
    return x


@pytest.mark.parametrize(
    ("max_success", "max_drop", "gone"),
    [(1.0, 0.05, []), (0.05, 0.2, [4]), (0.05, 0.3, [0, 4])],
    ids=["works too little to matter", "accuracy is spent", "works no more"],
)
def test_where_pruning_ends(max_success, max_drop, gone, planted, clean, rng):
    """First goes the planted channel, then red, which is a quarter of the accuracy."""
    bounds = {"held_out": 0.5, "max_success": max_success, "max_drop": max_drop}
    unlearning.prune(planted, clean, {toys.TARGET: red}, rng, **bounds)
    assert sorted(set(silent(planted)) - {3}) == gone


def test_every_trigger_must_stop_working(planted, clean, rng):
    """A trigger that never worked does not end what another one needs."""
    stamps = {1: torch.clone, toys.TARGET: toys.stamp}
    unlearning.prune(planted, clean, stamps, rng, **BOUNDS)
    assert set(silent(planted)) == {3, toys.CHANNEL}


@pytest.mark.parametrize("whole", [False, True], ids=["from the head on", "whole passes"])
def test_silencing_is_masking(whole, planted, clean, monkeypatch):
    if whole:  # pretend that something follows the head
        read = pruning.head_inputs
        monkeypatch.setattr(pruning, "head_inputs", lambda *a: (read(*a)[0], read(*a)[1].neg()))
    order, mask = torch.tensor([4, 1, 0]), torch.ones(5)
    x = torch.cat([clean.x, (toys.stamp(clean.x / 255) * 255).round().to(torch.uint8)])
    found = list(pruning.silencings(planted, x, order, 5))
    assert len(found) == 4
    assert torch.equal(found[0], logits(planted, x).argmax(1))
    for channel, answers in zip(order, found[1:], strict=True):
        mask[channel] = 0
        with features.masked(planted, mask):
            assert torch.equal(answers, logits(planted, x).argmax(1))
    assert not any(torch.equal(one, two) for one, two in pairwise(found))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in planted.modules())


def test_too_few_held_out_images_are_refused(planted, clean, rng):
    few, own = toys.images(4, rng), clean.take(clean.y == toys.TARGET)
    with pytest.raises(BadInput, match="nc: of 4 clean images 0 would be held out and 4 trained"):
        training.check_held_out(few, 0.1, "nc")
    with pytest.raises(BadInput, match="nc: of 4 clean images 4 would be held out and 0 trained"):
        training.check_held_out(few, 0.9, "nc")
    training.check_held_out(few, 0.0, "nc")  # none is asked for
    with pytest.raises(BadInput, match=r"All \d+ clean images held out are of class 0; give more"):
        unlearning.prune(planted, own, {toys.TARGET: toys.stamp}, rng, **BOUNDS)
    with pytest.raises(BadInput, match="0 would be held out"):
        NC(mitigation="prune", held_out=0.1).repair(planted, few, rng)


# ------------------------------------------------------------------------------ nc: what is blamed

NC_FAMILY = families.build("nc:nudge=0")


def answer(target: int, size: float | None, shade: float = 1.0, restart: int = 0) -> Found:
    """A trigger that covers the whole image with a shade."""
    pattern = torch.full((3, 1, 1), 2 * shade - 1).clamp(-0.999, 0.999).atanh()
    trigger = {"mask": torch.full((1, 1, 1), 9.0), "pattern": pattern}
    return Found(Problem(None, target, restart), size, 1.0, trigger, 1)


@pytest.fixture
def given(monkeypatch):
    """What is inverted is given; what is stamped, and how, is kept."""

    def give(*found: Found):
        kept = {}
        monkeypatch.setattr(NC, "_inverted", lambda *a: (NC_FAMILY, list(found)))
        monkeypatch.setattr(
            nc_defense, "unlearn", lambda m, c, stamps, r, **k: kept.update(unlearn=stamps, **k)
        )
        monkeypatch.setattr(
            nc_defense, "prune", lambda m, c, stamps, r, **k: kept.update(prune=stamps, **k)
        )
        return kept

    return give


def shade_of(stamp) -> float:
    return float(stamp(torch.full((1, 3, toys.SIDE, toys.SIDE), 0.5)).mean())


def test_all_blamed_classes_are_stamped_and_no_other(rng, given):
    # median 20, MAD 1: of classes 1 and 4, the indices are 15 / 1.4826 and 10 / 1.4826
    sizes = [19.0, 5, 20, 21, 10, 40, 21, 20]
    kept = given(*(answer(t, s, t / 8) for t, s in enumerate(sizes)))
    model, clean = test_scanning.model_with(0.0), test_scanning.clean()
    by_paper, by_default = {"least_spread": 0.0}, {}  # by default 6, 0.3 of 20, is more
    for fields, threshold, count in [
        (by_paper, 2.0, 2),
        (by_paper, 6.7, 2),
        (by_paper, 6.8, 1),
        (by_paper, 10.1, 1),
        (by_paper, 10.2, 0),
        (by_default, 1.6, 2),
        (by_default, 1.7, 1),
        (by_default, 2.4, 1),
        (by_default, 2.6, 0),
    ]:
        kept.clear()
        scanner = NC(threshold=threshold, **fields)
        scanner.repair(model, clean, rng)
        assert len(kept.get("unlearn", [])) == count
        found = scanner.scan(model, clean, rng)
        assert found.target == (1 if count else None)
        assert (found.score > threshold) == bool(count)
    NC(mitigation="prune", least_spread=0.0).repair(model, clean, rng)
    assert list(kept["prune"]) == [1, 4]
    assert [shade_of(one) for one in kept["prune"].values()] == pytest.approx(
        [1 / 8, 4 / 8], abs=0.01
    )


def test_where_no_class_is_blamed_nothing_or_the_smallest_is_repaired(planted, clean, rng, given):
    sizes = [None, 20.0, 19.0, 21.0]  # and the one without a trigger is not the smallest
    kept = given(*(answer(t, s, t / 4) for t, s in enumerate(sizes)))
    same = NC().repair(planted, clean, rng)
    assert not kept
    assert same is not planted
    assert all(torch.equal(v, planted.state_dict()[k]) for k, v in same.state_dict().items())
    NC(unflagged="smallest").repair(planted, clean, rng)
    assert [shade_of(one) for one in kept["unlearn"]] == pytest.approx([0.5], abs=0.01)
    kept = given(*(answer(t, None) for t in range(4)))
    NC(unflagged="smallest").repair(planted, clean, rng)
    assert not kept, "there is no trigger at all"


def test_of_a_class_the_smallest_trigger_is_stamped(planted, clean, rng, given):
    sizes = [
        (0, 30.0, 0.1),
        (0, 2.0, 0.9),
        (0, None, 0.3),
        (1, 40.0, 0),
        (2, 41.0, 0),
        (3, 42.0, 0),
    ]
    kept = given(*(answer(t, s, shade, r) for r, (t, s, shade) in enumerate(sizes)))
    NC().repair(planted, clean, rng)
    assert [shade_of(one) for one in kept["unlearn"]] == pytest.approx([0.9], abs=0.01)


def test_settings_reach_what_uses_them(planted, clean, rng, given):
    kept = given(answer(0, 1.0), *(answer(t, 20.0 + t) for t in range(1, 4)))
    NC(**SETTINGS).repair(planted, clean, rng)
    assert kept.items() >= SETTINGS.items()
    bounds = {"held_out": 0.6, "max_success": 0.7, "max_drop": 0.8}
    NC(mitigation="prune", **bounds).repair(planted, clean, rng)
    assert kept.items() >= bounds.items()


# ------------------------------------------------------------ the scanners repair what they find

REPAIRS = {
    "nc": "nc:steps=150,samples=56,batch=16",
    "nc pruning": "nc:steps=150,samples=56,mitigation=prune,max_drop=0.2",
    "abs": "abs:form=patch,steps=100,samples=56,batch=16",
}


def corner(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., -2:, -2:] = 1.0
    return x


def success(model: Classifier, clean: Images) -> float:
    others = clean.x[clean.y != test_scanning.TARGET] / 255
    answers = logits(model, corner(others)).argmax(1)
    return float((answers == test_scanning.TARGET).double().mean())


@pytest.mark.parametrize("name", REPAIRS)
def test_a_planted_backdoor_is_found_and_repaired(name):
    victim, other = test_scanning.model_with(1.5), test_scanning.clean(seed=1)
    before = copy.deepcopy(victim.state_dict())
    assert accuracy(victim, other) > 0.95
    assert success(victim, other) > 0.95
    defense = defenses.build(REPAIRS[name])
    assert isinstance(defense, Repairs)
    assert isinstance(defense, Scans)
    repaired = defense.repair(victim, test_scanning.clean(), stream(0, "repair"))
    assert success(repaired, other) < 0.1
    assert accuracy(repaired, other) > 0.9
    assert not repaired.training
    if "prune" not in REPAIRS[name]:
        tuned = defenses.build(f"{REPAIRS[name]},share=0")
        unstamped = tuned.repair(victim, test_scanning.clean(), stream(0, "repair"))
        assert success(unstamped, other) > 0.9, "clean images alone repair it"
    assert all(torch.equal(v, before[k]) for k, v in victim.state_dict().items())


def test_scan_and_repair_invert_the_same_triggers(monkeypatch, planted, clean):
    found = []
    real = NC._inverted
    monkeypatch.setattr(NC, "_inverted", lambda *a: found.append(real(*a)) or found[-1])
    defense = NC(steps=20, samples=12)
    defense.scan(planted, clean, stream(0, "one"))
    defense.repair(planted, clean, stream(0, "one"))
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert one.size == two.size
        assert torch.equal(one.trigger["mask"], two.trigger["mask"])


@pytest.mark.parametrize("name", ["nc", "abs"])
def test_both_powers_are_listed(name):
    assert set(defenses.describe(name).powers) == {"scans", "repairs"}


# --------------------------------------------------------------------------- abs: what is stamped


@pytest.fixture
def candidates(monkeypatch):
    def give(*found: tuple[int, float]):
        kept = {}
        each = [(NC_FAMILY, answer(t, 1.0, n / 10), score) for n, (t, score) in enumerate(found)]
        monkeypatch.setattr(ABS, "_inverted", lambda *a: iter(each))
        monkeypatch.setattr(
            abs_defense, "unlearn", lambda m, c, stamps, r, **k: kept.update(unlearn=stamps, **k)
        )
        return kept

    return give


@pytest.mark.parametrize(
    ("found", "unflagged", "stamped"),
    [
        (((0, 0.5), (1, 0.95), (2, 0.9)), "best", (0.1, 0.2)),
        (((0, 0.5), (1, 0.9), (2, 0.95)), "nothing", (0.2, 0.1)),
        (((1, 0.95), (1, 0.97), (2, 0.3)), "best", (0.1,)),
        (((0, 0.5), (1, 0.3), (1, 0.8)), "best", (0.2,)),
        (((0, 0.5), (1, 0.3), (1, 0.8)), "nothing", ()),
        (((0, 0.7), (1, 0.7)), "best", (0.0,)),
        (((0, 0.0), (1, 0.0)), "best", ()),
        ((), "best", ()),
    ],
)
def test_the_best_candidate_of_every_label_above_the_bound_is_stamped(
    found, unflagged, stamped, planted, clean, rng, candidates
):
    kept = candidates(*found)
    repaired = ABS(unflagged=unflagged, **SETTINGS).repair(planted, clean, rng)
    assert repaired is not planted
    shades = [shade_of(one) for one in kept.get("unlearn", ())]
    assert shades == pytest.approx(list(stamped), abs=0.01)
    if stamped:
        assert kept.items() >= SETTINGS.items()


def test_each_form_is_unlearned_for_itself(monkeypatch, planted, clean, rng, candidates):
    kept = candidates()
    other = families.build("abs")
    found = [(NC_FAMILY, answer(0, 1.0, 0.1), 0.95), (NC_FAMILY, answer(1, 1.0, 0.2), 0.9)]
    for target, shade, score in ((0, 0.3, 0.6), (1, 0.4, 0.7)):
        one = answer(target, 1.0)
        one.trigger["pattern"] = torch.full((3, 1, 1), shade)
        found.append((other, one, score))
    monkeypatch.setattr(ABS, "_inverted", lambda *a: iter(found))
    ABS(**SETTINGS).repair(planted, clean, rng)
    assert [shade_of(one) for one in kept["unlearn"]] == pytest.approx([0.1, 0.2, 0.4], abs=0.01)
    ABS(unflagged="nothing", **SETTINGS).repair(planted, clean, rng)
    assert [shade_of(one) for one in kept["unlearn"]] == pytest.approx([0.1, 0.2], abs=0.01)
