"""ANP: masks and noise act as the formulas say, the smallest masks go first, the backdoor goes."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import toys
from torch import Tensor, nn
from torch.nn import functional as F

from arena.core import models
from arena.core.contracts import Images
from arena.core.models import Classifier, ModelSpec
from arena.core.networks import Network
from arena.core.networks.fastnet import FastNet
from arena.core.registry import BadInput, defenses
from arena.core.seeding import seeded_globals, stream
from arena.core.training import Recipe, accuracy, fit
from arena.defenses import anp
from arena.defenses.anp import ANP, Masked, affordable, gained, silence, uphill

NETWORK = Network(
    build=lambda classes, shape: FastNet(classes, shape[0], (16, 32, 64)),
    levels=("group1", "group2", "group3"),
    head="head",
    summary="fastnet, narrower still",
    source="this file",
)


@pytest.fixture(scope="module")
def victim() -> Classifier:
    """A fastnet that learned the toy's backdoor from 40 stamped images of 400."""
    data = toys.images(400, stream(0, "train"))
    rows = torch.randperm(400, generator=stream(0, "rows"))[:40]
    data.x[rows] = (toys.stamp(data.x[rows] / 255) * 255).byte()
    data.y[rows] = toys.TARGET
    with seeded_globals(stream(0, "init")):
        model = Classifier(ModelSpec("narrow", toys.CLASSES, (3, toys.SIDE, toys.SIDE)), NETWORK)
    models.calibrate(model, data)
    plan = Recipe(epochs=8, batch=50, lr=0.1, crop=0, label_smoothing=0.0)
    return fit(model, data, plan, stream(0, "fit"))  # type: ignore[return-value]


@pytest.fixture
def exact(monkeypatch):
    """Forward passes of the method in float32."""
    monkeypatch.setattr("arena.core.training.has_bf16", lambda device: False)


def gains(model: nn.Module) -> Tensor:
    return torch.cat([norm.weight for norm in gained(model).values()]).detach()


def learned(monkeypatch: pytest.MonkeyPatch, mask: Tensor) -> None:
    """Pretend that `mask` was learned."""
    monkeypatch.setattr(ANP, "learn_masks", lambda *args: mask)


# -------------------------------------------------------------------------------- masks and noise


@pytest.mark.parametrize("noisy", [False, True], ids=["noise off", "noise on"])
def test_mask_and_noise_act_on_gain_and_bias(noisy, victim, clean, exact):
    """w (m + d) and b (1 + e) in training mode; without noise w m and b: no mask on the bias."""
    net = Masked(deepcopy(victim)).train()
    count = len(net.mask)
    mask, (d, e) = torch.rand(count), torch.rand(2, count) - 0.5
    by_hand, start = deepcopy(victim).train(), 0
    with torch.no_grad():
        for norm in gained(by_hand).values():
            part = slice(start, start := start + len(norm.weight))
            norm.weight.mul_(mask[part] + d[part] if noisy else mask[part])
            norm.bias.mul_(1 + e[part] if noisy else 1)
    x = clean.x[:50] / 255
    noise = torch.stack([d, e]) if noisy else None
    assert start == count == 16 * 2 + 32 * 2 + 64 * 2
    assert torch.allclose(net.disturbed(x, mask, noise), by_hand(x), atol=1e-5)
    assert torch.allclose(net(x), deepcopy(victim).train()(x), atol=1e-5), "all masks start at 1"


def test_only_the_mask_is_trained(victim):
    net = Masked(deepcopy(victim))
    assert [name for name, p in net.named_parameters() if p.requires_grad] == ["mask"]
    assert bool((net.mask == 1).all())


def test_noise_goes_uphill(victim, clean, exact):
    """A small step along the signs raises the cross-entropy as fast as its slope says."""
    net = Masked(deepcopy(victim)).train()
    batch = Images(clean.x[:100] / 255, clean.y[:100])
    noise = 0.3 * torch.randn(2, len(net.mask), generator=stream(0, "noise"))
    kept = noise.clone()

    def loss(noise: Tensor) -> Tensor:
        return F.cross_entropy(net.disturbed(batch.x, net.mask, noise), batch.y)

    signs = uphill(net, batch, noise)
    assert torch.equal(noise, kept)
    assert set(signs.unique().tolist()) <= {-1.0, 0.0, 1.0}
    noise.requires_grad_()
    (slope,) = torch.autograd.grad(loss(noise), noise)
    assert torch.equal(signs, slope.sign())
    step = 1e-4
    with torch.no_grad():
        rise = (loss(noise + step * signs) - loss(noise)) / step
    assert float(rise) == pytest.approx(float(slope.abs().sum()), rel=0.05)
    assert net.mask.grad is None


