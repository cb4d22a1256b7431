"""What the arena measures: names, definitions, units and sources. Needs no torch."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Z95 = 1.959963984540054  # the standard normal's 97.5 % quantile


class Metric(NamedTuple):
    """A column of the results."""

    name: str
    definition: str
    unit: str
    source: str
    better: Literal["up", "down", ""]  # "": it describes the cell, it does not rank it


_REPAIR = "Wu et al. 2022, BackdoorBench, https://arxiv.org/abs/2206.12654"
_BADNETS = "Gu et al. 2017, BadNets, https://arxiv.org/abs/1708.06733"
_ARENA = "this arena"
_MODEL = "share in [0, 1]"

METRICS: tuple[Metric, ...] = (
    Metric("acc", "share of the clean test images given their true class", _MODEL, _BADNETS, "up"),
    Metric(
        "asr",
        "share of the triggered test images given the label that the attacker wants; images "
        "already of that class never count, and only victim-class images where there is a victim",
        _MODEL,
        _BADNETS,
        "down",
    ),
    Metric(
        "ra",
        "share of the triggered test images (those of asr) given their true class",
        _MODEL,
        _REPAIR,
        "up",
    ),
    Metric(
        "der",
        "(max(0, asr_before - asr) - max(0, acc_before - acc) + 1) / 2; 0.5: nothing gained",
        "[0, 1]",
        "Zhu et al. 2023, FT-SAM, https://arxiv.org/abs/2304.11823",
        "up",
    ),
    Metric("acc_drop", "acc of the victim minus acc after the defense", "[-1, 1]", _ARENA, "down"),
    Metric(
        "twin_acc_drop",
        "what the same defense costs the clean twin: its acc before minus its acc after",
        "[-1, 1]",
        _ARENA,
        "down",
    ),
    Metric("clean_twin_acc", "acc of the clean twin, before any defense", _MODEL, _ARENA, ""),
    Metric(
        "clean_twin_asr",
        "asr of the clean twin: high where the trigger itself looks like the target",
        _MODEL,
        _ARENA,
        "",
    ),
    Metric(
        "clean_twin_ra",
        "ra of the clean twin: low where the trigger destroys the image",
        _MODEL,
        _ARENA,
        "",
    ),
    Metric(
        "psnr",
        "10 log10(1 / mean squared difference) of clean and triggered image, mean over the images "
        "that the trigger changes; infinite where it changes none",
        "dB",
        "Huynh-Thu & Ghanbari 2008, https://doi.org/10.1049/el:20080522",
        "",
    ),
    Metric(
        "ssim",
        "structural similarity of clean and triggered image (11 px Gaussian window, sigma 1.5), "
        "mean over channels and images",
        "[-1, 1]; 1: identical",
        "Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861",
        "",
    ),
    Metric(
        "l2",
        "Euclidean norm of the difference of triggered and clean image, mean over images",
        "pixel values in [0, 1]",
        _ARENA,
        "",
    ),
    Metric(
        "linf",
        "largest difference of triggered and clean image at any pixel, mean over images",
        "pixel values in [0, 1]",
        _ARENA,
        "",
    ),
    Metric("seconds", "wall-clock time of the defense", "s", _ARENA, "down"),
    Metric("peak_memory_mb", "largest memory of the defense's process", "MB", _ARENA, "down"),
    Metric("clean_images", "images in the clean set handed to the defense", "images", _ARENA, ""),
    Metric(
        "forward_images",
        "images passed forward through a model by the defense",
        "images",
        _ARENA,
        "down",
    ),
    Metric(
        "backward_images",
        "images passed backward through a model by the defense",
        "images",
        _ARENA,
        "down",
    ),
)


def der(acc_before: float, acc_after: float, asr_before: float, asr_after: float) -> float:
    """Defense effectiveness rate in [0, 1]: 1 is a cure at no cost, 0.5 is nothing gained.

    Shares in [0, 1]. Source: Zhu et al. 2023 (FT-SAM); BackdoorBench.
    """
    return (max(0.0, asr_before - asr_after) - max(0.0, acc_before - acc_after) + 1) / 2


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval, in [0, 1], of a share of `successes` among `n` trials.

    Source: Wilson 1927, JASA 22(158). Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"an interval needs 0 <= successes <= n, n > 0; got {successes} of {n}")
    share, weight = successes / n, z * z / n
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    low = 0.0 if successes == 0 else centre - half  # exact ends, not 1e-17
    return low, 1.0 if successes == n else centre + half
