"""Statuses and flags against known answers, on both sides of each threshold."""

from __future__ import annotations

import pytest

from arena.core.checks import FLAGS, flags, status

HEALTHY = {
    "acc": 0.90, "asr": 0.05, "ra": 0.88,
    "acc_before": 0.91, "asr_before": 0.99, "ra_before": 0.02,
    "clean_twin_acc": 0.92, "clean_twin_asr": 0.03, "clean_twin_ra": 0.90,
    "twin_acc_drop": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "top", "expected"),
    [
        ({}, 0.2, "ok"),
        ({"asr_before": 0.79}, 0.2, "not_established"),
        ({"asr_before": 0.80}, 0.2, "ok"),
        ({"acc_before": 0.86}, 0.2, "not_established"),  # over 5 points below the twin
        ({"acc_before": 0.88}, 0.2, "ok"),
        ({"clean_twin_acc": None}, 0.2, "ok"),
        ({"acc": 0.80}, 0.2, "collapsed"),
        ({"acc": 0.82}, 0.2, "ok"),
        ({}, 0.51, "collapsed"),
        ({}, 0.50, "ok"),
        ({"asr_before": None, "acc_before": 0.5, "acc": 0.5}, 0.2, "ok"),  # the twin itself
        ({"asr_before": 0.5, "acc": 0.1}, 0.9, "not_established"),  # nothing to repair
    ],
)
def test_status(change: dict[str, float | None], top: float, expected: str) -> None:
    assert status({**HEALTHY, **change}, top, classes=10) == expected


def test_two_classes_may_lean_to_one() -> None:
    assert status(HEALTHY, 0.6, classes=2) == "ok"


@pytest.mark.parametrize(
    ("change", "options", "raised"),
    [
        ({}, {}, []),
        ({"twin_acc_drop": 0.06}, {}, ["harms_clean_twin"]),
        ({"twin_acc_drop": 0.04}, {}, []),
        ({"twin_acc_drop": None}, {}, []),
        ({"clean_twin_ra": 0.45}, {}, ["destroys_images"]),
        ({"clean_twin_ra": 0.47}, {}, []),
        ({"clean_twin_asr": 0.21}, {}, ["clean_model_falls"]),
        ({"clean_twin_asr": 0.19}, {}, []),
        ({"ra": 0.26}, {}, ["not_recovered"]),
        ({"ra": 0.28}, {}, []),
        ({"ra": 0.26, "asr": 0.50}, {}, []),  # the ASR hardly fell
        ({}, {"probabilities": True}, ["probabilities"]),
        ({}, {"repeatable": False}, ["not_repeatable"]),
        ({}, {"null_defense": True}, ["null_moved"]),
        (
            {"acc": 0.91, "asr": 0.99, "ra": 0.02},
            {"null_defense": True},
            [],
        ),
        (
            {"acc": 0.91, "asr": 0.98, "ra": 0.02},
            {"null_defense": True},
            ["null_moved"],
        ),
    ],
)
def test_each_flag(
    change: dict[str, float | None], options: dict[str, bool], raised: list[str]
) -> None:
    assert [flag.name for flag in flags({**HEALTHY, **change}, "ok", **options)] == raised


@pytest.mark.parametrize("state", ["not_established", "collapsed"])
def test_a_status_is_a_flag_too(state: str) -> None:
    assert [flag.name for flag in flags(HEALTHY, state)] == [state]


def test_a_clean_cell_without_a_trigger_raises_nothing() -> None:
    assert flags({"acc": 0.9, "acc_before": 0.9, "asr": None, "ra": None}, "ok") == []


def test_every_flag_says_what_it_means_and_what_to_do() -> None:
    for name, flag in FLAGS.items():
        assert flag.name == name
        for text in (flag.meaning, flag.remedy):
            assert text[0].isupper()
            assert text.endswith(".")
