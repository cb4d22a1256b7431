"""Models of one's own: factories in Python files, whole pickled models, TrojAI's folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_cli import arena, assert_refused
from torch import nn

from arena import checkpoints
from arena.core import foreign, models
from arena.core.features import fold_mask, masked
from arena.core.inversion.frozen import Frozen
from arena.core.registry import BadInput
from arena.core.seeding import stream
from arena.core.whole import planned, started
from arena.data import load
from arena.subjects import of_checkpoint

SIGNS = "signs:size=400,classes=5"
SHAPE = (3, 32, 32)
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU())
        self.last = nn.Linear(24, classes)

    def forward(self, x):
        assert x.detach().min() >= 0 and x.detach().max() <= 1, "images are in [0, 1]"
        return self.last(self.features(x).mean((2, 3)))


def make():
    return Net()


def breaks():
    raise RuntimeError("no such layer")


def number():
    return 3


def seven():
    return Net(7)
"""


@pytest.fixture
def net(tmp_path: Path) -> Path:
    file = tmp_path / "net.py"
    file.write_text(NET)
    return file


@pytest.fixture
def weights(tmp_path: Path, net: Path) -> Path:
    torch.manual_seed(0)
    model = foreign.build(f"{net}:make", 5, SHAPE)
    save_file(model.body.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def stored(folder: Path, classes: int = 5) -> Path:
    """A model as TrojAI gives it: a pickled module of a class that the reader can import."""
    folder.mkdir(parents=True)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))  # fmt: skip
    torch.save(model, folder / "model.pt")
    return folder


# ---------------------------------------------------------------------------------------- factories


def test_a_factory_s_network_sees_images_as_they_are(net, weights):
    subject = of_checkpoint(weights, f"{net}:make", SIGNS)
    x = subject.data.val.x[:20] / 255
    assert torch.equal(subject.model(x), subject.model.body(x))
    assert subject.model.spec.classes == 5
    kept = checkpoints.read_weights(weights)
    assert torch.equal(subject.model.state_dict()["body.last.weight"], kept["last.weight"])


def test_methods_find_its_levels(net, weights):
    model = of_checkpoint(weights, f"{net}:make", SIGNS).model
    assert model.head == "body.last"
    mask = torch.rand(24, generator=stream(0, "mask"))
    x = torch.rand(4, *SHAPE, generator=stream(0, "x"))
    with masked(model, mask), torch.no_grad():
        wanted = model(x)
    fold_mask(model, mask)
    with torch.no_grad():
        assert torch.allclose(model(x), wanted, atol=1e-5)


STAGED = """
import torch
from torch import nn


class Block(nn.Module):  # its first layers still see the size before
    def __init__(self, a, b, stride):
        super().__init__()
        self.norm = nn.BatchNorm2d(a)
        self.one = nn.Conv2d(a, b, 1)
        self.two = nn.Conv2d(b, b, 3, stride, 1)
        self.short = nn.Conv2d(a, b, 1, stride)

    def forward(self, x):
        return self.short(x) + self.two(self.one(self.norm(x)).relu())


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(Block(3, 8, 1), Block(8, 8, 1))
        self.two = nn.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.three = nn.Sequential(Block(16, 24, 2), Block(24, 24, 1))

    def forward(self, x):
        return self.three(self.two(self.one(x)))


class Net(Stages):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        return self.fc(super().forward(x).mean((2, 3)))


class Encoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.fc = Stages(), nn.Linear(24, 5)

    def forward(self, x):
        return self.fc(self.encoder(x).mean((2, 3)))


class Normalized(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x - 0.5) / 0.25)


class Scale(nn.Module):
    def forward(self, x):
        return 4 * x - 2


def normalized():
    return Normalized(Net())


def in_front():
    return nn.Sequential(Scale(), Encoded())


class Thin(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 1, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        return self.fc(self.b(self.a(x).relu()).mean((2, 3)))


def thin():
    return Normalized(Thin())
"""


