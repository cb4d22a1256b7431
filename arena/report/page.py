"""One self-contained page and the files of a published leaderboard."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from arena.core.checks import FLAGS

from . import rating, tables
from .explorer import explorer
from .rows import CONTEXT, Row, flatten, number, unflatten
from .statistics import summarise

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup

Record = Mapping[str, Any]
Pictures = Mapping[str, Mapping[str, Any]]
Figures = Sequence[Mapping[str, Any]]

TITLE = "Backdoor leaderboard"
UNATTACKED = "Without a backdoor: the clean twin before and after"
BUDGETS = "What repairs cost: means over all cells, the clean twin's included"
SHADE_FULL = 0.2  # the ACC drop that is shaded darkest

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Tile:
    """One defense against one attack in the matrix: percent, and how dark each half is shaded."""

    acc: str = ""
    asr: str = ""
    acc_shade: float = 0.0  # in [0, 1]: accuracy lost, of SHADE_FULL
    asr_shade: float = 0.0  # in [0, 1]: ASR
    note: str = ""  # what went wrong; never empty where there are no numbers
    hint: str = ""  # the cell in words
    cell: str = ""  # the key of its first run, where there is any
    single: bool = False  # whether its figures rest on one seed


@dataclass(frozen=True)
class Matrix:
    threats: tuple[tuple[str, int], ...]  # (threat model, how many columns it spans)
    attacks: tuple[str, ...]
    lines: tuple[tuple[str, bool, tuple[Tile, ...]], ...]  # (defense, is a null method, tiles)


@dataclass(frozen=True)
class Section:
    """What the page shows of one board, data set, model and recipe."""

    title: str
    attacked: bool  # whether any defense met an attack, so that there is something to rank
    leaderboard: tables.View
    standing: str
    matrix: Matrix
    unattacked: tables.View
    attacks: tables.View
    published: tables.View
    repairs: tables.View
    hiding: tables.View
    budgets: tables.View
    weak: tables.View


@dataclass(frozen=True)
class Drawing:
    """A figure of `figures/NAME.png` and `.svg` beside the page."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: bytes
    width: int  # px that it is laid out with
    height: int
    wide: bool = False  # takes a line of its own


@dataclass(frozen=True)
class Entry:
    """A submitted result card, in words."""

    method: str
    kind: str
    spec: str
    status: str
    cells: int
    signed: str
    note: str
    file: str


@dataclass(frozen=True)
class Extras:
    """What a site's page shows beyond the page of one run."""

    drawings: Sequence[Drawing] = ()
    absent: Sequence[tuple[str, str]] = ()  # figures that could not be drawn, and why
    rated: Sequence[rating.Rated] = ()
    entries: Sequence[Entry] = ()
    notes: Sequence[str] = ()  # what is missing, clashes or was left out
    facts: Sequence[tuple[str, Sequence[str]]] = ()  # of published rows, which tell less
    exports: bool = False  # whether `tables/` lies beside the page


def build_page(
    records: Iterable[Record],
    pictures: Pictures,
    metrics: Sequence[Mapping[str, str]] = (),
    title: str = TITLE,
    command: str = "",
    published: Figures = (),
    extras: Extras = Extras(),
) -> str:
    """The leaderboard as one HTML page that requests nothing: styles, scripts, pictures inline
    (only the figures of `extras` lie beside it).

    records: cell records, or flat rows as they are published.
    pictures: attack's short name -> {"images": [{"clean": png, "triggered": png, "difference":
    png, "label": text}], "caption": text, "psnr": dB}, the pngs as bytes.
    metrics: the definitions to print, each with "name", "definition", "unit" and "source".
    published: what papers report, as of `tables.published`.
    The same records give the same bytes, in whatever order. Raises ValueError without records.
    """
    chosen = _unique(records)
    rows = [flatten(record) for record in chosen]
    return render_page(
        "page.html.j2",
        title=tables.clean_text(title),
        facts=merged_facts(_facts(chosen, rows, command), extras.facts),
        sections=_sections(rows, published),
        no_null=not any(row["null"] for row in rows),
        averaged=tables.AVERAGED,
        unattacked=UNATTACKED,
        budgets=BUDGETS,
        gallery=_gallery(rows, pictures),
        failures=tables.view(tables.failures(rows)),
        flags=_flags(chosen),
        metrics=metrics,
        rated=tables.view(rated_frame(extras.rated)),
        rating_definition=rating.DEFINITION,
        citation=citation(title, rows),
        data=explorer(rows, {row["key"]: _more(r) for row, r in zip(rows, chosen, strict=True)}),
        extras=extras,
    )


