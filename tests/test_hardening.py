"""Hardening: triggers inverted on batches, the scheduler of pairs, the bound on accuracy."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from torch import Tensor

from arena.core import hardening, progress, training
from arena.core.contracts import Images
from arena.core.hardening import (
    Course,
    Inverter,
    Pace,
    Pairs,
    Scheduler,
    Universal,
    hardened,
    portion_of,
)
from arena.core.inversion.engine import Found, Problem
from arena.core.inversion.families import families
from arena.core.registry import BadInput, defenses
from arena.core.seeding import stream

QUICK = Pace(first=6, more=3)


def batch(count: int, seed: int = 0) -> Images:
    images = toys.images(count, stream(seed, "batch"))
    return Images(images.x / 255, images.y)


def pairs_of(model, clean, **options) -> Pairs:
    scheduler = Scheduler(toys.CLASSES, options.pop("explore", 0.0), options.pop("order", "turns"))
    pace = options.pop("pace", QUICK)
    family = families.build("nc:weight=steps")
    return Pairs(Inverter(model, family), pace, scheduler, clean, warm_passes=5, **options)


def changed(before: Images, after: Images) -> Tensor:
    """Rows whose image differs."""
    return (before.x != after.x).flatten(1).any(1).nonzero().flatten()


# -------------------------------------------------------------------------------------- the trainer


def count_batches(model, clean, **options):
    seen = []

    def keep(images: Images, rng) -> Images:
        seen.append(images)
        return images

    settings = {"updates": 7, "max_drop": 1.0, "batch": 50, "crop": 0} | options
    out = hardened(model, clean, stream(0, "h"), lambda copy, tune: keep, Course(**settings))
    return seen, out


def test_it_makes_the_updates_asked_for(planted, clean):
    seen, _ = count_batches(planted, clean)
    assert len(seen) == 7
    assert all(len(images) == 50 for images in seen)


def test_progress_is_that_of_the_updates_asked_for(planted, clean):
    told = []
    with progress.listening(lambda *report: told.append(report[:3])):
        count_batches(planted, clean, updates=7, batch=36)  # the third epoch of five batches
    phases = ["training without triggers", "hardening"]
    assert [what for what, *_ in told] == sorted((what for what, *_ in told), key=phases.index)
    for phase in phases:
        steps = [done for what, done, _ in told if what == phase]
        assert steps == sorted(steps)
        assert steps[-1] == 7
    assert all(total == 7 for *_, total in told)


def test_no_update_sees_a_held_out_image(planted, clean):
    clean.x[:] = torch.arange(200, dtype=torch.uint8)[:, None, None, None]  # a number on each
    tuned = []

    def watch(copied, tune):
        tuned.append(tune)
        return keep

    shown: set[int] = set()

    def keep(images, rng):
        shown.update((images.x[:, 0, 0, 0] * 255).round().int().tolist())
        return images

    course = Course(updates=30, max_drop=1.0, batch=36, crop=0, lr=1e-9)
    hardened(planted, clean, stream(0, "h"), watch, course)
    assert len(tuned[0]) == 180
    assert shown == set(tuned[0].x[:, 0, 0, 0].int().tolist())


def test_weights_beyond_the_bound_are_given_up(planted, clean):
    """A rate that ruins the model: what comes back is the model as it came."""
    _, out = count_batches(planted, clean, updates=200, lr=50.0, max_drop=0.0)
    assert training.accuracy(out, clean) == training.accuracy(planted, clean)
    for name, value in out.state_dict().items():
        assert torch.equal(value, planted.state_dict()[name]), name


def test_it_ends_soon_after_the_bound_is_passed(planted, clean):
    seen, _ = count_batches(planted, clean, updates=500, lr=50.0, max_drop=0.0)
    assert len(seen) == hardening._LOOK * hardening._PATIENCE


@pytest.mark.parametrize("updates", [4, 8, 9, 20])
def test_a_falling_rate_reaches_nothing_with_the_last_update(planted, clean, monkeypatch, updates):
    """Whatever share of an epoch that is: 180 images are five batches of 36."""
    rates, set_rate = [], training._set_rate
    monkeypatch.setattr(
        training, "_set_rate", lambda opt, rate: (rates.append(rate), set_rate(opt, rate))
    )
    count_batches(planted, clean, updates=updates, batch=36, lr=0.01, schedule="linear")
    wanted = [0.01 * (1 - step / updates) for step in range(updates)]
    assert rates[:updates] == pytest.approx(wanted)
    rates.clear()
    count_batches(planted, clean, updates=updates, batch=36, lr=0.01)
    assert rates[:updates] == pytest.approx([0.01] * updates)


def test_a_falling_rate_gets_to_its_end(planted, clean):
    """Beyond the bound at first, where a constant rate would be given up."""
    seen, _ = count_batches(planted, clean, updates=60, lr=50.0, max_drop=0.0, schedule="linear")
    assert len(seen) == 60


def test_images_have_holes_before_triggers_are_searched_on_them(planted, clean):
    whole, holed = (count_batches(planted, clean, cutout=side)[0] for side in (0, 9))
    for plain, cut in zip(whole, holed, strict=True):
        black = (cut.x == 0).all(1) & (plain.x != 0).any(1)
        assert (black.sum((1, 2)) >= 5 * 5 - 3).all(), "one that hangs over a corner"
        assert (black.sum((1, 2)) <= 9 * 9).all()


@pytest.mark.parametrize("name", ["moth", "deck", "pairwise", "universal", "pixel"])
def test_hardening_shows_images_as_fine_tuning_does(planted, clean, monkeypatch, name):
    """Or else their rows would differ by more than the methods do; of many images none has a hole,
    as in MOTH's code."""
    plans: list[training.Recipe] = []

    def note(model, images, plan, *args: object, **more: object):
        plans.append(plan)
        return model.eval()

    monkeypatch.setattr(training, "fit", note)
    usual = defenses.build("finetune")
    holed, whole = (usual.crop, usual.cutout), (usual.crop, 0)
    for spec, few, wanted in (
        (name, len(clean) + 1, holed),
        (name, len(clean), whole),
        (f"{name}:cutout=0", len(clean) + 1, whole),
        (f"{name}:cutout={usual.cutout}", len(clean), holed),
    ):
        monkeypatch.setattr(hardening, "FEW", few)
        plans.clear()
        defenses.build(spec).repair(planted, clean, stream(0, "repair"))
        assert [(plan.crop, plan.cutout) for plan in plans] == [wanted, wanted]
        assert all(plan.flip for plan in plans)


