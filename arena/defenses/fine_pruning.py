"""Fine-pruning: silence the channels that clean images leave quiet, then fine-tune.

Backdoors tend to use channels that clean images do not need. The channels of the deep level are
silenced one by one, least active first, until the accuracy on held-out clean images has fallen by
more than `max_drop`; the last one is given back, and the rest stay silent while the model is tuned.

Source: Liu et al. 2018, RAID, arXiv 1805.12185.
Departs: a part of `clean` is held out to decide the stop, where the paper uses all of its
    validation set for everything; once the stop is decided, that part tunes, too. The paper gives
    no settings for these networks: the tuning is that of `finetune`, so that the two differ by the
    pruning alone. A silent channel is masked behind the last ReLU, residual path and all, and the
    mask ends up in the weights of the layer that reads it.
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
from arena.core.rates import falling, tuned
from arena.core.registry import method, param
from arena.core.training import Recipe, check_clean, check_held_out, finetuning, split


@method
class FinePruning:
    max_drop: float = param(
        0.04, "accuracy that pruning may cost on the held-out images", low=0, high=1, source="paper"
    )
    held_out: float = param(
        0.5, "share of the clean images that only decides the stop", low=0.01, high=0.99
    )
    epochs: int = param(
        40, "passes of the fine-tuning", low=0, source="as finetune", under={"fast": 10, "smoke": 5}
    )
    lr: float | None = param(
        None,
        "first learning rate; none: the largest of 0.1 to 0.005 within tune_drop",
        above=0,
        source="as finetune; BackdoorBench 0.01",
        under={"smoke": 0.01},
    )
    tune_drop: float = param(
        0.03, "accuracy on images held out that a rate may lose to lower ones", low=0, high=1
    )
    tune_held_out: float = param(
        0.2, "share of the clean images, at most 1,000, that chooses the rate", low=0, high=0.99
    )
    decay_every: int | None = param(
        None,
        "epochs after which the rate is divided by ten; none: it falls along a cosine",
        low=1,
        source="as finetune",
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
        held, rest = split(clean, self.held_out, rng)
        pruned = deepcopy(model).eval()
        activity = mean_activation(pruned, rest)
        order = activity.argsort(stable=True)[:-1]  # one channel stays
        accuracies = _accuracies(pruned, held, order)
        before = next(accuracies)
        floor = before - self.max_drop - 1e-9  # the drop itself is within the limit
        kept = list(takewhile(lambda share: share >= floor, accuracies))
        mask = torch.ones_like(activity)
        mask[order[: len(kept)]] = 0
        fold_mask(pruned, mask)

        return tuned(
            pruned, clean, rng, self._plan,
            lr=self.lr, max_drop=self.tune_drop, held_out=self.tune_held_out,
            inside=lambda copy: masked(copy, mask),  # no slope: the folded weights stay zero
        )  # fmt: skip

    def _plan(self, lr: float) -> Recipe:
        plan = finetuning(
            epochs=self.epochs,
            lr=lr,
            decay_every=self.decay_every or 1,
            batch=self.batch,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            crop=self.crop,
            cutout=self.cutout,
        )
        return falling(plan, self.decay_every)


def _accuracies(model: Classifier, held: Images, order: Tensor) -> Iterator[float]:
    """Accuracy on `held` with none, the first, the first two … channels of `order` silenced."""
    y = held.y.to(order.device)
    for answers in silencings(model, held.x, order, len(order) + 1):
        yield float((answers == y).double().mean())
