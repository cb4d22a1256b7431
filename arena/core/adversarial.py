"""Adversarial examples: PGD, training on them, accuracy under them.

Source: Madry et al. 2018, https://arxiv.org/abs/1706.06083 (PGD and training on its examples);
    de Jorge et al. 2022, https://arxiv.org/abs/2202.01181 (one step does for training, if it starts
    from noise twice as far as the radius and nothing is clipped).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from arena.core import models, parts, training
from arena.core.contracts import BatchHook, Images
from arena.core.models import Classifier
from arena.core.progress import report
from arena.core.registry import BadInput, code_hash
from arena.core.seeding import stream

HELD = 1000  # images that a surrogate does not see, to measure it
# For robust surrogates: more and gentler updates than speed-run recipes make. Speed-run networks,
# whose whitening magnifies small changes, learn none either way (CIFAR-10: 10 % under PGD).
ROBUST = training.Recipe(batch=128, lr=0.15, label_smoothing=0.0, average=True)
_TINY = 1e-12
_SLACK = 1e-3  # of a level: what float32 leaves short of a whole one


@torch.no_grad()
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    eps: float,
    step: float,
    steps: int,
    rng: Generator,
    targeted: bool = False,
    random_start: bool = True,
    evaluate: bool = True,
) -> Tensor:
    """Images near `x` that raise the cross-entropy of the labels `y`, or lower it (targeted).

    x: (N, C, H, W) float32 in [0, 1] on the model's device; y: (N,) int64 there.
    norm: measures an image's distance by its largest change (linf) or its Euclidean norm (l2).
    eps, step: radius and length of a step in that norm, of images in [0, 1].
    random_start: begin at a point drawn uniformly from the ball, else at `x`.
    evaluate: use the model in evaluation mode, so that an image's result depends on no other image;
        else in the mode in which it comes, without moving the statistics of its batch norms.
    Weights are frozen meanwhile, and the model is given back as it was. Nothing waits for the
    device. Raises ValueError on a negative radius.
    """
    if eps < 0 or norm not in ("linf", "l2"):
        raise ValueError(f"PGD needs norm linf or l2 and a radius of 0 or more, got {norm} {eps}")
    start = _drawn(x, norm, eps, rng) if random_start else torch.zeros_like(x)
    adversarial = (x + start).clamp_(0, 1)
    with frozen(model, evaluate):
        for _ in range(steps):
            gradient = _gradient(model, adversarial, y)
            direction = _steepest(-gradient if targeted else gradient, norm)
            moved = adversarial.add_(direction, alpha=step) - x
            adversarial = (x + project(moved, norm, eps)).clamp_(0, 1)
    return adversarial


@contextmanager
def frozen(model: nn.Module, evaluate: bool = True) -> Iterator[None]:
    """Inside, the weights take no gradient, batch norms keep their running statistics, and the
    model is in evaluation mode if `evaluate`. Outside, all is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    model.requires_grad_(False)
    if evaluate:
        model.eval()
    for norm in tracking:
        norm.track_running_stats = not norm.training  # else a training pass would move them
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, flag in flags:
            weight.requires_grad_(flag)
        for norm in tracking:
            norm.track_running_stats = True


def project(delta: Tensor, norm: str, eps: float) -> Tensor:
    """The nearest point of the ball: (N, C, H, W), per image a change of norm at most eps."""
    if norm == "linf":
        return delta.clamp(-eps, eps)
    return delta * (eps / _lengths(delta)).clamp_max(1)


def _drawn(x: Tensor, norm: str, eps: float, rng: Generator) -> Tensor:
    if norm == "linf":
        return (torch.rand(x.shape, generator=rng) * 2 - 1).mul_(eps).to(x.device)
    direction = _steepest(torch.randn(x.shape, generator=rng), norm)
    share = torch.rand(len(x), generator=rng) ** (1 / x[0].numel())  # uniform in the ball
    return (eps * share[:, None, None, None] * direction).to(x.device)


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of each image's cross-entropy, (N, C, H, W) float32."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        with training.autocast(x.device):
            logits = model(x)
        # a sum, so that an image's gradient does not depend on the size of its batch
        loss = F.cross_entropy(logits.float(), y, reduction="sum")
        return torch.autograd.grad(loss, x)[0]


def _steepest(gradient: Tensor, norm: str) -> Tensor:
    """Per image, the direction of norm 1 in which the loss rises most; zero stays zero."""
    return gradient.sign() if norm == "linf" else gradient / _lengths(gradient)


def _lengths(delta: Tensor) -> Tensor:
    """(N, 1, 1, 1) Euclidean norms, never zero."""
    return delta.flatten(1).norm(dim=1).clamp_min(_TINY)[:, None, None, None]


def to_levels(delta: Tensor) -> Tensor:
    """A change of images, rounded towards zero to whole steps of 1/255: no norm of it grows."""
    return (delta.abs() * 255 + _SLACK).floor_().div_(255).copysign_(delta)


