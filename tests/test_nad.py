"""NAD: attention by hand, what teacher and student are trained on, and a toy that it repairs."""

from __future__ import annotations

import copy

import pytest
import torch
import toys
from torch import nn

from arena.core import features, rates
from arena.core.contracts import Step
from arena.core.models import Classifier, ModelSpec
from arena.core.networks import Network
from arena.core.registry import BadInput, defenses
from arena.core.seeding import stream
from arena.core.training import accuracy
from arena.defenses import nad


def test_attention_by_hand():
    feature = torch.tensor([[[[1.0, 0.0]], [[-1.0, 1.0]]]])  # two channels, 1 x 2 places
    expected = torch.tensor([[[2.0, 1.0]]]) / 5**0.5  # squares summed: 2 and 1
    assert torch.allclose(nad.attention(feature), expected, atol=1e-5)
    third = torch.tensor([[[2.0, 1.0]]]) / 5**0.5  # sizes summed: 2 and 1
    assert torch.allclose(nad.attention(feature, 1.0), third, atol=1e-5)
    fourth = nad.attention(torch.tensor([[[[1.0, 2.0]]]]), 4.0)
    assert torch.allclose(fourth, torch.tensor([[[1.0, 16.0]]]) / 257**0.5, atol=1e-5)


def test_attention_has_length_one_and_ignores_size_and_sign(rng):
    feature = torch.randn(3, 5, 4, 6, generator=rng)
    found = nad.attention(feature)
    assert found.shape == (3, 4, 6)
    assert torch.allclose(found.flatten(1).norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(nad.attention(-7 * feature), found, atol=1e-5)
    assert torch.isfinite(nad.attention(torch.zeros(1, 2, 3, 3))).all(), "a silent map has none"
    assert nad.attention(feature.bfloat16()).dtype == torch.float32


def test_distance_by_hand():
    one, two = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[0.0, 0.5]]]])
    # attention (1, 0) and (0, 1): squared differences of 1 and 1; the paper's maps have 32, 16 and
    # 8 places a side
    for level, places in (("shallow", 1024), ("middle", 256), ("deep", 64)):
        assert float(nad.distance(one, two, level)) == pytest.approx(2 / places, rel=1e-4)
    both, equal = torch.cat([one, two]), torch.cat([one, one])
    assert float(nad.distance(both, equal, "deep")) == pytest.approx(1 / 64, rel=1e-4)
    wider = nn.functional.pad(one, (0, 2)), nn.functional.pad(two, (0, 2))  # places of no attention
    assert float(nad.distance(*wider, "deep")) == pytest.approx(2 / 64, rel=1e-4)


def test_on_maps_of_the_papers_size_it_is_the_mean_squared_error(rng):
    for level, side in (("shallow", 32), ("middle", 16), ("deep", 8)):
        one, two = torch.randn(2, 3, 4, side, side, generator=rng)
        expected = nn.functional.mse_loss(nad.attention(one, 3.0), nad.attention(two, 3.0))
        assert torch.allclose(nad.distance(one, two, level, 3.0), expected, rtol=1e-5)


class Fits:
    """Stands in for `fit`: keeps what it was asked for, trains nothing."""

    def __init__(self, change=None):
        self.calls, self.change = [], change

    def __call__(self, model, data, plan, rng, **more):
        self.calls.append((model, data, plan, more))
        if self.change is not None and len(self.calls) == 1:
            self.change(model)
        return model.eval()


def test_teacher_and_student_follow_the_schedule(planted, clean, rng, monkeypatch):
    fits = Fits()
    monkeypatch.setattr(rates, "fit", fits)
    defenses.build("nad:teacher_epochs=6,epochs=10,decay_every=2,lr=0.03").repair(
        planted, clean, rng
    )
    (teacher, _, first, plain), (student, _, second, more) = fits.calls
    assert teacher is not planted
    assert student is not planted
    assert teacher is not student
    assert (first.epochs, first.lr) == (6, 0.03)
    assert (second.epochs, second.lr) == (10, 0.03)
    assert first.drop_at == pytest.approx((1 / 3, 2 / 3))
    assert second.drop_at == pytest.approx((0.2, 0.4, 0.6, 0.8))
    for plan in (first, second):
        assert plan.schedule == "steps"
        assert (plan.batch, plan.momentum, plan.weight_decay) == (64, 0.9, 1e-4)
        assert (plan.crop, plan.cutout, plan.border, plan.flip) == (4, 9, "zero", True)
    assert "extra_loss" not in plain, "the teacher is tuned on the labels alone"
    assert more["levels"] == ["shallow", "middle"], "the deep level is a single place here"


