"""Adaptive: the trigger is learned on the way, and so is what the network is hardened against."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import toys
from torch import Tensor, nn

from arena.attacks import adaptive
from arena.attacks.adaptive import Adaptive, Game, Patterns
from arena.core import metrics, poisoning, training
from arena.core.contracts import Images, Step, Trigger
from arena.core.registry import BadInput, attacks, spec_of
from arena.core.seeding import stream
from arena.core.training import Recipe, logits
from arena.core.triggers import rounded
from arena.core.victims import bound

SHAPE = (3, toys.SIDE, toys.SIDE)
GREY = 128 / 255
PLAN = Recipe(epochs=4, batch=64, lr=0.4, bias_lr=16.0, crop=2)


@pytest.fixture
def train() -> Images:
    return toys.images(320, stream(0, "train"))


def victim(
    attack: Adaptive, train: Images, plan: Recipe = PLAN, checkpoints: Any = None
) -> tuple[nn.Module, Trigger]:
    trigger = attack.prepare(train, stream(0, "prepare"))
    poisoned = attack.poison(train, trigger, stream(0, "poison"))
    shape = tuple(train.x.shape[1:])
    fit = bound("fastnet_small", 4, shape, plan, 0, torch.device("cpu"), checkpoints)
    return attack.train(fit, poisoned, trigger, stream(0, "fit"))


def game(n: int = 40, classes: int = 4, **fields: Any) -> tuple[Game, Images]:
    """The hooks, and a batch of grey images whose rows are not their places; 10 are poisoned."""
    attack = Adaptive(**fields)
    marks = torch.arange(n) < 10
    start = torch.randn(3, 4, 4, generator=stream(0, "start")) / 50
    patterns = Patterns(start, classes)
    with torch.no_grad():
        patterns.universal += torch.arange(1, classes + 1)[:, None, None, None] / 32
    rows = torch.randperm(n, generator=stream(0, "rows"))
    batch = Images(torch.full((n, 3, 4, 4), GREY), torch.arange(n) % classes, rows)
    optimizer = torch.optim.Adam(patterns.learned(attack), lr=attack.lr)
    return Game(attack, marks, patterns, optimizer), batch


# -------------------------------------------------------------------------------- the poisoned set


def test_a_spec_round_trip():
    attack = attacks.build("adaptive:rate=0.5,harden=none")
    assert attack == Adaptive(rate=0.5, harden="none")
    assert attacks.build(spec_of(attack)) == attack


@pytest.mark.parametrize("extend", [False, True])
def test_poisoned_images_wait_for_their_pattern_under_the_target_s_label(train, extend):
    attack = Adaptive(target=2, rate=0.25, extend=extend)
    trigger = attack.prepare(train, stream(0, "prepare"))
    data, rows = attack.poison(train, trigger, stream(0, "poison"))
    assert len(rows) == 80
    assert (data.y[rows] == 2).all()
    if extend:
        assert rows.tolist() == list(range(320, 400))
        assert torch.equal(data.x[:320], train.x)
        assert torch.equal(data.y[:320], train.y)
    else:
        assert torch.equal(data.x, train.x)
        assert not (train.y[rows] == 2).any()
        assert int((data.y != train.y).sum()) == 80


@pytest.mark.parametrize("channels", [1, 3])
def test_the_pattern_starts_as_faint_noise(channels):
    data = Images(torch.zeros(4, channels, 6, 5, dtype=torch.uint8), torch.arange(4))
    one, two, other = (Adaptive().prepare(data, stream(s)).stamp.change for s in (0, 0, 1))
    assert one.shape == (channels, 6, 5)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert 4 / 255 < one.abs().max() <= 8 / 255
    assert one.min() < 0 < one.max()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target": 4}, "adaptive: target 4 is not a class"),
        ({"rate": 0.8}, "only 300 may be poisoned"),
        ({"rate": 0.001}, "less than one image"),
    ],
)
def test_data_sets_that_cannot_be_attacked_are_refused(fields, says):
    with pytest.raises(BadInput, match=says):
        Adaptive(**fields).check(SHAPE, [100] * 4)
    Adaptive().check((1, 8, 9), [100] * 4)


# ------------------------------------------------------------------------------------- the hooks


def test_the_trigger_is_on_poisoned_rows_and_perturbations_on_others():
    hooks, batch = game(n=400, harden_share=0.5)
    out = hooks.perturb(batch, stream(0))
    trigger, universal = hooks.patterns.trigger, hooks.patterns.universal
    assert torch.equal(out.stamped, batch.rows < 10)
    assert torch.equal(out.y, batch.y)
    for at in range(400):
        if out.stamped[at]:
            added = trigger
            assert not hooks.hardened[at]
        elif hooks.hardened[at]:
            added = universal[hooks.aims[at]]
            assert hooks.aims[at] != batch.y[at], "a class is perturbed towards itself"
        else:
            added = torch.zeros(3, 4, 4)
        assert torch.equal(out.x[at], rounded(batch.x[at] + added))
    assert 140 < int(hooks.hardened.sum()) < 250
    seen = hooks.aims[hooks.hardened].bincount(minlength=4)
    assert int(seen.min()) > 25
    assert (batch.x == GREY).all()


def test_hooks_draw_from_their_generator_alone():
    (one, batch), (two, _), (other, _) = game(), game(), game()
    outs = [hooks.perturb(batch, stream(s)).x for hooks, s in ((one, 1), (two, 1), (other, 2))]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_without_hardening_only_the_trigger_is_added():
    hooks, batch = game(harden="none")
    out = hooks.perturb(batch, stream(0))
    assert torch.equal(out.x[~out.stamped], batch.x[~out.stamped])
    expected = rounded(GREY + hooks.patterns.trigger).expand(10, -1, -1, -1)
    assert torch.equal(out.x[out.stamped], expected)
    assert hooks.patterns.learned(hooks.attack) == [hooks.patterns.trigger]


def test_added_patterns_are_clipped():
    hooks, batch = game(harden="none")
    with torch.no_grad():
        hooks.patterns.trigger.fill_(0.75)
    out = hooks.perturb(batch, stream(0))
    assert (out.x[out.stamped] == 1).all()


class Linear(nn.Module):
    """Class k likes one pixel: 10 times its value is its logit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 48))
        with torch.no_grad():
            for k in range(4):
                self.weight[k, 12 * k] = 10.0

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


