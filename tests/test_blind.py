"""Blind: the weighted sum by hand, when it begins, what it resumes with, and that it works."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import toys
from test_training import Kept, same
from torch import Tensor, nn
from torch.nn import functional as F

from arena.attacks.blind import Blind, EditedLoss, Inverted
from arena.core import training
from arena.core.contracts import Images, Step
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream
from arena.core.training import Recipe
from arena.core.victims import bound

SHAPE = (3, toys.SIDE, toys.SIDE)
PLAN = Recipe(epochs=5, batch=32, lr=0.2, bias_lr=16.0, crop=2, label_smoothing=0.1)


def black(channels: int = 3, height: int = 32, width: int = 32, n: int = 2) -> Images:
    return Images(torch.zeros(n, channels, height, width, dtype=torch.uint8), torch.arange(n))


def edited(attack: Blind, data: Images, seed: int = 0) -> EditedLoss:
    trigger = attack.prepare(data, stream(seed, "prepare"))
    return EditedLoss(attack, trigger, data.x.shape[1:], stream(seed, "train"))


# --------------------------------------------------------------------------------- the pattern


def lit(train: Images) -> Tensor:
    """The (row, column) of each pixel that is white, on black."""
    trigger = Blind().prepare(train, stream(0))
    out = trigger.stamp(train.x.float() / 255)
    assert (out == out[:1, :1]).all(), "images or channels differ"
    return out[0, 0].nonzero().tolist()


def test_the_pattern_has_white_black_and_transparent_cells():
    x = torch.rand(4, 3, 32, 32, generator=stream(3))
    before = x.clone()
    out = Blind().prepare(black(), stream(0)).stamp(x)
    assert torch.equal(x, before)
    changed = (out != x).all(1)[0]
    assert changed.nonzero().amin(0).tolist() == [3, 23]
    assert changed.nonzero().amax(0).tolist() == [7, 25]
    values = out[0, 0, 3:8, 23:26]
    assert int((values == 1).sum()) == int((values == 0).sum()) == 5
    assert int(changed.sum()) == 10
    assert torch.equal(out[:, :, ~changed], x[:, :, ~changed])


def test_the_pattern_grows_with_the_image():
    small = [[3, 23], [4, 24], [5, 25], [6, 23], [7, 24]]
    assert lit(black()) == small
    assert lit(black(channels=1)) == small
    assert len(lit(black(height=64, width=64))) == 20
    assert lit(black(height=64, width=64))[0] == [6, 46]
    assert lit(black(height=64, width=96))[0] == [6, 69]
    assert lit(black(height=28, width=28))[0] == [2, 20]


@pytest.mark.parametrize(
    ("spec", "shape", "counts", "message"),
    [
        ("blind", (3, 4, 8), [9] * 10, "5x3 pattern does not fit at row 0, column 5 .* 4x8 px"),
        ("blind", (3, 8, 6), [9] * 10, "column 4 of images of 8x6 px"),
        ("blind:target=8", (1, 28, 28), [9] * 5, "target 8 is not a class .* 5 classes are 0 to 4"),
        ("blind", (1, 28, 28), [9], "at least two classes"),
    ],
)
def test_data_that_cannot_be_attacked_is_refused(spec, shape, counts, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec).check(shape, counts)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("blind:balance=mdga", "did you mean 'mgda'"),
        ("blind:normaliser=l1", "cannot be 'l1'"),
        ("blind:poisoning_proportion=1.1", "at most 1"),
        ("blind:threshold=0", "above 0"),
        ("blind:history=0", "at least 1"),
        ("blind:evade=abs", "cannot be 'abs'"),
    ],
)
def test_fields_out_of_range_are_refused(spec, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec)


def test_the_smallest_images_are_attacked():
    Blind().check((3, 8, 8), [5, 5])
    assert len(lit(black(height=8, width=8))) == 5


def test_the_training_set_stays_as_it_is():
    train = toys.images(12, stream(0))
    attack = Blind()
    data, rows = attack.poison(train, attack.prepare(train, stream(0)), stream(1))
    assert data is train
    assert rows.shape == (0,)
    assert rows.dtype == torch.int64


# -------------------------------------------------------------------------- the loss, by hand


class Linear(nn.Module):
    """One matrix on flat images; remembers what it was shown."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, 3 * 64, generator=stream(5)) / 10)
        self.unused = nn.Parameter(torch.ones(2))
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append(x.detach())
        return x.flatten(1) @ self.weight.T


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Passes in float32 also on processors that have bf16: these tests compare by hand."""
    monkeypatch.setattr(training, "has_bf16", lambda device: False)


@pytest.fixture
def batch() -> Images:
    return Images(torch.rand(12, 3, 8, 8, generator=stream(6)), torch.arange(12) % 3)


def step_of(model: nn.Module, batch: Images, done: float = 0.5, smoothing: float = 0.1) -> Step:
    logits = model(batch.x)
    loss = F.cross_entropy(logits, batch.y, label_smoothing=smoothing)
    return Step(model, batch, logits, loss, {}, stream(0), done)


def gradient(weight: Tensor, x: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Of the mean cross-entropy of a linear model, written out."""
    chances = (x.flatten(1) @ weight.T).softmax(1)
    wanted = F.one_hot(y, 3) * (1 - smoothing) + smoothing / 3
    return (chances - wanted).T @ x.flatten(1) / len(x)


