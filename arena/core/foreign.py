"""Networks that somebody else wrote: a factory in a Python file, or a whole pickled model.

Both take images in [0, 1] as they are: no normalisation is put in front. Their code runs here, a
factory's because its user names it, a pickle's only where it is trusted. What is made carries the
name that made it, so that a worker of the referee can make it again.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from arena.core.models import Classifier, ModelSpec
from arena.core.networks import Network, Shape, timm_models
from arena.core.registry import BadInput

PICKLE = "pickle:"  # in front of a file: a model that its user trusts
_FACTORY = re.compile(r"(?P<file>.+\.py):(?P<function>\w+)")


def is_factory(name: str) -> bool:
    return _FACTORY.fullmatch(name) is not None and not name.startswith(PICKLE)


def is_foreign(name: str) -> bool:
    return is_factory(name) or name.startswith(PICKLE)


def file_of(name: str) -> str:
    """The file that a foreign network comes from."""
    if name.startswith(PICKLE):
        return name.removeprefix(PICKLE)
    found = _FACTORY.fullmatch(name)
    assert found is not None
    return str(Path(found["file"]).expanduser())


def build(name: str, classes: int, shape: Shape) -> Classifier:
    """The network `path/to/net.py:factory` or `pickle:FILE`, in evaluation mode.

    factory: a callable without arguments -> module from float (N, C, H, W) in [0, 1] to logits
    (N, classes). Raises BadInput where there is none, and where it does not take such images.
    """
    body, x = _body(name), torch.rand(2, *shape, generator=torch.Generator())
    out = _answer(name, body, x)
    if not isinstance(out, Tensor) or out.shape != (2, classes):
        given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise BadInput(
            f"{name} answers 2 images with {given}, but the data set's {classes} classes want "
            f"{(2, classes)}."
        )
    if not _takes_bf16(body, x):
        body.__class__ = type(type(body).__name__, (_Float32, type(body)), {})
    levels, head = _places(body, x)
    network = Network(lambda *_: body, levels, head, summary="somebody else's", source=name)
    model = Classifier(ModelSpec(name, classes, shape), network)
    model.normalize.mean.zero_()
    model.normalize.std.fill_(1.0)
    return model.eval()


def classes_of(name: str, shape: Shape) -> int:
    """How many classes the network of that name tells apart in such images. Raises BadInput."""
    out = _answer(name, _body(name), torch.rand(2, *shape, generator=torch.Generator()))
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != 2:
        raise BadInput(f"{name} does not answer images with logits (N, classes).")
    return out.shape[1]


def _body(name: str) -> nn.Module:
    if name.startswith(PICKLE):
        return _unpickled(Path(name.removeprefix(PICKLE))).float().eval()
    return _made(name).float().eval()


@torch.no_grad()
def _answer(name: str, body: nn.Module, x: Tensor) -> Any:
    try:
        return body(x)
    except (Exception, SystemExit) as error:  # other people's: any tells that images do not fit
        why = " ".join(str(error).split())[:160]
        raise BadInput(f"{name} cannot take images of {_size(x.shape[1:])}: {why}.") from error


class _Float32(nn.Module):
    """In front of a network's class: it stays in float32, whatever it is cast to.

    Many networks hold constants that no cast reaches, a mean to take off the images, say.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: fn(tensor).to(tensor.dtype), recurse)

    def forward(self, x: Tensor) -> Any:
        if isinstance(x, torch.fx.Proxy):
            raise TypeError("what a tracer makes of it could be cast")
        return super().forward(x.float())


@torch.no_grad()
def _takes_bf16(body: nn.Module, x: Tensor) -> bool:
    try:
        deepcopy(body).to(torch.bfloat16)(x.to(torch.bfloat16))
    except Exception:  # whatever foreign code says to it
        return False
    return True


def _made(name: str) -> nn.Module:
    """What the factory of a Python file returns."""
    found = _FACTORY.fullmatch(name)
    assert found is not None
    file, function = Path(found["file"]).expanduser(), found["function"]
    if not file.is_file():
        raise BadInput(f"There is no file {str(file)!r} to take {function} from.")
    label = f"arena_foreign_{sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(label, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[label] = module  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise BadInput(f"{file} cannot be imported: {type(error).__name__}: {error}.") from error
    factory = getattr(module, function, None)
    if not callable(factory):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise BadInput(f"{file} has no function {function!r}; it has {', '.join(known) or 'none'}.")
    try:
        body = factory()
    except (Exception, SystemExit) as error:
        raise BadInput(f"{name}() failed: {type(error).__name__}: {error}.") from error
    if not isinstance(body, nn.Module):
        raise BadInput(f"{name}() returns {type(body).__name__}; a torch.nn.Module is wanted.")
    return body


def _unpickled(file: Path) -> nn.Module:
    if not file.is_file():
        raise BadInput(f"There is no file {str(file)!r}.")
    try:
        body = torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:  # whatever another version's or a damaged pickle does
        why = " ".join(str(error).split())[:160]
        raise BadInput(f"{str(file)!r} cannot be unpickled: {why}.") from error
    if not isinstance(body, nn.Module):
        raise BadInput(f"{str(file)!r} holds {type(body).__name__}, not a whole model.")
    return body


def _places(body: nn.Module, x: Tensor) -> tuple[tuple[str, str, str], str]:
    """Where methods look inside: the three levels and the head that reads the last one.

    Where no layer reads a level channel by channel, modules evenly along the way stand for them:
    methods that ask nothing of levels work, those that mask channels say that they cannot.
    """
    calls = timm_models._watch(body, x)
    sound = bool(body(x).isfinite().all())  # else no layer can be told from another by its answers
    for deep, head in timm_models._deep_and_head(calls):
        if sound and timm_models._agrees(body, x, deep.path, head.path):
            return (*_earlier_levels(body, calls, deep), deep.path), head.path
    paths = [call.path for call in calls if call.shape] or [""]
    last = len(paths) - 1
    readers = [path for path in paths if isinstance(body.get_submodule(path), nn.Linear)]
    return (paths[last // 3], paths[2 * last // 3], paths[last]), (readers or paths)[-1]


def _earlier_levels(
    body: nn.Module, calls: list[timm_models._Call], deep: timm_models._Call
) -> tuple[str, str]:
    """The last stages of the two resolutions above the deep level's, of the outermost module that
    has two: networks are often wrapped, for one in a normalisation. Else evenly along the way."""
    before = calls[: calls.index(deep)]
    for outer, module in body.named_modules():
        start = f"{outer}." if outer else ""
        inner = [
            replace(call, path=call.path.removeprefix(start))
            for call in before
            if call.path.startswith(start)
        ]
        if found := timm_models._two_above(timm_models._trunk(module, inner), deep):
            return start + found[0], start + found[1]
    found = timm_models._earlier_levels(body, calls, deep)
    if found[0] != deep.path:
        return found
    return timm_models._spread([call.path for call in before if call.area > 1] or [deep.path])


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
