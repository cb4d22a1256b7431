"""Weights for several losses of one network: the shortest vector in the hull of their gradients.

Minus that vector is a direction in which no loss rises. Everything stays on the losses' device and
nothing waits for the host.

Source: the multiple-gradient descent algorithm (MGDA), Désidéri 2012, and its min-norm solver for
    networks, Sener and Koltun 2018, https://arxiv.org/abs/1810.04650, in the form that Bagdasaryan
    and Shmatikov 2021, https://arxiv.org/abs/2005.03823, use: normalisers, bounds for two losses.
Departs: Frank-Wolfe takes pairwise steps, from the worst vector in use to the best (Lacoste-Julien
    and Jaggi 2015, https://arxiv.org/abs/1511.05932): they converge linearly where plain steps
    zigzag, so that a fixed number of them does and no stopping rule has to ask the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NORMALISERS = ("loss+", "loss", "l2", "none")
CAP = 10.0  # no loss-based divisor is larger
LEAST = 0.001  # of two losses neither gets less weight
STEPS = 50  # of Frank-Wolfe, each a few operations on K numbers
_TINY = 1e-12


def balance(
    losses: Sequence[Tensor],
    parameters: Sequence[nn.Parameter],
    normaliser: str,
    values: Sequence[Tensor] | None = None,
) -> Tensor:
    """(K,) float32 weights, none negative, of sum 1, for K scalar losses of `parameters`.

    values: the figures that the normaliser takes for the losses, where they are not the losses
        themselves.
    The losses' graphs are kept, for the backward pass through their weighted sum.
    """
    gradients = [
        torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for loss in losses
    ]
    products = inner_products(gradients)
    sizes = torch.stack([value.detach().float() for value in (values or losses)])
    scale = divisors(products, sizes, normaliser)
    return weights(products / (scale[:, None] * scale))


def inner_products(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """(K, K) float32: the inner products of K gradients, each given tensor by tensor."""
    rows = torch.stack([torch.cat([part.flatten() for part in parts]) for parts in gradients])
    return rows.float() @ rows.float().T


def divisors(products: Tensor, losses: Tensor, normaliser: str) -> Tensor:
    """(K,) what each gradient is divided by before it is compared with the others.

    products: (K, K) of the raw gradients; losses: (K,) their losses.
    normaliser: loss: the loss; loss+: the loss times the gradient's length, both at most 10; l2:
        the length; none: 1.
    Raises ValueError on another one.
    """
    length = products.diagonal().clamp_min(0).sqrt()
    match normaliser:
        case "loss":
            found = losses.clamp(max=CAP)
        case "loss+":
            found = (losses * length).clamp(max=CAP)
        case "l2":
            found = length
        case "none":
            found = torch.ones_like(length)
        case _:
            raise ValueError(f"no normaliser {normaliser!r}; choose from {', '.join(NORMALISERS)}")
    return found.clamp_min(_TINY)


def weights(products: Tensor) -> Tensor:
    """(K,) weights, none negative, of sum 1, that make the shortest weighted sum of K vectors.

    products: (K, K) the vectors' inner products. One and two are solved in closed form, where of
    two neither weight falls below 0.001; more by Frank-Wolfe.
    """
    if len(products) == 1:
        return torch.ones_like(products[0])
    products = products / products.diagonal().amax().clamp_min(_TINY)  # only their ratios count
    return between_two(products) if len(products) == 2 else frank_wolfe(products)


def between_two(products: Tensor) -> Tensor:
    """The closed form for (2, 2) products; two equal vectors share the weight evenly."""
    (one, both), (_, two) = products
    apart = one + two - 2 * both  # squared distance of the two
    first = torch.where(apart > _TINY, (two - both) / apart.clamp_min(_TINY), 0.5)
    first = first.clamp(LEAST, 1 - LEAST)
    return torch.stack([first, 1 - first])


def frank_wolfe(products: Tensor, steps: int = STEPS) -> Tensor:
    """`weights` by pairwise Frank-Wolfe steps with exact line search, from the shortest vector."""
    place = torch.arange(len(products), device=products.device)
    found = (place == products.diagonal().argmin()).to(products.dtype)
    for _ in range(steps):
        slope = products @ found
        best = place == slope.argmin()
        worst = place == torch.where(found > 0, slope, -torch.inf).argmax()
        way = best.to(products.dtype) - worst.to(products.dtype)
        bend = (way @ products @ way).clamp_min(_TINY)
        step = torch.minimum(-(way @ slope) / bend, (found * worst).sum())
        found = found + step * way
    return found / found.sum()
