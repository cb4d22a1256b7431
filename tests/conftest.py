"""What many tests share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import toys
from hypothesis import settings
from torch import Tensor, nn

from arena.core import models
from arena.core.contracts import Images
from arena.core.inversion.frozen import Frozen
from arena.core.models import Classifier
from arena.core.registry import attacks, defenses
from arena.core.seeding import stream

if count := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # side by side, not on top of each other
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(count)))
    # what tests start counts alike: another number of threads rounds otherwise
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())

settings.register_profile("campaign", max_examples=1000)  # of tests/test_fuzz.py


@pytest.fixture(autouse=True, scope="module")
def forgotten_files() -> Iterator[None]:
    """Method files that a module's tests register are gone after it: workers run other modules."""
    before = [(registry, dict(registry._added)) for registry in (attacks, defenses)]
    yield
    for registry, known in before:
        registry._added.clear()
        registry._added.update(known)


@pytest.fixture
def rng() -> torch.Generator:
    return stream(0, "test")


@pytest.fixture
def planted(monkeypatch) -> Classifier:
    """A fresh copy of the toy of tests/toys.py, known to `models` by its name."""
    monkeypatch.setitem(models._catalogue(), "planted", toys.NETWORK)
    return toys.planted()


@pytest.fixture
def clean() -> Images:
    """200 clean images for the toy."""
    return toys.images(200, stream(0, "clean"))


@pytest.fixture(scope="module")
def images() -> Images:
    """160 other images for the toy."""
    return toys.images(160, stream(0, "images"))


@pytest.fixture(scope="module")
def coloured(images) -> Images:
    """Those of the three classes with a colour of their own."""
    return images.take(images.y < 3)


@pytest.fixture(scope="module")
def frozen() -> Frozen:
    return Frozen(toys.planted(), "fp32")


@pytest.fixture(scope="module")
def separate() -> Frozen:
    """As `frozen`, image by image: libraries choose kernels by a batch's size, and each of them
    rounds in its own way, which is no part of what methods compute."""
    made = Frozen(toys.planted(), "fp32")
    for layer in made.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.forward = partial(_one_by_one, layer.forward)
    return made


def _one_by_one(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([forward(one) for one in x.split(1)])


@pytest.fixture(scope="session")
def examined(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A store, and its cells without a defense: their keys by the attack's short spec."""
    from test_cli import arena

    store = tmp_path_factory.mktemp("examined") / "store"
    words = "run -d signs:size=800,classes=5 -m fastnet_tiny -a patch -a patch:mode=all_to_all"
    answer = arena(*words.split(), "-D", "none", "--recipe", "smoke", "--store", store)
    assert answer.code in (0, 1), answer.err
    rows = json.loads(arena("results", "--store", store, "--format", "json").out)
    return store, {r["attack_short"]: r["key"] for r in rows if r["defense_name"] == "none"}
