"""The trainer: repeatable and resumable bit for bit; augmentation and schedules as described."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arena.core import models, training
from arena.core.contracts import Images, Step
from arena.core.registry import BadInput
from arena.core.seeding import stream
from arena.core.training import RECIPES, Recipe, accuracy, finetuning, fit, logits, recipe, split

CPU = torch.device("cpu")
PLAIN = Recipe(epochs=3, batch=16, lr=0.1, crop=0, flip=False)
FULL = replace(PLAIN, crop=2, flip=True, cutout=3, average=True, bias_lr=64.0)


@pytest.fixture
def data() -> Images:
    """70 noisy images of 3 classes, told apart by the colour that is raised."""
    rng = stream(0, "data")
    y = torch.arange(70) % 3
    x = torch.randint(0, 120, (70, 3, 8, 8), generator=rng, dtype=torch.uint8)
    x[torch.arange(70), y] += 100
    return Images(x, y)


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 3),
        )


def trained(net: nn.Module, data: Images, plan: Recipe = PLAIN, seed: int = 0, **more: Any) -> dict:
    return fit(copy.deepcopy(net), data, plan, stream(seed), **more).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Kept:
    """A checkpoint on a pretended disk, which keeps neither identity nor memory layout."""

    def __init__(self, state: dict | None = None) -> None:
        self.state = state
        self.saved: list[dict] = []

    def load(self) -> dict | None:
        return self.state

    def save(self, state: dict) -> None:
        disk = io.BytesIO()
        torch.save(_packed(state), disk)
        disk.seek(0)
        self.saved.append(torch.load(disk, weights_only=True))


def _packed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.contiguous()
    if isinstance(value, dict):
        return {key: _packed(item) for key, item in value.items()}
    return [_packed(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------------------- the same, bit for bit


@pytest.mark.parametrize("plan", [PLAIN, FULL], ids=["plain", "full"])
def test_same_seed_same_weights(net, data, plan):
    one = trained(net, data, plan)
    assert same(one, trained(net, data, plan))
    assert not same(one, trained(net, data, plan, seed=1))


def test_the_global_generator_is_neither_read_nor_moved(net, data):
    state = torch.random.get_rng_state()
    one = trained(net, data, FULL)
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        assert same(one, trained(net, data, FULL))


@pytest.mark.parametrize("plan", [FULL, replace(PLAIN, momentum=0.0)], ids=["full", "no momentum"])
def test_a_resumed_run_ends_in_the_same_weights(net, data, plan):
    def noisy(batch: Images, rng: torch.Generator) -> Images:
        return Images(batch.x + 0.01 * torch.randn(batch.x.shape, generator=rng), batch.y)

    whole = Kept()
    one = trained(net, data, plan, on_batch=noisy, checkpoint=whole)
    assert [state["epoch"] for state in whole.saved] == [1, 2, 3]
    for state in whole.saved:
        rest = Kept(state)
        resumed = trained(net, data, plan, on_batch=noisy, checkpoint=rest)
        assert same(one, resumed), f"resumed after epoch {state['epoch']}"
        assert len(rest.saved) == plan.epochs - state["epoch"], "epochs were trained again"


def test_carried_objects_are_resumed_too(net, data):
    class Count:
        def __init__(self) -> None:
            self.calls = 0

        def state_dict(self) -> dict:
            return {"calls": self.calls}

        def load_state_dict(self, state: dict) -> None:
            self.calls = state["calls"]

    def run(state: dict | None) -> tuple[int, Kept]:
        count, kept = Count(), Kept(state)

        def hook(batch: Images, rng: torch.Generator) -> Images:
            count.calls += 1
            return batch

        trained(net, data, on_batch=hook, carry={"count": count}, checkpoint=kept)
        return count.calls, kept

    calls, kept = run(None)
    assert calls == 3 * (70 // 16)
    assert run(kept.saved[0])[0] == calls


def test_images_that_stay_on_the_host_give_the_same_weights(net, data, monkeypatch):
    one = trained(net, data, FULL)
    monkeypatch.setattr(training, "_fits", lambda size, device: False)
    assert same(one, trained(net, data, FULL))


# -------------------------------------------------------------------------------------------- hooks


def test_on_batch_sees_augmented_floats_and_its_result_is_trained_on(net, data):
    seen: list[Images] = []

    def hook(batch: Images, rng: torch.Generator) -> Images:
        seen.append(batch)
        return Images(batch.x, (batch.y + 1) % 3)

    shifted = fit(copy.deepcopy(net), data, replace(PLAIN, epochs=8), stream(0), on_batch=hook)
    assert accuracy(shifted, Images(data.x, (data.y + 1) % 3)) > 0.9
    assert {(x.x.dtype, tuple(x.x.shape)) for x in seen} == {(torch.float32, (16, 3, 8, 8))}
    assert all(float(b.x.min()) >= 0 and float(b.x.max()) <= 1 for b in seen)


def test_hooks_draw_from_a_stream_of_their_own(net, data):
    def draws(batch: Images, rng: torch.Generator) -> Images:
        torch.rand(7, generator=rng)
        return batch

    assert same(trained(net, data), trained(net, data, on_batch=draws))


def test_extra_loss_is_added(net, data):
    def nothing(step: Step) -> Tensor:
        assert step.logits.shape == (16, 3)
        assert step.loss.ndim == 0
        return step.logits.sum() * 0

    def small(step: Step) -> Tensor:
        return 10 * step.logits.square().mean()

    one = trained(net, data)
    assert same(one, trained(net, data, extra_loss=nothing))
    tame, wild = copy.deepcopy(net), copy.deepcopy(net)
    tame.load_state_dict(trained(net, data, extra_loss=small))
    wild.load_state_dict(one)
    assert logits(tame, data.x).abs().mean() < 0.5 * logits(wild, data.x).abs().mean()


# ------------------------------------------------------------------------------------ augmentation


def shown(data: Images, plan: Recipe, epoch: int = 0, batch: int = 70, seed: int = 0) -> Images:
    """The first batch of an epoch."""
    return next(training._Augmented(data, plan, seed, CPU).epoch(epoch, batch, stream(0)))


@pytest.fixture
def numbered() -> Images:
    """Images that all differ, so that a batch tells which image stands where; not square."""
    x = torch.randint(256, (70, 3, 8, 6), generator=stream(1), dtype=torch.uint8)
    return Images(x, torch.arange(70))


def test_no_augmentation_only_shuffles(numbered):
    batch = shown(numbered, PLAIN)
    assert torch.equal(batch.y.sort().values, numbered.y)
    assert not torch.equal(batch.y, numbered.y)
    assert torch.equal(batch.x, numbered.x[batch.y].float() / 255)


@pytest.mark.parametrize("border", ["reflect", "zero"])
def test_crops_are_windows_of_the_padded_image(numbered, border):
    plan = replace(PLAIN, crop=2, border=border)
    batch = shown(numbered, plan)
    mode = "reflect" if border == "reflect" else "constant"
    places = set()
    for x, row in zip(batch.x, batch.y, strict=True):
        padded = np.pad(numbered.x[row].numpy(), ((0, 0), (2, 2), (2, 2)), mode=mode)
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(
                padded[:, top : top + 8, left : left + 6], (x * 255).round().byte().numpy()
            )
        ]
        assert len(found) == 1, "not a window of the padded image"
        places |= set(found)
    assert len(places) > 15, "the shifts hardly vary"


def test_every_image_alternates_between_its_two_mirror_images(numbered):
    plan = replace(PLAIN, flip=True)
    mirrored = []
    for epoch in range(3):
        batch = shown(numbered, plan, epoch)
        back = torch.empty_like(batch.x)
        back[batch.y] = batch.x
        plain = numbered.x.float() / 255
        flipped = (back == plain.flip(-1)).flatten(1).all(1)
        assert torch.equal(flipped, ~(back == plain).flatten(1).all(1))
        mirrored.append(flipped)
    assert torch.equal(mirrored[0], ~mirrored[1])
    assert torch.equal(mirrored[0], mirrored[2])
    assert 15 < int(mirrored[0].sum()) < 55


@pytest.mark.parametrize("side", [3, 4, 9])
def test_cutout_blackens_one_square(side):
    white = Images(torch.full((400, 3, 20, 16), 255, dtype=torch.uint8), torch.arange(400))
    holes = shown(white, replace(PLAIN, cutout=side), batch=400).x == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    rows, columns = holes[:, 0].any(2).sum(1), holes[:, 0].any(1).sum(1)
    assert torch.equal(holes[:, 0].sum((1, 2)), rows * columns), "not a rectangle"
    assert int(rows.max()) == int(columns.max()) == side
    assert int(rows.min()) == int(columns.min()) == side - side // 2, "a hole may hang over"
    middle = (rows == side) & (columns == side)
    assert abs(float(middle.float().mean()) - (21 - side) / 20 * (17 - side) / 16) < 0.1
    assert holes[:, 0].any(0).all(), "some place is never cut"


# ---------------------------------------------------------------------------------- rates and steps


def rates(plan: Recipe, total: int) -> list[float]:
    return [training._rate(plan, step, total) for step in range(total)]


def test_schedules():
    triangle = Recipe(lr=1.0, warmup=0.2, start_lr=0.2, final_lr=0.0)
    assert rates(triangle, 10) == pytest.approx([0.2, 0.6, *(down / 8 for down in range(8, 0, -1))])
    flat = replace(triangle, warmup=0.0)
    assert rates(replace(flat, schedule="constant"), 3) == [1, 1, 1]
    cosine = replace(flat, schedule="cosine", final_lr=0.1)
    swing = 0.45 * 0.5**0.5
    assert rates(cosine, 4) == pytest.approx([1, 0.55 + swing, 0.55, 0.55 - swing])
    steps = replace(flat, schedule="steps", drop_at=(0.5, 0.75))
    assert rates(steps, 4) == pytest.approx([1, 1, 0.1, 0.01])


def test_finetuning_divides_the_rate_every_so_many_epochs():
    plan_of = partial(
        finetuning, lr=0.1, batch=64, momentum=0.9, weight_decay=1e-4, crop=4, cutout=9
    )
    for epochs, every, per_epoch in ((10, 2, 39), (7, 3, 13), (20, 1, 7), (3, 5, 4)):
        plan = plan_of(epochs=epochs, decay_every=every)
        expected = [0.1 * 0.1 ** (step // per_epoch // every) for step in range(epochs * per_epoch)]
        assert rates(plan, epochs * per_epoch) == pytest.approx(expected)
    assert plan_of(epochs=0, decay_every=2).epochs == 0


def test_the_optimizer_gets_the_scheduled_rates(net, data, monkeypatch):
    used: list[tuple[float, ...]] = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self: used.append(tuple(g["lr"] for g in self.param_groups)) or step(self),
    )
    plan = replace(PLAIN, bias_lr=64.0)
    trained(net, data, plan)
    assert [rate for rate, _ in used] == rates(plan, 12)
    assert all(bias == 64 * rate for rate, bias in used)


def test_the_bias_rate_is_for_norm_biases_and_leaves_their_decay(net):
    weights, biases = training._optimizer(net, FULL, CPU).param_groups
    assert {id(p) for p in biases["params"]} == {id(net[1].bias), id(net[4].bias)}
    assert len(weights["params"]) + len(biases["params"]) == len(list(net.parameters()))
    assert biases["weight_decay"] * biases["scale"] == weights["weight_decay"] * weights["scale"]


def test_frozen_weights_stay(net, data):
    net[0].weight.requires_grad_(False)
    after = trained(net, data)
    assert torch.equal(after["0.weight"], net[0].weight)
    assert not torch.equal(after["3.weight"], net[3].weight)


def test_small_sets_get_more_epochs(net, data):
    kept = Kept()
    trained(net, data, replace(PLAIN, epochs=1, min_steps=10), checkpoint=kept)
    assert len(kept.saved) == 3  # 4 updates per epoch
    fewer = Kept()
    trained(net, data.take(torch.arange(5)), replace(PLAIN, epochs=2), checkpoint=fewer)
    assert len(fewer.saved) == 2  # a batch of 5


def test_slow_weights_are_the_result(net, data):
    """With a decay that is all but 1 the slow weights hardly leave the start."""
    lookahead = training._Lookahead(net, total=10)
    start = {name: value.clone() for name, value in lookahead.slow.items()}
    with torch.no_grad():
        net[0].weight.add_(1.0)
    lookahead.after(4)  # the fifth update: decay = 0.95**5 * 0.4**3
    moved = 1 - 0.95**5 * 0.4**3
    assert torch.allclose(net[0].weight, start["0.weight"] + moved)
    assert torch.allclose(lookahead.slow["0.weight"], net[0].weight)
    with torch.no_grad():
        net[0].weight.add_(1.0)
    lookahead.after(5)
    assert torch.allclose(lookahead.slow["0.weight"], start["0.weight"] + moved), "not the tenth"
    lookahead.finish()
    assert torch.equal(net[0].weight, lookahead.slow["0.weight"])


def test_it_learns(net, data):
    model = fit(net, data, replace(PLAIN, epochs=8), stream(0))
    assert accuracy(model, data) > 0.9
    assert not model.training


# -------------------------------------------------------------------------------------- small tools


def test_split_is_disjoint_complete_and_seeded(numbered):
    one, two = split(numbered, 0.3, stream(0))
    assert (len(one), len(two)) == (21, 49)
    assert torch.equal(torch.cat([one.y, two.y]).sort().values, numbered.y)
    assert torch.equal(one.x, numbered.x[one.y])
    assert torch.equal(one.y, split(numbered, 0.3, stream(0))[0].y)
    assert not torch.equal(one.y, split(numbered, 0.3, stream(1))[0].y)


def test_logits_run_in_evaluation_mode_and_give_every_mode_back(net, data):
    net.train()
    net[1].eval()
    modes = [module.training for module in net.modules()]
    before = copy.deepcopy(net.state_dict())
    out = logits(net, data.x, batch=32)
    assert [module.training for module in net.modules()] == modes
    assert same(before, net.state_dict()), "batch norm was updated"
    assert out.shape == (70, 3)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert torch.allclose(out, logits(net, data.x.float() / 255), atol=1e-2)
    net[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(net, data.x)
    assert [module.training for module in net.modules()] == modes


def test_accuracy_is_a_share(data):
    class Third(nn.Module):
        """Says class 0 always."""

        def __init__(self) -> None:
            super().__init__()
            self.none = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([1.0, 0.0, 0.0]).expand(len(x), 3) + self.none

    assert accuracy(Third(), data) == pytest.approx(24 / 70)


def test_recipes_take_the_settings_of_the_network():
    assert recipe("fast", {"lr": 0.75}) == replace(RECIPES["fast"], lr=0.75)
    assert recipe("paper") == RECIPES["paper"]


# ------------------------------------------------------------------------------------------- faults


def test_bad_input_is_named(net, data):
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        fit(net, data.take(torch.arange(1)), PLAIN, stream(0))
    with pytest.raises(ValueError, match=r"uint8 images, got torch\.float32"):
        fit(net, Images(data.x.float(), data.y), PLAIN, stream(0))
    with pytest.raises(ValueError, match="no images to classify"):
        logits(net, data.x[:0])
    with pytest.raises(BadInput, match="no recipe 'fasst'; did you mean 'fast'"):
        recipe("fasst")
    with pytest.raises(BadInput, match="schedule cannot be 'cosin'; did you mean 'cosine'"):
        Recipe(schedule="cosin")
    with pytest.raises(BadInput, match="border cannot be 'mirror'; choose from reflect, zero"):
        Recipe(border="mirror")


def test_a_loss_that_is_not_finite_stops_the_run(net, data):
    with pytest.raises(FloatingPointError, match="became nan in epoch 1"):
        trained(net, data, extra_loss=lambda *_: torch.tensor(float("nan")))


# ---------------------------------------------------------------------- hooks of stronger attackers


def test_on_image_sees_the_stored_images_of_its_rows_before_augmentation(net, data):
    seen: list[Images] = []

    def look(batch: Images, rng: torch.Generator) -> Images:
        seen.append(batch)
        return batch

    changed = trained(net, data, on_image=look)
    assert same(trained(net, data), changed)  # padding floats is padding bytes
    for batch in seen:
        assert torch.equal((batch.x * 255).round().byte(), data.x[batch.rows])
        assert torch.equal(batch.y, data.y[batch.rows])


def test_on_batch_knows_the_rows_of_its_images(net, data):
    rows: list[Tensor] = []

    def look(batch: Images, rng: torch.Generator) -> Images:
        rows.append(batch.rows)
        return batch

    trained(net, data, replace(PLAIN, epochs=1), on_batch=look)
    assert len(torch.cat(rows).unique()) == len(torch.cat(rows))


def test_what_on_image_stamps_is_mirrored_and_what_on_batch_stamps_is_not(data):
    white = Images(torch.zeros_like(data.x), data.y)

    def mark(batch: Images, rng: torch.Generator) -> Images:
        x = batch.x.clone()
        x[..., 0, 0] = 1
        return replace(batch, x=x)

    plan = Recipe(crop=0, flip=True)
    augmented = training._Augmented(white, plan, 0, CPU, mark)
    batch = next(augmented.epoch(0, len(white), stream(0)))
    left, right = batch.x[:, 0, 0, 0] == 1, batch.x[:, 0, 0, -1] == 1
    assert bool((left ^ right).all())
    assert left.any()
    assert right.any()


def test_a_hook_may_not_change_the_size_of_the_batch(net, data):
    with pytest.raises(ValueError, match="a batch of 16 images into one of 15"):
        trained(net, data, on_batch=lambda batch, rng: batch.take(torch.arange(15)))


def test_other_optimisers_are_stepped_beside_the_model(net, data):
    shift = torch.zeros(1, 3, 1, 1, requires_grad=True)
    beside = torch.optim.SGD([shift], lr=0.1)

    def stamp(batch: Images, rng: torch.Generator) -> Images:
        return replace(batch, x=batch.x + shift)

    trained(net, data, on_batch=stamp, also=(beside,))
    assert float(shift.detach().abs().max()) > 0
    before = shift.detach().clone()
    trained(net, data, on_image=stamp)  # gradients flow through the augmentation, too
    assert torch.equal(before, shift.detach())


def test_extra_loss_gets_the_features_of_its_own_pass():
    model = models.build("fastnet_small", 3, (3, 16, 16), stream(0))
    images = Images(
        torch.randint(256, (32, 3, 16, 16), generator=stream(1), dtype=torch.uint8),
        torch.arange(32) % 3,
    )
    found: list[dict[str, Any]] = []

    def look(step: Step) -> Tensor:
        found.append({k: v.shape for k, v in step.features.items()})
        assert all(v.requires_grad for v in step.features.values())
        assert 0 <= step.done < 1
        return step.features["deep"].float().mean() * 0

    plan = Recipe(epochs=1, batch=16, crop=0)
    fit(model, images, plan, stream(2), extra_loss=look, levels=("shallow", "deep"))
    assert len(found) == 2
    assert set(found[0]) == {"shallow", "deep"}
    assert all(len(m._forward_hooks) == 0 for m in model.modules())
