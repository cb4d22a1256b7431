"""Mode connectivity repair: halfway along a curve of good networks from the victim to a tuned copy.

The weights phi(t) = (1-t)^2 w1 + 2t(1-t) w + t^2 w2 form a curve from the victim w1 to its
fine-tuned copy w2. The middle w is trained on clean images, every batch at a random point of the
curve, so that all points classify well; points away from both ends have much in them that never
saw the trigger. Of those that classify about as well as the best, the one nearest to t = 1/2 is
the result.

Source: Zhao et al. 2020, ICLR, arXiv 2005.00060; the curve: Garipov et al. 2018, arXiv 1802.10026.
    Official code: github.com/IBM/model-sanitization. The tuned copy as second end: DECK.
Departs: the paper joins two backdoored models and reads t in [0.1, 0.4] off test accuracy and ASR;
    DECK takes the best clean accuracy, which is the victim's own near t = 0. Here held-out clean
    images decide which points are within `max_drop` of the best, and distance from both ends which
    of them is taken. An epoch is one pass over the clean images; the code's loader repeats them
    until it has 10,000 to 50,000, so that its 100 epochs are several hundred. The rate falls from
    the middle of the run to its end (code: to 90 %), momentum is Nesterov, and all but the trained
    weights are as in the victim. The second end is tuned as `finetune` tunes, but its rate may cost
    more: the curve wins that back, and near an end that forgot little it forgets little. The
    curve's running statistics are thrown away: for every point they are computed anew, as in the
    code from images shifted and mirrored as in training. With those of plain images the middle kept
    36 % of a backdoor, with these 2 (sig, fastnet_small, CIFAR-10, validation images).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from arena.core.contracts import Images, Step
from arena.core.features import reestimate_batchnorm
from arena.core.looks import looking
from arena.core.models import Classifier
from arena.core.progress import report
from arena.core.rates import falling, tuned
from arena.core.registry import method, param
from arena.core.seeding import draw_seed, stream
from arena.core.training import (
    Recipe,
    accuracy,
    check_clean,
    check_held_out,
    finetuning,
    fit,
    split,
)

POINTS = 20  # the curve is looked at in steps of 1/POINTS, without its ends


@method
class ModeConnectivityRepair:
    epochs: int = param(
        100,
        "passes of the curve's training over the clean images",
        low=0,
        source="code",
        under={"fast": 10, "smoke": 2},
    )
    lr: float = param(0.01, "first learning rate of the curve", above=0, source="code")
    batch: int = param(
        128, "images per update of the curve; a smaller set lowers it", low=2, source="code"
    )
    weight_decay: float = param(1e-4, "on the weights at each batch's point", low=0, source="code")
    momentum: float = param(0.9, "Nesterov, on the curve and in fine-tuning", low=0, high=0.999)
    crop: int = param(4, "random shift, in pixels; 0: none", low=0, source="code, NAD")
    tune_epochs: int = param(
        40,
        "passes of the fine-tuning that makes the end",
        low=0,
        source="as finetune; BackdoorBench 100",
        under={"fast": 10, "smoke": 2},
    )
    tune_lr: float | None = param(
        None,
        "its first learning rate; none: the largest of 0.1 to 0.005 within tune_drop",
        above=0,
        source="as finetune; BackdoorBench 0.01",
        under={"smoke": 0.01},
    )
    tune_drop: float = param(
        0.07, "accuracy on images held out for it that a rate may lose to lower ones", low=0, high=1
    )
    tune_held_out: float = param(
        0.2, "share of the images, at most 1,000, that chooses the rate", low=0, high=0.99
    )
    tune_decay_every: int | None = param(
        None,
        "epochs after which that rate is divided by ten; none: it falls along a cosine",
        low=1,
        source="as finetune",
    )
    tune_batch: int = param(
        64, "images per update of the fine-tuning; a smaller set lowers it", low=2, source="NAD"
    )
    tune_cutout: int = param(
        9, "side of the black square in every image of the fine-tuning, in pixels; 0: none", low=0
    )
    t: float | None = param(
        None,
        "the point that is taken; none: chosen on held-out images",
        low=0,
        high=1,
        source="paper 0.1 to 0.4; BackdoorBench 0.1",
    )
    max_drop: float = param(
        0.04, "accuracy that a point may lack to the best on the held-out images", low=0, high=1
    )
    held_out: float = param(
        0.2, "share of the clean images that only chooses the point", low=0.01, high=0.99
    )

    def check(self, model: Classifier, clean: Images) -> None:
        check_clean(clean, model)
        check_held_out(clean, self.held_out, "mcr")

    def repair(self, model: Classifier, clean: Images, rng: Generator) -> Classifier:
        self.check(model, clean)
        held, tune = split(clean, self.held_out, rng)
        end = tuned(
            model, tune, rng, self._plan,
            lr=self.tune_lr, max_drop=self.tune_drop, held_out=self.tune_held_out,
        )  # fmt: skip
        curve = Curve(model, end, stream(draw_seed(rng), "points"))
        self.train(curve, tune, rng, held)
        seen = shown(tune, self.crop, rng)
        model = deepcopy(model).eval()
        t = self.t
        if t is None:
            accuracies = []
            for point in range(1, POINTS):
                curve.place(model, point / POINTS, seen)
                accuracies.append(accuracy(model, held))
                report("choosing a point", point, POINTS - 1, accuracy=accuracies[-1])
            t = furthest(accuracies, self.max_drop)
        curve.place(model, t, seen)
        return model

    def _plan(self, lr: float) -> Recipe:
        """Of the fine-tuning."""
        plan = finetuning(
            epochs=self.tune_epochs,
            lr=lr,
            decay_every=self.tune_decay_every or 1,
            batch=self.tune_batch,
            momentum=self.momentum,
            weight_decay=1e-4,
            crop=self.crop,
            cutout=self.tune_cutout,
        )
        return falling(plan, self.tune_decay_every)

    def train(self, curve: Curve, images: Images, rng: Generator, held: Images) -> None:
        """Train the middle of `curve`, in place; the progress tells how much of `held` the model
        halfway has right."""
        steps, shell = len(images) // min(self.batch, len(images)), deepcopy(curve.middle)

        def halfway() -> float:
            curve.place(shell, 0.5, images)
            return accuracy(shell, held)

        def decay(_: Step) -> Tensor:
            return 0.5 * self.weight_decay * curve.squares()

        plan = Recipe(
            epochs=self.epochs,
            batch=self.batch,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=0.0,  # of the middle; what decays is the point
            label_smoothing=0.0,
            schedule="triangle",  # constant for half of the run, then linear down
            warmup=0.5,
            start_lr=1.0,
            final_lr=0.01,
            crop=self.crop,
            border="zero",
        )
        look = looking("curve", halfway, steps, steps * self.epochs)
        fit(curve, images, plan, rng, on_batch=look, extra_loss=decay, what="curve")


class Curve(nn.Module):
    """The quadratic Bézier curve between the trained weights of two models of one architecture.

    Every forward pass runs at a point of its own, t ~ U(0, 1) drawn from `draws` (CPU). The only
    parameters are those of `middle`, which starts halfway on the straight line.
    """

    def __init__(self, start: Classifier, end: Classifier, draws: Generator) -> None:
        super().__init__()
        self.draws = draws
        self.middle = deepcopy(start).to(memory_format=torch.channels_last)
        # plain dicts: never parameters; laid out in memory as the middle is
        self.start = {name: weight.clone() for name, weight in _trained(self.middle).items()}
        self.end = _trained(end)
        self.now: dict[str, Tensor] = {}  # the weights of the last pass
        with torch.no_grad():
            for name, weight in _trained(self.middle).items():
                weight.copy_((self.start[name] + self.end[name]) / 2)

    def forward(self, x: Tensor) -> Tensor:
        self.now = self.at(float(torch.rand((), generator=self.draws)))
        logits: Tensor = functional_call(self.middle, self.now, (x,))
        return logits

    def at(self, t: float) -> dict[str, Tensor]:
        """Name -> weight at `t`, for the trained weights."""
        middle = {n: w for n, w in self.middle.named_parameters() if n in self.start}
        return {
            name: (1 - t) ** 2 * self.start[name] + 2 * t * (1 - t) * weight + t**2 * self.end[name]
            for name, weight in middle.items()
        }

    def squares(self) -> Tensor:
        """Sum of the squares of the last pass's weights."""
        return torch.stack([weight.square().sum() for weight in self.now.values()]).sum()

    @torch.no_grad()
    def place(self, model: Classifier, t: float, images: Images) -> None:
        """Give `model` the weights at `t` and the batch statistics of `images` there."""
        weights = self.at(t)
        for name, weight in model.named_parameters():
            if name in weights:
                weight.copy_(weights[name])
        reestimate_batchnorm(model, images)