def total_gradient(attack: Blind, batch: Images) -> tuple[Linear, Tensor]:
    """What `fit` would make of the hook's result."""
    model = Linear()
    step = step_of(model, batch)
    (step.loss + edited(attack, batch)(step)).backward()
    return model, model.weight.grad


def test_the_gradient_is_the_weighted_sum_of_both_tasks(batch):
    attack = Blind(threshold=None, target=2)
    model, found = total_gradient(attack, batch)
    weight = model.weight.detach()
    stamped = attack.prepare(batch, stream(0)).stamp(batch.x)
    aims = torch.full((12,), 2)
    main = gradient(weight, batch.x, batch.y, smoothing=0.1)
    backdoor = gradient(weight, stamped, aims)
    # the normaliser loss+: the loss, without smoothing, times the length
    losses = [
        float(F.cross_entropy(x.flatten(1) @ weight.T, y))
        for x, y in ((batch.x, batch.y), (stamped, aims))
    ]
    one, two = main / (losses[0] * main.norm()), backdoor / (losses[1] * backdoor.norm())
    first = float(((two - one) * two).sum() / (one - two).square().sum())
    assert 0.01 < first < 0.99
    assert torch.allclose(found, first * main + (1 - first) * backdoor, atol=1e-6)
    assert len(model.shown) == 2
    assert torch.equal(model.shown[1], stamped)
    assert model.unused.grad is None or not model.unused.grad.any()


def test_fixed_weights(batch):
    model, found = total_gradient(Blind(threshold=None, balance="fixed"), batch)
    weight = model.weight.detach()
    stamped = Blind().prepare(batch, stream(0)).stamp(batch.x)
    main = gradient(weight, batch.x, batch.y, smoothing=0.1)
    assert torch.allclose(found, main + 0.9 * gradient(weight, stamped, 0 * batch.y), atol=1e-6)


def test_from_every_class_to_the_next(batch):
    attack = Blind(threshold=None, balance="fixed", mode="all_to_all")
    assert attack.scope == "all-to-all"
    model, found = total_gradient(attack, batch)
    weight = model.weight.detach()
    stamped = attack.prepare(batch, stream(0)).stamp(batch.x)
    main = gradient(weight, batch.x, batch.y, smoothing=0.1)
    shifted = gradient(weight, stamped, torch.tensor([1, 2, 0] * 4))
    assert torch.allclose(found, main + 0.9 * shifted, atol=1e-6)


@pytest.mark.parametrize(("share", "count"), [(1.0, 12), (0.5, 6), (0.3, 4), (0.01, 2)])
def test_only_a_share_of_the_batch_is_copied(batch, share, count):
    model, _ = total_gradient(Blind(threshold=None, poisoning_proportion=share), batch)
    assert len(model.shown[1]) == count
    assert torch.equal(model.shown[1], Blind().prepare(batch, stream(0)).stamp(batch.x[:count]))


# ------------------------------------------------------------------------------- when it begins


def watched(attack: Blind, losses: list[float], updates: int) -> list[bool]:
    """Whether the attack runs after each of these losses, in a run of so many updates."""
    loss = edited(attack, black())
    found = []
    for number, value in enumerate(losses):
        loss.watch(torch.tensor(value), number / updates)
        found.append(loss.attacking)
    return found


