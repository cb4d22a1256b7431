"""Pictures of triggers: the difference is amplified to the full range, PNGs hold the pixels."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from arena.core.registry import BadInput, attacks
from arena.data import load
from arena.gallery import difference, figure, pictures, png, preview, strip
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
    answers = {name: torch.tensor([0, 0, 0, 1, 0, 2]) for name in ("clean", "triggered")}
    answers["triggered"] = torch.zeros(6, dtype=torch.int64)
    store.save("ab" * 32, {"gallery": shown, "predictions": answers}, {"kind": "victim"})
    record = {
        "attack": {"short": "patch", "spec": "patch:target=0"},
        "parents": {"victim": "ab" * 32, "twin": "cd" * 32},
        "dataset": {"name": "signs:classes=3", "classes": ["stop", "yield", "turn"]},
        "metrics": {"psnr": 30.0},
        "model": "fastnet",
        "seed": 0,
    }
    found = pictures(store, [record, record])
    assert list(found) == ["patch"]
    assert [image["label"] for image in found["patch"]["images"]] == ["yield", "turn"]
    sheet = strip(store, record)
    assert sheet is not None
    opened = Image.open(io.BytesIO(sheet)).convert("RGB")
    assert opened.width > 2 * 128
    assert opened.height > 3 * 128
    red = (opened.getcolors(2**24) or [])[:]
    assert any(colour == (0xB0, 0, 0x20) for _, colour in red), "wrong answers stand out"
    twin = {**record, "parents": {"victim": "ef" * 32, "twin": None}}
    assert pictures(store, [twin]) == {}
    assert strip(store, twin) is None


def test_figure_has_a_column_per_image_and_sharp_pixels() -> None:
    clean = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    triggered = clean.clone()
    triggered[:, 0, 0, 0] = 10  # a difference of 10 becomes the full 255
    sheet = Image.open(
        io.BytesIO(figure(clean, triggered, titles=["a", "b", "c"], heading="h", tile=64))
    )
    pixels = sheet.convert("RGB").getcolors(2**24) or []
    counts = {colour: number for number, colour in pixels}
    assert counts[(255, 0, 0)] == 3 * 8 * 8, "one pixel of 8 x 8 px in each difference"
    assert counts[(10, 0, 0)] == 3 * 8 * 8


def test_preview_shows_images_that_the_attack_is_for() -> None:
    data = load("signs:classes=5,size=200")
    picture, apart = preview(attacks.build("patch"), data, 0)
    assert Image.open(io.BytesIO(picture)).width > 8 * 128
    assert apart["linf"] is not None
    assert apart["linf"] > 0
    with pytest.raises(BadInput, match="none has no trigger to show"):
        preview(attacks.build("none"), data, 0)
    with pytest.raises(BadInput, match="target 9 is not a class"):
        preview(attacks.build("patch:target=9"), data, 0)
