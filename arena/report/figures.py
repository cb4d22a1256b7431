"""Figures of a board, each as PNG and SVG, from flat rows or from plain arrays. Needs no torch.

Colours are cividis and viridis for amounts and Okabe and Ito's for kinds: colour-blind readers can
tell them apart. What has no input is left out, and the page says why.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import tables
from .page import Drawing
from .rows import CONTEXT, Row
from .statistics import Summary, over_attacks, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox, BboxBase

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#e69f00", "#009e73", "#6a6d71"
SEVERAL = (BLUE, ORANGE, GREEN, "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#000000")
MOST_NUMBERS = 600  # tiles of a heat map that still get their number written in
DPI = 110
PLACES = [  # of a name: points away from its point's edge, and the direction; the front runs right
    (float(away), across, up)
    for away in range(4, 100, 8)
    for across, up in (
        *((0.7, 0.7), (-0.7, -0.7), (-0.7, 0.7), (0.7, -0.7)),
        *((-1.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.0, -1.0)),
    )
]


class Drawn(NamedTuple):
    drawings: list[Drawing]
    absent: list[tuple[str, str]]  # title, reason


def draw(rows: Iterable[Row]) -> Drawn:
    """The figures that flat rows suffice for, for every data set, model and recipe among them."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in tables.established(tables.current(rows)):
        if tables.is_attacked(row):
            groups.setdefault(tuple(row[name] for name in CONTEXT), []).append(row)
    drawn = Drawn([], [])
    if not groups:
        drawn.absent.append(("all figures", "no attack was established"))
    for place, (context, group) in enumerate(groups.items(), start=1):
        about = tables.context_title(dict(zip(CONTEXT, context, strict=True)))
        suffix = f"-{place}" if len(groups) > 1 else ""
        where = f" ({about})" if len(groups) > 1 else ""
        for make in (heat, tradeoff, cost):
            made = make(group)
            if isinstance(made, str):
                drawn.absent.append((make.__name__.replace("tradeoff", "trade-off") + where, made))
            else:
                title, caption, figure, wide = made
                drawn.drawings.append(
                    drawing(make.__name__ + suffix, title + where, caption, figure, wide=wide)
                )
    return drawn


Made = tuple[str, str, Callable[[], "Figure"], bool]  # title, caption, painter, wide


def drawing(
    name: str, title: str, caption: str, paint: Callable[[], Figure], *, wide: bool = False
) -> Drawing:
    """The figure that `paint` makes, as a file of both kinds; the same input gives the same bytes.
    Names in it are text: no mathematics is read into a dollar sign."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    settings: Any = {
        "text.parse_math": False,
        "svg.hashsalt": "arena",
        "svg.fonttype": "path",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    png, svg = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names in scripts that no font has
        warnings.filterwarnings("ignore", message="constrained_layout")
        figure = paint()
        figure.set_dpi(DPI)
        FigureCanvasAgg(figure).print_png(png)
        figure.set_dpi(72)
        FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    width, height = (round(side * DPI) for side in figure.get_size_inches())
    return Drawing(
        name, title, caption, png.getvalue(), svg.getvalue(), width, height, wide
    )  # fmt: skip


def _numbered(classes: Sequence[str]) -> list[str]:
    """Names of classes with their numbers, since long ones may be cut to the same words."""
    return [f"{i} {name}" for i, name in enumerate(classes)]


def _short(name: str, most: int = 26) -> str:
    text = tables.clean_text(name)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def called(specs: Sequence[str], most: int = 26) -> list[str]:
    """A name for each: the method's where that tells it from the others, else its fields, too."""
    bare = [spec.partition(":")[0] for spec in specs]
    return [
        _short(name if bare.count(name) == 1 else spec, most)
        for name, spec in zip(bare, specs, strict=True)
    ]


