"""WaNet: the warp by hand, the shares of every batch, and a training that repeats itself."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from arena.attacks.wanet import WaNet, turned
from arena.core.contracts import Images
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream
from arena.core.training import Recipe
from arena.core.victims import bound

HALF_A_LEVEL = 0.501 / 255


def images(n=64, channels=3, height=16, width=16, classes=4):
    shape = (n, channels, height, width)
    x = torch.randint(256, shape, generator=stream(0, "images"), dtype=torch.uint8)
    return Images(x, torch.arange(n) % classes)


def batch_of(train, n=50):
    return Images(train.x[:n].float() / 255, train.y[:n], torch.arange(n))


def trigger_of(spec, train, seed=0):
    return attacks.build(spec).prepare(train, stream(seed, "trigger"))


def ramps(n, height, width):
    """Images whose value is the column in channel 0 and the row in channel 1, both in [0, 1]."""
    across = torch.linspace(0, 1, width).expand(n, 1, height, width)
    down = torch.linspace(0, 1, height)[:, None].expand(n, 1, height, width)
    return torch.cat([across, down, torch.zeros_like(down)], 1)


# ----------------------------------------------------------------------------------- the warp


@pytest.mark.parametrize("k", [4, 6])
def test_the_field_runs_through_the_control_points(k):
    control = torch.rand(1, 2, k, k, generator=stream(3, "trigger"))[0] * 2 - 1
    control = control / control.abs().mean()
    warp = trigger_of(f"wanet:k={k}", images(height=31, width=46), seed=3).stamp
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        found = warp.noise_grid[row, column].tolist()
        assert found == pytest.approx(control[:, row, column].tolist(), abs=1e-5)
    if k == 4:  # of 31 and 46 points, every 10th and 15th lies on one of 4
        assert torch.allclose(warp.noise_grid[::10, ::15].permute(2, 0, 1), control, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 7), (5, 12)])
def test_every_pixel_by_hand(height, width):
    train = images(3, 1, height, width)
    warp = trigger_of("wanet:s=2.5", train).stamp  # strong enough to leave the image at some edges
    x = train.x.float() / 255
    out, clamped = warp(x), 0
    for row in range(height):
        for column in range(width):
            place = []
            for axis, (at, side) in enumerate(((column, width), (row, height))):
                shift = 2.5 / height * float(warp.noise_grid[row, column, axis])
                found = -1 + 2 * at / (side - 1) + shift
                clamped += not -1 <= found <= 1
                place.append((min(max(found, -1.0), 1.0) + 1) / 2 * (side - 1))
            left, top = (
                min(math.floor(p), s - 2) for p, s in zip(place, (width, height), strict=True)
            )
            a, b = place[0] - left, place[1] - top
            near = x[1, 0, top : top + 2, left : left + 2].tolist()
            value = (1 - b) * ((1 - a) * near[0][0] + a * near[0][1])
            value += b * ((1 - a) * near[1][0] + a * near[1][1])
            assert float(out[1, 0, row, column]) == pytest.approx(value, abs=2e-6)
    assert clamped


def test_columns_come_first_in_the_grid():
    height, width = 16, 24
    warp = trigger_of("wanet", images(height=height, width=width)).stamp
    out = warp(ramps(2, height, width))
    shift = (0.5 / height * warp.noise_grid).permute(2, 0, 1)
    plain = torch.stack([ramps(1, height, width)[0, 0], ramps(1, height, width)[0, 1]]) * 2 - 1
    expected = ((plain + shift).clamp(-1, 1) + 1) / 2
    assert torch.allclose(out[1, :2], expected, atol=2e-6)


@pytest.mark.parametrize(
    ("channels", "height", "width"), [(3, 32, 32), (1, 28, 28), (3, 48, 33), (3, 224, 224)]
)
def test_the_identity_grid_is_the_identity(channels, height, width):
    train = images(4, channels, height, width)
    x = train.x.float() / 255
    out = trigger_of("wanet:s=0", train).stamp(x)
    assert (out - x).abs().max() <= 1e-6


def test_a_rescaled_grid_zooms():
    warp = trigger_of("wanet:s=0,grid_rescale=0.5", images(height=9, width=9)).stamp
    out = warp(ramps(1, 9, 9))
    assert torch.allclose(out[0, 0, 4], torch.linspace(0.25, 0.75, 9), atol=1e-6)


def test_the_warp_is_of_the_papers_strength_and_drawn_once():
    train = images(height=32, width=32)
    one, two, other = (trigger_of("wanet", train, seed).stamp for seed in (1, 1, 2))
    assert torch.equal(one.noise_grid, two.noise_grid)
    assert not torch.equal(one.noise_grid, other.noise_grid)
    assert 0.5 < float(one.noise_grid.abs().mean()) < 1.5
    x = train.x.float() / 255
    assert 0.005 < float((one(ramps(1, 32, 32)) - ramps(1, 32, 32)).abs().max()) < 0.1
    assert torch.equal(one(x)[7:9], one(x[7:9]))


def test_the_trigger_holds_both_grids():
    warp = trigger_of("wanet", images()).stamp
    assert warp.identity_grid.shape == warp.noise_grid.shape == (16, 16, 2)
    assert warp.identity_grid[0, 0].tolist() == [-1, -1]
    assert warp.identity_grid[0, -1].tolist() == [1, -1]


# --------------------------------------------------------------------------------- noise mode


def test_noise_mode_is_near_the_trigger_but_not_it():
    height = width = 16
    train = images(height=height, width=width)
    trigger = trigger_of("wanet", train)
    noise = trigger.probes["noise"]
    assert noise.of is None
    x = train.x.float() / 255
    shown = noise.stamp(x)
    assert (shown - trigger.stamp(x)).abs().mean() > 0.02
    assert torch.equal(shown, noise.stamp(x))
    assert torch.equal(shown[5:6], noise.stamp(x[5:6])), "it depends on the batch"
    assert shown.min() >= 0
    assert shown.max() <= 1
    # on a ramp the value is the place: within 1 / H of [-1, 1], half of that of [0, 1]
    slope = ramps(1, height, width)
    away = (noise.stamp(slope) - trigger.stamp(slope)).abs()
    assert 0.4 / height < float(away.max()) <= 0.5 / height + 1e-6


def test_images_are_shared_out_to_several_noise_grids():
    trigger = trigger_of("wanet", images())
    x = ramps(40, 16, 16)
    x[:, 2] = torch.arange(40)[:, None, None] / 255 / 256  # another sum of levels for each …
    x[:, 2, 0, 0] += torch.arange(40) / 255  # … by one
    shown = trigger.probes["noise"].stamp(x)[:, :2]
    assert len(shown.flatten(1).unique(dim=0)) == 16


# ---------------------------------------------------------------------------------- each batch


@pytest.mark.parametrize(
    ("spec", "size", "count", "noisy"),
    [
        ("wanet", 50, 5, 10),
        ("wanet", 19, 1, 2),
        ("wanet:rate=0.25,cross_ratio=1.5", 30, 7, 10),
        ("wanet:cross_ratio=0", 40, 4, 0),
        ("wanet:rate=0.4,cross_ratio=1.5", 5, 2, 3),
    ],
)
def test_the_shares_of_a_batch_are_exact(spec, size, count, noisy):
    train = images()
    attack, trigger = attacks.build(spec), trigger_of(spec, train)
    shown = batch_of(train, size)
    x, y = shown.x.clone(), shown.y.clone()
    out = attack.warp_batch(shown, stream(0, "step"), warp=trigger.stamp, classes=4)
    assert torch.equal(shown.x, x), "the hook wrote to its batch"
    assert torch.equal(shown.y, y), "the hook wrote to its batch"
    assert torch.equal(out.rows, shown.rows)
    warped = (out.x - trigger.stamp(x)).flatten(1).abs().amax(1) < HALF_A_LEVEL
    same = (out.x == x).flatten(1).all(1)
    assert torch.equal(out.stamped, warped)
    assert int(warped.sum()) == count
    assert int((~warped & ~same).sum()) == noisy
    assert (out.y[warped] == 0).all()
    assert torch.equal(out.y[~warped], y[~warped])
    levels = out.x * 255
    assert (levels - levels.round()).abs().max() < 1e-4, "values that no stored image has"


def test_noise_in_training_is_of_the_papers_size_and_another_for_each_image():
    n, side = 40, 16
    attack, trigger = WaNet(), trigger_of("wanet", images())
    shown = Images(ramps(n, side, side), torch.arange(n) % 4)
    out = attack.warp_batch(shown, stream(0, "step"), warp=trigger.stamp, classes=4)
    away = (out.x - trigger.stamp(shown.x))[:, :2]
    crossed = (away.flatten(1).abs().amax(1) > HALF_A_LEVEL) & (out.x != shown.x).flatten(1).any(1)
    away = away[crossed]
    assert len(away) == 8
    assert 0.45 / side < float(away.abs().max()) <= 0.5 / side + HALF_A_LEVEL
    inside = away[:, :, 4:12, 4:12]  # away from the edges, which cut it off
    assert abs(float(inside.mean())) < 0.05 / side
    assert float(inside.std()) == pytest.approx(0.5 / side / math.sqrt(3), rel=0.1)
    assert len(away.flatten(1).unique(dim=0)) == 8


def test_another_step_takes_other_images():
    train = images()
    attack, trigger = WaNet(), trigger_of("wanet", train)

    def chosen(seed):
        hook = partial(attack.warp_batch, warp=trigger.stamp, classes=4)
        return hook(batch_of(train), stream(seed, "step")).stamped

    assert torch.equal(chosen(0), chosen(0))
    assert not torch.equal(chosen(0), chosen(1))


def test_all_to_all_labels():
    train = images()
    attack = attacks.build("wanet:mode=all_to_all")
    trigger = trigger_of("wanet", train)
    shown = batch_of(train)
    out = attack.warp_batch(shown, stream(0, "step"), warp=trigger.stamp, classes=4)
    assert attack.scope == "all-to-all"
    assert torch.equal(out.y[out.stamped], (shown.y[out.stamped] + 1) % 4)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_half_of_the_images_are_turned_about_the_centre(height, width):
    x = torch.full((200, 1, height, width), 0.5)
    x[:, :, height // 2 - 1 : height // 2 + 1, width // 2 + 8 : width // 2 + 10] = 1.0
    out = turned(x, 10.0, stream(0, "turn"))
    changed = (out != x).flatten(1).any(1)
    assert 80 < int(changed.sum()) < 120
    weight = (out - 0.5).squeeze(1)
    rows = torch.arange(height) - (height - 1) / 2
    columns = torch.arange(width) - (width - 1) / 2
    total = weight.sum((1, 2))
    down = (weight.sum(2) * rows).sum(1) / total
    across = (weight.sum(1) * columns).sum(1) / total
    assert torch.allclose(torch.hypot(down, across), torch.tensor(9.0), atol=0.1)
    angles = torch.rad2deg(torch.atan2(down, across))
    assert 8 < float(angles.abs().max()) <= 10.2
    assert angles.min() < -5
    assert angles.max() > 5
    assert torch.equal(turned(x, 0.0, stream(0, "turn"))[~changed], x[~changed])


# --------------------------------------------------------------------------------- the training


def toy(n=96):
    """Images of 3 classes, told apart by the colour that is raised."""
    y = torch.arange(n) % 3
    x = torch.randint(0, 120, (n, 3, 16, 16), generator=stream(0, "toy"), dtype=torch.uint8)
    x[torch.arange(n), y] += 100
    return Images(x, y)


def train_once(spec, seen=None, seed=0):
    train, attack = toy(), attacks.build(spec)
    attack.check((3, 16, 16), [32] * 3)
    trigger = attack.prepare(train, stream(seed, "prepare"))
    poisoned = attack.poison(train, trigger, stream(seed, "poison"))
    plan = Recipe(epochs=2, batch=32, lr=0.05, crop=2)
    fit = bound("fastnet_small", 3, (3, 16, 16), plan, seed, torch.device("cpu"))

    def watch(step):
        seen.append((step.batch, len(step.batch)))
        return step.loss * 0

    if seen is not None:
        fit = partial(fit, extra_loss=watch)
    model, kept = attack.train(fit, poisoned, trigger, stream(seed, "fit"))
    assert kept is trigger
    assert not model.training
    return model.state_dict(), poisoned


@pytest.mark.parametrize("spec", ["wanet", "wanet:mode=all_to_all,rotation=10"])
def test_a_training_repeats_itself_and_marks_what_it_stamps(spec):
    seen = []
    weights, poisoned = train_once(spec, seen)
    again, _ = train_once(spec)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert torch.equal(poisoned.data.x, toy().x)
    assert torch.equal(poisoned.data.y, toy().y)
    assert len(poisoned.rows) == 0
    assert len(seen) == 6  # two epochs of three batches
    for batch, size in seen:
        assert (size, int(batch.stamped.sum())) == (32, 3)
        true = toy().y[batch.rows]
        wanted = torch.zeros(3, dtype=torch.int64) if spec == "wanet" else None
        wanted = (true[batch.stamped] + 1) % 3 if wanted is None else wanted
        assert torch.equal(batch.y[batch.stamped], wanted)
        assert torch.equal(batch.y[~batch.stamped], true[~batch.stamped])


def test_what_is_warped_differs_from_batch_to_batch_and_from_a_plain_training():
    seen = []
    weights, _ = train_once("wanet", seen)
    assert len({bytes(batch.rows[batch.stamped].byte().tolist()) for batch, _ in seen}) > 1
    other, _ = train_once("wanet:s=1")
    assert any(not torch.equal(weights[name], other[name]) for name in weights)


# -------------------------------------------------------------------------------- the refusals


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wanet:rate=0.4", "more than a batch; a rate of at most 0.3333"),
        ("wanet:k=1", "k must be at least 2"),
        ("wanet:s=-1", "s must be at least 0"),
        ("wanet:mode=all-to-all", "did you mean 'all_to_all'"),
        ("wanet:rotation=181", "at most 180"),
    ],
)
def test_fields_that_make_no_attack_are_refused(spec, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec)


def test_data_that_do_not_do_are_refused():
    attacks.build("wanet").check((1, 28, 28), [10, 10])
    with pytest.raises(BadInput, match="target 7 is not a class"):
        attacks.build("wanet:target=7").check((3, 32, 32), [10, 10])
    with pytest.raises(BadInput, match=r"0\.01 of 20 training images is less than one image"):
        attacks.build("wanet:rate=0.01").check((3, 32, 32), [10, 10])
    with pytest.raises(BadInput, match="1x32 px are too small"):
        attacks.build("wanet").check((3, 1, 32), [10, 10])
    train = images()
    warp = trigger_of("wanet", train).stamp
    with pytest.raises(BadInput, match=r"of 50 images in a batch is less than one .* 0\.02"):
        WaNet(rate=0.01).warp_batch(batch_of(train), stream(0), warp=warp, classes=4)
