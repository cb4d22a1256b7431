"""What many tests share."""

from __future__ import annotations

import pytest
import torch
import toys

from arena.core import models
from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.seeding import stream


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
