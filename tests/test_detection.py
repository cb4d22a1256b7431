"""Detectors: features of two kinds are told apart, and of one kind not; the figures by hand."""

from __future__ import annotations

import json

import pytest
import torch
from test_cli import arena, assert_refused
from test_scanning import CLASSES, SIDE, clean
from torch import nn

from arena import detecting
from arena.core import detection
from arena.core.contracts import Detects, Images
from arena.core.models import Classifier, ModelSpec
from arena.core.networks import Network
from arena.core.registry import BadInput, defenses
from arena.core.seeding import stream
from arena.defenses import activation_clustering, spectral, subspace

DETECTORS = detecting.detectors()


@pytest.fixture(params=DETECTORS)
def detector(request):
    return defenses.build(request.param)


class Bare(nn.Module):
    """Whose features are the image itself."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Identity(), nn.Linear(3 * SIDE**2, CLASSES)

    def forward(self, x):
        return self.head(self.block(x).flatten(1))


def transparent() -> Classifier:
    network = Network(
        build=lambda classes, shape: Bare(),
        levels=("block", "block", "block"),
        head="head",
        summary="no network at all",
        source="this file",
        sides=(SIDE, SIDE),
    )
    model = Classifier(ModelSpec("bare", CLASSES, (3, SIDE, SIDE)), network)
    model.normalize.mean.fill_(0.5)
    model.normalize.std.fill_(0.25)
    return model.eval()


def mixed(strength: float, n: int = 60, stamped: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of class 0; on some of them a wide bright band, `strength` levels of it."""
    images = clean(n * CLASSES, seed=1)
    x = images.x[images.y == 0][:n].clone()
    truth = torch.arange(n) < stamped
    band = x[truth].float()
    band[:, :, :, : SIDE // 2] += strength
    x[truth] = band.clamp(0, 255).byte()
    return x, truth


# ---------------------------------------------------------------------------------- the figures


def test_figures_by_hand():
    stamped = torch.tensor([True, True, True, False, False])
    flagged = torch.tensor([True, True, False, True, False])
    scores = torch.tensor([0.9, 0.8, 0.1, 0.5, 0.2])
    found = detection.scored(flagged, scores, stamped)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == pytest.approx(2 / 3)
    assert found.f1 == pytest.approx(2 / 3)
    assert found.auroc == pytest.approx(4 / 6)  # of six pairs, two are the wrong way round
    none = detection.scored(torch.zeros(5, dtype=torch.bool), scores, stamped)
    assert (none.f1, none.precision, none.recall) == (0, 0, 0)


def test_a_level_is_not_asked_for_in_a_spec():
    """It would be replaced by --level's, without a word."""
    with pytest.raises(BadInput, match="ask for a level with --level deep"):
        detecting.check("spectral:level=deep")
    detecting.check("spectral:form=trusted")


def test_flagging_everything_is_no_detection():
    assert detection.flagging_everything(1.0) == pytest.approx(2 / 3)
    assert detection.flagging_everything(0.1) == pytest.approx(2 * (1 / 11) / (12 / 11))


def test_the_best_threshold_and_the_highest_scores():
    stamped = torch.tensor([False, True, True, False, True])
    scores = torch.tensor([0.5, 0.9, 0.4, 0.1, 0.3])
    best = detection.best_threshold(scores, stamped)
    assert best.tolist() == [True, True, True, False, True]  # F1 6/7, of all thresholds the best
    assert detection.highest(scores, 2).tolist() == [True, True, False, False, False]
    equal = torch.full((5,), 0.5)  # no threshold lies between equal scores
    first = torch.tensor([True, True, False, False, False])
    assert detection.best_threshold(equal, first).all()


# -------------------------------------------------------------------------------- the detectors


@pytest.mark.parametrize("level", ["shallow", "middle", "deep"])
def test_what_looks_different_inside_is_told_apart(detector, level):
    x, truth = mixed(120.0)
    fields = {"components": 3} if detector.method_name == "activation_clustering" else {}
    method = type(detector)(level=level, **fields)  # 20 components of 60 inputs are mostly noise
    model, trusted = transparent(), clean(80)
    scores = method.score(model, x, trusted, stream(0, "score"))
    assert isinstance(method, Detects)
    assert scores.shape == (60,)
    assert detecting.judged(method, scores, truth)["f1"] == 1
    again = method.score(model, x, trusted, stream(0, "score"))
    assert torch.equal(scores, again)


def test_what_looks_alike_is_not(detector):
    x, truth = mixed(0.0, n=90, stamped=30)
    scores = detector.score(transparent(), x, clean(80), stream(0, "score"))
    found = detecting.judged(detector, scores, truth)
    assert found["f1"] < 0.75
    assert 0.2 < found["auroc"] < 0.8


def test_too_few_inputs_are_refused(detector):
    x, _ = mixed(0.0)
    few = clean(80).take(torch.arange(1)) if detector.method_name == "subspace" else clean(80)
    x = x if detector.method_name == "subspace" else x[:1]
    with pytest.raises(BadInput, match=r"needs \d .* or more, got 1"):
        detector.score(transparent(), x, few, stream(0, "score"))


def test_leading_coordinates_are_those_of_the_singular_vectors():
    points = torch.randn(12, 40, generator=stream(0, "points"), dtype=torch.float64)
    points[:, 3:] *= 0.1
    found = activation_clustering.leading(points, 5)
    u, s, _ = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    assert torch.allclose(found.abs(), (u * s)[:, :5].abs())
    line = torch.arange(6.0).double()[:, None] * torch.ones(1, 9).double()
    assert activation_clustering.leading(line, 5).shape == (6, 1)  # they differ along one alone
    assert activation_clustering.leading(torch.ones(6, 9).double(), 5).shape == (6, 0)


def test_clusters_are_found_among_many_components_of_few_inputs(monkeypatch):
    """Reduced, every component has variance 1: random starts end at far inputs."""
    noise = torch.randn(100, 60, generator=stream(0, "noise"))
    stamped = torch.arange(100) < 40
    noise[stamped, 0] += 20
    monkeypatch.setattr(activation_clustering, "flat_features", lambda model, x, level: noise)
    method = activation_clustering.ActivationClustering()
    scores = method.score(None, torch.zeros(100), None, stream(0))
    assert torch.equal(scores.bool(), stamped)
    studied = activation_clustering.ActivationClustering(principal=False)
    scores = studied.score(None, torch.zeros(100), None, stream(0))
    assert not torch.equal(scores.bool(), stamped), "random starts alone, as in the SDRM study"


def test_inputs_that_are_alike_inside_are_not_suspected(monkeypatch):
    monkeypatch.setattr(
        activation_clustering, "flat_features", lambda model, x, level: torch.ones(10, 5)
    )
    method = activation_clustering.ActivationClustering()
    assert not method.score(None, torch.zeros(10), None, stream(0)).any()


def test_spectral_scores_are_squares_along_the_first_direction(monkeypatch):
    found = torch.tensor([[3.0, 0.1], [-1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
    expected = (found - found.mean(0)) @ torch.linalg.svd(found - found.mean(0)).Vh[0]

    monkeypatch.setattr(spectral, "flat_features", lambda model, x, level: found)
    scores = spectral.Spectral(form="paper").score(None, torch.zeros(4), None, stream(0))
    assert torch.allclose(scores, expected.square().float(), atol=1e-5)
    scores = spectral.Spectral(form="released").score(None, torch.zeros(4), None, stream(0))
    direction = torch.linalg.svd(found - found.mean(0)).Vh[0]
    assert torch.allclose(scores, (found @ direction).abs(), atol=1e-5)


def test_halves_are_told_apart_from_trusted_images_alone():
    x, truth = mixed(120.0, n=60, stamped=30)
    found = {}
    for form in ("trusted", "paper"):
        method = spectral.Spectral(form=form, level="shallow")
        scores = method.score(transparent(), x, clean(80), stream(0, "score"))
        found[form] = detecting.judged(method, scores, truth)["f1"]
    assert found["trusted"] == 1
    assert found["paper"] < 0.8


def test_trusted_images_are_those_of_the_class_that_inputs_are_taken_for(monkeypatch):
    answers = torch.eye(3)[torch.tensor([1, 1, 0, 1])]
    monkeypatch.setattr(spectral.training, "logits", lambda model, x: answers)
    own = Images(torch.arange(5), torch.tensor([0, 1, 2, 1, 0]))
    assert spectral.Spectral._trusted(None, torch.zeros(4), own).tolist() == [1, 3]
    with pytest.raises(BadInput, match="no clean image of class 1"):
        spectral.Spectral._trusted(None, torch.zeros(4), own.take(torch.tensor([0, 2])))


def test_a_subspace_holds_the_energy_asked_for(monkeypatch):

    trusted = torch.tensor(
        [[10.0, 0, 0], [-10, 0, 0], [0, 3, 0], [0, -3, 0], [0, 0, 1], [0, 0, -1]]
    )
    seen = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 3, 4]])
    tables = iter([trusted, seen])
    monkeypatch.setattr(subspace, "flat_features", lambda model, x, level: next(tables))
    scores = subspace.Subspace(energy=0.9).score(None, seen, Images(trusted, trusted), stream(0))
    assert scores.tolist() == pytest.approx([0, 5, 5])  # the first direction has 91 % of it
    tables = iter([trusted, seen])
    scores = subspace.Subspace(energy=0.95).score(None, seen, Images(trusted, trusted), stream(0))
    assert scores.tolist() == pytest.approx([0, 0, 4])


# --------------------------------------------------------------------------------- arena detect


def test_detectors_on_a_cell(examined):
    store, keys = examined
    words = ("detect", keys["patch"], "--store", store, "--device", "cpu", "--clean-share", 0.1)
    words = (*words, "--n", 20, "--draws", 2, "--ratio", 1.0, "--ratio", 0.25)
    answer = arena(*words, "--json")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    assert len(found["rows"]) == 3 * 3 * 2
    for row in found["rows"]:
        assert row["rule"].startswith("oracle")
        assert 0 <= row["f1"] <= 1
        assert row["everything"] == pytest.approx(2 / 3 if row["ratio"] == 1 else 1 / 3)
    assert {row["level"] for row in found["rows"]} == {"shallow", "middle", "deep"}
    told = arena(*words, "--level", "deep").out
    assert "all: F1 of flagging everything" in told
    assert told.count("deep") == 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--method", "spectrl"), "There is no detector 'spectrl'; did you mean 'spectral'?"),
        (("--method", "finetune"), "finetune repairs but detects nothing"),
        (("--level", "deepest"), "There is no feature level 'deepest'"),
        (("--n", 3), "--n must be at least 4"),
        (("--ratio", 0), "--ratio must be above 0"),
        (("--draws", 0), "--draws must be at least 1"),
        (("--n", 5000), "lower --n"),
        (("--n", 20, "--clean-share", 2), "--clean-share must be above 0 and at most 1"),
    ],
)
def test_questions_that_cannot_be(examined, words, told):
    store, keys = examined
    answer = arena("detect", keys["patch"], *words, "--store", store, "--device", "cpu")
    assert_refused(answer, told)


def test_cells_without_one_target_are_refused(examined):
    store, keys = examined
    answer = arena("detect", keys["none"], "--store", store)
    assert_refused(answer, "has no triggered images to detect")
    answer = arena("detect", keys["patch:mode=all_to_all"], "--store", store)
    assert_refused(answer, "more than one target class")
