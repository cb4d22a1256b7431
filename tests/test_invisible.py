"""The invisible attack: the encoder and its training, known answers of the perturbation."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from test_adversarial import SMALL, Shelf
from torch import nn

from arena.attacks.invisible import Invisible
from arena.core import adversarial, metrics, models, parts, perturbation, poisoning, steganography
from arena.core.contracts import Images
from arena.core.models import Classifier, ModelSpec
from arena.core.networks import Network
from arena.core.progress import listening
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream
from arena.core.steganography import Plan, Steganograph, fitted, measured

QUICK = {"bits": 3, "updates": 4, "secret_updates": 2}
UNIVERSAL = {
    "form": "universal",
    "surrogate": "small",
    "surrogate_epochs": 1,
    "surrogate_updates": 1,
    "steps": 6,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models._catalogue(), "small", SMALL)
    monkeypatch.setattr(steganography, "ROUND", 2)
    monkeypatch.setattr(steganography, "BATCH", 16)
    monkeypatch.setattr(steganography, "WIDTH", 8)
    monkeypatch.setattr(perturbation, "BATCH", 16)


def images(n=60, channels=3, side=12, classes=4):
    """Smooth random images: small noise, enlarged."""
    noise = torch.rand(n, channels, side // 4, side // 4, generator=stream(0, "images"))
    x = nn.functional.interpolate(noise, (side, side), mode="bilinear")
    return Images((x * 200 + 27).round().to(torch.uint8), torch.arange(n) % classes)


def same(one, two):
    return all(torch.equal(value, two[name]) for name, value in one.items())


# ------------------------------------------------------------------------------ hiding and reading


@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 9, 14), (3, 33, 30)])
def test_the_networks_take_any_size(shape):
    pair = Steganograph(shape, 5)
    x, secret = torch.rand(2, *shape), torch.tensor([[0.0] * 5, [1.0] * 5])
    hidden = pair(x, secret)
    assert hidden.shape == x.shape
    assert 0 <= hidden.min() <= hidden.max() <= 1
    assert pair.decoder(hidden).shape == (2, 5)


def test_the_image_losses_set_in_gradually():
    plan = Plan(updates=200, secret_updates=100)
    shares = [steganography._image_share(at, plan) for at in (0, 50, 100, 125, 150, 199)]
    assert shares == [0, 0, 0, 0.5, 1, 1]
    assert steganography._image_share(99, Plan(updates=100, secret_updates=100)) == 0


def test_the_visible_loss_by_hand():
    x, plan = images().x[:4] / 255, Plan(l2_weight=2.0, perceptual_weight=0.0)
    assert steganography._visible(x, x + 0.1, plan) == pytest.approx(2 * 0.01, rel=1e-3)
    plan = Plan(l2_weight=0.0, perceptual_weight=3.0)
    noisy = x + 0.1 * torch.randn(x.shape, generator=stream(0, "noise"))
    unlike = 3 * (1 - metrics.ssim(x, noisy))
    assert float(steganography._visible(x, noisy, plan)) == pytest.approx(unlike, rel=1e-3)


class Paper(nn.Module):
    """Hides the first bit in plain sight: bright or dark."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.spread = nn.Linear(2, 1)
        self.decoder = lambda x: (x.mean((1, 2, 3)) - 0.5)[:, None].repeat(1, 2)

    def forward(self, x, secret):
        return torch.where(secret[:, :1, None, None] > 0.5, x.new_tensor(0.75), 0.25).expand_as(x)


def test_bit_accuracy_and_distance_by_hand():
    grey = Images(torch.full((700, 1, 8, 8), 128, dtype=torch.uint8), torch.zeros(700))
    accuracy, ratio = measured(Paper(), grey, stream(0, "bits"))
    assert accuracy == pytest.approx(0.75, abs=0.03)  # the first bit always, the second by chance
    expected = -10 * math.log10(0.5 * (63 / 255) ** 2 + 0.5 * (64 / 255) ** 2)
    assert ratio == pytest.approx(expected, abs=0.1)