def render_page(template: str, **values: Any) -> str:
    """A page of this package's templates with the styles and scripts that all pages share."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template(template).render(
        styles="\n".join(_asset(f"assets/{name}.css") for name in ("tabulator.min", "page")),
        scripts=[_script(_asset(f"assets/{name}.js")) for name in ("tabulator.min", "page")],
        **values,
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _script(text: str) -> dict[str, str]:
    """A script and the digest by which the page's policy admits it and no other."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": text, "digest": digest}


def write_leaderboard(
    records: Iterable[Record],
    pictures: Pictures,
    out_dir: str | os.PathLike[str],
    metrics: Sequence[Mapping[str, str]] = (),
    title: str = TITLE,
    command: str = "",
    published: Figures = (),
    extras: Extras = Extras(),
) -> list[Path]:
    """Write a leaderboard's files into `out_dir` and return their paths.

    leaderboard.md    the tables to read
    leaderboard.csv   every attack and defense, mean and sd over seeds, exact
    results.json      every flat row, exact
    leaderboard.tex   booktabs tables
    index.html        the page of `build_page`

    and with `extras` the page's figures and, where it asks for them, each table in four formats.
    Each file appears whole or not at all; the same records give the same bytes.
    """
    chosen = _unique(records)
    contents: dict[str, str | bytes] = dict(table_files(chosen, metrics, title, command, published))
    contents["index.html"] = build_page(
        chosen, pictures, metrics, title, command, published, extras
    )
    if extras.exports:
        rows = [flatten(record) for record in chosen]
        for name, frame in _exported(rows, published, extras.rated).items():
            for format, suffix in _SUFFIXES.items():
                contents[f"tables/{name}.{suffix}"] = str(tables.render(frame, format))
    for drawing in extras.drawings:
        contents[f"figures/{drawing.name}.png"] = drawing.png
        contents[f"figures/{drawing.name}.svg"] = drawing.svg
    return write_files(out_dir, contents)


_SUFFIXES = {"md": "md", "csv": "csv", "json": "json", "latex": "tex"}


def table_files(
    records: Iterable[Record],
    metrics: Sequence[Mapping[str, str]] = (),
    title: str = TITLE,
    command: str = "",
    published: Figures = (),
) -> dict[str, str]:
    """File name -> text of a board's tables: those that are published under `leaderboards/`."""
    rows = [flatten(record) for record in _unique(records)]
    return {
        "leaderboard.md": _markdown(rows, metrics, title, command, published),
        "leaderboard.csv": str(tables.render(_everything(rows), "csv")),
        "results.json": str(tables.render(tables.current(rows), "json")),
        "leaderboard.tex": _latex(rows),
    }


def write_files(out_dir: str | os.PathLike[str], contents: Mapping[str, str | bytes]) -> list[Path]:
    """Write each below `out_dir`, whole or not at all."""
    return [_write(Path(out_dir) / name, content) for name, content in contents.items()]


def _everything(rows: list[Row]) -> pd.DataFrame:
    import pandas as pd

    both = (tables.cells(rows), tables.not_established(rows))
    return pd.concat([frame for frame in both if len(frame)])