def _new(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


# ------------------------------------------------------------------------------- from the rows


def heat(rows: Sequence[Row]) -> Made | str:
    """Attack x defense: the ASR that is left, and beside it the accuracy that the repair cost."""
    attacks = list(dict.fromkeys(row["attack_short"] for row in rows))
    order = tables.leaderboard(rows)["defense_short"]
    defenses = [name for name in order if any(row["defense_short"] == name for row in rows)]
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in filter(tables.measured, rows):
        cells.setdefault((row["defense_short"], row["attack_short"]), []).append(row)

    def matrix(name: str) -> list[list[float]]:
        means = [
            [summarise(row[name] for row in cells.get((d, a), [])).mean for a in attacks]
            for d in defenses
        ]
        return [[math.nan if v is None else 100 * v for v in line] for line in means]

    asr, drop = matrix("asr"), matrix("acc_drop")
    if all(value != value for line in asr for value in line):
        return "no cell has an ASR"

    def paint() -> Figure:
        across = max(4.2, 0.52 * len(attacks) + 2.2)
        sheet = _new(2 * across + 0.6, max(2.6, 0.34 * len(defenses) + 1.9))
        panels = sheet.subplots(1, 2, sharey=True)
        for axes, values, title, high, name in (
            (panels[0], asr, "ASR after repair, %", 100.0, "cividis"),
            (panels[1], drop, "accuracy drop, points", 20.0, "viridis"),
        ):
            shown = axes.imshow(values, cmap=name, vmin=0, vmax=high, aspect="auto")
            sheet.colorbar(shown, ax=axes, extend="max" if high < 100 else "neither")
            _names(axes, called(attacks), called(defenses))
            axes.set_title(title, fontsize=9)
            if len(attacks) * len(defenses) <= MOST_NUMBERS:
                _numbers(axes, values, high / 2)
        return sheet

    caption = "Mean over seeds; a dot where nothing was measured. Accuracy drops above 20 points "
    return "Attacks × defenses", caption + "share the last colour.", paint, True


def _names(axes: Axes, across: Sequence[str], down: Sequence[str]) -> None:
    axes.set_xticks(
        range(len(across)), [*map(_short, across)], rotation=55, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(down)), [*map(_short, down)])


def _numbers(axes: Axes, values: Sequence[Sequence[float]], middle: float) -> None:
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            text = "·" if value != value else f"{value:.0f}" if abs(value) >= 10 else f"{value:.1f}"
            colour = "0.4" if value != value else "white" if value < middle else "black"
            axes.text(
                x,
                y,
                text.replace("-0.0", "0.0"),
                ha="center",
                va="center",
                color=colour,
                fontsize=7,
            )


class Point(NamedTuple):
    name: str
    drop: float  # points
    asr: float  # percent
    seconds: float
    null: bool


def points(rows: Sequence[Row]) -> list[Point]:
    """One per defense: means over attacks of the means over seeds, where they are known."""
    found = []
    for name in dict.fromkeys(row["defense_short"] for row in rows):
        own = [row for row in rows if row["defense_short"] == name and tables.measured(row)]
        drop, asr, seconds = (_mean(own, column).mean for column in ("acc_drop", "asr", "seconds"))
        if drop is not None and asr is not None:
            null = any(row["null"] for row in own)
            found.append(Point(name, 100 * drop, 100 * asr, seconds or 0.0, null))
    return found


def _mean(rows: Sequence[Row], name: str) -> Summary:
    return over_attacks({(row["attack"], row["seed"]): row[name] for row in rows})


def pareto(found: Sequence[Point]) -> list[Point]:
    """Those that no other beats in one of accuracy drop and ASR without losing in the other, by
    accuracy drop."""
    front: list[Point] = []
    for point in sorted(found, key=lambda p: (p.drop, p.asr)):
        if not front or point.asr < front[-1].asr:
            front.append(point)
    return front


def tradeoff(rows: Sequence[Row]) -> Made | str:
    found = points(rows)
    if len(found) < 2:
        return "fewer than two defenses have both an accuracy drop and an ASR"

    def paint() -> Figure:
        sheet = _new(6.4, 4.6)
        axes = sheet.add_subplot()
        front = pareto(found)
        axes.step(
            [p.drop for p in front],
            [p.asr for p in front],
            where="post",
            color=GREY,
            lw=1,
            zorder=1,
        )
        for point in found:
            colour = GREY if point.null else BLUE if point in front else ORANGE
            axes.scatter(point.drop, point.asr, s=_area(point), color=colour, alpha=0.85, zorder=2)
        axes.set_xlabel("accuracy drop, points")
        axes.set_ylabel("ASR left, %")
        axes.margins(0.12)
        axes.grid(alpha=0.25)
        write_names(sheet, axes, found)
        return sheet

    caption = (
        "Lower left is better. Line and blue: the Pareto front; orange: beaten in both; grey: null "
        "methods. A point's area grows with the logarithm of its seconds."
    )
    return "What a repair costs and what it leaves", caption, paint, False


