"""Squared maximum mean discrepancy (MMD²): how far apart two samples of features are.

Source: Gretton et al. 2012, A Kernel Two-Sample Test (JMLR 13); kernels and use after Xia et al.,
    A Statistical Difference Reduction Method for Escaping Backdoor Detection (SDRM), Tables 2, 3.

Bandwidth: SDRM gives each sigma as a standard deviation and does not say how features are scaled;
of raw flattened features every two are thousands of sigmas apart. Here sigma counts in standard
deviations of the pooled sample (both together): k(a, b) = sum over sigma of
exp(-|a - b|² / (2 sigma² v)), where v is the pooled total variance (half the mean squared distance
of two features), a constant to gradients. MMD² then depends on neither the scale of the features
nor their number. Kernels of a mixture are summed, since the paper's figures reach 4.85 and those of
an average could not pass 2. The linear kernel is divided by v for the same reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Generator, Tensor, nn

from arena.core.contracts import Images
from arena.core.features import features
from arena.core.models import LEVELS, Classifier
from arena.core.registry import nearest
from arena.core.training import device_of, evaluating, logits, to_float

KERNELS: Mapping[str, tuple[float, ...]] = {  # name -> sigmas; SDRM, Table 3
    "gk1": (1 / 2,),
    "gk2": (1.0,),
    "gk3": (2.0,),
    "gmk1": (1 / 2, 1, 2),
    "gmk2": (1 / 4, 1 / 2, 1, 2, 4),
    "gmk3": (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8),
    "gmk4": (1 / 3, 1, 3),
    "gmk5": (1 / 9, 1 / 3, 1, 3, 9),
    "gmk6": (1 / 27, 1 / 9, 1 / 3, 1, 3, 9, 27),
    "lk": (),  # linear: the inner product
}

_LEAST_VARIANCE = 1e-12  # features that are all equal differ by nothing, not by 0/0


def mmd2(x: Tensor, y: Tensor, kernel: str = "gmk2", *, biased: bool = False) -> Tensor:
    """MMD² of the features x (N, ...) and y (M, ...): a float32 scalar, differentiable in both.

    biased: pairs of a feature with itself count too, which keeps the value at or above 0 but
        raises it, by up to (1/N + 1/M) times the number of sigmas; without them it is 0 on
        average for two samples of one distribution. (SDRM's formula as printed keeps these pairs
        and divides by N(N - 1): the unbiased value plus a constant, with the same gradient, where
        the kernel is Gaussian.)
    Raises ValueError on fewer than 2 features of either kind and on an unknown kernel.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"MMD needs 2 features of each kind, got {len(x)} and {len(y)}")
    first = torch.arange(len(x) + len(y), device=x.device) < len(x)
    return _discrepancy(torch.cat([x, y]), first, ~first, kernel, biased)


def masked_mmd2(
    z: Tensor, first: Tensor, second: Tensor, kernel: str = "gmk2", *, biased: bool = False
) -> Tensor:
    """`mmd2` of two disjoint parts of a batch: of z (N, ...) where `first` and where `second` hold.

    The masks are (N,) bool. 0, with no gradient, where either part has fewer than 2 features.
    Off the CPU nothing here waits for the device.
    """
    if z.device.type == "cpu":  # looking at a mask costs nothing there, and few rows cost less
        rows = (first | second).nonzero().flatten()
        z, first, second = z[rows], first[rows], second[rows]
    return _discrepancy(z, first, second, kernel, biased)


def _discrepancy(z: Tensor, first: Tensor, second: Tensor, kernel: str, biased: bool) -> Tensor:
    if kernel not in KERNELS:
        raise ValueError(f"there is no kernel {kernel!r}; {nearest(kernel, KERNELS)}")
    with _full_precision(z.device):
        z = z.flatten(1).float()
        a, b = first.float(), second.float()
        either, n, m = a + b, a.sum(), b.sum()
        # shifting all features changes nothing, but small numbers leave differences their digits
        z = z - (either @ z.detach()) / (n + m).clamp_min(1)
        spread = either @ z.detach().square().sum(1) / (n + m - 1).clamp_min(1)
        k = _similarities(z, KERNELS[kernel], spread.clamp_min(_LEAST_VARIANCE))
        own = torch.zeros_like(n) if biased else k.diagonal()
        less = 0 if biased else 1
        within = [
            (p @ k @ p - (p * own).sum()) / (size * (size - less)).clamp_min(1)
            for p, size in ((a, n), (b, m))
        ]
        across = a @ k @ b / (n * m).clamp_min(1)
        return torch.where((n >= 2) & (m >= 2), within[0] + within[1] - 2 * across, 0.0)


