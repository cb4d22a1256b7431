"""`arena new`: one documented method file and one test that passes as it is."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from arena.core.registry import BadInput, attacks, defenses, nearest
from arena.store import write_atomically

KINDS = ("attack", "defense", "scanner", "detector")

_HEAD = {
    "attack": "a white square in a corner sends every image that carries it to the target class",
    "defense": "all weights are trained on the clean set for a few epochs",
    "scanner": "one class that is the answer to most noise betrays a trigger",
    "detector": "how sure the model is of its answer, since triggers make models too sure",
}

_DOC = '''"""{title}: {what}.

Source: who invented it, year, venue, arXiv number, section; the official code if you read it.
Departs: every deliberate difference from the source, and why.
"""

from __future__ import annotations

'''

_BODY = {
    "attack": '''from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from arena.core.contracts import Images, Poisoned, Trigger
from arena.core.poisoning import check_classes, check_rate, dirty_label
from arena.core.registry import BadInput, method, param


@method
class {cls}:
    """Fields are hyper-parameters: type, default, meaning with unit, range."""

    threat: ClassVar[str] = "poisons data"  # these are read without running the file: literals only
    labels: ClassVar[str] = "changed"
    trigger_kind: ClassVar[str] = "static"

    target: int = param(0, "class that the trigger forces", low=0)
    rate: float = param(0.1, "poisoned share of the training set", above=0, high=1)
    size: int = param(4, "side of the square, in px", low=1)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        """Refuse what cannot work, before anything is trained; counts: images per class."""
        check_classes(self, counts)
        check_rate(self, counts)
        if self.size > min(shape[1:]):
            raise BadInput(f"{name}: size {self.size} is larger than images of {shape}.")

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        """Whatever is random about the trigger is drawn here, from `rng` alone."""
        return Trigger(Square(self.size))

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        return dirty_label(train, trigger, self.target, self.rate, rng)


@dataclass(frozen=True)
class Square:
    """(N, C, H, W) float32 in [0, 1] -> the same, with the square; a pure function."""

    size: int

    def __call__(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, -self.size :, -self.size :] = 1.0
        return x
''',
    "defense": '''from copy import deepcopy

from torch import Generator

from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.registry import method, param
from arena.core.training import check_clean, finetuning, fit


@method
class {cls}:
    """Fields are hyper-parameters: type, default, meaning with unit, range."""

    epochs: int = param(5, "passes over the clean set", low=0, under={"smoke": 1})
    lr: float = param(0.01, "first learning rate", above=0)

    def check(self, model: Classifier, clean: Images) -> None:
        """Refuse what cannot work, before anything is computed."""
        check_clean(clean, model)

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        """A repaired copy; the argument stays as it was, and plain weights carry everything."""
        self.check(model, clean)
        model = deepcopy(model)
        plan = finetuning(
            epochs=self.epochs,
            lr=self.lr,
            decay_every=2,
            batch=32,
            momentum=0.9,
            weight_decay=1e-4,
            crop=0,
            cutout=0,
        )
        fit(model, clean, plan, rng, what="{name}")
        return model
''',
    "scanner": '''import torch
from torch import Generator

from arena.core.contracts import Images, Verdict
from arena.core.models import Classifier
from arena.core.registry import method, param


@method
class {cls}:
    """Fields are hyper-parameters: type, default, meaning with unit, range."""

    images: int = param(200, "noise images that are shown", low=1)
    threshold: float = param(0.5, "a higher score calls the model backdoored", low=0, high=1)

    @torch.no_grad()
    def scan(self, model: Classifier, clean: Images, rng: Generator) -> Verdict:
        """Higher score: more likely backdoored; target: the class blamed, None: a clean model."""
        model.eval()
        shape = (self.images, *clean.x.shape[1:])
        noise = torch.rand(shape, generator=rng).to(next(model.parameters()).device)
        answers = model(noise)
        shares = answers.argmax(1).bincount(minlength=answers.shape[1]).float().cpu() / self.images
        score = float(shares.max())
        target = int(shares.argmax()) if score > self.threshold else None
        return Verdict(score, target, shares)
''',
    "detector": '''import torch
from torch import Generator, Tensor

from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.registry import method, param


@method
class {cls}:
    """Fields are hyper-parameters: type, default, meaning with unit, range."""

    batch: int = param(256, "images per pass", low=1)

    @torch.no_grad()
    def score(self, model: Classifier, x: Tensor, clean: Images, rng: Generator) -> Tensor:
        """(N,) suspicion of the uint8 images x (N, C, H, W); higher: more likely stamped."""
        model.eval()
        device = next(model.parameters()).device
        parts = [model(part.to(device).float() / 255).softmax(1) for part in x.split(self.batch)]
        return torch.cat([part.amax(1).cpu() for part in parts])
''',
}

_TEST_HEAD = '''"""What {name} promises, on a small network with random weights."""

from pathlib import Path

import torch

from arena.core import models
from arena.core.contracts import Images
from arena.core.registry import {registry}, strangers_imported
from arena.core.seeding import stream

FILE = Path(__file__).{where}


def built(fields: str = "") -> object:
    """The method, imported in this process."""
    described = {registry}.add_file(FILE)
    with strangers_imported():
        return {registry}.build(described.name + fields, "smoke")


def images(n: int = 80) -> Images:
    rng = stream(0, "images")
    x = torch.randint(0, 256, (n, 3, 32, 32), generator=rng, dtype=torch.uint8)
    return Images(x, torch.arange(n) % 4)


'''

_TESTS = {
    "attack": """def test_it_poisons_what_it_says_and_stamps_repeatably() -> None:
    attack, train = built(), images()
    before = train.x.clone()
    attack.check((3, 32, 32), [20] * 4)  # type: ignore[attr-defined]
    trigger = attack.prepare(train, stream(0, "prepare"))  # type: ignore[attr-defined]
    poisoned = attack.poison(train, trigger, stream(0, "poison"))  # type: ignore[attr-defined]
    assert train.x.equal(before), "the training images were changed"
    assert len(poisoned.rows) == 8
    assert (poisoned.data.y[poisoned.rows] == 0).all()
    batch = train.x.float() / 255
    assert trigger.stamp(batch).equal(trigger.stamp(batch))
    assert not trigger.stamp(batch).equal(batch)