def test_noise_starts_within_eps_and_moves_by_eps(victim, clean, monkeypatch):
    """Each of `steps` steps is eps/steps long; the start is uniform in [-eps, eps]."""
    starts, steps = [], []
    real = anp.uphill

    def spy(net: Masked, batch: Images, noise: Tensor) -> Tensor:
        starts.append(noise.clone())
        steps.append(real(net, batch, noise))
        return steps[-1]

    monkeypatch.setattr(anp, "uphill", spy)
    ANP(eps=0.4, steps=2, iterations=2, batch=100).learn_masks(victim, clean, stream(0))
    first, second, later, _ = starts
    assert float(first.abs().max()) <= 0.4
    assert float(first.std()) == pytest.approx(0.4 / 3**0.5, rel=0.1)
    assert abs(float(first.mean())) < 0.05
    assert torch.allclose(second, first + 0.2 * steps[0])
    assert float(later.abs().max()) <= 0.4, "every batch starts anew"
    assert not torch.equal(later, first)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_the_first_update_of_the_masks(alpha, victim, clean, monkeypatch, exact):
    """1 - lr * gradient of alpha CE(clean) + (1 - alpha) CE(noisy), clamped to [0, 1]."""
    fixed = 0.3 * torch.sign(torch.randn(2, len(gains(victim)), generator=stream(0, "signs")))
    monkeypatch.setattr(anp, "uphill", lambda net, batch, noise: fixed - noise)  # eps/steps = 1
    defense = ANP(eps=1.0, alpha=alpha, iterations=1, batch=200, momentum=0.0, lr=2.0, crop=0)
    plain = Recipe(flip=False)
    monkeypatch.setattr(anp, "Recipe", lambda **more: Recipe(**{**vars(plain), **more}))
    found = defense.learn_masks(victim, clean, stream(0))

    net = Masked(deepcopy(victim)).train()
    x, mask = clean.x / 255, torch.ones_like(net.mask, requires_grad=True)
    quiet, loud = (F.cross_entropy(net.disturbed(x, mask, n), clean.y) for n in (None, fixed))
    (slope,) = torch.autograd.grad(alpha * quiet + (1 - alpha) * loud, mask)
    expected = (1 - 2.0 * slope).clamp(0, 1)
    assert torch.allclose(found, expected.detach(), atol=1e-4)
    assert 0.0 < float((expected < 0.999).float().mean()) < 1.0


def test_masks_follow_the_paper(victim, clean, monkeypatch):
    plans = []
    monkeypatch.setattr(anp, "fit", lambda net, data, plan, *args, **more: plans.append(plan))
    ANP().learn_masks(victim, clean, stream(0))
    (plan,) = plans
    assert (plan.min_steps, plan.batch, plan.lr, plan.momentum) == (2000, 128, 0.2, 0.9)
    assert (plan.schedule, plan.warmup, plan.weight_decay) == ("constant", 0, 0)
    assert (plan.crop, plan.flip, plan.border, plan.label_smoothing) == (4, True, "zero", 0)
    assert (ANP().eps, ANP().steps, ANP().alpha) == (0.4, 1, 0.2)


# ----------------------------------------------------------------------------------------- pruning


def test_pruning_sets_gains_to_zero_and_nothing_else(victim, clean, monkeypatch, rng):
    """Of all norms together those of the smallest masks; 0.2 itself goes, 0.21 stays."""
    before = {name: value.clone() for name, value in victim.state_dict().items()}
    mask = torch.ones(len(gains(victim)))
    mask[[3, 40, 200]] = torch.tensor([0.2, 0.0, 0.15])
    mask[41] = 0.21
    learned(monkeypatch, mask)
    repaired = ANP(held_out=0).repair(victim, clean, rng)
    expected = torch.ones_like(mask)
    expected[[3, 40, 200]] = 0  # fastnet's gains are all 1 and not trained
    assert torch.equal(gains(repaired), expected)
    rest = {n: v for n, v in repaired.state_dict().items() if f"{n}.".count("norm") == 0}
    assert all(torch.equal(value, before[name]) for name, value in rest.items())
    for name, norm in gained(repaired).items():
        for part in ("bias", "running_mean", "running_var"):
            assert torch.equal(getattr(norm, part), before[f"{name}.{part}"])
        assert not norm.weight.requires_grad
        assert norm.bias.requires_grad
    assert all(torch.equal(value, before[n]) for n, value in victim.state_dict().items())


def test_pruning_by_number(victim, clean, monkeypatch, rng):
    mask = torch.rand(len(gains(victim)), generator=stream(0, "mask"))
    learned(monkeypatch, mask)
    repaired = ANP(by="number", number=7, held_out=0).repair(victim, clean, rng)
    gone = (gains(repaired) == 0).nonzero().flatten()
    assert torch.equal(gone, mask.topk(7, largest=False).indices.sort().values)
    same = ANP(by="number", number=0).repair(victim, clean, rng)
    assert torch.equal(gains(same), gains(victim))