def _exported(
    rows: list[Row], published: Figures, rated: Sequence[rating.Rated]
) -> dict[str, pd.DataFrame]:
    frames = {
        "leaderboard": tables.leaderboard(rows),
        "unattacked": tables.unattacked(rows, published),
        "cells": _everything(rows),
        "attacks": tables.attacks(rows),
        "published": tables.published(rows, published),
        "published_repairs": tables.published_repairs(rows, published),
        "hiding": tables.hiding(rows),
        "budgets": tables.budgets(rows),
        "not_established": tables.not_established(rows)[[*tables.WEAK_VIEW]],
        "failures": tables.failures(rows),
        "rating": rated_frame(rated),
    }
    return {name: frame for name, frame in frames.items() if len(frame)}


def rated_frame(rated: Sequence[rating.Rated]) -> pd.DataFrame:
    """The rating as a table of `tables`."""
    import pandas as pd

    lines = [line._asdict() for line in rated]
    frame = pd.DataFrame(lines, columns=list(rating.Rated._fields))
    return frame.rename(columns={"mean": "mean_share", "worst": "worst_share"})


def _breakable(name: str) -> Markup:
    """The name, escaped, free to break where a spec string has a joint."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[:,_/])(?=[^\s])", name))


def _write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if isinstance(content, str):
            content = content.encode("utf-8", "replace")  # a lone surrogate is no character
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _unique(records: Iterable[Record]) -> list[Record]:
    """The records by cell, each key once."""
    keyed: dict[str, tuple[Row, Record]] = {}
    for record in map(unflatten, records):
        row = flatten(record)
        if record != keyed.setdefault(row["key"], (row, record))[1]:
            raise ValueError(f"two different records share the key {row['key']!r}")
    if not keyed:
        raise ValueError("there are no records to show: run the board first")
    return [record for _, record in sorted(keyed.values(), key=lambda pair: _place(pair[0]))]


def _place(row: Row) -> tuple[Any, ...]:
    names = (str(row[name]) for name in (*CONTEXT, "attack", "defense"))
    return (*names, number(row["seed"]) or 0, row["key"])


# ------------------------------------------------------------------------------------- sections


def _sections(rows: list[Row], published: Figures) -> list[Section]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in tables.current(rows):
        groups.setdefault(tuple(row[name] for name in CONTEXT), []).append(row)
    return [
        Section(
            title=tables.context_title(dict(zip(CONTEXT, context, strict=True))),
            attacked=any(map(tables.is_attacked, group)),
            leaderboard=tables.view(ranked),
            standing=tables.standing_note(ranked),
            matrix=_matrix(group),
            unattacked=tables.view(tables.unattacked(group, published)),
            attacks=tables.view(tables.attacks(group)),
            published=tables.view(tables.published(group, published)),
            repairs=tables.view(tables.published_repairs(group, published)),
            hiding=tables.view(tables.hiding(group)),
            budgets=tables.view(tables.budgets(group)),
            weak=tables.view(tables.not_established(group)[[*tables.WEAK_VIEW]]),
        )
        for context, group in groups.items()
        for ranked in [tables.leaderboard(group)]
    ]


def _matrix(rows: list[Row]) -> Matrix:
    """Defenses in the leaderboard's order by established attacks, split by threat model."""
    weak = {(row["attack"], row["seed"]) for row in rows if row["status"] == "not_established"}
    groups: dict[tuple[str, str], list[Row]] = {}
    columns: dict[str, tuple[str, str]] = {}  # attack spec -> (threat, short name)
    for row in rows:
        if (row["attack"], row["seed"]) not in weak:
            groups.setdefault((row["attack"], row["defense"]), []).append(row)
            twin = not tables.is_attacked(row)
            name = "clean twin" if twin else row["attack_short"]
            columns[row["attack"]] = ("" if twin else row["threat"], name)
    specs = sorted(columns, key=lambda spec: (*columns[spec], spec))  # "": the twin comes first
    spans: dict[str, int] = {}
    for spec in specs:
        spans[columns[spec][0]] = spans.get(columns[spec][0], 0) + 1
    order = tables.leaderboard(rows)
    defenses = zip(order["defense"], order["defense_short"], order["null"], strict=True)
    return Matrix(
        threats=tuple(spans.items()),
        attacks=tuple(columns[spec][1] for spec in specs),
        lines=tuple(
            (
                tables.clean_text(short),
                bool(null),
                tuple(
                    _tile(groups.get((spec, defense), []), short, columns[spec][1])
                    for spec in specs
                ),
            )
            for defense, short, null in defenses
        ),
    )


