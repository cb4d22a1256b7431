"""Measures: known answers, gains by hand, and what counts as having been measured."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import toys
from test_inversion import Corner
from torch import nn

from arena.core.contracts import Images
from arena.core.inversion.distances import distances, problems_of
from arena.core.inversion.engine import invert
from arena.core.inversion.families import families
from arena.core.inversion.frozen import Frozen
from arena.core.measures import COLUMNS, Reading, measures
from arena.core.progress import listening
from arena.core.registry import BadInput, code_hash
from arena.identity import method_identity
from arena.measures import class_distance
from arena.measures.class_distance import ClassDistance
from arena.measures.pgd import PGD
from arena.measuring import Asked, failure, lacking
from arena.report.rows import MEASURED, UNITS

NOTHING = Images(torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))


class Brightness(nn.Module):
    """Class 1 where the mean of four pixels is above 127.5: an image of level v keeps its class
    under every change of less than |v - 127.5| levels, and loses it under one that is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = 100 * ((x.flatten(1) - 0.5) * self.weight).mean(1)
        return torch.stack([-score, score], 1)


def levels(*values: int) -> Images:
    x = torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return Images(x.contiguous(), (torch.tensor(values) > 127).long())


def robust(images: Images, **fields: Any) -> float:
    found = PGD(**fields).measure(Brightness(), NOTHING, images, 0)
    assert found.each == []
    share = found.figures["robust_acc"]
    assert share is not None
    return share


# -------------------------------------------------------------------------------------------- PGD


def test_an_image_falls_where_its_margin_is_below_the_radius():
    near, far = levels(123, 132), levels(100, 150)  # margins of 4.5, and of 22.5 and more
    both = Images(torch.cat([near.x, far.x]), torch.cat([near.y, far.y]))
    assert robust(both, eps=4.0) == 1.0
    assert robust(both, eps=5.0) == 0.5
    assert robust(both, eps=22.0) == 0.5
    assert robust(both, eps=28.0) == 0.0


def test_an_image_that_is_wrong_without_an_attack_is_not_robust():
    images = levels(0, 255, 255, 255)
    wrong = Images(images.x, torch.tensor([1, 1, 1, 1]))
    assert robust(wrong, eps=1.0) == 0.75


def test_steps_reach_the_border_from_anywhere_and_short_ones_do_not():
    images = levels(*[120] * 20)  # a margin of 7.5 of 8: every pixel must go there
    assert robust(images, eps=8.0) == 0.0
    assert robust(images, eps=8.0, steps=2) == 0.0
    assert robust(images, eps=8.0, steps=2, step=0.1) == 1.0


def test_images_are_taken_from_the_whole_of_a_sorted_set():
    images = levels(*[124] * 50, *[200] * 50)
    found = PGD(eps=8.0, images=10).measure(Brightness(), NOTHING, images, 0)
    assert found.figures == {"robust_acc": 0.5, "images": 10}
    assert PGD(images=1000).measure(Brightness(), NOTHING, images, 0).figures["images"] == 100