def test_bits_can_be_read_after_a_short_training():
    train, told = images(400, side=8), []
    plan = Plan(bits=2, updates=100, secret_updates=60)

    def listener(what, done, total, figures):
        assert (what, total) == ("encoder", 100)
        told.append(figures.get("bit_accuracy"))

    with listening(listener):
        pair = fitted(train, plan, stream(0, "fit"))
    accuracy, ratio = pair.figures.tolist()
    assert accuracy > 0.95
    assert ratio > 8
    rounds = [figure for figure in told if figure is not None]
    assert len(rounds) == 50
    assert rounds[0] < 0.8 < rounds[-1]
    # what is read is the image at 8 bits
    fresh = images(100, side=8).x
    secret = torch.randint(2, (100, 2), generator=stream(1, "secret")).float()
    with torch.no_grad():
        stored = poisoning.stamp(fresh, lambda x: pair(x, secret), batch=100)
        read = pair.decoder(stored / 255) > 0
    assert (read == secret.bool()).float().mean() > 0.9


def test_the_first_phase_knows_only_the_secret():
    train = images(40, side=8)

    def weights(secret_updates, **losses):
        plan = Plan(bits=2, updates=4, secret_updates=secret_updates, **losses)
        return fitted(train, plan, stream(0, "fit")).encoder.state_dict()

    plain = weights(4)
    assert same(plain, weights(4, l2_weight=9.0, perceptual_weight=9.0))
    assert not same(plain, weights(0))
    assert not same(weights(0), weights(0, l2_weight=9.0))
    assert not same(weights(0), weights(0, perceptual_weight=9.0))
    assert not same(weights(0), weights(0, secret_weight=9.0))


class Stopping:
    """A checkpoint that stops the training after some saves."""

    def __init__(self, after):
        self.after, self.state = after, None

    def load(self):
        return copy.deepcopy(self.state)

    def save(self, state):
        self.state = copy.deepcopy(state)
        self.after -= 1
        if self.after == 0:
            raise InterruptedError


def test_a_stopped_training_goes_on_to_the_same_weights():
    train, plan = images(40, side=8), Plan(bits=3, updates=7, secret_updates=2)
    whole = fitted(train, plan, stream(0, "fit")).state_dict()
    checkpoint = Stopping(2)
    with pytest.raises(InterruptedError):
        fitted(train, plan, stream(0, "fit"), checkpoint)
    assert checkpoint.state["updates"] == 4
    assert not same(whole, checkpoint.state["pair"])
    assert same(whole, fitted(train, plan, stream(0, "fit"), checkpoint).state_dict())
    assert checkpoint.state["updates"] == 7
    assert not same(whole, fitted(train, plan, stream(1, "fit")).state_dict())


def test_a_training_that_diverges_says_so(monkeypatch):
    monkeypatch.setattr(steganography, "LR", math.inf)
    with pytest.raises(FloatingPointError, match="loss became nan"):
        fitted(images(40, side=8), Plan(bits=3, updates=4, secret_updates=4), stream(0, "fit"))


# ------------------------------------------------------------------------------- the encoder form


def prepared(attack, train, seed=0):
    return attack.prepare(train, stream(seed, "trigger"))


