"""Unlearning: an inverted trigger is taught to mean nothing, or the neurons that it raises go.

Source: Wang et al. 2019, S&P, Neural Cleanse, section VI, B (pruning) and C (unlearning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator

from arena.core.contracts import ImageMap, Images
from arena.core.features import fold_mask, mean_activation
from arena.core.models import Classifier
from arena.core.poisoning import stamp
from arena.core.progress import report
from arena.core.pruning import silencings
from arena.core.registry import BadInput
from arena.core.training import Recipe, fit, split

_FIELDS = ("share", "epochs", "lr", "batch", "momentum", "weight_decay", "crop", "flip")


def partly_stamped(
    clean: Images, stamps: Sequence[ImageMap], share: float, rng: Generator
) -> Images:
    """A copy of `clean` (uint8) in which round(share * N) images, drawn, carry a trigger.

    The triggers are dealt to as many images each (within one). Labels stay what they are.
    """
    order = torch.randperm(len(clean), generator=rng)
    chosen = order[: round(share * len(clean))].to(clean.x.device)
    x = clean.x.clone()
    for place, one in enumerate(stamps):
        rows = chosen[place :: len(stamps)]
        x[rows] = stamp(clean.x[rows], one)
    return Images(x, clean.y)


def unlearn(
    model: Classifier,
    clean: Images,
    stamps: Sequence[ImageMap],
    rng: Generator,
    *,
    share: float,
    epochs: int,
    lr: float,
    batch: int,
    momentum: float,
    weight_decay: float,
    crop: int,
    flip: bool,
) -> None:
    """Train `model`, in place, on `clean` with a share of its images stamped, at a constant rate.

    Batch norm follows what it is shown, stamped images included. crop: largest random shift, in
    pixels; flip: images are mirrored in turn. Both move the trigger off its place.
    """
    plan = Recipe(
        epochs=epochs,
        batch=batch,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        label_smoothing=0.0,
        schedule="constant",
        warmup=0.0,
        crop=crop,
        border="zero",
        flip=flip,
    )
    fit(model, partly_stamped(clean, stamps, share, rng), plan, rng, what="unlearning")


def settings(method: Any) -> dict[str, Any]:
    """What a method's fields say of unlearning: keyword arguments of `unlearn`."""
    return {name: getattr(method, name) for name in _FIELDS}


def prune(
    model: Classifier,
    clean: Images,
    stamps: Mapping[int, ImageMap],
    rng: Generator,
    *,
    held_out: float,
    max_success: float,
    max_drop: float,
) -> None:
    """Silence the deep channels that triggers raise, largest rise of the mean first, in place.

    stamps: target class -> trigger; of several, the one that raises a channel most counts there.
    It ends on the `held_out` share of `clean`: once each trigger sends at most `max_success` of the
    images of other classes to its target, or before the accuracy has fallen by more than
    `max_drop`, or when no channel is left that rises. Weights change in the head alone; batch norm
    stays as it was. Raises BadInput where no other class is held out.
    """
    held, rest = split(clean, held_out, rng)
    raised = [mean_activation(model, Images(stamp(rest.x, s), rest.y)) for s in stamps.values()]
    rise = torch.stack(raised).amax(0) - mean_activation(model, rest)
    order = rise.argsort(descending=True, stable=True)[: int((rise > 0).sum())]
    shown, wanted = [held.x], [held.y]
    for target, trigger in stamps.items():
        others = held.x[held.y != target]
        if not len(others):
            raise BadInput(
                f"All {len(held)} clean images held out are of class {target}; give more images."
            )
        shown.append(stamp(others, trigger))
        wanted.append(torch.full_like(held.y[: len(others)], target))
    sizes = [len(part) for part in wanted]
    wants = torch.cat(wanted).to(rise.device)
    silent, floor = 0, 0.0
    for count, answers in enumerate(silencings(model, torch.cat(shown), order, len(rise))):
        hits = (answers == wants).split(sizes)
        accuracy, *works = torch.stack([hit.double().mean() for hit in hits]).tolist()
        floor = floor if count else accuracy - max_drop - 1e-9  # the drop itself is allowed
        if accuracy < floor:
            break
        silent = count
        report("pruning", count, len(order), accuracy=accuracy)
        if max(works) <= max_success:
            break
    mask = torch.ones_like(rise)
    mask[order[:silent]] = 0
    fold_mask(model, mask)