def test_pgd_tells_how_far_it_is_and_changes_no_model(monkeypatch):
    monkeypatch.setattr("arena.measures.pgd._BATCH_PIXELS", 8)  # two images at once
    told: list[float] = []
    model = Brightness().train()
    before = copy.deepcopy(model.state_dict())
    with listening(lambda what, done, total, figures: told.append(done / total)):
        one = PGD(eps=4.0).measure(model, NOTHING, levels(123, 132, 100, 150), 0)
    assert told == [0.5, 1.0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model.weight.requires_grad
    assert one == PGD(eps=4.0).measure(model, NOTHING, levels(123, 132, 100, 150), 0)


def test_the_columns_of_pgd():
    before, after = (Reading({"robust_acc": v, "images": 10}, []) for v in (0.1, 0.4))
    assert PGD(eps=4.0, steps=7).compare(before, after) == {
        "robust_acc": 0.4,
        "robust_acc_before": 0.1,
        "robust_against": "PGD-7 4/255",
    }
    assert PGD(step=2.0).name == "PGD-20 8/255, steps of 2/255"


# --------------------------------------------------------------------------------- class distance

QUICK = {"samples": 12, "steps": 40}


def test_the_gain_by_hand():
    before = Reading(
        {"distance": 8.0, "pairs": 4, "unreached": 1},
        [[0, 1, 10.0], [1, 0, 4.0], [0, 2, None], [2, 0, 10.0]],
    )
    after = Reading(
        {"distance": 12.0, "pairs": 4, "unreached": 1},
        [[0, 1, 15.0], [1, 0, 2.0], [0, 2, 19.0], [2, 0, None]],
    )
    assert ClassDistance().compare(before, after) == {
        "distance": 12.0,
        "distance_before": 8.0,
        "distance_gain": pytest.approx((0.5 - 0.5) / 2),
        "distance_unit": "mask L1 (nc)",
    }
    after.each[1][2] = 8.0
    assert ClassDistance().compare(before, after)["distance_gain"] == pytest.approx((0.5 + 1) / 2)
    after.each[:2] = [[0, 1, None], [1, 0, None]]
    assert ClassDistance().compare(before, after)["distance_gain"] is None


def test_a_reading_is_what_the_engine_finds(images):
    model, measure = toys.planted(), ClassDistance(pairs="3:0,1:2", restarts=2, **QUICK)
    found = measure.measure(model, images, NOTHING, 5)
    problems = problems_of([(3, 0), (1, 2)], 2)
    answers = invert(
        Frozen(model), families.build("nc"), problems, images, measure.search, seed=5
    )  # fmt: skip
    wanted = distances(answers, toys.CLASSES)
    assert not wanted.unreached
    assert found.each == [[s, t, float(wanted.size[s, t])] for s, t in ((3, 0), (1, 2))]
    assert found.figures == {"distance": wanted.mean, "pairs": 2, "unreached": 0}
    assert measure.compare(found, found)["distance_gain"] == 0


def test_a_backdoor_s_class_is_near(images):
    model = toys.planted()
    model.body = Corner()
    coloured = images.take(images.y < 3)
    found = ClassDistance(pairs="1:0,1:2", **QUICK).measure(model, coloured, NOTHING, 0)
    (_, _, planted), (_, _, other) = found.each
    assert planted is not None
    assert other is not None
    assert planted < other / 2


def test_a_pair_without_a_trigger_is_counted(images):
    found = ClassDistance(pairs="1:2", samples=12, steps=1).measure(
        toys.planted(), images, NOTHING, 0
    )
    assert found.figures == {"distance": None, "pairs": 1, "unreached": 1}
    assert found.each == [[1, 2, None]]


def test_the_seed_draws_the_pairs_and_a_checkpoint_reaches_the_engine(images, monkeypatch):
    asked = []

    def spy(*args, **options):
        asked.append((args[2], options))
        return []

    monkeypatch.setattr(class_distance, "invert", spy)
    measure = ClassDistance(pairs="sample:3", restarts=2)
    mark: Any = object()
    for seed in (0, 0, 1):
        measure.measure(toys.planted(), images, NOTHING, seed, mark)
    assert len(asked[0][0]) == 6
    assert asked[0][0] == asked[1][0] != asked[2][0]
    assert [options["seed"] for _, options in asked] == [0, 0, 1]
    assert all(options["checkpoint"] is mark for _, options in asked)
    assert measure.passes(4) == 3 * 3 * 2 * 1000 * 100


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("class_distance:pairs=(0:4)", "no class 4; classes are 0 to 3"),
        ("class_distance:pairs=sample:0", "have 12 ordered pairs"),
        ("class_distance:samples=41", "Class . has 40 images, but 41 are asked for"),
    ],
)
def test_what_cannot_be_measured_is_told_beforehand(images, spec, message):
    with pytest.raises(BadInput, match=message):
        measures.build(spec).check(images, NOTHING, toys.CLASSES, 0)
    measures.build("class_distance:pairs=all,samples=40").check(images, NOTHING, toys.CLASSES, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("class_distance:method=nx", "no trigger family 'nx'; did you mean 'nc'"),
        ("class_distance:method=(nc:nudge=9)", "nudge must be at most 0.5"),
        ("class_distance:restarts=0", "restarts must be at least 1"),
        ("pgd:eps=0", "eps must be above 0"),
        ("pgd:step=0", "step must be above 0"),
        ("pdg", "no measure 'pdg'; did you mean 'pgd'"),
    ],
)
def test_settings_that_cannot_be(spec, message):
    with pytest.raises(BadInput, match=message):
        measures.build(spec)


def test_a_sample_of_more_pairs_than_there_are_is_all_of_them():
    measure = ClassDistance(pairs="sample:20")
    assert len(measure.chosen(5, 0)) == 20
    assert measure.chosen(4, 0) == measure.chosen(4, 1)
    assert len(measure.chosen(4, 0)) == 12
    assert len(measure.chosen(10, 0)) == 20
    assert measure.chosen(10, 0) != measure.chosen(10, 1)


def test_units_name_the_family_and_the_encoder(monkeypatch):
    assert ClassDistance(method="nc:nudge=0").unit == "mask L1 (nc:nudge=0)"
    family = families.load("filter")
    monkeypatch.setattr(family, "seen_by", "vgg")
    assert ClassDistance(method="filter").unit == (
        "levels of mean and deviation (filter, encoder vgg)"
    )


@pytest.mark.parametrize("name", measures.names())
def test_every_column_of_a_measure_is_known_to_the_tables(name):
    blank = Reading({column.name: None for column in COLUMNS}, [[0, 1, 1.0]])
    columns = measures.build(name).compare(blank, blank)
    assert set(columns) <= {*MEASURED, *UNITS.values()}
    assert any(unit in columns for unit in UNITS.values())


# ---------------------------------------------------------------------- what has been measured


def test_the_family_counts_for_a_measure_s_identity():
    identity = method_identity(ClassDistance())
    assert identity["wrapped"]["method"]["code"] == code_hash("arena.inversions.nc")
    assert identity["wrapped"]["method"]["spec"].startswith("nc:nudge=")
    assert "wrapped" not in method_identity(PGD())


def asked(measure: Any) -> Asked:
    return Asked(measure, method_identity(measure))


def test_a_record_lacks_what_was_not_taken_by_this_code():
    one, two = asked(PGD()), asked(ClassDistance())
    good = {"name": "x", "short": "x", "status": "ok", "reason": ""}
    entries = {each.spec: {**good, **each.identity} for each in (one, two)}
    record: dict[str, Any] = {"weights": {}, "measures": entries}
    assert lacking(record, [one, two]) == []
    assert lacking({"weights": {}}, [one, two]) == [one, two]
    assert lacking({}, [one, two]) == [], "no model came out of the cell"
    assert lacking(record, [asked(PGD(eps=4.0))]) != []
    other = {**two.identity, "wrapped": {"method": {"spec": "nc", "code": "another"}}}
    entries[two.spec] = {**good, **other}
    assert lacking(record, [one, two]) == [two]
    entries[one.spec] = failure(one, "failed", "out of memory", "")
    assert lacking(record, [one, two]) == [one, two]
