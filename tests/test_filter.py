"""Photo filters: the stages by hand, the whole of them as ImageMagick gives them, gradients."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch

from arena.attacks.filter import Through
from arena.core import filters, poisoning
from arena.core.contracts import Images
from arena.core.filters import FILTERS
from arena.core.registry import BadInput, attacks
from arena.core.seeding import stream

KINDS = sorted(FILTERS)
ONE, TWO = (200, 100, 40), (30, 60, 250)

# From ImageMagick 6.9.11 Q16 (through Wand), on a picture of 9x9 px with five columns of colour ONE
# and four of TWO: the pixels (row, column) named below, in [0, 1].
PIXELS = ((4, 4), (0, 0), (8, 8), (4, 6))
IMAGEMAGICK = {
    "gotham": (
        (0.45078, 0.41973, 0.46851),
        (0.45078, 0.41973, 0.46851),
        (0.48806, 0.50857, 0.64703),
        (0.48806, 0.50857, 0.64703),
    ),
    "nashville": (
        (0.80491, 0.46809, 0.30924),
        (0.80491, 0.46809, 0.30924),
        (0.16219, 0.24570, 0.90811),
        (0.16219, 0.24570, 0.90811),
    ),
    "kelvin": (
        (0.78480, 0.58962, 0.39226),
        (0.78480, 0.58962, 0.39226),
        (0.62843, 0.58647, 0.66958),
        (0.62843, 0.58647, 0.66958),
    ),
    "lomo": (
        (1.0, 0.0, 0.15686),
        (0.05719, 0.0, 0.00897),
        (0.0, 0.0, 0.05608),
        (0.0, 0.0, 0.65359),
    ),
    "toaster": (
        (0.87802, 0.28106, 0.09593),
        (0.71571, 0.35280, 0.18193),
        (0.27221, 0.23352, 0.65017),
        (0.31212, 0.20896, 0.47526),
    ),
}


def colours(*levels):
    """(N, 3, 1, 1) float64 images of one pixel each, from levels of 8 bits."""
    return torch.tensor(levels, dtype=torch.float64)[:, :, None, None] / 255


def noise(n=6, side=12, dtype=torch.float32):
    x = torch.randint(256, (n, 3, side, side), generator=stream(0, "noise"), dtype=torch.uint8)
    return x.to(dtype) / 255


# -------------------------------------------------------------------------------- whole filters


@pytest.mark.parametrize("kind", KINDS)
def test_imagemagick_gives_the_same_pixels(kind):
    x = torch.empty(1, 3, 9, 9)
    x[:, :, :, :5] = colours(ONE)
    x[:, :, :, 5:] = colours(TWO)
    out = FILTERS[kind].apply(x)[0]
    for (row, column), expected in zip(PIXELS, IMAGEMAGICK[kind], strict=True):
        assert out[:, row, column].tolist() == pytest.approx(expected, abs=5e-5)


def test_gotham_of_one_pixel_by_hand():
    out = filters.gotham(colours(ONE)).flatten().tolist()
    hue, light, chroma = colorsys.rgb_to_hls(*(level / 255 for level in ONE))
    found = []
    for value, navy in zip(
        colorsys.hls_to_rgb(hue, light * 1.2, chroma * 0.1), (34, 43, 109), strict=True
    ):
        value = (0.8 * value + 0.2 * navy / 255) ** (1 / 0.9)
        for _ in range(2):
            value = logistic_contrast(value, 3, 0.5)
        found.append(value)
    assert out == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("colour", [(128, 128, 128), (160, 90, 60), (70, 120, 190)])
def test_every_pixel_of_a_grey_or_coloured_picture_changes(kind, colour):
    x = torch.tensor(colour, dtype=torch.uint8)[None, :, None, None].expand(2, 3, 32, 32)
    out = poisoning.stamp(x, FILTERS[kind].apply)
    assert (out != x).any(1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (15, 22), (1, 1)])
def test_a_filter_is_a_pure_map_of_single_images(kind, height, width):
    x = torch.rand(6, 3, height, width, generator=stream(0, "x"))
    x[0], x[1] = 0.0, 1.0
    x[2] = x[2].round()
    before = x.clone()
    out = FILTERS[kind].apply(x)
    assert torch.equal(x, before), "the filter wrote to its argument"
    assert out.dtype == torch.float32
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert 0 <= out.min() <= out.max() <= 1
    alone = torch.cat([FILTERS[kind].apply(image[None]) for image in x])
    assert (alone - out).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_everywhere(kind):
    cases = [torch.full((2, 3, 4, 4), value) for value in (0.0, 1.0, 0.5, 1e-7, 1 - 1e-6)]
    cases += [noise(2, 4), noise(2, 4).round(), noise(2, 4) * 1e-6, 1 - noise(2, 4) * 1e-6]
    dark = torch.zeros(1, 3, 16, 16)
    dark[0, 0, 0, 0] = 1 / 255  # the darkest image but the black one
    for x in [*cases, dark, 1 - dark]:
        x = x.clone().requires_grad_()
        FILTERS[kind].apply(x).sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lomo"])
def test_gradients_are_right(kind):
    x = (0.1 + 0.8 * noise(2, 3, torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(FILTERS[kind].apply, x, eps=1e-7, atol=1e-5)
    weights = torch.autograd.grad(FILTERS[kind].apply(x).square().sum(), x)[0]
    assert (weights != 0).float().mean() > 0.5


# ------------------------------------------------------------------------------------ the stages


@pytest.mark.parametrize(
    ("brightness", "saturation"), [(1.2, 0.1), (1.5, 0.8), (1.0, 1.5), (1.2, 0.5), (0.6, 0.7)]
)
def test_modulate_is_that_of_hsl(brightness, saturation):
    levels = torch.randint(256, (200, 3), generator=stream(0, "levels")).tolist()
    levels += [[0, 0, 0], [255, 255, 255], [255, 0, 0], [128, 128, 128], [1, 0, 0], [255, 255, 254]]
    found = filters.modulate(colours(*levels), brightness, saturation).flatten(1).tolist()
    for level, out in zip(levels, found, strict=True):
        hue, light, chroma = colorsys.rgb_to_hls(*(value / 255 for value in level))
        light *= brightness
        expected = (1.0, 1.0, 1.0)  # lighter than white: clipped, whatever the hue
        if light < 1:
            expected = colorsys.hls_to_rgb(hue, light, chroma * saturation)
        assert out == pytest.approx([min(max(v, 0.0), 1.0) for v in expected], abs=1e-4)


def logistic_contrast(value, contrast, midpoint):
    def curve(at):
        return 1 / (1 + math.exp(contrast * (midpoint - at)))

    return (curve(value) - curve(0)) / (curve(1) - curve(0))


@pytest.mark.parametrize(("contrast", "midpoint"), [(3.0, 0.5), (7.0, 0.3)])
def test_sigmoidal_contrast_is_the_scaled_logistic_curve(contrast, midpoint):
    levels = [0, 1, 60, 127, 128, 200, 254, 255]
    x = colours(*([level] * 3 for level in levels))
    once = filters.sigmoidal_contrast(x, contrast, midpoint)
    twice = filters.sigmoidal_contrast(x, contrast, midpoint, times=2)
    for index, level in enumerate(levels):
        expected = logistic_contrast(level / 255, contrast, midpoint)
        assert float(once[index, 1]) == pytest.approx(expected, abs=1e-12)
        expected = logistic_contrast(expected, contrast, midpoint)
        assert float(twice[index, 1]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("contrast", "midpoint"), [(3.0, 0.5), (10.0, 0.2), (7.0, 0.3)])
def test_sigmoidal_contrast_stays_in_range_where_it_rounds(contrast, midpoint):
    ends = torch.tensor([0.0, 1.0]).expand(1, 3, 8, 2)
    out = filters.sigmoidal_contrast(ends, contrast, midpoint, times=2)
    assert 0 <= out.min() <= out.max() <= 1


@pytest.mark.parametrize("value", [0.9, 1.2, 2.0])
def test_gamma(value):
    levels = list(range(256))
    out = filters.gamma(colours(*([level] * 3 for level in levels)), value)[:, 2].flatten()
    expected = [(level / 255) ** (1 / value) for level in levels]
    assert out.tolist() == pytest.approx(expected, abs=1e-12)


def test_auto_gamma_brings_a_grey_to_the_middle_with_one_exponent_per_image():
    out = filters.auto_gamma(colours([40] * 3, [230] * 3))
    assert out.flatten().tolist() == pytest.approx([0.5] * 6, abs=1e-9)
    x = torch.stack([colours(ONE)[0], colours(TWO)[0]], -1).view(1, 3, 1, 2)
    mean = (200 + 100 + 40 + 30 + 60 + 250) / 6 / 255
    power = math.log(0.5) / math.log(mean)
    expected = [[(level / 255) ** power for level in pair] for pair in zip(ONE, TWO, strict=True)]
    for row, wanted in zip(filters.auto_gamma(x)[0, :, 0].tolist(), expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-9)
    assert filters.auto_gamma(torch.zeros(1, 3, 4, 4)).max() == 0
    assert filters.auto_gamma(torch.ones(1, 3, 4, 4)).min() == 1


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_color_tone(negate, share):
    out = filters.color_tone(colours(ONE), filters.SAND, share, negate=negate).flatten().tolist()
    grey = (0.212656 * 200 + 0.715158 * 100 + 0.072186 * 40) / 255
    opacity = share * (1 - grey if negate else grey)
    for value, level, tint in zip(out, ONE, (247, 218, 174), strict=True):
        mixed = (opacity * tint + (1 - share) * level) / 255 / (opacity + 1 - share)
        assert value == pytest.approx(mixed, abs=1e-9)


def test_colorize():
    out = filters.colorize(colours(ONE), filters.ORANGE, 0.2).flatten() * 255
    assert out.tolist() == pytest.approx([0.8 * 200 + 51, 0.8 * 100 + 0.2 * 153, 0.8 * 40])


def test_level_stretches_the_channels_named():
    x = colours((0, 0, 0), (51, 51, 51), (102, 102, 102), (153, 153, 153), (255, 255, 255))
    out = filters.level(x, 0.2, 0.6, (True, False, True)).flatten(1)
    assert out[:, 0].tolist() == pytest.approx([0, 0, 0.5, 1, 1])
    assert out[:, 1].tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 1])
    assert torch.equal(out[:, 2], out[:, 0])


def test_lomo_cuts_at_half_the_range_of_8_bits():
    levels = torch.arange(256).view(1, 1, 1, 256).expand(1, 3, 1, 256) / 255
    out = filters.level(levels, 127 / 255, 128 / 255, (True, True, False))
    assert torch.allclose(out[0, :2, 0], (torch.arange(256) >= 128).float(), atol=2e-5)
    assert torch.allclose(out[0, 2], levels[0, 2])


def test_a_vignette_grows_with_the_distance_from_the_centre():
    x = torch.zeros(1, 3, 32, 32)
    out = filters.vignette(x, filters.BLACK)
    assert out.shape == (3, 32, 32)
    # a gradient of 48 px: its radius is 23.5; the corners lie 15.5 px from both middles
    assert float(out[0, 0, 0]) == pytest.approx(1 - 15.5 * math.sqrt(2) / 23.5, abs=1e-6)
    assert float(out[1, 15, 31]) == pytest.approx(1 - math.hypot(0.5, 15.5) / 23.5, abs=1e-6)
    assert torch.allclose(out, out.flip(1))
    assert torch.allclose(out, out.transpose(1, 2))
    inward = filters.vignette(x, filters.CORAL, inward=True)
    share = 1 - math.hypot(0.5, 15.5) / 23.5
    assert float(inward[1, 15, 31]) == pytest.approx(1 - share * 0.4, abs=1e-6)
    assert (inward[0] == 1).all()
    wide = filters.vignette(torch.zeros(1, 3, 10, 40), filters.BLACK)  # the longer side decides
    assert float(wide[0, 4, 0]) == pytest.approx(1 - math.hypot(0.5, 19.5) / 29.5, abs=1e-6)


# ------------------------------------------------------------------------------------ the attack


def images(n=100, channels=3):
    x = torch.randint(256, (n, channels, 8, 8), generator=stream(0, "x"), dtype=torch.uint8)
    return Images(x, torch.arange(n) % 5)


def test_every_filter_can_be_asked_for_and_has_a_version():
    (field,) = [f for f in attacks.describe("filter").fields if f.name == "kind"]
    assert sorted(field.choices) == KINDS
    for kind, entry in FILTERS.items():
        assert entry.version == f"{kind}@1"
        trigger = attacks.build(f"filter:kind={kind}").prepare(images(), stream(0))
        assert trigger.stamp.version == entry.version
        assert torch.equal(trigger.stamp(noise()), entry.apply(noise()))


def test_a_filter_of_another_version_is_not_taken_for_this_one():
    with pytest.raises(ValueError, match="has lomo@1, not lomo@2"):
        Through("lomo@2")(noise())


def test_universal_and_label_specific():
    train = images()

    def poison(spec):
        attack = attacks.build(spec)
        trigger = attack.prepare(train, stream(0, "trigger"))
        return attack, trigger, attack.poison(train, trigger, stream(0, "poison"))

    attack, trigger, (data, rows) = poison("filter:rate=0.2,kind=toaster")
    assert (attack.scope, len(rows)) == ("universal", 20)
    assert not (train.y[rows] == 0).any()
    assert (data.y[rows] == 0).all()
    assert torch.equal(data.x[rows], poisoning.stamp(train.x[rows], trigger.stamp))
    attack, _, (data, rows) = poison("filter:victim=2,target=4,rate=0.2")
    assert (attack.scope, len(rows)) == ("label-specific", 4)  # of the 20 images of class 2
    assert (train.y[rows] == 2).all()
    assert (data.y[rows] == 4).all()
    _, _, (data, rows) = poison("filter:extend=true")
    assert len(data) == 110


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ("filter", (1, 28, 28), "three channels .* have 1; take another attack"),
        ("filter:victim=0", (3, 32, 32), "both 0"),
        ("filter:victim=9", (3, 32, 32), "victim 9 is not a class"),
        ("filter:rate=0.9", (3, 32, 32), "only 80 may be poisoned"),
        ("filter:rate=0.001", (3, 32, 32), "less than one image"),
    ],
)
def test_data_that_do_not_do_are_refused(spec, shape, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec).check(shape, [20] * 5)


def test_an_unknown_filter_is_refused():
    with pytest.raises(BadInput, match="did you mean 'gotham'"):
        attacks.build("filter:kind=gothem")
