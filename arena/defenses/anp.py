"""ANP: prune the channels that are most easily turned against clean images.

Where a batch norm scales a channel, the channel gets a mask in [0, 1] on the gain. Every update
first looks for the noise on gains and biases that hurts most (one signed step uphill from a random
start), then moves the masks so that the network does well with and without it. Channels that do
harm when they are disturbed, as those of a backdoor, end up with small masks. In ascending order
of the mask, over all batch norms, they are silenced: gain 0, the bias stays.

Source: Wu and Wang 2021, NeurIPS, arXiv 2110.14430. Official code:
    github.com/csdongxian/ANP_backdoor.
Departs: the paper prunes all masks of up to 0.2; the code's recipe walks up to 0.95, or to 1,000
    channels, and looks at test accuracy and ASR on the way. Here pruning goes as far on that walk
    as costs at most `max_drop` of the accuracy on held-out clean images: how small a mask is says
    little about how much of a backdoor is left. On CIFAR-10 (validation images) 0.2 left
    fastnet_small 81 % of a blended backdoor, 0.5 11 % at 0.6 points less accuracy. held_out=0 is
    the paper's rule. Masks learn from clean images in whole passes (drawn with replacement there)
    and with Nesterov momentum. A batch norm without a gain or a bias gets no mask. Learning runs on
    a copy in training mode, whose running statistics drift; what is pruned is the model as it came,
    with its own statistics. Nothing is tuned afterwards.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from arena.core.contracts import Images, Step
from arena.core.looks import looking
from arena.core.models import Classifier
from arena.core.progress import report
from arena.core.registry import BadInput, method, param
from arena.core.training import (
    Recipe,
    accuracy,
    autocast,
    check_clean,
    check_held_out,
    device_of,
    fit,
    split,
)

_LOOK = 50  # updates between two looks at the masked model, or more
LEVELS = 50  # how often held-out images are asked on the way to the last channel


@method
class ANP:
    eps: float = param(
        0.4, "furthest start and total step of the noise, as a share of gain and bias", low=0
    )
    steps: int = param(1, "signed steps of the noise, each eps/steps long", low=1, source="code")
    alpha: float = param(
        0.2, "weight of the loss without noise; the one with noise has the rest", low=0, high=1
    )
    iterations: int = param(
        2000,
        "updates of the masks, rounded up to whole passes",
        low=1,
        source="paper",
        under={"fast": 500, "smoke": 6},
    )
    lr: float = param(0.2, "learning rate of the masks", above=0, source="paper")
    momentum: float = param(0.9, "Nesterov", low=0, high=0.999, source="paper")
    batch: int = param(128, "images per update; a smaller set lowers it", low=2, source="paper")
    crop: int = param(4, "random shift, in pixels; 0: none", low=0, source="code")
    by: str = param(
        "threshold",
        "what limits the pruning: the mask's value, or the number of channels",
        choices=("threshold", "number"),
        source="code",
    )
    threshold: float | None = param(
        None,
        "largest mask that is pruned, by threshold; none: 0.95, and 0.2 where nothing is held out",
        low=0,
        high=1,
        source="paper 0.2; code 0.95",
    )
    number: int = param(1000, "channels that are pruned, by number", low=0, source="code")
    max_drop: float = param(
        0.04, "accuracy that pruning may cost on the held-out images", low=0, high=1
    )
    held_out: float = param(
        0.2, "share of the clean images that only decides how far; 0: to the end", low=0, high=0.99
    )

    def check(self, model: Classifier, clean: Images) -> None:
        check_clean(clean, model)
        if not gained(model):
            raise BadInput(
                f"anp masks the gains of batch norms, of which {model.spec.name} has none; "
                "use a network that has some (resnet18), or the defense fine_pruning."
            )
        check_held_out(clean, self.held_out, "anp")

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        self.check(model, clean)
        held, learn = split(clean, self.held_out, rng)
        mask = self.learn_masks(model, learn, rng, held)
        model = deepcopy(model).eval()
        order = self.candidates(mask)
        if self.held_out:
            order = affordable(model, order, held, self.max_drop)
        silence(model, order)
        return model

    def learn_masks(
        self, model: Classifier, images: Images, rng: Generator, held: Images | None = None
    ) -> Tensor:
        """The mask (K,) of every channel of `gained(model)`; `model` stays as it is.

        held: images of which the progress tells how many the masked model has right.
        """
        net, what = Masked(deepcopy(model)), "learning masks"
        device = device_of(model)
        look = None
        if held is not None and len(held):
            look = looking(what, lambda: accuracy(net, held), _LOOK, self.iterations)
        noise = torch.zeros(2, len(net.mask), device=device)

        def disturb(batch: Images, draws: Generator) -> Images:
            net.clamp()
            if look is not None:
                look(batch, draws)
            noise.copy_((2 * torch.rand(noise.shape, generator=draws) - 1) * self.eps)
            for _ in range(self.steps):
                noise.add_(uphill(net, batch, noise), alpha=self.eps / self.steps)
            return batch

        def with_noise(step: Step) -> Tensor:
            with autocast(device):
                disturbed = net.disturbed(step.batch.x, net.mask, noise)
            hurt = F.cross_entropy(disturbed.float(), step.batch.y)
            return (1 - self.alpha) * (hurt - step.loss)  # fit itself counts the plain loss once

        plan = Recipe(
            epochs=1,
            min_steps=self.iterations,
            batch=self.batch,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=0.0,
            label_smoothing=0.0,
            schedule="constant",
            warmup=0.0,
            crop=self.crop,
            border="zero",
        )
        fit(net, images, plan, rng, on_batch=disturb, extra_loss=with_noise, what=what)
        net.clamp()
        return net.mask.detach()

    def candidates(self, mask: Tensor) -> Tensor:
        """The channels within the limit, those of the smallest masks first."""
        order = mask.argsort(stable=True)
        if self.by == "number":
            return order[: self.number]
        threshold = self.threshold
        if threshold is None:
            threshold = 0.95 if self.held_out else 0.2
        return order[: int((mask <= threshold).sum())]


class Masked(nn.Module):
    """A frozen copy of a model whose only parameter is `mask`, (K,): one share per channel.

    Channels are numbered through the batch norms in the order of `gained`.
    """

    gain: Tensor  # (K,)
    bias: Tensor  # (K,)

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        norms = gained(model)
        self.names = list(norms)
        self.sizes = [len(norm.weight) for norm in norms.values()]
        self.register_buffer("gain", torch.cat([norm.weight for norm in norms.values()]))
        self.register_buffer("bias", torch.cat([norm.bias for norm in norms.values()]))
        self.mask = nn.Parameter(torch.ones_like(self.gain))

    def forward(self, x: Tensor) -> Tensor:
        return self.disturbed(x, self.mask, None)

    def disturbed(self, x: Tensor, mask: Tensor, noise: Tensor | None) -> Tensor:
        """Logits with gains w (m + d) and biases b (1 + e); `noise` (2, K) holds d and e.

        Without noise: gains w m, biases b.
        """
        gain, bias = self.gain * mask, self.bias
        if noise is not None:
            gain, bias = self.gain * (mask + noise[0]), self.bias * (1 + noise[1])
        weights: dict[str, Tensor] = {}
        for name, w, b in zip(
            self.names, gain.split(self.sizes), bias.split(self.sizes), strict=True
        ):
            weights |= {f"{name}.weight": w, f"{name}.bias": b}
        logits: Tensor = functional_call(self.model, weights, (x,))
        return logits

    @torch.no_grad()
    def clamp(self) -> None:
        self.mask.clamp_(0, 1)


def gained(model: nn.Module) -> dict[str, _BatchNorm]:
    """Name -> batch norm, for those with gain and bias, trained or fixed, in the model's order."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {name: m for name, m in norms.items() if m.weight is not None and m.bias is not None}


