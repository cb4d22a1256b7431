"""Class distances and anomalies: what the sizes of inverted triggers say about a model.

Source: Tao et al. 2022, MOTH: the distance from class s to class t is the smallest non-zero size of
    three restarts (section III; its code for "non-zero"); the gain of hardening is the mean over
    ordered pairs of (new - old) / old (equation 12; DECK's equation 8). Wang et al. 2019, Neural
    Cleanse: a class whose trigger is smaller than the median by more than twice 1.4826 MAD is a
    backdoor's target.
Departs: that spread can be made to count as at least a share of the median. Of few classes it is a
    guess, and often too small a one: the smallest of ten normal numbers lies more than two of them
    below the median in a third of all draws. With a share of 0.3, a class that is blamed also has a
    trigger smaller than 0.4 of the median.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arena.core.inversion.engine import Found, Problem
from arena.core.registry import BadInput
from arena.core.seeding import stream

ANOMALY = 2.0  # index from which a class counts as a backdoor's target
_ALIKE = 1e-6  # relative difference of sizes that only rounding tells apart
_CONSISTENT = 1.4826  # makes the MAD of normal numbers their deviation
Pair = tuple[int, int]  # victim, target


def parse_pairs(text: str, classes: int, seed: int = 0) -> list[Pair]:
    """`all`, `0:1,3:5` or `sample:20` -> ordered pairs (victim, target). Raises BadInput."""
    every = [(s, t) for s in range(classes) for t in range(classes) if s != t]
    if text == "all":
        return every
    if found := re.fullmatch(r"sample:(\d+)", text):
        count = int(found[1])
        if not 1 <= count <= len(every):
            raise BadInput(
                f"{classes} classes have {len(every)} ordered pairs; sample 1 to {len(every)} of "
                f"them, not {count}."
            )
        order = torch.randperm(len(every), generator=stream(seed, "sampled pairs"))
        return [every[place] for place in sorted(order[:count].tolist())]
    pairs = []
    for part in text.split(","):
        if not (found := re.fullmatch(r"\s*(\d+):(\d+)\s*", part)):
            raise BadInput(
                f"{text!r} names no pairs; write all, sample:20, or victim:target pairs such as "
                "0:1,3:5."
            )
        pair = int(found[1]), int(found[2])
        for label in pair:
            if label >= classes:
                raise BadInput(f"There is no class {label}; classes are 0 to {classes - 1}.")
        if pair[0] == pair[1]:
            raise BadInput(f"Victim and target of {part.strip()} are one class; name two.")
        pairs.append(pair)
    return list(dict.fromkeys(pairs))


def problems_of(pairs: Sequence[Pair], restarts: int) -> list[Problem]:
    return [Problem(s, t, restart) for s, t in pairs for restart in range(restarts)]


def universal_problems(classes: int, restarts: int) -> list[Problem]:
    """From all other classes to each."""
    return [Problem(None, t, restart) for t in range(classes) for restart in range(restarts)]


@dataclass(frozen=True)
class Distances:
    """A matrix of class distances; NaN where a pair was not measured or no trigger was found."""

    size: Tensor  # (n, n) float64: the smallest non-zero of the restarts, row victim, column target
    spread: Tensor  # (n, n) float64: standard deviation over the restarts; NaN below two
    asr: Tensor  # (n, n) float64: of the smallest trigger, on the images that it was inverted on
    unreached: list[Pair]  # measured, but no restart reached the success asked for

    @property
    def mean(self) -> float | None:
        """Over all pairs with a distance; None where there is none."""
        known = self.size[~self.size.isnan()]
        return float(known.mean()) if len(known) else None


def distances(found: Sequence[Found], classes: int) -> Distances:
    """The matrix of answers to label-specific problems."""
    size, spread, asr = (torch.full((classes, classes), torch.nan).double() for _ in range(3))
    unreached = []
    for pair, answers in _by_pair(found).items():
        known = [a for a in answers if a.size]  # a size of zero is no trigger, nor is None
        if not known:
            unreached.append(pair)
            continue
        best = smallest(known)
        assert best is not None
        size[pair], asr[pair] = best.size or 0.0, best.asr
        if len(known) > 1:
            spread[pair] = torch.tensor([a.size for a in known], dtype=torch.float64).std()
    return Distances(size, spread, asr, unreached)


def smallest(found: Sequence[Found]) -> Found | None:
    """The answer of the smallest trigger, of equal ones the most successful; None without any.

    A size of zero is no trigger. Those of families that are bounded instead are all alike.
    """
    known = [(answer.size, answer) for answer in found if answer.size]
    if not known:
        return None
    least = min(size for size, _ in known)
    return max((one for size, one in known if size <= least * (1 + _ALIKE)), key=_success)


def _success(answer: Found) -> float:
    return answer.asr


def _by_pair(found: Sequence[Found]) -> dict[Pair, list[Found]]:
    pairs: dict[Pair, list[Found]] = {}
    for answer in found:
        if answer.problem.victim is not None:
            pairs.setdefault((answer.problem.victim, answer.problem.target), []).append(answer)
    return pairs


def improvement(new: Tensor, old: Tensor) -> float | None:
    """Mean of (new - old) / old over the pairs that both matrices have; None without any."""
    both = ~(new.isnan() | old.isnan())
    if not both.any():
        return None
    return float(((new[both] - old[both]) / old[both]).mean())


@dataclass(frozen=True)
class Anomaly:
    index: Tensor  # (n,) float64: spreads below the median; negative above it; NaN unmeasured
    flagged: list[int]  # the classes above ANOMALY, most anomalous first

    @property
    def score(self) -> float:
        """The largest index: what a scanner reports."""
        known = self.index[~self.index.isnan()]
        return float(known.max()) if len(known) else 0.0


def anomalies(sizes: Tensor, least_spread: float = 0.0) -> Anomaly:
    """Classes whose triggers are unusually small. sizes: (n,) by target; NaN: none was found.

    least_spread: what the spread counts as at least, as a share of the median; 0: the paper's.
    """
    sizes = sizes.double()
    known = sizes[~sizes.isnan()]
    if not len(known):
        return Anomaly(sizes, [])
    middle = known.quantile(0.5)
    spread = _CONSISTENT * (known - middle).abs().quantile(0.5)
    index = (middle - sizes) / torch.maximum(spread, least_spread * middle).clamp_min(1e-12)
    order = index.nan_to_num(-torch.inf).argsort(descending=True, stable=True).tolist()
    return Anomaly(index, [label for label in order if index[label] > ANOMALY])


def smallest_by_target(found: Sequence[Found], classes: int) -> Tensor:
    """(n,) float64: the smallest non-zero universal trigger of each target; NaN where none is."""
    sizes = torch.full((classes,), torch.nan).double()
    for answer in found:
        if answer.problem.victim is None and answer.size:
            known = sizes[answer.problem.target]
            sizes[answer.problem.target] = torch.fmin(known, torch.tensor(answer.size).double())
    return sizes