def _area(point: Point) -> float:
    """Of its mark, in square points of type."""
    return 25 + 45 * math.log10(1 + max(point.seconds, 0))


def _radius(point: Point) -> float:
    return math.sqrt(_area(point)) / 2


def write_names(sheet: Figure, axes: Axes, found: Sequence[Point]) -> list[Bbox]:
    """Names near their points, the nearest place first that hides no point and no other name, with
    a line to those that had to go farther.

    Returns the places, in pixels. A name without a free place stands where it hides least.
    """
    from matplotlib.transforms import Bbox

    sheet.draw_without_rendering()  # the axes stay where they are from here on
    pixel = sheet.dpi / 72
    taken = []
    for point in found:
        x, y = axes.transData.transform((point.drop, point.asr))
        half = 0.7 * pixel * _radius(point)  # the square within its mark
        taken.append(Bbox.from_extents(x - half, y - half, x + half, y + half))
    for point, name in zip(found, called([p.name for p in found], 22), strict=True):
        where, radius = (point.drop, point.asr), _radius(point)
        text = axes.annotate(name, where, (0, 0), textcoords="offset points", fontsize=7.5)
        text.set_in_layout(False)
        best, hidden = PLACES[0], math.inf
        for place in PLACES:
            now = _hidden(_put(text, radius, place), taken, axes.bbox)
            if now < hidden:
                best, hidden = place, now
            if not hidden:
                break
        taken.append(_put(text, radius, best))
        if best[0] > PLACES[0][0]:
            line = axes.annotate(
                "", where, text.get_position(), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.5}, zorder=1,
            )  # fmt: skip
            line.set_in_layout(False)
    return taken[len(found) :]


def _put(text: Text, radius: float, place: tuple[float, float, float]) -> Bbox:
    """Where that is, in pixels."""
    away, across, up = place
    text.set_position(((radius + away) * across, (radius + away) * up))
    text.set_horizontalalignment(("right", "center", "left")[round(across) + 1])
    text.set_verticalalignment(("top", "center", "bottom")[round(up) + 1])
    return text.get_window_extent().padded(2)


def _hidden(box: Bbox, taken: Sequence[Bbox], frame: BboxBase) -> int:
    """How many of `taken` lie under a box; a box beyond the frame hides one more."""
    inside = all(frame.contains(*corner) for corner in box.corners())
    return int(box.count_overlaps(taken)) + (not inside)


def cost(rows: Sequence[Row]) -> Made | str:
    names = dict.fromkeys(row["defense_short"] for row in rows)
    seconds = {
        name: _mean(
            [r for r in rows if r["defense_short"] == name and tables.measured(r)], "seconds"
        )
        for name in names
    }
    known = [(n, s.mean, s.sd or 0.0) for n, s in seconds.items() if s.mean is not None]
    if not known:
        return "no cell has its seconds"
    known.sort(key=lambda bar: (bar[1], bar[0]))

    def paint() -> Figure:
        sheet = _new(6.4, max(1.8, 0.28 * len(known) + 1.0))
        axes = sheet.add_subplot()
        axes.barh(
            range(len(known)),
            [bar[1] for bar in known],
            xerr=[bar[2] for bar in known],
            color=BLUE,
            ecolor=GREY,
        )
        axes.set_yticks(range(len(known)), called([bar[0] for bar in known]))
        axes.set_xlabel("seconds per repair")
        axes.set_xlim(left=0)
        return sheet

    return (
        "Cost",
        "Mean seconds of a repair; whiskers are ± one deviation over seeds.",
        paint,
        False,
    )


# ------------------------------------------------------------------- from what a store's models say


