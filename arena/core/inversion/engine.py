"""The engine: many inversion problems at once, each as if it were alone.

A problem asks for the smallest trigger of a family that sends images of a victim class (or of all
classes but the target) to the target. As many problems as fit into memory advance together: one
pass through the frozen network serves all of them, but each has its own images, order, variables,
optimiser state, weight on the size, best trigger so far, and end. A problem that ends leaves the
batch and a waiting one takes its place. All draws of a problem come from its own stream, so that
its answer does not depend on what else was asked, but for the rounding of libraries whose kernels
go by a batch's size.

Source: Wang et al. 2019, Neural Cleanse (the weight on the size follows the success); the settings
    of MOTH (Tao et al. 2022) and of its published code: rates, patience, restarts from best.
Departs: passes over 100 images are made in equal parts of 25, not 32, 32, 32 and 4. In published
    code a trigger counts as successful by the images that its predecessors flipped during a pass;
    here the best one is tried on all images every tenth pass, and given up if it falls short.
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from arena.core import training
from arena.core.contracts import Images
from arena.core.inversion.frozen import Frozen, saved_bytes
from arena.core.progress import report
from arena.core.registry import BadInput
from arena.core.seeding import stream
from arena.core.training import Checkpoint

State = dict[str, Tensor]  # name -> (K, …): of each of K problems

_ORDERS = 16  # orders of its images that a problem goes through in turn
_NUDGES = 8  # draws of noise around a best trigger that a problem goes through in turn
_LOOK = 10  # passes between two looks at who has ended: each look waits for the device
_SHARE = 0.9  # of a GPU's free memory is used
_SAVE = 30.0  # seconds between two checkpoints
_CPU_IMAGES = 300  # images in flight on a CPU: more buy nothing there
# what a pass takes, in what it keeps for its backward part: slopes and copies in other layouts
# come on top; measured on a CPU: 1.3 to 2.25 times, by the family
_WORKING = 2.5


@dataclass(frozen=True, order=True)
class Problem:
    """A trigger that sends `victim` (None: every class but the target) to `target`."""

    victim: int | None
    target: int
    restart: int = 0  # the same problem with other draws


@dataclass(frozen=True)
class Search:
    """How long and how hard. Rates and costs are for a cross-entropy averaged over images."""

    samples: int = 100  # images per problem
    steps: int = 1000  # passes over them
    batch: int = 32  # images per update, at most
    asr: float = 0.9  # share of images that a trigger must send to the target, in (0, 1]
    lr: float = 0.1  # of Adam
    betas: tuple[float, float] = (0.5, 0.9)
    rule: str = "adam"  # or sign: every variable moves by lr against the sign of its slope
    cost: float = 1e-3  # weight on the size once it counts
    wait: bool = False  # it counts from the first `patience` successes on, else from the start
    patience: int = 10  # passes in a row with success (without) after which the weight changes
    up: float = 1.5  # factor on the weight after successes
    down: float = 1.5**1.5  # divisor after failures
    stall: int | None = None  # ends a problem: so many passes without a trigger smaller by 1 %,
    # after the weight has both risen and fallen


class Guide(Protocol):
    """What a search looks at inside the network, besides its answers."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Modules of the network's body whose outputs `drive` wants."""
        ...

    def assigned(self, problem: Problem) -> State:
        """Variables of a problem that stay; their names start with `_`."""
        ...

    def drive(self, at: State, outputs: Mapping[str, Tensor]) -> Tensor:
        """(K,) to be added to the loss. outputs: (K, B, C, …) of each layer, by name."""
        ...