def test_it_says_what_it_needs() -> None:
    model = models.build("cnn", 4, (3, 32, 32), stream(0, "model"))
    assert model(images().x[:2].float() / 255).shape == (2, 4)
    assert attacks.describe(FILE.stem).source
""",
    "defense": """def test_repair_leaves_its_argument_and_draws_from_its_seed() -> None:
    defense, clean = built(), images()
    model = models.build("cnn", 4, (3, 32, 32), stream(0, "model")).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = defense.repair(model, clean, stream(0, "r"))  # type: ignore[attr-defined]
    two = defense.repair(model, clean, stream(0, "r"))  # type: ignore[attr-defined]
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    weights = one.state_dict()
    assert all(value.equal(weights[name]) for name, value in two.state_dict().items())
    assert any(not value.equal(before[name]) for name, value in weights.items())
""",
    "scanner": """def test_scan_gives_the_same_verdict_for_the_same_seed() -> None:
    scanner, clean = built(), images()
    model = models.build("cnn", 4, (3, 32, 32), stream(0, "model")).eval()
    one = scanner.scan(model, clean, stream(0, "s"))  # type: ignore[attr-defined]
    two = scanner.scan(model, clean, stream(0, "s"))  # type: ignore[attr-defined]
    assert one.score == two.score
    assert 0 <= one.score <= 1
    assert one.target is None or 0 <= one.target < 4
""",
    "detector": """def test_each_image_gets_a_number() -> None:
    detector, clean = built(), images()
    model = models.build("cnn", 4, (3, 32, 32), stream(0, "model")).eval()
    one = detector.score(model, clean.x, clean, stream(0, "d"))  # type: ignore[attr-defined]
    two = detector.score(model, clean.x, clean, stream(0, "d"))  # type: ignore[attr-defined]
    assert one.shape == (80,)
    assert one.equal(two)
    assert one.isfinite().all()
""",
}

_PYPROJECT = """[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "{package}"
version = "0.1.0"
description = "{title}: {what}"
requires-python = ">=3.11"
dependencies = ["backdoor-arena"]

[project.entry-points."arena.{group}"]
{name} = "{module}.{name}"

[tool.setuptools]
packages = ["{module}"]
"""


def new(kind: str, name: str, to: Path, *, package: bool = False) -> list[Path]:
    """Write a method of that kind and its test; returns the files. Raises BadInput."""
    if kind not in KINDS:
        raise BadInput(f"There is no kind {kind!r} of method; {nearest(kind, KINDS)}.")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name) or keyword.iskeyword(name):
        raise BadInput(
            f"{name!r} is no name for a method: a small letter, then small letters, digits and "
            "'_', 40 at most."
        )
    registry = attacks if kind == "attack" else defenses
    if name in (known := registry.names()):
        raise BadInput(
            f"There is {_a(registry.kind)} {name!r} already; choose a name that `arena list "
            f"{registry.kind}s` does not show (it has {len(known)})."
        )
    words = {
        "name": name,
        "cls": "".join(part.capitalize() for part in name.split("_")),
        "title": name.replace("_", " ").capitalize(),
        "what": _HEAD[kind],
        "registry": f"{registry.kind}s",
        "group": f"{registry.kind}s",
        "module": f"arena_{name}",
        "package": f"arena-{name.replace('_', '-')}",
        "where": f'with_name("{name}.py")',
    }
    files = {f"{name}.py": _DOC + _BODY[kind], f"test_{name}.py": _TEST_HEAD + _TESTS[kind]}
    if package:
        module, root = words["module"], words["package"]
        words["where"] = f'parents[1] / "{module}" / "{name}.py"'
        files = {
            f"{root}/pyproject.toml": _PYPROJECT,
            f"{root}/{module}/__init__.py": '"""{title}, a method for Backdoor Arena."""\n',
            f"{root}/{module}/{name}.py": files[f"{name}.py"],
            f"{root}/tests/test_{name}.py": files[f"test_{name}.py"],
        }
    written = {to / path: _filled(text, words) for path, text in files.items()}
    for path in written:
        if path.exists():
            raise BadInput(f"{str(path)!r} exists and is left as it is; name another folder.")
    try:
        for path, text in written.items():
            write_atomically(path, text)
    except OSError as error:
        if type(error).__name__ == "DiskFull":
            raise
        raise BadInput(f"{str(to)!r} cannot be written ({error.strerror}).") from error
    return list(written)


def _filled(text: str, words: dict[str, str]) -> str:
    for key, value in words.items():
        text = text.replace(f"{{{key}}}", value)
    return text


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"
