"""DECK's encoder and decoder: where upsampling puts what, and images there and back."""

from __future__ import annotations

from urllib.error import URLError

import pytest
import torch
import toys
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from arena.core.contracts import Images
from arena.core.inversion import codec
from arena.core.inversion.codec import Codec, Encoder, cells_of, train_codec, upsampled
from arena.core.registry import BadInput
from arena.core.seeding import stream

_IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
FEATURES = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])  # one channel, 2 x 2


def test_cells_are_the_pixels_of_each_two_by_two():
    maps = torch.arange(16.0).view(1, 4, 4)
    assert cells_of(maps)[0, 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert cells_of(maps)[0, 1].tolist() == [[8, 9, 12, 13], [10, 11, 14, 15]]


def test_a_cell_over_the_edge_has_fewer_pixels():
    cells = cells_of(torch.ones(1, 3, 3))
    assert cells.shape == (1, 2, 2, 4)
    assert cells.isinf().sum((0, 3)).tolist() == [[0, 2], [2, 3]]


@pytest.mark.parametrize("side", [8, 7])
def test_the_largest_of_each_cell_is_what_pooling_keeps(side):
    maps = torch.rand(2, 3, side, side, generator=stream(0, "maps"))
    assert torch.equal(cells_of(maps).amax(-1), F.max_pool2d(maps, 2, ceil_mode=True))


def test_values_are_repeated():
    whole = upsampled(FEATURES, (4, 3), None)
    assert whole[0].tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4], [3, 3, 4]]


def test_values_go_back_to_where_the_maximum_was():
    places = torch.tensor([[[0, 1], [2, 3]]])
    whole = upsampled(FEATURES, (4, 4), places)
    assert whole[0].tolist() == [[1, 0, 0, 2], [0, 0, 0, 0], [0, 0, 0, 0], [3, 0, 0, 4]]