def _tile(rows: list[Row], defense: str, attack: str) -> Tile:
    done = [row for row in rows if tables.measured(row)]
    counts = Counter(row["status"].replace("_", " ") for row in rows if row["status"] != "ok")
    some = {word: f"{word} {n} of {len(rows)}" for word, n in counts.items()}
    wrong = [word if counts[word] == len(rows) else some[word] for word in sorted(counts)]
    note = ", ".join(wrong) if rows else "not run"
    hint = tables.clean_text(f"{defense} against {attack}")
    cell = tables.clean_text(rows[0]["key"]) if rows else ""
    if not done:
        return Tile(note=note or "not measured", hint=f"{hint}: {note}", cell=cell)
    acc, asr = (summarise(row[name] for row in done) for name in ("acc", "asr"))
    drop = summarise(row["acc_drop"] for row in done).mean
    parts = [f"ACC {_share(acc.mean, acc.sd)}", f"ASR {_share(asr.mean, asr.sd)}"]
    parts += [f"ACC drop {_share(drop, None)}", f"{len(done)} seed{'s' * (len(done) > 1)}"]
    return Tile(
        acc=tables.percent(acc.mean),
        asr=tables.percent(asr.mean),
        acc_shade=_shade(drop, SHADE_FULL),
        asr_shade=_shade(asr.mean, 1.0),
        note=note,
        hint=f"{hint}: {', '.join(parts)}",
        cell=cell,
        single=len(done) == 1,
    )


def _share(mean: float | None, sd: float | None) -> str:
    return tables.percent(mean) + ("" if sd is None else f" ± {tables.percent(sd)}")


def _shade(value: float | None, full: float) -> float:
    return 0.0 if value is None else round(min(max(value / full, 0.0), 1.0), 2)


def _gallery(rows: list[Row], pictures: Pictures) -> list[dict[str, Any]]:
    order = [row["attack_short"] for row in tables.current(rows)]
    known = [name for name in dict.fromkeys(order) if name in pictures]
    return [
        {
            "name": tables.clean_text(name),
            "caption": tables.clean_text(pictures[name].get("caption") or ""),
            "psnr": number(pictures[name].get("psnr")),
            "images": [
                {
                    "label": tables.clean_text(image.get("label") or ""),
                    **{kind: _data_uri(name, kind, image) for kind in _KINDS},
                }
                for image in pictures[name]["images"]
            ],
        }
        for name in (*known, *sorted(set(pictures) - set(known)))
    ]


_KINDS = ("clean", "triggered", "difference")


