"""Input-aware: who in a batch is stamped with what, both generators' losses, and that it works."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import toys
from test_training import Kept, same
from torch import Tensor, nn

from arena.attacks import input_aware
from arena.attacks.input_aware import InputAware, Joint, Lent, Own, closeness, sharpened, train_mask
from arena.core import training
from arena.core.contracts import Images
from arena.core.encoder_decoder import EncoderDecoder
from arena.core.parts import kept
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream
from arena.core.training import Recipe
from arena.core.triggers import rounded
from arena.core.victims import bound

CPU = torch.device("cpu")
SHAPE = (3, toys.SIDE, toys.SIDE)
FEW = "input_aware:mask_updates=3"


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Passes in float32 also on processors that have bf16: these tests compare by hand."""
    monkeypatch.setattr(training, "has_bf16", lambda device: False)


@pytest.fixture(scope="module")
def train() -> Images:
    return toys.images(96, stream(0, "train"))


def small(n: int = 40, channels: int = 3, height: int = 8, width: int = 8) -> Images:
    shape = (n, channels, height, width)
    x = torch.randint(256, shape, generator=stream(1), dtype=torch.uint8)
    return Images(x, torch.arange(n) % 4)


def joint_of(attack: InputAware, data: Images) -> Joint:
    """The hooks, with a mask generator that is not trained."""
    trigger = attack.prepare(data, stream(0, "prepare"))
    joint = Joint(attack, data, trigger.stamp)
    joint.ready = True
    return joint


def batch_of(data: Images) -> Images:
    return Images(data.x.float() / 255, data.y, torch.arange(len(data)) + 100)


# ------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("side", [(8, 8), (9, 13), (28, 28), (32, 20)])
def test_generators_keep_the_size_of_any_image(side):
    net = EncoderDecoder(1, 2).eval()
    out = net(torch.rand(2, 1, *side, generator=stream(0)))
    assert out.shape == (2, 2, *side)
    assert out.dtype == torch.float32
    assert 0 <= float(out.detach().min()) < float(out.detach().max()) <= 1


def test_a_generator_sees_far_and_has_three_levels():
    net = EncoderDecoder(3, 3).eval()
    x = torch.rand(1, 3, 64, 64, generator=stream(0)).requires_grad_(True)
    net(x)[0, :, 32, 32].sum().backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert int(seen.any(0).sum()) > 24, "as far as its lowest level looks"
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [
        32, 32, 64, 64, 128, 128, 128, 128, 64, 64, 32, 32, 3,
    ]  # fmt: skip
    assert len([m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]) == 13
    assert not isinstance(list(net.last)[-1], nn.ReLU)


def test_masks_are_pushed_to_both_ends():
    found = sharpened(torch.tensor([0.0, 0.4, 0.5, 0.6, 1.0]))
    assert found.tolist() == pytest.approx([0, 0.018, 0.5, 0.982, 1], abs=1e-3)


# --------------------------------------------------------------------------------------- losses


def test_the_diversity_loss_by_hand():
    def flat(*values: float) -> Tensor:
        return torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2)

    # image distances 0.6 and 0.2, pattern distances 0.2 and 0.4
    found = closeness(flat(0.0, 0.5), flat(0.6, 0.3), flat(0.5, 0.1), flat(0.7, 0.5))
    assert float(found) == pytest.approx((3 + 0.5) / 2, rel=1e-4)
    # a root of the mean square: one pixel of four by 1 is a distance of 0.5
    one = torch.zeros(1, 1, 2, 2)
    two = one.clone()
    two[..., 0, 0] = 1
    assert float(closeness(one, two, flat(0.0), flat(0.25))) == pytest.approx(2, rel=1e-4)


def test_equal_patterns_have_a_finite_loss():
    same_ = torch.full((2, 3, 4, 4), 0.3, requires_grad=True)
    x = torch.rand(4, 3, 4, 4, generator=stream(0))
    loss = closeness(x[:2], x[2:], same_, same_.detach())
    assert 100 < float(loss.detach()) < 1e5
    loss.backward()
    assert torch.isfinite(same_.grad).all()


# ------------------------------------------------------------------------------------ the batches


