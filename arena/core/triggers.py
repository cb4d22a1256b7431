"""What a trigger is made of: the tensors that an attack drew or learned, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass

from torch import Tensor, nn

from arena.core.contracts import Trigger


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