def test_two_seeds_share_an_encoder_but_not_the_secret():
    train, shelf, told = images(), Shelf(), []
    attack = Invisible(bits=12, updates=4, secret_updates=2)

    def listener(what, done, total, figures):
        if "psnr" in figures:
            told.append((what, figures))

    with parts.kept(shelf), listening(listener):
        one, two, other = (prepared(attack, train, seed) for seed in (0, 0, 1))
        assert len(shelf.kept) == 1
        prepared(dataclasses.replace(attack, perceptual_weight=1.0), train)
        assert len(shelf.kept) == 2, "another setting, the same encoder"
    assert shelf.labels[0]["name"] == "encoder"
    assert shelf.saves == 4, "the checkpoint does not reach the training"
    assert told[0] == told[1] == told[2]
    assert told[0][0] == "encoder"
    assert 0 <= told[0][1]["bit_accuracy"] <= 1
    x = train.x[:8] / 255
    assert torch.equal(one.stamp(x), two.stamp(x))
    assert not torch.equal(one.stamp.secret, other.stamp.secret)
    assert set(one.stamp.secret.tolist()) == {0, 1}
    assert not torch.equal(one.stamp(x), other.stamp(x)), "the secret does not matter"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_stamp_is_a_pure_map_of_single_images(channels):
    train = images(channels=channels)
    trigger = prepared(Invisible(**QUICK), train)
    x = train.x[:6].float() / 255
    before = x.clone()
    out = trigger.stamp(x)
    assert torch.equal(x, before)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert 0 <= out.min() <= out.max() <= 1
    assert torch.equal(out, trigger.stamp(x))
    alone = torch.cat([trigger.stamp(image[None]) for image in x])
    assert (alone - out).abs().max() < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(out, trigger.stamp(x)), "the caller's precision changes the trigger"
    residual = out - x
    assert (residual[0] - residual[1]).abs().max() > 1e-4, "the same for all images"
    assert torch.equal(pickle.loads(pickle.dumps(trigger)).stamp(x), out)
    assert not trigger.stamp.encoder.training
    assert not any(weight.requires_grad for weight in trigger.stamp.encoder.parameters())


@pytest.mark.parametrize("extra", [QUICK, UNIVERSAL])
def test_a_tenth_of_the_set_is_stamped_and_relabelled(extra):
    train, attack = images(), Invisible(**extra)
    before = train.x.clone()
    trigger = prepared(attack, train)
    data, rows = attack.poison(train, trigger, stream(0, "poison"))
    assert torch.equal(train.x, before)
    assert len(rows) == 6
    assert (train.y[rows] != 0).all()
    assert (data.y[rows] == 0).all()
    assert torch.equal(data.x[rows], poisoning.stamp(train.x[rows], trigger.stamp))
    rest = torch.ones(60, dtype=torch.bool)
    rest[rows] = False
    assert torch.equal(data.x[rest], train.x[rest])
    assert torch.equal(data.y[rest], train.y[rest])
    again = attack.poison(train, prepared(attack, train), stream(0, "poison"))
    assert torch.equal(again.data.x, data.x)
    assert torch.equal(again.rows, rows)


def test_one_victim_class_and_copies():
    train = images()
    attack = Invisible(**QUICK, victim=2, rate=0.4, extend=True)
    assert attack.scope == "label-specific"
    data, rows = attack.poison(train, prepared(attack, train), stream(0, "poison"))
    assert len(data) == 66
    assert rows.tolist() == list(range(60, 66))
    assert torch.equal(data.x[:60], train.x)
    assert (data.y[60:] == 0).all()


# ---------------------------------------------------------------------- the universal perturbation


class Ears(nn.Module):
    """Each deep channel hears one direction: relu(<w_k, x> + 20)."""

    def __init__(self, w):
        super().__init__()
        self.one = self.two = nn.Identity()
        self.ears = nn.Sequential(nn.Conv2d(w.shape[1], len(w), w.shape[2:]), nn.ReLU())
        self.ears[0].weight.data.copy_(w)
        self.ears[0].bias.data.fill_(20.0)
        self.head = nn.Linear(len(w), 2)

    def forward(self, x):
        return self.head(self.ears(x).flatten(1))


def ears(channels=3, side=6):
    w = torch.randn(4, channels, side, side, generator=stream(0, "ears"))
    network = Network(
        build=lambda classes, shape: Ears(w),
        levels=("one", "two", "ears"),
        head="head",
        summary="ears",
        source="this file",
    )
    model = Classifier(ModelSpec("ears", 2, (channels, side, side)), network).eval()
    model.normalize.mean.zero_()
    model.normalize.std.fill_(1.0)
    grey = torch.randint(90, 160, (50, channels, side, side), generator=stream(0, "grey"))
    return model, w, Images(grey.to(torch.uint8), torch.arange(50) % 2)


def sought(model, train, neuron, norm, bound, steps=60, seed=0):
    return perturbation.smallest_universal(
        model, train, neuron, norm=norm, bound=bound, steps=steps, rng=stream(seed, "noise")
    )


