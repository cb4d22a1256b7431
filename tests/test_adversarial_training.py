"""Adversarial training as a defense: what it trains on, and a network that it makes robust."""

from __future__ import annotations

import pytest
import torch
import toys

from arena.core import models, whole
from arena.core.adversarial import robust_accuracy
from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.registry import BadInput, defenses
from arena.core.seeding import stream
from arena.core.training import accuracy
from arena.defenses import adversarial

SIDE = toys.LINEAR_SIDE


@pytest.fixture
def model(monkeypatch) -> Classifier:
    monkeypatch.setitem(models._catalogue(), "linear", toys.LINEAR)
    return models.build("linear", 2, (1, SIDE, SIDE), stream(0, "linear"))


@pytest.fixture
def data() -> Images:
    return toys.margins()


def test_a_network_becomes_robust(model, data):
    found = {}
    for eps, step in ((25.5, 8), (0.01, 0.01)):
        spec = f"adversarial:eps={eps},step={step},recipe=smoke,epochs=15"
        repaired = defenses.build(spec).repair(model, data, stream(0, "a"))
        assert not repaired.training
        robust = robust_accuracy(repaired, data, eps=0.1, step=0.03, steps=10, rng=stream(0, "p"))
        found[eps] = accuracy(repaired, data), robust
    assert found[0.01][0] > 0.95
    assert found[0.01][1] < 0.5
    assert found[25.5][1] > 0.9


def trained(model, data, spec, monkeypatch):
    """The recipe, the model and the hooks that the trainer is handed."""
    found = []
    monkeypatch.setattr(whole, "fit", lambda *given, **hooks: found.append((*given[:3], hooks)))
    defenses.build(spec).repair(model, data, stream(0, "a"))
    return found[0]


def test_the_images_trained_on_are_the_worst_of_the_ball(model, data, monkeypatch):
    """Against a linear network the best attack is known: each image moves against its class."""
    spec = "adversarial:eps=4,step=2,steps=5,start=model"
    student, *_, hooks = trained(model, data, spec, monkeypatch)
    some = data.take(torch.arange(20))
    x = 0.2 + 0.6 * some.x / 255  # nothing is clipped
    shown = hooks["on_batch"](Images(x, some.y, rows=torch.arange(20)), stream(0))
    one, other = student.body.head.weight.detach()
    towards = (other - one).sign().view(1, 1, SIDE, SIDE)
    sign = (1 - 2 * some.y).view(-1, 1, 1, 1)
    assert torch.allclose(shown.x, x + 4 / 255 * sign * towards, atol=1e-6)
    assert torch.equal(shown.y, some.y)
    assert torch.equal(shown.rows, torch.arange(20))


def test_steps_are_as_long_and_as_many_as_asked_for(model, data, monkeypatch):
    seen = []

    def spy(model, x, y, **settings):
        seen.append(settings)
        return x

    monkeypatch.setattr(adversarial, "pgd", spy)
    batch = Images(data.x[:4] / 255, data.y[:4])
    for spec in ("adversarial", "adversarial:eps=7.65,step=1.275,steps=8"):
        *_, hooks = trained(model, data, spec, monkeypatch)
        rng = stream(0)
        assert torch.equal(hooks["on_batch"](batch, rng).x, batch.x)
        assert seen[-1].pop("rng") is rng, "draws outside this step's"
    same = {"norm": "linf", "evaluate": False}
    assert seen[0] == same | {"eps": 8 / 255, "step": 2 / 255, "steps": 7}
    assert seen[1] == same | {
        "eps": pytest.approx(0.03), "step": pytest.approx(0.005), "steps": 8,
    }  # fmt: skip


def test_the_examples_are_of_the_network_as_it_is_by_then(model, data, monkeypatch):
    student, _, _, hooks = trained(model, data, "adversarial:eps=4", monkeypatch)
    batch = Images(torch.full((4, 1, SIDE, SIDE), 0.5), torch.tensor([0, 0, 1, 1]))
    before = hooks["on_batch"](batch, stream(0)).x
    with torch.no_grad():
        student.body.head.weight.neg_()
    after = hooks["on_batch"](batch, stream(0)).x
    assert torch.allclose(before - 0.5, 0.5 - after, atol=1e-6)
    assert torch.allclose((before - 0.5).abs(), torch.tensor(4 / 255), atol=1e-6)


def test_it_starts_from_scratch_by_the_recipe_of_the_paper(model, data, monkeypatch):
    student, images, plan, _ = trained(model, data, "adversarial", monkeypatch)
    assert images is data
    assert (plan.epochs, plan.batch, plan.lr, plan.schedule) == (200, 128, 0.1, "steps")
    assert (plan.drop_at, plan.momentum, plan.label_smoothing) == ((0.5, 0.75), 0.9, 0)
    assert not torch.equal(student.body.head.weight, model.body.head.weight)
    deviation = (data.x / 255).std(correction=0)
    assert float(student.normalize.std) == pytest.approx(float(deviation), rel=1e-3)


def test_the_recipe_is_the_networks_and_can_be_shortened(model, data, monkeypatch):
    spec = "adversarial:recipe=smoke,start=model"
    student, _, plan, _ = trained(model, data, spec, monkeypatch)
    assert (plan.lr, plan.crop, plan.min_steps, plan.label_smoothing) == (0.1, 0, 60, 0)
    assert torch.equal(student.body.head.weight, model.body.head.weight)
    assert student is not model
    *_, plan, _ = trained(model, data, "adversarial:recipe=fast,epochs=3,lr=0.07", monkeypatch)
    assert (plan.epochs, plan.min_steps, plan.lr, plan.label_smoothing) == (3, 0, 0.07, 0)
    with pytest.raises(BadInput, match="adversarial: start cannot be 'new'; choose from model, sc"):
        defenses.build("adversarial:start=new")


def test_scratch_keeps_nothing_of_the_model_and_model_does(planted, clean):
    found = {}
    for start in ("scratch", "model"):
        spec = f"adversarial:start={start},steps=1,recipe=smoke,epochs=1,lr=0.001"
        repaired = defenses.build(spec).repair(planted, clean, stream(0, "a"))
        found[start] = accuracy(repaired, clean)
    assert found["model"] > 0.9
    assert found["scratch"] < 0.7


def test_it_says_that_it_needs_the_whole_training_set():
    assert defenses.describe("adversarial").traits == {"needs_share": 1.0}
