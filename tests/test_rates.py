"""The rate of a fine-tuning: the largest that held-out clean images bear, and they alone decide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toys
from torch import Generator

from arena.core import looks, progress, rates, training
from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.rates import RATES, Borne, Rung, climb
from arena.core.registry import defenses
from arena.core.seeding import stream
from arena.defenses import mcr

TRAINS = {"finetune": [rates], "nad": [rates], "fine_pruning": [rates], "mcr": [rates, mcr]}
SETTINGS: dict[str, Any] = {"max_drop": 0.05, "held_out": 0.2}


@pytest.fixture
def planted() -> Classifier:
    return toys.planted()


@pytest.fixture
def clean() -> Images:
    return toys.images(200, stream(0, "clean"))


def asked(planted: Classifier, clean: Images, **changes: Any) -> tuple[list[Borne], list[Rung]]:
    """What is borne, and all that was tried."""
    tried: list[Rung] = []

    def train(rung: Rung) -> Classifier:
        tried.append(rung)
        return toys.planted()

    settings = {"lr": None, **SETTINGS, **changes}
    return climb(planted, clean, stream(0, "rates"), train, **settings), tried


def test_rates_rise_and_the_images_that_decide_train_nothing(
    planted: Classifier, clean: Images
) -> None:
    found, tried = asked(planted, clean)
    assert [rung.rate for rung in tried] == sorted(RATES) == list(RATES)
    assert [borne.rung for borne in found] == tried
    for rung in tried:
        assert rung.held is not None
        both = torch.cat([rung.held.x, rung.images.x]).flatten(1)
        assert (len(rung.held), len(rung.images)) == (40, 160)
        assert torch.equal(both.unique(dim=0), clean.x.flatten(1).unique(dim=0))


@pytest.mark.parametrize(
    ("reached", "borne"),
    [
        ((0.5, 0.5, 0.46, 0.45, 0.45), 5),  # from the lowest rate on, not from the model as it came
        ((0.9, 0.86, 0.84, 0.9, 0.9), 2),  # what lies above a rate that costs too much is not tried
        ((0.8, 0.9, 0.86, 0.84, 0.9), 3),  # from the best
        ((0.9, 0.8, 0.9, 0.9, 0.9), 1),
    ],
)
def test_a_rate_may_lose_so_much_and_no_more(
    planted: Classifier, clean: Images, monkeypatch: pytest.MonkeyPatch,
    reached: tuple[float, ...], borne: int,
) -> None:  # fmt: skip
    accuracies, seen = iter(reached), list[Images]()

    def accuracy(model: Classifier, images: Images) -> float:
        assert model is not planted, "what it knew by heart says nothing"
        seen.append(images)
        return next(accuracies)

    monkeypatch.setattr(rates, "accuracy", accuracy)
    monkeypatch.setattr(rates, "turned", lambda *_: 90.0)
    found, tried = asked(planted, clean)
    assert [one.rung for one in found] == tried[:borne]
    assert len(tried) == min(borne + 1, len(RATES))
    assert all(images is tried[0].held for images in seen)
    best = max(reached[:borne])
    limit = 0.1 if borne == 1 else 0.05  # of the first, since nothing had turned the filters
    for left, whether in ((best - limit + 0.001, True), (best - limit - 0.001, False)):
        monkeypatch.setattr(rates, "accuracy", lambda *_, left=left: left)
        assert found[-1].bears(planted) is whether


@pytest.mark.parametrize(
    ("reached", "degrees", "borne"),
    [
        ((0.9, 0.84, 0.81, 0.9, 0.9), (5, 8, 10, 20, 20), 5),  # little has turned: a tenth is borne
        ((0.9, 0.79, 0.9, 0.9, 0.9), (5, 8, 10, 20, 20), 1),  # and no more
        ((0.9, 0.84, 0.84, 0.83, 0.9), (5, 16, 20, 30, 30), 2),  # from then on as much as asked for
        ((0.9, 0.89, 0.86, 0.84, 0.9), (16, 16, 20, 30, 30), 3),
    ],
)
def test_until_filters_have_turned_a_rate_may_lose_more(
    planted: Classifier, clean: Images, monkeypatch: pytest.MonkeyPatch,
    reached: tuple[float, ...], degrees: tuple[float, ...], borne: int,
) -> None:  # fmt: skip
    accuracies, angles = iter(reached), iter(degrees)
    monkeypatch.setattr(rates, "accuracy", lambda *_: next(accuracies))
    monkeypatch.setattr(rates, "turned", lambda before, after: next(angles))
    assert len(asked(planted, clean)[0]) == borne


def test_more_may_be_asked_for_than_a_tenth(
    planted: Classifier, clean: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracies = iter((0.9, 0.76, 0.74, 0.7, 0.7))
    monkeypatch.setattr(rates, "accuracy", lambda *_: next(accuracies))
    assert len(asked(planted, clean, max_drop=0.15)[0]) == 2


def test_a_filter_s_angle_is_that_of_its_direction(planted: Classifier) -> None:
    """Of one layer half of the filters are turned by 90 degrees, and all are made longer."""
    after = toys.planted()
    layers = [w for w in after.parameters() if w.ndim > 1]
    with torch.no_grad():
        for weight in after.parameters():
            weight.copy_(torch.randn(weight.shape, generator=stream(0, "weights")))
        planted.load_state_dict(after.state_dict())
        rows = layers[0].flatten(1)
        half = len(rows) // 2
        for row in rows[:half]:
            other = torch.randn(len(row), generator=stream(0, "turn"))
            row.copy_(other - row * (other @ row) / (row @ row))
        for weight in after.parameters():
            weight *= 3
    wanted = 90 * half / len(rows) / len(layers)
    assert rates.turned(planted, after) == pytest.approx(wanted, abs=0.01)
    layers[-1].requires_grad_(False)  # what does not learn does not count
    wanted *= len(layers) / (len(layers) - 1)
    assert rates.turned(planted, after) == pytest.approx(wanted, abs=0.01)


def test_pruned_filters_have_no_angle(planted: Classifier) -> None:
    """A network that was pruned before and stays as it is has not turned."""
    with torch.no_grad():
        next(w for w in planted.parameters() if w.ndim > 1)[0] = 0
    assert rates.turned(planted, planted) == pytest.approx(0, abs=1e-3)


def test_a_rate_of_one_s_own_trains_on_all_images(planted: Classifier, clean: Images) -> None:
    (found,), (rung,) = asked(planted, clean, lr=0.5)
    assert (rung.rate, rung.images is clean, found.bears(planted)) == (0.5, True, True)


def test_with_nothing_to_hold_out_it_is_the_lowest(planted: Classifier, clean: Images) -> None:
    for few, held_out in ((clean, 0.0), (clean.take(torch.arange(2)), 0.2)):
        (found,), (rung,) = asked(planted, few, held_out=held_out)
        assert (rung.rate, rung.images is few, found.bears(planted)) == (min(RATES), True, True)


def test_no_more_are_held_out_than_tell(planted: Classifier) -> None:
    many = toys.images(6000, stream(0, "many"))
    assert len(asked(planted, many)[1][0].images) == 5000


@pytest.mark.parametrize("name", ["finetune", "nad"])
def test_looks_on_the_way_tell_the_accuracy_and_change_nothing(
    planted: Classifier, clean: Images, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    told: list[tuple[str, float, float, float]] = []

    def hear(what: str, done: float, total: float, figures: dict[str, float]) -> None:
        if "accuracy" in figures:
            told.append((what, done, total, figures["accuracy"]))

    def accuracy(model: Classifier, images: Images) -> float:
        assert len(images) == 40, "those held out"
        seen.append(len(seen) / 1000)
        truly(model, images)  # as it would be, in evaluation mode and back
        return seen[-1]

    truly, seen = rates.accuracy, list[float]()
    monkeypatch.setattr(rates, "accuracy", accuracy)
    method = defenses.build(f"{name}:epochs=3,crop=1,cutout=0,max_drop=1", "fast")
    weights = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(looks, "OFTEN", seconds)
        with progress.listening(hear):
            repaired = method.repair(planted, clean, stream(0, "repair"))
        weights.append(repaired.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    what = {"finetune": "fine-tuning at 0.1", "nad": "distillation at 0.1"}[name]  # all are borne
    steps = 160 // 64
    of_one = [line for line in told if line[0] == what]
    assert [line[1:3] for line in of_one] == [(steps, 3 * steps), (2 * steps, 3 * steps)]
    assert {line[3] for line in of_one} < set(seen)


def wrecks(at_least: float, fits: list[str]) -> Any:
    """Stands in for `fit`: what is trained at such a rate answers one class."""

    def fit(model: Classifier, data: Images, plan: Any, rng: Generator, **more: Any) -> Classifier:
        fits.append(more["what"])
        if plan.lr >= at_least:
            with torch.no_grad():
                model.body.head.bias[1] += 1000  # type: ignore[index, union-attr]
        return model.eval()

    return fit


def named(what: str, *tried: float) -> list[str]:
    return [f"{what} at {rate:g}" for rate in tried]


@pytest.mark.parametrize(
    ("name", "wrecked", "tried", "good"),
    [
        ("finetune", 0.02, named("fine-tuning", 0.005, 0.01, 0.02), True),
        ("finetune", 0.1, named("fine-tuning", *RATES), True),
        ("finetune", 0.0, named("fine-tuning", *RATES), False),  # none costs more than another
        # a wrecked teacher has no student
        ("nad", 0.02, [*named("teacher", 0.005, 0.01, 0.02), "distillation at 0.01"], True),
        ("nad", 0.0, [*named("teacher", *RATES), "distillation at 0.1"], False),
        ("fine_pruning", 0.05, named("fine-tuning", 0.005, 0.01, 0.02, 0.05), True),
        ("mcr", 0.05, [*named("fine-tuning", 0.005, 0.01, 0.02, 0.05), "curve"], True),
    ],
)
def test_the_largest_rate_that_is_borne_is_taken(
    planted: Classifier, clean: Images, monkeypatch: pytest.MonkeyPatch,
    name: str, wrecked: float, tried: list[str], good: bool,
) -> None:  # fmt: skip
    fits: list[str] = []
    for module in TRAINS[name]:
        monkeypatch.setattr(module, "fit", wrecks(wrecked, fits))
    repaired = defenses.build(name).repair(planted, clean, stream(0, "repair"))
    assert fits == tried
    assert (rates.accuracy(repaired, clean) == 1) is good


@pytest.mark.parametrize(("wrecked", "taken"), [(0.02, 0.01), (0.05, 0.02), (1.0, 0.1)])
def test_what_the_largest_rate_made_is_given_back(
    planted: Classifier, clean: Images, monkeypatch: pytest.MonkeyPatch,
    wrecked: float, taken: float,
) -> None:  # fmt: skip
    wreck = wrecks(wrecked, [])

    def fit(model: Classifier, data: Images, plan: Any, rng: Generator, **more: Any) -> Classifier:
        with torch.no_grad():
            model.body.head.bias += plan.lr  # type: ignore[union-attr]
        done: Classifier = wreck(model, data, plan, rng, **more)
        return done

    monkeypatch.setattr(rates, "fit", fit)
    repaired = defenses.build("finetune").repair(planted, clean, stream(0, "repair"))
    added = repaired.body.head.bias - planted.body.head.bias  # type: ignore[union-attr]
    assert torch.allclose(added, torch.full_like(added, taken))


def test_a_student_that_loses_too_much_is_taught_at_a_lower_rate(
    planted: Classifier, clean: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[str] = []
    teach, distil = wrecks(0.05, fits), wrecks(0.01, fits)

    def fit(*args: Any, **more: Any) -> Classifier:
        what: str = more["what"]
        done: Classifier = (distil if what.startswith("distil") else teach)(*args, **more)
        return done

    monkeypatch.setattr(rates, "fit", fit)
    repaired = defenses.build("nad").repair(planted, clean, stream(0, "repair"))
    assert fits == [
        *named("teacher", 0.005, 0.01, 0.02, 0.05),
        *named("distillation", 0.02, 0.01, 0.005),
    ]
    assert rates.accuracy(repaired, clean) == 1


@pytest.mark.parametrize("name", TRAINS)
@pytest.mark.parametrize(
    ("more", "schedule"), [("", "cosine"), (",decay_every=2", "steps"), (",epochs=0", "cosine")]
)
def test_the_rate_falls_along_a_cosine_or_by_steps(
    planted: Classifier, clean: Images, monkeypatch: pytest.MonkeyPatch,
    name: str, more: str, schedule: str,
) -> None:  # fmt: skip
    plans: list[training.Recipe] = []

    def note(model: Classifier, images: Images, plan: training.Recipe, *_: Any, **__: Any) -> Any:
        plans.append(plan)
        return model.eval()

    for module in TRAINS[name]:
        monkeypatch.setattr(module, "fit", note)
    settings = f"lr=0.03{more}"
    if name == "mcr":
        settings = settings.replace(",", ",tune_").replace("lr=", "t=0,tune_lr=")
    defenses.build(f"{name}:{settings}").repair(planted, clean, stream(0, "repair"))
    if name == "mcr":
        plans.pop()  # the curve's
    assert {(plan.schedule, plan.lr) for plan in plans} == {(schedule, 0.03)}
    assert plans[-1].epochs == (0 if "epochs" in more else 40)
    drops = [epoch / 40 for epoch in range(2, 40, 2)]
    assert plans[-1].drop_at == (pytest.approx(drops) if schedule == "steps" else ())