@pytest.mark.parametrize("neuron", [0, 3])
@pytest.mark.parametrize("bound", [4.0, 2.5])
def test_the_best_change_of_linf_has_the_signs_of_the_weights(neuron, bound):
    model, w, train = ears()
    change = sought(model, train, neuron, "linf", bound) * 255
    clear = w[neuron].abs() > 0.1  # smaller ones are within bf16's reach of no sign
    assert torch.allclose(change[clear], int(bound) * w[neuron].sign()[clear], atol=1e-3)
    assert change.abs().max() <= bound + 1e-3


@pytest.mark.parametrize("channels", [1, 3])
def test_the_best_change_of_l2_lies_along_the_weights(channels):
    model, w, train = ears(channels)
    bound = 20.0 * w[1].numel() ** 0.5
    change = sought(model, train, 1, "l2", bound) * 255
    assert change.norm() <= bound
    assert change.norm() > 0.9 * bound
    assert torch.cosine_similarity(change.flatten(), w[1].flatten(), 0) > 0.98
    assert torch.allclose(change, change.round(), atol=1e-3), "not at 8 bits"


def test_the_best_change_of_l0_takes_the_pixels_that_are_heard_most():
    model, w, train = ears()
    change = sought(model, train, 2, "l0", 5.0, steps=100)
    touched = (change != 0).any(0)
    assert int(touched.sum()) == 5
    loudness = w[2].abs().sum(0)
    assert loudness[touched].sum() > 0.8 * loudness.flatten().topk(5).values.sum()
    assert loudness[touched].mean() > 1.3 * loudness.mean()
    heard = (change * w[2]).sum(0)[touched]
    assert (heard > 0).all()


def test_the_search_leaves_the_model_alone_and_follows_its_generator():
    model, _, train = ears()
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    told = []
    with listening(lambda what, done, total, figures: told.append((done, total, figures))):
        one = sought(model, train, 0, "l2", 60.0, steps=5)
    assert same(model.state_dict(), state)
    assert model.training
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert [done for done, _, _ in told] == [1, 2, 3, 4, 5, 5]
    assert told[-1][2]["after"] > told[-1][2]["before"] + 1
    assert torch.equal(one, sought(model, train, 0, "l2", 60.0, steps=5))
    assert not torch.equal(one, sought(model, train, 0, "l2", 60.0, steps=5, seed=1))
    with pytest.raises(ValueError, match="4 channels, there is no neuron 4"):
        sought(model, train, 4, "l2", 60.0)


def test_the_neuron_is_the_one_that_speaks_for_the_target():
    model, _, _ = ears()
    model.body.head.weight.data = torch.tensor([[0.1, 0.9, -2.0, 0.3], [0.2, -0.4, 0.1, 0.15]])
    assert perturbation.excitable_neuron(model, 0) == 1
    assert perturbation.excitable_neuron(model, 1) == 0


def test_default_bounds():
    assert perturbation.default_bound("linf", (3, 32, 32)) == 4
    assert perturbation.default_bound("l2", (3, 32, 32)) == pytest.approx(4 * 3072**0.5)
    assert perturbation.default_bound("l0", (3, 32, 32)) == 20
    assert perturbation.default_bound("l0", (1, 5, 5)) == 1


