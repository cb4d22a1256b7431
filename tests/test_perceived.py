"""Distances in another measure than their searches' sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import toys

from arena.core import training
from arena.core.contracts import Images
from arena.core.inversion import codec, families
from arena.core.inversion.codec import Codec
from arena.core.inversion.engine import Problem, Search, invert, rows_of, stamped
from arena.core.inversion.frozen import Frozen
from arena.core.inversion.perceived import retold, size_of
from arena.core.seeding import stream
from arena.inversions import deck
from arena.measures.class_distance import ClassDistance

PROBLEMS = [Problem(1, 2), Problem(0, 2)]
SEARCH = Search(samples=6, batch=6, steps=40, cost=1e-4, lr=0.02)


@pytest.fixture(autouse=True)
def deeper(monkeypatch) -> Codec:
    torch.manual_seed(0)
    images = toys.images(96, stream(0, "images"))
    few = {"encoder_updates": 10, "decoder_updates": 30, "batch": 16}
    made = codec.train_codec(
        images, stream(0, "codec"), encoder=Codec(3, further=[(5, 6)]).encoder, **few
    )
    monkeypatch.setattr(deck, "shipped", lambda name, how: made)
    return made


@pytest.fixture
def images() -> Images:
    toy = toys.images(60, stream(0, "images"))
    return Images(toy.x, toy.y)


def test_answers_are_told_by_the_deeper_features_of_their_own_images(images, deeper):
    family = families.families.build("deck")
    found = invert(Frozen(toys.planted(), "fp32"), family, PROBLEMS, images, SEARCH, seed=3)
    lost = replace(found[1], size=None)
    told = retold([found[0], lost], family, images, SEARCH.samples, 3)
    x = training.to_float(images.x[rows_of(PROBLEMS[0], images.y, SEARCH.samples, 3)])
    seen = deeper.encoder.perceived
    wanted = (seen(x) - seen(stamped(family, found[0].trigger, x))).square().mean()
    assert told[0].size == pytest.approx(float(wanted))
    assert told[0].size != found[0].size
    assert told[1].size is None


def test_other_families_answers_stay(images):
    family = families.families.build("nc")
    search = Search(samples=6, batch=6, steps=20)
    found = invert(Frozen(toys.planted(), "fp32"), family, PROBLEMS, images, search)
    assert retold(found, family, images, 6, 0) == found
    assert found[0].size is not None
    rows = rows_of(PROBLEMS[0], images.y, 6, 0)
    assert size_of(family, found[0].trigger, images.x[rows]) == pytest.approx(
        found[0].size, rel=1e-4
    )


def test_a_board_s_class_distance_is_told_alike(images, monkeypatch):
    measure = ClassDistance(method="deck", pairs="1:2", samples=6, steps=10)
    monkeypatch.setattr(ClassDistance, "search", SEARCH)
    model = toys.planted()
    reading = measure.measure(model, images, images, seed=0)
    found = invert(Frozen(model), measure.family, PROBLEMS[:1], images, SEARCH)
    told = retold(found, measure.family, images, SEARCH.samples, 0)
    assert found[0].size is not None
    assert reading.figures["distance"] == pytest.approx(told[0].size)
    assert measure.unit == "feature MSE (deck, encoder cifar10, pooling 2)"
