"""Scanners: a planted corner is found, and nothing where nothing is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from arena.core.contracts import Images, Scans
from arena.core.models import Classifier, ModelSpec
from arena.core.networks import Network
from arena.core.registry import BadInput, defenses
from arena.core.seeding import stream

CLASSES, SIDE, TARGET = 8, 12, 3
SCANNERS = [n for n in defenses.names() if "scans" in defenses.describe(n).powers]
QUICK = {"nc": "nc:steps=150,samples=56", "pixel": "pixel:steps=150,samples=56"}


class Patterns(nn.Module):
    """A class's score is how much an image looks like its pattern; a corner speaks for TARGET."""

    def __init__(self, backdoor: float) -> None:
        super().__init__()
        self.block = nn.Identity()
        self.head = nn.Linear(3 * SIDE**2, CLASSES, bias=False)
        with torch.no_grad():
            self.head.weight.copy_(patterns().flatten(1) * 0.2)
            corner = torch.zeros(3, SIDE, SIDE)
            corner[:, -2:, -2:] = backdoor
            self.head.weight[TARGET] += corner.flatten()

    def forward(self, x):
        return self.head(self.block(x).flatten(1))


def patterns():
    return torch.randn(CLASSES, 3, SIDE, SIDE, generator=stream(0, "patterns")).sign()


NETWORK = Network(
    build=lambda classes, shape: Patterns(0.0),
    levels=("block", "block", "block"),
    head="head",
    summary="a linear network by hand",
    source="this file",
    sides=(SIDE, SIDE),
)


def model_with(backdoor: float) -> Classifier:
    model = Classifier(ModelSpec("patterns", CLASSES, (3, SIDE, SIDE)), NETWORK)
    model.normalize.mean.fill_(0.5)
    model.normalize.std.fill_(0.25)
    model.body = Patterns(backdoor)
    return model.eval()


def clean(n=160, seed=0) -> Images:
    y = torch.arange(n) % CLASSES
    noise = torch.rand(n, 3, SIDE, SIDE, generator=stream(seed, "clean")) * 120 + 60
    return Images((noise + 20 * patterns()[y]).round().to(torch.uint8), y)


@pytest.fixture(params=SCANNERS)
def scanner(request):
    return defenses.build(QUICK.get(request.param, request.param))


def test_a_planted_backdoor_is_found(scanner):
    model, images = model_with(4.0), clean()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = scanner.scan(model, images, stream(0, "scan"))
    assert isinstance(scanner, Scans)
    assert found.target == TARGET
    assert found.score > 2
    assert int(found.per_class.argmax()) == TARGET
    assert found.trigger.shape == (3, SIDE, SIDE)
    assert 0 <= float(found.trigger.min()) <= float(found.trigger.max()) <= 1
    lit = (found.trigger > 0.3).any(0)
    assert lit[-2:, -2:].any()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the model was changed"
    again = scanner.scan(model, images, stream(0, "scan"))
    assert again.score == found.score


def test_a_clean_model_is_far_less_suspicious(scanner):
    without = scanner.scan(model_with(0.0), clean(), stream(0, "scan"))
    planted = scanner.scan(model_with(4.0), clean(), stream(0, "scan"))
    assert without.score < planted.score / 2
    assert (without.target is None) == (without.score <= 2)
    assert (without.trigger is None) == (without.target is None)


def test_few_clean_images_do(scanner):
    found = scanner.scan(model_with(4.0), clean(3 * CLASSES), stream(0, "scan"))
    assert found.target == TARGET


def test_a_clean_set_without_a_class_is_refused(scanner):
    images = clean()
    with pytest.raises(BadInput, match="none of class 5"):
        scanner.scan(model_with(0.0), images.take(images.y != 5), stream(0, "scan"))


def test_a_scanner_is_no_defense_of_a_board(scanner):
    from arena.boards import Board, check_names

    board = Board(dataset=("signs",), attack=("patch",), defense=(scanner.method_name,))
    if "repairs" not in defenses.describe(scanner.method_name).powers:
        with pytest.raises(BadInput, match="scans but repairs nothing"):
            check_names(board)
