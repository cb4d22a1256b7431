"""Universal adversarial training: the change's steps by hand, and a network made robust."""

from __future__ import annotations

import pytest
import torch
import toys
from torch.nn import functional as F

from arena.core import models, whole
from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.registry import BadInput, defenses
from arena.core.seeding import stream
from arena.core.training import Recipe, accuracy
from arena.defenses import uap

SIDE = toys.LINEAR_SIDE


@pytest.fixture
def model(monkeypatch) -> Classifier:
    monkeypatch.setitem(models._catalogue(), "linear", toys.LINEAR)
    return models.build("linear", 2, (1, SIDE, SIDE), stream(0, "linear"))


@pytest.fixture
def data() -> Images:
    return toys.margins()


def worst(model: Classifier, images: Images, eps: float) -> float:
    """Accuracy under the worse of the two changes that move a linear network furthest."""
    one, other = model.body.head.weight.detach()
    step = eps * (one - other).sign().view(1, SIDE, SIDE)
    x = images.x / 255
    return min(accuracy(model, Images(x + sign * step, images.y)) for sign in (1, -1))


def test_a_network_learns_to_resist_one_change(model, data):
    found = {}
    for setting in ("eps=25.5", "eps=25.5,updates=simultaneous", "eps=0.01"):
        defense = defenses.build(f"uap:{setting},recipe=smoke,epochs=20")
        repaired = defense.repair(model, data, stream(0, "u"))
        found[setting] = accuracy(repaired, data), worst(repaired, data, 0.1)
    assert found["eps=0.01"][0] > 0.95
    assert found["eps=0.01"][1] < 0.6
    assert found["eps=25.5"][1] > 0.85
    assert found["eps=25.5,updates=simultaneous"][1] > 0.85


@pytest.fixture
def three(model) -> Classifier:
    """With three classes, so that a slope's signs depend on the images; losses of many sizes."""
    found = models.build("linear", 3, (1, SIDE, SIDE), stream(0, "three"))
    weight = found.body.head.weight
    weight.data = torch.randn(weight.shape, generator=stream(0, "weight")) / 4
    return found


def batch(n: int = 12) -> Images:
    x = torch.rand(n, 1, SIDE, SIDE, generator=stream(0, "batch"))
    return Images(x, torch.arange(n) % 3)


def slope(model: Classifier, x: torch.Tensor, y: torch.Tensor, beta: float) -> torch.Tensor:
    """By the formula: the mean over images within beta of (softmax - label) times the weights."""
    z = model(x).detach()
    error = z.softmax(1) - F.one_hot(y, 3)
    error = error * (F.cross_entropy(z, y, reduction="none") < beta)[:, None]
    found = error @ model.body.head.weight.detach() / model.normalize.std
    return found.mean(0).view(1, SIDE, SIDE)


class Passes:
    """One update as `fit` makes it; how often the model ran is counted."""

    def __init__(self, change, model, lr=0.5):
        self.change, self.model, self.runs = change, model, 0
        self.sgd = torch.optim.SGD(model.parameters(), lr=lr)
        model.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.runs += 1

    def __call__(self, images):
        shown = self.change.add(images, stream(0))
        out = self.model(shown.x)
        loss = F.cross_entropy(out, shown.y)
        if not self.change.alternating:
            step = uap.Step(self.model, shown, out, loss, {}, stream(0), 0.0)
            assert self.change.bound(step) == 0
        for every in (self.sgd, self.change):
            every.zero_grad(set_to_none=True)
        loss.backward()
        for every in (self.sgd, self.change):
            every.step()
        return shown


def made(model, *, alternating, eps=0.1, step=0.02, beta=9.0):
    return uap.Change(model, eps=eps, step=step, beta=beta, alternating=alternating)


@pytest.fixture
def exact(monkeypatch):
    """In float32, whatever the hardware has."""
    monkeypatch.setattr(uap, "autocast", lambda _: torch.autocast("cpu", enabled=False))


@pytest.mark.parametrize("beta", [9.0, 0.9])
@pytest.mark.parametrize("alternating", [True, False])
def test_the_change_goes_up_by_the_sign_of_its_slope(three, exact, alternating, beta):
    change, images = made(three, alternating=alternating, beta=beta), batch()
    losses = F.cross_entropy(three(images.x), images.y, reduction="none")
    assert (losses > 0.9).any()
    assert (losses < 0.9).any()
    update = Passes(change, three, lr=0.2)
    old = slope(three, images.x, images.y, beta)
    update.runs = 0
    update(images)
    assert update.runs == (2 if alternating else 1)
    new = slope(three, images.x, images.y, beta)
    expected = 0.02 * (new if alternating else old).sign()
    assert not torch.equal(old.sign(), new.sign()), "the case tells nothing"
    assert torch.allclose(change.delta, expected)


def test_the_bound_makes_a_difference_here(three):
    """Else the case above would tell nothing."""
    images = batch()
    signs = [slope(three, images.x, images.y, beta).sign() for beta in (9.0, 0.9)]
    assert not torch.equal(*signs)


