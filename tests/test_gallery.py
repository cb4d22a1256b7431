"""Pictures of triggers: the difference is amplified to the full range, PNGs hold the pixels."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from arena.gallery import difference, pictures, png, strip
from arena.store import Store


def test_difference_is_amplified_to_the_full_range() -> None:
    clean = torch.full((2, 3, 4, 4), 100, dtype=torch.uint8)
    triggered = clean.clone()
    triggered[0, :, 0, 0] = 110
    triggered[1, :, 1, 1] = 80
    apart, factor = difference(clean, triggered)
    assert factor == pytest.approx(255 / 20)
    assert apart[1, 0, 1, 1] == 255, "the largest difference becomes white"
    assert apart[0, 0, 0, 0] == 128, "half of it stays half of it"
    assert int(apart.sum()) == 3 * (255 + 128)


def test_no_difference_is_black() -> None:
    clean = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    apart, _ = difference(clean, clean)
    assert not apart.any()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_holds_the_pixels(channels: int, mode: str) -> None:
    image = torch.randint(256, (channels, 5, 7), dtype=torch.uint8)
    read = Image.open(io.BytesIO(png(image)))
    assert (read.mode, read.size) == (mode, (7, 5))
    assert list(read.tobytes()) == image.permute(1, 2, 0).flatten().tolist()


def test_pictures_of_a_victim(tmp_path) -> None:
    store = Store(tmp_path / "store")
    store.create()
    shape = (2, 3, 8, 8)
    shown = {
        "rows": torch.tensor([3, 5]),
        "y": torch.tensor([1, 2]),
        "clean": torch.zeros(shape, dtype=torch.uint8),
        "triggered": torch.full(shape, 7, dtype=torch.uint8),
    }
    store.save("ab" * 32, {"gallery": shown}, {"kind": "victim"})
    record = {
        "attack": {"short": "patch", "spec": "patch:target=0"},
        "parents": {"victim": "ab" * 32, "twin": "cd" * 32},
        "dataset": {"classes": ["stop", "yield", "turn"]},
        "metrics": {"psnr": 30.0},
    }
    found = pictures(store, [record, record])
    assert list(found) == ["patch"]
    assert [image["label"] for image in found["patch"]["images"]] == ["yield", "turn"]
    sheet = strip(store, record)
    assert sheet is not None
    assert Image.open(io.BytesIO(sheet)).size == (2 * 8 * 4, 3 * 8 * 4)
    twin = {**record, "parents": {"victim": "ef" * 32, "twin": None}}
    assert pictures(store, [twin]) == {}
    assert strip(store, twin) is None
