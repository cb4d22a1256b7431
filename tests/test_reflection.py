"""Reflections on glass: the optics by hand, the test of acceptance, the pictures and the attack."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from PIL import Image
from torch import nn

from arena import data as datasets
from arena.attacks.reflection import Reflection
from arena.core import folders, metrics, models, parts, poisoning, reflections, training
from arena.core.contracts import Images
from arena.core.hashing import draw_weights
from arena.core.reflections import GAMMA, LIKENESS, Optics, Panes, natural
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream
from arena.core.victims import bound


def images(n=120, classes=4, channels=3, side=16):
    """Smooth random images: small noise, enlarged, so that reflections have something to hide."""
    noise = torch.rand(n, channels, side // 4, side // 4, generator=stream(0, "images"))
    x = nn.functional.interpolate(noise, (side, side), mode="bilinear")
    return Images((x * 255).round().to(torch.uint8), torch.arange(n) % classes)


def panes(light, alpha, through, darkening=0.0, gamma=GAMMA, balanced=False):
    """Panes with one reflection each, (K, C, H, W); alpha, through, darkening: numbers per pane."""
    light = torch.as_tensor(light, dtype=torch.float32)
    count, (_, height, width) = len(light), light.shape[1:]

    def each(value):
        return torch.as_tensor(value, dtype=torch.float32).expand(count)

    return Panes(
        light,
        each(through).view(-1, 1, 1, 1).expand(count, 1, height, width),
        each(alpha),
        each(darkening),
        draw_weights(light[0].numel(), stream(0, "h")),
        gamma,
        balanced,
    )


# ------------------------------------------------------------------------------------ the optics


def test_a_dot_has_two_ghosts():
    light = torch.zeros(1, 20, 24)
    light[0, 10, 12] = 1.0
    out = reflections.ghost(light, 3, 5, 0.7)
    assert out.shape == (1, 17, 19)
    lit = {tuple(place): float(out[0][tuple(place)]) for place in out[0].nonzero().tolist()}
    assert set(lit) == {(7, 7), (10, 12)}  # 3 px lower and 5 px further right
    assert lit[7, 7] == pytest.approx(0.7)
    assert lit[10, 12] == pytest.approx(0.3)


def test_the_blur_is_a_gaussian_cut_off_at_two_deviations():
    light = torch.zeros(2, 41, 51)
    light[0, 20, 25] = 3.0
    light[1] = 0.4
    out = reflections.blurred(light, 2.2, 41, 51)
    assert float(out[0].sum()) == pytest.approx(3.0, rel=1e-5)
    weights = [math.exp(-((k / 2.2) ** 2) / 2) for k in range(-5, 6)]  # 2 * 2.2, rounded up
    down = out[0, :, 25] / out[0, 20, 25]
    assert down[15:26].tolist() == pytest.approx(weights, rel=1e-4)
    assert down[:15].abs().max() == 0
    assert down[26:].abs().max() == 0
    assert torch.allclose(out[0].sum(0), torch.cat([torch.zeros(20), 3 * torch.tensor(weights)
                          / sum(weights), torch.zeros(20)]), atol=1e-5)  # fmt: skip
    assert torch.allclose(out[1], torch.tensor(0.4), atol=1e-6)  # the edges lose no light


def test_blurring_for_small_images_is_blurring_and_averaging():
    light = torch.rand(3, 64, 48, generator=stream(0, "light"))
    small = reflections.blurred(light, 3.0, 16, 12)
    large = reflections.resized(reflections.blurred(light, 3.0, 64, 48), 16, 12)
    assert small.shape == (3, 16, 12)
    assert torch.allclose(small, large, atol=1e-5)
    assert float(small.mean()) == pytest.approx(float(large.mean()), rel=1e-5)


def test_shrinking_averages_all_pixels():
    picture = torch.zeros(1, 70, 70)
    picture[0, 33, 33] = 1.0
    small = reflections.resized(picture, 10, 10)
    assert float(small.sum()) == pytest.approx(1 / 49, rel=1e-4)


def test_the_frame_keeps_proportions_and_never_shrinks_images():
    assert reflections.frame(32, 32, 560) == (560, 560)
    assert reflections.frame(32, 16, 560) == (560, 280)
    assert reflections.frame(224, 300, 128) == (224, 300)


def test_the_vignette_is_a_bell():
    bell = reflections.vignette(200, 200, 0.9, 0.1)[0]
    assert float(bell.max()) == pytest.approx(1, abs=1e-3)
    assert torch.allclose(bell, bell.flip(0))
    assert torch.allclose(bell, bell.T)
    edge, middle = bell[0, 100], bell[100, 100]
    assert float(edge / middle) == pytest.approx(math.exp(-9 / 4), rel=0.05)  # three deviations
    assert float(bell[0, 0]) == pytest.approx(math.exp(-4.5), rel=0.05)
    low, high = (reflections.vignette(50, 200, top, 0.5)[0] for top in (0.0, 0.999))
    assert torch.allclose(low, bell[:50])
    assert torch.allclose(high, bell[150:])


# -------------------------------------------------------------------------------------- the map


def test_light_adds_up_and_stored_values_do_not():
    x = torch.full((2, 3, 4, 4), 0.5)
    out = panes(torch.full((1, 3, 4, 4), 0.25), alpha=0.8, through=0.2)(x)
    assert out.flatten().tolist() == pytest.approx(
        [(0.8 * 0.5**2.2 + 0.2 * 0.25) ** (1 / 2.2)] * out.numel(), rel=1e-5
    )


def test_a_reflection_is_darkened_by_what_is_too_bright():
    x = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 2, 1, 2)  # one channel has a white pixel
    glass = panes(torch.full((1, 2, 1, 2), 0.8), alpha=0.9, through=0.3, darkening=0.5)
    out = glass(x)[0, :, 0]
    # white pixel: 1.8, an excess of 0.8, so 0.8 - 0.5 * 0.8 = 0.4 of this channel's reflection stay
    assert float(out[0, 1]) == pytest.approx((0.3 * 0.4) ** (1 / 2.2), rel=1e-5)
    assert float(out[0, 0]) == 1.0  # 0.9 + 0.12 is clipped
    assert out[1].tolist() == pytest.approx([(0.3 * 0.8) ** (1 / 2.2)] * 2, rel=1e-5)
    dark = glass(torch.zeros(1, 2, 1, 2))
    assert dark.flatten().tolist() == pytest.approx([(0.3 * 0.8) ** (1 / 2.2)] * 4, rel=1e-5)
    gone = panes(torch.full((1, 2, 1, 2), 0.8), alpha=0.9, through=0.3, darkening=1.1)(x)
    assert float(gone[0, 0, 0, 1]) == 0.0  # 0.8 - 1.1 * 0.8 is below nothing


def test_a_smooth_reflection_is_weighted_by_brightness():
    light = torch.tensor([0.5, 1.0]).view(1, 1, 1, 2)  # mean 0.75
    x = torch.tensor([[0.5, 0.0], [1.0, 0.5]]).view(2, 1, 1, 2)  # means 0.25 and 0.75
    out = panes(light, alpha=0.6, through=0.4, gamma=1.0, balanced=True)(x)
    assert out.flatten().tolist() == pytest.approx([0.5, 0.75, 0.75, 0.75])
    fixed = panes(light, alpha=0.6, through=0.4, gamma=1.0)(x)
    assert fixed.flatten().tolist() == pytest.approx([0.5, 0.4, 0.8, 0.7])
    black = panes(torch.zeros(1, 1, 1, 2), alpha=0.6, through=0.4, gamma=1.0, balanced=True)
    assert black(torch.zeros(1, 1, 1, 2)).abs().max() == 0


def test_each_image_chooses_its_pane_by_its_pixels():
    light = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    glass = panes(light, alpha=0.5, through=0.5)
    x = torch.randint(256, (300, 3, 8, 8), generator=stream(0, "x")).float() / 255
    which = glass.chosen(x)
    assert which.bincount(minlength=5).min() > 30
    assert torch.equal(glass.chosen(x.flip(0)), which.flip(0))
    out = glass(x)
    for k in range(5):
        alone = glass.take(torch.tensor([k]))(x)
        assert torch.allclose(out[which == k], alone[which == k], atol=1e-6)
    several = glass.take(torch.tensor([4, 1]))
    assert len(several) == 2
    assert torch.equal(several.light[0], light[4])


def test_blending_small_images_is_close_to_blending_the_frame():
    """Light is averaged per pixel, where a rendering at full size averages stored values."""
    train, rng = images(40, side=32), stream(0, "scene")
    x = train.x.float() / 255
    scene = reflections.resized(torch.rand(3, 12, 12, generator=rng), 224, 224)
    light = scene.pow(GAMMA)
    double = reflections.ghost(light, 5, 4, 0.65)
    glass = panes(reflections.resized(double, 32, 32)[None], alpha=0.7, through=0.3)
    large = x.repeat_interleave(7, 2).repeat_interleave(7, 3).pow(GAMMA)
    whole = (0.7 * large + 0.3 * reflections.resized(double, 224, 224)).pow(1 / GAMMA)
    rendered = whole.unfold(2, 7, 7).unfold(3, 7, 7).mean((4, 5))
    assert float((glass(x) - rendered).abs().mean()) < 0.5 / 255
    assert float((glass(x) - x).abs().mean()) > 10 / 255  # of an effect this large


# -------------------------------------------------------------------------------- the acceptance


def stripes(low, high, side=16):
    """Columns in turn; the mean inside any window is nearly that of both."""
    return torch.tensor([low, high]).repeat(side // 2).expand(1, side, side)


GOOD = stripes(0.09, 0.21).mT  # across the stripes of the image behind it
CASES = {
    "natural": (stripes(0.2, 0.4), GOOD, True),
    "nothing to see": (stripes(0.2, 0.4), stripes(0.0, 0.0), False),  # a similarity of 1
    "hides the image": (stripes(0.2, 0.4), stripes(0.0, 0.4).mT, False),
    "too bright": (stripes(0.3, 0.3), stripes(0.3, 0.3), False),  # a similarity of 0.8
    "black": (stripes(0.05, 0.05), stripes(0.0, 0.03).mT, False),  # a similarity of 0.77
}


@pytest.mark.parametrize("case", CASES)
def test_acceptance_by_hand(case):
    behind, reflection, passes = CASES[case]
    similarity = metrics.ssim((behind + reflection)[None], behind[None])
    inside = LIKENESS[0] < similarity < LIKENESS[1]
    faint = float(reflection.mean()) <= 0.8 * float(behind.mean())
    lit = float((behind + reflection).max()) >= 0.1
    assert (faint and lit and inside) is passes
    if case in ("too bright", "black"):  # these fail for one reason only
        assert inside
        assert faint is (case == "black")
        assert lit is (case == "too bright")
    glass = panes(reflection[None] / 0.5, alpha=0.5, through=0.5, gamma=1.0)
    passed, likeness = natural(glass, behind[None] / 0.5)
    assert passed.tolist() == [passes]
    assert float(likeness) == pytest.approx(similarity, abs=1e-4)


def test_acceptance_judges_what_is_seen_not_light():
    """The same picture in light: 0.8 compares stored values, and so does the similarity."""
    behind, reflection = stripes(0.2, 0.4), stripes(0.1, 0.1)
    whole = (behind.pow(GAMMA) + reflection.pow(GAMMA)).pow(1 / GAMMA)
    glass = panes(reflection.pow(GAMMA)[None] / 0.5, alpha=0.5, through=0.5)
    x = (behind.pow(GAMMA) / 0.5).pow(1 / GAMMA)
    _, likeness = natural(glass, x[None])
    assert float(likeness) == pytest.approx(metrics.ssim(whole[None], behind[None]), abs=1e-4)


def test_ranking_puts_the_most_natural_pane_first():
    x = stripes(0.4, 0.8)[None]
    weak, strong = stripes(0.0, 0.02).mT, stripes(0.0, 0.4).mT
    light = torch.stack([stripes(0.0, 0.0), weak, strong, GOOD]) / 0.5
    glass = panes(light, alpha=0.5, through=0.5, gamma=1.0)
    each = [natural(glass.take(torch.tensor([k])), x) for k in range(4)]
    assert [bool(passed) for passed, _ in each] == [False, False, False, True]
    off = torch.tensor([abs(float(likeness) - 0.775) for _, likeness in each[:3]])
    assert reflections.ranking(glass, x).tolist() == [3, *off.argsort().tolist()]
    assert off.argsort().tolist() != [0, 1, 2]
    both = torch.cat([x, x / 10])  # on the black one none passes: one image of two is enough
    assert reflections.ranking(glass, both)[0] == 3


# ---------------------------------------------------------------------------------- making panes


def made(kind, count=60, side=24, **fixed):
    pictures = torch.rand(count, 3, side, side, generator=stream(0, "pictures"))
    return Optics(kind, **fixed).panes(pictures, 12, 12, stream(1, "optics"))


def test_draws_lie_in_the_published_ranges():
    glass = made("mixed", 300)
    ghosts = glass.darkening == 0
    assert 0.4 < float(ghosts.float().mean()) < 0.58  # 0.49
    assert 0.55 <= float(glass.alpha.min()) < 0.57
    assert 0.93 < float(glass.alpha.max()) <= 0.95
    assert ((glass.darkening[~ghosts] > 1.08) & (glass.darkening[~ghosts] < 1.18)).all()
    rest = (1 - glass.alpha).view(-1, 1, 1, 1).expand(-1, 1, 12, 12)
    assert torch.allclose(glass.through[ghosts], rest[ghosts])
    peak = glass.through[~ghosts].amax((1, 2, 3)) / (1 - glass.alpha[~ghosts] / 2)
    assert ((peak > 0.9) & (peak <= 1)).all()


def test_ghosts_are_drawn_from_the_published_ranges(monkeypatch):
    seen = []

    def record(light, down, right, share):
        seen.append((down, right, share))
        return light

    monkeypatch.setattr(reflections, "ghost", record)
    made("ghost", 200)
    downs, rights, shares = zip(*seen, strict=True)
    assert set(downs) == set(rights) == set(range(3, 9))
    assert len(set(zip(downs, rights, strict=True))) > 30  # each on its own
    assert all(0.15 <= share <= 0.85 for share in shares)
    assert 60 < sum(share < 0.5 for share in shares) < 140
    seen.clear()
    made("ghost", 3, offset=7, ghost_weight=0.65)
    assert seen == [(7, 7, 0.65)] * 3


def test_the_blur_is_drawn_from_the_published_range(monkeypatch):
    seen = []

    def record(light, sigma, height, width):
        seen.append(sigma)
        return reflections.resized(light, height, width)

    monkeypatch.setattr(reflections, "blurred", record)
    made("out_of_focus", 200)
    assert 1 <= min(seen) < 1.1
    assert 4.9 < max(seen) <= 5
    seen.clear()
    made("out_of_focus", 2, sigma=2.5)
    assert seen == [2.5, 2.5]


def test_a_ghost_pane_is_the_ghost_in_light():
    picture = torch.rand(3, 24, 24, generator=stream(0, "picture"))
    glass = Optics("ghost", 0.7, 4, 0.25).panes([picture], 12, 12, stream(0, "rng"))
    light = reflections.ghost(picture.pow(GAMMA), 4, 4, 0.25)
    assert torch.allclose(glass.light[0], reflections.resized(light, 12, 12))
    assert float(glass.alpha) == pytest.approx(0.7)
    assert torch.allclose(glass.through, torch.tensor(0.3))


def test_a_smooth_pane_is_the_picture_itself():
    picture = torch.rand(3, 24, 24, generator=stream(0, "picture"))
    glass = Optics("smooth").panes([picture], 12, 12, stream(0, "rng"))
    assert torch.allclose(glass.light[0], reflections.resized(picture, 12, 12))
    assert glass.gamma == 1
    assert glass.balanced
    assert not Optics("smooth", alpha=0.4).panes([picture], 12, 12, stream(0, "rng")).balanced


def test_a_fixed_value_moves_no_other_draw():
    one, two = made("mixed"), made("mixed", alpha=0.6)
    assert torch.equal(one.darkening, two.darkening)
    assert torch.equal(one.light, two.light)
    assert torch.allclose(two.alpha, torch.tensor(0.6))


# ------------------------------------------------------------------------------------ the attack

SMALL = {"work_side": 48, "candidates": 6, "select": "acceptance"}


def poisoned(attack, train, seed=0):
    attack.check(tuple(train.x.shape[1:]), train.y.bincount().tolist())
    trigger = attack.prepare(train, stream(seed, "prepare"))
    return trigger, attack.poison(train, trigger, stream(seed, "poison"))


@pytest.mark.parametrize(
    ("fields", "rows", "of_target"),
    [
        ({}, 10, True),  # 0.327 of 30
        ({"of": "data", "rate": 0.1}, 12, True),
        ({"label": "dirty", "rate": 0.1}, 9, False),  # of 90
        ({"label": "dirty", "rate": 0.1, "of": "data"}, 12, False),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_rates_and_labels(fields, rows, of_target, channels):
    train = images(channels=channels)
    attack = Reflection(target=2, **SMALL, **fields)
    trigger, (data, found) = poisoned(attack, train)
    assert len(found) == rows
    assert (train.y[found] == 2).all() if of_target else not (train.y[found] == 2).any()
    assert (data.y[found] == 2).all()
    assert torch.equal(data.x[found], poisoning.stamp(train.x[found], trigger.stamp))
    assert attack.keeps_labels is of_target


@pytest.mark.parametrize("kind", ["ghost", "out_of_focus", "smooth", "mixed"])
def test_every_kind_reflects_images_of_other_classes(kind):
    train = images()
    train.x[train.y == 1] = 255  # the target's own images are never reflected
    train.x[train.y != 1] //= 4
    trigger, _ = poisoned(Reflection(target=1, kind=kind, **SMALL), train)
    assert float(trigger.stamp.light.max()) < 0.3
    assert len(trigger.stamp) == 1


def test_pictures_of_a_folder_are_reflected(red):
    spec = f"reflection:kind=smooth,images={red},candidates=12,count=12,work_side=32,"
    spec += "select=acceptance"
    trigger, _ = poisoned(attacks.build(spec), images())
    seen = {tuple(map(int, light[:, 8, 8].mul(255).round())) for light in trigger.stamp.light}
    assert seen == {(21 * k, 0, 0) for k in range(12)}


def test_the_first_of_the_ranking_are_taken(monkeypatch):
    order, shown = torch.tensor([4, 0, 5, 1, 2, 3]), []

    def rank(panes, x):
        shown.append((panes, x))
        return order

    monkeypatch.setattr(reflections, "ranking", rank)
    trigger, _ = poisoned(Reflection(count=3, **SMALL), images())
    candidates, sample = shown[0]
    assert len(candidates) == 6
    assert sample.shape == (64, 3, 16, 16)
    assert sample.dtype == torch.float32
    assert sample.max() <= 1
    assert torch.equal(trigger.stamp.light, candidates.light[[4, 0, 5]])


def test_several_reflections_are_shared_out_among_the_images():
    train = images()
    trigger, (data, rows) = poisoned(Reflection(count=4, **SMALL), train)
    x = train.x[rows].float() / 255
    assert len(trigger.stamp.chosen(x).unique()) > 1
    alone = torch.cat([poisoning.stamp(image[None], trigger.stamp) for image in train.x[rows]])
    assert torch.equal(alone, data.x[rows])


def test_the_same_seed_makes_the_same_set():
    attack, train = Reflection(**SMALL), images()
    one, two, other = (poisoned(attack, train, seed) for seed in (3, 3, 4))
    assert torch.equal(one[1].data.x, two[1].data.x)
    assert torch.equal(one[1].rows, two[1].rows)
    assert not torch.equal(one[0].stamp.light, other[0].stamp.light)


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"of": "data", "rate": 0.5}, (3, 16, 16), "only 30 may be poisoned"),
        ({}, (3, 16, 10), "16x10 px are too small"),
        ({"offset": 48, "work_side": 48}, (3, 16, 16), "leaves nothing of a frame of 48x48"),
        ({"count": 91, "candidates": 99}, (3, 16, 16), "90 pictures make no 91"),
        (
            {"select": "effective", "surrogate": "fastnet_smal"},
            (3, 16, 16),
            "surrogate: no network",
        ),
        ({"select": "effective"}, (3, 15, 15), "16 pixels"),
        ({"target": 4}, (3, 16, 16), "target 4 is not a class"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_computed(fields, shape, message):
    with pytest.raises(BadInput, match=message):
        Reflection(**fields).check(shape, [30] * 4)


def test_folders_are_checked_too(tmp_path, red):
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="empty' holds no picture"):
        Reflection(images=str(tmp_path / "empty")).check((3, 16, 16), [30] * 4)
    with pytest.raises(BadInput, match="12 pictures make no 13"):
        Reflection(images=red, count=13).check((3, 16, 16), [30] * 4)
    with pytest.raises(BadInput, match="1 or 3 channels, not 2"):
        Reflection(images=red).check((2, 16, 16), [30] * 4)


def test_fields_that_do_not_go_together_are_refused():
    with pytest.raises(BadInput, match="offset is only for kind=ghost or mixed, not kind=smooth"):
        Reflection(kind="smooth", offset=3)
    with pytest.raises(BadInput, match="sigma is only for kind=out_of_focus or mixed"):
        Reflection(kind="ghost", sigma=3.0)
    with pytest.raises(BadInput, match="raise candidates"):
        Reflection(count=33)
    with pytest.raises(BadInput, match="there is no folder"):
        Reflection(images="/no/such/folder")


# ---------------------------------------------------------------------- the effective reflections


class Sees(nn.Module):
    """A surrogate that calls an image the target's where it is redder than `level`."""

    def __init__(self, level):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))

    def forward(self, x):
        red = x[:, 0].mean((1, 2)) - self.level
        return torch.stack([torch.zeros_like(red), red], 1)