def learned_by_heart(monkeypatch, plain: float, stamped: float) -> None:
    """Accuracies on images held out: 0.9 of a model as it came, then those of the two trainings."""
    told = iter([0.9, plain])
    monkeypatch.setattr(training, "accuracy", lambda *_: next(told, stamped))


@pytest.mark.parametrize(
    ("plain", "stamped", "kept"),
    [
        (0.9, 0.85, True),
        (0.9, 0.84, False),
        (0.83, 0.78, True),  # what any training loses does not count
        (0.83, 0.77, False),
        (0.99, 0.85, True),  # nor does what another training would gain
        (0.5, 0.75, True),  # but one that ruins the model is no yardstick
        (0.5, 0.74, False),
    ],
)
def test_costs_are_counted_from_the_training_without_triggers(
    planted, clean, monkeypatch, plain, stamped, kept
):
    learned_by_heart(monkeypatch, plain, stamped)
    _, out = count_batches(planted, clean, updates=20, lr=0.01, max_drop=0.05)
    as_it_came = [
        torch.equal(value, planted.state_dict()[name]) for name, value in out.state_dict().items()
    ]
    assert all(as_it_came) != kept


def test_the_training_without_triggers_sees_the_same_batches(planted, clean, monkeypatch):
    """And moves nothing of what the other draws."""
    shown: list[list[Tensor]] = []
    usual = training.fit

    def watched(model, images, plan, rng, *, on_batch, **more):
        shown.append([])

        def look(images, draws):
            changed = on_batch(images, draws)
            shown[-1].append(changed.x)
            return changed

        return usual(model, images, plan, rng, on_batch=look, **more)

    monkeypatch.setattr(training, "fit", watched)
    count_batches(planted, clean, updates=9, batch=36, crop=2, cutout=9)
    plain, stamped = shown
    assert len(plain) == len(stamped) == 9
    assert all(torch.equal(one, two) for one, two in zip(plain, stamped, strict=True))


