"""Which images an attacker poisons, what they look like and which labels they get.

Rows are drawn on the CPU, so that the same seed poisons the same rows on every device. Nothing
here writes to its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from arena.core.contracts import ImageMap, Images, Poisoned, Trigger
from arena.core.registry import BadInput

_BATCH_VALUES = 2**20  # pixel values of a batch: it stays in the cache, and bounds the memory


# ------------------------------------------------------------------------------------ the images


@torch.no_grad()
def stamp(x: Tensor, image_map: ImageMap, *, batch: int | None = None) -> Tensor:
    """`image_map` over stored images: (N, C, H, W) uint8 -> the same, rounded to 8 bits.

    The map sees float32 batches in [0, 1] on x's device; values that it pushes out of [0, 1] are
    clipped. batch: images per call; by default as many as make about a million pixel values.
    Raises ValueError where the map changes the shape or gives NaN.
    """
    if x.dtype != torch.uint8:
        raise ValueError(f"stored images are uint8, got {x.dtype}")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not len(x):
        return out
    size = batch or max(1, _BATCH_VALUES // x[0].numel())
    for images, place in zip(x.split(size), out.split(size), strict=True):
        stamped = image_map(images.float().div_(255))
        if stamped.shape != images.shape:
            raise ValueError(
                f"the trigger turned images of {tuple(images.shape)} into {tuple(stamped.shape)}"
            )
        if torch.isnan(stamped.amax()):  # amax hands NaN on, at a tenth of the price of isnan
            raise ValueError("the trigger made pixels that are not numbers (NaN)")
        place.copy_(stamped.mul(255).round_().clamp_(0, 255))
    return out


# -------------------------------------------------------------------------------- rows and labels


def dirty_label(
    train: Images,
    trigger: Trigger,
    target: int,
    rate: float,
    rng: Generator,
    *,
    victim: int | None = None,
    of: Literal["train", "candidates"] = "train",
    extend: bool = False,
) -> Poisoned:
    """Stamp images of other classes and label them `target`.

    victim: only this class is poisoned (label-specific); None: every class but the target.
    rate:   in (0, 1]; the number poisoned is round(rate * n), where n counts the training set
            (of="train") or the images that may be poisoned (of="candidates").
    extend: append the poisoned copies and keep the originals, instead of replacing them.

    Raises BadInput where that is no image, or more than there are.
    """
    if victim == target:
        raise BadInput(f"the victim class and the target class are both {target}.")
    candidates = train.y != target if victim is None else train.y == victim
    rows = _draw(candidates, rate, of, rng)
    return _poison(train, trigger, rows, torch.full_like(train.y[rows], target), extend)


def all_to_all(
    train: Images,
    trigger: Trigger,
    rate: float,
    rng: Generator,
    classes: int,
    *,
    extend: bool = False,
) -> Poisoned:
    """Stamp images of every class y and label them (y + 1) mod classes.

    rate: share of the training set, in (0, 1]. `extend` and errors as for `dirty_label`.
    """
    rows = _draw(torch.ones_like(train.y, dtype=torch.bool), rate, "train", rng)
    return _poison(train, trigger, rows, (train.y[rows] + 1) % classes, extend)


def clean_label(
    train: Images,
    trigger: Trigger,
    target: int,
    rate: float,
    rng: Generator,
    *,
    of: Literal["train", "candidates"] = "candidates",
    extend: bool = False,
) -> Poisoned:
    """Stamp images of the target class and keep their labels.

    rate: in (0, 1]; share of the target class (of="candidates") or of the training set
    (of="train"). `extend` and errors as for `dirty_label`.
    """
    rows = _draw(train.y == target, rate, of, rng)
    return _poison(train, trigger, rows, train.y[rows], extend)


def how_many(rate: float, candidates: int, total: int, whole: str = "") -> int:
    """round(rate * total), at least 1 and at most `candidates`. Raises BadInput where it is not.

    rate: share in (0, 1]; candidates: the images that may be poisoned; total: what the rate is a
    share of; whole: its name for people.
    """
    if not 0 < rate <= 1:
        raise BadInput(f"the poisoning rate must lie in (0, 1], got {rate:g}.")
    count = round(rate * total)
    if count == 0:
        whole = whole or "images that may be poisoned"
        raise BadInput(f"a poisoning rate of {rate:g} of {total:,} {whole} is less than one image.")
    if count > candidates:
        raise BadInput(
            f"a poisoning rate of {rate:g} asks for {count:,} images, but only {candidates:,} "
            f"may be poisoned; the largest possible rate is {candidates / total:.4g}."
        )
    return count


def _draw(candidates: Tensor, rate: float, of: str, rng: Generator) -> Tensor:
    """Ascending rows (K,) int64, on the device of the mask `candidates` (N,)."""
    choice = candidates.cpu().nonzero().flatten()
    if of == "train":
        count = how_many(rate, len(choice), len(candidates), "training images")
    else:
        count = how_many(rate, len(choice), len(choice))
    picked = torch.randperm(len(choice), generator=rng)[:count]
    return choice[picked].sort().values.to(candidates.device)


def _poison(
    train: Images, trigger: Trigger, rows: Tensor, labels: Tensor, extend: bool
) -> Poisoned:
    images = stamp(train.x[rows], trigger.training_map)
    if extend:
        added = torch.arange(len(train), len(train) + len(rows), device=rows.device)
        return Poisoned(Images(torch.cat([train.x, images]), torch.cat([train.y, labels])), added)
    x, y = train.x.clone(), train.y.clone()
    x[rows], y[rows] = images, labels
    return Poisoned(Images(x, y), rows)


# ------------------------------------------------------------------------- what an attacker wants


def scope(attack: Any) -> Literal["universal", "label-specific", "all-to-all"]:
    """Which images the trigger works on, read from the attack's fields `mode` and `victim`."""
    if getattr(attack, "mode", "universal") == "all_to_all":
        return "all-to-all"
    return "universal" if getattr(attack, "victim", None) is None else "label-specific"


