"""Telling stamped inputs from clean ones: what detectors look at, and how they are scored.

Source: SDRM (Xia et al. 2022), section 6.1: inputs to which a model gives one answer, N of them
    with a given ratio of stamped to clean, at three levels of features; F1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from arena.core.features import features
from arena.core.models import Classifier
from arena.core.training import device_of, evaluating, to_float


@torch.no_grad()
def flat_features(model: Classifier, x: Tensor, level: str, batch: int = 500) -> Tensor:
    """(N, K * H' * W') float32: the features of stored images `x` (uint8), in evaluation mode.

    Every module's training mode is given back as it was.
    """
    if len(x) == 0:
        raise ValueError("there are no images to look into")
    parts = []
    with evaluating(model):
        for part in x.split(batch):
            shown = to_float(part.to(device_of(model)))
            parts.append(features(model, shown, (level,))[level].flatten(1).float())
    return torch.cat(parts)


# --------------------------------------------------------------------------------------- figures


class Scored(NamedTuple):
    """How well stamped inputs were told from clean ones; shares in [0, 1]."""

    f1: float
    precision: float
    recall: float
    auroc: float  # of the scores, whatever the threshold; 0.5: chance


def scored(flagged: Tensor, scores: Tensor, stamped: Tensor) -> Scored:
    """flagged, stamped: (N,) bool; scores: (N,), higher = more suspicious. One of each at least."""
    hits = int((flagged & stamped).sum())
    precision = hits / max(1, int(flagged.sum()))
    recall = hits / int(stamped.sum())
    f1 = 2 * hits / (int(flagged.sum()) + int(stamped.sum()))
    return Scored(f1, precision, recall, auroc(scores, stamped))


def auroc(scores: Tensor, stamped: Tensor) -> float:
    """Share of pairs of a stamped and a clean input in which the stamped one has the higher score;
    equal scores count half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(stamped.cpu().numpy(), scores.double().cpu().numpy()))


def best_threshold(scores: Tensor, stamped: Tensor) -> Tensor:
    """(N,) bool: the highest scores, as many as give the best F1 (an oracle's choice)."""
    order = scores.argsort(descending=True, stable=True)
    hits = stamped[order].double().cumsum(0)
    count = torch.arange(1, len(scores) + 1, device=scores.device)
    f1 = 2 * hits / (count + stamped.sum())
    last = torch.ones_like(stamped)  # equal scores are flagged together or not at all
    last[:-1] = scores[order][1:] != scores[order][:-1]
    most = int(f1.masked_fill(~last, -1).argmax()) + 1
    flagged = torch.zeros_like(stamped)
    flagged[order[:most]] = True
    return flagged


def highest(scores: Tensor, count: int) -> Tensor:
    """(N,) bool: the `count` highest scores."""
    flagged = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    flagged[scores.argsort(descending=True, stable=True)[:count]] = True
    return flagged


def flagging_everything(ratio: float) -> float:
    """F1 of calling every input stamped, at a ratio of stamped to clean ones."""
    share = ratio / (1 + ratio)
    return 2 * share / (1 + share)


def drawn(rows: Tensor, count: int, rng: Generator) -> Tensor:
    """`count` of the rows (M,), in random order; all of them where there are fewer."""
    return rows[torch.randperm(len(rows), generator=rng)[:count].to(rows.device)]
