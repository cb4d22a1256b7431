"""Weights out of published files, whatever else is in them; nothing in them runs."""

from __future__ import annotations

import argparse
import collections
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from arena import subjects
from arena.checkpoints import read_weights
from arena.core.registry import BadInput

SIGNS = "signs:size=400,classes=5"
WRAPPED = """
import torch
from torch import nn


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6])[:, None, None])
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))

    def forward(self, x):
        return self.net(x - self.mean)


def make():
    return Scaled()
"""


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("a stranger's code ran",)


class Worse:
    def __reduce__(self) -> Any:
        return os.system, ("echo a stranger's code ran",)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU()
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    net.register_buffer("passing", torch.ones(2), persistent=False)
    return net


@pytest.fixture
def state(network: nn.Module) -> dict[str, Tensor]:
    return dict(network.state_dict())


def saved(tmp_path: Path, content: Any, old: bool = False) -> Path:
    file = tmp_path / "weights.pt"
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    return file


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("wrapped", ["", "state_dict", "net", "netC", "model state_dict", "odd"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_weights_are_found_in_usual_checkpoints(
    tmp_path: Path, state: dict[str, Tensor], wrapped: str, prefix: str
) -> None:
    content: dict[str, Any] = {prefix + name: value for name, value in state.items()}
    for name in reversed(wrapped.split()):
        content = {"epoch": 3, name: content}
    found = read_weights(saved(tmp_path, content))
    assert same(found, state)
    save_file(state, tmp_path / "weights.safetensors")
    again = read_weights(tmp_path / "weights.safetensors")
    assert subjects.digest(found) == subjects.digest(again)
    again["5.weight"][0, 0] += 1
    assert subjects.digest(found) != subjects.digest(again)


BESIDE = {
    "numpy number": np.float64(91.2),
    "numpy array": np.arange(5),
    "numpy words": np.array(["a", "b"], dtype=object),
    "arguments": argparse.Namespace(lr=0.1, file=Path("x")),
    "counter": collections.Counter([1, 2]),
    "code": Harmful(),
}


@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_else_is_in_them_does_not_matter(
    tmp_path: Path,
    state: dict[str, Tensor],
    beside: str,
    old: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:
    content = {beside: BESIDE[beside], "state_dict": state, "more": [BESIDE[beside]]}
    assert same(read_weights(saved(tmp_path, content, old)), state)
    assert "ran" not in "".join(capfd.readouterr())


def test_an_optimiser_s_numbers_are_no_weights(
    tmp_path: Path, network: nn.Module, state: dict[str, Tensor]
) -> None:
    optimiser = torch.optim.Adam(network.parameters())
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    optimiser.step()
    content = {"optimizer": optimiser.state_dict(), "classifier": network.state_dict()}
    assert read_weights(saved(tmp_path, content)).keys() == state.keys()
    with pytest.raises(BadInput, match="holds no state_dict"):
        read_weights(saved(tmp_path, {"optimizer": optimiser.state_dict()}))


@pytest.mark.parametrize("wrapped", ["", "net"])
def test_a_pickled_model_s_weights_without_its_code(
    tmp_path: Path, network: nn.Module, state: dict[str, Tensor], wrapped: str
) -> None:
    content = nn.Sequential(network)
    found = read_weights(saved(tmp_path, {wrapped: content} if wrapped else content))
    assert same(found, {f"0.{name}": value for name, value in state.items()})


def test_several_sets_of_weights_are_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(BadInput, match=r"some under each of netG, netD\.$"):
        read_weights(saved(tmp_path, {"netG": state, "netD": state}))
    assert same(read_weights(saved(tmp_path, {"netG": {}, "netC": state})), state)


@pytest.mark.parametrize(
    "content", ["text", "code", "system", "beside", "numbers", "empty", "none", "nothing"]
)
def test_what_holds_no_weights_is_refused(
    tmp_path: Path, state: dict[str, Tensor], content: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ("weights.safetensors" if content == "none" else "weights.pt")
    match content:
        case "text":
            file.write_text("hello")
        case "code":
            torch.save(Harmful(), file)
        case "system":
            torch.save(Worse(), file)
        case "beside":  # torch reads nothing that names such a module
            torch.save({"state_dict": state, "more": Worse()}, file)
        case "numbers":
            torch.save({"a": 1, "b": 2}, file)
        case "empty":
            torch.save({}, file)
        case "none":
            save_file({}, file)
    with pytest.raises(BadInput) as told:
        read_weights(file)
    assert str(file) in str(told.value)
    assert "ran" not in "".join(capfd.readouterr())


def test_a_factory_may_put_a_normalisation_in_front(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    (tmp_path / "net.py").write_text(WRAPPED)
    older = {name: value for name, value in state.items() if "num_batches" not in name}
    file = saved(tmp_path, older)
    subject = subjects.of_checkpoint(file, f"{tmp_path / 'net.py'}:make", SIGNS)
    weights = subject.model.state_dict()
    assert torch.equal(weights["body.net.5.weight"], state["5.weight"])
    assert weights["body.mean"].flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert same(subjects.as_given(subject, weights), state)


def test_trained_weights_that_a_file_lacks_are_not_made_up(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    (tmp_path / "net.py").write_text(WRAPPED)
    file = saved(tmp_path, {name: v for name, v in state.items() if name != "5.bias"})
    with pytest.raises(BadInput, match=r"lack body\.net\.5\.bias"):
        subjects.of_checkpoint(file, f"{tmp_path / 'net.py'}:make", SIGNS)