def test_a_wide_bound_keeps_the_last_weights(planted, clean):
    _, out = count_batches(planted, clean, updates=20, lr=0.01)
    assert any(
        not torch.equal(value, planted.state_dict()[name])
        for name, value in out.state_dict().items()
        if value.dtype.is_floating_point
    )


def test_too_few_images_are_refused(planted):
    with pytest.raises(BadInput, match="give more images"):
        count_batches(planted, toys.images(4, stream(0, "few")))


# ------------------------------------------------------------------------------------- the inverter


def test_images_of_the_batch_are_searched_on_not_others(planted):
    """Problems get as many images as the rarest of their classes has in the batch."""
    images = batch(40)
    rows = torch.cat([(images.y == 1).nonzero().flatten()[:3], (images.y == 2).nonzero().flatten()])
    family = families.build("nc:weight=steps")
    seen = []

    class Watched(type(family)):
        def begin(self, x, rng):
            seen.append(len(x))
            return super().begin(x, rng)

    inverter = Inverter(planted, Watched())
    problems = [Problem(1, 2), Problem(2, 1)]
    inverter(problems, images.take(rows), stream(0, "i"), passes=2, asr=0.9)
    assert seen == [3, 3]


def test_a_search_goes_on_from_where_it_is_told(planted):
    inverter = Inverter(planted, families.build("nc:weight=steps"))
    problem, images = Problem(1, 0), batch(60)
    one = inverter([problem], images, stream(0, "i"), passes=60, asr=0.9)[0]
    assert one.size
    cold, warm = (
        inverter([problem], images, stream(1, "i"), passes=2, asr=0.9, starts=[start])[0]
        for start in (None, one.trigger)
    )
    assert warm.size
    assert warm.size < 1.3 * one.size
    assert cold.size is None or cold.size > 2 * one.size


def test_the_first_weight_is_multiplied(planted):
    inverter = Inverter(planted, families.build("nc:weight=steps"))
    sizes = [
        float(
            families.build("nc:weight=steps").size(
                {
                    name: value[None]
                    for name, value in inverter(
                        [Problem(1, 2)], batch(60), stream(0, "i"), passes=8, asr=1.0, factor=factor
                    )[0].trigger.items()
                },
                torch.zeros(1),
                torch.zeros(1),
            )
        )
        for factor in (1.0, 1000.0)
    ]
    assert sizes[1] < 0.9 * sizes[0]


def test_a_stamp_leaves_labels_and_other_images_alone(planted):
    inverter = Inverter(planted, families.build("nc:weight=steps"))
    images = batch(20)
    mask, pattern = torch.full((1, 16, 16), -9.0), torch.zeros(3, 16, 16)
    mask[..., :2, :2] = 9.0
    rows = torch.tensor([3, 7])
    out = inverter.stamp(images, rows, {"mask": mask, "pattern": pattern})
    assert changed(images, out).tolist() == [3, 7]
    assert torch.equal(out.y, images.y)
    torch.testing.assert_close(out.x[3, :, :2, :2], torch.full((3, 2, 2), 0.5))


@pytest.mark.parametrize(("count", "share", "wanted"), [(30, 0.1, 3), (5, 0.1, 1), (0, 0.5, 0)])
def test_a_portion_is_rounded_down_but_never_empty(count, share, wanted):
    rows = torch.arange(100, 100 + count)
    drawn = portion_of(rows, share, stream(0, "p"))
    assert len(drawn) == wanted
    assert set(drawn.tolist()) <= set(rows.tolist())


# ------------------------------------------------------------------------------------ the scheduler


def test_pairs_come_in_turn():
    scheduler = Scheduler(3, 0.0, order="turns")
    chosen = [scheduler.choose(i, stream(0, "s")) for i in range(4)]
    assert chosen == [(0, 1), (0, 2), (1, 2), (0, 1)]


