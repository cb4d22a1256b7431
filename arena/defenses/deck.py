"""DECK: hardening against pervasive backdoors, with triggers made in an encoder's feature space.

As MOTH, pair by promising pair and in both directions at once; but what is inverted for each batch
are transformations of features, region by region, decoded back to images.

Source: Tao et al., Model hardening against pervasive backdoors, section IV: generation as in the
    inversion `deck`, training "similar to MOTH". Table X is its ablation: decoder=swwae, nearest or
    zero, and content, ssim, smooth or norm at 0.
Departs: no code is published, and the paper gives neither passes nor rates of the training: those
    of MOTH, but the weight of the quality losses stays where searches go on, since 200 times as
    much would leave no trigger. Batches, their holes and the accuracy bound as in `moth` here.
"""

from __future__ import annotations

from torch import Generator

from arena.core import hardening
from arena.core.contracts import Images
from arena.core.inversion.engine import Family
from arena.core.inversion.families import families
from arena.core.models import Classifier
from arena.core.registry import method, param


@method
class Deck:
    decoder: str = param(
        "random",
        "what the decoder's upsampling fills cells with: noise, zeros or the value itself; swwae: "
        "back to where the maximum was",
        choices=("random", "zero", "nearest", "swwae"),
        source="DECK, table X",
    )
    content: float = param(
        0.001, "weight of the features' squared error", low=0, source="DECK; 0: its ablation"
    )
    ssim: float = param(
        100.0, "weight of what structural similarity lacks of 1", low=0, source="DECK"
    )
    smooth: float = param(
        0.05, "weight of the squared distance to the 3 x 3 average", low=0, source="DECK"
    )
    norm: float = param(
        1.0, "weight of what mean and deviation are off the images'", low=0, source="DECK"
    )
    updates: int = param(
        800,
        "batches trained on, the warm-up's one per class included",
        low=1,
        source="MOTH",
        under={"fast": 240, "smoke": 3},
    )
    batch: int = param(
        128, "images per update; a smaller set lowers it", low=2, source="MOTH's code"
    )
    lr: float = param(1e-3, "learning rate", above=0, source="MOTH's code", under={"fast": 6e-3})
    schedule: str = param(
        "constant", "how the rate goes: constant; linear, down to nothing",
        choices=("constant", "linear"), under={"fast": "linear"},
    )  # fmt: skip
    cutout: int | None = param(
        None,
        "side of the black square cut into every image, in pixels; 0 cuts nothing, none stands for "
        "9 where fewer than 10,000 images are given and for 0 where more are",
        low=0,
        source="9: as finetune; 0: paper, which cuts nothing",
    )
    max_drop: float = param(
        0.05,
        "accuracy on held-out clean images that triggers may cost beyond training without them",
        low=0,
        high=1,
    )
    symmetric: bool = param(True, "both directions of a pair at once", source="MOTH")
    epsilon: float = param(
        0.3, "probability that a pair is drawn at random", low=0, high=1, source="MOTH"
    )
    first: int = param(
        200,
        "passes of a round's first inversion",
        low=1,
        source="MOTH's code",
        under={"fast": 60, "smoke": 2},
    )
    more: int = param(
        40,
        "passes of those that go on from it",
        low=1,
        source="MOTH's code",
        under={"fast": 20, "smoke": 1},
    )
    warm_passes: int = param(
        300,
        "passes of the warm-up's inversions",
        low=1,
        source="DECK",
        under={"fast": 100, "smoke": 2},
    )
    asr: float = param(0.9, "success that a trigger must have", above=0, high=1, source="DECK")
    portion: float = param(
        0.1, "share of a class's images in a batch that are stamped", above=0, high=1,
        source="MOTH's code", under={"fast": 0.5},
    )  # fmt: skip

    @property
    def wraps(self) -> dict[str, Family]:
        """Whose code counts for what comes out."""
        spec = (
            f"deck:decoder={self.decoder},content={self.content!r},ssim={self.ssim!r},"
            f"smooth={self.smooth!r},norm={self.norm!r}"
        )
        return {"trigger": families.build(spec)}

    def check(self, model: Classifier, clean: Images) -> None:
        hardening.check(model, clean, "deck")
        self.wraps["trigger"].check(model.spec.shape)

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        self.check(model, clean)
        family = self.wraps["trigger"]
        pace = hardening.Pace(
            first=self.first, more=self.more, asr=self.asr, portion=self.portion, rise=1.0
        )
        scheduler = hardening.Scheduler(model.spec.classes, self.epsilon)
        course = hardening.Course(
            self.updates, self.max_drop, self.batch, self.lr, self.schedule, cutout=self.cutout
        )
        return hardening.by_pairs(
            model, clean, rng, family, pace, scheduler, course,
            symmetric=self.symmetric, warm_passes=self.warm_passes,
        )  # fmt: skip