def test_it_begins_once_the_mean_of_a_full_window_is_low_and_goes_on():
    attack = Blind(threshold=1.0, history=20, history_share=1.0)
    assert watched(attack, [0.5] * 30, 1000).index(True) == 19  # the window is full
    falling = [2.0] * 25 + [0.5] * 100  # 20 losses average below 1 once 14 of them are 0.5
    assert watched(attack, falling, 1000).index(True) == 39  # looked at every 10 updates
    assert all(watched(attack, [0.5] * 20 + [9.0] * 60, 1000)[19:])
    assert not any(watched(attack, [1.0] * 90, 1000)), "it must be below"
    assert not any(watched(attack, [0.9, 1.2] * 60, 1000))
    assert watched(Blind(threshold=None), [9.0], 1000) == [True]


def test_the_window_is_cut_to_a_share_of_the_run():
    attack = Blind(threshold=1.0, history=1000, history_share=0.1)
    assert watched(attack, [0.5] * 100, 400).index(True) == 39
    assert not any(watched(attack, [0.5] * 100, 4000))
    falling = [3.0] * 60 + [0.5] * 60  # only the last 40 count: 34 of 0.5 are enough
    assert watched(attack, falling, 400).index(True) == 99


def test_the_ring_keeps_the_last_losses_only():
    attack = Blind(threshold=1.0, history=10, history_share=1.0)
    assert watched(attack, [50.0] * 35 + [0.1] * 20, 1000).index(True) == 49


def test_before_it_begins_the_loss_is_left_alone(batch):
    model = Linear()
    loss = edited(Blind(), batch)
    extra = loss(step_of(model, batch))
    assert float(extra) == 0
    assert not extra.requires_grad
    assert len(model.shown) == 1, "a pass too many"


def test_label_smoothing_does_not_count(batch):
    """A confident, right model has a low loss, whatever the smoothing makes of it."""
    loss = edited(Blind(threshold=0.1, history=10, history_share=1.0), batch)
    logits = (30.0 * F.one_hot(batch.y, 3)).requires_grad_(True)
    smoothed = F.cross_entropy(logits, batch.y, label_smoothing=0.5)
    assert float(smoothed.detach()) > 5
    step = Step(Linear(), batch, logits, smoothed, {}, stream(0), 0.5)
    for _ in range(9):
        loss(step)
    assert not loss.attacking
    loss.watch(F.cross_entropy(logits.detach(), batch.y), 0.5)
    assert loss.attacking


# ------------------------------------------------------------------------------------ batch norm


def test_the_running_statistics_are_those_of_clean_passes_unless_asked_otherwise(batch):
    for setting in ("clean", "both"):
        model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 3)).train()
        step = step_of(model, batch)
        before = copy.deepcopy(model[0].state_dict())
        extra = edited(Blind(threshold=None, batch_norm=setting, evade="nc"), batch)(step)
        assert extra.requires_grad
        assert same(before, model[0].state_dict()) == (setting == "clean")
        assert model[0].track_running_stats


