"""Which rows go where: class-proportional draws and the papers' validation splits."""

from __future__ import annotations

import logging

import torch
from torch import Generator, Tensor

from arena.core.seeding import stream
from arena.data.catalogue import DataError, DatasetInfo

_log = logging.getLogger("arena")
_FRAMES = (30, 10)  # frames a track: as released, and in copies that keep every third frame


def draw_rows(
    y: Tensor, count: int | None, rng: Generator, exclude: Tensor | None = None
) -> Tensor:
    """(count,) int64 sorted rows of `y` (N,), none of `exclude`, in the proportions of `y`.

    Seats go to classes by largest remainder, one at least to every class that has a row left
    (where there are enough seats). Within a class the rows come first in one permutation of all
    rows, so that the same seed with another `exclude` draws as nearly the same rows as can be.
    count: None: all that are not excluded.
    """
    free = torch.ones(len(y), dtype=torch.bool)
    if exclude is not None:
        free[exclude] = False
    count = int(free.sum()) if count is None else count
    if not 1 <= count <= int(free.sum()):
        raise ValueError(
            f"cannot draw {count} rows: {int(free.sum())} of {len(y)} are free to be drawn"
        )
    order = torch.randperm(len(y), generator=rng)
    order = order[free[order]]
    ideal = torch.bincount(y).double() * count / len(y)
    room = torch.bincount(y[free], minlength=len(ideal))
    seats = torch.minimum(ideal.long(), room)
    if count >= int((room > 0).sum()):
        seats = torch.maximum(seats, room.clamp(max=1))
    gap = ideal - seats
    for _ in range(count - int(seats.sum())):
        _move(seats, gap, int(gap.masked_fill(seats >= room, -torch.inf).argmax()), 1)
    for _ in range(int(seats.sum()) - count):
        _move(seats, gap, int(gap.masked_fill(seats <= 1, torch.inf).argmin()), -1)
    picked = [order[y[order] == c][: int(n)] for c, n in enumerate(seats) if n > 0]
    return torch.cat(picked).sort().values


def _move(seats: Tensor, gap: Tensor, c: int, by: int) -> None:
    seats[c] += by
    gap[c] -= by


def test_rows(y: Tensor, info: DatasetInfo) -> Tensor:
    """(K,) int64 sorted rows of `y` (N,) that become the test set of a source without one."""
    return draw_rows(y, max(1, round(info.test_share * len(y))), stream(0, "test split"))


def validation_rows(y: Tensor, info: DatasetInfo, whole: int) -> Tensor:
    """(K,) int64 sorted rows of `y` (N,), the training labels, that become the validation set.

    `whole` is the number of rows that a share is a share of.
    """
    if 0 < info.first < len(y):  # a file of fewer is an excerpt, of which a share is taken
        return torch.arange(info.first)
    if info.tracks:
        rows = _first_tracks(y, info.share)
        if rows is not None:
            return rows
        _log.warning(
            "%s: rows are not sorted by class into tracks, so validation images are drawn at "
            "random and may be neighbouring frames of training images",
            info.name,
        )
    return draw_rows(y, max(1, round(info.share * whole)), stream(0, "validation split"))


def _first_tracks(y: Tensor, share: float) -> Tensor | None:
    """The first tracks of each class, as rows; None where the rows do not lie in tracks.

    A class is a run of tracks of equal length, but for rare short ones (GTSRB has one track of 29
    frames, late in class 33). Whole tracks from the start of a class stay clear of those.
    """
    counts = torch.bincount(y)
    if bool((y[1:] < y[:-1]).any()):
        return None
    counts = counts[counts > 0]
    fitting = (n for n in _FRAMES if float((counts % n == 0).float().mean()) >= 0.9)
    frames = next(fitting, None)
    if frames is None:
        return None
    starts = counts.cumsum(0) - counts
    tracks = (counts / frames * share).round().clamp(min=1).long()
    spans = zip(starts.tolist(), (tracks * frames).tolist(), strict=True)
    return torch.cat([torch.arange(start, start + length) for start, length in spans])


def assign(labels: dict[str, Tensor], info: DatasetInfo) -> dict[str, tuple[str, Tensor]]:
    """Target split -> (source split, its sorted rows), of the labels (N,) of the source's splits.

    Rows labelled -1 belong nowhere.
    """
    y = labels["train"]
    used = (y >= 0).nonzero().squeeze(1)
    plan: dict[str, tuple[str, Tensor]] = {}
    left = torch.ones(len(used), dtype=torch.bool)
    if len(used) < 3:
        raise DataError(f"{info.name} needs at least 3 training images, found {len(used)}")
    if "test" in labels:
        plan["test"] = ("test", (labels["test"] >= 0).nonzero().squeeze(1))
    else:
        rows = test_rows(y[used], info)
        left[rows] = False
        plan["test"] = ("train", used[rows])
    if "val" in labels:
        plan["val"] = ("val", (labels["val"] >= 0).nonzero().squeeze(1))
    else:
        rest = left.nonzero().squeeze(1)
        rows = rest[validation_rows(y[used[rest]], info, len(used))]
        left[rows] = False
        plan["val"] = ("train", used[rows])
    plan["train"] = ("train", used[left])
    for target, (_, rows) in plan.items():
        if len(rows) == 0:
            raise DataError(f"{info.name} has no images left for its {target} split")
    return {target: plan[target] for target in ("train", "val", "test")}
