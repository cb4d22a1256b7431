"""Mode connectivity repair: the curve is the formula's, its points are judged as they are used."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import toys
from torch import Tensor, nn
from torch.nn import functional as F

from arena.core import rates
from arena.core.contracts import Images
from arena.core.features import reestimate_batchnorm
from arena.core.models import Classifier
from arena.core.registry import BadInput, defenses
from arena.core.seeding import stream
from arena.core.training import Recipe, accuracy
from arena.defenses import mcr
from arena.defenses.mcr import Curve, ModeConnectivityRepair, furthest

SMALL = "mcr:epochs=20,batch=20,lr=0.05,weight_decay=0.1,crop=1,tune_cutout=0"


@pytest.fixture
def end(planted) -> Classifier:
    """Another model of the same architecture, not far away."""
    other, draws = deepcopy(planted), stream(0, "end")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
    return other


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=1e-6) for n in a)


# ------------------------------------------------------------------------------------- the curve


def test_the_curve_runs_from_end_to_end(planted, end):
    """Through (w1 + 2 w + w2) / 4 at the middle; elsewhere as the formula says."""
    curve = Curve(planted, end, stream(0))
    a, b = weights(planted), weights(end)
    assert alike(weights(curve.middle), {n: (a[n] + b[n]) / 2 for n in a}), "starts halfway"
    with torch.no_grad():
        for parameter in curve.middle.parameters():
            parameter.fill_(3.0)
        assert alike(curve.at(0.0), a)
        assert alike(curve.at(1.0), b)
        assert alike(curve.at(0.5), {n: (a[n] + 6 + b[n]) / 4 for n in a})
        assert alike(curve.at(0.2), {n: 0.64 * a[n] + 0.96 + 0.04 * b[n] for n in a})


def test_only_the_middle_is_trained(planted, end):
    planted.body.head.weight.requires_grad_(False)
    curve = Curve(planted, end, stream(0))
    trained = {name for name, p in curve.named_parameters() if p.requires_grad}
    names = {f"middle.{name}" for name, p in planted.named_parameters() if p.requires_grad}
    assert trained == names
    assert set(dict(curve.named_parameters())) == names | {"middle.body.head.weight"}
    assert torch.equal(curve.middle.body.head.weight, planted.body.head.weight), "as it came"
    assert "body.head.weight" not in curve.at(0.5)


def test_every_pass_draws_its_own_point(planted, end, clean):
    """The points are those of the generator, uniform in [0, 1), and carry the gradient."""
    curve, twin = Curve(planted, end, stream(0, "t")), stream(0, "t")
    x = clean.x[:20] / 255
    for _ in range(3):
        t = float(torch.rand((), generator=twin))
        out = curve.eval()(x)
        by_hand = deepcopy(planted)
        by_hand.load_state_dict({**by_hand.state_dict(), **curve.at(t)})
        assert torch.allclose(out, by_hand(x), atol=1e-5)
        assert alike(curve.now, curve.at(t))
    out.sum().backward()
    bias = curve.middle.body.head.bias.grad
    assert torch.allclose(bias, torch.full_like(bias, 20 * 2 * t * (1 - t)), rtol=1e-4)


def test_the_weights_at_the_point_decay(planted, end):
    """The gradient of wd/2 |phi|^2 in the middle is wd 2t(1-t) phi."""
    curve = Curve(planted, end, stream(0))
    curve.now = curve.at(0.3)
    total = sum(float(w.detach().square().sum()) for w in curve.now.values())
    assert float(curve.squares().detach()) == pytest.approx(total, rel=1e-5)
    (0.5 * 0.01 * curve.squares()).backward()
    for name, parameter in curve.middle.named_parameters():
        assert torch.allclose(parameter.grad, 0.01 * 0.42 * curve.now[name].detach(), atol=1e-6)


def test_the_first_update_of_the_middle(planted, end, clean, monkeypatch):
    """One step down the slope of CE + wd/2 |phi(t)|^2 at the point drawn."""
    monkeypatch.setattr("arena.core.training.has_bf16", lambda device: False)
    plain = vars(Recipe(flip=False))
    monkeypatch.setattr(mcr, "Recipe", lambda **more: Recipe(**{**plain, **more}))
    curve = Curve(planted, end, stream(0, "t"))
    before = weights(curve.middle)
    ModeConnectivityRepair(
        epochs=1, batch=200, lr=0.1, momentum=0.0, weight_decay=0.5, crop=0
    ).train(curve, clean, stream(0, "fit"), clean)

    twin = Curve(planted, end, stream(0, "t")).train()
    loss = F.cross_entropy(twin(clean.x / 255), clean.y) + 0.25 * twin.squares()
    loss.backward()
    slopes = {name: parameter.grad for name, parameter in twin.middle.named_parameters()}
    after = weights(curve.middle)
    for name in before:
        assert torch.allclose(after[name], before[name] - 0.1 * slopes[name], atol=1e-4), name


def test_a_point_gets_statistics_of_its_own(planted, end, clean):
    """Neither end's nor the training's: those of clean images at the very point."""
    curve = Curve(planted, end, stream(0))
    with torch.no_grad():
        for norm in (m for m in curve.middle.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.fill_(7.0)
    model, expected = deepcopy(planted), deepcopy(planted)
    curve.place(model, 0.4, clean)
    expected.load_state_dict({**expected.state_dict(), **curve.at(0.4)})
    reestimate_batchnorm(expected, clean)
    found = model.state_dict()
    assert all(torch.allclose(found[n], v, atol=1e-6) for n, v in expected.state_dict().items())
    assert not torch.equal(found["body.block1.1.running_var"], planted.body.block1[1].running_var)


# ------------------------------------------------------------------------------------- the point


@pytest.mark.parametrize(
    ("accuracies", "max_drop", "t"),
    [
        ([0.9, 0.9, 0.9], 0.0, 0.5),
        ([0.96, 0.95, 0.94, 0.95, 0.96], 0.02, 0.5),
        ([0.96, 0.95, 0.93, 0.95, 0.94], 0.02, 4 / 6),  # of two at one distance the later
        ([0.96, 0.95, 0.93, 0.94, 0.94], 0.02, 2 / 6),  # … unless the earlier is better
        ([0.96, 0.95, 0.90, 0.91, 0.93], 0.02, 2 / 6),
        ([0.96, 0.90, 0.90, 0.90, 0.94], 0.01, 1 / 6),
        ([0.10, 0.90, 0.20, 0.10, 0.10], 1.0, 0.5),
        ([0.5, 0.6], 0.0, 2 / 3),
    ],
)
def test_the_point_farthest_from_both_ends(accuracies, max_drop, t):
    assert furthest(accuracies, max_drop) == pytest.approx(t)


def test_points_are_judged_on_held_out_images(planted, clean, monkeypatch, rng):
    seen: dict[str, list[Tensor]] = {"fit": [], "held": [], "statistics": []}
    states: list[dict[str, Tensor]] = []

    def tuned(model: nn.Module, data: Images, *args: object, **more: object) -> nn.Module:
        seen["fit"].append(data.x)
        return model.eval()

    def judged(model: Classifier, held: Images) -> float:
        seen["held"].append(held.x)
        states.append({n: v.clone() for n, v in model.state_dict().items()})
        return 0.9 if len(states) in (4, 5) else 0.5

    real = mcr.reestimate_batchnorm

    def estimated(model: nn.Module, images: Images) -> None:
        seen["statistics"].append(images.x)
        real(model, images)

    for module in (rates, mcr):
        monkeypatch.setattr(module, "fit", tuned)
    monkeypatch.setattr(mcr, "accuracy", judged)
    monkeypatch.setattr(mcr, "reestimate_batchnorm", estimated)
    monkeypatch.setattr(mcr, "shown", lambda images, crop, draws: images.take(torch.arange(9)))
    repaired = defenses.build("mcr:held_out=0.3,tune_lr=0.01").repair(planted, clean, rng)
    assert (len(seen["fit"]), len(seen["held"]), len(seen["statistics"])) == (2, 19, 20)
    tune, held = seen["fit"][0], seen["held"][0]
    assert (len(held), len(tune)) == (60, 140)
    both = torch.cat([held, tune]).flatten(1)
    assert torch.equal(both.unique(dim=0), clean.x.flatten(1).unique(dim=0))
    assert all(torch.equal(part, tune) for part in seen["fit"])
    assert all(torch.equal(part, tune[:9]) for part in seen["statistics"]), "as they are shown"
    final = repaired.state_dict()
    assert all(torch.equal(final[name], value) for name, value in states[4].items())


@pytest.mark.parametrize(("crop", "reach"), [(0, 0), (2, 2), (99, 15)])
def test_statistics_are_of_images_as_training_shows_them(clean, rng, crop, reach):
    """Each is the image somewhere on a black ground, or its mirror image."""
    few = clean.take(torch.arange(60))
    found = mcr.shown(few, crop, rng)
    assert torch.equal(found.y, few.y)
    assert found.x.dtype == torch.uint8
    assert found.x.shape == few.x.shape
    places, mirrored = set(), 0
    side = few.x.shape[-1]
    assert side == 16
    for before, after in zip(few.x, found.x, strict=True):
        ground = F.pad(before, (reach,) * 4)
        here = [
            (top, left, flip)
            for top in range(2 * reach + 1)
            for left in range(2 * reach + 1)
            for flip in (False, True)
            if torch.equal(
                ground[:, top : top + side, left : left + side],
                after.flip(-1) if flip else after,
            )
        ]
        assert here, "another image"
        places |= {place[:2] for place in here}
        mirrored += all(place[2] for place in here)
    assert len(places) >= (20 if reach else 1)
    assert 10 < mirrored < 50


def test_a_given_point_is_taken(planted, clean, monkeypatch, rng):
    placed: list[float] = []
    real = Curve.place

    def spy(self: Curve, model: Classifier, t: float, images: Images) -> None:
        placed.append(t)
        real(self, model, t, images)

    monkeypatch.setattr(Curve, "place", spy)
    defense = defenses.build("mcr:epochs=0,tune_epochs=0,t=0.1")
    repaired = defense.repair(planted, clean, rng)
    assert placed == [0.1]
    assert alike(weights(repaired), weights(planted)), "both ends and the middle are the victim"
    assert not repaired.training


# ---------------------------------------------------------------------------------- as a defense


def test_training_follows_the_code(planted, clean, rng, monkeypatch):
    plans: dict[str, Recipe] = {}

    def fitted(model: nn.Module, data: Images, plan: Recipe, *args: object, **more: str) -> None:
        plans[more["what"]] = plan

    for module in (rates, mcr):
        monkeypatch.setattr(module, "fit", fitted)
    defenses.build("mcr:t=0.5,tune_lr=0.05").repair(planted, clean, rng)
    tune, curve = plans["fine-tuning at 0.05"], plans["curve"]
    assert (tune.epochs, tune.lr, tune.batch, tune.cutout) == (40, 0.05, 64, 9)
    assert tune.schedule == "cosine"
    assert (curve.epochs, curve.batch, curve.lr, curve.momentum) == (100, 128, 0.01, 0.9)
    assert (curve.weight_decay, curve.label_smoothing, curve.cutout) == (0, 0, 0)
    assert (curve.crop, curve.border, curve.flip, curve.bias_lr) == (4, "zero", True, 1)
    assert (curve.schedule, curve.warmup, curve.start_lr, curve.final_lr) == (
        "triangle",
        0.5,
        1.0,
        0.01,
    )
    assert ModeConnectivityRepair().weight_decay == 1e-4


def test_the_middle_of_the_curve_is_free_of_the_backdoor(planted, clean):
    """Weights that clean images do not need fade away from the ends; at the ends they are as
    strong as ever."""
    test = toys.images(200, stream(0, "test"))
    repaired = defenses.build(SMALL).repair(planted, clean, stream(0))
    assert accuracy(repaired, test) > 0.95
    assert toys.success(repaired, test) < 0.1
    plain = SMALL.replace("crop=1", "crop=0")  # black borders alone move its batch statistics
    at_victim = defenses.build(f"{plain},t=0").repair(planted, clean, stream(0))
    assert alike(weights(at_victim), weights(planted))
    assert toys.success(at_victim, test) > 0.9


def test_what_it_cannot_use_is_named(planted, clean, rng):
    with pytest.raises(BadInput, match="0 would be held out and 8 trained on; give more images"):
        defenses.build("mcr:held_out=0.01").repair(planted, toys.images(8, rng), rng)
    with pytest.raises(BadInput, match=r"has none of class 2; give it at least one"):
        defenses.build("mcr").repair(planted, clean.take(clean.y != 2), rng)
    with pytest.raises(BadInput, match="mcr: t must be at most 1"):
        defenses.build("mcr:t=1.5")