def wanted(attack: Any, y: Tensor, classes: int) -> Tensor:
    """(N,) int64: the label that the attacker wants for triggered images of true classes `y`."""
    if scope(attack) == "all-to-all":
        return (y + 1) % classes
    return torch.full_like(y, attack.target)


def applies(attack: Any, y: Tensor, classes: int) -> Tensor:
    """(N,) bool: which test images of true classes `y` count for the attack success rate.

    Never those that already are of the class wanted; of a label-specific attack only the victim's.
    """
    counts = wanted(attack, y, classes) != y
    victim = getattr(attack, "victim", None)
    return counts if victim is None else counts & (y == victim)


def check_classes(attack: Any, counts: Sequence[int]) -> None:
    """Raise BadInput unless the attack's target and victim are two classes of the data set.

    counts: training images per class; classes that an attack names must have some.
    """
    name, classes = attack.method_name, len(counts)
    if classes < 2:
        raise BadInput(f"{name} needs at least two classes, the data set has {classes}.")
    for role in ("target", "victim"):
        label = getattr(attack, role, None)
        if label is not None and label >= classes:
            raise BadInput(
                f"{name}: {role} {label} is not a class of this data set; its {classes} classes "
                f"are 0 to {classes - 1}."
            )
    if scope(attack) == "label-specific" and attack.victim == attack.target:
        raise BadInput(f"{name}: the victim class and the target class are both {attack.target}.")


def check_rate(
    attack: Any, counts: Sequence[int], *, of: Literal["train", "candidates"] = "candidates"
) -> None:
    """Raise BadInput unless the attack's `rate` asks for at least one image that there is.

    `of` as for `dirty_label` and `clean_label`, whose images are counted here by the attack's
    scope and by whether it keeps labels.
    """
    if scope(attack) == "all-to-all":
        candidates = sum(counts)
    elif getattr(attack, "keeps_labels", False):
        candidates = counts[attack.target]
    elif (victim := getattr(attack, "victim", None)) is not None:
        candidates = counts[victim]
    else:
        candidates = sum(counts) - counts[attack.target]
    try:
        if of == "train":
            how_many(attack.rate, candidates, sum(counts), "training images")
        else:
            how_many(attack.rate, candidates, candidates)
    except BadInput as error:
        raise BadInput(f"{attack.method_name}: {error}") from None