@pytest.mark.parametrize("how", ["random", "zero", "nearest", "swwae"])
def test_images_of_odd_sides_come_back_in_their_size(how):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 7, 9)
    assert Codec(3, how)(x, torch.randn(1, codec.WIDTH, 7, 9)).shape == x.shape


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize("how", ["random", "zero"])
def test_values_stand_in_the_top_left_of_cells_and_the_rest_is_filled(how, size):
    torch.manual_seed(0)
    made = Codec(3, how)
    made.decoder.deviation.uniform_(0.5, 2)
    height, width = size
    features = torch.rand(4, codec.WIDTH, -(-height // 2), -(-width // 2))
    noise = torch.randn(2, codec.WIDTH, *size)  # each for two images in a row
    filled = (noise * made.decoder.deviation).repeat_interleave(2, 0)
    whole = filled if how == "random" else torch.zeros_like(filled)
    whole[..., ::2, ::2] = features
    got = made.decode(features, size, noise if how == "random" else None)
    assert torch.allclose(got, made.decoder(whole), atol=1e-5)


def test_noise_has_the_deviation_that_pooling_left_out():
    torch.manual_seed(0)
    encoder, x = Encoder(3), torch.rand(4, 3, 8, 8)
    maps = encoder.maps(x)
    windows = maps.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    lost = windows.sort(-1).values[..., :3]
    wanted = lost.std((0, 2, 3, 4), correction=0)
    assert torch.allclose(codec._left_out(encoder, x).flatten(), wanted.clamp_min(1e-3))


def test_training_makes_images_come_back():
    draws = torch.rand(96, 3, 4, 4, generator=stream(0, "squares"))
    squares = (255 * draws).to(torch.uint8).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = Images(squares, torch.arange(96) % 4)
    made = train_codec(images, stream(0, "codec"), encoder_updates=10, decoder_updates=60, batch=32)
    x = images.x.float() / 255
    noise = torch.randn(1, codec.WIDTH, 16, 16, generator=stream(1, "noise"))
    error = float((made(x, noise) - x).square().mean())
    assert error < 0.7 * float(x.var())  # one grey for all would leave the variance
    assert not any(p.requires_grad for p in made.parameters())


def test_decoders_share_the_encoder_that_they_are_given():
    images = toys.images(64, stream(0, "images"))
    few = {"encoder_updates": 2, "decoder_updates": 2, "batch": 16}
    one = train_codec(images, stream(0, "codec"), **few)
    two = train_codec(images, stream(1, "codec"), how="zero", encoder=one.encoder, **few)
    for name, value in one.encoder.state_dict().items():
        assert torch.equal(value, two.encoder.state_dict()[name]), name


def test_a_codec_that_is_not_shipped_is_refused():
    with pytest.raises(BadInput, match=r"no encoder 'imagenets'"):
        codec.shipped("imagenets", "random")


def test_a_file_of_codecs_gives_back_each(tmp_path):
    torch.manual_seed(0)
    one, two = Codec(3, "random"), Codec(3, "zero")
    two.encoder.load_state_dict(one.encoder.state_dict())
    save_file(codec.packed([one, two]), tmp_path / "codec.safetensors")
    x = torch.rand(2, 3, 8, 8)
    back = codec.of_file(tmp_path / "codec.safetensors", "zero")(x)
    assert torch.allclose(back, two(x), atol=1e-2)  # half precision
    with pytest.raises(BadInput, match="no encoder with a decoder for 'swwae'"):
        codec.of_file(tmp_path / "codec.safetensors", "swwae")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(BadInput, match=r"text\.safetensors holds no encoder"):
        codec.of_file(tmp_path / "text.safetensors", "random")


def test_a_file_keeps_the_second_block(tmp_path):
    torch.manual_seed(0)
    made = Codec(3, "zero", [(5, 6)])
    save_file(codec.packed([made]), tmp_path / "codec.safetensors")
    back, x = codec.of_file(tmp_path / "codec.safetensors", "zero"), torch.rand(2, 3, 9, 8)
    seen = back.encoder.perceived(x)
    assert seen.shape == (2, 6, 3, 2)
    assert torch.allclose(seen, made.encoder.perceived(x), atol=1e-2)  # half precision
    bare = Codec(3).encoder
    assert torch.equal(bare.perceived(x), bare(x))


def test_a_second_block_is_trained_on_top_of_the_first_which_stays(monkeypatch):
    monkeypatch.setattr(codec, "_BLOCK", (8, 8))
    monkeypatch.setattr(codec, "_TOP", (8, 8))
    images = toys.images(96, stream(0, "images"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = Encoder(3)
    few = {"batch": 32, "updates": 40}
    made = codec.train_further(first, images, stream(0, "further"), **few)
    x = images.x.float() / 255
    assert torch.equal(made(x), first(x))
    again = codec.train_further(first, images, stream(0, "further"), **few)
    assert torch.equal(made.perceived(x), again.perceived(x))
    raw = codec.train_further(first, images, stream(0, "further"), batch=32, updates=1)
    seen, before = (share_within(one.perceived(x), images.y) for one in (made, raw))
    assert seen < before / 2


def share_within(features: torch.Tensor, y: torch.Tensor) -> float:
    """Of the features' variance, what lies within the classes."""
    flat = features.flatten(1)
    means = torch.stack([flat[y == label].mean(0) for label in y.unique()])
    return float((flat - means[y]).var(0).sum() / flat.var(0).sum())


class VGG(nn.Module):
    """Blocks of 2, 2, 3 and 1 convolutions, as a VGG16 begins."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        before = 3
        for width, count in ((64, 2), (6, 2), (7, 3), (5, 1)):
            for _ in range(count):
                self.features += nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.ReLU())
                before = width
            self.features.append(nn.MaxPool2d(2))


def test_the_first_blocks_of_a_vgg_are_an_encoder(monkeypatch):
    import torchvision

    torch.manual_seed(0)
    vgg = VGG()
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: vgg)
    x = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in _IMAGENET)
    features = (x - mean) / std
    poolings = []
    for layer in vgg.features:
        features = layer(features)
        if isinstance(layer, nn.MaxPool2d):
            poolings.append(features)
    encoder = codec.vgg_encoder("vgg16")
    assert torch.allclose(encoder(x), poolings[0], atol=1e-6)
    assert torch.allclose(encoder.perceived(x), poolings[2], atol=1e-6)
    with pytest.raises(BadInput, match="did you mean 'vgg19'"):
        codec.vgg_encoder("vgg11")


def test_without_a_network_the_shipped_encoder_is_named(monkeypatch):
    import torchvision

    def fails(name, weights):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", fails)
    with pytest.raises(BadInput, match=r"cannot be had .*no route.*; use the shipped encoder"):
        codec.vgg_encoder("vgg16")