def _data_uri(attack: str, kind: str, image: Mapping[str, Any]) -> str:
    png = image.get(kind)
    if not isinstance(png, bytes) or not png.startswith(_PNG):
        raise ValueError(f"the {kind} picture of attack {attack!r} must be the bytes of a PNG file")
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _flags(records: list[Record]) -> list[dict[str, Any]]:
    """The flags raised, each with its meaning, remedy and the cells that raised it."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        row = flatten(record)
        cell = f"{row['attack_short']} × {row['defense_short']}, seed {row['seed']}"
        for flag in record.get("flags") or ():
            known = FLAGS.get(flag["name"])  # published rows name their flags only
            meaning = flag.get("meaning") or (known.meaning if known else "")
            remedy = flag.get("remedy") or (known.remedy if known else "")
            entry = found.setdefault(
                flag["name"], {"meaning": meaning, "remedy": remedy, "cells": []}
            )
            entry["cells"].append(tables.clean_text(cell))
    return [{"name": name, **found[name]} for name in sorted(found)]


def _more(record: Record) -> list[tuple[str, str]]:
    """What a record tells of a run beside its row: (label, text)."""
    entries = [
        ("weights", _flat(record.get("weights"))),
        ("images", _flat(record.get("counts"))),
        ("hardware", _flat(record.get("hardware"))),
        ("versions", _flat(record.get("versions"))),
        ("started", _flat(record.get("started"))),
        ("card", _flat(record.get("card"))),
    ]
    entries += [
        (str(e.get("short") or e.get("name")), f"{e['status']}: {e['reason']}")
        for e in (record.get("measures") or {}).values()
        if e.get("status") != "ok"
    ]
    return [entry for entry in entries if entry[1]]


# ---------------------------------------------------------------------------------------- facts


def _facts(records: list[Record], rows: list[Row], command: str) -> list[tuple[str, list[str]]]:
    """What was run, on what, when and how: (heading, the distinct values)."""
    statuses = Counter(row["status"].replace("_", " ") for row in rows)
    count = f"{len(rows)} cell{'s' * (len(rows) != 1)}: "
    started = sorted(str(record["started"]) for record in records if record.get("started"))
    finished = sorted(str(record["finished"]) for record in records if record.get("finished"))
    counts = [record.get("counts") or {} for record in records]
    tests = [f"{c['test']} test images" for c in counts if c.get("test")]
    data = [_named(row["dataset"], row["fingerprint"]) for row in rows]
    facts = {
        "Board": [f"{row['board']} v{row['version']}" for row in rows],
        "Data": [*data, *_sources(records), *sorted(set(tests))],
        "Model": [row["model"] for row in rows],
        "Recipe": [row["recipe"] for row in rows],
        "Measures": _measures(records),
        "Seeds": [", ".join(dict.fromkeys(str(seed) for seed in sorted(_seeds(rows))))],
        "Results": [count + ", ".join(f"{statuses[word]} {word}" for word in sorted(statuses))],
        "Run": [f"{started[0]} to {finished[-1]}"] if started and finished else [],
        "Command": [command] if command else [],
        "Commit": [row["commit"] for row in rows],
        "Hardware": [_flat(record.get("hardware")) for record in records],
        "Versions": [_flat(record.get("versions")) for record in records],
    }
    return [
        (name, [tables.clean_text(value) for value in dict.fromkeys(values) if value])
        for name, values in facts.items()
        if any(values)
    ]


def merged_facts(
    facts: Sequence[tuple[str, Sequence[str]]], published: Sequence[tuple[str, Sequence[str]]]
) -> list[tuple[str, list[str]]]:
    """Facts with what was published beside the rows; where both tell something, all of it."""
    merged = {name: list(values) for name, values in facts}
    for name, values in published:
        clean = [tables.clean_text(value) for value in values]
        merged[name] = list(dict.fromkeys([*merged.get(name, []), *clean]))
    return list(merged.items())


class Citation(NamedTuple):
    text: str
    bibtex: str
    sha256: str


def citation(title: str, rows: Iterable[Row]) -> Citation:
    """How to cite a board's table, by version and the sha256 of its results.json."""
    shown = tables.current(rows)
    results = str(tables.render(shown, "json"))
    sha = hashlib.sha256(results.encode("utf-8", "replace")).hexdigest()
    boards = dict.fromkeys(f"{row['board']} v{row['version']}" for row in shown)
    year = max((str(row["finished"])[:4] for row in shown), default="")
    version, name = tables.clean_text(", ".join(boards)), tables.clean_text(title)
    return Citation(
        text=f"The Backdoor Arena developers. {name}. Board {version}"
        + (f", {year}" if year.isdigit() else "")
        + f". results.json sha256 {sha}.",
        bibtex="\n".join(
            [
                f"@misc{{backdoor_arena_{sha[:8]},",
                "  author = {{The Backdoor Arena developers}},",
                f"  title = {{{tables.escape_latex(name)}}},",
                *([f"  year = {{{year}}},"] if year.isdigit() else []),
                f"  version = {{{tables.escape_latex(version)}}},",
                f"  note = {{results.json sha256 {sha}}},",
                "}",
            ]
        ),
        sha256=sha,
    )


