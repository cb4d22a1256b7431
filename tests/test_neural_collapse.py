"""Neural collapse: NC1 by hand, the recipe of the papers, and a network whose features collapse."""

from __future__ import annotations

import pytest
import torch
import toys
from torch import nn

from arena.core import models, whole
from arena.core.contracts import Images
from arena.core.models import Classifier, ModelSpec
from arena.core.networks import Network
from arena.core.progress import listening
from arena.core.registry import BadInput, defenses
from arena.core.seeding import stream
from arena.core.training import accuracy
from arena.defenses import neural_collapse
from arena.defenses.neural_collapse import figures, variability

# ------------------------------------------------------------------------------------------ figures


def test_nc1_by_hand():
    # class means -2 and 2 (variance 4 around 0), in each class one point 1 to either side
    points = torch.tensor([[-3.0], [-1.0], [1.0], [3.0]])
    assert variability(points, torch.tensor([0, 0, 1, 1])) == pytest.approx(1 / 4 / 2)
    # the second direction varies within classes, but the means do not differ in it
    wide = torch.cat([points, torch.tensor([[5.0], [-5.0], [5.0], [-5.0]])], 1)
    assert variability(wide, torch.tensor([0, 0, 1, 1])) == pytest.approx(1 / 4 / 2)


def test_nc1_is_the_trace_of_the_formula():
    y = torch.arange(60) % 4
    points = torch.randn(60, 7, generator=stream(0, "x")) + 3 * torch.eye(4, 7)[y] + 5
    means = torch.stack([points[y == c].mean(0) for c in range(4)]).double()
    within = (points - means[y]).T @ (points - means[y]) / 60
    centred = means - means.mean(0)
    between = centred.T @ centred / 4
    expected = torch.trace(within @ torch.linalg.pinv(between, rtol=1e-8, hermitian=True)) / 4
    assert variability(points, y) == pytest.approx(float(expected), rel=1e-6)
    shuffled = torch.randperm(60, generator=stream(0, "order"))
    assert variability(points[shuffled], y[shuffled]) == pytest.approx(float(expected), rel=1e-6)
    assert variability(7 * points, y) == pytest.approx(float(expected), rel=1e-6)
    assert variability(means[y], y) == pytest.approx(0, abs=1e-12)
    assert variability(points, 3 * y) == pytest.approx(float(expected), rel=1e-6), "classes missing"


def test_figures_are_of_the_heads_inputs(planted, clean):
    error, nc1 = figures(planted, clean)
    assert error == 0
    deep = planted.body.block3(planted.body.block2(planted.body.block1(clean.x / 255))).flatten(1)
    assert nc1 == pytest.approx(variability(deep.detach(), clean.y), rel=0.02)  # it may be bf16
    wrong = Images(clean.x, torch.where(torch.arange(200) < 50, (clean.y + 1) % 4, clean.y))
    assert figures(planted, wrong)[0] == 0.25
    assert not planted.body.head._forward_pre_hooks
    assert not planted.training


def test_figures_of_many_images_are_of_an_even_sample(planted, clean, monkeypatch):
    monkeypatch.setattr(neural_collapse, "_LOOKED_AT", 50)
    shifted = Images(clean.x, torch.where(torch.arange(200) % 4 == 0, (clean.y + 1) % 4, clean.y))
    assert figures(planted, shifted)[0] == 1  # every fourth is looked at


class Places(nn.Module):
    """Its head is a 1x1 convolution, whose answers are averaged over places."""

    def __init__(self, classes):
        super().__init__()
        self.one, self.two = nn.Identity(), nn.Identity()
        self.three = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
        self.head = nn.Conv2d(5, classes, 1)

    def forward(self, x):
        return self.head(self.three(x)).mean((2, 3))


def test_maps_are_averaged_over_places(rng):
    network = Network(
        build=lambda classes, _: Places(classes),
        levels=("one", "two", "three"),
        head="head",
        summary="a convolution as head",
        source="this file",
    )
    model = Classifier(ModelSpec("places", 4, (3, 16, 16)), network).eval()
    x = torch.randint(256, (40, 3, 16, 16), generator=rng, dtype=torch.uint8)
    noise = Images(x, torch.arange(40) % 4)  # averages and places differ in what they tell
    deep = model.body.three(model.normalize(x / 255)).mean((2, 3))
    assert figures(model, noise)[1] == pytest.approx(variability(deep.detach(), noise.y), rel=0.1)