@torch.no_grad()
def robust_accuracy(
    model: nn.Module,
    images: Images,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    step: float = 2 / 255,
    steps: int = 20,
    rng: Generator,
    batch: int = 500,
) -> float:
    """Share of `images` (uint8) still given their label after untargeted PGD, in [0, 1].

    The defaults are those of the DECK group for CIFAR-10. Raises ValueError where there are none.
    """
    if len(images) == 0:
        raise ValueError("there are no images to attack")
    device = training.device_of(model)
    right = torch.zeros((), dtype=torch.int64, device=device)
    for first in range(0, len(images), batch):
        part = images.take(torch.arange(first, min(first + batch, len(images)))).to(device)
        x = training.to_float(part.x)
        x = pgd(model, x, part.y, norm=norm, eps=eps, step=step, steps=steps, rng=rng)
        right += (training.logits(model, x).argmax(1) == part.y).sum()
    return int(right) / len(images)


def on_examples(model: nn.Module, *, eps: float, steps: int) -> BatchHook:
    """A hook for `fit(on_batch=…)`: training on L-inf examples of the model as it is by then.

    A single step goes eps further from noise of up to 2 eps, and nothing is clipped (de Jorge et
    al. 2022): examples of one step inside the ball soon teach a network to look robust to just
    these. Each of several steps is 2 eps / steps long, so that they can cross the ball. The
    examples are made with the batch statistics of training, like the pass that follows: at high
    learning rates the running ones lag behind, and examples that are strong for them alone teach
    less.
    """

    def noisy(batch: Images, rng: Generator) -> Images:
        with torch.no_grad(), frozen(model, evaluate=False):
            x = batch.x + _drawn(batch.x, "linf", 2 * eps, rng)
            return replace(batch, x=x + eps * _gradient(model, x, batch.y).sign())

    def hook(batch: Images, rng: Generator) -> Images:
        x = pgd(
            model, batch.x, batch.y,
            norm="linf", eps=eps, step=2 * eps / steps, steps=steps, rng=rng, evaluate=False,
        )  # fmt: skip
        return replace(batch, x=x)

    return noisy if steps == 1 else hook


# ------------------------------------------------------------------------------------- surrogates


def check_surrogate(attack: str, name: str, shape: tuple[int, int, int]) -> None:
    """Raise BadInput unless there is a network `name` that takes images of `shape`."""
    try:
        smallest = models.info(name).sides[0]
    except ValueError as error:
        raise BadInput(f"{attack}: surrogate: {error}.") from None
    if min(shape[1:]) < smallest:
        raise BadInput(
            f"{attack}: the surrogate {name} takes images of {smallest} px a side and more, these "
            f"are {shape[1]}x{shape[2]} px; name another network as surrogate."
        )


def surrogate(
    name: str, train: Images, *, epochs: int, updates: int, eps: float = 0.0, steps: int = 0
) -> Classifier:
    """The attacker's own network `name`, trained once per data set and settings (a kept part).

    train:   uint8 images; it is trained on their device, by the recipe `fast`, on examples by
        one of its own.
    epochs:  passes over them, more on small sets until `updates` updates were made.
    eps, steps: radius (L-inf, images in [0, 1]) and steps of the examples it is trained on; with
        no steps it is trained on plain images.
    Its accuracy on up to 1,000 images that it did not see, and that under PGD, are reported.
    """
    classes, shape = int(train.y.max()) + 1, tuple(train.x.shape[1:])
    spec = (name, classes, (shape[0], shape[1], shape[2]))
    device = train.x.device
    settings = {
        "network": name,
        "code": code_hash(models.info(name).build.__module__),
        "epochs": epochs,
        "updates": updates,
        "eps": eps,
        "steps": steps,
    }

    def make(rng: Generator, checkpoint: training.Checkpoint | None) -> Mapping[str, Tensor]:
        seen, held = split_held(train, rng)
        model = models.build(*spec, rng)
        models.calibrate(model, seen)
        model.to(device)
        usual = training.recipe("fast", models.info(name).overrides.get("fast"))
        plan = replace(ROBUST if steps else usual, epochs=epochs, min_steps=updates)
        training.fit(
            model, seen, plan, rng,
            on_batch=on_examples(model, eps=eps, steps=steps) if steps else None,
            checkpoint=checkpoint,
            what="surrogate",
        )  # fmt: skip
        found = {"accuracy": training.accuracy(model, held)}
        if steps:
            found["robust_accuracy"] = robust_accuracy(
                model, held, eps=eps, step=eps / 4, rng=stream(0, "robust accuracy")
            )
        figures = {f"figure.{key}": torch.tensor(value) for key, value in found.items()}
        return {**model.state_dict(), **figures}

    part = parts.trained("surrogate", settings, train, make)
    figures = {key: float(part.pop(key)) for key in list(part) if key.startswith("figure.")}
    report("surrogate", 1, 1, **{key.partition(".")[2]: value for key, value in figures.items()})
    model = models.build(*spec, stream(0, "shell"))
    return models.load_weights(model, part).to(device)


def split_held(train: Images, rng: Generator) -> tuple[Images, Images]:
    """`train` without a tenth of it (at most 1,000 images), and that tenth. At least 2 images."""
    held = min(HELD, max(1, len(train) // 10))
    order = torch.randperm(len(train), generator=rng)
    seen, rest = order[held:].sort().values, order[:held].sort().values
    return train.take(seen.to(train.x.device)), train.take(rest.to(train.x.device))
