"""DECK's triggers: features changed region by region, decoded, and held near the original."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import toys
from torch.nn import functional as F

from arena.core.contracts import Images
from arena.core.inversion.codec import WIDTH, Codec, train_codec
from arena.core.inversion.engine import Problem, check_images, invert, stamped
from arena.core.inversion.frozen import Frozen
from arena.core.metrics import similarity
from arena.core.registry import BadInput
from arena.core.seeding import stream
from arena.inversions import deck
from arena.inversions.deck import Deck
from arena.inversions.nc import NC

SIDE = toys.SIDE


@pytest.fixture(scope="module")
def codec() -> Codec:
    images = toys.images(96, stream(0, "images"))
    return train_codec(images, stream(0, "codec"), encoder_updates=10, decoder_updates=30, batch=16)


@pytest.fixture(autouse=True)
def small(monkeypatch, codec):
    monkeypatch.setattr(deck, "shipped", lambda name, how: codec)


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=stream(0, "x"))


def started(family: Deck, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """A start without noise: nothing but what the codec loses is changed."""
    at = family.begin(x, stream(0, "deck"))
    return {**at, "kernels": torch.zeros_like(at["kernels"])}


def eyes(count: int, regions: int) -> torch.Tensor:
    """(count, regions², 64, 64, 3, 3): kernels that change nothing."""
    eye = torch.zeros(count, regions**2, WIDTH, WIDTH, 3, 3)
    eye[:, :, torch.arange(WIDTH), torch.arange(WIDTH), 1, 1] = 1.0
    return eye


def test_kernels_add_to_what_the_codec_makes_of_an_image(codec):
    family, x = Deck(), images(1)
    at = started(family, x)
    at |= {"mean": at["_mean"], "deviation": at["_deviation"]}  # of one image: its own
    wanted = codec(x, at["_noise"][None]).clamp(0, 1)
    assert torch.allclose(stamped(family, at, x), wanted, atol=1e-4)
    features = codec.encoder(x)
    doubled = codec.decode(2 * features, (SIDE, SIDE), at["_noise"][None]).clamp(0, 1)
    shown = stamped(family, at | {"kernels": eyes(1, family.regions)[0]}, x)
    assert torch.allclose(shown, doubled, atol=1e-4)


def test_low_precision_is_for_gradients_alone(monkeypatch):
    """What is reported of a trigger is of its images in float32."""
    asked = []
    monkeypatch.setattr(
        deck.training, "autocast", lambda device: (asked.append(device), nullcontext())[1]
    )
    family, x = Deck(), images()
    at = {name: value[None] for name, value in family.begin(x, stream(0, "deck")).items()}
    with torch.no_grad():
        family.size(at, x[None], family.stamp(at, x[None]))
    assert not asked
    family.penalty(at, x[None], family.stamp(at, x[None]))
    assert len(asked) == 2


def test_a_kernel_changes_its_region_alone():
    family = Deck(regions=2)
    features = torch.randn(1, 2, WIDTH, 8, 8, generator=stream(0, "features"))
    kernels = eyes(1, 2)
    kernels[0, 1] = 0  # first row, second column
    out = family._regional(kernels, features)
    wanted = features.clone()
    wanted[..., :4, 4:] = 0
    assert torch.allclose(out, wanted, atol=1e-6)


def test_regions_are_convolved_apart_from_each_other_with_zeros_around():
    family = Deck(regions=2)
    kernels = torch.randn(1, 4, WIDTH, WIDTH, 3, 3, generator=stream(0, "kernels"))
    features = torch.randn(1, 3, WIDTH, 8, 8, generator=stream(0, "features"))
    out = family._regional(kernels, features)
    part = F.conv2d(features[0, :, :, 4:, :4], kernels[0, 2], padding=1)
    assert torch.allclose(out[0, :, :, 4:, :4], part, atol=1e-3)


@pytest.mark.parametrize(("side", "regions"), [(7, 2), (8, 3)])
def test_regions_need_not_divide_the_map(side, regions):
    family = Deck(regions=regions)
    features = torch.randn(2, 2, WIDTH, side, side, generator=stream(0, "features"))
    same = family._regional(eyes(2, regions), features)
    assert torch.allclose(same, features, atol=1e-6)


def test_all_images_get_the_mean_and_deviation_that_are_learned(codec, monkeypatch):
    family, x = Deck(), images()
    seen = []
    maps = codec.encoder.maps
    monkeypatch.setattr(codec.encoder, "maps", lambda shown: (seen.append(shown), maps(shown))[1])
    at = started(family, x) | {
        "mean": torch.tensor([0.1, 0.5, 0.9]),
        "deviation": torch.tensor([0.1, 0.2, 0.3]),
    }
    stamped(family, at, x)
    for image in seen[0]:
        assert image.mean((1, 2)).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=1e-4)
        assert image.std((1, 2), correction=0).tolist() == pytest.approx([0.1, 0.2, 0.3], rel=1e-3)


@torch.no_grad()
def test_the_four_losses_by_hand(codec):
    x, shown = images(6).view(2, 3, 3, SIDE, SIDE), images(12)[6:].view(2, 3, 3, SIDE, SIDE)
    at = {
        "mean": torch.tensor([[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]]),
        "_mean": torch.tensor([[0.4, 0.6, 0.5], [0.2, 0.2, 0.2]]),
        "deviation": torch.full((2, 3), 0.3),
        "_deviation": torch.tensor([[0.3, 0.3, 0.3], [0.1, 0.1, 0.1]]),
    }
    off = dict.fromkeys(("content", "ssim", "smooth", "norm"), 0.0)

    def only(name: str) -> torch.Tensor:
        return Deck(**{**off, name: 2.0}).penalty(at, x, shown)

    features = [255 * codec.encoder(part.flatten(0, 1)) for part in (x, shown)]
    content = (features[0] - features[1]).square().reshape(2, -1).mean(1)
    assert torch.allclose(only("content"), 2 * content, rtol=1e-4)
    assert torch.allclose(Deck().size(at, x, shown), content, rtol=1e-4)
    unlike = 1 - similarity(x.flatten(0, 1), shown.flatten(0, 1)).view(2, 3).mean(1)
    assert torch.allclose(only("ssim"), 2 * unlike)
    edges = F.unfold(F.pad(shown.flatten(0, 1), (1,) * 4, value=torch.nan), 3)
    near = edges.view(6, 3, 9, SIDE, SIDE).nanmean(2).view_as(shown)
    rough = (255 * (shown - near)).square().reshape(2, -1).mean(1)
    assert torch.allclose(only("smooth"), 2 * rough, rtol=1e-4)
    assert only("norm").tolist() == pytest.approx([2 * 255 * 0.2 / 3, 2 * 255 * 0.2])
    every = sum(only(name) for name in off)
    assert torch.allclose(Deck(content=2, ssim=2, smooth=2, norm=2).penalty(at, x, shown), every)


@torch.no_grad()
def test_distances_are_of_the_last_block_s_features(monkeypatch):
    torch.manual_seed(0)
    deeper = Codec(3, further=[(5, 6)])
    monkeypatch.setattr(deck, "shipped", lambda name, how: deeper)
    x, shown = images(4), images(8)[4:]
    apart = deeper.encoder.perceived(x) - deeper.encoder.perceived(shown)
    assert Deck().perceived(x, shown) == pytest.approx(float(apart.square().mean()))
    assert Deck().seen_by == "cifar10, pooling 2"


def test_a_size_is_of_the_images_that_it_is_asked_for(codec):
    family, x = Deck(), images(4)[None]
    at = {name: value[None] for name, value in started(family, x[0]).items()}
    shown, other = family.stamp(at, x), x.flip(1).clone()
    with torch.enable_grad():
        shown = shown.requires_grad_()
        family.penalty(at, x, shown)
    encoded: list[torch.Tensor] = []
    with codec.encoder.register_forward_hook(lambda *found: encoded.append(found[-1])):
        known = family.size(at, x, shown)
    assert not encoded, "what the loss knew was encoded again"
    assert torch.allclose(known, Deck().size(at, x, shown), rtol=0.01)
    assert torch.equal(family.size(at, x, other), Deck().size(at, x, other))
    assert torch.equal(family.size(at, other, shown), Deck().size(at, other, shown))
    assert torch.equal(family.size(at, x, shown.clone()), Deck().size(at, x, shown))


def test_a_trigger_is_found_where_a_colour_decides():
    frozen, toy = Frozen(toys.planted(), "fp32"), toys.images(60, stream(0, "images"))
    images = Images(toy.x, toy.y)
    search = deck.Search(samples=6, batch=6, steps=40, cost=1e-4, lr=0.02)
    found = invert(frozen, Deck(), [Problem(1, 2)], images, search)[0]
    assert found.asr >= 0.9
    assert found.size is not None
    again = invert(frozen, Deck(), [Problem(2, 0), Problem(1, 2)], images, search)[1]
    assert again.size == pytest.approx(found.size, rel=0.03)  # kernels round by the batch's size


def test_images_of_other_channels_are_refused():
    grey = Images(torch.zeros(6, 1, SIDE, SIDE, dtype=torch.uint8), torch.arange(6) % 2)
    with pytest.raises(BadInput, match="takes images of 3 channels, these have 1"):
        check_images(Deck(), [Problem(0, 1)], grey, samples=2)
    check_images(NC(), [Problem(0, 1)], grey, samples=2)


def test_noise_is_drawn_once_per_trigger():
    family, x = Deck(), images()
    at = family.begin(x, stream(0, "deck"))
    assert torch.equal(stamped(family, at, x), stamped(family, at, x))
    other = family.begin(x, stream(1, "deck"))
    assert not torch.equal(at["_noise"], other["_noise"])