def test_pruning_goes_as_far_as_it_may_cost(victim, clean, monkeypatch):
    """The walk is by fiftieths of the order; what costs too much on the way ends nothing."""
    asked, shares = [], {0: 0.99, 10: 0.90, 42: 0.5, 44: 0.97}

    def measured(model: nn.Module, held: Images) -> float:
        asked.append(int((gains(model) == 0).sum()))
        return shares.get(asked[-1], 0.97 if asked[-1] < 40 else 0.5)

    monkeypatch.setattr(anp, "accuracy", measured)
    order = torch.arange(100)
    for max_drop, count in ((0.03, 44), (0.025, 44), (0.01, 0), (0.5, 100)):
        asked.clear()
        assert affordable(victim, order, clean, max_drop).tolist() == list(range(count))
        assert asked == list(range(0, 101, 2))
    asked.clear()
    assert len(affordable(victim, order[:3], clean, 1.0)) == 3
    assert asked == [0, 1, 2, 3]
    assert len(affordable(victim, order[:0], clean, 1.0)) == 0


def test_pruning_measures_the_pruned_model(victim, clean):
    """With the last norm in the order, accuracy breaks down, and pruning goes less far."""
    last = torch.arange(96, 224)
    half = affordable(victim, last, clean, 0.1)
    assert 0 < len(half) < len(last)
    for count, good in ((len(half), True), (len(last), False)):
        pruned = deepcopy(victim)
        silence(pruned, last[:count])
        assert (accuracy(pruned, clean) >= 0.9) == good


@pytest.mark.parametrize(
    ("settings", "largest"),
    [("", 0.95), ("held_out=0", 0.2), ("threshold=0.4", 0.4), ("threshold=0.4,held_out=0", 0.4)],
)
def test_the_threshold_is_wide_where_held_out_images_decide(settings, largest):
    mask = torch.tensor([0.95, 0.1, 0.96, 0.2, 0.4, 1.0])
    found = mask[defenses.build(f"anp:{settings}" if settings else "anp").candidates(mask)]
    assert found.tolist() == mask[mask <= largest].sort().values.tolist()


# ------------------------------------------------------------------------------------ as a defense


def test_anp_removes_a_learned_backdoor(victim, clean):
    """The channels of small masks carry it: as many of the largest masks do not."""
    test = toys.images(200, stream(0, "test"))
    assert accuracy(victim, test) > 0.98
    assert toys.success(victim, test) > 0.98
    defense = ANP(iterations=100, lr=1.0, batch=32, crop=0, threshold=0.7)
    mask = defense.learn_masks(victim, clean, stream(0))
    assert float(mask.min()) >= 0
    assert float(mask.max()) == 1
    repaired = defense.repair(victim, clean, stream(0))
    gone = int((gains(repaired) == 0).sum())
    assert 5 < gone < 60
    assert accuracy(repaired, test) > 0.95
    assert toys.success(repaired, test) < 0.1
    others = deepcopy(victim)
    silence(others, mask.argsort(descending=True)[: min(gone, 10)])
    assert toys.success(others, test) > 0.5


def test_images_are_held_out(victim, clean, monkeypatch, rng):
    seen: dict[str, Tensor] = {}

    def learn(self: ANP, model: Classifier, images: Images, rng: object, held: Images) -> Tensor:
        seen["learn"] = images.x
        return torch.ones(len(gains(victim)))

    def walk(model: Classifier, order: Tensor, held: Images, max_drop: float) -> Tensor:
        seen["held"] = held.x
        return order[:0]

    monkeypatch.setattr(ANP, "learn_masks", learn)
    monkeypatch.setattr(anp, "affordable", walk)
    defenses.build("anp:held_out=0.3").repair(victim, clean, rng)
    assert (len(seen["held"]), len(seen["learn"])) == (60, 140)
    both = torch.cat([seen["held"], seen["learn"]]).flatten(1)
    assert torch.equal(both.unique(dim=0), clean.x.flatten(1).unique(dim=0))


def test_what_it_cannot_use_is_named(planted, clean, rng, monkeypatch):
    with pytest.raises(BadInput, match="0 would be held out and 8 trained on; give more images"):
        defenses.build("anp:held_out=0.01").repair(planted, toys.images(8, rng), rng)
    with pytest.raises(BadInput, match=r"has none of class 2; give it at least one"):
        defenses.build("anp").repair(planted, clean.take(clean.y != 2), rng)
    for block in (planted.body.block1, planted.body.block2, planted.body.block3):
        block[1] = nn.BatchNorm2d(5, affine=False)
    monkeypatch.setattr(anp, "split", lambda *args: pytest.fail("it had already begun"))
    with pytest.raises(BadInput, match="of which planted has none; use a network that has some"):
        defenses.build("anp").repair(planted, clean, rng)
