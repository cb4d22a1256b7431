"""Hardening: training on images with triggers that are inverted against the model as it becomes.

A model is trained further on clean batches; some images of each carry a trigger found against the
model of that moment, under their true label. So the triggers that fool it must grow.

Source: Tao et al. 2022, S&P, MOTH (Model Orthogonalization), sections IV-B to IV-D and its
    published code: rates, passes, portions, weights on sizes, scheduler. DECK hardens alike with
    triggers of its own; PixelBackdoor, appendix L.1, with universal ones.
Departs: where a class of a batch has too few images for the portion, one of them is stamped. Both
    directions of a pair use equally many images. What hardening costs is looked at on held-out
    clean images and counted from the same training without triggers, since the victim knew most of
    these images by heart, which any training loses; the last weights within the bound are the
    result. Images of a small set have holes, which no published code has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from arena.core import training
from arena.core.contracts import BatchHook, Images
from arena.core.inversion.engine import Family, Found, Problem, State, invert, stamped
from arena.core.inversion.frozen import Frozen
from arena.core.models import Classifier
from arena.core.progress import ending, report
from arena.core.seeding import draw_seed

_SHARE, _HELD_OUT = 0.1, 1000  # of the clean images decide when to stop, and at most so many
_BY_HEART = 0.1  # of their accuracy, at most: lost with any training, since these were trained on
_LOOK = 10  # updates between two looks at them
_FADE = 1000  # batches over which the scheduler comes to trust what it saw
_PATIENCE = 5  # looks in a row beyond the bound that end the training
HOLE, FEW = 9, 10_000  # pixels; images, of which training learns by heart what holes take away

Pair = tuple[int, int]  # of classes, the smaller first


# ------------------------------------------------------------------------------------- the training


class _Enough(Exception):
    """The accuracy has been beyond its bound for long."""


def check(model: Classifier, clean: Images, method: str) -> None:
    """Raise BadInput unless `clean` has all classes, and images to hold out and to train on."""
    training.check_clean(clean, model)
    training.check_held_out(clean, _held_out(clean), method, "give more images")


def _held_out(clean: Images) -> float:
    return min(_SHARE, _HELD_OUT / len(clean))


@dataclass(frozen=True)
class Course:
    """How a model is trained on: how long, how fast, and what that may cost."""

    updates: int  # batches
    max_drop: float  # accuracy on held-out images that the triggers may cost, in [0, 1]
    batch: int = 128  # images per update; a smaller set lowers it
    lr: float = 1e-3
    schedule: str = "constant"  # of the rate; linear: it falls to nothing
    momentum: float = 0.9
    crop: int = 4  # random shift in pixels
    cutout: int | None = 0  # side of the black square in every image, in pixels; None: HOLE for few


def hardened(
    model: Classifier,
    clean: Images,
    rng: Generator,
    stamp_for: Callable[[Classifier, Images], BatchHook],
    course: Course,
    *,
    what: str = "hardening",
) -> Classifier:
    """A copy of `model`, trained for a course's batches of clean images that a hook stamps.

    stamp_for: the copy and the images that it trains on -> the hook that stamps float batches.
    Raises BadInput where the clean set is too small to hold images out.
    """
    check(model, clean, what)
    if course.cutout is None:
        course = replace(course, cutout=HOLE if len(clean) < FEW else 0)
    held, tune = training.split(clean, _held_out(clean), rng)
    size, updates = min(course.batch, len(tune)), course.updates
    plan = _plan(course, size, len(tune) // size)
    model = deepcopy(model).eval()
    plain = _without_triggers(model, tune, plan, updates, rng)
    before, without = (training.accuracy(one, held) for one in (model, plain))
    floor = min(before, max(without, before - _BY_HEART)) - course.max_drop
    best, made, beyond = deepcopy(model.state_dict()), 0, 0
    stamp = stamp_for(model, tune)

    def look() -> None:
        nonlocal best, beyond
        accuracy = training.accuracy(model, held)
        report(what, made, updates, accuracy=accuracy)
        if accuracy >= floor - 1e-9:
            best, beyond = deepcopy(model.state_dict()), 0
        else:
            beyond += 1

    def hook(images: Images, draws: Generator) -> Images:
        nonlocal made
        if made and made % _LOOK == 0:
            look()
        if made == updates or (beyond >= _PATIENCE and course.schedule == "constant"):
            raise _Enough  # a rate that falls may bring the accuracy back
        made += 1
        return stamp(images, draws)

    with suppress(_Enough), ending(what, updates):
        training.fit(model, tune, plan, rng, on_batch=hook, what=what)
    look()
    model.load_state_dict(best)
    return model.eval()


def _plan(course: Course, batch: int, steps: int) -> training.Recipe:
    """The course's training, of epochs of `steps` batches; a hook ends it."""
    epochs = -(-(course.updates + 1) // steps)  # one update more, which ends it
    falls = course.schedule == "linear"
    return training.Recipe(
        epochs=epochs,
        batch=batch,
        lr=course.lr,
        momentum=course.momentum,
        weight_decay=0.0,
        label_smoothing=0.0,
        schedule="triangle" if falls else "constant",
        warmup=0.0,
        final_lr=1 - epochs * steps / course.updates,  # of the last epoch's end: 0 at `updates`
        crop=course.crop,
        cutout=course.cutout or 0,
        border="zero",
    )


def _without_triggers(
    model: Classifier, tune: Images, plan: training.Recipe, updates: int, rng: Generator
) -> Classifier:
    """A copy of `model` after the same updates, on the same batches; `rng` stays where it was."""
    same = Generator(rng.device)
    same.set_state(rng.get_state())
    plain, made, what = deepcopy(model), 0, "training without triggers"

    def hook(images: Images, _: Generator) -> Images:
        nonlocal made
        if made == updates:
            raise _Enough
        made += 1
        return images

    with suppress(_Enough), ending(what, updates):
        training.fit(plain, tune, plan, same, on_batch=hook, what=what)
    return plain.eval()


# ------------------------------------------------------------------------------------ the triggers


@dataclass(frozen=True)
class Pace:
    """How triggers are inverted for batches. A round is some batches on one pair of classes."""

    first: int = 200  # passes for the first batch of a round
    more: int = 40  # passes for the others, which go on from the last trigger
    batches: int = 3  # in a round
    asr: float = 0.9  # success that a trigger must have
    rise: float = 200.0  # factor on the weight of sizes where a search goes on from a success
    portion: float = 0.1  # share of a class's images in a batch that carry the trigger
    reuse: bool = True  # searches go on from the last trigger; else each has all passes anew


class Inverter:
    """Inverts triggers on float batches against a model that changes."""

    def __init__(self, model: Classifier, family: Family) -> None:
        self.model, self.family = model, family

    def __call__(
        self,
        problems: Sequence[Problem],
        images: Images,
        rng: Generator,
        *,
        passes: int,
        asr: float,
        factor: float = 1.0,
        starts: Sequence[State | None] | None = None,
        samples: int | None = None,
    ) -> list[Found]:
        """Answers in the problems' order, on `images` (float or uint8). samples: per problem, of
        each class that it is for; None: as many as the rarest of those classes has.

        factor: on the family's first weight on sizes.
        """
        counts = torch.bincount(images.y.cpu(), minlength=self.model.spec.classes).tolist()
        x = images.x
        if x.dtype != torch.uint8:
            x = (x * 255).round().to(torch.uint8)
        victims = [self._victims(problem, counts) for problem in problems]
        least = min(counts[label] for own in victims for label in own)
        each = least if samples is None else min(samples, least)
        search = replace(
            self.family.usual,
            samples=each * len(victims[0]),
            steps=passes,
            asr=asr,
            cost=self.family.usual.cost * factor,
        )
        return invert(
            Frozen(self.model), self.family, problems, Images(x, images.y), search,
            seed=draw_seed(rng), starts=starts, what=None,
        )  # fmt: skip

    @staticmethod
    def _victims(problem: Problem, counts: Sequence[int]) -> list[int]:
        """The classes that a problem is for; of a universal one, those that have images."""
        if problem.victim is not None:
            return [problem.victim]
        return [label for label, n in enumerate(counts) if n and label != problem.target]

    def stamp(self, images: Images, rows: Tensor, trigger: State) -> Images:
        """A float batch with `trigger` on the images at `rows` (K,), labels as they were."""
        if not len(rows):
            return images
        x = images.x.clone()
        x[rows] = stamped(self.family, trigger, x[rows]).to(x)
        return replace(images, x=x)


def portion_of(rows: Tensor, share: float, rng: Generator) -> Tensor:
    """A random share of rows (N,), at least one where there are any."""
    count = min(len(rows), max(1, int(share * len(rows))))
    return rows[torch.randperm(len(rows), generator=rng)[:count].to(rows.device)]


def rows_of_class(images: Images, label: int) -> Tensor:
    return (images.y == label).nonzero().flatten()


class Universal:
    """A batch hook: triggers from all classes to one, found on each batch anew.

    Classes are targets in turn. A search goes on from the last trigger to its class.
    """

    def __init__(self, inverter: Inverter, pace: Pace) -> None:
        self.inverter, self.pace = inverter, pace
        self.classes = inverter.model.spec.classes
        self.last: dict[int, Found] = {}
        self.turn = 0

    def __call__(self, images: Images, rng: Generator) -> Images:
        target, self.turn = self.turn % self.classes, self.turn + 1
        others = (images.y != target).nonzero().flatten()
        if not len(others):
            return images
        before = self.last.get(target) if self.pace.reuse else None
        good = before is not None and before.size is not None
        found = self.inverter(
            [Problem(None, target)],
            images,
            rng,
            passes=self.pace.more if good else self.pace.first,
            asr=self.pace.asr,
            factor=self.pace.rise if good else 1.0,
            starts=[before.trigger if good and before is not None else None],
        )[0]
        self.last[target] = found
        rows = portion_of(others, self.pace.portion, rng)
        return self.inverter.stamp(images, rows, found.trigger)


class Scheduler:
    """Which pair of classes next: mostly the one whose distances promise to grow, by prior U (how
    much losses fell in the warm-up) and posterior V (how much distances grew of late).

    U, V, sizes: (n, n) float64, row victim, column target.
    """

    def __init__(self, classes: int, explore: float, order: str = "promising") -> None:
        self.classes, self.explore, self.order = classes, explore, order
        shape = (classes, classes)
        self.prior = torch.zeros(shape, dtype=torch.float64)
        self.growth = torch.zeros(shape, dtype=torch.float64)
        self.size = torch.full(shape, torch.nan, dtype=torch.float64)
        self.turns = 0

    def warmed(self, sizes: Tensor) -> None:
        """After the warm-up. sizes: (n, n) of the first triggers, NaN where none was found."""
        self.size = sizes.clone()
        known = sizes.nan_to_num(0.0)
        self.growth = known / known.max().clamp_min(1e-12)

    def objective(self, batches: int) -> Tensor:
        """(n, n) symmetric; batches: made since the warm-up."""
        alpha = min(batches / _FADE, 1.0)
        prior, growth = (m + m.T for m in (self.prior, self.growth))
        return (1 - alpha) * prior + alpha * growth

    def choose(self, batches: int, rng: Generator) -> Pair:
        pairs = [(a, b) for a in range(self.classes) for b in range(a + 1, self.classes)]
        self.turns += 1
        if self.order == "turns":
            return pairs[(self.turns - 1) % len(pairs)]
        lot, place = (
            float(torch.rand((), generator=rng)),
            torch.randint(len(pairs), (), generator=rng),
        )
        if self.order == "random" or lot < self.explore:
            return pairs[int(place)]
        worth = self.objective(batches)
        return max(pairs, key=lambda pair: float(worth[pair]))

    def grown(self, way: Pair, size: float) -> None:
        """`way`: victim and target of a trigger that was found, of `size`."""
        if size <= 0:
            return
        before = float(self.size[way])
        gain = 0.0 if math.isnan(before) or before <= 0 else (size - before) / before
        self.growth[way] = (float(self.growth[way]) + gain) / 2
        self.size[way] = size


class Pairs:
    """A batch hook: rounds of batches, each with triggers between two classes, in both directions
    at once; before them a warm-up with a batch per class."""

    def __init__(
        self,
        inverter: Inverter,
        pace: Pace,
        scheduler: Scheduler,
        tune: Images,
        *,
        symmetric: bool = True,
        warm_up: str = "universal",
        warm_passes: int = 500,
        warm_asr: float = 0.99,
        warm_share: float = 0.5,
        warm_images: int = 10,
    ) -> None:
        self.inverter, self.pace, self.scheduler, self.tune = inverter, pace, scheduler, tune
        self.symmetric, self.warm_up = symmetric, warm_up
        self.warm_passes, self.warm_asr = warm_passes, warm_asr
        self.warm_share, self.warm_images = warm_share, warm_images
        self.stored: dict[Pair, tuple[State, float]] = {}  # (victim, target) -> trigger, its size
        self.made = 0
        self.ways: list[Pair] = []
        self.round: list[dict[Pair, Found]] = []
        classes = scheduler.classes
        self.first_sizes = torch.full((classes, classes), torch.nan, dtype=torch.float64)

    def __call__(self, images: Images, rng: Generator) -> Images:
        warm = 0 if self.warm_up == "none" else self.scheduler.classes
        step, self.made = self.made, self.made + 1
        if step < warm:
            return self._warmed(step, images, rng)
        if step == warm:
            self.scheduler.warmed(self.first_sizes)
        past, place = step - warm, (step - warm) % self.pace.batches
        if place == 0:
            self._begin(past, rng)
        shown = self._stamped(images, rng)
        if place == self.pace.batches - 1:
            self._end()
        return shown

    # -------------------------------------------------------------------------------------- warm-up

    def _warmed(self, target: int, images: Images, rng: Generator) -> Images:
        """Triggers to `target` from every other class: one for all of them, or one for each."""
        others = [label for label in range(self.scheduler.classes) if label != target]
        drawn = self._drawn(others, rng)
        if self.warm_up == "universal":
            problems = [Problem(None, target)]
        else:
            problems = [Problem(label, target) for label in others]
        sample = training.to_float(drawn.x.cpu())
        starts = [self.inverter.family.begin(sample, rng) for _ in problems]
        found = self.inverter(
            problems, drawn, rng, passes=self.warm_passes, asr=self.warm_asr, starts=starts
        )
        for start, one in zip(starts, found, strict=True):
            labels = others if one.problem.victim is None else [one.problem.victim]
            self._note(target, labels, drawn, start, one)
        rows = (images.y != target).nonzero().flatten()
        rows = portion_of(rows, self.warm_share, rng)
        for one in found:
            own = rows if one.problem.victim is None else rows[images.y[rows] == one.problem.victim]
            images = self.inverter.stamp(images, own, one.trigger)
        return images

    def _drawn(self, labels: Sequence[int], rng: Generator) -> Images:
        """Some of the clean images of each of these classes."""
        rows = []
        for label in labels:
            own = rows_of_class(self.tune, label)
            order = torch.randperm(len(own), generator=rng)[: self.warm_images]
            rows.append(own[order.to(own.device)])
        return self.tune.take(torch.cat(rows))

    def _note(
        self, target: int, labels: Sequence[int], drawn: Images, start: State, one: Found
    ) -> None:
        """What a trigger found in the warm-up says of the ways from these classes to the target."""
        first = self._losses(drawn, start, target)
        last = self._losses(drawn, one.trigger, target)
        gain = (first - last) / first.clamp_min(1e-6)
        y = drawn.y.cpu()
        for label in labels:
            way = label, target
            self.scheduler.prior[way] = float(gain[y == label].double().mean())
            if one.size:
                self.first_sizes[way] = one.size
                self.stored[way] = (one.trigger, one.size)

    @torch.no_grad()
    def _losses(self, drawn: Images, trigger: State, target: int) -> Tensor:
        """(N,) cross-entropy towards `target` of images with a trigger, on the CPU."""
        device = training.device_of(self.inverter.model)
        x = stamped(self.inverter.family, trigger, training.to_float(drawn.x.to(device)))
        answers = training.logits(self.inverter.model, x).cpu()
        return F.cross_entropy(answers, torch.full((len(x),), target), reduction="none")

    # --------------------------------------------------------------------------------------- rounds

    def _begin(self, batches: int, rng: Generator) -> None:
        one, two = self.scheduler.choose(batches, rng)
        self.ways, self.round = [(one, two), (two, one)], []
        if not self.symmetric:
            self.ways = [self.ways[int(torch.randint(2, (), generator=rng))]]

    def _stamped(self, images: Images, rng: Generator) -> Images:
        rows = {way: rows_of_class(images, way[0]) for way in self.ways}
        if not all(len(own) for own in rows.values()):
            return images
        last = self.round[-1] if self.round and self.pace.reuse else {}
        good = bool(last) and all(found.size is not None for found in last.values())
        starts: list[State | None]
        if good:
            starts = [last[way].trigger for way in self.ways]
        elif self.pace.reuse:
            starts = [self.stored[way][0] if way in self.stored else None for way in self.ways]
        else:
            starts = [None for _ in self.ways]
        found = self.inverter(
            [Problem(*way) for way in self.ways],
            images,
            rng,
            passes=self.pace.more if good else self.pace.first,
            asr=self.pace.asr,
            # in one loss each way has only its share of the cross-entropy
            factor=len(self.ways) * (self.pace.rise if good else 1.0),
            starts=starts,
        )
        answers = dict(zip(self.ways, found, strict=True))
        self.round.append(answers)
        for way, one in answers.items():
            self._store(way, one)
            chosen = portion_of(rows[way], self.pace.portion, rng)
            images = self.inverter.stamp(images, chosen, one.trigger)
        return images

    def _store(self, way: Pair, one: Found) -> None:
        """The larger trigger is kept: it comes from a model that has been hardened more."""
        if one.size and (way not in self.stored or one.size > self.stored[way][1]):
            self.stored[way] = (one.trigger, one.size)

    def _end(self) -> None:
        for way in self.ways:
            sizes = [answers[way].size for answers in self.round]
            known = [size for size in sizes if size]
            if known:
                self.scheduler.grown(way, sum(known) / len(known))


# -------------------------------------------------------------------------------------- as defenses


def by_classes(
    model: Classifier, clean: Images, rng: Generator, family: Family, pace: Pace, course: Course
) -> Classifier:
    """`hardened` with universal triggers."""
    return hardened(
        model, clean, rng, lambda copy, _: Universal(Inverter(copy, family), pace), course
    )


def by_pairs(
    model: Classifier,
    clean: Images,
    rng: Generator,
    family: Family,
    pace: Pace,
    scheduler: Scheduler,
    course: Course,
    *,
    symmetric: bool = True,
    warm_up: str = "universal",
    warm_passes: int = 500,
) -> Classifier:
    """`hardened` with triggers between two classes, as `Pairs` has them."""

    def hook(copy: Classifier, tune: Images) -> BatchHook:
        return Pairs(
            Inverter(copy, family), pace, scheduler, tune,
            symmetric=symmetric, warm_up=warm_up, warm_passes=warm_passes,
        )  # fmt: skip

    return hardened(model, clean, rng, hook, course)
