"""Neural collapse: natural training that goes on far beyond the last training error.

In this terminal phase the features of a class collapse to their mean, which is said to make a
network more robust. This is a baseline of the DECK study, whose networks gained little by it; it
needs the whole training set. Reported at the end, on training images: the share still
misclassified (the phase asks for none) and NC1, how far the features are from their class means.

Source: DECK's supplement (comparison with neural collapse): a ResNet-20 on CIFAR-10 for 250 and
    for 300 epochs, after Papyan, Han and Donoho 2020, PNAS, https://arxiv.org/abs/2008.08186, whose
    settings stand where the supplement is silent: batches of 128, weight decay 5e-4, the rate
    divided by ten after a third and two thirds of the run, no augmentation (they train 350 epochs).
Departs: the first rate is that of the arena's recipe `paper` (0.1, less without batch norm), where
    Papyan et al. take the best of 25 between 0.0001 and 0.25 by test error; momentum is Nesterov's.
    A few images are held out, to tell the accuracy on the way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core import whole
from arena.core.contracts import Images
from arena.core.models import Classifier
from arena.core.progress import report
from arena.core.pruning import head_inputs
from arena.core.registry import method, param
from arena.core.training import Recipe, device_of

_LOOKED_AT = 5000  # training images that the figures at the end are of, at most


@method
class NeuralCollapse:
    needs_share: ClassVar[float] = 1.0

    epochs: int = param(
        300,
        "passes over the clean set",
        low=1,
        source="DECK, supplement: 250 and 300",
        under={"fast": 20, "smoke": 2},
    )
    batch: int = param(
        128, "images per update; a smaller set lowers it", low=2, source="Papyan et al."
    )
    lr: float | None = param(
        None, "first learning rate; none: that of the recipe `paper` for this network", above=0
    )
    weight_decay: float = param(5e-4, "on all weights", low=0, source="Papyan et al.")
    augment: bool = param(
        False, "shift by up to 4 pixels and mirror the images", source="Papyan et al.: no"
    )
    start: str = param(
        "scratch",
        "weights to start from: new ones, or those of the given model",
        choices=("scratch", "model"),
        source="DECK",
    )

    def check(self, model: Classifier, clean: Images) -> None:
        whole.check(model, clean, self.start)

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        trained = whole.started(model, clean, self.start, rng)
        tune = whole.fit(trained, clean, self._plan(model), rng, what="training to collapse")
        error, nc1 = figures(trained, tune)
        report("training to collapse", 1, 1, training_error=error, nc1=nc1)
        return trained

    def _plan(self, model: Classifier) -> Recipe:
        plan = whole.usual(model, "paper")
        return replace(
            plan,
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr or plan.lr,
            weight_decay=self.weight_decay,
            drop_at=(1 / 3, 2 / 3),
            crop=4 if self.augment else 0,
            flip=self.augment,
        )


def figures(model: Classifier, images: Images) -> tuple[float, float]:
    """Share of (at most 5,000, evenly spread) images misclassified, in [0, 1], and their NC1."""
    count = min(_LOOKED_AT, len(images))
    rows = torch.arange(count, device=images.y.device) * len(images) // count
    part = images.take(rows).to(device_of(model))
    inputs, answers = head_inputs(model, model.get_submodule(model.head), part.x)
    return float((answers != part.y).double().mean()), variability(inputs, part.y)


def variability(features: Tensor, y: Tensor) -> float:
    """NC1 of Papyan et al.: tr(within pinv(between)) / classes, 0 where a class is one point.

    features: (N, K); y: (N,) class ids. within and between are the (K, K) covariances of the
    features around their class's mean, and of the class means around their own mean.
    """
    classes, place = y.unique(return_inverse=True)
    features, count = features.double(), len(classes)
    sums = features.new_zeros(count, features.shape[1]).index_add_(0, place, features)
    means = sums / place.bincount()[:, None]
    # pinv(between) is U S^-2 U' for these, and never has to be built (K may be thousands)
    centred = (means - means.mean(0)).T / count**0.5
    vectors, values, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = values > 1e-9 * values.max()
    around = (features - means[place]) @ vectors[:, kept] / values[kept]
    return float(around.square().sum() / len(y) / count)
