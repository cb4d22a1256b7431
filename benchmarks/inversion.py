"""Inverting NC triggers: the engine beside the pair-by-pair loop of public code.

The loop is the obvious one: a pair at a time, batches of 32, 32, 32 and 4 of 100 images, the model
in evaluation mode as it is (float32, its weights collecting gradients), torch's Adam, masks that
start from noise, the weight on the mask raised and lowered after ten passes, each improvement
nudged. The engine gets the same pairs, images and number of passes, and searches as `arena
distance` does; `--method nc:weight=steps` has it search like the loop. Its searches end once they
find nothing smaller (`--stall`) or after `--within` passes, for which it runs anew, and the process
keeps freed memory, as that command lets it; the loop, which has no such thing, runs before that.
Speed alone says nothing: sizes and success on the same images stand beside it, both triggers tried
in float32. The loop believes its count of a pass, in which the trigger was still moving; only a
trigger with the success asked for when it is tried is of equal quality, so the loop's smallest such
one stands beside the one that it ends with. Its trials are not on the clock. With restarts the
smallest of a pair is shown, as class distances take it. "Loop until" is when the loop, a restart
after the other, first had a trigger as small as the engine's; where it never had, all of its
seconds count.

    python benchmarks/inversion.py CHECKPOINT MODEL DATASET [--data-dir DIR] [--pairs sample:4]
        [--steps 300] [--within 100 300] [--stall 50] [--restarts 1] [--device cpu] [--method nc]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

import torch
from machine import describe
from options import of_one_model
from torch import nn
from torch.nn import functional as F

from arena.core import training
from arena.core.contracts import Images
from arena.core.inversion.distances import Pair, parse_pairs, problems_of, smallest
from arena.core.inversion.engine import Family, Found, Problem, Search, invert, rows_of, stamped
from arena.core.inversion.families import families
from arena.core.inversion.frozen import Frozen
from arena.core.seeding import stream
from arena.referee.isolate import keep_freed_memory
from arena.subjects import of_checkpoint

AIMS = {"cpu": 4.0, "cuda": 15.0}


@dataclass(frozen=True)
class Looped:
    """One pair as public code inverts it."""

    found: Found
    held: list[tuple[float, float]]  # triggers with the success, each smaller: seconds, size
    seconds: float

    @property
    def smallest(self) -> float:
        """Infinite where no trigger had the success."""
        return self.held[-1][1] if self.held else float("inf")


def by_hand(model: nn.Module, problem: Problem, images: Images, search: Search) -> Looped:
    device = training.device_of(model)
    start, idle, held = timed(device.type), 0.0, []
    rows = rows_of(problem, images.y.cpu(), search.samples, seed=0)
    x = training.to_float(images.x[rows]).to(device)
    rng = stream(0, "by hand", problem.victim, problem.target, problem.restart)
    free = [
        torch.atanh((torch.rand(shape, generator=rng) - 0.5) * 1.999999).to(device).requires_grad_()
        for shape in ((1, *x.shape[2:]), x.shape[1:])
    ]
    adam = torch.optim.Adam(free, lr=search.lr, betas=search.betas)
    wanted = torch.full((len(x),), problem.target, device=device)
    best, kept, cost, good, bad = float("inf"), None, search.cost, 0, 0
    for _ in range(search.steps):
        order = torch.randperm(len(x), generator=rng).to(device)
        hits = 0
        for part in order.split(search.batch):
            mask, pattern = (value.tanh() / (2 + 1e-6) + 0.5 for value in free)
            logits = model(torch.lerp(x[part], pattern, mask))
            loss = F.cross_entropy(logits, wanted[part]) + cost * mask.sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
            hits += int((logits.argmax(1) == wanted[part]).sum())
        success, size = hits / len(x) >= search.asr, mask.sum().item()
        if success and size < best:
            best, kept = size, (mask.detach().clone(), pattern.detach().clone())
            pause = timed(device.type)
            with torch.no_grad():
                answers = model(torch.lerp(x, kept[1], kept[0])).argmax(1)
                if float((answers == wanted).double().mean()) >= search.asr - 1e-6:
                    held.append((pause - start - idle, size))
            idle += timed(device.type) - pause
            with torch.no_grad():
                for value, shown in zip(free, kept, strict=True):
                    noise = (torch.rand(shown.shape, generator=rng) * 0.02 - 0.01).to(device)
                    value.copy_(torch.atanh(((shown + noise).clamp(0, 1) - 0.5) * 1.999999))
        good, bad = (good + 1, 0) if success else (0, bad + 1)
        if good >= search.patience:
            cost, good = cost * search.up, 0
        elif bad >= search.patience:
            cost, bad = cost / search.down, 0
    spent = timed(device.type) - start - idle
    if kept is None:
        return Looped(Found(problem, None, 0.0, {}, search.steps), held, spent)
    trigger = {"mask": torch.logit(kept[0]) / 2, "pattern": torch.logit(kept[1]) / 2}
    found = Found(problem, best, 0.0, trigger, search.steps)
    return Looped(found, held, spent)


def until(size: float, restarts: Sequence[Looped]) -> tuple[float, bool]:
    """Seconds until one after the other had a trigger of `size`, and whether any had."""
    spent = 0.0
    for one in restarts:
        if early := [seconds for seconds, held in one.held if held <= size]:
            return spent + early[0], True
        spent += one.seconds
    return spent, False


def success(model: nn.Module, one: Found, images: Images, search: Search) -> float:
    """Of a trigger on the images it was inverted on, in float32."""
    if not one.size:
        return 0.0
    rows = rows_of(one.problem, images.y.cpu(), search.samples, seed=0)
    device = training.device_of(model)
    x = training.to_float(images.x[rows]).to(device)
    trigger = {k: v.clamp(-15, 15).to(device) for k, v in one.trigger.items()}
    with torch.no_grad():
        answers = model(stamped(families.build("nc"), trigger, x)).argmax(1)
    return float((answers == one.problem.target).double().mean())


def compare(
    model: nn.Module,
    images: Images,
    pairs: Sequence[Pair],
    ours: Sequence[Found],
    theirs: Sequence[Looped],
    engine: float,
    search: Search,
) -> None:
    """Print the engine's answers, which took so many seconds, beside the loop's."""
    print(
        f"{'pair':<10}{'engine size':>12}{'success':>9}{'loop size':>11}{'success':>9}"
        f"{f'with {search.asr:g}':>11}{'loop until':>12}"
    )
    ratios, waits = [], []
    for pair in pairs:
        own = [
            at for at, one in enumerate(ours) if (one.problem.victim, one.problem.target) == pair
        ]
        one = smallest([ours[at] for at in own])
        two = smallest([theirs[at].found for at in own])
        held = min(theirs[at].smallest for at in own)
        cells = []
        for best in (one, two):
            tried = 0.0 if best is None else success(model, best, images, search)
            cells += [told(None if best is None else best.size), f"{tried:.2f}"]
        wait = ""
        if one is not None and one.size:
            seconds, had = until(one.size, [theirs[at] for at in own])
            wait = f"{seconds:.1f} s" if had else "never"
            waits.append(seconds)
        print(
            f"{f'{pair[0]} to {pair[1]}':<10}{cells[0]:>12}{cells[1]:>9}{cells[2]:>11}{cells[3]:>9}"
            f"{told(held):>11}{wait:>12}"
        )
        if one is not None and one.size and held < float("inf"):
            ratios.append(one.size / held)
    loop = sum(one.seconds for one in theirs)
    made, passes = (
        fmean(each) for each in ([a.steps for a in ours], [a.found.steps for a in theirs])
    )
    print(f"\npasses per problem: engine {made:.0f} (stall {search.stall}), loop {passes:.0f}")
    print(f"engine {engine:.1f} s, loop {loop:.1f} s: {loop / engine:.2f} times as fast")
    if len(waits) == len(pairs):
        print(
            f"the loop until triggers as small as the engine's: {sum(waits):.1f} s, "
            f"{sum(waits) / engine:.2f} times as long as the engine"
        )
    if ratios:
        print(
            f"size of triggers with a success of {search.asr:g}, engine over loop: median "
            f"{median(ratios):.3f}, mean {fmean(ratios):.3f}\n"
        )


def told(size: float | None) -> str:
    return "none" if size is None or size == float("inf") else f"{size:.2f}"


def timed(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def main(options: argparse.Namespace) -> None:
    subject = of_checkpoint(options.checkpoint, options.model, options.dataset, options.data_dir)
    model, images = subject.model.to(options.device), subject.data.val
    pairs = parse_pairs(options.pairs, subject.data.num_classes)
    problems = problems_of(pairs, options.restarts)
    search = Search(steps=options.steps, samples=options.samples)
    family: Family = families.build(options.method)
    print(describe())
    print(f"{len(problems)} problems, {search.steps} passes over {search.samples} images\n")

    theirs = [by_hand(model, problem, images, search) for problem in problems]
    keep_freed_memory()
    for most in options.within or [options.steps]:
        sooner = replace(family.usual, steps=most, samples=options.samples)
        if options.stall is not None:
            sooner = replace(sooner, stall=options.stall)
        start = timed(options.device)
        ours = invert(Frozen(model), family, problems, images, sooner)
        compare(model, images, pairs, ours, theirs, timed(options.device) - start, sooner)
    aim = AIMS[options.device.partition(":")[0]]
    print(f"aim: at least {aim:g} times as fast to a trigger of equal quality")
    print("load average at the end: " + ", ".join(f"{v:.2f}" for v in os.getloadavg()))


if __name__ == "__main__":
    parser = of_one_model(
        "Time the inversion engine beside a plain loop.", pairs="sample:4", restarts=1, steps=300
    )
    parser.add_argument("--stall", type=int, default=None, help="of the engine; none: the family's")
    parser.add_argument(
        "--within", type=int, nargs="+", help="passes of the engine at most, a run for each number"
    )
    parser.add_argument("--method", default="nc", help="of the engine: nc, with its fields")
    chosen = parser.parse_args()
    if chosen.method.partition(":")[0] != "nc":
        parser.error("the loop inverts masks with patterns: --method is nc, with fields or without")
    main(chosen)
