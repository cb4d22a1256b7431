"""Photo filters after the manner of Instagram's, as differentiable functions of whole batches.

The recipes are those of the ABS and TrojAI filter backdoors, the stages those of ImageMagick; its
formulas stand in each stage's docstring. Every function takes and gives (N, 3, H, W) floats in
[0, 1], RGB; nothing is rounded between stages, gradients are finite everywhere, and an image's
result does not depend on its batch. A filter that is changed gets a new version.

Time goes into passes over memory: the stages make as few as they can, and work in place on what
they have just made (where autograd needs the old values, torch keeps them or complains).

Source: Liu et al. 2019, ABS; Karra et al. 2020, TrojAI, https://arxiv.org/abs/2003.07233; the
    filters' origin is the `instagram-filters` project, run by ImageMagick's `convert`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Colour = tuple[float, float, float]  # red, green and blue in [0, 1]

_LUMA = (0.212656, 0.715158, 0.072186)  # Rec. 709, ImageMagick's grey
_LEAST = 2.0**-16  # ImageMagick's smallest step; below it powers are straight lines

NAVY: Colour = (34 / 255, 43 / 255, 109 / 255)
SAND: Colour = (247 / 255, 218 / 255, 174 / 255)
ORANGE: Colour = (1.0, 0.6, 0.0)
MAROON: Colour = (0.2, 0.0, 0.0)
LAVENDER: Colour = (205 / 255, 193 / 255, 197 / 255)  # X11's LavenderBlush3
CORAL: Colour = (1.0, 0.6, 0.4)
BLACK: Colour = (0.0, 0.0, 0.0)


# ----------------------------------------------------------------------------------- the filters


def gotham(x: Tensor) -> Tensor:
    """Brighter, almost grey, tinted navy, with twice the contrast."""
    x = colorize(modulate(x, 1.2, 0.1), NAVY, 0.2)
    return sigmoidal_contrast(gamma(x, 0.9), 3.0, times=2)


def nashville(x: Tensor) -> Tensor:
    """Navy shadows, sand lights, stronger colours, middle brightness."""
    x = color_tone(color_tone(x, NAVY, 0.5, negate=True), SAND, 0.5)
    return auto_gamma(modulate(sigmoidal_contrast(x, 3.0), 1.0, 1.5))


def kelvin(x: Tensor) -> Tensor:
    """Middle brightness, half the saturation, a fifth of orange over it."""
    return colorize(modulate(auto_gamma(x), 1.2, 0.5), ORANGE, 0.2)


def lomo(x: Tensor) -> Tensor:
    """Red and green cut in two at half their range, and dark corners.

    `-level 50%` puts the black and the white point both on the middle. On the levels of 8 bits a
    ramp from 127 to 128 does the same, and has a slope.
    """
    return level(x, 127 / 255, 128 / 255, (True, True, False)) * vignette(x, BLACK)


def toaster(x: Tensor) -> Tensor:
    """Maroon shadows, bright and contrasty, a warm centre and pink corners."""
    x = modulate(color_tone(x, MAROON, 0.5, negate=True), 1.5, 0.8)
    x = sigmoidal_contrast(gamma(x, 1.2), 3.0, times=2)
    return x * (vignette(x, LAVENDER) * vignette(x, CORAL, inward=True))


class Filter(NamedTuple):
    version: str  # name@number: the number rises whenever the pixels change
    apply: Callable[[Tensor], Tensor]


FILTERS: dict[str, Filter] = {
    "gotham": Filter("gotham@1", gotham),
    "nashville": Filter("nashville@1", nashville),
    "kelvin": Filter("kelvin@1", kelvin),
    "lomo": Filter("lomo@1", lomo),
    "toaster": Filter("toaster@1", toaster),
}


# ------------------------------------------------------------------------------------ the stages


def modulate(x: Tensor, brightness: float, saturation: float) -> Tensor:
    """`-modulate`: lightness and saturation of HSL times a factor, the hue as it is; clipped.

    With hue and lightness L fixed, a pixel is L + chroma * (what the hue says), and the chroma is
    saturation * 2 min(L, 1 - L). So no hue is needed: the distances from L are scaled by the ratio
    of the chromas.
    """
    light = torch.lerp(x.amax(1, keepdim=True), x.amin(1, keepdim=True), 0.5)
    if brightness == 1:
        return torch.lerp(light, x, saturation).clamp_(0, 1)
    room = torch.minimum(light, 1 - light).clamp_(min=_LEAST)
    slope = brightness * saturation
    gain = torch.minimum(light * slope, _linear(light, -slope, saturation)).div_(room)
    return torch.addcmul(light * (brightness - gain), gain, x).clamp_(0, 1)


def colorize(x: Tensor, colour: Colour, share: float) -> Tensor:
    """`-fill colour -colorize share`, or a rectangle of that opacity: (1 - share) x + share c."""
    return torch.add(_planes(colour, x) * share, x, alpha=1 - share)


def gamma(x: Tensor, value: float) -> Tensor:
    """`-gamma`: x ** (1 / value)."""
    return _power(x, 1 / value)


def auto_gamma(x: Tensor) -> Tensor:
    """`-auto-gamma`: x ** e with e = log(0.5) / log(the image's mean over pixels and channels).

    One exponent per image, for all its channels, so that a grey of the mean comes to 0.5.
    """
    mean = x.mean((1, 2, 3), keepdim=True).clamp(_LEAST, 1 - _LEAST)
    return _power(x, math.log(0.5) / mean.log())


def sigmoidal_contrast(
    x: Tensor, contrast: float, midpoint: float = 0.5, *, times: int = 1
) -> Tensor:
    """`-sigmoidal-contrast`: (s(x) - s(0)) / (s(1) - s(0)), s(x) = 1 / (1 + exp(a (b - x))).

    a: contrast; b: midpoint, in [0, 1]. Written with tanh, of which s is a linear function.
    """
    half = contrast / 2
    low, high = math.tanh(-half * midpoint), math.tanh(half * (1 - midpoint))
    slope, shift = 1 / (high - low), -low / (high - low)
    bent = _linear(x, half, -half * midpoint).tanh_()
    for _ in range(times - 1):
        bent = _linear(bent, half * slope, half * (shift - midpoint)).tanh_()
    return _linear(bent, slope, shift).clamp_(0, 1)


def color_tone(x: Tensor, colour: Colour, share: float, *, negate: bool = False) -> Tensor:
    """Tint the lights, or with `negate` the shadows, towards `colour`.

    The colour, as opaque as the pixel is light (Rec. 709; dark, with `negate`), is laid over the
    image by `-compose blend` with the percentages share and 1 - share:
    (share m c + (1 - share) x) / (share m + 1 - share) for opacity m.
    """
    red, green, blue = _LUMA
    grey = (x[:, 0:1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:3], alpha=blue)
    total = _linear(grey, -share, 1.0) if negate else _linear(grey, share, 1 - share)
    return torch.lerp(_planes(colour, x), x, (1 - share) / total)


def level(
    x: Tensor, black: float, white: float, channels: tuple[bool, bool, bool] = (True, True, True)
) -> Tensor:
    """`-level`: (x - black) / (white - black), clipped, on the channels named; black < white."""
    scale = 1 / (white - black)
    slope = _planes([scale if chosen else 1.0 for chosen in channels], x)
    shift = _planes([-black * scale if chosen else 0.0 for chosen in channels], x)
    return torch.addcmul(shift, x, slope).clamp_(0, 1)


def vignette(x: Tensor, colour: Colour, *, inward: bool = False, factor: float = 1.5) -> Tensor:
    """(3, H, W): what a radial gradient multiplies images of x's size with (`-compose multiply`).

    The gradient goes from transparent in the centre to `colour` at its edge, or with `inward` the
    other way: 1 - a (1 - c) for opacity a, the distance from the centre over the radius. Its sides
    are floor(factor * the image's), its radius half the longer side less a pixel.
    """
    height, width = x.shape[2:]
    radius = (math.floor(factor * max(height, width)) - 1) / 2
    rows, columns = (
        torch.arange(side, dtype=x.dtype, device=x.device) - (side - 1) / 2
        for side in (height, width)
    )
    distance = (torch.hypot(rows[:, None], columns) / max(radius, 0.5)).clamp(max=1)
    opacity = 1 - distance if inward else distance
    return 1 - opacity * (1 - _planes(colour, x))


def _power(x: Tensor, exponent: float | Tensor) -> Tensor:
    """x ** exponent by exp and log, several times as fast as `pow`; a straight line near 0, where
    a power below 1 has no slope."""
    return x * x.clamp(min=_LEAST).log_().mul_(exponent - 1).exp_()


def _linear(x: Tensor, slope: float, shift: float) -> Tensor:
    """slope * x + shift in one pass."""
    return torch.rsub(x, shift, alpha=-slope)


def _planes(values: Sequence[float], x: Tensor) -> Tensor:
    """(3, 1, 1) of x's kind, one value per channel; made on x's device, without waiting for it."""
    return torch.cat([x.new_full((1, 1, 1), value) for value in values])
