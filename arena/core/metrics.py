"""What the referee computes: pure functions of predictions, or of clean and triggered images.

Shares are fractions in [0, 1]. Images are (N, C, H, W), uint8 or float in [0, 1]; their distances
are in units of [0, 1]. `metric_list` holds the definitions as text, and what needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from arena.core.metric_list import der, wilson

__all__ = ["accuracy", "asr", "der", "l2", "linf", "psnr", "ra", "similarity", "ssim", "wilson"]

_BATCH_VALUES = 2**20  # a batch holds about this many pixel values: it bounds the memory


def accuracy(pred: Tensor, y: Tensor) -> float:
    """Share of the images whose predicted class `pred` (N,) is `y` (N,). Both int64."""
    if pred.shape != y.shape:
        raise ValueError(f"{tuple(pred.shape)} predictions do not match {tuple(y.shape)} labels")
    if not len(y):
        raise ValueError("a share of no images is not defined")
    return float((pred == y).double().mean())


def asr(pred: Tensor, wanted: Tensor, mask: Tensor) -> float:
    """Share of the triggered images in `mask` (N,) bool whose class `pred` (N,) is the one wanted.

    `wanted` and `mask` come from `poisoning.wanted` and `poisoning.applies`. Raises ValueError
    where the mask holds no image.
    """
    return accuracy(pred[mask], wanted[mask])


def ra(pred: Tensor, y: Tensor, mask: Tensor) -> float:
    """Recovered accuracy: share of the triggered images in `mask` given their true class `y`."""
    return accuracy(pred[mask], y[mask])


def psnr(clean: Tensor, triggered: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over the images that the trigger changes.

    Infinite where it changes none. (An image that the trigger happens to leave alone has an
    infinite ratio, which would hide all others.)
    """
    errors = torch.cat([(a - b).square().mean(1) for a, b in _batches(clean, triggered)])
    changed = errors[errors > 0]
    return float((-10 * changed.log10()).mean()) if len(changed) else float("inf")


def l2(clean: Tensor, triggered: Tensor) -> float:
    """Euclidean norm of the difference, mean over images."""
    return float(torch.cat([(a - b).norm(dim=1) for a, b in _batches(clean, triggered)]).mean())


def linf(clean: Tensor, triggered: Tensor) -> float:
    """Largest absolute difference, mean over images."""
    return float(torch.cat([(a - b).abs().amax(1) for a, b in _batches(clean, triggered)]).mean())


def ssim(clean: Tensor, triggered: Tensor, *, window: int = 11, sigma: float = 1.5) -> float:
    """Structural similarity in [-1, 1], mean over windows, channels and images.

    window: side of the Gaussian window in px, all of it inside the image; sigma in px; constants
    K1 = 0.01 and K2 = 0.03, range 1. Source: Wang et al. 2004. Raises ValueError where the window
    is larger than the image.
    """
    shape = clean.shape[1:]
    values = [
        similarity(a.view(-1, *shape), b.view(-1, *shape), window=window, sigma=sigma)
        for a, b in _batches(clean, triggered)
    ]
    return float(torch.cat(values).mean())


def similarity(a: Tensor, b: Tensor, *, window: int = 11, sigma: float = 1.5) -> Tensor:
    """`ssim` of each pair of float images in [0, 1], (N,); differentiable, of the images' dtype."""
    height, width = a.shape[-2:]
    if min(height, width) < window:
        raise ValueError(f"a window of {window} px does not fit into {height}x{width} px images")
    down, across = (
        _gaussian(side, window, sigma, a.device).to(a.dtype) for side in (height, width)
    )

    def smooth(x: Tensor) -> Tensor:
        return down @ x @ across.T

    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    cov = smooth(a * b) - mean_a * mean_b
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (light * (2 * cov + c2) / (var_a + var_b + c2)).flatten(1).mean(1)


def _gaussian(side: int, window: int, sigma: float, device: torch.device) -> Tensor:
    """(side - window + 1, side) float64: row i weighs the pixels of the window that starts at i.

    As a matrix product the smoothing of small images is several times faster than a convolution.
    """
    place = torch.arange(side, dtype=torch.float64, device=device)
    start = place[: side - window + 1, None]
    weights = torch.exp(-(place - start - (window - 1) / 2).square() / (2 * sigma**2))
    weights *= (place >= start) & (place < start + window)
    return weights / weights.sum(1, keepdim=True)


def _batches(clean: Tensor, triggered: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of (n, C*H*W) float64 in [0, 1]. Raises ValueError for no images or unlike shapes."""
    if clean.shape != triggered.shape:
        raise ValueError(f"images of {tuple(clean.shape)} and {tuple(triggered.shape)} do not pair")
    if not len(clean):
        raise ValueError("a mean over no images is not defined")
    size = max(1, _BATCH_VALUES // clean[0].numel())
    for a, b in zip(clean.split(size), triggered.split(size), strict=True):
        yield _unit(a), _unit(b)


def _unit(x: Tensor) -> Tensor:
    flat = x.flatten(1).double()
    return flat / 255 if x.dtype == torch.uint8 else flat
