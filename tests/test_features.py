"""Activations, masks and batch statistics."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from arena.core import models
from arena.core.contracts import Images
from arena.core.features import (
    features,
    fold_mask,
    masked,
    mean_activation,
    reestimate_batchnorm,
    to_float,
)
from arena.core.models import build
from arena.core.seeding import stream

OUTSIDE = ["timm:mobilenetv2_100", "torchvision:squeezenet1_1"]


def make(name="fastnet_small", shape=(3, 32, 32)):
    return build(name, 4, shape, stream(0, "weights"))


def images(n=10, sorted_by_shade=False):
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=stream(0, "x"))
    if sorted_by_shade:
        x = x * torch.arange(n)[:, None, None, None] // n
    return Images(x.to(torch.uint8), torch.zeros(n, dtype=torch.int64))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def width(model):
    return features(model, torch.rand(1, 3, 32, 32), ("deep",))["deep"].shape[1]


@pytest.mark.parametrize("name", [*models.names(), *OUTSIDE])
def test_a_folded_mask_equals_a_hooked_one(name):
    model = make(name)
    x = torch.rand(2, 3, 32, 32, generator=stream(0, "x"))
    mask = (torch.rand(width(model), generator=stream(0, "mask")) < 0.5).float()
    with torch.no_grad():
        plain = model(x)
        with masked(model, mask):
            expected = model(x)
        folded = deepcopy(model)
        fold_mask(folded, mask)
        assert torch.allclose(folded(x), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())
        assert not torch.allclose(plain, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())
        assert torch.equal(model(x), plain), "masked() left something behind"


def test_a_mask_works_at_every_level():
    model, x = make(), torch.rand(2, 3, 32, 32)
    for level, feature in features(model, x).items():
        mask = torch.ones(feature.shape[1])
        mask[3] = 0
        with masked(model, mask, level):
            seen = features(model, x, (level,))[level]
        assert torch.equal(seen[:, 3], torch.zeros_like(seen[:, 3]))
        assert torch.equal(seen[:, 4], feature[:, 4])


def test_features_pass_gradients_and_keep_the_mode():
    model, x = make().train(), torch.rand(2, 3, 32, 32, requires_grad=True)
    features(model, x, ("middle",))["middle"].sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert model.training


def test_hooks_come_off_whatever_happens():
    model = make()
    bad = torch.rand(1, 5, 32, 32)  # five channels
    with pytest.raises(RuntimeError):
        features(model, bad)
    with pytest.raises(RuntimeError), masked(model, torch.ones(128)):
        model(bad)
    with pytest.raises(ValueError, match="no feature level"):
        features(model, torch.rand(1, 3, 32, 32), ("deep", "depe"))
    assert hooks(model) == 0


def test_bad_levels_and_masks_are_named():
    model = make()
    with pytest.raises(ValueError, match="no feature level 'deap'; the nearest is 'deep'"):
        features(model, torch.rand(1, 3, 32, 32), ("deap",))
    with pytest.raises(ValueError, match=r"the deep level has 128 channels, the mask \(7,\)"):  # noqa: SIM117
        with masked(model, torch.ones(7)):
            model(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="reads 128 inputs"):
        fold_mask(model, torch.ones(7))


def test_mean_activation_is_the_mean_over_images_and_pixels():
    model, data = make(), images()
    expected = features(model, to_float(data.x))["middle"].mean((0, 2, 3))
    model.train()
    norm = model.body.get_submodule("group1.norm1")
    norm.eval()  # as a defense may have frozen it
    found = mean_activation(model, data, "middle", batch=4)
    assert torch.allclose(found, expected, rtol=1e-4)
    assert not found.requires_grad
    assert model.training
    assert not norm.training
    with pytest.raises(ValueError, match="at least 1 image"):
        mean_activation(model, data.take(torch.arange(0)))


def test_to_float_is_pure():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.equal(to_float(x), torch.tensor([0, 0.2, 1]))
    assert torch.equal(x, torch.tensor([0, 51, 255], dtype=torch.uint8))


def batchnorms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def test_reestimated_statistics_are_those_of_the_images():
    model, data = make("resnet20"), images()
    first = batchnorms(model)[0]
    first.running_mean.fill_(9)
    weights = {k: v.clone() for k, v in model.named_parameters()}
    reestimate_batchnorm(model, data, batch=10)
    out = model.body.conv1(model.normalize(to_float(data.x))).detach()
    assert torch.allclose(first.running_mean, out.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(first.running_var, out.var((0, 2, 3)), rtol=1e-4)
    assert first.momentum == 0.1
    assert not any(m.training for m in model.modules())
    assert all(torch.equal(weights[k], v) for k, v in model.named_parameters())


def test_reestimation_mixes_sorted_images():
    """In batches of neighbours the variance between the batches would be lost."""
    model, data = make("resnet20"), images(64, sorted_by_shade=True)
    reestimate_batchnorm(model, data, batch=8)
    first = batchnorms(model)[0]
    out = model.body.conv1(model.normalize(to_float(data.x))).detach()
    assert torch.allclose(first.running_var, out.var((0, 2, 3)), rtol=0.05)


def test_reestimation_restores_momenta_after_a_failure():
    model, data = make("resnet20"), images()
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(model, Images(data.x[:, :2], data.y))
    assert {m.momentum for m in batchnorms(model)} == {0.1}
    assert not model.training


def test_reestimation_needs_two_images_and_spares_other_models():
    data = images()
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        reestimate_batchnorm(make("resnet20"), data.take(torch.arange(1)))
    model = make("cnn")
    before = deepcopy(model.state_dict())
    reestimate_batchnorm(model, data)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
