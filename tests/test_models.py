"""Networks, and the models made of them."""

from __future__ import annotations

import pickle
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from arena.core import models
from arena.core.contracts import Images
from arena.core.features import features
from arena.core.models import ModelSpec, build, passes
from arena.core.networks import Network
from arena.core.networks.timm_models import find
from arena.core.seeding import stream

NAMES = models.names()
UNRECTIFIED = {("preact_resnet18", "shallow"), ("preact_resnet18", "middle")}


@pytest.fixture
def rng():
    return stream(0, "test")


def make(name="fastnet_small", classes=4, shape=(3, 32, 32), seed=0):
    return build(name, classes, shape, stream(seed, "weights"))


def weights_equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))


# ---- every network


@pytest.mark.parametrize("name", NAMES)
def test_takes_its_smallest_side_and_one_channel(name):
    side = models.info(name).sides[0]
    model = make(name, 3, (1, side, side))
    assert not model.training
    assert model(torch.rand(2, 1, side, side)).shape == (2, 3)


@pytest.mark.parametrize("name", NAMES)
def test_levels_shrink_and_are_rectified(name):
    model = make(name, shape=(3, 32, 32))
    maps = features(model, torch.rand(2, 3, 32, 32))
    assert list(maps) == ["shallow", "middle", "deep"]
    assert all(m.ndim == 4 and len(m) == 2 for m in maps.values())
    sides = [m.shape[-1] for m in maps.values()]
    assert sides == sorted(set(sides), reverse=True), sides
    for level, feature in maps.items():
        assert (feature.min() >= 0) != ((name, level) in UNRECTIFIED), level


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_side_is_stated(name):
    side = models.info(name).sides[0] - 1
    with pytest.raises(
        ValueError, match=rf"{name} takes images of {side + 1} pixels .* {side} x 40"
    ):
        make(name, shape=(3, side, 40))


@pytest.mark.parametrize("name", ["resnet20", "preact_resnet18", "vgg11", "nin", "cnn", "fastnet"])
@pytest.mark.parametrize("side", [28, 65])
def test_takes_other_sides(name, side):
    assert make(name, shape=(3, side, side))(torch.rand(1, 3, side, side)).shape == (1, 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 11_173_962),
        ("resnet50", 23_520_842),
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("preact_resnet18", 11_171_146 + 2 * 512),  # the usual count lacks the final batch norm
        ("vgg11", 9_231_114),
        ("vgg13", 9_416_010),
        ("vgg16", 14_728_266),
        ("vgg19", 20_040_522),
        ("nin", 966_986),
        ("cnn", 64 * (8 * 8 * 3 + 1) + 128 * (6 * 6 * 64 + 1) + 128 * (5 * 5 * 128 + 1) + 5_130),
    ],
)
def test_number_of_weights(name, expected):
    """Ten classes, three channels, as published or as the usual CIFAR code has it."""
    assert sum(p.numel() for p in make(name, classes=10).parameters()) == expected


@pytest.mark.parametrize("name", NAMES)
def test_recipe_overrides_name_real_fields(name):
    training = pytest.importorskip("arena.core.training")
    for recipe, changes in models.info(name).overrides.items():
        replace(training.RECIPES[recipe], **changes)


@pytest.mark.parametrize("name", ["cnn", "nin"])
def test_nets_without_batchnorm_ask_for_a_lower_rate(name):
    assert all(changes["lr"] < 0.1 for changes in models.info(name).overrides.values())


# ---- names


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="no network 'resnet19'; the nearest is 'resnet18'"):
        models.info("resnet19")
    with pytest.raises(ValueError, match="the nearest is 'timm:densenet121'"):
        models.info("DenseNet121")


def test_a_name_defined_twice_is_an_error():
    network = models.info("cnn")
    with pytest.raises(ValueError, match="'cnn' is defined in both one and two"):
        models.merge({"one": {"cnn": network}, "two": {"cnn": network}})


@pytest.mark.parametrize(
    ("classes", "shape"), [(0, (3, 32, 32)), (10, (0, 32, 32)), (10, (32, 32))]
)
def test_impossible_models_are_refused(classes, shape, rng):
    with pytest.raises(ValueError, match="needs 1 class or more and a shape"):
        build("cnn", classes, shape, rng)


# ---- weights


def test_weights_follow_the_generator_and_nothing_else():
    before = torch.random.get_rng_state()
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert weights_equal(one.state_dict(), same.state_dict())
    assert not torch.equal(one.body.head.weight, other.body.head.weight)
    assert torch.equal(before, torch.random.get_rng_state())


