"""PGD against models whose worst examples are known, and the networks trained on its examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from arena.core import adversarial, models, parts, training
from arena.core.adversarial import pgd, project, to_levels
from arena.core.contracts import Images
from arena.core.networks import Network
from arena.core.progress import listening
from arena.core.registry import BadInput
from arena.core.seeding import stream


class Linear(nn.Module):
    """Two classes: logits 0 and <w, x - 1/2> - b. Not touched by autocast."""

    def __init__(self, w, b=0.0):
        super().__init__()
        self.w, self.b = nn.Parameter(w), b

    def forward(self, x):
        score = ((x - 0.5) * self.w).flatten(1).sum(1) - self.b
        return torch.stack([torch.zeros_like(score), score], 1)


class Small(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.three = nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        return self.head(self.three(self.two(self.one(x))).mean((2, 3)))


SMALL = Network(
    build=lambda classes, shape: Small(classes, shape[0]),
    levels=("one", "two", "three"),
    head="head",
    summary="a network for tests",
    source="this file",
    sides=(8, 224),
)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(models._catalogue(), "small", SMALL)
    return models.build("small", 3, (3, 10, 10), stream(0, "small"))


def noise(n=40, channels=3, side=10, classes=3):
    shape = (n, channels, side, side)
    x = torch.randint(256, shape, generator=stream(0, "noise"), dtype=torch.uint8)
    return Images(x, torch.arange(n) % classes)


def weights(channels=3, side=4):
    return torch.randn(1, channels, side, side, generator=stream(0, "weights"))


# ----------------------------------------------------------------------------------------- PGD


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize(
    ("label", "targeted", "sign"), [(0, False, 1), (1, False, -1), (0, True, -1)]
)
def test_linf_reaches_the_corner_of_the_box(rng, start, label, targeted, sign):
    w, x = weights(), torch.full((5, 3, 4, 4), 0.5)
    out = pgd(
        Linear(w), x, torch.full((5,), label),
        norm="linf", eps=0.1, step=0.03, steps=8, rng=rng, targeted=targeted, random_start=start,
    )  # fmt: skip
    assert torch.allclose(out, x + sign * 0.1 * w.sign(), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("label", "targeted", "sign"), [(0, False, 1), (1, True, 1), (1, False, -1)]
)
def test_l2_goes_along_the_weights(rng, channels, label, targeted, sign):
    w, x = weights(channels), torch.full((5, channels, 4, 4), 0.5)
    y, settings = torch.full((5,), label), {"norm": "l2", "eps": 0.3, "rng": rng}
    straight = pgd(
        Linear(w), x, y, step=0.07, steps=5, targeted=targeted, random_start=False, **settings
    )
    best = sign * 0.3 * w / w.norm()
    assert torch.allclose(straight - x, best.expand_as(x), atol=1e-6)
    drawn = pgd(Linear(w), x, y, step=0.07, steps=60, targeted=targeted, **settings)
    assert torch.allclose(drawn - x, best.expand_as(x), atol=1e-4)


def test_one_step_is_as_long_as_asked_for(rng):
    w, x, y = weights(), torch.full((2, 3, 4, 4), 0.5), torch.zeros(2, dtype=torch.long)
    settings = {"eps": 0.2, "step": 0.05, "steps": 1, "rng": rng, "random_start": False}
    assert torch.allclose(pgd(Linear(w), x, y, norm="linf", **settings), x + 0.05 * w.sign())
    moved = pgd(Linear(w), x, y, norm="l2", **settings) - x
    assert torch.allclose(moved.flatten(1).norm(dim=1), torch.tensor(0.05))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_results_are_images_within_the_ball(rng, norm, small):
    train = noise()
    x = train.x / 255
    before = x.clone()
    out = pgd(small, x, train.y, norm=norm, eps=0.2, step=0.1, steps=4, rng=rng)
    assert torch.equal(x, before), "PGD wrote to its argument"
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert 0 <= out.min() <= out.max() <= 1
    moved = (out - x).flatten(1)
    length = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
    assert (length <= 0.2 + 1e-6).all()
    assert (length > 0.1).all()


def test_the_range_of_pixels_cuts_the_box(rng):
    w = torch.ones(1, 3, 4, 4)
    x = torch.full((1, 3, 4, 4), 0.95)
    out = pgd(Linear(w), x, torch.tensor([0]), norm="linf", eps=0.1, step=0.1, steps=3, rng=rng)
    assert (out == 1).all()


def test_projection_by_hand():
    delta = torch.tensor([[3.0, 4.0], [0.3, 0.4]]).view(2, 1, 1, 2)
    expected = torch.tensor([[0.6, 0.8], [0.3, 0.4]]).view(2, 1, 1, 2)
    assert torch.allclose(project(delta, "l2", 1.0), expected)
    expected = torch.tensor([[1.0, 1.0], [0.3, 0.4]]).view(2, 1, 1, 2)
    assert torch.equal(project(delta, "linf", 1.0), expected)
    assert not project(torch.zeros(1, 1, 2, 2), "l2", 1.0).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_random_start_is_uniform_in_the_ball(rng, norm):
    x, y = torch.full((20_000, 3, 1, 1), 0.5), torch.zeros(20_000, dtype=torch.long)
    settings = {"norm": norm, "eps": 0.2, "step": 0.1, "steps": 0}
    moved = (pgd(Linear(weights(3, 1)), x, y, rng=rng, **settings) - x).flatten(1) / 0.2
    length = moved.norm(dim=1) if norm == "l2" else moved.abs().amax(1)
    assert length.max() <= 1 + 1e-5
    # in three dimensions the share of the ball within r is r^3, so that r^3 is uniform
    assert abs(float((length**3).mean()) - 0.5) < 0.01
    assert abs(float((length**3 < 0.1).float().mean()) - 0.1) < 0.01
    assert moved.mean(0).abs().max() < 0.02
    still = pgd(Linear(weights(3, 1)), x, y, rng=rng, random_start=False, **settings)
    assert torch.equal(still, x)


def test_the_same_generator_gives_the_same_examples(small):
    train = noise()
    settings = {"norm": "linf", "eps": 0.1, "step": 0.05, "steps": 2}
    one, two, other = (
        pgd(small, train.x / 255, train.y, rng=stream(seed, "pgd"), **settings)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("evaluate", [True, False])
def test_the_model_is_given_back_as_it_was(rng, small, evaluate):
    small.train()
    small.body.two.eval()
    small.body.one[0].weight.requires_grad_(False)
    modes = [module.training for module in small.modules()]
    flags = [weight.requires_grad for weight in small.parameters()]
    state = {name: value.clone() for name, value in small.state_dict().items()}
    seen = []
    hook = small.body.three.register_forward_hook(
        lambda module, *_: seen.append((module.training, small.body.two.training))
    )
    train = noise()
    pgd(
        small, train.x / 255, train.y,
        norm="linf", eps=0.1, step=0.1, steps=2, rng=rng, evaluate=evaluate,
    )  # fmt: skip
    hook.remove()
    assert seen == [(not evaluate, False)] * 2
    assert [module.training for module in small.modules()] == modes
    assert [weight.requires_grad for weight in small.parameters()] == flags
    assert all(weight.grad is None for weight in small.parameters())
    for name, value in small.state_dict().items():
        assert torch.equal(value, state[name]), name
    small.train()(train.x / 255)
    moved = small.state_dict()["body.one.1.running_mean"]
    assert not torch.equal(moved, state["body.one.1.running_mean"]), "batch norm stays frozen"


def test_the_model_is_given_back_after_a_failure(rng, small):
    small.train()
    with pytest.raises(RuntimeError):
        pgd(
            small, torch.rand(2, 5, 10, 10), torch.tensor([0, 1]),
            norm="linf", eps=0.1, step=0.1, steps=1, rng=rng,
        )  # fmt: skip
    assert all(module.training for module in small.modules())
    assert all(weight.requires_grad for weight in small.parameters())


def test_an_image_is_attacked_alone(rng, small):
    train = noise(12)
    x = train.x / 255
    settings = {"eps": 0.1, "step": 0.05, "steps": 3, "rng": rng, "random_start": False}
    together = pgd(small.train(), x, train.y, norm="linf", **settings)
    alone = [
        pgd(small, x[i : i + 1], train.y[i : i + 1], norm="linf", **settings) for i in range(12)
    ]
    assert (
        (torch.cat(alone) - together).abs() > 1e-4
    ).float().mean() < 0.02  # bf16 may turn a sign


def test_a_flat_model_moves_nothing(rng):
    x, y = torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.long)
    for norm in ("linf", "l2"):
        out = pgd(
            Linear(torch.zeros(1, 1, 4, 4)), x, y,
            norm=norm, eps=0.1, step=0.1, steps=2, rng=rng, random_start=False,
        )  # fmt: skip
        assert torch.equal(out, x)


def test_what_is_no_ball_is_refused(rng):
    x, y = torch.rand(1, 1, 4, 4), torch.tensor([0])
    for norm, eps in (("l1", 0.1), ("linf", -0.1)):
        with pytest.raises(ValueError, match="norm linf or l2 and a radius"):
            pgd(Linear(weights(1)), x, y, norm=norm, eps=eps, step=0.1, steps=1, rng=rng)


def test_levels_are_rounded_towards_zero():
    change = torch.tensor([0.4, 1.0, -2.7, 8.0, -8.0, 0.0, 7.9]) / 255
    assert (to_levels(change) * 255).round(decimals=4).tolist() == [0, 1, -2, 8, -8, 0, 7]
    clean = (torch.arange(256) / 255).expand(256, 256)
    shifted = clean.T  # every level becomes every other
    levels = to_levels(shifted - clean) * 255
    assert torch.allclose(levels, (shifted - clean) * 255, atol=1e-3)


# ---------------------------------------------------------------------------- robust accuracy


def test_robust_accuracy_counts_the_margins(rng):
    # the class is whether an image is brighter than 128 on average; all its pixels are alike
    model = Linear(torch.full((1, 1, 4, 4), 1 / 16), b=128 / 255 - 0.5)
    levels = torch.tensor([100, 118, 122, 127, 129, 134, 138, 200], dtype=torch.uint8)
    images = Images(
        levels.view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous(), (levels > 128).long()
    )

    def found(eps, **settings):
        return adversarial.robust_accuracy(model, images, eps=eps / 255, rng=rng, **settings)

    assert found(0.5, step=0.1 / 255) == 1
    assert found(8, batch=3) == 4 / 8  # within 8 levels of 128: 122, 127, 129 and 134
    assert found(11, step=3 / 255) == 2 / 8
    # moved by 8 levels in every one of 16 pixels, an image has moved by 32 in Euclidean norm
    assert found(32, norm="l2", step=10 / 255) == 4 / 8
    with pytest.raises(ValueError, match="no images"):
        adversarial.robust_accuracy(model, images.take(torch.arange(0)), rng=rng)


# --------------------------------------------------------------------- training on the examples


@pytest.mark.parametrize("steps", [2, 4])
def test_training_examples_cross_the_ball(rng, steps):
    w, x = weights(), torch.full((6, 3, 4, 4), 0.5)
    batch = Images(x, torch.zeros(6, dtype=torch.long), rows=torch.arange(6))
    out = adversarial.on_examples(Linear(w), eps=0.1, steps=steps)(batch, rng)
    moved = (out.x - x) * w.sign() / 0.1
    assert moved.max() <= 1 + 1e-5
    assert moved.min() >= 1 - 1e-5  # from the far side, 2 radii bring it so far
    assert torch.equal(out.y, batch.y)
    assert torch.equal(out.rows, batch.rows)


def test_training_examples_of_one_step_go_on_from_far_noise(rng):
    w, x = weights(), torch.full((200, 3, 4, 4), 0.95)
    batch = Images(x, torch.zeros(200, dtype=torch.long), rows=torch.arange(200))
    out = adversarial.on_examples(Linear(w), eps=0.1, steps=1)(batch, rng)
    moved = (out.x - x) * w.sign() / 0.1  # 1 radius up the slope, from noise of 2 either way
    assert -1 - 1e-5 <= moved.min() < -0.9
    assert 2.9 < moved.max() <= 3 + 1e-5
    assert abs(moved.mean() - 1) < 0.05
    assert out.x.max() > 1, "clipped"
    assert torch.equal(out.y, batch.y)
    assert torch.equal(out.rows, batch.rows)


def test_training_examples_use_the_statistics_of_the_batch(rng, small):
    train = noise()
    state = {name: value.clone() for name, value in small.state_dict().items()}
    batch = Images(train.x / 255, train.y)
    modes = []
    hook = small.register_forward_hook(lambda module, *_: modes.append(module.body.one[1].training))
    adversarial.on_examples(small.train(), eps=0.1, steps=2)(batch, rng)
    hook.remove()
    assert modes == [True, True]
    assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())


class Shelf:
    """A keeper of parts in memory, which hands `make` a checkpoint that is never read."""

    def __init__(self):
        self.kept, self.labels, self.saves = {}, [], 0

    def keep(self, key, label, make):
        if key not in self.kept:
            self.kept[key] = make(self)
            self.labels.append(label)
        return {name: value.clone() for name, value in self.kept[key].items()}

    def load(self):
        return None

    def save(self, state):
        self.saves += 1


def test_a_surrogate_is_trained_once_and_its_figures_are_told(small):
    train, shelf, told = noise(60), Shelf(), []
    settings = {"epochs": 2, "updates": 6, "eps": 0.1, "steps": 1}

    def listener(what, done, total, figures):
        if what == "surrogate" and "robust_accuracy" in figures:
            told.append(figures)

    with parts.kept(shelf), listening(listener):
        one = adversarial.surrogate("small", train, **settings)
        two = adversarial.surrogate("small", train, **settings)
        assert len(shelf.kept) == 1
        assert shelf.saves == 6, "small sets do not get the updates asked for"
        plain = adversarial.surrogate("small", train, epochs=2, updates=6)
        assert len(shelf.kept) == 2
        assert shelf.saves == 12
    assert not one.training
    assert one.spec == ("small", 3, (3, 10, 10))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])
    head = "body.head.weight"
    assert not torch.equal(one.state_dict()[head], plain.state_dict()[head]), "not adversarially"
    assert len(told) == 2
    assert told[0] == told[1]
    assert 0 <= told[0]["robust_accuracy"] <= 1
    assert told[0]["accuracy"] > 0


def test_training_on_examples_makes_a_model_robust():
    # Pixel 0 tells the class with a wide margin, 63 others with a narrow one that together says
    # more; only the first survives perturbations of 0.1.
    n = 300
    y = torch.arange(n) % 2
    sign = (2 * y - 1).float()[:, None]
    x = 0.5 + 0.05 * torch.randn(n, 64, generator=stream(0, "x"))
    x[:, 1:] += 0.08 * sign
    x[:, :1] += 0.3 * sign
    data = Images((x.clamp(0, 1) * 255).round().to(torch.uint8).view(n, 1, 8, 8), y)
    plan = training.Recipe(epochs=20, batch=60, lr=0.5, crop=0, flip=False, label_smoothing=0.0)
    found = {}
    for steps in (0, 1, 2):
        model = Linear(torch.zeros(1, 1, 8, 8))
        hook = adversarial.on_examples(model, eps=0.1, steps=steps) if steps else None
        training.fit(model, data, plan, stream(0, "fit"), on_batch=hook)
        found[steps] = adversarial.robust_accuracy(
            model, data, eps=0.1, step=0.03, steps=10, rng=stream(0, "attack")
        )
    assert found[0] < 0.5
    assert found[1] > 0.9
    assert found[2] > 0.9


@pytest.mark.parametrize(("n", "held"), [(2, 1), (19, 1), (40, 4), (20_000, 1000)])
def test_held_images_are_not_trained_on(rng, n, held):
    images = Images(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.arange(n))
    seen, rest = adversarial.split_held(images, rng)
    assert len(rest) == held
    assert torch.equal(torch.cat([seen.y, rest.y]).sort().values, images.y)
    if n == 20_000:
        assert abs(rest.y.double().mean() / n - 0.5) < 5 / math.sqrt(12 * held)  # drawn from all


def test_surrogates_that_do_not_do_are_refused(small):
    with pytest.raises(BadInput, match=r"mine: surrogate: no network 'fastnett'.*fastnet"):
        adversarial.check_surrogate("mine", "fastnett", (3, 32, 32))
    with pytest.raises(BadInput, match="8 px a side and more, these are 32x7 px"):
        adversarial.check_surrogate("mine", "small", (3, 32, 7))
    adversarial.check_surrogate("mine", "small", (1, 8, 8))