class Family(Protocol):
    """A family of triggers: subclass it. Its functions are pure and serve K problems at once.

    Variables are named tensors, (K, …) each; `begin` makes those of one problem, without the K.
    Free ones are real numbers that the optimiser moves; those whose names start with `_` stay.
    """

    unit: ClassVar[str]  # of sizes, as reported
    nudges: ClassVar[bool] = False  # `nudged` uses noise
    sized_by_images: ClassVar[bool] = False  # a trigger's size differs from image to image
    also: ClassVar[tuple[str, float] | None] = None  # another unit in print, and its factor

    @property
    def usual(self) -> Search:
        """The search of its paper, but for what its file departs in."""
        return Search()

    @property
    def seen_by(self) -> str | None:
        """The network whose features sizes are of; None: they are of images."""
        return None

    def check(self, shape: tuple[int, int, int]) -> None:  # most fit all images
        """Raise BadInput where there are no such triggers for images of a shape (C, H, W)."""

    def guide(
        self, model: Frozen, problems: Sequence[Problem], images: Images, seed: int
    ) -> Guide | None:
        """Made once for all problems of a run, from nothing that depends on which they are; None:
        the search looks at answers alone."""
        return None

    @abstractmethod
    def begin(self, x: Tensor, rng: Generator) -> State:
        """The variables of a problem; x: its images, (N, C, H, W) float32 in [0, 1]."""
        ...

    @abstractmethod
    def stamp(self, at: State, x: Tensor) -> Tensor:
        """x: (K, B, C, H, W) float32 in [0, 1] -> the same, with each problem's trigger."""
        ...

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """(K,) from logits (K, B, classes) and the classes wanted (K,): mean cross-entropy."""
        wanted = target[:, None].expand(logits.shape[:2])
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        return each.view(logits.shape[:2]).mean(1)

    @abstractmethod
    def penalty(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        """(K,) what the weight multiplies in the loss."""
        ...

    @abstractmethod
    def size(self, at: State, x: Tensor, stamped: Tensor) -> Tensor:
        """(K,) in `unit`; x, stamped: images without and with the trigger, (K, B, C, H, W)."""
        ...

    def record(self, at: State, size: Tensor, loss: Tensor) -> Tensor:
        """(K, M): what must all shrink for a trigger to be better. size, loss: (K,) of a pass."""
        return size[:, None]

    def kept(self, at: State) -> State:
        """The variables that are remembered of these (smallest values cut off, say)."""
        return at

    def projected(self, at: State) -> State:
        """After an update: the variables, where they may be."""
        return at

    def thinned(self, at: State, slopes: State, success: Tensor) -> State:
        """After a pass: the variables, less what an external step takes away. slopes: those of the
        last update; success: (K,) bool, of the pass."""
        return at

    def nudged(self, kept: State, noise: State) -> State:
        """Where the search goes on from a best trigger; noise: uniform in [-1, 1], of the free
        variables."""
        return kept


@dataclass(frozen=True)
class Found:
    """A problem's answer. Without success there is no size, and the trigger is the last one."""

    problem: Problem
    size: float | None  # in the family's unit
    asr: float  # share of the problem's images that the trigger sends to the target, checked
    trigger: State  # all variables, without the leading K, on the CPU
    steps: int  # passes made


def invert(
    model: Frozen,
    family: Family,
    problems: Sequence[Problem],
    images: Images,
    search: Search,
    *,
    seed: int = 0,
    memory: float | None = None,
    slots: int | None = None,
    checkpoint: Checkpoint | None = None,
    what: str | None = "inverting triggers",
    guide: Guide | None = None,
    starts: Sequence[State | None] | None = None,
) -> list[Found]:
    """Answers in the order of `problems`.

    images: uint8, on any device; problems draw theirs from it, the same for all restarts.
    memory: bytes that the triggers' passes may take; None: what is free on a GPU.
    slots: problems in flight; None: as many as the memory holds (on a CPU few: they buy nothing).
    checkpoint: where the state is kept now and then, and read from at the start.
    what: this in front of the progress; None: it is not told.
    guide: one that is there already; None: the family's, if it has one.
    starts: where each problem's free variables start (a trigger found before, say); None: anew.
    Raises BadInput on a class without enough images, on victim = target, on images that the family
    is not for, and where the memory does not hold one problem.
    """
    run = _Run(
        model, family, tuple(problems), images, search, seed, checkpoint, what, guide, starts
    )
    return run.run(memory, slots)


@torch.no_grad()
def stamped(family: Family, trigger: State, x: Tensor) -> Tensor:
    """One trigger on images (N, C, H, W) float32 in [0, 1]."""
    at = {name: value[None].to(x.device) for name, value in trigger.items()}
    return family.stamp(at, x[None])[0]


# ------------------------------------------------------------------------------------ the images


def check_images(
    family: Family, problems: Sequence[Problem], images: Images, samples: int, seed: int = 0
) -> None:
    """Raise BadInput unless every problem has its images, and the family has triggers for them."""
    _shape_for(family, images)
    labels = images.y.cpu()
    for problem in {(one.victim, one.target): one for one in problems}.values():
        rows_of(problem, labels, samples, seed)


def _shape_for(family: Family, images: Images) -> tuple[int, int, int]:
    channels, height, width = (int(side) for side in images.x.shape[1:])
    family.check((channels, height, width))
    return channels, height, width


def rows_of(problem: Problem, y: Tensor, samples: int, seed: int) -> Tensor:
    """(samples,) int64: the images of a problem, of the victim class or evenly of all but the
    target. y: (N,) int64 on the CPU. Raises BadInput where there are too few."""
    classes = int(y.max()) + 1 if len(y) else 0
    if problem.victim == problem.target:
        raise BadInput(f"Victim and target are both class {problem.target}; name two classes.")
    for label in (problem.victim, problem.target):
        if label is not None and not label >= 0:
            raise BadInput(f"There is no class {label}; classes start at 0.")
    if problem.victim is None:
        victims = [label for label in range(classes) if label != problem.target]
    else:
        victims = [problem.victim]
    victims = [label for label in victims if (y == label).any()]
    if not victims:
        raise BadInput(f"There are no images of class {problem.victim} to invert a trigger on.")
    drawn = []
    for place, label in enumerate(victims):
        own = (y == label).nonzero().flatten()
        need = samples * (place + 1) // len(victims) - samples * place // len(victims)
        if len(own) < need:
            raise BadInput(
                f"Class {label} has {len(own)} images, but {need} are asked for; lower the number "
                "of samples."
            )
        order = torch.randperm(len(own), generator=stream(seed, "inversion images", label))
        drawn.append(own[order[:need]])
    return torch.cat(drawn)


# --------------------------------------------------------------------------------------- the run


class _Run:
    def __init__(
        self,
        model: Frozen,
        family: Family,
        problems: tuple[Problem, ...],
        images: Images,
        search: Search,
        seed: int,
        checkpoint: Checkpoint | None,
        what: str | None,
        guide: Guide | None = None,
        starts: Sequence[State | None] | None = None,
    ) -> None:
        self.model, self.family, self.search, self.seed = model, family, search, seed
        self.problems, self.checkpoint, self.what = problems, checkpoint, what
        self.starts = starts or [None] * len(problems)
        self.device = model.device
        labels = images.y.cpu()
        self.rows = [rows_of(problem, labels, search.samples, seed) for problem in problems]
        self.x = images.x.to(self.device)
        self.shape = _shape_for(family, images)
        self.parts = math.ceil(search.samples / search.batch)
        self.found: dict[int, Found] = {}
        self.guide = guide or family.guide(model, problems, images, seed)

    def run(self, memory: float | None, slots: int | None) -> list[Found]:
        self.slots = min(len(self.problems), slots or self._room(memory))
        waiting, state, index = self._resumed()
        last = time.monotonic()
        while waiting or index:
            if new := waiting[: max(0, self.slots - len(index))]:
                waiting = waiting[len(new) :]
                state = _joined(state, self._begun(new))
                index = [*index, *new]
            for _ in range(_LOOK):
                self._in_parts(state, self._advance)
            self._in_parts(state, self._check)
            ended = self._ended(state)  # waits for the device
            if any(ended):
                self._harvest(state, index, ended)
                keep = [place for place, end in enumerate(ended) if not end]
                state = {k: v[keep] for k, v in state.items()} if keep else {}
                index = [index[place] for place in keep]
            self._tell(state)
            if self.checkpoint is not None and time.monotonic() - last > _SAVE:
                self._save(waiting, state, index)
                last = time.monotonic()
        return [self.found[place] for place in range(len(self.problems))]

    def _in_parts(self, state: State, work: Callable[[State], None]) -> None:
        """Work on all problems, in place, as many at once as the memory holds: a run that goes on
        may have had room for more before."""
        count = len(state["passes"])
        if count <= self.slots:
            work(state)
            return
        for places in torch.arange(count, device=self.device).split(self.slots):
            self._on(state, places, work)

    @staticmethod
    def _on(state: State, places: Tensor, work: Callable[[State], None]) -> None:
        """Work on the problems at some places, in place."""
        few = {name: value[places] for name, value in state.items()}
        work(few)
        for name, value in few.items():
            state[name][places] = value

    # ------------------------------------------------------------------------- room and progress

    def _room(self, memory: float | None) -> int:
        """Problems that fit at once."""
        if memory is None and self.device.type != "cuda":
            return max(1, _CPU_IMAGES // math.ceil(self.search.samples / self.parts))
        one = self._begun([0])
        each = 2.0 * sum(value.nbytes for value in one.values())  # it is copied when others end
        x = self._images(one["rows"].tensor_split(self.parts, 1)[0])
        each += _WORKING * saved_bytes(lambda: self._losses(one, _leaves(one), x), self.model)
        if memory is None:
            memory = _SHARE * torch.cuda.mem_get_info(self.device)[0]
        if memory < each:
            raise BadInput(
                f"One problem needs about {each / 2**20:.0f} MiB, more than the memory allowed "
                f"({memory / 2**20:.0f} MiB); allow more."
            )
        return int(memory // each)

    def _tell(self, state: State) -> None:
        if self.what is None:
            return
        each = self.search.steps
        now = int(state["passes"].sum()) if state else 0
        report(self.what, len(self.found) * each + now, len(self.problems) * each)

    def _save(self, waiting: list[int], state: State, index: list[int]) -> None:
        assert self.checkpoint is not None
        found = {
            place: (answer.size, answer.asr, answer.trigger, answer.steps)
            for place, answer in self.found.items()
        }
        self.checkpoint.save({"waiting": waiting, "index": index, "state": state, "found": found})

    def _resumed(self) -> tuple[list[int], State, list[int]]:
        kept = None if self.checkpoint is None else self.checkpoint.load()
        if not kept:
            return list(range(len(self.problems))), {}, []
        self.found = {
            place: Found(self.problems[place], *answer) for place, answer in kept["found"].items()
        }
        state = {name: value.to(self.device) for name, value in kept["state"].items()}
        return list(kept["waiting"]), state, list(kept["index"])

    # ---------------------------------------------------------------------------- state of problems

    def _begun(self, places: Sequence[int]) -> State:
        """The state of problems that enter, (K, …) each, on the device."""
        each = [self._begin(place) for place in places]
        return {name: torch.stack([one[name] for one in each]).to(self.device) for name in each[0]}

    def _begin(self, place: int) -> State:
        search, problem, rows = self.search, self.problems[place], self.rows[place]
        rng = stream(self.seed, "inversion", problem.victim, problem.target, problem.restart)
        at = self.family.begin(training.to_float(self.x[rows].cpu()), rng)
        start = self.starts[place] or {}
        at |= {name: value for name, value in start.items() if not name.startswith("_")}
        if self.guide is not None:
            at = at | self.guide.assigned(problem)
        orders = torch.stack([torch.randperm(len(rows), generator=rng) for _ in range(_ORDERS)])
        state: State = {
            "rows": rows,
            "orders": orders,
            "target": torch.tensor(problem.target),
            "cost": torch.tensor(0.0 if search.wait else search.cost),
            "rose": torch.tensor(False),
            "fell": torch.tensor(False),
            "passes": torch.tensor(0),
            "updates": torch.tensor(0),
            "good": torch.tensor(0),  # passes in a row with success
            "bad": torch.tensor(0),  # passes in a row without
            "since": torch.tensor(0),  # passes since a trigger smaller by 1 %
            "mark": torch.tensor(torch.inf),  # its size
            "news": torch.tensor(False),  # the best trigger is newer than the last try
            "found": torch.tensor(False),  # there is a sure one
            "size": torch.tensor(torch.inf, dtype=torch.float64),  # of the sure one
            "asr": torch.tensor(0.0, dtype=torch.float64),  # of the sure one
            "turns": torch.tensor(0),  # how often a best trigger was nudged
        }
        for name, value in at.items():
            if name.startswith("_"):
                state[f"fixed.{name}"] = value
                continue
            turns = _NUDGES if self.family.nudges else 1
            noise = torch.rand(turns, *value.shape, generator=rng) * 2 - 1
            state |= {
                f"free.{name}": value,
                f"best.{name}": value.clone(),  # by what was counted during passes
                f"sure.{name}": value.clone(),  # tried on all images
                f"noise.{name}": noise,
                f"mean.{name}": torch.zeros_like(value),
                f"square.{name}": torch.zeros_like(value),
            }
        stacked, one = {name: value[None] for name, value in at.items()}, torch.zeros(1)
        none = torch.full_like(self.family.record(stacked, one, one)[0], torch.inf)
        return {**state, "record": none, "sure_record": none.clone()}

    # ------------------------------------------------------------------------------- one pass

    def _advance(self, state: State) -> None:
        """One pass over every problem's images, in place; nothing waits for the device."""
        search, family = self.search, self.family
        turn = (state["passes"] % _ORDERS)[:, None, None].expand(-1, 1, search.samples)
        order = state["orders"].gather(1, turn)[:, 0]
        rows = state["rows"].gather(1, order)
        hits, losses = torch.zeros_like(state["passes"]), torch.zeros_like(state["cost"])
        sizes = []  # of every part, where they differ: else triggers on dull images would win
        for chosen in rows.tensor_split(self.parts, 1):
            x = self._images(chosen)
            with torch.enable_grad():
                leaves = _leaves(state)
                shown, logits, loss, total = self._losses(state, leaves, x)
                found = torch.autograd.grad(
                    total.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
                )
            hits += (logits.detach().argmax(2) == state["target"][:, None]).sum(1)
            losses += loss.detach()
            last = {name: value.detach() for name, value in leaves.items()}
            if family.sized_by_images:
                with torch.no_grad():
                    sizes.append(family.size(last | _named(state, "fixed"), x, shown))
            slopes = dict(zip(leaves, found, strict=True))
            self._update(state, last, slopes)
        success = hits >= search.asr * search.samples - 1e-6
        with torch.no_grad():
            size = (
                torch.stack(sizes).mean(0)
                if sizes
                else family.size(last | _named(state, "fixed"), x, shown)
            )
        self._judge(state, last, success, size, losses / self.parts)
        at = family.thinned(_named(state, "free") | _named(state, "fixed"), slopes, success)
        state |= {f"free.{name}": at[name] for name in last}

    def _images(self, rows: Tensor) -> Tensor:
        """(K, B, C, H, W) float32 of rows (K, B)."""
        return training.to_float(self.x[rows.flatten()]).view(*rows.shape, *self.shape)

    def _losses(
        self, state: State, leaves: State, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images with triggers, logits, and (K,) losses without and with what sizes cost."""
        at = leaves | _named(state, "fixed")
        shown = self.family.stamp(at, x)
        logits, driven = self._asked(at, shown)
        loss = self.family.loss(logits, state["target"])
        loss = loss if driven is None else loss + driven
        return shown, logits, loss, loss + state["cost"] * self.family.penalty(at, x, shown)

    def _asked(self, at: State, shown: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits (K, B, classes) of images (K, B, C, H, W), and what the guide adds to the loss."""
        front, flat = shown.shape[:2], shown.flatten(0, 1)
        if self.guide is None:
            return self.model(flat).view(*front, -1), None
        logits, outputs = self.model.watched(flat, self.guide.layers)
        apart = {name: value.unflatten(0, front) for name, value in outputs.items()}
        return logits.view(*front, -1), self.guide.drive(at, apart)

    def _update(self, state: State, free: State, slopes: State) -> None:
        """Adam, with a count of updates for every problem; or a step by signs."""
        (one, two), lr = self.search.betas, self.search.lr
        state["updates"] = state["updates"] + 1
        moved = {}
        for name, slope in slopes.items():
            if self.search.rule == "sign":
                moved[name] = free[name] - lr * slope.sign()
                continue
            mean, square = state[f"mean.{name}"], state[f"square.{name}"]
            mean.lerp_(slope, 1 - one)
            square.mul_(two).addcmul_(slope, slope, value=1 - two)
            shape = (-1, *[1] * (slope.ndim - 1))
            rise = (1 - one ** state["updates"]).view(shape)
            level = (1 - two ** state["updates"]).view(shape)
            moved[name] = free[name] - lr * (mean / rise) / ((square / level).sqrt() + 1e-8)
        at = self.family.projected(moved | _named(state, "fixed"))
        state |= {f"free.{name}": at[name] for name in free}

    def _judge(
        self, state: State, free: State, success: Tensor, size: Tensor, loss: Tensor
    ) -> None:
        """After a pass: is the trigger that it ended with better, and is its size to weigh more?

        free: the variables before the pass's last update, those that were seen last; success: (K,)
        bool, size, loss: (K,) of the pass.
        """
        search, family = self.search, self.family
        fixed = _named(state, "fixed")
        kept = family.kept(free | fixed)
        sizes = family.record(free | fixed, size, loss)
        live = state["passes"] < search.steps  # looks are every tenth pass: some come too late
        better = live & success & (sizes < state["record"]).all(1)
        state["record"] = torch.where(better[:, None], sizes, state["record"])
        state["news"] = state["news"] | better
        noise = {}
        for name in free:
            mask = better.view(-1, *[1] * (free[name].ndim - 1))
            state[f"best.{name}"] = torch.where(mask, kept[name], state[f"best.{name}"])
            table = state[f"noise.{name}"]
            turn = (state["turns"] % table.shape[1]).view(-1, *[1] * (table.ndim - 1))
            noise[name] = table.gather(1, turn.expand(-1, 1, *table.shape[2:]))[:, 0]
        nudged = family.nudged(kept, noise)
        for name in free:
            value = nudged[name]
            mask = better.view(-1, *[1] * (value.ndim - 1))
            state[f"free.{name}"] = torch.where(mask, value, state[f"free.{name}"])
        state["turns"] = state["turns"] + better
        state["passes"] = state["passes"] + live
        smaller = better & (size < 0.99 * state["mark"])
        state["mark"] = torch.where(smaller, size, state["mark"])
        state["since"] = torch.where(smaller, 0, state["since"] + 1)
        state["good"] = torch.where(success, state["good"] + 1, 0)
        state["bad"] = torch.where(success, 0, state["bad"] + 1)
        rises, falls = state["good"] >= search.patience, state["bad"] >= search.patience
        factor = torch.where(rises, search.up, torch.where(falls, 1 / search.down, 1.0))
        first = rises & (state["cost"] == 0)
        state["cost"] = torch.where(first, search.cost, state["cost"] * factor)
        state["rose"], state["fell"] = state["rose"] | rises, state["fell"] | falls
        state["good"] = torch.where(rises, 0, state["good"])
        state["bad"] = torch.where(falls, 0, state["bad"])

    @torch.no_grad()
    def _check(self, state: State) -> None:
        """Try new best triggers on all of their images; those that fall short are given up."""
        if not bool(state["news"].any()):  # waits for the device
            return
        share, size = self._tried(state, "best")
        holds = state["news"] & (share >= self.search.asr - 1e-6)
        state["asr"] = torch.where(holds, share, state["asr"])
        state["size"] = torch.where(holds, size, state["size"])
        state["found"] = state["found"] | holds
        for one, two in [("record", "sure_record")] + [
            (f"best.{name}", f"sure.{name}") for name in _named(state, "best")
        ]:
            mask = holds.view(-1, *[1] * (state[one].ndim - 1))
            state[two] = torch.where(mask, state[one], state[two])
            state[one] = state[two].clone()
        state["news"] = torch.zeros_like(state["news"])

    def _tried(self, state: State, which: str) -> tuple[Tensor, Tensor]:
        """(K,) share of all of each problem's images that its trigger sends to the target, and its
        size on them."""
        at = _named(state, which) | _named(state, "fixed")
        hits = torch.zeros_like(state["passes"])
        size = torch.zeros_like(state["size"])
        for rows in state["rows"].tensor_split(self.parts, 1):
            x = self._images(rows)
            shown = self.family.stamp(at, x)
            answers = self.model(shown.flatten(0, 1)).argmax(1)
            hits += (answers.view(rows.shape) == state["target"][:, None]).sum(1)
            size += self.family.size(at, x, shown).double() * rows.shape[1]
        return hits.double() / self.search.samples, size / self.search.samples

    def _ended(self, state: State) -> list[bool]:
        over = state["passes"] >= self.search.steps
        if self.search.stall is not None:
            tried = state["found"] & state["rose"] & state["fell"]
            over = over | (tried & (state["since"] >= self.search.stall))
        return [bool(end) for end in over.tolist()]

    @torch.no_grad()
    def _harvest(self, state: State, index: Sequence[int], ended: Sequence[bool]) -> None:
        """Keep the answers of the problems that ended."""
        found = state["found"].tolist()
        shares = torch.where(state["found"], state["asr"], self._tried(state, "free")[0]).tolist()
        fixed, sizes = _named(state, "fixed"), state["size"].tolist()
        for place in (place for place, end in enumerate(ended) if end):
            at = _named(state, "sure" if found[place] else "free") | fixed
            self.found[index[place]] = Found(
                problem=self.problems[index[place]],
                size=sizes[place] if found[place] else None,
                asr=shares[place],
                trigger={name: value[place].cpu() for name, value in at.items()},
                steps=int(state["passes"][place]),
            )


class Arms:
    """Problems that somebody advances a pass at a time, a few of them or all, as in a bandit."""

    def __init__(
        self,
        model: Frozen,
        family: Family,
        problems: Sequence[Problem],
        images: Images,
        search: Search,
        seed: int,
    ) -> None:
        self._run = _Run(model, family, tuple(problems), images, search, seed, None, "arms")
        self._run.slots = self._run._room(None)
        self._state = self._run._begun(range(len(problems)))

    def __len__(self) -> int:
        return len(self._run.problems)

    def advance(self, places: Sequence[int]) -> None:
        """One pass of some problems, which ends with a try of their new best triggers."""

        def work(state: State) -> None:
            self._run._advance(state)
            self._run._check(state)

        chosen = torch.tensor(list(places), device=self._run.device)
        for few in chosen.split(self._run.slots):
            self._run._on(self._state, few, work)

    def sizes(self) -> list[float]:
        """The smallest of each; infinite where there is none."""
        return [float(value) for value in self._state["size"].tolist()]

    def passes(self) -> list[int]:
        return [int(value) for value in self._state["passes"].tolist()]

    def improvements(self) -> list[int]:
        """How often each found a smaller trigger."""
        return [int(value) for value in self._state["turns"].tolist()]

    def stalled(self, patience: int) -> list[bool]:
        """Which have found none for so long, with a weight that has both risen and fallen."""
        state = self._state
        tried = state["found"] & state["rose"] & state["fell"]
        return [bool(over) for over in (tried & (state["since"] >= patience)).tolist()]

    def found(self) -> list[Found]:
        self._run._harvest(self._state, range(len(self)), [True] * len(self))
        return [self._run.found[place] for place in range(len(self))]


def _named(state: State, prefix: str) -> State:
    return {k.partition(".")[2]: v for k, v in state.items() if k.startswith(f"{prefix}.")}


def _joined(state: State, more: State) -> State:
    return {k: torch.cat([state[k], v]) for k, v in more.items()} if state else more


def _leaves(state: State) -> State:
    """The free variables, to be differentiated by."""
    return {name: value.requires_grad_() for name, value in _named(state, "free").items()}