def test_balls_by_hand():
    delta = torch.tensor([[[3.0, -4.0], [0.0, 0.0]]])
    assert torch.allclose(
        perturbation.into_ball(delta, "l2", 2.5), torch.tensor([[[1.5, -2.0], [0.0, 0.0]]])
    )
    assert perturbation.into_ball(delta, "linf", 3.5)[0, 0].tolist() == [3.0, -3.5]
    pixels = torch.tensor([[[0.3, -0.4], [0.0, 0.1]], [[0.3, 0.1], [0.0, -2.0]]])
    kept = perturbation.into_ball(pixels, "l0", 2.0)
    assert torch.allclose(kept, torch.tensor([[[0.3, 0], [0, 0.1]], [[0.3, 0], [0, -1.0]]]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("norm", "bound"), [("linf", 3.0), ("l2", 40.0), ("l0", 4.0)])
def test_the_universal_form_adds_one_change_within_its_bound(channels, norm, bound):
    train = images(channels=channels)
    trigger = prepared(Invisible(**UNIVERSAL, norm=norm, bound=bound), train)
    grey = torch.full((1, channels, 12, 12), 128, dtype=torch.uint8)
    for x in (grey, train.x[:9]):
        stored = poisoning.stamp(x, trigger.stamp).int() - x.int()
        length = {
            "linf": stored.abs().amax(),
            "l2": stored.double().flatten(1).norm(dim=1).amax(),
            "l0": (stored != 0).any(1).flatten(1).sum(1).amax(),
        }[norm]
        assert 0 < length <= bound
    free = (train.x > 40) & (train.x < 215)  # elsewhere the range of pixels may cut it
    if norm != "l0":
        stored = poisoning.stamp(train.x, trigger.stamp).int() - train.x.int()
        change = (trigger.stamp.change * 255).round().int().expand_as(stored)
        assert torch.equal(stored[free], change[free])


def test_the_universal_form_uses_its_fields(monkeypatch):
    calls = []
    found = perturbation.smallest_universal

    def spy(model, train, neuron, **settings):
        calls.append((neuron, settings["norm"], settings["bound"], settings["steps"]))
        return found(model, train, neuron, **settings)

    monkeypatch.setattr(perturbation, "smallest_universal", spy)
    monkeypatch.setattr(perturbation, "excitable_neuron", lambda model, target: target)
    train, shelf = images(), Shelf()
    with parts.kept(shelf):
        prepared(Invisible(**UNIVERSAL, target=2), train)
        prepared(Invisible(**UNIVERSAL, neuron=5, norm="linf", bound=9.0), train, 1)
    assert calls == [(2, "l2", pytest.approx(4 * 432**0.5), 6), (5, "linf", 9.0, 6)]
    assert len(shelf.kept) == 1, "the surrogate is trained once"
    assert shelf.labels[0]["settings"]["steps"] == 0, "the surrogate is trained on plain images"


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("invisible:norm=linf", "norm is only for form=universal, not form=encoder"),
        ("invisible:steps=3", "steps is only for form=universal"),
        ("invisible:form=universal,bits=8", "bits is only for form=encoder, not form=universal"),
        ("invisible:updates=10", "secret_updates must be at most updates, got 200 of 10"),
        ("invisible:form=other", "form cannot be 'other'"),
        ("invisible:form=universal,norm=l1", "norm cannot be 'l1'"),
        ("invisible:form=universal,bound=0", "bound must be above 0"),
        ("invisible:bits=0", "bits must be at least 1"),
    ],
)
def test_fields_that_do_not_fit_are_refused(spec, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec)


@pytest.mark.parametrize(
    ("fields", "shape", "counts", "message"),
    [
        ({"target": 4}, (3, 32, 32), [9] * 4, "target 4 is not a class"),
        ({"victim": 0}, (3, 32, 32), [9] * 4, "victim class and the target class are both 0"),
        ({"rate": 0.9}, (3, 32, 32), [9] * 4, "only 27 may be poisoned"),
        ({"rate": 0.01}, (3, 32, 32), [9] * 4, "less than one image"),
        ({"form": "universal", "surrogate": "smal"}, (3, 32, 32), [9] * 4, "no network 'smal'"),
        ({"form": "universal"}, (3, 12, 12), [9] * 4, "fastnet takes images of 16 px"),
    ],
)
def test_what_cannot_work_is_refused(fields, shape, counts, message):
    with pytest.raises(BadInput, match=message):
        Invisible(**fields).check(shape, counts)


def test_what_can_work_is_not_refused():
    Invisible().check((3, 32, 32), [100] * 10)
    Invisible().check((1, 8, 8), [100] * 10)
    Invisible(form="universal", victim=1).check((1, 28, 28), [100] * 10)


def test_every_field_of_one_form_is_guarded():
    from arena.attacks.invisible import _ONLY_FOR

    both = {"target", "rate", "form", "victim", "extend"}
    assert {field.name for field in dataclasses.fields(Invisible)} == both | set(_ONLY_FOR)
    assert adversarial.HELD == 1000
