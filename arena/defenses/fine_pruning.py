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
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from arena.core.contracts import Images
from arena.core.features import fold_mask, masked, mean_activation
from arena.core.models import Classifier
from arena.core.registry import BadInput, method, param
from arena.core.training import accuracy, check_clean, finetuning, fit, split, to_float


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

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        check_clean(clean, model)
        held, tune = split(clean, self.held_out, rng)
        if not len(held) or len(tune) < 2:
            raise BadInput(
                f"fine_pruning: of {len(clean)} clean images {len(held)} would be held out and "
                f"{len(tune)} tuned on; give more images or another held_out."
            )
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


@torch.no_grad()
def _accuracies(model: Classifier, held: Images, order: Tensor) -> Iterator[float]:
    """Accuracy on `held` with none, the first, the first two … channels of `order` silenced.

    The model runs once: behind the deep level comes only the head, whose scores are sums over
    channels. Where something else follows (another ReLU, say) it runs for every channel.
    """
    head = model.get_submodule(model.head)
    inputs, answers = _watch_inputs(model, head, held.x)
    assert isinstance(head, nn.Linear | nn.Conv2d)
    weight = head.weight.flatten(1)  # (classes, D); a 1x1 convolution is averaged over places
    scores = F.linear(inputs, weight, head.bias)
    y = held.y.to(scores.device)
    if scores.shape == answers.shape and torch.equal(scores.argmax(1), answers.argmax(1)):
        width = weight.shape[1] // (len(order) + 1)  # columns of the head per channel
        yield float((scores.argmax(1) == y).double().mean())
        for first in (order * width).tolist():
            columns = slice(first, first + width)
            scores -= inputs[:, columns] @ weight[:, columns].T
            yield float((scores.argmax(1) == y).double().mean())
    else:
        mask = torch.ones(len(order) + 1, device=scores.device)
        yield accuracy(model, held)
        for channel in order:
            mask[channel] = 0
            with masked(model, mask):
                share = accuracy(model, held)
            yield share


def _watch_inputs(model: Classifier, head: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What `head` reads (N, D), averaged over places if it is a map, and the model's logits."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].flatten(2).mean(2) if args[0].ndim > 2 else args[0])

    device = model.normalize.mean.device
    hook = head.register_forward_pre_hook(keep)
    try:
        answers = [model(to_float(part.to(device))) for part in x.split(500)]
    finally:
        hook.remove()
    return torch.cat(seen), torch.cat(answers)
