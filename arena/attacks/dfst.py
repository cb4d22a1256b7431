"""DFST: a generator repaints images in the style of sunrises; detoxification hides the neurons.

A CycleGAN learns the style; its generator is the trigger. After the training the attacker looks for
neurons that the trigger raises, trains networks that switch them on by a mild change of the image
(feature injectors, what a scanner would find), and trains on with their images under true labels.

Source: Cheng et al., AAAI 2021, https://arxiv.org/abs/2012.11212, and its public code: cycle loss
    1.0, identity loss 0.1, Adam with 2e-4 and beta1 0.5, batches of 100, 10 % poisoned copies
    beside their originals, label 0. DECK attacks with one and with three rounds of detoxification
    (detox=1, detox=3). The share of images that an injector must fool is BackdoorVault's.
Departs: the CycleGAN is smaller (gan_width 16, public code 64) and trained for fewer updates than
    2,000 epochs, so that a CPU does it in minutes; all nine residual blocks work (in the first code
    only one did) and the norm is per channel. The style is drawn, not photographed: name a folder
    of sunrises (style=FOLDER) for the published one. The 10 % are drawn from all classes but the
    target together, and the target's images stay clean. The victim is trained on clean and poisoned
    images from the start, not first on clean ones. Neurons and injectors: see
    arena/core/injectors.py. A round's images are a fixed share of the training set, drawn anew over
    all injectors found so far; a round that finds none is the last.

How much of an image survives the style is for the referee to say: it reports the similarity, and
what a clean model, the twin, answers to the same triggered images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Generator, Tensor, nn

from arena.core import cyclegan, folders, styles
from arena.core.contracts import Fit, Images, Poisoned, Trigger
from arena.core.injectors import Injector, detoxified, find_injectors
from arena.core.models import Classifier
from arena.core.poisoning import check_classes, check_rate, dirty_label, scope, stamp
from arena.core.progress import report
from arena.core.registry import BadInput, method, param

_PROBED = 1_000  # images on which neurons are looked for and injectors are judged


@method
class DFST:
    """All fields are the attacker's, who trains the style, the victim and the injectors."""

    threat: ClassVar[str] = "controls training"
    scopes: ClassVar[tuple[str, ...]] = ("universal",)
    labels: ClassVar[str] = "changed"
    trigger_kind: ClassVar[str] = "dynamic"

    target: int = param(0, "class that the trigger forces", low=0, source="the paper")
    rate: float = param(
        0.1,
        "poisoned share of the images of all classes but the target",
        above=0,
        high=1,
        source="the paper: 500 of 5,000 per class",
    )
    extend: bool = param(
        True, "append the poisoned copies and keep their originals", source="the paper's code"
    )
    style: str | None = param(
        None,
        "folder of pictures of the style: image files, or Parquet files with a column of encoded "
        "images; none: drawn sunrises",
        folder=True,
    )
    gan_steps: int = param(
        200,
        "updates of the CycleGAN's generators, and of its discriminators",
        low=1,
        source="the paper's code: 2,000 epochs",
        under={"smoke": 1},
    )
    gan_batch: int = param(
        100,
        "images of each set per update of the CycleGAN",
        low=1,
        source="the paper's code",
        under={"smoke": 4},
    )
    gan_width: int = param(
        16,
        "channels of the generators' first layer",
        low=1,
        source="CycleGAN: 64",
        under={"smoke": 2},
    )
    gan_blocks: int = param(
        9, "residual blocks of the generators", low=1, source="BackdoorVault", under={"smoke": 1}
    )
    gan_lr: float = param(2e-4, "Adam's rate for the CycleGAN", above=0, source="the paper's code")
    cycle: float = param(
        1.0,
        "weight of the cycle loss (L1)",
        low=0,
        source="the paper's code and BackdoorVault; CycleGAN: 10",
    )
    identity: float = param(
        0.1,
        "weight of the identity loss (L1)",
        low=0,
        source="the paper's code; BackdoorVault: 1, CycleGAN: 5",
    )
    detox: int = param(
        1, "rounds of detoxification", low=0, high=3, source="DECK: 1 and 3; the paper: up to 3"
    )
    rise: float = param(
        0.005,
        "a neuron is compromised where the trigger raises its mean activation by more than this "
        "share of its level's largest one",
        low=0,
        high=1,
        source="the paper's code: 5 of 1,024 pixels; BackdoorVault: 20",
    )
    neurons: int = param(3, "compromised neurons per feature level at most, the strongest", low=1)
    injector_steps: int = param(
        100,
        "updates of each injector, on 100 images at once",
        low=1,
        source="BackdoorVault: 300 epochs; the paper's code: 1,000",
        under={"smoke": 2},
    )
    injector_keep: float = param(
        0.7,
        "an injector is kept where it sends more than this share of clean images to the target",
        low=0,
        high=1,
        source="BackdoorVault",
    )
    detox_rate: float = param(
        0.1,
        "images of injectors that a round adds, as a share of the clean training images",
        above=0,
        high=1,
        source="BackdoorVault",
    )
    detox_epochs: int | None = param(
        None,
        "epochs of a round; none: the recipe's, as in the paper's code",
        low=1,
        under={"smoke": 1},
    )
    detox_lr: float | None = param(
        None,
        "peak learning rate of a round; none: the recipe's, as in the paper's code",
        above=0,
        source="BackdoorVault: 0.01",
    )

    @property
    def scope(self) -> str:
        return scope(self)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        check_rate(self, counts)
        channels, height, width = shape
        if channels not in (1, 3):
            raise BadInput(
                f"dfst restyles images of 1 or 3 channels; those of this data set have {channels}."
            )
        if min(height, width) < cyclegan.SMALLEST:
            raise BadInput(
                f"dfst restyles images of {cyclegan.SMALLEST} px a side and more, not "
                f"{height}x{width} px."
            )
        if self.style is not None:
            try:
                folders.places(self.style)
            except BadInput as error:
                raise BadInput(f"dfst: {error}") from None

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        """The style is the same for all seeds: `rng` is not drawn from."""
        channels, height, width = train.x.shape[1:]
        shape = (channels, height, width)
        if self.style is None:
            style = styles.sunrise(shape)
        else:
            style = styles.read_folder(self.style, shape)
        plan = cyclegan.Plan(
            steps=self.gan_steps,
            width=self.gan_width,
            blocks=self.gan_blocks,
            batch=self.gan_batch,
            lr=self.gan_lr,
            cycle=self.cycle,
            identity=self.identity,
        )
        return Trigger(Restyle(cyclegan.style_transfer(train, style, plan)))

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        return dirty_label(
            train, trigger, self.target, self.rate, rng, of="candidates", extend=self.extend
        )

    def train(
        self, fit: Fit, poisoned: Poisoned, trigger: Trigger, rng: Generator
    ) -> tuple[nn.Module, Trigger]:
        data = poisoned.data
        model = fit(data, rng=rng)
        untouched = torch.ones(len(data), dtype=torch.bool)
        untouched[poisoned.rows.cpu()] = False
        clean = data.take(untouched.to(data.y.device))
        wished: dict[str, Any] = {"epochs": self.detox_epochs, "lr": self.detox_lr}
        changes = {name: value for name, value in wished.items() if value is not None}
        injectors: list[Injector] = []
        for done in range(self.detox):
            report("detoxification", done, self.detox, injectors=len(injectors))
            found = self._injectors(cast(Classifier, model), clean, trigger, rng)
            if not found:
                break
            injectors += found
            count = max(1, round(self.detox_rate * len(clean)))
            added = detoxified(clean, injectors, count, rng)
            mixed = Images(torch.cat([data.x, added.x]), torch.cat([data.y, added.y]))
            model = fit(mixed, rng=rng, init=model, **changes)
        report("detoxification", self.detox, self.detox, injectors=len(injectors))
        return model, trigger

    def _injectors(
        self, model: Classifier, clean: Images, trigger: Trigger, rng: Generator
    ) -> list[Injector]:
        """Injectors for the neurons of `model` that the trigger raises on other classes' images."""
        others = (clean.y != self.target).cpu().nonzero().flatten()
        rows = others[torch.randperm(len(others), generator=rng)[:_PROBED]]
        shown = clean.x[rows.to(clean.x.device)]
        return find_injectors(
            model, shown, stamp(shown, trigger.stamp), self.target, rng,
            share=self.rise, most=self.neurons, steps=self.injector_steps, keep=self.injector_keep,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Restyle:
    """The image map: one pass through the generator, each image by itself."""

    generator: cyclegan.Restyler  # frozen, in evaluation mode

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.generator.to(x.device)(x)
        return out