@pytest.mark.parametrize(
    ("function", "stages"),
    [
        ("Net", ("one", "two")),
        ("Encoded", ("encoder.one", "encoder.two")),
        ("normalized", ("net.one", "net.two")),
        ("in_front", ("1.encoder.one", "1.encoder.two")),
        ("thin", ("net.a", "net.a")),  # of one size all along: what there is before the last map
    ],
)
def test_the_levels_of_a_wrapped_network_are_its_stages(tmp_path, function, stages):
    file = tmp_path / "staged.py"
    file.write_text(STAGED)
    model = foreign.build(f"{file}:{function}", 5, SHAPE)
    found = tuple(model.levels[level].removeprefix("body.") for level in models.LEVELS)
    assert found[:2] == stages
    assert found[2] not in stages


def test_a_network_without_such_a_level_is_taken_all_the_same(tmp_path):
    file = tmp_path / "odd.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.mix = nn.Linear(3072, 5)\n"
        "    def forward(self, x):\n"
        "        return torch.tanh(self.mix(x.flatten(1)))\n"
    )
    model = foreign.build(f"{file}:Odd", 5, SHAPE)
    assert set(model.levels) == set(models.LEVELS)
    assert all(model.get_submodule(path) is not None for path in model.levels.values())


def test_constants_that_no_cast_reaches_do_no_harm(tmp_path):
    file = tmp_path / "normed.py"
    file.write_text(
        "import torch\nfrom torch import nn\n"
        "class Normed(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),\n"
        "            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))\n"
        "        self.mean = torch.full((3, 1, 1), 0.5)\n"
        "    def forward(self, x):\n"
        "        return super().forward(x - self.mean)\n"
    )
    model = foreign.build(f"{file}:Normed", 5, SHAPE)
    assert "body.5.weight" in model.state_dict()
    x = torch.rand(6, *SHAPE, generator=stream(0, "x"))
    low = Frozen(model, precision="bf16")
    with torch.no_grad():
        assert torch.allclose(low(x), model(x), atol=2e-3)  # the images are rounded
    assert {p.dtype for p in low.body.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("mak", "has no function 'mak'; it has Net, make"),
        ("breaks", r"breaks\(\) failed: RuntimeError: no such layer"),
        ("number", r"number\(\) returns int; a torch.nn.Module is wanted"),
        ("seven", r"answers 2 images with \(2, 7\), but the data set's 5 classes want \(2, 5\)"),
    ],
)
def test_what_is_no_factory_is_refused(net, function, words):
    with pytest.raises(BadInput, match=words):
        foreign.build(f"{net}:{function}", 5, SHAPE)