def shown(images: Images, crop: int, rng: Generator) -> Images:
    """`images` as training shows them, each once: shifted by up to `crop` pixels over a black
    border, and every other one mirrored at random."""
    height, width = images.x.shape[-2:]
    crop = min(crop, height - 1, width - 1)
    shift = torch.randint(2 * crop + 1, (2, len(images)), generator=rng)
    windows = F.pad(images.x, (crop,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    x = windows[torch.arange(len(images)), :, shift[0], shift[1]]
    mirrored = torch.rand(len(images), generator=rng) < 0.5
    return replace(images, x=torch.where(mirrored[:, None, None, None], x.flip(-1), x))


def furthest(accuracies: list[float], max_drop: float) -> float:
    """The t nearest to 1/2 among the evenly spaced points whose accuracy is within `max_drop` of
    the best. Of two at the same distance the better one, else the one farther from the victim.

    accuracies: at 1/n, 2/n … (n-1)/n.
    """
    n = len(accuracies) + 1
    floor = max(accuracies) - max_drop - 1e-9  # the drop itself is within the limit
    eligible = [k for k in range(1, n) if accuracies[k - 1] >= floor]
    best = min(eligible, key=lambda k: (abs(2 * k - n), -accuracies[k - 1], -k))
    return best / n


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Name -> trained weight, without its history; shares memory with the model."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