def test_fresh_keeps_the_normalisation_only(rng):
    model = make(classes=5, shape=(1, 28, 28))
    model.normalize.mean.fill_(0.3)
    new = models.fresh(model, rng)
    assert new.spec == model.spec == ModelSpec("fastnet_small", 5, (1, 28, 28))
    assert new.normalize.mean.item() == pytest.approx(0.3)
    assert not torch.equal(new.body.head.weight, model.body.head.weight)
    assert not new.training


def test_load_weights_copies():
    model, other = make(seed=1), make(seed=2)
    assert models.load_weights(model, other.state_dict()) is model
    assert weights_equal(model.state_dict(), other.state_dict())
    assert model.body.head.weight.data_ptr() != other.body.head.weight.data_ptr()


def broken(change):
    state = dict(make("cnn", seed=2).state_dict())
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("body.head.bias"), "weights for cnn lack body.head.bias$"),
        (lambda s: s.update(extra=torch.zeros(1)), "have unexpected extra$"),
        (
            lambda s: s.update({"body.head.bias": torch.zeros(7)}),
            r"have misshapen body.head.bias \(7,\) for \(4,\)$",
        ),
        (
            lambda s: s.update({"body.head.bias": torch.full((4,), torch.nan)}),
            "have non-finite body.head.bias$",
        ),
        (lambda s: s.clear(), "lack normalize.mean, normalize.std, .* and 7 more$"),
    ],
    ids=["missing", "unexpected", "misshapen", "not finite", "empty"],
)
def test_load_weights_names_the_fault_and_copies_nothing(change, message):
    model = make("cnn", seed=1)
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        models.load_weights(model, broken(change))
    assert "\n" not in str(caught.value)
    assert weights_equal(before, model.state_dict())


# ---- normalisation


def shades(n=50, channels=3, side=32):
    x = torch.randint(0, 256, (n, channels, side, side), generator=stream(0, "shades"))
    return Images(
        (x // torch.arange(1, channels + 1)[:, None, None]).to(torch.uint8), torch.zeros(n)
    )


def test_the_body_is_given_normalised_images():
    model, data = make("cnn"), shades()
    seen = []
    model.body.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    models.calibrate(model, data)
    model(data.x.float() / 255)
    flat = seen[0].double().transpose(0, 1).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(3).double(), atol=1e-4)
    assert torch.allclose(flat.std(1), torch.ones(3).double(), atol=1e-4)


def test_calibration_gives_statistics_of_unit_range_images():
    model, data = make("cnn"), shades()
    x = data.x.double().transpose(0, 1).flatten(1) / 255
    models.calibrate(model, data)
    assert torch.allclose(model.normalize.mean.double(), x.mean(1))
    assert torch.allclose(model.normalize.std.double(), x.std(1, correction=0))


def test_calibration_reads_a_sample_spread_over_the_set(monkeypatch):
    monkeypatch.setattr(models, "CALIBRATION_IMAGES", 10)
    x = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(100, 3, 32, 32)
    model = make("cnn")
    models.calibrate(model, Images(x, torch.zeros(100)))
    assert torch.allclose(model.normalize.mean, torch.full((3,), 45 / 255))  # 0, 10, ... 90


def test_a_constant_channel_does_not_divide_by_zero():
    model = make("cnn")
    models.calibrate(model, Images(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4)))
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()


def test_calibration_hands_a_bounded_normalised_sample_to_the_body(monkeypatch):
    monkeypatch.setattr(models, "CALIBRATION_PIXELS", 20 * 32 * 32)
    model, samples = make("cnn"), []
    model.body.initialise = samples.append
    models.calibrate(model, shades())
    assert samples[0].shape == (20, 3, 32, 32)
    assert samples[0].mean().abs() < 0.05
    assert (samples[0].std() - 1).abs() < 0.05


def test_no_images_cannot_calibrate():
    with pytest.raises(ValueError, match="at least 1 image"):
        models.calibrate(make("cnn"), shades(n=0))


