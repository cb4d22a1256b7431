"""The embedded data set: deterministic, balanced, distinct, and as hard as its conditions say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from arena.core.progress import listening
from arena.data.signs import CLASS_LIMITS, CLEAR, Conditions, class_names, generate, render

CHUNK = 128  # images per chunk at side 32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small operations shared out over busy cores take many times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def train() -> tuple[Tensor, Tensor]:
    return generate("train", 2 * CHUNK + 44)


@pytest.fixture(scope="module")
def clear() -> Tensor:
    """One image of each class with nothing in its way, float32 in [0, 255]."""
    return render(torch.arange(CLASS_LIMITS[1]), conditions=CLEAR).float()


@pytest.mark.parametrize(("classes", "side", "count"), [(5, 32, 7), (45, 47, 90), (10, 224, 8)])
def test_returns_uint8_images_and_int64_labels(classes: int, side: int, count: int) -> None:
    x, y = generate("train", count, classes=classes, side=side)
    assert x.shape == (count, 3, side, side)
    assert x.dtype == torch.uint8
    assert y.shape == (count,)
    assert y.dtype == torch.int64
    assert x.flatten(1).float().std(1).min() > 1


def test_the_seed_fixes_every_byte(train: tuple[Tensor, Tensor]) -> None:
    torch.rand(3)  # the global generator plays no part
    x, y = generate("train", len(train[1]))
    assert torch.equal(x, train[0])
    assert torch.equal(y, train[1])


def test_the_number_of_threads_changes_no_byte_and_stays() -> None:
    before = torch.get_num_threads()
    images, drawn = [], []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            images.append(generate("train", 12, side=160)[0])
            assert torch.get_num_threads() == threads
            drawn.append(render(torch.arange(3), side=128))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*images)
    assert torch.equal(*drawn)


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_a_smaller_count_is_a_prefix(train: tuple[Tensor, Tensor], count: int) -> None:
    x, y = generate("train", count)
    assert torch.equal(x, train[0][:count])
    assert torch.equal(y, train[1][:count])


@pytest.mark.parametrize("change", [{"split": "test"}, {"seed": 1}])
def test_splits_and_seeds_share_no_image(
    train: tuple[Tensor, Tensor], change: dict[str, object]
) -> None:
    x, y = generate(**{"split": "train", "count": len(train[1]), **change})  # type: ignore[arg-type]
    assert not torch.equal(y, train[1])
    known = {bytes(image.numpy()) for image in train[0]}
    assert len(known) == len(train[0])  # nor does a split repeat itself
    assert known.isdisjoint(bytes(image.numpy()) for image in x)


@pytest.mark.parametrize("classes", [5, 10, 43])
def test_every_prefix_is_balanced_and_shuffled(classes: int) -> None:
    _, y = generate("train", 300, classes=classes)
    for count in (classes, 100, 300):
        sizes = torch.bincount(y[:count], minlength=classes)
        assert len(sizes) == classes
        assert sizes.max() - sizes.min() <= 1
    assert not torch.equal(y[:classes], y[classes : 2 * classes])


def test_names_are_unique_and_do_not_depend_on_the_number_of_classes() -> None:
    names = class_names(45)
    assert len(set(names)) == 45
    assert class_names(7) == names[:7]
    assert names[4] == "red octagon, white rim, white bar"


def test_the_label_decides_the_sign(clear: Tensor) -> None:
    """A class looks the same whatever is drawn beside it."""
    some = render(torch.tensor([9, 3, 44]), conditions=CLEAR)
    assert torch.equal(some.float(), clear[[9, 3, 44]])


def test_the_classes_are_what_their_names_say() -> None:
    x = render(torch.arange(45), side=96, conditions=CLEAR).long()
    octagon, triangle = x[4], x[5]
    assert octagon[:, 26, 48].tolist() == pytest.approx([196, 26, 31], abs=3)  # red above the bar
    assert octagon[:, 48, 48].tolist() == pytest.approx([237, 237, 235], abs=3)  # the white bar
    assert octagon[:, 3, 3].tolist() == [128] * 3  # the scene around it
    (rows,) = (triangle[0] - triangle[1] > 60).any(1).nonzero(as_tuple=True)  # its red rim
    red = (triangle[0] - triangle[1] > 60).float()
    assert red[rows.max()].sum() > 4 * red[rows.min()].sum()  # it stands on its side


def test_any_two_classes_differ_visibly(clear: Tensor) -> None:
    """In the largest difference over the image, after a blur that hides single pixels."""
    soft = torch.nn.functional.avg_pool2d(clear, 2)
    names = class_names(45)
    for a, b in combinations(range(45), 2):
        assert (soft[a] - soft[b]).abs().max() > 35, f"{names[a]} | {names[b]}"


def test_a_clear_view_is_classified_by_the_nearest_class(clear: Tensor) -> None:
    """Mild conditions leave each image nearest to its own class: the signs can be told apart."""
    mild = Conditions(**{f.name: 0.1 for f in fields(Conditions)})
    labels = torch.arange(45).repeat(4)
    x = render(labels, conditions=replace(mild, leaves=0, rain=0, snow=0)).float()
    nearest = torch.cdist(x.flatten(1), clear.flatten(1)).argmin(1)
    assert (nearest == labels).float().mean() > 0.85


@pytest.mark.parametrize("name", [field.name for field in fields(Conditions)])
def test_every_condition_does_something(name: str) -> None:
    labels = torch.arange(45)
    full = render(labels).float()
    without = render(labels, conditions=replace(Conditions(), **{name: 0.0})).float()
    changed = (full - without).abs().mean((1, 2, 3)) > 0.3
    assert changed.sum() >= 4
    if name in ("rain", "fog", "snow"):  # one weather at a time
        assert changed.sum() <= 20


def test_a_condition_adds_nothing_at_zero(clear: Tensor) -> None:
    assert torch.equal(clear[0], render(torch.tensor([0]), seed=5, conditions=CLEAR)[0].float())


def test_no_pixel_carries_a_fixed_mark() -> None:
    """A watermark would be a trigger: each pixel varies, and no place stands out on average."""
    x = generate("train", 2000)[0].float()
    assert x.std(0).min() > 30
    border = torch.ones(32, 32, dtype=torch.bool)
    border[4:-4, 4:-4] = False
    mean = x.mean((0, 1))
    smooth = torch.nn.functional.avg_pool2d(mean[None, None], 5, 1, 2, count_include_pad=False)
    assert (mean - smooth[0, 0])[border].abs().max() < 6


def test_a_blurred_image_has_less_detail() -> None:
    labels = torch.arange(45)
    still = replace(Conditions(), noise=0.0, motion=0.0)
    sharp, blurred = (
        render(labels, conditions=replace(still, defocus=d)).float().diff(dim=-1).abs().mean()
        for d in (0.0, 1.0)
    )
    assert blurred < 0.85 * sharp


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 4}, "5 to 45 for classes, got 4; the nearest is 5"),
        ({"classes": 46}, "5 to 45 for classes, got 46; the nearest is 45"),
        ({"side": 31}, "32 to 224 for side, got 31; the nearest is 32"),
        ({"side": 225}, "32 to 224 for side, got 225; the nearest is 224"),
        ({"count": 0}, "at least 1, got 0"),
        ({"split": ""}, "needs a name"),
    ],
)
def test_bad_input_is_one_sentence(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(**{"split": "train", "count": 1, **change})  # type: ignore[arg-type]


def test_class_names_checks_its_range() -> None:
    with pytest.raises(ValueError, match="5 to 45"):
        class_names(46)


def test_progress_ends_at_the_count() -> None:
    heard: list[tuple[str, float, float]] = []
    with listening(lambda what, done, total, _: heard.append((what, done, total))):
        generate("train", CHUNK + 2)
    assert heard == [("signs", CHUNK, CHUNK + 2), ("signs", CHUNK + 2, CHUNK + 2)]