def _similarities(z: Tensor, sigmas: Sequence[float], variance: Tensor) -> Tensor:
    """k(z_i, z_j) (N, N) of the features z (N, D)."""
    products = z @ z.T
    if not sigmas:
        return products / variance
    squares = z.square().sum(1)
    distances = (squares[:, None] + squares - 2 * products).clamp_min(0) / variance
    distances = distances * (1 - torch.eye(len(z), device=z.device))  # rounding leaves it near 0
    terms = [torch.exp(distances / (-2 * sigma**2)) for sigma in sigmas]
    return torch.stack(terms).sum(0)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No bf16 inside: distances are differences of large numbers."""
    if not torch.amp.is_autocast_available(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


# ------------------------------------------------------------------------------- for the referee


@torch.no_grad()
def mmd_report(
    model: Classifier,
    stamped: Tensor,
    clean: Images,
    target: int,
    rng: Generator,
    *,
    kernel: str = "gmk2",
    biased: bool = False,
    size: int = 500,
) -> dict[str, dict[str, float | None]]:
    """How well stamped images hide among the target class: level -> MMD² of three comparisons.

    "stamped": stamped images against clean ones, both taken for the target class by the model;
    "intra": two halves of those clean ones; "inter": they against the nearest other class. None
    where a set has fewer than 2 images. Each set holds at most `size` images that `rng` draws.

    stamped: uint8 (N, C, H, W), without images that are of the target class; clean: uint8.
    Source: SDRM, Table 2, whose intra-class figures fit `biased`.
    """
    found = _by_answer(model, clean.x, rng)
    own = found.pop(target, clean.x[:0])
    half = min(size, len(own) // 2)
    rows: dict[str, dict[str, float]] = {level: {} for level in LEVELS}
    if half < 2:
        return {level: _summary(row) for level, row in rows.items()}
    genuine = _levels(model, own[:half])
    sets = {
        "stamped": _by_answer(model, stamped, rng).get(target, stamped[:0]),
        "intra": own[half : 2 * half],
        **{str(label): x for label, x in found.items()},
    }
    for name, x in sets.items():
        if len(x) < 2:
            continue
        for level, z in _levels(model, x[:size]).items():
            rows[level][name] = float(mmd2(z, genuine[level], kernel, biased=biased))
    return {level: _summary(row) for level, row in rows.items()}


def _summary(row: dict[str, float]) -> dict[str, float | None]:
    others = [value for name, value in row.items() if name not in ("stamped", "intra")]
    return {
        "stamped": row.get("stamped"),
        "intra": row.get("intra"),
        "inter": min(others, default=None),
    }


def _by_answer(model: nn.Module, x: Tensor, rng: Generator) -> dict[int, Tensor]:
    """The class that the model answers -> those images (uint8), in random order."""
    if not len(x):
        return {}
    x = x[torch.randperm(len(x), generator=rng).to(x.device)]
    answers = logits(model, x).argmax(1).to(x.device)
    return {int(label): x[answers == label] for label in answers.unique()}


def _levels(model: Classifier, x: Tensor, batch: int = 250) -> dict[str, Tensor]:
    """Level -> features (N, D) of the images (uint8), in evaluation mode, on the model's device."""
    device = device_of(model)
    parts: dict[str, list[Tensor]] = {level: [] for level in LEVELS}
    with evaluating(model):
        for images in x.split(batch):
            for level, z in features(model, to_float(images.to(device))).items():
                parts[level].append(z.flatten(1))
    return {level: torch.cat(values) for level, values in parts.items()}