def test_files_that_cannot_be_imported_are_refused(tmp_path):
    with pytest.raises(BadInput, match="There is no file"):
        foreign.build(f"{tmp_path / 'none.py'}:make", 5, SHAPE)
    (tmp_path / "bad.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(BadInput, match=r"bad\.py cannot be imported: ModuleNotFoundError"):
        foreign.build(f"{tmp_path / 'bad.py'}:make", 5, SHAPE)


def test_images_that_do_not_fit_are_named(tmp_path):
    file = tmp_path / "grey.py"
    file.write_text("from torch import nn\ndef make():\n    return nn.Conv2d(1, 5, 3)\n")
    with pytest.raises(BadInput, match="cannot take images of 3 x 32 x 32"):
        foreign.build(f"{file}:make", 5, SHAPE)


def test_weights_of_another_network_name_their_keys(net, tmp_path):
    save_file({"last.weight": torch.zeros(5, 24)}, tmp_path / "few.safetensors")
    with pytest.raises(BadInput, match=r"lack body\.features\.0\.weight"):
        of_checkpoint(tmp_path / "few.safetensors", f"{net}:make", SIGNS)


def test_a_factory_s_model_is_examined_in_a_process_of_its_own(net, weights, tmp_path, monkeypatch):
    """Under a relative path, from another folder than the worker's."""
    monkeypatch.chdir(tmp_path)
    words = ("--checkpoint", weights, "--model", "net.py:make", "-d", SIGNS, "--device", "cpu")
    done = arena("scan", *words, "--method", "nc:steps=3,samples=20", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert len(found["classes"]) == 5
    some = ("--samples", 5, "--steps", 3, "--restarts", 1, "--pairs", "0:1")
    done = arena("distance", *words, *some, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["pairs"] == 1


def test_it_is_trained_further_but_not_made_anew(net, weights):
    subject = of_checkpoint(weights, f"{net}:make", SIGNS)
    with pytest.raises(BadInput, match="cannot be made anew with other weights, as"):
        started(subject.model, subject.data.train, "scratch", stream(0, "anew"))
    copied = started(subject.model, subject.data.train, "model", stream(0, "anew"))
    assert copied is not subject.model
    assert planned(copied, "smoke", 3, None).epochs == 3


# ------------------------------------------------------------------------------------------ pickles


def test_a_pickled_model_is_refused_with_the_reason(tmp_path):
    folder = stored(tmp_path / "id-00000007")
    done = arena("scan", "--checkpoint", folder, "-d", SIGNS)
    assert_refused(done, "runs its maker's code when it is read: add --trust-pickle")


def test_it_does_not_run_before_it_is_trusted(tmp_path):
    marker = tmp_path / "ran"
    torch.save(Harmful(str(marker)), tmp_path / "model.pt")
    with pytest.raises(BadInput, match="trust-pickle"):
        of_checkpoint(tmp_path, None, SIGNS)
    with pytest.raises(BadInput, match="cannot be read as plain tensors"):
        of_checkpoint(tmp_path / "model.pt", "cnn", SIGNS)
    with pytest.raises(BadInput, match="no library "):
        of_checkpoint(tmp_path / "model.pt", f"pickle:{tmp_path / 'model.pt'}", SIGNS)
    assert not marker.exists()


class Harmful:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_a_trusted_one_is_scanned(tmp_path):
    folder = stored(tmp_path / "id-00000007")
    subject = of_checkpoint(folder, None, SIGNS, trust_pickle=True)
    assert subject.name == "id-00000007"
    x = subject.data.val.x[:9] / 255
    inside = torch.load(folder / "model.pt", weights_only=False)
    assert torch.equal(subject.model(x), inside(x))
    words = ("--checkpoint", folder, "--trust-pickle", "-d", SIGNS, "--device", "cpu")
    done = arena("scan", *words, "--method", "nc:steps=3,samples=20", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["model"] == "id-00000007"


def test_what_is_no_whole_model_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(BadInput, match="holds dict, not a whole model"):
        of_checkpoint(tmp_path, None, SIGNS, trust_pickle=True)
    with pytest.raises(BadInput, match=r"answers 2 images with \(2, 7\)"):
        of_checkpoint(stored(tmp_path / "seven", 7), None, SIGNS, trust_pickle=True)


def test_non_finite_weights_are_refused(tmp_path):
    folder = stored(tmp_path / "odd")
    model = torch.load(folder / "model.pt", weights_only=False)
    with torch.no_grad():
        model[6].bias[0] = torch.nan
    torch.save(model, folder / "model.pt")
    with pytest.raises(BadInput, match=r"non-finite body\.6\.bias"):
        of_checkpoint(folder, None, SIGNS, trust_pickle=True)


def test_trojai_s_example_images_are_a_data_set(tmp_path):
    from PIL import Image

    folder = tmp_path / "clean_example_data"
    folder.mkdir()
    for label in range(11):
        for example in range(4):
            shade = (20 * label, example, 7)
            Image.new("RGB", (40, 40), shade).save(folder / f"class_{label}_example_{example}.png")
    data = load(f"imagefolder:{folder},side=32")
    assert data.num_classes == 11
    every = torch.cat([data.train.x, data.val.x, data.test.x])
    labels = torch.cat([data.train.y, data.val.y, data.test.y])
    assert len(every) == 44
    assert torch.equal(every[:, 0, 5, 5].long(), 20 * labels)