@pytest.mark.parametrize("alternating", [True, False])
def test_the_change_is_kept_and_stays_in_the_ball(three, exact, alternating):
    change, images = made(three, alternating=alternating, eps=0.05), batch()
    images.x.mul_(0.8).add_(0.1)  # nothing is clipped
    update, delta = Passes(change, three, lr=0.0), torch.zeros(1, SIDE, SIDE)
    for _ in range(4):
        shown = update(images)
        assert torch.equal(shown.y, images.y)
        assert torch.allclose(shown.x, images.x + delta)
        step = 0.02 * slope(three, images.x + delta, images.y, 9.0).sign()
        delta = (delta + step).clamp(-0.05, 0.05)
        assert torch.allclose(change.delta, delta)
    assert (delta.abs() == 0.05).any()
    assert not (delta.abs() == 0.05).all()
    bright = Images(torch.ones(2, 1, SIDE, SIDE), torch.tensor([0, 1]))
    assert change.add(bright, stream(0)).x.max() == 1


@pytest.mark.parametrize("alternating", [True, False])
def test_the_weights_learn_from_all_images(three, exact, alternating):
    """beta bounds what moves the change, not what moves the weights."""
    change, images = made(three, alternating=alternating, beta=1e-3), batch()
    losses = F.cross_entropy(three(images.x), images.y, reduction="none")
    assert losses.min() > 2e-3
    (expected,) = torch.autograd.grad(losses.mean(), [three.body.head.weight])
    before = three.body.head.weight.detach().clone()
    Passes(change, three, lr=0.01)(images)
    assert torch.allclose(before - three.body.head.weight.detach(), 0.01 * expected, atol=1e-6)
    assert (change.delta == 0).all()


def test_looking_again_leaves_no_trace(planted, clean, exact):
    """Batch norms keep the statistics of the training pass, and the weights can be trained."""
    change = uap.Change(planted.train(), eps=0.1, step=0.1, beta=9.0, alternating=True)
    change.add(Images(clean.x / 255, clean.y), stream(0))
    state = {name: value.clone() for name, value in planted.state_dict().items()}
    change.step()
    assert (change.delta != 0).any()
    assert all(torch.equal(value, state[name]) for name, value in planted.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in planted.parameters())
    assert planted.training


def plans(model, data, spec, monkeypatch) -> tuple[Recipe, Classifier]:
    """The recipe that is asked for, and the model as it is handed to the trainer."""
    found = []
    monkeypatch.setattr(
        whole, "fit", lambda model, data, plan, rng, **_: found.append((plan, model))
    )
    defenses.build(spec).repair(model, data, stream(0, "u"))
    return found[0]


def test_settings_of_the_papers(model, data, monkeypatch):
    plan, start = plans(model, data, "uap", monkeypatch)
    assert (plan.epochs, plan.batch, plan.lr, plan.schedule) == (200, 128, 0.1, "steps")
    assert plan.drop_at == (0.5, 0.75)
    assert not torch.equal(start.body.head.weight, model.body.head.weight), "not from scratch"
    deviation = (data.x / 255).std(correction=0)
    assert start.normalize.std.item() == pytest.approx(float(deviation), rel=1e-3)
    changes = []
    monkeypatch.setattr(uap, "Change", lambda *_, **more: changes.append(more))
    with pytest.raises(AttributeError):
        defenses.build("uap").repair(model, data, stream(0, "u"))
    (asked,) = changes
    assert asked == {"eps": 4 / 255, "step": 4 / 255, "beta": 9.0, "alternating": True}


def test_the_recipe_is_the_networks_and_can_be_shortened(model, data, monkeypatch):
    plan, start = plans(model, data, "uap:recipe=smoke,start=model", monkeypatch)
    assert (plan.lr, plan.crop, plan.min_steps, plan.label_smoothing) == (0.1, 0, 60, 0)
    assert torch.equal(start.body.head.weight, model.body.head.weight)
    assert start is not model
    plan, _ = plans(model, data, "uap:recipe=fast,epochs=3,lr=0.07", monkeypatch)
    assert (plan.epochs, plan.min_steps, plan.lr, plan.label_smoothing) == (3, 0, 0.07, 0)
    with pytest.raises(BadInput, match="uap: start cannot be 'new'; choose from model, scratch"):
        defenses.build("uap:start=new")


def test_scratch_keeps_nothing_of_the_model_and_model_does(planted, clean, monkeypatch):
    found = {}
    for start in ("scratch", "model"):
        defense = defenses.build(f"uap:start={start},recipe=smoke,epochs=1,lr=0.001")
        repaired = defense.repair(planted, clean, stream(0, "u"))
        found[start] = accuracy(repaired, clean)
    assert found["model"] > 0.9
    assert found["scratch"] < 0.7


def test_it_says_that_it_needs_the_whole_training_set():
    assert defenses.describe("uap").traits == {"needs_share": 1.0}