@pytest.mark.parametrize(
    "names", [("fastnet", "fastnet_robust"), ("fastnet_small", "fastnet_robust_small")]
)
def test_the_first_filters_of_the_robust_fastnets_magnify_nothing(names):
    steep, gentle = (make(name).body for name in names)
    shapes = [{key: value.shape for key, value in b.state_dict().items()} for b in (steep, gentle)]
    assert shapes[0] == shapes[1]
    x = F.avg_pool2d(2 * torch.randn(30, 3, 34, 34, generator=stream(0, "x")), 3, stride=1)
    for body in (steep, gentle):
        body.initialise(x)  # smooth images: most components are faint
    old, new = (body.whiten.weight.flatten(1).double() for body in (steep, gentle))
    assert old.norm(dim=1).max() > 2
    assert torch.allclose(F.cosine_similarity(old, new), torch.ones(len(old)).double())
    axes = F.normalize(new).view_as(gentle.whiten.weight).float()
    variance = F.conv2d(x, axes).double().var((0, 2, 3))
    assert torch.allclose(new.norm(dim=1), (1 + variance).rsqrt(), rtol=1e-3)


# ---- counting work


def test_passes_count_images_also_of_copies():
    model = make("cnn")
    twin, x = pickle.loads(pickle.dumps(deepcopy(model))), torch.rand(3, 3, 32, 32)
    passes.reset()
    model(x).sum().backward()
    assert (passes.forward, passes.backward) == (3, 3)
    twin(x)
    assert (passes.forward, passes.backward) == (6, 3)
    with torch.no_grad():
        model(x[:1])
    assert (passes.forward, passes.backward) == (7, 3)
    twin.requires_grad_(False)
    twin(x.requires_grad_()).sum().backward()  # the gradient of the images is work, too
    assert (passes.forward, passes.backward) == (10, 6)
    passes.reset()
    assert (passes.forward, passes.backward) == (0, 0)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch's own
def test_passes_count_in_compiled_models_without_compiling_anew():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = make("cnn")
    compiled, x = torch.compile(model, backend=backend), torch.rand(2, 3, 32, 32)
    passes.reset()
    for _ in range(3):
        compiled(x).sum().backward()
    assert (passes.forward, passes.backward) == (6, 6)
    assert len(graphs) == 1


# ---- other libraries


def test_timm_networks_are_built_looked_into_and_seeded():
    before = torch.random.get_rng_state()
    find.cache_clear()
    network = models.info("timm:mobilenetv2_100")
    assert network.levels == ("blocks.2", "blocks.4", "bn2")
    assert network.head == "classifier"
    assert not network.overrides
    one, two = (make("timm:mobilenetv2_100", 5, (1, 64, 64)) for _ in range(2))
    assert weights_equal(one.state_dict(), two.state_dict())
    assert torch.equal(before, torch.random.get_rng_state())
    assert one(torch.rand(2, 1, 64, 64)).shape == (2, 5)
    maps = features(one, torch.rand(2, 1, 64, 64))
    assert [m.shape[-1] for m in maps.values()] == [8, 4, 2]


def test_torchvision_networks_take_any_channels():
    model = make("torchvision:squeezenet1_1", 5, (1, 32, 32))
    assert model.head == "body.classifier.1"
    assert model(torch.rand(2, 1, 32, 32)).shape == (2, 5)
    assert models.info("torchvision:squeezenet1_1").overrides, "it has no batch norm"


def test_unknown_library_networks_get_the_nearest():
    with pytest.raises(
        ValueError, match="no network 'timm:mobilnetv2_100'; the nearest is 'timm:mob"
    ):
        find("timm:mobilnetv2_100")
    with pytest.raises(ValueError, match="there is 'torchvision:squeezenet1_1'"):
        find("timm:squeezenet")
    with pytest.raises(ValueError, match="no library 'tim' of networks; the nearest is 'timm'"):
        find("tim:resnet18")


@pytest.mark.parametrize("name", ["timm:vit_tiny_patch16_224"])
def test_transformers_are_built_for_the_side_asked(name):
    model = make(name, 5, (3, 32, 32))
    assert features(model, torch.rand(2, 3, 32, 32))["deep"].shape == (2, 192)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "smallest"), [("timm:densenet121", 32), ("timm:inception_v3", 75)]
)
def test_trojai_networks(name, smallest):
    assert models.info(name).sides[0] == smallest
    with pytest.raises(ValueError, match=f"{name} takes images of {smallest} pixels"):
        make(name, shape=(3, 28, 28))
    assert make(name, shape=(3, smallest, smallest))(
        torch.rand(1, 3, smallest, smallest)
    ).shape == (
        1,
        4,
    )


def test_networks_state_where_they_come_from():
    for name in NAMES:
        network = models.info(name)
        assert isinstance(network, Network)
        assert network.summary
        assert network.source