def advance(
    hooks: Game, batch: Images, done: float = 0.0, model: Linear | None = None
) -> tuple[Tensor, Linear]:
    """One update as the trainer makes it: (what the hook adds to the loss, the network)."""
    model = model or Linear()
    rng = stream(0)
    shown = hooks.perturb(batch, rng)
    out = model(shown.x)
    loss = nn.functional.cross_entropy(out, shown.y)
    added = hooks.improve(Step(model, shown, out, loss, {}, rng, done))
    (loss + added).backward()
    return added, model


def test_the_trigger_moves_towards_the_target_and_perturbations_towards_their_class():
    hooks, batch = game(n=400, target=1, weight=0.0, lr=0.01)
    before = copy.deepcopy(hooks.patterns)
    added, model = advance(hooks, batch)
    assert added.item() == 0
    assert model.weight.grad is not None, "the network's own step was lost"
    moved = (hooks.patterns.trigger - before.trigger).flatten()
    # Adam's first step is the rate itself, down the gradient: up at the target's pixel only
    assert moved[12].item() == pytest.approx(0.01, rel=1e-3)
    assert moved[[0, 24, 36]].tolist() == pytest.approx([-0.01] * 3, rel=1e-3)
    silent = torch.ones(48, dtype=torch.bool)
    silent[::12] = False
    assert (moved[silent] == 0).all()
    for k, shift in enumerate((hooks.patterns.universal - before.universal).flatten(1)):
        expected = [0.01 if pixel == k else -0.01 for pixel in range(4)]
        assert shift[::12].tolist() == pytest.approx(expected, rel=1e-3)


def test_the_weight_makes_the_pattern_small():
    hooks, batch = game(weight=1e6, harden="none")
    before = hooks.patterns.trigger.detach().clone()
    advance(hooks, batch)
    moved = hooks.patterns.trigger.detach() - before
    assert torch.equal(moved.sign(), -before.sign())
    size = adaptive._size(torch.tensor([[[[3.0, -3.0], [3.0, 3.0]]], [[[0.0, 0.0], [2.0, 0.0]]]]))
    assert size.item() == pytest.approx((3 + 1) / 2)


def test_a_perturbation_of_nothing_has_a_slope():
    patterns = torch.zeros(2, 1, 3, 3, requires_grad=True)
    adaptive._size(patterns).backward()
    assert torch.equal(patterns.grad, torch.zeros_like(patterns))


