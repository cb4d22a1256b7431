"""Every other architecture: `timm:NAME` and `torchvision:NAME`.

Where to look inside is found by watching one forward pass, and is checked: a masked deep level and
a head with scaled columns must give the same logits.

Source: timm (https://github.com/huggingface/pytorch-image-models) and torchvision. Weights are
always newly initialised, never downloaded.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arena.core.networks import NO_BATCHNORM, Network, Shape

NETWORKS: dict[str, Network] = {}  # named by prefix only, see `find`

SIDES = (28, 32, 40, 48, 64, 75, 96, 128, 160, 192, 224, 256, 299, 384)  # tried for the smallest
PROBE_SIDE = 128  # gives a last map of 4x4 behind the usual five halvings
PROBE_CLASSES = 7
CHANNELWISE = re.compile("Pool|Dropout|Identity|Flatten")  # class names of steps without weights

HINTS = {  # names of architectures elsewhere, TrojAI's among them -> names here
    "densenet": "timm:densenet121",
    "densenet121": "timm:densenet121",
    "efficientnet_b0": "timm:efficientnet_b0",
    "googlenet": "torchvision:googlenet",
    "inceptionv1": "torchvision:googlenet",
    "inceptionv3": "timm:inception_v3",
    "inception_v3": "timm:inception_v3",
    "mobilenetv2": "timm:mobilenetv2_100",
    "mobilenet_v2": "timm:mobilenetv2_100",
    "mobilenetv2_100": "timm:mobilenetv2_100",
    "resnet34": "timm:resnet34",
    "resnet101": "timm:resnet101",
    "resnet152": "timm:resnet152",
    "shufflenet": "torchvision:shufflenet_v2_x1_0",
    "squeezenet": "torchvision:squeezenet1_1",
    "squeezenet1_0": "torchvision:squeezenet1_0",
    "squeezenet1_1": "torchvision:squeezenet1_1",
    "squeezenetv1_0": "torchvision:squeezenet1_0",
    "squeezenetv1_1": "torchvision:squeezenet1_1",
    "vit": "timm:vit_tiny_patch16_224",
    "wide_resnet50": "timm:wide_resnet50_2",
    "wideresnet50": "timm:wide_resnet50_2",
}


class Library(NamedTuple):
    names: Callable[[], list[str]]
    create: Callable[[str, int, Shape], nn.Module]  # newly initialised
    side: Callable[[str], int]  # side of an image that the architecture was meant for
    fixed: Callable[[str], bool]  # whether the side is chosen when the network is built
    source: str


@cache
def find(name: str) -> Network:
    """The network `timm:NAME` or `torchvision:NAME`; builds one to look inside (seconds, once).

    The deep level is a map (N, K, H, W), or a vector (N, K) or (N, K, 1, 1) where the architecture
    mixes channels behind its last map. Transformers give their own layout at the other levels.
    Raises ValueError on unknown names, and for architectures without such a level.
    """
    prefix, _, plain = name.partition(":")
    if prefix not in LIBRARIES:
        near = difflib.get_close_matches(prefix, LIBRARIES, n=1, cutoff=0) or ["timm"]
        raise ValueError(f"no library {prefix!r} of networks; the nearest is {near[0]!r}")
    library = LIBRARIES[prefix]
    names = library.names()
    if plain not in names:
        raise ValueError(f"no network {name!r}; {_nearest(prefix, plain, names)}")
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sides that are too small: they are tried here
        torch.manual_seed(0)
        view, smallest = _inspect(name, library, plain)
    return Network(
        build=partial(_build, name, library, plain),
        levels=view.levels,
        head=view.head,
        summary=f"{plain} of {prefix}, newly initialised",
        source=library.source,
        overrides={} if view.has_batchnorm else NO_BATCHNORM,
        sides=(smallest, max(smallest, library.side(plain))),
    )


def _nearest(prefix: str, plain: str, names: list[str]) -> str:
    if (hint := HINTS.get(plain)) and hint != f"{prefix}:{plain}":
        return f"there is {hint!r}"
    near = difflib.get_close_matches(plain, names, n=1, cutoff=0)
    return f"the nearest is {prefix + ':' + near[0]!r}"


def _build(name: str, library: Library, plain: str, classes: int, shape: Shape) -> nn.Module:
    channels, height, width = shape
    try:
        body = library.create(plain, classes, shape).eval()
        _try(body, shape)
    except Exception as error:  # other people's code: any kind tells that the images do not fit
        why = " ".join(str(error).split())[:160]
        raise ValueError(
            f"{name} cannot take images of {channels} x {height} x {width}: {why}"
        ) from error
    return body


@torch.no_grad()
def _try(body: nn.Module, shape: Shape) -> None:
    if not bool(body(torch.rand(1, *shape, generator=torch.Generator())).isfinite().all()):
        raise ValueError("its logits are not finite")


# ---- the two libraries


def _timm_names() -> list[str]:
    import timm

    return list(timm.list_models())


def _timm_fixed(plain: str) -> bool:
    import timm

    return bool(getattr(timm.get_pretrained_cfg(plain), "fixed_input_size", False))


def _timm_side(plain: str) -> int:
    import timm

    return int(getattr(timm.get_pretrained_cfg(plain), "input_size", (3, 224, 224))[-1])


def _timm_create(plain: str, classes: int, shape: Shape) -> nn.Module:
    import timm

    extra: dict[str, Any] = {"img_size": shape[1:]} if _timm_fixed(plain) else {}
    return timm.create_model(
        plain, pretrained=False, num_classes=classes, in_chans=shape[0], **extra
    )


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models(module=models))


def _torchvision_side(plain: str) -> int:
    return 299 if plain == "inception_v3" else 224


def _torchvision_fixed(plain: str) -> bool:
    return plain.startswith("vit_")


def _torchvision_create(plain: str, classes: int, shape: Shape) -> nn.Module:
    from torchvision import models

    extra: dict[str, Any] = {}
    if plain in ("inception_v3", "googlenet"):
        extra = {"aux_logits": False, "init_weights": True}
    if _torchvision_fixed(plain):
        extra = {"image_size": shape[1]}
    body = models.get_model(plain, weights=None, num_classes=classes, **extra)
    if shape[0] != 3:
        _replace_stem(body, shape[0])
    return body


def _replace_stem(body: nn.Module, channels: int) -> None:
    """torchvision's networks read three channels: make the first convolution read `channels`."""
    path, old = next((n, m) for n, m in body.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    body.set_submodule(path, new)


LIBRARIES = {
    "timm": Library(
        _timm_names, _timm_create, _timm_side, _timm_fixed, "timm, Apache-2.0 (Wightman 2019)"
    ),
    "torchvision": Library(
        _torchvision_names,
        _torchvision_create,
        _torchvision_side,
        _torchvision_fixed,
        "torchvision, BSD-3-Clause",
    ),
}


# ---- looking inside


class _View(NamedTuple):
    levels: tuple[str, str, str]
    head: str
    has_batchnorm: bool


@dataclass(frozen=True, eq=False)
class _Call:
    """A module of the body starting or ending its work in one forward pass."""

    path: str
    module: nn.Module
    shape: tuple[int, ...] | None  # of the output; None when the module starts

    @property
    def area(self) -> int:
        """Pixels of the output map; 0 where it is none."""
        return self.shape[2] * self.shape[3] if self.shape and len(self.shape) == 4 else 0


def _inspect(name: str, library: Library, plain: str) -> tuple[_View, int]:
    """Levels and head, and the smallest side of SIDES that works."""
    side = library.side(plain)
    start = side if library.fixed(plain) else min(side, PROBE_SIDE)
    x = torch.rand(2, 3, start, start)
    body = _build(name, library, plain, PROBE_CLASSES, (3, start, start))
    calls = _watch(body, x)
    for deep, head in _deep_and_head(calls):
        if _agrees(body, x, deep.path, head.path):
            break
    else:
        raise ValueError(
            f"{name} has no level that its classifier reads channel by channel; "
            "choose another network, such as 'timm:mobilenetv2_100'"
        )
    shallow, middle = _earlier_levels(body, calls, deep)
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in body.modules())
    view = _View((shallow, middle, deep.path), head.path, norms)
    return view, _smallest_side(library, plain, body, start)


