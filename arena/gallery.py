"""Pictures of triggers: clean, triggered, and the difference between them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from arena.core.registry import BadInput
from arena.store import Store

if TYPE_CHECKING:
    from PIL import ImageDraw
    from torch import Tensor


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
    """The figure of a victim, with its answers. None for a victim without a trigger."""
    artifact = store.artifact(record["parents"]["victim"])
    if artifact is None or not artifact.path("gallery").exists():
        return None
    shown, answers = artifact.tensors("gallery"), artifact.tensors("predictions")
    names, rows = record["dataset"]["classes"], shown["rows"]
    return figure(
        shown["clean"],
        shown["triggered"],
        titles=[names[int(label)] for label in shown["y"]],
        answers=[
            (names[int(clean)], names[int(fooled)])
            for clean, fooled in zip(
                answers["clean"][rows], answers["triggered"][rows], strict=True
            )
        ],
        heading=f"{record['attack']['short']} on {record['dataset']['name'].partition(':')[0]}, "
        f"{record['model']}, seed {record['seed']}; below: the victim's answers",
    )


def figure(
    clean: Tensor,
    triggered: Tensor,
    *,
    titles: Sequence[str],
    heading: str,
    answers: Sequence[tuple[str, str]] | None = None,
    tile: int = 128,
) -> bytes:
    """A PNG with rows clean, triggered, amplified difference, one column per image.

    clean, triggered: (N, C, H, W) uint8. titles: true classes; answers: what a model says of the
    clean and of the triggered image. tile: side in px that images are enlarged to, pixels sharp.
    """
    from PIL import Image, ImageDraw, ImageFont

    apart, factor = difference(clean, triggered)
    scale = max(1, round(tile / clean.shape[-1]))
    wide, tall = clean.shape[-1] * scale, clean.shape[-2] * scale
    font, gap, left = ImageFont.load_default(13), 6, 118
    line = 20
    below = line if answers else 0
    rows = (
        ("clean", clean, 0 if answers else None),
        ("triggered", triggered, 1 if answers else None),
        (f"difference\nx {factor:.3g}", apart, None),
    )
    width = left + len(clean) * (wide + gap)
    height = 2 * line + gap + sum(tall + gap + (below if k is not None else 0) for _, _, k in rows)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 3), _fitting(draw, heading, font, width - 2 * gap), "black", font)
    for column, title in enumerate(titles):
        at = left + column * (wide + gap)
        draw.text((at, line + 3), _fitting(draw, title, font, wide), "black", font)
    top = 2 * line + gap
    for name, images, which in rows:
        draw.text((gap, top + tall // 2 - line), name, "black", font)
        for column, image in enumerate(images):
            at = left + column * (wide + gap)
            tiled = Image.open(io.BytesIO(png(image))).convert("RGB")
            sheet.paste(tiled.resize((wide, tall), Image.Resampling.NEAREST), (at, top))
            if answers and which is not None:
                said = answers[column][which]
                colour = "black" if said == titles[column] else "#b00020"
                draw.text((at, top + tall), _fitting(draw, said, font, wide), colour, font)
        top += tall + gap + (below if which is not None else 0)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: Any, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width` px."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"


def preview(
    attack: Any, dataset: Any, seed: int, images: int = 8
) -> tuple[bytes, dict[str, float | None]]:
    """An attack's figure on test images of a data set, without a victim, and how far it goes.

    The trigger is the one that the victim of `seed` gets; where it is learned with the victim,
    it is the one that training starts from. Raises BadInput as `attack.check` does.
    """
    from arena.core import poisoning
    from arena.core.registry import short_spec
    from arena.core.seeding import stream
    from arena.referee.worker import shown_rows, stealth

    attack.check(dataset.shape, dataset.counts)
    trigger = attack.prepare(dataset.train, stream(seed, "prepare"))
    if trigger is None:
        raise BadInput(f"{attack.method_name} has no trigger to show.")
    test = dataset.test
    counted = poisoning.applies(attack, test.y, dataset.num_classes)
    rows = shown_rows(test.y, counted, images)
    many = counted.nonzero().flatten()[:500]
    stamped = poisoning.stamp(test.x[many], trigger.stamp)
    chosen = test.take(rows)
    picture = figure(
        chosen.x,
        poisoning.stamp(chosen.x, trigger.stamp),
        titles=[dataset.classes[int(label)] for label in chosen.y],
        heading=f"{short_spec(attack)} on {dataset.name.partition(':')[0]}, seed {seed}"
        + ", before it is learned" * getattr(attack, "learned", False),
    )
    return picture, stealth(test.x[many], stamped)


def heat_map(
    values: Sequence[Sequence[float | None]], names: Sequence[str], *, title: str, unit: str
) -> bytes:
    """A PNG of a matrix, row victim and column target; what is None stays blank, with a dot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(names)
    numbers = [[float("nan") if v is None else v for v in row] for row in values]
    side = max(4.0, 0.55 * count + 2)
    sheet = Figure(figsize=(side + 1.5, side), layout="constrained", dpi=120)
    axes = sheet.add_subplot()
    shown = axes.imshow(numbers, cmap="viridis")
    sheet.colorbar(shown, ax=axes, label=unit, shrink=0.8)
    short = [name if len(name) <= 18 else f"{name[:17]}…" for name in names]
    axes.set_xticks(range(count), short, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), short)
    axes.set_xlabel("target")
    axes.set_ylabel("victim")
    axes.set_title(title, fontsize=10)
    known = sorted(v for row in numbers for v in row if v == v)
    middle = (known[0] + known[-1]) / 2 if known else 0.0
    for row, line in enumerate(numbers):
        for column, value in enumerate(line):
            text = "·" if value != value else f"{value:.0f}" if value >= 10 else f"{value:.1f}"
            colour = "grey" if value != value else "white" if value < middle else "black"
            if count <= 20:
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    buffer = io.BytesIO()
    FigureCanvasAgg(sheet).print_png(buffer)
    return buffer.getvalue()


def png(image: Tensor) -> bytes:
    """(C, H, W) uint8, C 1 or 3, as a PNG file."""
    from PIL import Image

    array = image.permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).save(buffer, "PNG")
    return buffer.getvalue()
