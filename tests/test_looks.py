"""Long work tells the accuracy on images held out, and does the same work for it."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
import toys
from torch import Generator

from arena.core import looks, progress, training, whole
from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.registry import defenses
from arena.core.seeding import stream
from arena.core.training import Recipe


@pytest.mark.parametrize(
    ("spec", "what", "times"),
    [
        ("anp:iterations=120,batch=32", "learning masks", 2),
        ("mcr:epochs=3,lr=0.01,tune_lr=0.01,tune_epochs=1,batch=64", "curve", 2),
        ("retrain:epochs=3,min_steps=0", "retraining", 2),
        ("uap:recipe=smoke,epochs=3", "universal adversarial training", 2),
        ("adversarial:recipe=smoke,epochs=3,steps=1", "adversarial training", 2),
        ("neural_collapse:epochs=3", "training to collapse", 2),
    ],
)
def test_looks_tell_the_accuracy_and_change_nothing(planted, clean, monkeypatch, spec, what, times):
    told: list[tuple[float, float, float]] = []

    def hear(name: str, done: float, total: float, figures: dict[str, float]) -> None:
        if name == what and "accuracy" in figures:
            told.append((done, total, figures["accuracy"]))

    method, weights = defenses.build(spec), []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(looks, "OFTEN", seconds)
        with progress.listening(hear):
            weights.append(method.repair(planted, clean, stream(0, "repair")).state_dict())
        assert len(told) == times
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert all(done < total for done, total, _ in told)
    assert all(0 < accuracy <= 1 for *_, accuracy in told)


@pytest.mark.parametrize(("given", "trained"), [(200, 196), (24, 24)])
def test_whole_set_training_tells_the_accuracy_on_images_that_it_does_not_see(
    planted, monkeypatch, given, trained
):
    monkeypatch.setattr(looks, "OFTEN", 0.0)
    seen, tried = set(), []
    clean, plan = toys.images(given, stream(0, "whole")), Recipe(epochs=2, batch=12, crop=0)

    def accuracy(model: Classifier, images: Images) -> float:
        tried.append(images)
        return 0.5

    def hook(images: Images, _: Generator) -> Images:
        seen.update(images.rows.tolist())
        return images

    monkeypatch.setattr(training, "accuracy", accuracy)
    model = deepcopy(planted)
    tune = whole.fit(model, clean, plan, stream(0, "fit"), what="work", on_batch=hook)
    assert len(tune) == trained > max(seen)
    ours, others = ({image.numpy().tobytes() for image in x} for x in (tune.x, clean.x))
    assert {image.numpy().tobytes() for held in tried for image in held.x} == others - ours


def test_a_look_is_taken_after_so_many_updates(monkeypatch):
    monkeypatch.setattr(looks, "OFTEN", 0.0)
    seen, images = [], toys.images(4, stream(0, "few"))
    look = looks.looking("work", lambda: 0.5, 3, 7)
    with progress.listening(lambda *told: seen.append(told)):
        assert all(look(images, stream(0, "draws")) is images for _ in range(7))
    assert seen == [("work", 3, 7, {"accuracy": 0.5}), ("work", 6, 7, {"accuracy": 0.5})]
