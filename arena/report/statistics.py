"""Means and spreads over seeds and attacks; the interval of a measured share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

LEVEL = 0.05  # what a corrected p-value must fall below for two defenses to differ
EXACT_PAIRS = 12  # up to so many pairs, all 2**n signs are tried
Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


class Summary(NamedTuple):
    mean: float | None  # None where nothing was measured
    sd: float | None  # sample standard deviation (ddof = 1); None with fewer than two values
    n: int


def summarise(values: Iterable[float | None]) -> Summary:
    """Mean, sample standard deviation and number of the values that are not None."""
    known = [value for value in values if value is not None]
    if not known:
        return Summary(None, None, 0)
    mean = math.fsum(known) / len(known)  # fsum: the order of the records cannot move a digit
    if len(known) == 1:
        return Summary(mean, None, 1)
    squares = math.fsum((value - mean) ** 2 for value in known)
    return Summary(mean, math.sqrt(squares / (len(known) - 1)), len(known))


def over_attacks(values: Mapping[tuple[str, int], float | None]) -> Summary:
    """Summary of values keyed by (attack, seed).

    mean: over attacks, of the means over seeds, so that every attack weighs the same.
    sd:   over seeds, of each seed's average over attacks. A seed that misses an attack enters the
          mean but not the sd, which would otherwise measure the choice of attacks.
    n:    seeds with any value.
    """
    known = {key: value for key, value in values.items() if value is not None}
    attacks = sorted({attack for attack, _ in known})
    seeds = sorted({seed for _, seed in known})
    per_attack = [
        summarise(known[attack, seed] for seed in seeds if (attack, seed) in known).mean
        for attack in attacks
    ]
    per_seed = [
        summarise(known[attack, seed] for attack in attacks).mean
        for seed in seeds
        if all((attack, seed) in known for attack in attacks)
    ]
    return Summary(summarise(per_attack).mean, summarise(per_seed).sd, len(seeds))


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval, in [0, 1], of a share of `successes` among `n` trials.

    Source: Wilson 1927, JASA 22(158). Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"an interval needs 0 <= successes <= n, n > 0; got {successes} of {n}")
    share, weight = successes / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    low = 0.0 if successes == 0 else centre - half  # exact ends, not 1e-17
    return low, 1.0 if successes == n else centre + half


def paired_p(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test of paired values; 1 where all are equal
    or there is one pair.

    Exact by all signs up to `EXACT_PAIRS` pairs (ties and zeros, after Pratt, are no obstacle), by
    scipy's choice of the exact or normal distribution above. Raises ValueError unless both are of
    the same length, above 0.
    Source: Wilcoxon 1945; for comparing methods over data sets: Demsar 2006, JMLR 7.
    """
    if not one or len(one) != len(other):
        raise ValueError(f"pairs are needed, got {len(one)} and {len(other)} values")
    apart = [round(a - b, 12) for a, b in zip(one, other, strict=True)]
    if not any(apart) or len(apart) == 1:
        return 1.0
    from scipy.stats import PermutationMethod, wilcoxon

    few = len(apart) <= EXACT_PAIRS
    method = PermutationMethod(n_resamples=2**EXACT_PAIRS) if few else "auto"
    return float(min(1.0, wilcoxon(apart, zero_method="pratt", method=method).pvalue))


def smallest_p(pairs: int) -> float:
    """The least p-value that `paired_p` can give with so many pairs: all signs alike."""
    return float(min(1.0, 2.0 ** (1 - pairs)))


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in their order.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    order = sorted(range(len(values)), key=lambda place: values[place])
    corrected, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = highest
    return corrected
