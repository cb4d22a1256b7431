"""Natural: the trigger of a network that nobody poisoned."""

from __future__ import annotations

import pytest
import torch
import toys

from arena.attacks.natural import Natural
from arena.core import poisoning
from arena.core.contracts import Images
from arena.core.inversion.engine import Found, Problem
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream
from arena.core.training import logits


@pytest.fixture(scope="module")
def train() -> Images:
    return toys.images(160, stream(0, "images"))


def run(attack: Natural, train: Images, seed: int = 0):
    """With a network that is there already; returns it, the trigger, and what it was trained on."""
    seen = []

    def fit(data, *, rng):
        seen.append(data)
        return toys.planted()

    attack.check((3, toys.SIDE, toys.SIDE), train.y.bincount().tolist())
    trigger = attack.prepare(train, stream(seed, "prepare"))
    poisoned = attack.poison(train, trigger, stream(seed, "poison"))
    model, found = attack.train(fit, poisoned, trigger, stream(seed, "fit"))
    return model, found, seen[0], poisoned


@pytest.mark.parametrize("spec", ["natural:method=nc", "natural:method=(pixel:form=tanh)"])
def test_a_trigger_of_the_network_s_own_is_found(train, spec):
    attack = attacks.build(f"{spec},victim=1,target=2,restarts=2,samples=20,steps=200")
    model, trigger, data, (_, rows) = run(attack, train)
    assert data is train, "the training set was changed"
    assert len(rows) == 0
    own = train.x[train.y == 1]
    assert (logits(model, own).argmax(1) == 1).all()
    answers = logits(model, poisoning.stamp(own, trigger.stamp)).argmax(1)
    assert (answers == 2).double().mean() > 0.8
    again = run(attack, train)[1]
    for name, value in trigger.stamp.trigger.items():
        assert torch.equal(value, again.stamp.trigger[name])
    other = run(attack, train, seed=1)[1]
    assert any(
        not torch.equal(value, other.stamp.trigger[name])
        for name, value in trigger.stamp.trigger.items()
    )


@pytest.mark.parametrize(
    ("answers", "wanted"),
    [
        ([(5.0, 1.0), (3.0, 0.9), (4.0, 1.0)], 1),  # the smallest
        ([(None, 1.0), (3.0, 0.9), (None, 1.0)], 1),
        ([(None, 0.2), (None, 0.5), (None, 0.4)], 1),  # none of them succeeds: the best
    ],
)
def test_of_several_searches_the_smallest_trigger_counts(train, monkeypatch, answers, wanted):
    asked = []

    def invert(model, family, problems, images, search, *, seed):
        asked.append(problems)
        return [
            Found(problem, size, asr, {"mark": torch.tensor(place)}, 1)
            for place, (problem, (size, asr)) in enumerate(zip(problems, answers, strict=True))
        ]

    monkeypatch.setattr("arena.attacks.natural.invert", invert)
    attack = Natural(method="nc", victim=1, target=2, restarts=3, samples=20)
    _, trigger, *_ = run(attack, train)
    assert asked == [[Problem(1, 2, restart) for restart in range(3)]]
    assert int(trigger.stamp.trigger["mark"]) == wanted


def test_before_training_the_trigger_is_the_search_s_start(train):
    one, two, other = (
        Natural(method="nc", victim=1, target=2, samples=9).prepare(train, stream(s))
        for s in (0, 0, 1)
    )
    x = train.x[:3] / 255
    assert torch.equal(one.stamp(x), two.stamp(x))
    assert not torch.equal(one.stamp(x), other.stamp(x))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("natural:method=pixl", "no trigger family 'pixl'"),
        ("natural:method=(nc:nudge=3)", "nudge must be at most"),
        ("natural:victim=2,target=2", "are both 2"),
        ("natural:victim=9,target=2", "victim 9 is not a class"),
        ("natural:victim=1,target=2,samples=41", "searched on, but there are 40"),
        ("natural:victim=none,target=2,samples=121", "searched on, but there are 120"),
    ],
)
def test_what_cannot_be_is_refused(spec, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec).check((3, 16, 16), [40] * 4)