def test_first_the_prior_decides_and_later_the_growth():
    scheduler = Scheduler(3, 0.0)
    scheduler.prior[2, 0] = 5.0  # in one direction: both count for the pair
    scheduler.growth[1, 2] = 1.0
    assert scheduler.choose(0, stream(0, "s")) == (0, 2)
    assert scheduler.choose(1000, stream(0, "s")) == (1, 2)
    torch.testing.assert_close(
        scheduler.objective(250)[0, 2], torch.tensor(0.75 * 5, dtype=torch.float64)
    )


def test_some_pairs_are_drawn_at_random():
    scheduler = Scheduler(4, 0.3)
    scheduler.prior[0, 1] = 1.0
    rng = stream(0, "s")
    chosen = [scheduler.choose(0, rng) for _ in range(400)]
    others = sum(pair != (0, 1) for pair in chosen) / 400
    assert others == pytest.approx(0.3 * 5 / 6, abs=0.06)


def test_growth_is_halved_each_time_as_in_equation_6():
    scheduler = Scheduler(2, 0.0)
    scheduler.warmed(torch.tensor([[torch.nan, 10.0], [20.0, torch.nan]]).double())
    torch.testing.assert_close(
        scheduler.growth, torch.tensor([[0.0, 0.5], [1.0, 0.0]], dtype=torch.float64)
    )
    scheduler.grown((0, 1), 15.0)  # +50 %
    assert float(scheduler.growth[0, 1]) == pytest.approx((0.5 + 0.5) / 2)
    scheduler.grown((0, 1), 12.0)  # -20 %
    assert float(scheduler.growth[0, 1]) == pytest.approx((0.5 - 0.2) / 2)
    assert float(scheduler.size[0, 1]) == 12.0
    assert float(scheduler.growth[1, 0]) == 1.0


def test_a_way_without_a_size_so_far_does_not_grow():
    scheduler = Scheduler(2, 0.0)
    scheduler.grown((0, 1), 15.0)
    assert float(scheduler.growth[0, 1]) == 0.0
    assert float(scheduler.size[0, 1]) == 15.0


# ---------------------------------------------------------------------------------------- the hooks


def test_the_warm_up_takes_a_batch_per_class_and_half_of_the_others(planted, clean):
    hook = pairs_of(planted, clean)
    for target in range(toys.CLASSES):
        images = batch(80, target)
        out = hook(images, stream(target, "d"))
        rows = changed(images, out)
        assert len(rows) == int(0.5 * (images.y != target).sum())
        assert (images.y[rows] != target).all()
        assert torch.equal(out.y, images.y)
    assert (hook.scheduler.prior.diagonal() == 0).all()


def test_the_prior_is_how_much_the_loss_fell(planted, clean):
    hook = pairs_of(planted, clean)
    start, found = ({"mask": torch.full((1, 16, 16), v), "pattern": torch.zeros(3, 16, 16)}
                    for v in (-9.0, -9.0))  # fmt: skip
    found["mask"][..., -2:, -2:] = 9.0  # the backdoor's patch …
    found["pattern"] = torch.full((3, 16, 16), 9.0)  # … in white
    drawn = hook._drawn([1, 2, 3], stream(0, "d"))
    one = Found(Problem(None, 0), 4.0, 1.0, found, 5)
    hook._note(0, [1, 2, 3], drawn, start, one)
    logits = training.logits(planted, drawn.x)
    first = -logits.log_softmax(1)[:, 0]
    last = -training.logits(planted, toys.stamp(drawn.x / 255)).log_softmax(1)[:, 0]
    for label in (1, 2, 3):
        own = drawn.y == label
        wanted = float(((first - last) / first)[own].mean())
        assert float(hook.scheduler.prior[label, 0]) == pytest.approx(wanted, abs=0.02)
        assert float(hook.first_sizes[label, 0]) == 4.0