def uphill(net: Masked, batch: Images, noise: Tensor) -> Tensor:
    """Signs (2, K) of the directions in which the noise raises the loss of `batch`."""
    noise = noise.clone().requires_grad_()
    with torch.enable_grad(), autocast(noise.device):
        logits = net.disturbed(batch.x, net.mask.detach(), noise)
    (slope,) = torch.autograd.grad(F.cross_entropy(logits.float(), batch.y), noise)
    return slope.sign()


@torch.no_grad()
def silence(model: nn.Module, channels: Tensor) -> None:
    """Set the gains of `channels`, numbered as in `gained`, to 0 in place; biases stay."""
    norms = gained(model).values()
    keep = torch.cat([torch.ones_like(norm.weight) for norm in norms])
    keep[channels] = 0
    for norm, part in zip(norms, keep.split([len(n.weight) for n in norms]), strict=True):
        norm.weight.mul_(part)


def affordable(model: Classifier, order: Tensor, held: Images, max_drop: float) -> Tensor:
    """The longest start of `order`, in steps of 1/LEVELS, whose pruning costs at most `max_drop`
    of the accuracy on `held`. Shorter ones may cost more: accuracy goes up and down on the way."""
    floor = accuracy(model, held) - max_drop - 1e-9  # the drop itself is within the limit
    good, counts = order[:0], {len(order) * level // LEVELS for level in range(1, LEVELS + 1)}
    for done, count in enumerate(sorted(counts - {0}), 1):
        pruned = deepcopy(model)
        silence(pruned, order[:count])
        share = accuracy(pruned, held)
        report("pruning", done, len(counts - {0}), accuracy=share)
        if share >= floor:
            good = order[:count]
    return good