class Kept:
    """A checkpoint in memory that stops the work after some saves."""

    def __init__(self, stop_after=99):
        self.state, self.left = None, stop_after

    def load(self):
        return self.state

    def save(self, state):
        self.state, self.left = dict(state), self.left - 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.fixture
def red(tmp_path):
    """A folder of twelve pictures of growing red."""
    for k in range(12):
        Image.new("RGB", (20, 30), (21 * k, 0, 0)).save(tmp_path / f"{k:02}.png")
    return str(tmp_path)


@pytest.fixture
def planted_surrogate(monkeypatch):
    """Surrogates that are not trained; what each was poisoned with is recorded."""
    seen = []

    def train_surrogate(self, rest, panes, rng):
        seen.append((rest, panes))
        return Sees(0.5)

    monkeypatch.setattr(Reflection, "_train_surrogate", train_surrogate)
    monkeypatch.setattr(reflections, "ranking", lambda panes, x: torch.arange(len(panes)).flip(0))
    return seen


def effective(red, **changes):
    fields = {"target": 1, "kind": "smooth", "alpha": 0.5, "images": red, "candidates": 12}
    fields |= {"select": "effective", "rounds": 6, "used": 3, "work_side": 16}
    return Reflection(**{**fields, **changes})


def test_the_reflection_that_fools_the_surrogates_most_is_taken(planted_surrogate, red):
    train = images()
    train.x[:] = torch.arange(120, dtype=torch.uint8).view(-1, 1, 1, 1)  # up to 119 of 255
    trigger = effective(red).prepare(train, stream(0, "prepare"))
    # above 0.5 are the images with 0.5 x + 0.5 r > 127.5: of the redder half of the pictures the
    # reddest, 231, sends all from 25 on to the target
    assert float(trigger.stamp.light[0, 0].mean()) == pytest.approx(231 / 255, abs=1e-3)
    assert len(trigger.stamp) == 1
    assert len(planted_surrogate) == 6
    assert all(len(panes) == 3 for _, panes in planted_surrogate)
    inside = [float(panes.light[:, 0].mean((1, 2)).max()) > 0.9 for _, panes in planted_surrogate]
    assert inside.index(True) < 5
    assert all(inside[inside.index(True) :]), "the best one known is not used again"
    rest = planted_surrogate[0][0]
    assert len(rest) < 120  # the judges are kept from the surrogates
    assert (rest.y == 1).sum() == 30


