"""Means and spreads over seeds and attacks; the interval of a measured share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

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