def test_a_round_has_one_pair_both_ways_and_later_searches_go_on(planted, clean):
    hook = pairs_of(planted, clean, warm_up="none", pace=Pace(first=40, more=4))
    asked = []
    inner = hook.inverter

    def spy(problems, images, rng, **options):
        asked.append((problems, options["passes"], options["factor"], options["starts"]))
        return inner(problems, images, rng, **options)

    hook.inverter = type("Spy", (), {
        "__call__": staticmethod(spy), "stamp": staticmethod(inner.stamp),
        "family": inner.family, "model": inner.model})()  # fmt: skip
    for step in range(4):
        hook(batch(80, step), stream(step, "d"))
    assert [[(p.victim, p.target) for p in problems] for problems, *_ in asked] == [
        [(0, 1), (1, 0)]
    ] * 3 + [[(0, 2), (2, 0)]]
    assert [passes for _, passes, *_ in asked[:2]] == [40, 4]
    assert asked[3][1] == 40
    assert [factor for _, _, factor, _ in asked[:2]] == [2.0, 400.0]
    assert asked[0][3] == [None, None]
    assert None not in asked[1][3]
    assert asked[3][3] == [None, None]


def test_one_image_of_ten_is_stamped_in_each_direction(planted, clean):
    hook = pairs_of(planted, clean, warm_up="none")
    images = batch(100)
    rows = changed(images, hook(images, stream(0, "d")))
    count = [int(0.1 * (images.y == label).sum()) for label in (0, 1)]
    assert [int((images.y[rows] == label).sum()) for label in (0, 1, 2, 3)] == [*count, 0, 0]


def test_asymmetric_hardening_has_one_direction(planted, clean):
    hook = pairs_of(planted, clean, warm_up="none", symmetric=False)
    images = batch(100)
    rows = changed(images, hook(images, stream(0, "d")))
    assert len(images.y[rows].unique()) == 1


def test_a_batch_without_one_of_the_classes_is_left_alone(planted, clean):
    hook = pairs_of(planted, clean, warm_up="none")
    images = batch(40)
    images = images.take(images.y != 1)
    assert len(changed(images, hook(images, stream(0, "d")))) == 0


def test_the_larger_trigger_is_remembered(planted, clean):
    hook = pairs_of(planted, clean, warm_up="none")
    for size in (3.0, 5.0, 4.0):
        hook._store((0, 1), Found(Problem(0, 1), size, 1.0, {"size": torch.tensor(size)}, 1))
    assert hook.stored[0, 1][1] == 5.0
    hook._store((0, 1), Found(Problem(0, 1), None, 0.0, {}, 1))
    assert hook.stored[0, 1][1] == 5.0


def test_universal_triggers_take_classes_in_turn(planted):
    hook = Universal(
        Inverter(planted, families.build("nc:weight=steps")), Pace(first=5, more=2, portion=0.5)
    )
    for target in (0, 1, 2, 3, 0):
        images = batch(60, target)
        rows = changed(images, hook(images, stream(target, "d")))
        assert len(rows) == int(0.5 * (images.y != target).sum())
        assert (images.y[rows] != target).all()


def test_a_batch_without_a_class_is_stamped_all_the_same(planted):
    """As usual where there are many classes."""
    hook = Universal(
        Inverter(planted, families.build("nc:weight=steps")), Pace(first=5, more=2, portion=0.5)
    )
    images = batch(60)
    images = images.take(images.y != 2)
    assert len(changed(images, hook(images, stream(0, "d")))) == int(0.5 * (images.y != 0).sum())


# ------------------------------------------------------------------------------------- the defenses


@pytest.mark.parametrize(
    "spec",
    [
        "moth:updates=40,batch=64,lr=0.01,warm_passes=40,first=30,more=10",
        "universal:updates=40,batch=64,lr=0.01,first=30,more=10",
    ],
)
def test_a_planted_backdoor_loses_its_grip(spec, planted, clean):
    before = copy.deepcopy(planted.state_dict())
    out = defenses.build(spec).repair(planted, clean, stream(0, "r"))
    assert toys.success(planted, clean) == 1.0
    assert toys.success(out, clean) < 0.5
    assert training.accuracy(out, clean) >= 0.95
    assert all(torch.equal(before[name], value) for name, value in planted.state_dict().items())


@pytest.mark.parametrize("name", ["moth", "universal", "pairwise"])
def test_the_weight_in_hardening_is_that_of_moth_s_code(name):
    """Published figures are of it, however distances are searched for."""
    search = defenses.build(name).wraps["trigger"].usual
    assert (search.cost, search.wait, search.patience) == (1e-3, False, 10)
    assert search.up == pytest.approx(1.5)
    assert search.down == pytest.approx(1.5**1.5)
    assert search.stall is None
