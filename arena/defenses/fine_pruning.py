"""Fine-pruning: silence the channels that clean images leave quiet, then fine-tune.

Backdoors tend to use channels that clean images do not need. The channels of the deep level are
silenced one by one, least active first, until the accuracy on held-out clean images has fallen by
more than `max_drop`; the last one is given back, and the rest stay silent while the model is tuned.

Source: Liu et al. 2018, RAID, arXiv 1805.12185.
Departs: a part of `clean` is held out to decide the stop, where the paper uses all of its
    validation set for everything; fine-tuning follows NAD's recipe at a tenth of its rate, since
    the paper gives none for these networks. A silent channel is masked behind the last ReLU,
    residual path and all, and the mask ends up in the weights of the layer that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from itertools import takewhile

import torch
from torch import Generator, Tensor

from arena.core.contracts import Images
from arena.core.features import fold_mask, masked, mean_activation
from arena.core.models import Classifier
from arena.core.pruning import silencings
from arena.core.registry import method, param
from arena.core.training import check_clean, check_held_out, finetuning, fit, split


@method
class FinePruning:
    max_drop: float = param(
        0.04, "accuracy that pruning may cost on the held-out images", low=0, high=1, source="paper"
    )
    held_out: float = param(
        0.5, "share of the clean images that only decides the stop", low=0.01, high=0.99
    )
    epochs: int = param(10, "passes of the fine-tuning over the other clean images", low=0)
    lr: float = param(0.01, "first learning rate", above=0, source="BackdoorBench")
    decay_every: int = param(
        2, "epochs after which the rate is divided by ten", low=1, source="NAD"
    )
    batch: int = param(64, "images per update; a smaller set lowers it", low=2, source="NAD")
    crop: int = param(4, "random shift, in pixels; 0: none", low=0, source="NAD")
    cutout: int = param(
        9, "side of the black square in every image, in pixels; 0: none", low=0, source="NAD"
    )
    weight_decay: float = param(1e-4, "on all weights", low=0, source="NAD")
    momentum: float = param(0.9, "Nesterov", low=0, high=0.999, source="NAD")

    def check(self, model: Classifier, clean: Images) -> None:
        check_clean(clean, model)
        check_held_out(clean, self.held_out, "fine_pruning")

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        self.check(model, clean)
        held, tune = split(clean, self.held_out, rng)
        model = deepcopy(model).eval()
        activity = mean_activation(model, tune)
        order = activity.argsort(stable=True)[:-1]  # one channel stays
        accuracies = _accuracies(model, held, order)
        floor = next(accuracies) - self.max_drop - 1e-9  # the drop itself is within the limit
        kept = sum(1 for _ in takewhile(lambda share: share >= floor, accuracies))
        mask = torch.ones_like(activity)
        mask[order[:kept]] = 0
        plan = finetuning(
            epochs=self.epochs,
            lr=self.lr,
            decay_every=self.decay_every,
            batch=self.batch,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            crop=self.crop,
            cutout=self.cutout,
        )
        with masked(model, mask):
            fit(model, tune, plan, rng, what="fine-tuning")
        fold_mask(model, mask)
        return model


def _accuracies(model: Classifier, held: Images, order: Tensor) -> Iterator[float]:
    """Accuracy on `held` with none, the first, the first two … channels of `order` silenced."""
    y = held.y.to(order.device)
    for answers in silencings(model, held.x, order, len(order) + 1):
        yield float((answers == y).double().mean())