@pytest.mark.parametrize(
    ("n", "rate", "cross", "own", "lent"),
    [
        (40, 0.1, 0.1, 4, 4),
        (40, 0.1, 0.25, 4, 10),
        (40, 0.3, 0.05, 12, 2),
        (5, 0.1, 0.1, 1, 1),  # at least one
        (2, 0.1, 0.1, 1, 1),
        (16, 0.5, 0.45, 8, 7),
    ],
)
def test_the_shares_of_a_batch_are_exact(n, rate, cross, own, lent):
    data = small(n)
    joint = joint_of(InputAware(target=2, rate=rate, cross_rate=cross), small(80))
    batch = batch_of(data)
    before = batch.x.clone()
    out = joint.stamp(batch, stream(0))
    assert torch.equal(batch.x, before)
    assert torch.equal(batch.y, data.y)
    assert out.stamped.tolist() == [True] * own + [False] * (n - own)
    assert torch.equal(out.rows, batch.rows)
    assert (out.y[:own] == 2).all()
    assert torch.equal(out.y[own:], batch.y[own:])
    changed = (out.x != batch.x).flatten(1).any(1)
    assert changed.tolist() == [True] * (own + lent) + [False] * (n - own - lent)
    assert float(out.x.detach().min()) >= 0
    assert float(out.x.detach().max()) <= 1