def _watch(body: nn.Module, x: Tensor) -> list[_Call]:
    calls: list[_Call] = []
    hooks = []
    for path, module in body.named_modules():
        if not path:
            continue

        def begin(m: nn.Module, _: object, path: str = path) -> None:
            calls.append(_Call(path, m, None))

        def end(m: nn.Module, _: object, out: object, path: str = path) -> None:
            if isinstance(out, Tensor):
                calls.append(_Call(path, m, tuple(out.shape)))

        hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        with torch.no_grad():
            body(x)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _deep_and_head(calls: list[_Call]) -> list[tuple[_Call, _Call]]:
    """Pairs to try: the last map with the layer that reads it; whatever feeds the last layer."""
    starts = [
        i for i, c in enumerate(calls) if c.shape is None and list(c.module.parameters(False))
    ]
    readers = [i for i in starts if isinstance(calls[i].module, nn.Linear | nn.Conv2d)]
    if not readers:
        return []
    before = calls[: readers[-1]]
    pairs = []
    maps = [i for i, c in enumerate(before) if c.area > 1 and not _is_channelwise(c.module)]
    if maps:
        reader = next(i for i in starts if i > maps[-1])
        pairs.append((calls[maps[-1]], calls[reader]))
    vectors = [c for c in before if c.shape and (len(c.shape) == 2 or c.area == 1)]
    if vectors:
        pairs.append((vectors[-1], calls[readers[-1]]))
    return pairs


