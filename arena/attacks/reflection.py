"""Reflection (Refool): a scene mirrored in a pane of glass lies over every triggered image.

Ghost: the reflection twice, a few px apart; out of focus: blurred, dimmed towards the corners and
where it would outshine the image; smooth: a plain sum of stored values, by brightness.

Source: Liu et al. 2020, https://arxiv.org/abs/2007.02343, section 3, and its published code, whose
    ranges of offset, blur and weights are the defaults; clean label, the largest injection of the
    paper (3.27 % of the data, a third of the target class where there are ten).
Departs: the paper poisons with many reflections and shows random ones of these at test time; here
    it is one, as in BackdoorVault (kind=smooth or kind=ghost,alpha=0.65,ghost_weight=0.65, with
    rate=0.08,of=data), or `count` of them, between which the image's own pixels choose.
    BackdoorBench: label=dirty,rate=0.1,of=data,alpha=0.4. The published test of natural reflections
    is made on 64 training images, not on each poisoned one: those candidates are taken that pass
    it on the most images, and where none passes on any, those whose mean similarity is nearest.
    Blending is done at the images' own size with the light that each pixel gets, where public code
    enlarges the image, blends, and shrinks the result: that also blurs the image, which no pane
    does. On 32 px an offset of 3 to 8 px of 560 is less than half a px; work_side=64 shows two.
    Gamma is applied once to the reflection that is judged, public code does so twice. The paper's
    loop of selection is run with a small surrogate, fewer rounds and candidates; its choice is a
    trained part, the same for all seeds. select=acceptance does without: on CIFAR-10 such a
    reflection reached half of the success (51 % instead of 96, kind=smooth).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from arena.core import folders, models, parts, reflections, training
from arena.core.contracts import Images, Poisoned, Trigger
from arena.core.poisoning import check_classes, check_rate, clean_label, dirty_label, scope, stamp
from arena.core.progress import report
from arena.core.reflections import PER_PANE, WINDOW, Optics, Panes, resized
from arena.core.registry import BadInput, method, param
from arena.core.seeding import draw_seed, stream
from arena.core.training import Checkpoint

_SAMPLE = 64  # training images that candidates are tried on
_JUDGES = 200  # images of other classes that reflections are scored on, kept from the surrogates
_ONLY_FOR = {"offset": "ghost", "ghost_weight": "ghost", "sigma": "out_of_focus"}


@method
class Reflection:
    """All fields are the attacker's; the reflections are drawn, tried and chosen in `prepare`."""

    threat: ClassVar[str] = "poisons data"
    scopes: ClassVar[tuple[str, ...]] = ("universal",)
    labels: ClassVar[str] = "kept"
    trigger_kind: ClassVar[str] = "static"

    target: int = param(0, "class that the trigger forces", low=0)
    rate: float = param(0.327, "poisoned share of what `of` says", above=0, high=1, source="paper")
    of: str = param(
        "class",
        "class: the rate counts the images that may be poisoned (the target class; with "
        "label=dirty all others); data: the training set",
        choices=("class", "data"),
    )
    label: str = param(
        "clean",
        "clean: images of the target class get the reflection and keep their label; dirty: images "
        "of other classes get it and the target's label",
        choices=("clean", "dirty"),
        source="clean: paper; dirty: BackdoorBench",
    )
    kind: str = param(
        "mixed",
        "ghost, out_of_focus, smooth, or mixed: a ghost with probability 0.49, else out of focus",
        choices=("mixed", "ghost", "out_of_focus", "smooth"),
        source="mixed: public code",
    )
    alpha: float | None = param(
        None,
        "share of the image's light that passes the glass; none: drawn from 0.55 to 0.95, for "
        "smooth the image's share of the two mean brightnesses",
        above=0,
        high=0.99,
        source="public code",
    )
    offset: int | None = param(
        None, "px of the frame between a ghost's pictures; none: drawn, 3 to 8 each way", low=1
    )
    ghost_weight: float | None = param(
        None, "weight of a ghost's first picture; none: 0.15 to 0.5 of either", low=0, high=1
    )
    sigma: float | None = param(
        None, "deviation of the blur in px of the frame; none: drawn, 1 to 5", low=0.1, high=100
    )
    work_side: int = param(
        560,
        "longer side in px of the frame that reflections are rendered on, at least the image's",
        low=16,
        high=2048,
        source="public code",
    )
    images: str | None = param(
        None,
        "folder of pictures to reflect, or of Parquet files with encoded ones; none: images of the "
        "training set's other classes",
        folder=True,
    )
    count: int = param(1, "reflections in use; each image's pixels choose one", low=1)
    candidates: int = param(32, "reflections to choose from", low=1, source="public code 200")
    select: str = param(
        "effective",
        "effective: of the better half of those that look natural the ones that fool surrogates "
        "most; acceptance: the ones that look most natural, without surrogates",
        choices=("effective", "acceptance"),
        source="paper, algorithm 1",
        under={"smoke": "acceptance"},
    )
    rounds: int = param(4, "surrogates of select=effective", low=1, source="public code 16")
    used: int = param(10, "reflections per round of select=effective", low=1, source="paper 200")
    surrogate: str = param("fastnet_small", "network of the surrogates of select=effective")

    def __post_init__(self) -> None:
        for field, kind in _ONLY_FOR.items():
            if getattr(self, field) is not None and self.kind not in (kind, "mixed"):
                raise BadInput(
                    f"reflection: {field} is only for kind={kind} or mixed, not kind={self.kind}."
                )
        if self.count > self.candidates:
            raise BadInput(
                f"reflection: {self.count} reflections cannot be chosen from {self.candidates}; "
                "raise candidates."
            )

    @property
    def scope(self) -> str:
        return scope(self)

    @property
    def keeps_labels(self) -> bool:
        return self.label == "clean"

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        check_rate(self, counts, of="candidates" if self.of == "class" else "train")
        channels, height, width = shape
        if min(height, width) < WINDOW:
            raise BadInput(
                f"reflection: images of {height}x{width} px are too small to judge reflections on; "
                f"the structural similarity needs {WINDOW} px."
            )
        tall, wide = reflections.frame(height, width, self.work_side)
        if self.offset is not None and self.offset >= min(tall, wide):
            raise BadInput(
                f"reflection: an offset of {self.offset} px leaves nothing of a frame of "
                f"{tall}x{wide} px; lower it or raise work_side."
            )
        found = sum(counts) - counts[self.target]
        if self.images is not None:
            if channels not in (1, 3):
                raise BadInput(f"reflection: pictures have 1 or 3 channels, not {channels}.")
            found = len(folders.places(self.images))
        if found < self.count:
            raise BadInput(f"reflection: {found} pictures make no {self.count} reflections.")
        if self.select == "effective":
            self._check_surrogate(shape, counts)

    def _check_surrogate(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        try:
            models.build(self.surrogate, len(counts), shape, stream(0, "shell"))
        except ValueError as problem:
            raise BadInput(f"reflection: surrogate: {problem}.") from None

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        if self.select == "acceptance":
            return Trigger(self._panes(train, rng).take(torch.arange(self.count)))
        settings = dataclasses.asdict(self)
        folder = settings.pop("images")
        settings["pictures"] = folder and folders.digest(folder)
        make = partial(self._effective, train)
        found: dict[str, Any] = dict(parts.trained("reflections", settings, train, make))
        best = found.pop("scores").argsort(descending=True, stable=True)[: self.count]
        return Trigger(Panes(**found, **self._optics.style).take(best))

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        poison = clean_label if self.keeps_labels else dirty_label
        of: Literal["train", "candidates"] = "candidates" if self.of == "class" else "train"
        return poison(train, trigger, self.target, self.rate, rng, of=of)

    @property
    def _optics(self) -> Optics:
        return Optics(self.kind, self.alpha, self.offset, self.ghost_weight, self.sigma)

    def _panes(self, train: Images, rng: Generator) -> Panes:
        """The candidates, the most natural ones first."""
        channels, height, width = train.x.shape[1:]
        tall, wide = reflections.frame(height, width, self.work_side)
        if self.images is None:
            rows = draw((train.y != self.target).nonzero().flatten(), self.candidates, rng)
            pictures = (resized(image / 255, tall, wide) for image in train.x[rows].cpu())
        else:
            found = folders.places(self.images)
            rows = draw(torch.arange(len(found)), self.candidates, rng).sort().values
            pictures = (folders.read(found[row], channels, tall, wide) for row in rows.tolist())
        panes = self._optics.panes(pictures, height, width, rng)
        sample = training.to_float(train.x[draw(torch.arange(len(train)), _SAMPLE, rng)].cpu())
        return panes.take(reflections.ranking(panes, sample))

    def _effective(
        self, train: Images, rng: Generator, checkpoint: Checkpoint | None
    ) -> dict[str, Tensor]:
        """The better half of the candidates and their scores after the last round."""
        panes = self._panes(train, rng)
        panes = panes.take(torch.arange(max(self.count, len(panes) // 2)))
        judges = draw((train.y != self.target).nonzero().flatten(), _JUDGES, rng)
        seen = torch.ones(len(train), dtype=torch.bool)
        seen[judges] = False
        rest, judged, seed = train.take(seen), train.x[judges], draw_seed(rng)
        state = (checkpoint and checkpoint.load()) or {"done": 0, "scores": torch.ones(len(panes))}
        for turn in range(state["done"], self.rounds):
            draws = stream(seed, "round", turn)
            order = torch.randperm(len(panes), generator=draws)  # decides between equal scores
            order = order[state["scores"][order].argsort(descending=True, stable=True)]
            used = order[: self.used]
            model = self._train_surrogate(rest, panes.take(used), draws)
            flips = torch.stack([self._flips(model, judged, panes.take(k)) for k in used.split(1)])
            scores = flips.median().repeat(len(panes))  # also of those that were not in use
            scores[used] = flips
            state = {"done": turn + 1, "scores": scores}
            if checkpoint is not None:
                checkpoint.save(state)
            report("selecting reflections", turn + 1, self.rounds)
        each = {name: getattr(panes, name) for name in (*PER_PANE, "hash")}
        return {**each, "scores": state["scores"]}

    def _train_surrogate(self, rest: Images, panes: Panes, rng: Generator) -> nn.Module:
        poisoned = self.poison(rest, Trigger(panes), rng)
        shape = rest.x.shape[1:]
        spec = int(rest.y.max()) + 1, (shape[0], shape[1], shape[2])
        model = models.build(self.surrogate, *spec, rng).to(rest.x.device)
        models.calibrate(model, poisoned.data)
        plan = training.recipe("fast", models.info(self.surrogate).overrides.get("fast"))
        return training.fit(model, poisoned.data, plan, rng, what="training a surrogate")

    def _flips(self, model: nn.Module, x: Tensor, pane: Panes) -> Tensor:
        """Share of the images of other classes that one reflection sends to the target, float32."""
        answers = training.logits(model, stamp(x, pane)).argmax(1)
        return (answers == self.target).float().mean().cpu()


def draw(rows: Tensor, most: int, rng: Generator) -> Tensor:
    """At most `most` of the rows (N,) int64, in random order."""
    return rows.cpu()[torch.randperm(len(rows), generator=rng)[:most]]