def test_a_failing_pass_leaves_batch_norm_in_order(batch):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 3)).train()
    step = step_of(model, batch)
    model[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        edited(Blind(threshold=None), batch)(step)
    assert model[0].track_running_stats


# --------------------------------------------------------------------------------------- evasion


def test_an_inverted_trigger_mixes_by_its_mask():
    inverted = Inverted(torch.Size((3, 4, 5)), stream(0))
    x = torch.rand(2, 3, 4, 5, generator=stream(1))
    assert (inverted.mask() == 0.5).all()
    pattern = inverted.pattern_tanh.tanh() / 2 + 0.5
    assert torch.allclose(inverted(x), (x + pattern) / 2)
    many = Inverted(torch.Size((3, 40, 40)), stream(0)).pattern_tanh
    assert float(many.detach().std()) == pytest.approx(0.5, abs=0.02)


def test_evasion_adds_the_true_labels_of_images_with_the_inverted_trigger(batch):
    attack = Blind(threshold=None, balance="fixed", evade="nc")
    loss, model = edited(attack, batch), Linear()
    before = copy.deepcopy(loss.inverted)
    step = step_of(model, batch)
    (step.loss + loss(step)).backward()
    clean, stamped, tried, shown = model.shown
    assert torch.equal(tried, before(batch.x).detach())
    assert torch.equal(shown, loss.inverted(batch.x).detach())
    assert not torch.equal(shown, tried), "the inverted trigger was not bettered"
    weight = model.weight.detach()
    expected = gradient(weight, clean, batch.y, smoothing=0.1)
    expected = expected + 0.9 * gradient(weight, stamped, 0 * batch.y)
    expected = expected + 0.9 * gradient(weight, shown, batch.y)
    assert torch.allclose(model.weight.grad, expected, atol=1e-6)


def test_the_inverted_trigger_is_trained_towards_the_target(batch):
    loss, model = edited(Blind(threshold=None, target=1, evade="nc"), batch), Linear()

    def error() -> float:
        out = model(loss.inverted(batch.x))
        return float(F.cross_entropy(out, torch.ones_like(batch.y)).detach())

    start = error()
    for _ in range(60):
        loss(step_of(model, batch))
    assert error() < 0.5 * start


def test_the_mask_is_kept_small(batch):
    """Where nothing can be gained, only the size of the mask counts."""
    loss, model = edited(Blind(threshold=None, evade="nc"), batch), Linear()
    with torch.no_grad():
        model.weight.zero_()
    for _ in range(30):
        loss(step_of(model, batch))
    assert float(loss.inverted.mask().detach().max()) < 0.45


# ------------------------------------------------------------------------------ whole trainings


def run(spec: str, train: Images, *, seed: int = 0, kept: Kept | None = None, plan=PLAN):
    attack = attacks.build(spec)
    checkpoints = None if kept is None else (lambda call: kept)
    fit = bound("fastnet_small", 4, SHAPE, plan, 0, torch.device("cpu"), checkpoints)
    trigger = attack.prepare(train, stream(seed, "prepare"))
    poisoned = attack.poison(train, trigger, stream(seed, "poison"))
    return attack.train(fit, poisoned, trigger, stream(seed, "train"))


@pytest.fixture(scope="module")
def train() -> Images:
    return toys.images(256, stream(0, "train"))


@pytest.mark.parametrize("spec", ["blind:threshold=1.2", "blind:threshold=1.2,evade=nc"])
def test_a_short_training_makes_a_backdoor(train, spec):
    model, trigger = run(spec, train)
    test = toys.images(200, stream(1, "test"))
    assert training.accuracy(model, test) > 0.9
    others = test.x[test.y != 0].float() / 255
    fooled = training.logits(model, trigger.stamp(others)).argmax(1) == 0
    assert float(fooled.float().mean()) > 0.9


def test_without_a_low_loss_it_trains_like_anyone(train):
    plan = Recipe(epochs=1, batch=64, lr=0.1)
    blind, _ = run("blind:threshold=0.000001", train, plan=plan)
    fit = bound("fastnet_small", 4, SHAPE, plan, 0, torch.device("cpu"))
    assert same(fit(train, rng=_after_inverted()).state_dict(), blind.state_dict())


def _after_inverted() -> torch.Generator:
    """The stream of `run` after the draw of the evasion's first pattern."""
    rng = stream(0, "train")
    Inverted(torch.Size(SHAPE), rng)
    return rng


def test_the_same_seed_trains_the_same_model_and_a_resumed_run_ends_there(train):
    spec = "blind:threshold=1.3,evade=nc,normaliser=loss"
    part = train.take(torch.arange(80))
    plan = Recipe(epochs=4, batch=16, lr=0.1, crop=2)
    whole = Kept()
    one = run(spec, part, kept=whole, plan=plan)[0].state_dict()
    states = [state["blind"] for state in whole.saved]
    assert [state["attacking"] for state in states] == [False, True, True, True]
    assert int(states[0]["updates"]) == 5
    for state in whole.saved[:2]:
        resumed = run(spec, part, kept=Kept(state), plan=plan)[0].state_dict()
        assert same(one, resumed), f"resumed after epoch {state['epoch']}"
    assert not same(one, run(spec, part, seed=1, plan=plan)[0].state_dict())


def test_what_it_remembers_is_loaded_as_it_was_saved(batch):
    loss, model = edited(Blind(threshold=5.0, history=10, evade="nc"), batch), Linear()
    for number in range(15):
        loss(step_of(model, batch, done=number / 15))
    assert loss.attacking
    other = edited(Blind(threshold=5.0, history=10, evade="nc"), batch, seed=9)
    assert not torch.equal(other.inverted.pattern_tanh, loss.inverted.pattern_tanh)
    disk = Kept()
    disk.save(loss.state_dict())
    other.load_state_dict(disk.saved[0])
    assert (other.updates, other.attacking) == (loss.updates, True)
    assert torch.equal(other.losses, loss.losses)
    twin = SimpleNamespace(weight=None)
    for part in (loss, other):
        model = Linear()
        extra = part(step_of(model, batch))
        extra.backward()
        twin.weight, last = model.weight.grad, twin.weight
    assert torch.equal(twin.weight, last)
