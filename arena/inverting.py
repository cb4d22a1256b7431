"""Distances between a model's classes, and triggers of it, as users ask for them: kept and resumed.

An answer is an artifact of the store, keyed by the weights, the images, the family with its code,
and the search; asked for again it is read, stopped on the way it goes on.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from arena.core import training
from arena.core.contracts import Images
from arena.core.inversion import codec as codecs
from arena.core.inversion import distances as measures
from arena.core.inversion.engine import (
    Family,
    Found,
    Problem,
    Search,
    check_images,
    invert,
    rows_of,
    stamped,
)
from arena.core.inversion.families import families
from arena.core.inversion.frozen import Frozen
from arena.core.inversion.perceived import retold, size_of
from arena.core.registry import BadInput, code_hash, short_spec, spec_of, split_spec
from arena.core.seeding import stream
from arena.identity import method_identity
from arena.referee.isolate import keep_freed_memory
from arena.referee.keeping import FileCheckpoint
from arena.store import Store, digest
from arena.subjects import Subject

_HELD = 512 * 2**20  # bytes of triggers in memory and in one file of the store, at most


@dataclass(frozen=True)
class Question:
    """How triggers are asked for."""

    method: str = "nc"  # spec of a trigger family
    restarts: int = 3  # searches per problem, of which the smallest counts
    samples: int = 100  # validation images per problem
    steps: int | None = None  # passes over them; None: the family's
    asr: float | None = None  # success asked for; None: the family's
    seed: int = 0
    split: str = "val"  # where the images come from
    stall: int | None = None  # passes without a smaller trigger end a search; None: the family's

    def __post_init__(self) -> None:
        for name, least in (("restarts", 1), ("samples", 1), ("steps", 1), ("stall", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise BadInput(f"--{name} must be at least {least}, got {value}.")
        if self.asr is not None and not 0 < self.asr <= 1:
            raise BadInput(f"--asr must be above 0 and at most 1, got {self.asr:g}.")
        if self.split not in ("val", "test"):
            raise BadInput(f"--split must be val or test, got {self.split!r}.")

    @property
    def family(self) -> Family:
        family: Family = families.build(self.method)
        return family

    @property
    def search(self) -> Search:
        usual = self.family.usual
        return replace(
            usual,
            samples=self.samples,
            steps=usual.steps if self.steps is None else self.steps,
            asr=usual.asr if self.asr is None else self.asr,
            stall=usual.stall if self.stall is None else self.stall,
        )


def with_encoder(method: str, encoder: str, subject: Subject, store: Store) -> str:
    """The spec of DECK's triggers with another encoder: the name of one that is shipped, a file of
    tools/make_codec.py, or torchvision:NAME, for which a decoder is trained on the data set's
    training images, once per store. Raises BadInput."""
    name, fields = split_spec(method)
    if name != "deck":
        raise BadInput(f"--encoder is for --method deck; the triggers of {name} need none.")
    if not encoder.startswith("torchvision:"):
        is_file = encoder.endswith(".safetensors")
        return _with(name, {**fields, ("file" if is_file else "encoder"): encoder})
    family = families.build(method)
    key = digest(
        {
            "kind": "codec",
            "encoder": encoder,
            "decoder": family.decoder,
            "data": subject.data.fingerprint,
            "code": code_hash("arena.core.inversion.codec"),
        }
    )
    part = f"{encoder.replace(':', '-')}-{subject.data.name.partition(':')[0]}"
    store.create()
    with store.lock(key):
        kept = store.artifact(key)
        if kept is None:
            first = codecs.vgg_encoder(encoder.partition(":")[2])
            made = codecs.train_codec(
                subject.data.train, stream(0, "codec"), how=family.decoder, encoder=first
            )
            kept = store.save(key, {part: codecs.packed([made])}, {"kind": "codec"})
    return _with(name, {**fields, "file": str(kept.path(part))})


def _with(name: str, fields: Mapping[str, str]) -> str:
    quoted = {k: f"({v})" if set(v) & set(",()") else v for k, v in fields.items()}
    return f"{name}:{','.join(f'{key}={value}' for key, value in quoted.items())}"


def answers(
    subject: Subject,
    question: Question,
    problems: Sequence[Problem],
    store: Store,
    *,
    device: str = "cpu",
    memory: float | None = None,
    what: str = "inverting triggers",
) -> tuple[list[Found], float]:
    """The engine's answers and the seconds that they took. Raises BadInput.

    what: this in front of the progress.
    """
    family, search = question.family, question.search
    images = getattr(subject.data, question.split)
    check_images(family, problems, images, search.samples, question.seed)
    key = digest(
        {
            "kind": "inversion",
            "weights": subject.digest,
            "data": subject.data.fingerprint,
            "split": question.split,
            "family": method_identity(family),
            "search": dataclasses.asdict(search),
            "problems": [dataclasses.astuple(problem) for problem in problems],
            "seed": question.seed,
            "bf16": training.has_bf16(torch.device(device)),
        }
    )
    store.create()
    with store.lock(key):
        kept = store.artifact(key)
        if kept is None:
            keep_freed_memory()
            started = time.monotonic()
            checkpoint = FileCheckpoint(store.scratch(key) / "inversion.pt")
            found = invert(
                Frozen(subject.model.to(device)),
                family,
                problems,
                images,
                search,
                seed=question.seed,
                memory=memory,
                checkpoint=checkpoint,
                what=what,
            )
            figures = [(one.size, one.asr, one.steps) for one in found]
            triggers = {
                f"{place}.{name}": value.contiguous()
                for place, one in enumerate(found)
                for name, value in one.trigger.items()
            }
            meta = {"kind": "inversion", "figures": figures, "method": spec_of(family)}
            seconds = time.monotonic() - started
            kept = store.save(key, {"triggers": triggers}, {**meta, "seconds": seconds})
            store.clear_scratch(key)
            del found, triggers  # they are read below
    states: list[dict[str, Tensor]] = [{} for _ in problems]
    for label, value in kept.tensors("triggers").items():
        place, _, name = label.partition(".")
        states[int(place)][name] = value
    found = [
        Found(problem, size, asr, trigger, steps)
        for problem, (size, asr, steps), trigger in zip(
            problems, kept.meta["figures"], states, strict=True
        )
    ]
    told = retold(found, family, images, question.samples, question.seed)
    return told, float(kept.meta["seconds"])


def sizes(
    subject: Subject,
    question: Question,
    problems: Sequence[Problem],
    store: Store,
    *,
    device: str = "cpu",
    memory: float | None = None,
) -> tuple[list[Found], float]:
    """As `answers`, but of triggers nothing more than their sizes and success.

    They are asked for in portions, each kept by itself: all triggers of 43 classes, say, are
    gigabytes for some families. What a problem's answer is does not depend on its portion.
    """
    images = getattr(subject.data, question.split)
    check_images(question.family, problems, images, question.search.samples, question.seed)
    portion = _portion(question, images, problems[0], memory)
    parts = [problems[at : at + portion] for at in range(0, len(problems), portion)]
    found, seconds = [], 0.0
    for number, part in enumerate(parts, 1):
        what = "inverting triggers" + (f", part {number} of {len(parts)}" if parts[1:] else "")
        more, took = answers(
            subject, question, part, store, device=device, memory=memory, what=what
        )
        found += [replace(one, trigger={}) for one in more]
        del more  # with its triggers, before the next part has its own
        seconds += took
    return found, seconds


def _portion(question: Question, images: Images, problem: Problem, memory: float | None) -> int:
    """How many triggers may be held at once."""
    rows = rows_of(problem, images.y.cpu(), question.search.samples, question.seed)
    x = training.to_float(images.x[rows.to(images.x.device)].cpu())
    one = question.family.begin(x, stream(question.seed, "portion"))
    each = sum(value.nbytes for value in one.values())
    return max(1, int(min(_HELD, memory or _HELD) // each))


def class_distances(
    subject: Subject,
    question: Question,
    pairs: str,
    store: Store,
    *,
    baseline: Subject | None = None,
    device: str = "cpu",
    memory: float | None = None,
) -> dict[str, Any]:
    """What `arena distance` prints: JSON values, `null` where a pair has no distance.

    baseline: a model of the same data, measured alike, that the improvement is relative to.
    """
    classes = subject.data.num_classes
    chosen = measures.parse_pairs(pairs, classes, question.seed)
    problems = measures.problems_of(chosen, question.restarts)
    if baseline is not None and baseline.data.fingerprint != subject.data.fingerprint:
        raise BadInput(
            f"The baseline is of {baseline.data.name}, the model of {subject.data.name}; "
            "distances compare on one data set."
        )
    found, seconds = sizes(subject, question, problems, store, device=device, memory=memory)
    matrix = measures.distances(found, classes)
    family = question.family
    out: dict[str, Any] = {
        "model": subject.name,
        "weights": subject.digest,
        "method": short_spec(family),
        "unit": family.unit,
        "encoder": family.seen_by,
        "classes": list(subject.data.classes),
        "distances": _listed(matrix.size),
        "spread": _listed(matrix.spread),
        "asr": _listed(matrix.asr),
        "mean": matrix.mean,
        "start": _starts(subject, question, chosen),
        "also": _also(family, matrix.mean),
        "pairs": len(chosen),
        "unreached": [list(pair) for pair in matrix.unreached],
        "restarts": question.restarts,
        "samples": question.samples,
        "split": question.split,
        "steps": question.search.steps,
        "stall": question.search.stall,
        "passes": sum(one.steps for one in found),
        "asked_asr": question.search.asr,
        "seed": question.seed,
        "seconds": seconds,
    }
    if baseline is not None:
        old, more = sizes(baseline, question, problems, store, device=device, memory=memory)
        before = measures.distances(old, classes)
        out["baseline"] = {"model": baseline.name, "mean": before.mean, "seconds": more}
        out["improvement"] = measures.improvement(matrix.size, before.size)
    return out


@torch.no_grad()
def _starts(
    subject: Subject, question: Question, pairs: Sequence[tuple[int, int]]
) -> list[float | None] | None:
    """Sizes of what searches start from, on each victim class's images; None where images do not
    make a trigger's size.

    What changes whole images may do so before it has learned anything, as DECK's normalisation
    does, and distances hardly fall below that.
    """
    family, images = question.family, getattr(subject.data, question.split)
    if not family.sized_by_images:
        return None
    sizes: list[float | None] = [None] * subject.data.num_classes
    for victim, target in dict(pairs).items():
        rows = rows_of(Problem(victim, target), images.y.cpu(), question.samples, question.seed)
        x = images.x[rows.to(images.x.device)].cpu()
        start = family.begin(training.to_float(x), stream(question.seed, "start", victim))
        sizes[victim] = size_of(family, start, x)
    return sizes


RESCALED = (0.98, 0.96, 0.88, 0.8)  # PixelBackdoor, appendix I
ROTATED = (1, 2, 3, 4, 5)  # degrees


@dataclass(frozen=True, eq=False)
class Inverted:
    """A trigger and what it does to test images that it was not inverted on."""

    facts: dict[str, Any]  # JSON values
    trigger: dict[str, Tensor]  # its variables
    clean: Tensor  # (8, C, H, W) uint8: test images of the victim class
    stamped: Tensor  # (8, C, H, W) uint8: the same with the trigger
    y: Tensor  # (8,) int64: their classes
    answers: Tensor  # (8, 2) int64: the model's, to both


@torch.no_grad()
def inverted(
    subject: Subject,
    question: Question,
    victim: int | None,
    target: int,
    store: Store,
    *,
    prune_to: Sequence[int] = (),
    device: str = "cpu",
    memory: float | None = None,
) -> Inverted:
    """The smallest trigger of some restarts that sends `victim` (None: all) to `target`.

    prune_to: numbers of pixels, the largest changes of the trigger, to be left of it.
    Raises BadInput.
    """
    classes = subject.data.num_classes
    for label in (victim, target):
        if label is not None and not 0 <= label < classes:
            raise BadInput(f"There is no class {label}; classes are 0 to {classes - 1}.")
    pixels = math.prod(subject.data.shape[1:])
    for count in prune_to:
        if not 1 <= count <= pixels:
            raise BadInput(f"--prune-to must be 1 to {pixels} pixels, got {count}.")
    problems = [Problem(victim, target, restart) for restart in range(question.restarts)]
    own = _unseen(subject.data.test, question, problems[0])
    found, seconds = answers(subject, question, problems, store, device=device, memory=memory)
    smallest = measures.smallest(found)
    best = smallest or max(found, key=_success)
    family = question.family
    x = training.to_float(own.x)
    shown = _levels(torch.cat([stamped(family, best.trigger, part) for part in x.split(500)]))
    change = (shown - x).abs()
    model = subject.model.to(device)

    def success(images: Tensor) -> float:
        answers = training.logits(model, images).argmax(1).cpu()
        return float((answers == target).double().mean())

    facts: dict[str, Any] = {
        "model": subject.name,
        "weights": subject.digest,
        "method": short_spec(family),
        "victim": victim,
        "target": target,
        "reached": smallest is not None,
        "size": best.size,
        "unit": family.unit,
        "asr": best.asr,
        "test_asr": success(shown),
        "test_images": len(own),
        "clean_asr": success(x),
        "pixels": int((change >= 0.5 / 255).any(1).any(0).sum()),
        "largest_change": float(change.max()),
        "rescaled": {f"{share:g}": success(rescaled(shown, share)) for share in RESCALED},
        "rotated": {f"{degrees}": success(rotated(shown, degrees)) for degrees in ROTATED},
        "pruned": {f"{count}": success(pruned(x, shown, count)) for count in prune_to},
        "restarts": question.restarts,
        "samples": question.samples,
        "split": question.split,
        "steps": question.search.steps,
        "stall": question.search.stall,
        "asked_asr": question.search.asr,
        "seed": question.seed,
        "seconds": seconds,
    }
    few = slice(0, 8)
    both = torch.stack(
        [training.logits(model, images[few]).argmax(1).cpu() for images in (x, shown)], 1
    )
    plain, triggered = ((images[few] * 255).round().to(torch.uint8) for images in (x, shown))
    return Inverted(facts, dict(best.trigger), plain, triggered, own.y[few], both)


def _unseen(test: Images, question: Question, problem: Problem) -> Images:
    """The test images that a problem's trigger is tried on: none that it is searched on."""
    y, victim = test.y.cpu(), problem.victim
    others = y == victim if victim is not None else y != problem.target
    if question.split == "test":
        others[rows_of(problem, y, question.samples, question.seed)] = False
    if not others.any():
        raise BadInput(
            "No test image is left to try the trigger on that it is not searched on; lower "
            "--samples or use --split val."
        )
    return test.take(others.nonzero().flatten())