def test_steps_get_smaller_until_the_end():
    moved = []
    for done in (0.0, 0.5, 0.9):
        hooks, batch = game(harden="none", weight=0.0)
        before = hooks.patterns.trigger.detach().clone()
        advance(hooks, batch, done)
        moved.append(float((hooks.patterns.trigger - before).abs().max().detach()))
    assert moved == pytest.approx([0.01, 0.005, 0.001], rel=1e-3)


def test_gradients_of_the_network_s_loss_do_not_reach_the_patterns():
    ends = []
    for left in (0.0, 1e9):  # what the trainer's backward pass leaves behind must not count
        hooks, batch = game()
        advance(hooks, batch)
        assert hooks.patterns.trigger.grad is not None
        hooks.patterns.trigger.grad.fill_(left)
        advance(hooks, batch)
        ends.append(hooks.patterns.trigger.detach())
    assert torch.equal(*ends)


# -------------------------------------------------------------------------------- a whole training


def test_a_small_trigger_is_learned_that_fools_and_keeps_the_accuracy(train):
    test = toys.images(400, stream(1, "test"))
    attack = Adaptive(target=3, lr=0.02)
    model, trigger = victim(attack, train, replace(PLAN, epochs=16))
    stamped = poisoning.stamp(test.x, trigger.stamp)
    counted = poisoning.applies(attack, test.y, 4)
    wanted = poisoning.wanted(attack, test.y, 4)
    answers = logits(model, stamped).argmax(1)
    assert metrics.asr(answers, wanted, counted) > 0.9
    assert training.accuracy(model, test) > 0.9
    start = attack.prepare(train, stream(0, "prepare")).stamp
    assert not torch.equal(trigger.stamp.change, start.change)
    assert trigger.stamp.change.square().mean().sqrt() < 0.12
    assert not trigger.stamp.change.requires_grad
    faint = logits(model, poisoning.stamp(test.x, start)).argmax(1)
    assert metrics.asr(faint, wanted, counted) < 0.5, "any noise would do"


def test_hardened_networks_withstand_the_perturbations(train, monkeypatch):
    made: list[Patterns] = []

    class Kept(Patterns):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(adaptive, "Patterns", Kept)
    plan = replace(PLAN, epochs=12)
    hard, _ = victim(Adaptive(lr=0.02, harden_share=0.5), train, plan)
    soft, _ = victim(Adaptive(lr=0.02, harden="none"), train, plan)
    universal = made[0].universal.detach()
    assert (made[1].universal == 0).all()
    assert (universal.flatten(1).abs().amax(1) > 0.02).all()
    test = toys.images(200, stream(1, "test"))
    kept = []
    for model in (hard, soft):
        right = []
        for aim in range(1, 4):
            others = test.take(test.y != aim)
            x = (others.x / 255 + universal[aim]).clamp(0, 1)
            right.append((logits(model, x).argmax(1) == others.y).float().mean())
        kept.append(float(torch.stack(right).mean()))
    assert kept[0] > kept[1] + 0.1


class Disk:
    """Checkpoints on a pretended disk."""

    def __init__(self, state: dict | None = None) -> None:
        self.state, self.saved = state, []

    def load(self) -> dict | None:
        return self.state

    def save(self, state: dict) -> None:
        self.saved.append(copy.deepcopy(state))


@pytest.mark.parametrize("harden", ["none", "universal"])
def test_a_resumed_training_ends_in_the_same_weights_and_trigger(train, harden):
    attack, whole = Adaptive(harden=harden), Disk()
    model, trigger = victim(attack, train, PLAN, lambda call: whole)
    assert len(whole.saved) == 4
    for state in whole.saved:
        rest = Disk(state)
        again, learned = victim(attack, train, PLAN, lambda call, rest=rest: rest)
        assert torch.equal(learned.stamp.change, trigger.stamp.change), state["epoch"]
        one, two = model.state_dict(), again.state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one), state["epoch"]


def test_one_channel_images(train):
    grey = Images(train.x[:, :1].contiguous(), train.y)
    model, trigger = victim(Adaptive(), grey, replace(PLAN, epochs=1))
    assert trigger.stamp.change.shape == (1, 16, 16)
    assert torch.isfinite(logits(model, grey.x)).all()


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device():
    hooks, batch = game()
    batch, model = batch.to("cuda"), Linear().cuda()
    advance(hooks, batch, model=model)  # moves the patterns
    torch.cuda.set_sync_debug_mode("error")
    try:
        advance(hooks, batch, model=model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu, plain = game()
    advance(on_cpu, plain)
    advance(on_cpu, plain)
    assert torch.allclose(hooks.patterns.trigger.cpu(), on_cpu.patterns.trigger, atol=1e-5)