def test_unused_reflections_get_the_median_and_used_ones_their_flips(planted_surrogate, red):
    train = images(n=160)
    train.x[:] = (torch.arange(160) % 120).to(torch.uint8).view(-1, 1, 1, 1)
    made = effective(red, rounds=1)._effective(train, stream(0, "part"), None)
    scores, reds = made["scores"], made["light"][:, 0].mean((1, 2)) * 255
    assert len(scores) == 6  # the better half
    used = planted_surrogate[0][1].light[:, 0].mean((1, 2)) * 255
    judged = train.x[train.y != 1][:, 0, 0, 0].float()  # fewer than 200: all of them
    flips = {round(float(r)): float((judged + r > 255).float().mean()) for r in reds}
    share = torch.tensor([flips[round(float(r))] for r in used])
    for r, score in zip(reds, scores, strict=True):
        known = round(float(r)) in {round(float(u)) for u in used}
        expected = flips[round(float(r))] if known else float(share.median())
        assert float(score) == pytest.approx(expected, abs=0.02)


def test_a_stopped_selection_goes_on_where_it_was(planted_surrogate, red):
    train, attack = images(), effective(red)
    whole = attack._effective(train, stream(0, "part"), None)
    rounds = len(planted_surrogate)
    checkpoint = Kept(stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        attack._effective(train, stream(0, "part"), checkpoint)
    again = attack._effective(train, stream(0, "part"), checkpoint)
    assert len(planted_surrogate) == 2 * rounds
    assert torch.equal(whole["scores"], again["scores"])
    assert torch.equal(whole["light"], again["light"])


def test_the_selection_is_a_part_that_follows_the_pictures(planted_surrogate, red, monkeypatch):
    asked = []

    def trained(name, settings, data, make, *, seed=0):
        asked.append(settings)
        return dict(make(stream(0, name), None))

    monkeypatch.setattr(parts, "trained", trained)
    attack, train = effective(red), images()
    one, two = (attack.prepare(train, stream(seed, "prepare")) for seed in (0, 1))
    assert torch.equal(one.stamp.light, two.stamp.light)  # the same for all seeds
    assert asked[0] == asked[1]
    assert red not in str(asked[0])  # a folder counts by what is in it
    assert asked[0]["rounds"] == 6
    assert asked[0]["pictures"] == folders.digest(red)


def test_a_real_surrogate_is_trained_on_reflections(monkeypatch):
    quick = dataclasses.replace(training.RECIPES["smoke"], min_steps=3, batch=32)
    monkeypatch.setattr(training, "recipe", lambda name, overrides=None: quick)
    attack = Reflection(**{**SMALL, "select": "effective"}, rounds=1, used=2)
    train, seen, fit = images(), [], training.fit

    def watched(model, data, *rest, **hooks):
        seen.append(data)
        return fit(model, data, *rest, **hooks)

    monkeypatch.setattr(training, "fit", watched)
    trigger, _ = poisoned(attack, train)
    assert len(trigger.stamp) == 1
    made = attack._effective(train, stream(9, "part"), None)
    again = attack._effective(train, stream(9, "part"), None)
    assert torch.equal(made["scores"], again["scores"])
    changed = (seen[0].x[:, None] != train.x).flatten(2).any(2).all(1)
    assert int(changed.sum()) == 10  # 0.327 of the 30 images of the target class
    assert (seen[0].y[changed] == 0).all()


# ------------------------------------------------------------------------------------- training


def test_a_dirty_label_reflection_is_learnt(tmp_path):
    data = datasets.load("signs:classes=5,size=300", cache_dir=tmp_path)
    attack = Reflection(
        label="dirty", rate=0.4, kind="smooth", alpha=0.5, work_side=64, select="acceptance"
    )
    trigger, (train, _) = poisoned(attack, data.train)
    plan = training.recipe("smoke", models.info("fastnet_small").overrides["smoke"])
    plan = training.changed(plan, {"min_steps": 24, "batch": 64})
    fit = bound("fastnet_small", 5, data.shape, plan, 0, torch.device("cpu"))
    model = fit(train, rng=stream(0, "fit"))
    others = data.test.x[data.test.y != 0]
    before, after = (
        float((training.logits(model, x).argmax(1) == 0).float().mean())
        for x in (others, poisoning.stamp(others, trigger.stamp))
    )
    assert after > before + 0.3
