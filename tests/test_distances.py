"""What the sizes of inverted triggers say about a model."""

from __future__ import annotations

import math

import pytest
import torch

from arena.core.inversion.distances import (
    anomalies,
    distances,
    improvement,
    parse_pairs,
    problems_of,
    smallest,
    smallest_by_target,
    universal_problems,
)
from arena.core.inversion.engine import Found, Problem
from arena.core.registry import BadInput, defenses
from arena.core.seeding import stream


def answer(victim, target, size, restart=0, asr=1.0):
    return Found(Problem(victim, target, restart), size, asr, {}, 10)


def test_pairs_in_words():
    assert len(parse_pairs("all", 4)) == 12
    assert parse_pairs("0:1, 3:2,0:1", 4) == [(0, 1), (3, 2)]
    sampled = parse_pairs("sample:5", 4)
    assert len(set(sampled)) == 5
    assert all(s != t for s, t in sampled)
    assert sampled == parse_pairs("sample:5", 4)
    assert sampled != parse_pairs("sample:5", 4, seed=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:4", "no class 4; classes are 0 to 3"),
        ("1:1", "Victim and target of 1:1 are one class"),
        ("sample:13", "have 12 ordered pairs; sample 1 to 12"),
        ("sample:0", "sample 1 to 12"),
        ("0-1", "names no pairs"),
        ("", "names no pairs"),
    ],
)
def test_pairs_that_are_none(text, message):
    with pytest.raises(BadInput, match=message):
        parse_pairs(text, 4)


def test_problems_of_pairs_and_of_targets():
    assert problems_of([(0, 1)], 2) == [Problem(0, 1, 0), Problem(0, 1, 1)]
    assert universal_problems(2, 1) == [Problem(None, 0), Problem(None, 1)]


def test_of_triggers_of_one_size_the_most_successful_is_the_smallest():
    """As of a family that is bounded: all its triggers are as large as may be."""
    found = [answer(0, 1, size, asr=asr) for size, asr in [(4.0, 0.4), (4.0 + 1e-8, 0.9), (5, 1)]]
    assert smallest(found).asr == 0.9
    assert smallest([*found, answer(0, 1, 3.9, asr=0.3), answer(0, 1, 0.0)]).asr == 0.3
    assert smallest([answer(0, 1, None), answer(0, 1, 0.0)]) is None


def test_a_distance_is_the_smallest_that_is_not_zero():
    found = [
        answer(0, 1, 5.0, 0),
        answer(0, 1, 0.0, 1),
        answer(0, 1, 3.0, 2, asr=0.93),
        answer(1, 0, None, 0),
        answer(1, 0, None, 1),
        answer(2, 0, 8.0),
        answer(None, 2, 1.0),  # universal: another question
    ]
    got = distances(found, 3)
    assert got.size[0, 1] == 3
    assert got.asr[0, 1] == 0.93
    assert float(got.spread[0, 1]) == pytest.approx(math.sqrt(2))
    assert got.spread[2, 0].isnan()
    assert got.unreached == [(1, 0)]
    assert int((~got.size.isnan()).sum()) == 2
    assert got.mean == 5.5
    assert distances([], 3).mean is None


def test_the_improvement_is_a_mean_of_ratios():
    nan = torch.nan
    old = torch.tensor([[nan, 2.0], [10.0, nan]])
    new = torch.tensor([[nan, 4.0], [15.0, 1.0]])
    assert improvement(new, old) == pytest.approx((1.0 + 0.5) / 2)
    assert improvement(new, torch.full((2, 2), nan)) is None


def test_an_anomaly_by_hand():
    sizes = torch.tensor([10.0, 12.0, 2.0, 11.0, 13.0])  # median 11; deviations 1 1 9 0 2: MAD 1
    for least, spread in ((0.0, 1.4826), (0.1, 1.4826), (0.2, 2.2)):
        found = anomalies(sizes, least)
        assert float(found.index[2]) == pytest.approx(9 / spread)
        assert float(found.index[4]) == pytest.approx(-2 / spread)
        assert found.flagged == [2]
        assert found.score == pytest.approx(9 / spread)
    wide = torch.tensor([1.0, 8.0, 11.0, 14.0, 22.0])  # deviations 10 3 0 3 11: MAD 3
    assert float(anomalies(wide, 0.2).index[0]) == pytest.approx(10 / (3 * 1.4826))
    assert anomalies(torch.tensor([10.0, 12.0, 30.0, 11.0, 13.0])).flagged == [], "large, not small"


@pytest.mark.parametrize("scanner", ["nc", "pixel"])
def test_ten_sizes_that_vary_by_chance_blame_no_class_and_one_far_below_does(scanner):
    least = defenses.build(scanner).least_spread
    draws = 20 + 2 * torch.randn(500, 10, generator=stream(0, "sizes"))
    by_paper = sum(bool(anomalies(sizes, 0.0).flagged) for sizes in draws)
    assert 0.25 < by_paper / len(draws) < 0.42
    assert not any(anomalies(sizes, least).flagged for sizes in draws)
    for sizes in draws:
        sizes[4] = 0.33 * sizes.median()
        by_paper = anomalies(sizes, 0.0).index[4]
        assert anomalies(sizes, least).flagged == ([4] if by_paper > 2 else [])
    found = anomalies(torch.tensor([20.0, 20, 20, 20, 7.9, 20, 20, 20, 20, 8.1]), least)
    assert found.flagged == [4]


def test_anomalies_where_triggers_are_missing_or_alike():
    nan = torch.nan
    assert anomalies(torch.tensor([nan, nan])).flagged == []
    assert anomalies(torch.tensor([nan, nan])).score == 0
    found = anomalies(torch.tensor([10.0, nan, 12.0, 11.0, 1.0]))
    assert found.flagged == [4]
    assert found.index[1].isnan()
    assert anomalies(torch.full((4,), 3.0)).flagged == []


def test_the_smallest_of_every_target():
    found = [
        answer(None, 1, 4.0),
        answer(None, 1, 3.0, 1),
        answer(None, 0, None),
        answer(0, 2, 1.0),
    ]
    sizes = smallest_by_target(found, 3)
    assert sizes[1] == 3
    assert sizes[0].isnan()
    assert sizes[2].isnan()