def _is_channelwise(module: nn.Module) -> bool:
    return CHANNELWISE.search(type(module).__name__) is not None


@torch.no_grad()
def _agrees(body: nn.Module, x: Tensor, deep: str, head: str) -> bool:
    """Whether masking `deep` equals scaling the columns of `head`, and does anything at all."""
    body = deepcopy(body)
    layer = body.get_submodule(head)
    pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    if not (isinstance(layer, nn.Linear) or pointwise):
        return False
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight.normal_()  # a head that starts at zero would agree with any level
    if isinstance(layer.bias, Tensor):
        layer.bias.zero_()  # would drown the small features of some untrained networks
    plain = body(x)
    masks: list[Tensor] = []

    def masked(_: nn.Module, __: object, out: Tensor) -> Tensor:
        masks.append(torch.rand(out.shape[1]))
        return out * masks[-1].view(1, -1, *[1] * (out.ndim - 2))

    hook = body.get_submodule(deep).register_forward_hook(masked)
    expected = body(x)
    hook.remove()
    if len(masks) != 1 or weight.shape[1] % len(masks[0]):
        return False
    columns = masks[0].repeat_interleave(weight.shape[1] // len(masks[0]))
    weight.mul_(columns.view(1, -1, *[1] * (weight.ndim - 2)))
    tolerance = 1e-4 * float(expected.abs().max())
    same = torch.allclose(body(x), expected, rtol=1e-3, atol=tolerance)
    return same and not torch.allclose(plain, expected, rtol=1e-2, atol=tolerance)


def _earlier_levels(body: nn.Module, calls: list[_Call], deep: _Call) -> tuple[str, str]:
    """The last stages of the two resolutions above the deep level's; else spaced evenly."""
    trunk = _trunk(body, calls[: calls.index(deep)])
    if found := _two_above(trunk, deep):
        return found
    return _spread([c.path for c in trunk] or [deep.path])


def _trunk(body: nn.Module, calls: list[_Call]) -> list[_Call]:
    """What stages put out, in order."""
    return [c for c in calls if c.shape and len(c.shape) > 2 and _is_stage(body, c)]


def _two_above(trunk: list[_Call], deep: _Call) -> tuple[str, str] | None:
    """The last calls of the two resolutions above the deep level's, the larger first."""
    last_of_area = {c.area: c.path for c in trunk if c.area > max(1, deep.area)}
    if len(last_of_area) < 2:
        return None
    (_, middle), (_, shallow) = sorted(last_of_area.items())[:2]
    return shallow, middle


def _spread(paths: list[str]) -> tuple[str, str]:
    """Two of them, evenly along the way."""
    return paths[len(paths) // 3], paths[2 * len(paths) // 3]


def _is_stage(body: nn.Module, call: _Call) -> bool:
    """Whether the module is a child of the body, or of a container that is one: not a branch."""
    parent, _, _ = call.path.rpartition(".")
    direct = not parent or isinstance(body.get_submodule(parent), nn.Sequential | nn.ModuleList)
    return direct and call.path.count(".") <= 1 and not _is_channelwise(call.module)


def _smallest_side(library: Library, plain: str, body: nn.Module, works: int) -> int:
    for side in SIDES:
        if side >= works:
            break
        try:
            if library.fixed(plain):
                body = library.create(plain, PROBE_CLASSES, (3, side, side)).eval()
            _try(body, (3, side, side))
        except Exception:
            continue
        return side
    return works