def test_the_extra_loss_is_the_weighted_distance_to_the_teacher(planted, clean, rng, monkeypatch):
    def shake(model):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn(weight.shape, generator=stream(0, "shake")))

    fits = Fits(shake)
    monkeypatch.setattr(rates, "fit", fits)
    monkeypatch.setattr(nad, "autocast", lambda _: torch.autocast("cpu", enabled=False))
    defenses.build("nad:beta_shallow=3,beta_middle=7,power=1.5,lr=0.01").repair(planted, clean, rng)
    teacher, (student, _, _, more) = fits.calls[0][0], fits.calls[1]
    batch = clean.take(torch.arange(10))
    batch = batch._each(lambda part: part / 255 if part.ndim == 4 else part)
    seen = features.features(student.train(), batch.x, more["levels"])
    before = copy.deepcopy(teacher.state_dict())
    zero = torch.zeros(())
    step = Step(student, batch, zero, zero, seen, rng, 0.0)
    found = more["extra_loss"](step)
    wanted = features.features(teacher.eval(), batch.x, more["levels"])
    expected = torch.zeros(())
    for level, beta in (("shallow", 3), ("middle", 7)):
        maps = [f[level].abs().pow(1.5).sum(1).flatten(1) for f in (seen, wanted)]
        maps = [m / m.norm(dim=1, keepdim=True) for m in maps]
        places = {"shallow": 1024, "middle": 256}[level]
        expected = expected + beta / places * (maps[0] - maps[1]).square().sum(1).mean()
    assert expected > 1e-5
    assert torch.allclose(found, expected, rtol=1e-3)
    found.backward()
    assert student.body.block1[0].weight.grad is not None
    assert teacher.body.block1[0].weight.grad is None, "the teacher is not frozen"
    after = teacher.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before), "the teacher is not still"


class Flat(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.one = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4), nn.ReLU())
        self.two = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.three = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.three(self.two(self.one(x))))


def test_a_network_without_maps_is_refused(clean, rng):
    network = Network(
        build=lambda classes, _: Flat(classes),
        levels=("one", "two", "three"),
        head="head",
        summary="no maps",
        source="this file",
    )
    model = Classifier(ModelSpec("flat", 4, (3, 16, 16)), network)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BadInput, match=r"nad: at no feature level has flat a map .* another"):
        defenses.build("nad").repair(model, clean, rng)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_in_training_mode_is_looked_at_without_a_trace(planted, clean, rng, monkeypatch):
    monkeypatch.setattr(rates, "fit", Fits())
    state = {name: value.clone() for name, value in planted.state_dict().items()}
    planted.train()
    repaired = defenses.build("nad").repair(planted, clean, rng)
    assert planted.training
    for name, value in repaired.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_distillation_draws_attention_to_the_teachers(planted, clean, monkeypatch):
    """With a teacher that looks elsewhere, the student learns its maps, not only its answers."""
    fit, teachers = rates.fit, []

    def crooked(model, data, plan, rng, **more):
        if more["what"].startswith("teacher"):
            teachers.append(model)
            with torch.no_grad():  # it no longer looks at the bright pixels of a colour
                model.body.block1[0].weight.copy_(model.body.block1[0].weight.roll(1, 0) * 0.5)
            return model.eval()
        return fit(model, data, plan, rng, **more)

    monkeypatch.setattr(rates, "fit", crooked)
    x, apart = clean.x / 255, {}
    for beta in (0, 2000):
        spec = f"nad:beta_shallow={beta},beta_middle=0,lr=0.02,epochs=4,crop=0,cutout=0"
        student = defenses.build(spec).repair(planted, clean, stream(0, "nad"))
        with torch.no_grad():
            maps = [
                features.features(m, x, ["shallow"])["shallow"] for m in (student, teachers[-1])
            ]
        apart[beta] = float(nad.distance(*maps, "shallow"))
    assert apart[2000] < 0.5 * apart[0]


def test_the_planted_backdoor_goes_and_the_task_stays(planted, clean):
    assert toys.success(planted, clean) == 1
    repaired = defenses.build("nad:crop=1,cutout=0").repair(planted, clean, stream(0, "nad"))
    assert accuracy(repaired, clean) > 0.95
    assert toys.success(repaired, clean) < 0.05
