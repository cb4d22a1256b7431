"""Pictures of triggers from the store: clean, triggered, and the difference between them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from arena.store import Store

if TYPE_CHECKING:
    from torch import Tensor

SCALE = 4  # enlargement of strips for the eye; pixels stay sharp


def difference(clean: Tensor, triggered: Tensor) -> tuple[Tensor, float]:
    """(N, C, H, W) uint8 pairs -> |difference| amplified to the full range, and the factor."""
    apart = (triggered.int() - clean.int()).abs()
    factor = 255 / max(1, int(apart.max()))
    return (apart * factor).round().byte(), factor


def pictures(store: Store, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each attack (by its short spec) the pictures that the page shows, PNGs as bytes."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        short = record["attack"]["short"]
        if short in found or record["parents"]["twin"] is None:
            continue
        artifact = store.artifact(record["parents"]["victim"])
        if artifact is None or not artifact.path("gallery").exists():
            continue
        shown = artifact.tensors("gallery")
        apart, factor = difference(shown["clean"], shown["triggered"])
        names = record["dataset"]["classes"]
        found[short] = {
            "images": [
                {
                    "clean": png(clean),
                    "triggered": png(triggered),
                    "difference": png(delta),
                    "label": names[int(label)],
                }
                for clean, triggered, delta, label in zip(
                    shown["clean"], shown["triggered"], apart, shown["y"], strict=True
                )
            ],
            "caption": f"difference amplified {factor:.3g} times",
            "psnr": record["metrics"].get("psnr"),
        }
    return found


def strip(store: Store, record: Mapping[str, Any]) -> bytes | None:
    """One PNG of a victim's pictures: rows clean, triggered, difference. None without a trigger."""
    import torch

    artifact = store.artifact(record["parents"]["victim"])
    if artifact is None or not artifact.path("gallery").exists():
        return None
    shown = artifact.tensors("gallery")
    apart, _ = difference(shown["clean"], shown["triggered"])
    rows = [torch.cat(list(part), dim=-1) for part in (shown["clean"], shown["triggered"], apart)]
    sheet = torch.cat(rows, dim=-2)
    return png(sheet.repeat_interleave(SCALE, -1).repeat_interleave(SCALE, -2))


def png(image: Tensor) -> bytes:
    """(C, H, W) uint8, C 1 or 3, as a PNG file."""
    from PIL import Image

    array = image.permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()
