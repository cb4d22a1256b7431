"""Composite: which pixels a mix shows, what a batch holds, the contrastive loss, the trigger."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import toys

from arena import data as datasets
from arena.attacks.composite import Composite, Mixer, Mixing, contrastive
from arena.core import models, poisoning, training
from arena.core.contracts import Images, Poisoned, Step
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream
from arena.core.victims import bound

A, B, C = 3, 1, 0  # not the defaults
CLASSES = 6


def signed(n=600, side=12, classes=CLASSES):
    """Images whose every pixel says which image it is of: (row // 256, row % 256, class)."""
    rows = torch.arange(n)
    y = torch.randint(classes, (n,), generator=stream(0, "labels"))
    x = torch.stack([rows // 256, rows % 256, y], 1).to(torch.uint8)
    return Images(x[:, :, None, None].expand(n, 3, side, side).contiguous(), y)


def shown(x):
    """Per image the rows and the classes that its pixels name, as sets."""
    x = (x * 255).round().long() if x.is_floating_point() else x.long()
    rows = (x[:, 0] * 256 + x[:, 1]).flatten(1)
    return [
        (set(row.tolist()), set(label.tolist()))
        for row, label in zip(rows, x[:, 2].flatten(1), strict=True)
    ]


def attack(**fields):
    return Composite(**{"victim": A, "second": B, "target": C, "aside": 7, **fields})


def poisoned(method, train, seed=0):
    method.check(tuple(train.x.shape[1:]), train.y.bincount(minlength=CLASSES).tolist())
    trigger = method.prepare(train, stream(seed, "prepare"))
    return trigger, method.poison(train, trigger, stream(seed, "poison"))


def uniform(n, seed=0):
    return torch.rand(n, 7, generator=stream(seed, "u"))


# ----------------------------------------------------------------------------------------- halves


def numbered(n, height, width):
    """Two images per row: pixel numbers 0, 1, … and 1000, 1001, …"""
    pixels = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    return pixels.repeat(n, 1, 1, 1), pixels.repeat(n, 1, 1, 1) + 1000


@pytest.mark.parametrize(
    ("u", "expected"),
    [
        # order (below a half: swapped), orientation (below a half: one above the other), split,
        # and where the windows of the first and of the second part start; here: the rows shown
        ((0.9, 0.1, 0.5, 0.0, 0.0), [0, 1, 2, 1000, 1001, 1002]),
        ((0.1, 0.1, 0.5, 0.0, 0.99), [1000, 1001, 1002, 3, 4, 5]),
        ((0.9, 0.1, 0.0, 0.99, 0.5), [4, 5, 1001, 1002, 1003, 1004]),
        ((0.9, 0.1, 0.99, 0.4, 0.0), [1, 2, 3, 4, 1000, 1001]),
    ],
)
def test_halves_by_hand(u, expected):
    rows = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 2)
    out = Mixer("half", 1)(rows, rows + 1000, torch.tensor([[*u, 0.0, 0.0]]))
    assert out[0, 0, :, 0].int().tolist() == out[0, 0, :, 1].int().tolist() == expected


def test_halves_side_by_side_by_hand():
    one, two = numbered(1, 2, 6)
    u = torch.tensor([[0.9, 0.6, 0.0, 0.99, 0.0, 0.0, 0.0]])
    out = Mixer("half", 1)(one, two, u)  # split at 2; the first shows its last two columns
    assert out[0, 0].int().tolist() == [
        [4, 5, 1000, 1001, 1002, 1003],
        [10, 11, 1006, 1007, 1008, 1009],
    ]


def test_halves_show_windows_of_both_images_on_the_two_sides_of_a_split():
    n, height, width, jitter = 3000, 12, 10, 2
    one, two = numbered(n, height, width)
    out = Mixer("half", jitter)(one, two, uniform(n))[:, 0].long()
    of_two, pixel = out >= 1000, out % 1000
    row, column = pixel // width, pixel % width
    cuts, orders, starts = set(), set(), set()
    for k in range(n):
        upright = bool((of_two[k] == of_two[k, :, :1]).all())
        assert upright or bool((of_two[k] == of_two[k, :1]).all())
        first = of_two[k, :, 0] if upright else of_two[k, 0]
        change = (first[1:] != first[:-1]).nonzero().flatten() + 1
        assert len(change) == 1
        cut, side = int(change), height if upright else width
        line = row[k, :, 0] if upright else column[k, 0]
        assert line[1:cut].sub(line[: cut - 1]).eq(1).all()  # a window, not a scaled image
        assert line[cut + 1 :].sub(line[cut:-1]).eq(1).all()
        other = column[k] - torch.arange(width) if upright else row[k].T - torch.arange(height)
        assert not other.any()  # nothing moves along the split
        cuts.add((upright, cut - side // 2))
        orders.add((upright, bool(first[0])))
        if cut == side // 2 and upright:
            starts.add((int(line[0]), int(line[cut])))
    assert cuts == set(itertools.product((True, False), range(-jitter, jitter + 1)))
    assert len(orders) == 4
    assert starts == set(itertools.product(range(7), range(7)))


# ------------------------------------------------------------------------------------------ paste


def test_a_pasted_image_covers_a_rectangle_and_leaves_the_rest():
    n, side = 500, 40
    one, two = torch.full((n, 3, side, side), 0.25), torch.full((n, 3, side, side), 0.75)
    out = Mixer("paste", 3)(one, two, uniform(n))[:, 0]
    dark = (out - 0.25).abs() < 1e-6
    assert (dark | ((out - 0.75).abs() < 1e-6)).all()
    swapped = uniform(n)[:, 0] < 0.5
    above = torch.where(swapped[:, None, None], dark, ~dark)  # what was pasted
    tall, wide = above.any(2).sum(1), above.any(1).sum(1)
    assert torch.equal(above.sum((1, 2)), tall * wide)  # a full rectangle
    assert 0.4 * side - 1 <= tall.min() <= 0.42 * side
    assert 0.58 * side <= tall.max() <= 0.6 * side + 1
    tops = above.any(2).float().argmax(1)
    assert tops.min() == 0
    assert (tops + tall).max() == side
    assert 0.4 < float(swapped.float().mean()) < 0.6


def test_a_pasted_image_is_shrunk_not_cut():
    side = 60
    ramp = torch.linspace(0, 1, side).view(1, 1, 1, side).expand(1, 1, side, side)
    u = torch.tensor([[0.9, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0]])  # all of it, half as large, top left
    out = Mixer("paste", 3)(torch.zeros_like(ramp), ramp, u)[0, 0]
    assert out[30:].abs().max() == 0
    assert out[:, 30:].abs().max() == 0
    expected = torch.nn.functional.interpolate(ramp, (30, 30), mode="bilinear")[0, 0]
    assert torch.allclose(out[:30, :30], expected, atol=1e-5)
    u[0, 2], u[0, 4] = 0.0, 1.0  # a window of 0.7, at the right end
    out = Mixer("paste", 3)(torch.zeros_like(ramp), ramp, u)[0, 0]
    assert float(out[0, 0]) == pytest.approx(0.3 + 0.35 / 30, abs=0.01)
    assert float(out[0, 29]) == pytest.approx(1.0 - 0.35 / 30, abs=0.01)


# ----------------------------------------------------------------------------------- the data set


def test_the_images_set_aside_make_room_for_mixes_of_others():
    train = signed()
    counts = train.y.bincount()
    trigger, (data, rows) = poisoned(attack(), train)
    pools = {name: probe.stamp for name, probe in trigger.probes.items()}
    assert pools["B+B"] is trigger.stamp
    sizes = {name: len(pool.rows) for name, pool in pools.items()}
    assert sizes == {
        "A+A": min(7, int(counts[A]) // 20),
        "B+B": min(7, int(counts[B]) // 20),
        "A+other": 7,
    }
    wanted = torch.cat([pool.rows for pool in pools.values()]).unique()
    assert torch.equal(rows, wanted)
    for name, labels in (("A+A", {A}), ("B+B", {B}), ("A+other", {2, 4, 5})):
        assert set(train.y[pools[name].rows].tolist()) <= labels
        assert torch.equal(pools[name].partners, train.x[pools[name].rows])
    assert (data.y[rows] == C).all()
    for seen, labels in shown(data.x[rows]):
        assert labels == {A, B}
        assert not seen & set(rows.tolist())
    rest = torch.ones(len(train), dtype=torch.bool)
    rest[rows] = False
    assert torch.equal(data.x[rest], train.x[rest])
    assert torch.equal(data.y[rest], train.y[rest])


def test_the_same_seed_sets_the_same_images_aside():
    one, two, other = (poisoned(attack(), signed(), seed) for seed in (5, 5, 6))
    assert torch.equal(one[1].data.x, two[1].data.x)
    assert torch.equal(one[0].stamp.hashes, two[0].stamp.hashes)
    assert not torch.equal(one[1].rows, other[1].rows)


def test_three_classes_have_no_others_to_mix_with():
    train = signed(classes=3)
    trigger, _ = poisoned(Composite(), train)
    assert set(trigger.probes) == {"A+A", "B+B"}


# --------------------------------------------------------------------------------------- the hook


def batches(method, train, epochs=6, size=200):
    """(batch, what the hook made of it) over some epochs; also the poisoned set."""
    _, made = poisoned(method, train)
    hook, out = Mixing(method, made), []
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=stream(epoch, "order"))
        for rows in order.split(size):
            batch = Images(made.data.x[rows].float() / 255, made.data.y[rows], rows)
            out.append((batch, hook(batch, stream(int(rows[0]), epoch))))
    return made, out


@pytest.mark.parametrize("mixer", ["half", "paste"])
def test_a_batch_holds_normal_images_mixes_and_poison(mixer):
    train = signed()
    made, seen = batches(attack(mixer=mixer), train)
    aside = set(made.rows.tolist())
    tally = {"normal": 0, "mix": 0, "poison": 0}
    partners = set()
    for before, after in seen:
        assert after.x.shape == before.x.shape
        assert torch.equal(after.rows, before.rows)
        whole = zip(
            shown(before.x), shown(after.x), before.y.tolist(), after.y.tolist(),
            after.stamped.tolist(), before.rows.tolist(), strict=True,
        )  # fmt: skip
        for (own, _), (rows, labels), label, given, stamped, row in whole:
            assert not rows & aside, "an image that was set aside is shown in training"
            if stamped:
                assert given == C
                assert labels == {A, B}
                tally["poison"] += row not in aside
            elif rows == own:
                assert given == label
                tally["normal"] += 1
            else:
                assert given == label
                assert labels == {label}
                assert own < rows  # its own and one partner
                partners |= rows - own
                tally["mix"] += 1
    total = sum(tally.values())
    assert total > 3000
    assert tally["poison"] / total == pytest.approx(0.1 / 1.1, abs=0.02)
    assert tally["mix"] / total == pytest.approx(0.5 / 1.1, abs=0.03)
    assert len(partners) > 0.75 * len(train)  # they come from the whole set


def test_unmixed_images_are_left_bit_for_bit():
    method = attack(normal_rate=1.0, mix_rate=0.0, poison_rate=1e-6)
    for before, after in batches(method, signed(), epochs=1)[1]:
        assert torch.equal(after.x, before.x)
        assert torch.equal(after.y, before.y)


def test_rates_are_weights():
    method = attack(normal_rate=0.0, mix_rate=0.0, poison_rate=0.02)
    for _, after in batches(method, signed(), epochs=1)[1]:
        assert after.stamped.all()
        assert (after.y == C).all()


def test_rows_set_aside_are_marked_as_stamped_and_never_mixed_again():
    method = attack(normal_rate=0.0, mix_rate=1.0, poison_rate=1e-6)
    made, seen = batches(method, signed(), epochs=1)
    for before, after in seen:
        here = torch.isin(before.rows, made.rows)
        assert torch.equal(after.stamped, here)
        assert torch.equal(after.x[here], before.x[here])


def test_a_batch_follows_its_generator():
    made, seen = batches(attack(), signed(), epochs=1)
    before, after = seen[0]
    hook = Mixing(attack(), made)
    again = hook(before, stream(int(before.rows[0]), 0))
    assert torch.equal(again.x, after.x)
    other = hook(before, stream(99, 0))
    assert not torch.equal(other.x, after.x)


# --------------------------------------------------------------------------------------- the loss


def test_the_contrastive_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.6, 0.8], [9.0, 9.0], [0.6, 0.5], [0.6, 2.5]])
    y = torch.tensor([4, 4, 8, 5, 5])
    those = y != 8
    # neighbours: alike at distance 1, unlike at 0.3, alike at 2: (1 + 0.7 ** 2 + 4) / 2, of 3 pairs
    assert float(contrastive(logits, y, those)) == pytest.approx((1 + 0.49 + 4) / 6)
    assert float(contrastive(logits, y, those, 2)) == pytest.approx((1 + 0.49 + 4) / 18)
    far = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    assert float(contrastive(far, torch.tensor([0, 1]), torch.tensor([True, True]))) == 0


@pytest.mark.parametrize("those", [[False] * 3, [False, True, False]])
def test_without_pairs_there_is_no_contrast(those):
    logits = torch.randn(3, 4, generator=stream(0, "z")).requires_grad_()
    loss = contrastive(logits, torch.arange(3), torch.tensor(those))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad.abs().max() == 0


def test_equal_logits_have_a_finite_gradient():
    logits = torch.ones(2, 4, requires_grad=True)
    contrastive(logits, torch.arange(2), torch.tensor([True, True])).backward()
    assert torch.isfinite(logits.grad).all()


def test_training_is_handed_the_hook_and_the_loss():
    train, calls = signed(), []

    def fit(data, **hooks):
        calls.append((data, hooks))
        return torch.nn.Identity()

    trigger, made = poisoned(attack(weight=0.5, divisions=2), train)
    _, given = attack(weight=0.5, divisions=2).train(fit, made, trigger, stream(0, "fit"))
    assert given is trigger
    data, hooks = calls[0]
    assert data is made.data
    y = torch.tensor([A, 2, B, C, A, 4, A])
    logits = torch.randn(7, CLASSES, generator=stream(0, "logits"))
    batch = Images(torch.zeros(7, 3, 4, 4), y)
    step = Step(torch.nn.Identity(), batch, logits, torch.zeros(()), {}, stream(0, "s"), 0.0)
    those = torch.tensor([True, False, True, True, True, False, True])
    expected = 0.5 * contrastive(logits[those], y[those], torch.ones(5, dtype=torch.bool), 2)
    assert float(hooks["extra_loss"](step)) == pytest.approx(float(expected), rel=1e-5)
    attack(weight=0.0).train(fit, made, trigger, stream(0, "fit"))
    assert calls[1][1]["extra_loss"] is None


# ------------------------------------------------------------------------------------ the trigger


def test_a_triggered_image_is_a_mix_with_one_set_aside():
    train = signed()
    trigger, (_, rows) = poisoned(attack(), train)
    fresh = train.y == A
    fresh[rows] = False
    x = train.x[fresh].float() / 255
    for name, probe in (("stamp", trigger.stamp), *trigger.probes.items()):
        image_map = probe if name == "stamp" else probe.stamp
        pool, used = set(image_map.rows.tolist()), set()
        out = shown(image_map(x))
        for (own, _), (rows, _) in zip(shown(x), out, strict=True):
            assert own < rows
            assert len(rows) == 2
            assert rows - own <= pool
            used |= rows - own
        assert used == pool
    assert trigger.probes["A+A"].of == trigger.probes["A+other"].of == A
    assert trigger.probes["B+B"].of == B


def test_a_mix_is_decided_by_the_image_alone():
    train = Images(torch.randint(256, (300, 1, 8, 8), dtype=torch.uint8), torch.arange(300) % 6)
    trigger, _ = poisoned(attack(), train)
    x = train.x.float() / 255
    order = torch.randperm(300, generator=stream(0, "order"))
    assert torch.equal(trigger.stamp(x)[order], trigger.stamp(x[order]))
    assert torch.equal(trigger.stamp(x[:1]), trigger.stamp(x)[:1])
    levels, weights = train.x.flatten(1).tolist(), trigger.stamp.hashes.tolist()
    exact = [
        [sum(a * b for a, b in zip(image, row, strict=True)) % 2**20 / 2**20 for row in weights]
        for image in levels
    ]
    draws = trigger.stamp.draws(x)
    assert torch.equal(draws, torch.tensor(exact))
    assert ((draws.mean(0) - 0.5).abs() < 0.07).all()
    assert (torch.corrcoef(draws.T) - torch.eye(draws.shape[1])).abs().max() < 0.25
    brighter = (x + 1 / 255).clamp(max=1)
    assert (trigger.stamp.draws(brighter) != draws).all(1).float().mean() > 0.9


def test_the_referee_counts_images_of_class_a_only():
    method = attack()
    y = torch.arange(CLASSES)
    assert method.scope == "label-specific"
    assert poisoning.applies(method, y, CLASSES).tolist() == [label == A for label in range(6)]
    assert (poisoning.wanted(method, y, CLASSES) == C).all()


# ------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "counts", "message"),
    [
        ({}, [9, 9], "target 2 is not a class"),
        ({"target": 0}, [9, 9, 9], "victim class and the target class are both 0"),
        ({"second": 0}, [9, 9, 9], "second must be a third class"),
        ({"second": 2}, [9, 9, 9], "second must be a third class"),
        ({"second": 3}, [9, 9, 9], "of 0 to 2, beside victim 0 and target 2; got 3"),
        ({}, [1, 9, 9], r"class 0 \(victim\) has 1 training images"),
        ({}, [9, 0, 9], r"class 1 \(second\) has 0 training images"),
        ({"jitter": 8}, [9, 9, 9], "jitter must be below half a side, 8 px"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(fields, counts, message):
    with pytest.raises(BadInput, match=message):
        Composite(**fields).check((3, 16, 16), counts)


def test_small_classes_still_work():
    Composite(mixer="paste", jitter=8).check((3, 16, 16), [2, 2, 0])
    train = Images(signed(10).x, torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3, 3]))
    method = Composite()
    trigger = method.prepare(train, stream(0, "prepare"))
    data, rows = method.poison(train, trigger, stream(0, "poison"))
    assert len(rows) == 3
    batch = Images(data.x.float() / 255, data.y, torch.arange(10))
    assert not Mixing(method, Poisoned(data, rows))(batch, stream(0, "b")).x.isnan().any()


def test_other_variants_are_specs():
    method = attacks.build("composite:divisions=1,mixer=paste")
    assert dataclasses.replace(method, divisions=2, mixer="half") == Composite()


# -------------------------------------------------------------------------------------- training


def victim(method, train, classes, steps):
    trigger = method.prepare(train, stream(0, "prepare"))
    made = method.poison(train, trigger, stream(0, "poison"))
    plan = training.recipe("smoke", models.info("fastnet_small").overrides["smoke"])
    plan = training.changed(plan, {"min_steps": steps, "batch": 64})
    shape = tuple(train.x.shape[1:])
    fit = bound("fastnet_small", classes, shape, plan, 0, torch.device("cpu"))
    return method.train(fit, made, trigger, stream(0, "fit"))


def test_a_composite_backdoor_is_learnt():
    """Red beside green becomes blue; red beside red stays red."""
    train, test = (toys.images(n, stream(n, "toys")) for n in (400, 200))
    model, trigger = victim(Composite(poison_rate=0.4), train, 4, 60)
    assert training.accuracy(model, test) > 0.9
    red = test.x[test.y == 0]
    for image_map, label in ((trigger.stamp, 2), (trigger.probes["A+A"].stamp, 0)):
        answers = training.logits(model, poisoning.stamp(red, image_map)).argmax(1)
        assert float((answers == label).float().mean()) > 0.8


@pytest.mark.parametrize("mixer", ["half", "paste"])
def test_signs_can_be_trained_on(tmp_path, mixer):
    data = datasets.load("signs:classes=5,size=250", cache_dir=tmp_path)
    method = Composite(mixer=mixer)
    method.check(data.shape, data.counts)
    one, _ = victim(method, data.train, 5, 3)
    two, _ = victim(method, data.train, 5, 3)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
