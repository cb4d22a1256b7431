"""PGD: the share of test images that keep their class under an attack on each of them.

Every image is changed by at most eps, starting at random, so that the model's loss rises most; the
attacker knows the repaired model. This tells a defense that makes a model robust from one that only
removes a backdoor, and one that pays with robustness.

Source: Madry et al. 2018, https://arxiv.org/abs/1706.06083: untargeted, L-inf, cross-entropy;
    steps of 2.5 eps / steps reach the border from anywhere inside and leave room to move along it.
    Bounds: DECK, appendix III-C, for CIFAR-10, SVHN, GTSRB and LISA.
Departs: test images, not validation images. The DECK group's steps on CIFAR-10 are twice as long:
    step=2.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from arena.core.adversarial import robust_accuracy
from arena.core.contracts import Images
from arena.core.measures import Reading
from arena.core.models import Classifier
from arena.core.progress import report
from arena.core.registry import method, param
from arena.core.seeding import stream
from arena.core.training import Checkpoint

_BATCH_PIXELS = 500 * 32 * 32  # bounds the memory for large images


@method
class PGD:
    eps: float = param(
        8.0,
        "L-inf radius in 1/255",
        above=0,
        high=255,
        source="DECK: 8 for CIFAR-10; 0.03 of the range, 7.65, for SVHN and GTSRB; 0.1, 25.5, for "
        "LISA",
    )
    steps: int = param(20, "steps per image", low=1, source="DECK group on CIFAR-10")
    step: float | None = param(
        None, "their length in 1/255; none: 2.5 eps / steps", above=0, source="Madry et al."
    )
    images: int = param(
        1000, "test images, evenly spaced over the set; fewer where it has no more", low=1
    )

    @property
    def name(self) -> str:
        step = "" if self.step is None else f", steps of {self.step:g}/255"
        return f"PGD-{self.steps} {self.eps:g}/255{step}"

    def check(self, val: Images, test: Images, classes: int, seed: int) -> None:
        """Any images will do."""

    def passes(self, classes: int) -> float:
        return self.images * (3.0 * self.steps + 1)

    def measure(
        self,
        model: Classifier,
        val: Images,
        test: Images,
        seed: int,
        checkpoint: Checkpoint | None = None,
    ) -> Reading:
        count = min(self.images, len(test))
        rows = torch.arange(count) * len(test) // count  # some sets are sorted by class
        step = 2.5 * self.eps / self.steps if self.step is None else self.step
        batch = max(1, min(500, _BATCH_PIXELS // math.prod(test.x.shape[2:])))
        rng = stream(seed, "pgd")
        right = 0
        for part in rows.split(batch):
            share = robust_accuracy(
                model, test.take(part),
                eps=self.eps / 255, step=step / 255, steps=self.steps, rng=rng, batch=batch,
            )  # fmt: skip
            right += round(share * len(part))
            report("PGD", int(part[-1]) + 1, len(test))
        return Reading({"robust_acc": right / count, "images": count}, [])

    def compare(self, before: Reading, after: Reading) -> dict[str, Any]:
        return {
            "robust_acc": after.figures["robust_acc"],
            "robust_acc_before": before.figures["robust_acc"],
            "robust_against": self.name,
        }