def per_class(shares: Mapping[str, Sequence[float | None]], classes: Sequence[str]) -> Drawing:
    """ASR by true class. shares: "attack" or "attack × defense" -> one share per class or None."""

    def paint() -> Figure:
        names = list(shares)
        values = [[math.nan if v is None else 100 * v for v in shares[n]] for n in names]
        sheet = _new(max(5.0, 0.42 * len(classes) + 3), max(2.2, 0.3 * len(names) + 1.7))
        axes = sheet.add_subplot()
        shown = axes.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        sheet.colorbar(shown, ax=axes, label="ASR, %")
        _names(axes, _numbered(classes), names)
        if len(names) * len(classes) <= MOST_NUMBERS:
            _numbers(axes, values, 50)
        return sheet

    caption = "Share of each true class's triggered test images that reach the attacker's label."
    return drawing("per-class", "ASR by class", caption, paint, wide=True)


def distance_maps(
    name: str,
    title: str,
    before: Sequence[Sequence[float | None]],
    after: Sequence[Sequence[float | None]],
    classes: Sequence[str],
    unit: str,
) -> Drawing:
    """Class distances, row victim and column target, before and after a repair on one scale."""

    def paint() -> Figure:
        both = [
            [[math.nan if v is None else v for v in line] for line in m] for m in (before, after)
        ]
        known = [v for matrix in both for line in matrix for v in line if v == v]
        high = max(known, default=1.0)
        side = max(3.4, 0.36 * len(classes) + 1.8)
        sheet = _new(2 * side + 1, side)
        panels = sheet.subplots(1, 2, sharey=True)
        for axes, values, word in zip(panels, both, ("before", "after"), strict=True):
            shown = axes.imshow(values, cmap="viridis", vmin=0, vmax=high)
            _names(axes, _numbered(classes), _numbered(classes))
            axes.set_title(word, fontsize=9)
            axes.set_xlabel("target")
            if len(classes) <= 12:
                _numbers(axes, values, high / 2)
        panels[0].set_ylabel("victim")
        sheet.colorbar(shown, ax=panels, label=_short(unit, 40), shrink=0.8)
        return sheet

    caption = "Size of the smallest trigger found from row to column; a dot was not measured."
    return drawing(name, title, caption, paint, wide=True)


def curves(losses: Mapping[str, Sequence[tuple[float, float]]]) -> Drawing:
    """Training loss by epoch. losses: a victim's name -> (epoch, mean loss) each."""

    def paint() -> Figure:
        sheet = _new(6.4, 4.0)
        axes = sheet.add_subplot()
        for k, (name, line) in enumerate(losses.items()):
            style = ("-", "--", ":", "-.")[k // len(SEVERAL) % 4]
            axes.plot(
                *zip(*line, strict=True),
                style,
                color=SEVERAL[k % len(SEVERAL)],
                label=_short(name, 44),
                marker=".",
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel("training loss")
        if len(losses) <= 16:
            axes.legend(fontsize=7, frameon=False)
        axes.grid(alpha=0.25)
        return sheet

    return drawing(
        "curves", "Training curves", "Mean training loss of each victim's epochs.", paint
    )


def feature_map(
    name: str,
    title: str,
    caption: str,
    levels: Mapping[str, Any],
    classes: Sequence[str],
    target: int,
) -> Drawing:
    """Clean and triggered images in a plane, one panel per level.

    levels: level -> (plane (N, 2), true class (N,), triggered (N,) bool), as lists or arrays.
    """

    def paint() -> Figure:
        sheet = _new(4.1 * len(levels), 3.9)
        panels = sheet.subplots(1, len(levels), squeeze=False)[0]
        for axes, (level, (plane, labels, stamped)) in zip(panels, levels.items(), strict=True):
            points = list(zip(plane, labels, stamped, strict=True))
            groups = (
                (
                    "clean, other classes",
                    GREY,
                    10,
                    [p for p, y, s in points if not s and y != target],
                ),
                (
                    f"clean, {_short(classes[target], 16)} (target)",
                    BLUE,
                    14,
                    [p for p, y, s in points if not s and y == target],
                ),
                ("triggered", ORANGE, 14, [p for p, y, s in points if s]),
            )
            for label, colour, size, some in groups:
                if some:
                    axes.scatter(
                        [p[0] for p in some],
                        [p[1] for p in some],
                        s=size,
                        color=colour,
                        alpha=0.65,
                        label=label,
                        linewidths=0,
                    )
            axes.set_title(level, fontsize=9)
            axes.set_xticks([])
            axes.set_yticks([])
        panels[0].legend(fontsize=7, frameon=False, loc="best")
        return sheet

    return drawing(name, title, caption, paint, wide=True)
