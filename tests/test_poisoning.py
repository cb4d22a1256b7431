"""Which rows are poisoned, with which labels; and stamping at 8 bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arena.core.contracts import Images, Trigger
from arena.core.poisoning import (
    all_to_all,
    applies,
    check_classes,
    clean_label,
    dirty_label,
    scope,
    stamp,
    wanted,
)
from arena.core.registry import BadInput
from arena.core.seeding import stream

INVERT = Trigger(lambda x: 1 - x)


def images(n=100, classes=10, channels=3, side=8):
    rng = stream(0, "images", n, classes)
    x = torch.randint(256, (n, channels, side, side), generator=rng, dtype=torch.uint8)
    return Images(x, torch.arange(n) % classes)


class Attack:
    """Only what `wanted`, `applies` and `check_classes` read."""

    method_name = "toy"

    def __init__(self, **fields):
        self.__dict__.update(fields)


# ------------------------------------------------------------------------------------ the images


@given(
    n=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    batch=st.integers(1, 10),
)
@settings(deadline=None, max_examples=30)
def test_the_identity_keeps_every_byte_whatever_the_batch(n, channels, height, width, batch):
    x = torch.arange(n * channels * height * width).mul(37).remainder(256).to(torch.uint8)
    x = x.view(n, channels, height, width)
    assert torch.equal(stamp(x, lambda image: image, batch=batch), x)


def test_stamp_rounds_to_the_nearest_level_and_clips():
    x = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    shifts = torch.tensor([0.4, 0.6, 80.0, -300.0]).view(1, 1, 2, 2) / 255
    stamped = stamp(x, lambda image: image + shifts)
    assert stamped.flatten().tolist() == [0, 101, 255, 0]
    assert stamped.dtype == torch.uint8


def test_stamp_leaves_its_argument_alone_even_if_the_map_does_not():
    x = images(5).x
    before = x.clone()
    assert torch.equal(stamp(x, lambda image: image.zero_()), torch.zeros_like(x))
    assert torch.equal(x, before)


def test_stamp_hands_over_batches_of_the_size_asked_for():
    sizes = []
    stamp(images(10).x, lambda image: sizes.append(len(image)) or image, batch=4)
    assert sizes == [4, 4, 2]
    assert stamp(images(3).x[:0], lambda image: image).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("image_map", "message"),
    [(lambda x: x[..., :1], "turned images of"), (lambda x: x * float("nan"), "NaN")],
)
def test_stamp_refuses_what_is_no_image(image_map, message):
    with pytest.raises(ValueError, match=message):
        stamp(images(3).x, image_map)


def test_stamp_refuses_float_images():
    with pytest.raises(ValueError, match="uint8"):
        stamp(torch.zeros(1, 1, 2, 2), lambda x: x)


# -------------------------------------------------------------------------------- rows and labels


def untouched(train, poisoned):
    """Whether every row that is not named is as it was."""
    rest = torch.ones(len(train), dtype=torch.bool)
    rest[poisoned.rows] = False
    data = poisoned.data
    return torch.equal(data.x[rest], train.x[rest]) and torch.equal(data.y[rest], train.y[rest])


@given(n=st.integers(20, 90), rate=st.floats(0.05, 0.6), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_dirty_labels_in_exact_share_of_the_training_set(n, rate, seed):
    train = images(n, classes=4, side=2)
    before = train.x.clone(), train.y.clone()
    poisoned = dirty_label(train, INVERT, 1, rate, stream(seed, "p"))
    rows = poisoned.rows
    assert len(rows) == len(set(rows.tolist())) == round(rate * n)
    assert not (train.y[rows] == 1).any()
    assert (poisoned.data.y[rows] == 1).all()
    assert torch.equal(poisoned.data.x[rows], 255 - train.x[rows])
    assert untouched(train, poisoned)
    assert torch.equal(train.x, before[0])
    assert torch.equal(train.y, before[1])


def test_the_share_may_count_the_candidates():
    poisoned = dirty_label(images(), INVERT, 0, 0.1, stream(0, "p"), of="candidates")
    assert len(poisoned.rows) == 9  # of 90 images that are not of class 0


def test_only_the_victim_class_is_poisoned():
    train = images()
    poisoned = dirty_label(train, INVERT, 2, 0.06, stream(0, "p"), victim=5)
    assert len(poisoned.rows) == 6
    assert (train.y[poisoned.rows] == 5).all()
    assert (poisoned.data.y[poisoned.rows] == 2).all()
    assert untouched(train, poisoned)


def test_extending_keeps_the_originals():
    train = images()
    replaced = dirty_label(train, INVERT, 0, 0.2, stream(0, "p"))
    poisoned = dirty_label(train, INVERT, 0, 0.2, stream(0, "p"), extend=True)
    assert len(poisoned.data) == 120
    assert poisoned.rows.tolist() == list(range(100, 120))
    assert torch.equal(poisoned.data.x[:100], train.x)
    assert torch.equal(poisoned.data.y[:100], train.y)
    assert torch.equal(poisoned.data.x[100:], replaced.data.x[replaced.rows])
    assert (poisoned.data.y[100:] == 0).all()


def test_training_uses_embed_where_it_differs_from_stamp():
    train, trigger = images(), Trigger(lambda x: x, embed=lambda x: 1 - x)
    poisoned = dirty_label(train, trigger, 0, 0.5, stream(0, "p"))
    assert torch.equal(poisoned.data.x[poisoned.rows], 255 - train.x[poisoned.rows])


def test_all_to_all_moves_each_label_to_the_next():
    train = images()
    poisoned = all_to_all(train, INVERT, 1.0, stream(0, "p"), 10)
    assert len(poisoned.rows) == 100
    assert torch.equal(poisoned.data.y, (train.y + 1) % 10)
    assert set(poisoned.data.y[train.y == 9].tolist()) == {0}
    half = all_to_all(train, INVERT, 0.5, stream(0, "p"), 10)
    assert len(half.rows) == 50
    assert untouched(train, half)


def test_clean_labels_touch_the_target_class_only_and_keep_labels():
    train = images()
    poisoned = clean_label(train, INVERT, 3, 0.5, stream(0, "p"))
    assert len(poisoned.rows) == 5
    assert (train.y[poisoned.rows] == 3).all()
    assert torch.equal(poisoned.data.y, train.y)
    assert torch.equal(poisoned.data.x[poisoned.rows], 255 - train.x[poisoned.rows])
    assert untouched(train, poisoned)
    assert len(clean_label(train, INVERT, 3, 0.08, stream(0, "p"), of="train").rows) == 8


def test_the_same_seed_poisons_the_same_rows_and_another_does_not():
    one, two, other = (
        dirty_label(images(), INVERT, 0, 0.3, stream(seed, "p")) for seed in (1, 1, 2)
    )
    assert torch.equal(one.rows, two.rows)
    assert torch.equal(one.data.x, two.data.x)
    assert not torch.equal(one.rows, other.rows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, r: dirty_label(t, INVERT, 0, 0.0, r), "must lie in"),
        (lambda t, r: dirty_label(t, INVERT, 0, 1.1, r), "must lie in"),
        (lambda t, r: dirty_label(t, INVERT, 0, 0.004, r), "less than one image"),
        (lambda t, r: dirty_label(t, INVERT, 0, 1.0, r), "100 images, but only 90 .* is 0.9"),
        (lambda t, r: dirty_label(t, INVERT, 4, 0.1, r, victim=4), "both 4"),
        (lambda t, r: dirty_label(t, INVERT, 0, 0.2, r, victim=4), "20 images, but only 10"),
        (lambda t, r: clean_label(t, INVERT, 0, 0.2, r, of="train"), "20 images, but only 10"),
        (lambda t, r: all_to_all(t, INVERT, 0.001, r, 10), "less than one image"),
    ],
)
def test_impossible_shares_are_refused_in_one_sentence(call, message):
    with pytest.raises(BadInput, match=message):
        call(images(), stream(0, "p"))


# ------------------------------------------------------------------------- what an attacker wants

Y = torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("attack", "kind", "labels", "mask"),
    [
        (Attack(target=2), "universal", [2, 2, 2, 2], [1, 1, 0, 1]),
        (Attack(target=2, victim=None), "universal", [2, 2, 2, 2], [1, 1, 0, 1]),
        (Attack(target=2, victim=3), "label-specific", [2, 2, 2, 2], [0, 0, 0, 1]),
        (Attack(target=0, victim=None, mode="all_to_all"), "all-to-all", [1, 2, 3, 0], [1] * 4),
    ],
)
def test_what_the_attacker_wants_of_which_images(attack, kind, labels, mask):
    assert scope(attack) == kind
    assert wanted(attack, Y, 4).tolist() == labels
    assert applies(attack, Y, 4).tolist() == [bool(counts) for counts in mask]


@pytest.mark.parametrize(
    ("attack", "classes", "message"),
    [
        (Attack(target=4), 4, "target 4 is not a class .* 0 to 3"),
        (Attack(target=1, victim=7), 4, "victim 7 is not a class"),
        (Attack(target=1, victim=1), 4, "both 1"),
        (Attack(target=0), 1, "at least two classes"),
    ],
)
def test_classes_that_do_not_exist_are_refused(attack, classes, message):
    with pytest.raises(BadInput, match=message):
        check_classes(attack, [10] * classes)


def test_classes_that_exist_pass():
    check_classes(Attack(target=3, victim=0), [10] * 4)
    check_classes(Attack(), [10] * 2)
