"""Universal adversarial training (UAP): the network resists one change that is added to all images.

The change (no pixel by more than eps) is kept from batch to batch: the weights go down the slope of
the loss on changed images, and the change goes up, by the sign of its slope. This is the baseline
of the MOTH and DECK studies; it needs the whole training set.

Source: Shafahi et al. 2020, AAAI, Universal Adversarial Training, https://arxiv.org/abs/1811.11304:
    algorithm 3 (alternating; the change sees the new weights) and 4 (simultaneous: one pass for
    both). Steps are as long as the radius. Radii: MOTH, appendix X, and DECK, appendix III-C,
    chosen for what they cost in accuracy.
Departs: an image's loss counts up to beta for the change, as in the paper's attack (algorithm 2),
    where these algorithms have no such bound; the change starts at zero, and changed images are
    clipped to valid ones. The weights are trained by a recipe of the arena, without label
    smoothing, on all images but a few that tell the accuracy on the way.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from arena.core import adversarial, whole
from arena.core.contracts import Images, Step
from arena.core.models import Classifier
from arena.core.registry import method, param
from arena.core.training import autocast, device_of


@method
class UAP:
    needs_share: ClassVar[float] = 1.0

    eps: float = param(
        4.0,
        "L-inf radius in 1/255",
        above=0,
        high=255,
        source="MOTH, DECK: 4 on CIFAR-10; 0.05 of the range, 12.75, on SVHN; 0.03, 7.65, on LISA "
        "and GTSRB",
    )
    step: float | None = param(
        None, "length of the change's steps in 1/255; none: eps", above=0, high=255, source="paper"
    )
    beta: float = param(
        9.0, "an image's cross-entropy counts up to that, for the change", above=0, source="paper"
    )
    updates: str = param(
        "alternating",
        "when the change moves: after the weights, by their new values, or with them (half the "
        "work)",
        choices=("alternating", "simultaneous"),
        source="paper",
    )
    start: str = param(
        "scratch",
        "weights to start from: new ones, or those of the given model",
        choices=("scratch", "model"),
        source="DECK",
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
        alternating = self.updates == "alternating"
        change = Change(
            trained,
            eps=self.eps / 255,
            step=(self.step or self.eps) / 255,
            beta=self.beta,
            alternating=alternating,
        )
        whole.fit(
            trained, clean, plan, rng,
            on_batch=change.add, extra_loss=None if alternating else change.bound, also=[change],
            what="universal adversarial training",
        )  # fmt: skip
        return trained


class Change(torch.optim.Optimizer):
    """The universal change, as an optimiser beside the network's: its steps go up.

    delta: (C, H, W) float32, within eps of zero; lengths are of images in [0, 1].
    Simultaneous: the weights' backward pass gives its slope too, in which `bound` has the images
    left out whose loss is above beta. Alternating: the new weights see the batch once more.
    """

    def __init__(
        self, model: Classifier, *, eps: float, step: float, beta: float, alternating: bool
    ) -> None:
        self.delta = torch.zeros(model.spec.shape, device=device_of(model), requires_grad=True)
        super().__init__([self.delta], {})
        self.model, self.eps, self.length, self.beta = model, eps, step, beta
        self.alternating = alternating
        self.batch: Images | None = None  # the last one, as it was without the change
        self.counts: Tensor | None = None  # (N, 1, 1, 1), 1 where an image's loss is within beta

    def add(self, batch: Images, _: Generator) -> Images:
        """The batch with the change on it; without alternation, gradients flow to the change."""
        self.batch = batch
        delta = self.delta.detach() if self.alternating else self.delta
        each = delta.expand(batch.x.shape)
        if each.requires_grad:
            each.register_hook(self._bounded)
        return replace(batch, x=_added(batch.x, each))

    def bound(self, step: Step) -> Tensor:
        """Nothing is added to the loss: this looks which images' losses are within beta."""
        losses = F.cross_entropy(step.logits.detach(), step.batch.y, reduction="none")
        self.counts = (losses < self.beta).float()[:, None, None, None]
        return torch.zeros_like(step.loss)

    def _bounded(self, slopes: Tensor) -> Tensor:
        assert self.counts is not None
        return slopes * self.counts

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        slope = self._looked_again() if self.alternating else self.delta.grad
        assert slope is not None
        self.delta.add_(slope.sign(), alpha=self.length).clamp_(-self.eps, self.eps)

    def _looked_again(self) -> Tensor:
        """The slope of the mean bounded loss at the weights as they are by now."""
        assert self.batch is not None
        x, y = self.batch.x, self.batch.y
        with torch.enable_grad(), adversarial.frozen(self.model, evaluate=False):
            with autocast(x.device):
                out = self.model(_added(x, self.delta))
            losses = F.cross_entropy(out.float(), y, reduction="none")
            return torch.autograd.grad(losses.clamp_max(self.beta).mean(), self.delta)[0]


def _added(x: Tensor, delta: Tensor) -> Tensor:
    return (x + delta).clamp(0, 1)
