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


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        convs = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.features = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), nn.MaxPool2d(2))


def test_the_first_block_of_a_vgg_is_an_encoder(monkeypatch):
    import torchvision

    torch.manual_seed(0)
    vgg = VGG()
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: vgg)
    x = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in _IMAGENET)
    wanted = vgg.features((x - mean) / std)
    assert torch.allclose(codec.vgg_encoder("vgg16")(x), wanted, atol=1e-6)
    with pytest.raises(BadInput, match="did you mean 'vgg19'"):
        codec.vgg_encoder("vgg11")


def test_without_a_network_the_shipped_encoder_is_named(monkeypatch):
    import torchvision

    def fails(name, weights):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models, "get_model", fails)
    with pytest.raises(BadInput, match=r"cannot be had .*no route.*; use the shipped encoder"):
        codec.vgg_encoder("vgg16")