def _success(one: Found) -> float:
    return one.asr


def _levels(x: Tensor) -> Tensor:
    return (x * 255).round().div(255)


def pruned(x: Tensor, shown: Tensor, pixels: int) -> Tensor:
    """The trigger on its `pixels` largest changes alone: what is left of it at a given size.

    x, shown: (N, C, H, W) without and with the trigger. A pixel's change is the largest of its
    channels, averaged over the images.
    """
    change = (shown - x).abs().amax(1).mean(0).flatten()
    left = torch.zeros_like(change, dtype=torch.bool)
    left[change.argsort(descending=True, stable=True)[:pixels]] = True
    return torch.where(left.view(x.shape[2:]), shown, x)


def rescaled(x: Tensor, share: float) -> Tensor:
    """The middle of images (N, C, H, W), `share` of each side, enlarged to the whole."""
    return _moved(x, torch.tensor([[share, 0.0, 0.0], [0.0, share, 0.0]]))


def rotated(x: Tensor, degrees: float) -> Tensor:
    """Images (N, C, H, W) turned about their centre; corners get the nearest pixels' colours."""
    height, width = x.shape[2:]
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    return _moved(
        x, torch.tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
    )


def _moved(x: Tensor, how: Tensor) -> Tensor:
    grid = F.affine_grid(how[None].expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False).clamp(0, 1)


def _also(family: Family, mean: float | None) -> dict[str, Any] | None:
    if family.also is None or mean is None:
        return None
    unit, factor = family.also
    return {"unit": unit, "mean": factor * mean}


def _listed(matrix: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(v) else v for v in row] for row in matrix.tolist()]
