"""Class distance: the smallest triggers between classes, and how much larger a defense made them.

From one class to another leads the smallest trigger of a family that flips images of the first to
the second. A model's distance is the mean over ordered pairs; a defense's gain is the mean over
the pairs of (after - before) / before, so that the choice of pairs and the unit weigh little in it.

Source: Tao et al. 2022, MOTH (Model Orthogonalization), section III and equation 12; DECK, equation
    8, with its own family. On validation images, as there and in `arena distance`.
Departs: 20 pairs drawn by the seed and one search for each; the papers take all pairs and the
    smallest of three searches (pairs=all,restarts=3), at many times the price.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from arena.core.contracts import Images
from arena.core.inversion.distances import (
    Pair,
    distances,
    improvement,
    parse_pairs,
    problems_of,
)
from arena.core.inversion.engine import Family, Search, check_images, invert
from arena.core.inversion.families import families
from arena.core.inversion.frozen import Frozen
from arena.core.inversion.perceived import retold
from arena.core.measures import Reading
from arena.core.models import Classifier
from arena.core.registry import method, param, short_spec
from arena.core.training import Checkpoint


@method
class ClassDistance:
    method: str = param("nc", "trigger family, with its fields; see `arena list triggers`")
    pairs: str = param(
        "sample:20",
        "sample:N: so many ordered pairs, drawn by the seed, or all where there are no more; all; "
        "or victim:target pairs in parentheses, (0:1,3:5)",
    )
    restarts: int = param(
        1, "searches per pair, of which the smallest trigger counts", low=1, source="MOTH: 3"
    )
    samples: int = param(100, "validation images per search", low=1, source="MOTH")
    steps: int | None = param(None, "passes over them; none: as in the family's paper", low=1)

    def __post_init__(self) -> None:
        families.build(self.method)

    @property
    def family(self) -> Family:
        family: Family = families.build(self.method)
        return family

    @property
    def wraps(self) -> dict[str, Family]:
        return {"method": self.family}

    @property
    def search(self) -> Search:
        usual = self.family.usual
        steps = usual.steps if self.steps is None else self.steps
        return replace(usual, samples=self.samples, steps=steps)

    @property
    def unit(self) -> str:
        """What the sizes are counted in, whose triggers they are, and seen by which encoder."""
        family = self.family
        seen = f", encoder {family.seen_by}" if family.seen_by else ""
        return f"{family.unit} ({short_spec(family)}{seen})"

    def chosen(self, classes: int, seed: int) -> list[Pair]:
        """The ordered pairs (victim, target). Raises BadInput."""
        kind, _, count = self.pairs.partition(":")
        few = kind == "sample" and count.isdecimal() and int(count) > classes * (classes - 1)
        return parse_pairs("all" if few else self.pairs, classes, seed)

    def check(self, val: Images, test: Images, classes: int, seed: int) -> None:
        check_images(
            self.family, problems_of(self.chosen(classes, seed), 1), val, self.samples, seed
        )

    def passes(self, classes: int) -> float:
        return 3.0 * len(self.chosen(classes, 0)) * self.restarts * self.search.steps * self.samples

    def measure(
        self,
        model: Classifier,
        val: Images,
        test: Images,
        seed: int,
        checkpoint: Checkpoint | None = None,
    ) -> Reading:
        classes = model.spec.classes
        pairs = self.chosen(classes, seed)
        problems = problems_of(pairs, self.restarts)
        found = invert(
            Frozen(model), self.family, problems, val, self.search,
            seed=seed, checkpoint=checkpoint, what="class distances",
        )  # fmt: skip
        matrix = distances(retold(found, self.family, val, self.samples, seed), classes)
        sizes = [float(matrix.size[pair]) for pair in pairs]
        figures = {
            "distance": matrix.mean,
            "pairs": len(pairs),
            "unreached": len(matrix.unreached),
        }
        each = [
            [*pair, None if math.isnan(size) else size]
            for pair, size in zip(pairs, sizes, strict=True)
        ]
        return Reading(figures, each)

    def compare(self, before: Reading, after: Reading) -> dict[str, Any]:
        old, new = (
            torch.tensor([math.nan if row[2] is None else row[2] for row in reading.each]).double()
            for reading in (before, after)
        )
        return {
            "distance": after.figures["distance"],
            "distance_before": before.figures["distance"],
            "distance_gain": improvement(new, old),
            "distance_unit": self.unit,
        }
