"""A universal perturbation of small norm: one change, added to any image, that excites a neuron.

Source: Li et al. 2020, Invisible backdoor attacks on deep neural networks via steganography and
    regularization (TDSC), https://arxiv.org/abs/1909.02742: from random noise, a chosen neuron of
    the penultimate layer is driven up while the perturbation's norm (p = 0, 2 or inf) is pressed
    down to a bound.
Departs: the norm is no penalty: the ball that the perturbation lies in shrinks geometrically, so
    that the bound is met for certain. Steps, rates and the start are ours.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from arena.core import adversarial, training
from arena.core.contracts import Images
from arena.core.features import features
from arena.core.models import Classifier
from arena.core.progress import report

NORMS = ("l2", "linf", "l0")
BATCH = 128  # images per step
NOISE = 32 / 255  # largest change of the noise that the search starts from
SHRINKING = 0.75  # share of the steps after which the ball has the size of the bound
STRIDE = 0.1  # length of a step, as a share of the ball's radius
MOMENTUM = 0.9


def default_bound(norm: str, shape: tuple[int, int, int]) -> float:
    """The norm of 4/255 everywhere, in units of 1/255; of l0, 2 % of the pixels."""
    channels, height, width = shape
    if norm == "l0":
        return float(max(1, round(0.02 * height * width)))
    return 4.0 if norm == "linf" else 4.0 * (channels * height * width) ** 0.5


def excitable_neuron(model: Classifier, target: int) -> int:
    """The channel of the deep level that speaks most for class `target` (largest head weight)."""
    weight = model.get_submodule(model.head).weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        return int(weight[target].view(_channels(model), -1).sum(1).argmax())


def _channels(model: Classifier) -> int:
    x = torch.zeros(1, *model.spec.shape, device=training.device_of(model))
    with torch.no_grad():
        return features(model, x, ("deep",))["deep"].shape[1]


def excitation(model: Classifier, x: Tensor, neuron: int) -> Tensor:
    """() mean output of a channel of the deep level over float images and pixels."""
    with training.autocast(x.device):
        found = features(model, x, ("deep",))["deep"]
    return found.float()[:, neuron].mean()


@torch.no_grad()
def smallest_universal(
    model: Classifier,
    images: Images,
    neuron: int,
    *,
    norm: str,
    bound: float,
    steps: int,
    rng: Generator,
) -> Tensor:
    """(C, H, W) float32 change, in whole steps of 1/255, of norm at most `bound`.

    images: uint8, on the model's device: what the change is added to while it is sought.
    norm: l2 or linf, with the bound in units of 1/255, or l0, with a number of pixels.
    Raises ValueError where the model has no such neuron.
    """
    if not 0 <= neuron < (channels := _channels(model)):
        raise ValueError(f"the deep level has {channels} channels, there is no neuron {neuron}")
    shape, device = images.x.shape[1:], images.x.device
    delta = ((torch.rand(shape, generator=rng) * 2 - 1) * NOISE).to(device)
    noise = {"linf": NOISE, "l2": float(delta.norm()), "l0": shape[1] * shape[2]}[norm]
    bound = bound if norm == "l0" else bound / 255
    speed = torch.zeros_like(delta)
    rows = torch.randint(len(images), (steps, BATCH), generator=rng).to(device)
    with adversarial.frozen(model):
        for step in range(steps):
            gone = min(1.0, (step + 1) / (SHRINKING * steps))
            radius = max(noise, bound) ** (1 - gone) * bound**gone
            uphill = _uphill(model, training.to_float(images.x[rows[step]]), delta, neuron)
            speed = MOMENTUM * speed + (1 - MOMENTUM) * _direction(uphill, norm)
            stride = STRIDE * (NOISE if norm == "l0" else radius)
            delta = into_ball(delta + stride * _direction(speed, norm), norm, radius)
            report("universal perturbation", step + 1, steps)
        delta = adversarial.to_levels(into_ball(delta, norm, bound))
        sample = training.to_float(images.x[:1000])
        before, after = (
            float(excitation(model, x, neuron)) for x in (sample, (sample + delta).clamp(0, 1))
        )
    report("universal perturbation", steps, steps, before=before, after=after)
    return delta.clone()


def _uphill(model: Classifier, x: Tensor, delta: Tensor, neuron: int) -> Tensor:
    delta = delta.detach().requires_grad_()
    with torch.enable_grad():
        found = excitation(model, (x + delta).clamp(0, 1), neuron)
        return torch.autograd.grad(found, delta)[0]


def _direction(gradient: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return gradient.sign()
    # of l0 the pixels must not all grow alike, since the largest changes are kept
    size = gradient.norm() if norm == "l2" else gradient.abs().amax()
    return gradient / size.clamp_min(1e-12)


def into_ball(delta: Tensor, norm: str, radius: float) -> Tensor:
    """The change (C, H, W) that lies in the ball: of linf and l2 the nearest one; of l0 the one
    that keeps the pixels changed most, as many as the radius says."""
    if norm == "l0":
        delta = delta.clamp(-1, 1)
        size = delta.abs().sum(0).flatten()
        kept = torch.zeros_like(size)
        kept[size.topk(min(len(size), max(1, int(radius)))).indices] = 1
        return delta * kept.view(delta.shape[1:])
    return adversarial.project(delta[None], norm, radius)[0]
