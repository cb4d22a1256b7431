"""K-arm: of the classes and pairs that look near, the most promising is searched, again and again.

Classes that clean images often have among their best answers are candidates. Each is an arm; every
step advances the trigger of one arm by one pass, mostly the one whose trigger is smallest or has
shrunk fastest. A trigger below a bound is a backdoor's; from one class to one other, only if the
way back takes one much larger.

Source: Shen et al. 2021, ICML, https://arxiv.org/abs/2102.05123, and its published code: screening,
    bandit, bounds (1720 and 1000 of 224x224 pixels, scaled by the area), symmetry. With
    Pixel's triggers: Tao et al. 2022 (PixelBackdoor), which replaces the optimiser alone.
Departs: arms that have not improved twice are advanced side by side, not in turn; the way back is
    searched as long as the way there was. The bounds were set on TrojAI's models: calibrate them on
    clean models of your own.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core.contracts import Images, Verdict
from arena.core.inversion import scanning
from arena.core.inversion.engine import Arms, Family, Problem, Search
from arena.core.inversion.families import families
from arena.core.inversion.frozen import Frozen
from arena.core.models import Classifier
from arena.core.progress import report
from arena.core.registry import method, param
from arena.core.seeding import draw_seed
from arena.core.training import check_clean, logits

_AREA = 224 * 224  # pixels that the published bounds are for
_LEAST = 1e-8  # softmax that a candidate pair's images must have, in sum and median
_FAMILIES = {
    ("nc", True): "nc:nudge=0",
    ("nc", False): "nc:nudge=0,start=centre,colours=one",
    ("pixel", True): "pixel:form=tanh",
    ("pixel", False): "pixel:form=tanh",
}


@method
class KArm:
    threshold: ClassVar[float] = 1.0  # of the score: the bound over the trigger's size

    optimiser: str = param(
        "nc", "whose triggers are searched", choices=("nc", "pixel"), source="nc: K-arm"
    )
    steps: int = param(1000, "passes of single arms, at most", low=1, source="code")
    samples: int = param(100, "clean images per arm, at most", low=1)
    epsilon: float = param(
        0.3, "probability of advancing an arm drawn at random", low=0, high=1, source="code"
    )
    universal_bound: float = param(
        1720.0, "size below which a universal trigger counts, scaled from 224x224 pixels", above=0,
        source="code",
    )  # fmt: skip
    specific_bound: float = param(
        1000.0, "the same of a trigger from one class to one other", above=0, source="code"
    )
    symmetry: float = param(
        10.0, "how many times larger the way back must be", low=1, source="code"
    )

    @property
    def wraps(self) -> dict[str, Family]:
        """Whose code counts for what comes out."""
        return {
            "universal": families.build(_FAMILIES[self.optimiser, True]),
            "specific": families.build(_FAMILIES[self.optimiser, False]),
        }

    def scan(self, model: Classifier, clean: Images, rng: Generator) -> Verdict:
        check_clean(clean, model)
        _, classes, (_, height, width) = model.spec
        universal, pairs = screened(logits(model, clean.x).cpu(), clean.y.cpu(), classes)
        best, matrix = Verdict(0.0), torch.zeros(classes, classes)
        for all_classes, problems, bound in (
            (True, [Problem(None, target) for target in universal], self.universal_bound),
            (False, [Problem(s, t) for s, t in pairs], self.specific_bound),
        ):
            if not problems:
                continue
            family = self.wraps["universal" if all_classes else "specific"]
            arms = self._searched(model, family, problems, clean, rng)
            for answer in arms.found():
                if not answer.size:
                    continue
                score = bound * height * width / _AREA / answer.size
                victim, target = answer.problem.victim, answer.problem.target
                rows = [s for s in range(classes) if s != target] if victim is None else [victim]
                if victim is not None and score > 1:
                    back = [Problem(target, victim)]
                    way = self._searched(model, family, back, clean, rng, answer.steps).sizes()[0]
                    if way / answer.size <= self.symmetry:
                        score = min(score, 1.0)
                matrix[rows, target] = matrix[rows, target].clamp_min(score)
                if score > best.score:
                    shown = scanning.picture_of(family, answer, model.spec.shape)
                    blamed = target if score > self.threshold else None
                    best = Verdict(score, blamed, None, shown if blamed is not None else None)
        return best._replace(per_class=matrix)

    def _searched(
        self,
        model: Classifier,
        family: Family,
        problems: list[Problem],
        clean: Images,
        rng: Generator,
        steps: int | None = None,
    ) -> Arms:
        """The arms after `steps` passes of single ones."""
        counts = torch.bincount(clean.y.cpu())
        own = [int(counts[p.victim]) if p.victim is not None else len(clean) // 2 for p in problems]
        search = Search(
            samples=min(self.samples, *own),
            asr=0.99, cost=1e-3, wait=True, patience=5, up=1.5, down=1.5,
            steps=self.steps,
        )  # fmt: skip
        arms = Arms(Frozen(model), family, problems, clean, search, draw_seed(rng))
        live, left = list(range(len(arms))), self.steps if steps is None else steps
        total = left
        while live and left > 0:
            young = [place for place in live if arms.improvements()[place] < 2][:left]
            turn = young or [self._chosen(arms, live, problems[0].victim is None, rng)]
            arms.advance(turn)
            left -= len(turn)
            live = [place for place in live if not self._over(arms, place)]
            report("scanning", total - left, total)
        return arms

    def _chosen(self, arms: Arms, live: list[int], universal: bool, rng: Generator) -> int:
        """An arm at random, or the one that is small or shrinks fast."""
        if float(torch.rand((), generator=rng)) < self.epsilon:
            return live[int(torch.randint(len(live), (), generator=rng))]
        sizes, passes, better = arms.sizes(), arms.passes(), arms.improvements()

        def promise(place: int) -> float:
            size = min(sizes[place], 1e6)
            return (2500 - size) / (better[place] + passes[place] / 2) + 1e4 / max(size, 1e-6)

        return max(live, key=promise)

    def _over(self, arms: Arms, place: int) -> bool:
        """An arm ends when it stalls, has improved often, or has had no success for long."""
        none = arms.sizes()[place] == float("inf")
        hopeless = none and arms.passes()[place] >= 200
        return arms.improvements()[place] > 60 or arms.stalled(10)[place] or hopeless


def screened(answers: Tensor, y: Tensor, classes: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Candidate targets of universal triggers, and (victim, target) pairs of specific ones.

    answers: logits (N, classes) of clean images with labels y (N,).
    """
    k = 2 if classes <= 8 else round(0.25 * classes)
    near = torch.zeros_like(answers, dtype=torch.bool)
    near.scatter_(1, answers.topk(min(k, classes), 1).indices, True)
    universal = [t for t in range(classes) if near[y != t, t].double().mean() > 0.95]
    soft = answers.softmax(1)
    pairs = []
    for target in range(classes):
        shares = []
        for victim in range(classes):
            own = soft[y == victim, target]
            share = float(near[y == victim, target].double().mean())
            if victim != target and share >= 0.9 and min(own.sum(), own.median()) > _LEAST:
                shares.append((share, float(own.sum()), victim))
        pairs += [(victim, target) for *_, victim in sorted(shares, reverse=True)[:3]]
    return universal, pairs