def lasting_facts(records: Iterable[Record]) -> list[tuple[str, list[str]]]:
    """The facts that records tell and published rows do not: what about.json keeps."""
    chosen = _unique(records)
    facts = _facts(chosen, [flatten(record) for record in chosen], "")
    return [(name, values) for name, values in facts if name in _LASTING]


_LASTING = ("Data", "Measures", "Run", "Hardware", "Versions")


def _named(name: str, fingerprint: str) -> str:
    return f"{name}, fingerprint {fingerprint}" if fingerprint else name


def _sources(records: list[Record]) -> list[str]:
    return [str(record["dataset"].get("source") or "") for record in records]


def _measures(records: list[Record]) -> list[str]:
    entries = [entry for record in records for entry in (record.get("measures") or {}).values()]
    return sorted({entry["short"] for entry in entries})


def _seeds(rows: list[Row]) -> list[Any]:
    seeds = {row["seed"] for row in rows}
    return list(seeds) if all(isinstance(seed, int) for seed in seeds) else sorted(map(str, seeds))


def _flat(value: Any) -> str:
    """A provenance mapping as one line; a plain value as it is."""
    if not isinstance(value, Mapping):
        return "" if value is None else str(value)
    return ", ".join(f"{name} {value[name]}" for name in sorted(value) if value[name] is not None)


# ---------------------------------------------------------------------------------- other files


def _markdown(
    rows: list[Row],
    metrics: Sequence[Mapping[str, str]],
    title: str,
    command: str,
    published: Figures,
) -> str:
    parts = [f"# {tables.escape_markdown(title)}\n"]
    if command:
        parts.append(f"Made by `{tables.clean_text(command).replace('`', '')}`.\n")
    if any(map(tables.is_attacked, rows)):
        parts.append(f"{tables.AVERAGED}\n")
        ranked = tables.leaderboard(rows)
        parts.append(str(tables.render(ranked, "md")))
        parts.append(f"{tables.standing_note(ranked)}\n")
    for heading, frame in (
        (UNATTACKED, tables.unattacked(rows, published)),
        ("Attacks", tables.attacks(rows)),
        ("Beside published figures", tables.published(rows, published)),
        ("Repairs beside published figures", tables.published_repairs(rows, published)),
        ("How far stamped images are from the target class (MMD²)", tables.hiding(rows)),
        (BUDGETS, tables.budgets(rows)),
        (
            "Attack not established: shown, not ranked",
            tables.not_established(rows)[[*tables.WEAK_VIEW]],
        ),
        ("Collapsed, failed or not applicable", tables.failures(rows)),
    ):
        if len(frame):
            parts += [f"## {heading}\n", str(tables.render(frame, "md"))]
    if metrics:
        parts.append("## Metrics\n")
        parts.append("\n".join(_definition(metric) for metric in metrics) + "\n")
    return "\n".join(parts)


def _definition(metric: Mapping[str, str]) -> str:
    text = f"- **{tables.escape_markdown(metric['name'])}**: "
    return text + tables.escape_markdown(metric.get("definition") or "")


def _latex(rows: list[Row]) -> str:
    attacked = any(map(tables.is_attacked, rows))
    frames = [tables.leaderboard(rows), tables.attacks(rows), tables.cells(rows)]
    note = f"% needs \\usepackage{{booktabs}}; percent.{f' {tables.AVERAGED}' * attacked}\n"
    frames = frames if attacked else [tables.unattacked(rows)]
    return "\n".join([note, *(str(tables.render(frame, "latex")) for frame in frames)])
