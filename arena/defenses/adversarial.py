"""Adversarial training: the network is trained on the worst images near each training image.

Every batch is replaced by PGD examples of the network as it is by then: a few steps up the slope of
the cross-entropy, each image changed by at most eps per pixel, from a random start. This makes the
adversarially trained networks of the MOTH and DECK studies; it needs the whole training set.

Source: Madry et al. 2018, ICLR, https://arxiv.org/abs/1706.06083: L-inf, 7 steps of 2/255 within
    8/255 on CIFAR-10; the other bounds are those of MOTH (appendix X) and DECK (appendix III-C).
Departs: the weights are trained by a recipe of the arena, without label smoothing, on all images
    but a few that tell the accuracy on the way; `paper` has Madry et al.'s batch, rates and drops
    (200 epochs, they 80,000 updates) but Nesterov momentum and 2.5 times their weight decay.
    Networks with a fixed whitening (fastnet) learn to fool the examples instead of resisting;
    fastnet_robust, fastnet_robust_small and the ResNets do not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Generator

from arena.core import whole
from arena.core.adversarial import pgd
from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.registry import method, param


@method
class AdversarialTraining:
    needs_share: ClassVar[float] = 1.0

    eps: float = param(
        8.0,
        "L-inf radius in 1/255",
        above=0,
        high=255,
        source="MOTH, DECK: 8 on CIFAR-10; 0.03 of the range, 7.65, on SVHN and GTSRB; 0.1, 25.5, "
        "on LISA",
    )
    step: float = param(
        2.0,
        "length of a step in 1/255",
        above=0,
        high=255,
        source="Madry et al.; the DECK group takes 0.005 of the range, 1.275, on SVHN and GTSRB, "
        "0.02, 5.1, on LISA",
    )
    steps: int = param(
        7,
        "steps per image",
        low=1,
        source="Madry et al.; the DECK group takes 8 on other data",
        under={"smoke": 1},
    )
    start: str = param(
        "scratch",
        "weights to start from: new ones, or those of the given model",
        choices=("scratch", "model"),
        source="Madry et al.",
    )
    recipe: str = param(
        "paper",
        "recipe of the training, with the network's own settings",
        choices=("smoke", "fast", "paper"),
        under={"fast": "fast", "smoke": "smoke"},
    )
    epochs: int | None = param(
        None, "passes over the clean set; none: the recipe's", low=1, under={"smoke": 1}
    )
    lr: float | None = param(None, "peak learning rate; none: the recipe's", above=0)

    def check(self, model: Classifier, clean: Images) -> None:
        whole.check(model, clean, self.start)

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        trained = whole.started(model, clean, self.start, rng)
        plan = whole.planned(model, self.recipe, self.epochs, self.lr)

        def worst(batch: Images, draws: Generator) -> Images:
            # with the batch statistics of training, as in the pass that follows (and in the
            # paper's code): at high rates the running ones lag behind
            x = pgd(
                trained, batch.x, batch.y,
                norm="linf", eps=self.eps / 255, step=self.step / 255, steps=self.steps,
                rng=draws, evaluate=False,
            )  # fmt: skip
            return replace(batch, x=x)

        whole.fit(trained, clean, plan, rng, on_batch=worst, what="adversarial training")
        return trained
