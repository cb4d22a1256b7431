"""What triggers are made of: what several attacks share, and the tensors inside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass

from torch import Tensor, nn

from arena.core.contracts import Trigger


@dataclass(frozen=True, eq=False)
class Add:
    """The image map clip(x + change), the same change on every image."""

    change: Tensor  # (C, H, W) float32 in [-1, 1]; C may be 1

    def __call__(self, x: Tensor) -> Tensor:
        return (x + self.change.to(x.device)).clamp_(0, 1)


def rounded(x: Tensor) -> Tensor:
    """Floats in [0, 1] at the levels of 8 bits that images are stored with; the gradient is that of
    `x`.

    Stamps made inside training need it: without, networks learn to tell triggered images by the
    values between the levels, which rounding takes away (WaNet on CIFAR-10, fastnet, 20 epochs: ASR
    98 % before rounding, 34 % after).
    """
    return (x.detach() * 255).round_().div_(255) + (x - x.detach())


def tensors_of(trigger: Trigger) -> dict[str, Tensor]:
    """Every tensor in a trigger's maps: grids, patterns, networks. Names are paths: `stamp.grid`.

    Looks into dataclasses, modules (their state), sequences and mappings. A tensor that two maps
    share is listed once, under its first name.
    """
    found: dict[str, Tensor] = {}
    known: set[int] = set()
    for name, tensor in _walk("", trigger):
        if id(tensor) not in known:
            known.add(id(tensor))
            found[name] = tensor
    return found


def _walk(path: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, nn.Module):
        for name, tensor in (*value.named_parameters(), *value.named_buffers()):
            yield f"{path}.{name}", tensor
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _walk(f"{path}.{field.name}".lstrip("."), getattr(value, field.name))
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _walk(f"{path}.{name}", part)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _walk(f"{path}.{index}", part)