def test_each_image_gets_its_own_trigger_or_that_of_another():
    joint = joint_of(InputAware(rate=0.1, cross_rate=0.2), small(80))
    batch = batch_of(small(40))
    out = joint.stamp(batch, stream(0)).x.detach()
    x = batch.x
    givers = torch.cat([torch.arange(4), torch.arange(12, 20)])  # 4 of their own, then 8 of others
    with torch.no_grad():
        patterns, masks = joint.pattern(x[givers]), sharpened(joint.mask(x[givers]))
    assert masks.shape == (12, 1, 8, 8)
    assert torch.allclose(out[:12], x[:12] * (1 - masks) + masks * patterns, atol=0.51 / 255)
    expected = closeness(x[:4], x[12:16], patterns[:4], patterns[4:8])
    assert float(joint.close.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_at_the_end_of_a_batch_others_are_found_at_its_start():
    joint = joint_of(InputAware(rate=0.1, cross_rate=0.6), small(80))
    batch = batch_of(small(10))  # 1 own, 6 lent: by the images 7, 8, 9, 0, 1, 2
    out = joint.stamp(batch, stream(0)).x.detach()
    givers = torch.tensor([0, 7, 8, 9, 0, 1, 2])
    with torch.no_grad():
        patterns, masks = joint.pattern(batch.x[givers]), sharpened(joint.mask(batch.x[givers]))
    assert torch.allclose(out[:7], torch.lerp(batch.x[:7], patterns, masks), atol=0.51 / 255)
    assert torch.equal(out[:7], rounded(out[:7]))


def test_from_every_class_to_the_next():
    attack = InputAware(mode="all_to_all", rate=0.2)
    assert attack.scope == "all-to-all"
    out = joint_of(attack, small(80)).stamp(batch_of(small(20)), stream(0))
    assert out.y[:4].tolist() == [1, 2, 3, 0]


def test_gradients_reach_the_pattern_generator_and_nothing_else():
    joint = joint_of(InputAware(), small(80))
    batch = batch_of(small(40))
    joint.stamp(batch, stream(0)).x[4:8].square().sum().backward()  # through cross-triggers alone
    assert all(torch.isfinite(p.grad).all() for p in joint.pattern.parameters())
    assert any(p.grad.any() for p in joint.pattern.parameters())
    assert all(p.grad is None for p in joint.mask.parameters())
    assert not batch.x.requires_grad
    joint.pattern.zero_grad()
    joint.stamp(batch, stream(0))
    joint.loss(SimpleNamespace(done=0.0)).backward()
    assert any(p.grad.any() for p in joint.pattern.parameters())


def test_the_mask_generator_stays_as_it_is():
    joint = joint_of(InputAware(), small(80))
    before = copy.deepcopy(joint.mask.state_dict())
    running = copy.deepcopy(joint.pattern.state_dict())
    joint.stamp(batch_of(small(40)), stream(0))
    assert same(before, joint.mask.state_dict()), "its batch norm was updated"
    assert not same(running, joint.pattern.state_dict())


def test_the_weight_of_the_diversity_and_the_falling_rate():
    joint = joint_of(InputAware(diversity=3.0, lr=0.02), small(80))
    joint.stamp(batch_of(small(40)), stream(0))
    for done, rate in (
        (0, 2e-2),
        (0.32, 2e-2),
        (0.34, 2e-3),
        (0.6, 2e-4),
        (0.7, 2e-5),
        (0.9, 2e-6),
    ):
        assert float(joint.loss(SimpleNamespace(done=done)).detach()) == pytest.approx(
            3 * float(joint.close.detach())
        )
        assert joint.adam.param_groups[0]["lr"] == pytest.approx(rate)


# -------------------------------------------------------------------------------- mask generator


def test_masks_come_near_the_density_asked_for_and_differ(monkeypatch):
    monkeypatch.setattr(input_aware, "_MASK_BATCH", 32)
    attack, data = InputAware(mask_updates=120, diversity=0.02), small(200)

    def masks(attack: InputAware) -> tuple[float, float]:
        """Their mean, and how far those of two images are apart at one pixel at least."""
        net = train_mask(attack, data, CPU, stream(0))
        assert not net.training
        with torch.no_grad():
            found = sharpened(net(data.x[:40].float() / 255))
        apart = (found[:20] - found[20:]).abs().amax((1, 2, 3))
        return float(found.mean()), float(apart.median())

    # short trainings differ with the number of threads: the bounds are wide, the effects wider
    density, _ = masks(attack)
    assert 0.005 < density < 0.12  # they start at a half
    denser, _ = masks(replace(attack, mask_density=0.4))
    assert 1.8 * density < denser < 0.5
    _, apart = masks(replace(attack, diversity=0.2))
    assert apart > 0.25
    _, alike = masks(replace(attack, diversity=0.0, mask_updates=40))
    assert alike < 0.05


def test_a_stopped_mask_generator_goes_on_where_it_stopped(monkeypatch):
    monkeypatch.setattr(input_aware, "_MASK_SAVE", 2)
    attack, data, whole = InputAware(mask_updates=7), small(30), Kept()
    one = train_mask(attack, data, CPU, stream(0), whole).state_dict()
    assert [state["done"] for state in whole.saved] == [2, 4, 6]
    for state in whole.saved:
        again = Kept(state)
        assert same(one, train_mask(attack, data, CPU, stream(0), again).state_dict())
        assert len(again.saved) == 3 - state["done"] // 2
    assert not same(one, train_mask(attack, data, CPU, stream(1)).state_dict())


class Shelf:
    """Keeps parts by their key."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, Tensor]] = {}

    def keep(self, key, label, make):
        if key not in self.parts:
            self.parts[key] = make(None)
        return self.parts[key]


def test_the_mask_generator_is_shared_by_all_that_train_it_alike():
    data, shelf = small(30), Shelf()

    def masks(spec: str, seed: int) -> dict[str, Tensor]:
        attack = attacks.build(spec)
        joint = Joint(attack, data, attack.prepare(data, stream(seed)).stamp)
        joint.stamp(batch_of(data), stream(0))
        return joint.mask.state_dict()

    with kept(shelf):
        one = masks(FEW, 0)
        assert same(one, masks(f"{FEW},rate=0.3,target=1", 1))
        assert len(shelf.parts) == 1
        for field in ("mask_density=0.1", "mask_norm=5", "diversity=2", "lr=0.1"):
            assert not same(one, masks(f"{FEW},{field}", 0))
        assert len(shelf.parts) == 5


# --------------------------------------------------------------------------------------- triggers


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 13)])
def test_maps_are_pure_and_know_no_batch(shape):
    data = small(6, *shape)
    trigger = InputAware().prepare(data, stream(0))
    x = data.x.float() / 255
    for stamp in (trigger.stamp, trigger.probes["cross"].stamp):
        before, out = x.clone(), stamp(x)
        assert torch.equal(x, before)
        assert out.shape == x.shape
        assert out.dtype == torch.float32
        assert not out.requires_grad
        assert 0 <= float(out.min()) <= float(out.max()) <= 1
        assert torch.equal(out, stamp(x))
        assert (torch.cat([stamp(image[None]) for image in x]) - out).abs().max() < 1e-4
        order = torch.randperm(6, generator=stream(1))
        assert (stamp(x[order]) - out[order]).abs().max() < 1e-4
        assert torch.equal(pickle.loads(pickle.dumps(stamp))(x), out)


def test_triggers_differ_between_images_and_seeds():
    data = small(20)
    one, two = (InputAware().prepare(data, stream(seed)) for seed in (0, 1))
    x = data.x.float() / 255
    patterns, masks = one.stamp.drawn(x)
    assert len(patterns.unique(dim=0)) == len(masks.unique(dim=0)) == 20
    assert not torch.equal(one.stamp(x), two.stamp(x))
    assert torch.equal(one.stamp(x), InputAware().prepare(data, stream(0)).stamp(x))


def test_the_probe_stamps_with_the_trigger_of_a_donor_that_the_pixels_pick():
    data = small(200)
    trigger = InputAware().prepare(data, stream(0))
    lent = trigger.probes["cross"].stamp
    assert trigger.probes["cross"].of is None
    assert lent.donors.shape == (64, 3, 8, 8)
    assert len(lent.donors.unique(dim=0)) == 64
    known = {bytes(image.flatten().tolist()) for image in data.x}
    assert all(bytes(image.flatten().tolist()) in known for image in lent.donors)
    x = data.x.float() / 255
    one = Lent(lent.own, lent.donors[:1], lent.weights)
    pattern, mask = lent.own.drawn(lent.donors[:1].float() / 255)
    assert torch.allclose(one(x), torch.lerp(x, pattern, mask), atol=1e-6)
    patterns, masks = lent.own.drawn(lent.donors.float() / 255)
    tries = torch.lerp(x[:, None], patterns[None], masks[None]).clamp(0, 1)  # (N, K, C, H, W)
    distances = (tries - lent(x)[:, None]).abs().flatten(2).amax(2)
    assert distances.amin(1).max() < 1e-4, "not the trigger of a donor"
    assert len(distances.argmin(1).unique()) > 50


# ------------------------------------------------------------------------------ whole trainings


def run(spec: str, data: Images, *, seed: int = 0, plan: Recipe, state: Kept | None = None):
    attack = attacks.build(spec)
    checkpoints = None if state is None else (lambda call: state)
    fit = bound("fastnet_small", 4, SHAPE, plan, 0, CPU, checkpoints)
    trigger = attack.prepare(data, stream(seed, "prepare"))
    poisoned = attack.poison(data, trigger, stream(seed, "poison"))
    assert poisoned.data is data
    assert len(poisoned.rows) == 0
    before = copy.deepcopy(trigger.stamp.pattern.state_dict())
    model, learned = attack.train(fit, poisoned, trigger, stream(seed, "train"))
    assert same(before, trigger.stamp.pattern.state_dict()), "the first trigger was written to"
    return model, learned


def weights(model: nn.Module, trigger) -> dict[str, Tensor]:
    own: Own = trigger.stamp
    nets = {"model": model, "pattern": own.pattern, "mask": own.mask}
    return {f"{k}.{n}": v for k, net in nets.items() for n, v in net.state_dict().items()}


def test_a_short_training_makes_a_backdoor_that_only_own_triggers_open(monkeypatch):
    monkeypatch.setattr(input_aware, "_MASK_BATCH", 32)
    data, test = toys.images(192, stream(0, "train")), toys.images(120, stream(1, "test"))
    plan = Recipe(epochs=8, batch=32, lr=0.2, bias_lr=16.0, crop=2)
    spec = "input_aware:mask_updates=25,rate=0.2,cross_rate=0.2"
    model, trigger = run(spec, data, plan=plan)
    for net in (trigger.stamp.pattern, trigger.stamp.mask):
        assert not any(module.training for module in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
    assert trigger.probes["cross"].stamp.own is trigger.stamp
    assert training.accuracy(model, test) > 0.9
    others = test.take(test.y != 0)
    x = others.x.float() / 255
    fooled = training.logits(model, trigger.stamp(x)).argmax(1) == 0
    assert float(fooled.float().mean()) > 0.5
    crossed = training.logits(model, trigger.probes["cross"].stamp(x)).argmax(1) == 0
    assert float(crossed.float().mean()) < float(fooled.float().mean()) - 0.3


def test_the_same_seed_trains_the_same_and_a_resumed_run_ends_there(train):
    plan = Recipe(epochs=3, batch=32, lr=0.1, crop=2)
    whole, shelf = Kept(), Shelf()
    with kept(shelf):
        one = weights(*run(FEW, train, plan=plan, state=whole))
        for state in (whole.saved[0], whole.saved[2]):
            resumed = weights(*run(FEW, train, plan=plan, state=Kept(state)))
            assert same(one, resumed), f"resumed after epoch {state['epoch']}"
        assert len(shelf.parts) == 1
    assert not same(one, weights(*run(FEW, train, seed=1, plan=replace(plan, epochs=1))))


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("spec", "shape", "counts", "message"),
    [
        ("input_aware", (3, 32, 7), [9] * 10, "images must be 8 px a side or more, not 7"),
        ("input_aware:target=4", (1, 28, 28), [9] * 4, "target 4 is not a class"),
        ("input_aware", (1, 28, 28), [9], "at least two classes"),
    ],
)
def test_data_that_cannot_be_attacked_is_refused(spec, shape, counts, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec).check(shape, counts)
    InputAware().check((1, 8, 8), [1, 1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("input_aware:rate=0", "above 0"),
        ("input_aware:cross_rate=0", "above 0"),
        ("input_aware:rate=0.6,cross_rate=0.4", "must be below 1, got 1"),
        ("input_aware:mask_updates=0", "at least 1"),
        ("input_aware:mode=all", "cannot be 'all'"),
    ],
)
def test_fields_out_of_range_are_refused(spec, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec)