# ----------------------------------------------------------------------------------------- training


def plan_of(planted, clean, spec, monkeypatch):
    found = []

    def spy(model, data, plan, rng, *, what):
        found.append((model, data, plan))
        return data

    monkeypatch.setattr(whole, "fit", spy)
    defenses.build(spec).repair(planted, clean, stream(0, "n"))
    return found[0]


def test_settings_of_the_papers(planted, clean, monkeypatch):
    model, data, plan = plan_of(planted, clean, "neural_collapse", monkeypatch)
    assert data is clean
    assert (plan.epochs, plan.batch, plan.lr, plan.weight_decay) == (300, 128, 0.1, 5e-4)
    assert (plan.schedule, plan.warmup, plan.momentum) == ("steps", 0, 0.9)
    assert plan.drop_at == pytest.approx((1 / 3, 2 / 3))
    assert (plan.crop, plan.flip, plan.cutout, plan.label_smoothing) == (0, False, 0, 0)
    assert not torch.equal(model.body.block2[0].weight, planted.body.block2[0].weight), "not anew"
    deviation = (clean.x / 255).std((0, 2, 3), correction=0)
    assert torch.allclose(model.normalize.std, deviation, rtol=1e-3)


def test_settings_can_be_others(planted, clean, monkeypatch):
    spec = "neural_collapse:epochs=250,lr=0.03,augment=true,start=model,weight_decay=0,batch=64"
    model, _, plan = plan_of(planted, clean, spec, monkeypatch)
    assert (plan.epochs, plan.batch, plan.lr, plan.weight_decay) == (250, 64, 0.03, 0)
    assert (plan.crop, plan.flip) == (4, True)
    assert torch.equal(model.body.block2[0].weight, planted.body.block2[0].weight)
    assert model is not planted
    with pytest.raises(BadInput, match="start cannot be 'new'; choose from model, scratch"):
        defenses.build("neural_collapse:start=new")


def test_the_rate_is_the_networks(planted, clean, monkeypatch):
    gentle = toys.NETWORK.__class__(
        **{**toys.NETWORK.__dict__, "overrides": {"paper": {"lr": 0.01}}}
    )
    monkeypatch.setitem(models._catalogue(), "planted", gentle)
    *_, plan = plan_of(planted, clean, "neural_collapse", monkeypatch)
    assert plan.lr == 0.01


class Dense(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.one = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.two = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.three = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        return self.head(self.three(self.two(self.one(x))))


def test_features_collapse_when_training_goes_on(monkeypatch):
    """Both networks make no training error; the one trained longer has tighter classes."""
    network = Network(
        build=lambda classes, _: Dense(classes),
        levels=("one", "two", "three"),
        head="head",
        summary="dense layers",
        source="this file",
        sides=(8, 8),
    )
    monkeypatch.setitem(models._catalogue(), "dense", network)
    model = models.build("dense", 3, (1, 8, 8), stream(0, "model"))
    y = torch.arange(122) % 3
    noise = torch.randn(122, 64, generator=stream(0, "x"))
    x = 128 + 30 * (noise + torch.randn(3, 64, generator=stream(0, "means"))[y])
    images = Images(x.clamp(0, 255).to(torch.uint8).view(-1, 1, 8, 8), y)
    told = []

    def listener(what, done, total, found):
        if "nc1" in found:
            told.append(found)

    for epochs in (8, 40):
        defense = defenses.build(f"neural_collapse:epochs={epochs},batch=20,lr=0.01")
        with listening(listener):
            repaired = defense.repair(model, images, stream(0, "n"))
        assert accuracy(repaired, images) >= 120 / 122  # two are held out
    short, long = told
    assert short["training_error"] == long["training_error"] == 0
    assert long["nc1"] < 0.4 * short["nc1"]


def test_nothing_of_the_backdoor_is_left(planted, clean):
    defense = defenses.build("neural_collapse:epochs=10,batch=20,lr=0.03")
    repaired = defense.repair(planted, clean, stream(0, "n"))
    assert accuracy(repaired, clean) == 1
    assert toys.success(repaired, clean) < 0.3


def test_it_says_that_it_needs_the_whole_training_set():
    assert defenses.describe("neural_collapse").traits == {"needs_share": 1.0}
