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
from typing import TYPE_CHECKING, Any

from . import tables
from .rows import CONTEXT, Row, flatten, number
from .statistics import summarise

if TYPE_CHECKING:
    from markupsafe import Markup

Record = Mapping[str, Any]
Pictures = Mapping[str, Mapping[str, Any]]
Figures = Sequence[Mapping[str, Any]]

TITLE = "Backdoor leaderboard"
SHADE_FULL = 0.2  # the ACC drop that is shaded darkest

_PNG = b"\x89PNG\r\n\x1a\n"
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    const sort = () => {
      const up = head.getAttribute("aria-sort") === "none"
        ? !head.classList.contains("n") : head.getAttribute("aria-sort") === "descending";
      heads.forEach(other => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => row.cells[column].dataset.v ?? "";
      const numeric = head.classList.contains("n");
      const rows = [...table.tBodies[0].rows].sort((one, two) => {
        const a = value(one), b = value(two);
        if (a === "" || b === "") return (a === "") - (b === "");
        return (numeric ? a - b : a.localeCompare(b)) * (up ? 1 : -1);
      });
      table.tBodies[0].append(...rows);
    };
    head.tabIndex = 0;
    head.setAttribute("aria-sort", "none");
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
    });
  });
}
"""


@dataclass(frozen=True)
class Tile:
    """One defense against one attack in the matrix: percent, and how dark each half is shaded."""

    acc: str = ""
    asr: str = ""
    acc_shade: float = 0.0  # in [0, 1]: accuracy lost, of SHADE_FULL
    asr_shade: float = 0.0  # in [0, 1]: ASR
    note: str = ""  # what went wrong; never empty where there are no numbers
    hint: str = ""  # the cell in words


@dataclass(frozen=True)
class Matrix:
    threats: tuple[tuple[str, int], ...]  # (threat model, how many columns it spans)
    attacks: tuple[str, ...]
    lines: tuple[tuple[str, bool, tuple[Tile, ...]], ...]  # (defense, is a null method, tiles)


@dataclass(frozen=True)
class Section:
    """What the page shows of one board, data set, model and recipe."""

    title: str
    leaderboard: tables.View
    matrix: Matrix
    attacks: tables.View
    published: tables.View
    hiding: tables.View
    weak: tables.View


def build_page(
    records: Iterable[Record],
    pictures: Pictures,
    metrics: Sequence[Mapping[str, str]] = (),
    title: str = TITLE,
    command: str = "",
    published: Figures = (),
) -> str:
    """The leaderboard as one HTML page that requests nothing: styles, script, pictures inline.

    pictures: attack's short name -> {"images": [{"clean": png, "triggered": png, "difference":
    png, "label": text}], "caption": text, "psnr": dB}, the pngs as bytes.
    metrics: the definitions to print, each with "name", "definition", "unit" and "source".
    published: what papers report, as of `tables.published`.
    The same records give the same bytes, in whatever order. Raises ValueError without records.
    """
    from jinja2 import Environment, StrictUndefined

    chosen = _unique(records)
    rows = [flatten(record) for record in chosen]
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    template = files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        title=tables.clean_text(title),
        facts=_facts(chosen, rows, command),
        sections=_sections(rows, published),
        no_null=not any(row["null"] for row in rows),
        averaged=tables.AVERAGED,
        gallery=_gallery(rows, pictures),
        failures=tables.view(tables.failures(rows)),
        flags=_flags(chosen),
        metrics=metrics,
        cells=_provenance(rows),
        measures=tables.view(tables.measures(rows)),
        script=_SCRIPT,
        script_digest=digest,
    )


def write_leaderboard(
    records: Iterable[Record],
    pictures: Pictures,
    out_dir: str | os.PathLike[str],
    metrics: Sequence[Mapping[str, str]] = (),
    title: str = TITLE,
    command: str = "",
    published: Figures = (),
) -> list[Path]:
    """Write a leaderboard's files into `out_dir` and return their paths.

    leaderboard.md    the tables to read
    leaderboard.csv   every attack and defense, mean and sd over seeds, exact
    results.json      every flat row, exact
    leaderboard.tex   booktabs tables
    index.html        the page of `build_page`

    Each file appears whole or not at all; the same records give the same bytes.
    """
    import pandas as pd

    chosen = _unique(records)
    page = build_page(chosen, pictures, metrics, title, command, published)
    rows = [flatten(record) for record in chosen]
    everything = [
        frame for frame in (tables.cells(rows), tables.not_established(rows)) if len(frame)
    ]
    contents = {
        "leaderboard.md": _markdown(rows, metrics, title, command, published),
        "leaderboard.csv": tables.render(pd.concat(everything), "csv"),
        "results.json": tables.render(tables.current(rows), "json"),
        "leaderboard.tex": _latex(rows),
        "index.html": page,
    }
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder / name, str(text)) for name, text in contents.items()]


def _breakable(name: str) -> Markup:
    """The name, escaped, free to break where a spec string has a joint."""
    from markupsafe import Markup

    return Markup("<wbr>").join(re.split(r"(?<=[:,_/])(?=[^\s])", name))


def _write(path: Path, text: str) -> Path:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(text.encode("utf-8", "replace"))  # a lone surrogate is no character
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _unique(records: Iterable[Record]) -> list[Record]:
    """The records by cell, each key once."""
    keyed: dict[str, tuple[Row, Record]] = {}
    for record in records:
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
            leaderboard=tables.view(tables.leaderboard(group)),
            matrix=_matrix(group),
            attacks=tables.view(tables.attacks(group)),
            published=tables.view(tables.published(group, published)),
            hiding=tables.view(tables.hiding(group)),
            weak=tables.view(tables.not_established(group)[[*tables.WEAK_VIEW]]),
        )
        for context, group in groups.items()
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
    if not done:
        return Tile(note=note or "not measured", hint=f"{hint}: {note}")
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
            entry = found.setdefault(
                flag["name"],
                {"meaning": flag.get("meaning", ""), "remedy": flag.get("remedy", ""), "cells": []},
            )
            entry["cells"].append(tables.clean_text(cell))
    return [{"name": name, **found[name]} for name in sorted(found)]


def _provenance(rows: list[Row]) -> list[dict[str, Any]]:
    return [
        row
        | {
            "status": row["status"].replace("_", " "),
            "acc_text": tables.percent(row["acc"]),
            "asr_text": tables.percent(row["asr"]),
            "acc_range": _range(row["acc_low"], row["acc_high"]),
            "asr_range": _range(row["asr_low"], row["asr_high"]),
        }
        for row in rows
    ]


def _range(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return f"{tables.percent(low)} to {tables.percent(high)}"


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
    parts.append(f"{tables.AVERAGED}\n")
    parts.append(str(tables.render(tables.leaderboard(rows), "md")))
    for heading, frame in (
        ("Attacks", tables.attacks(rows)),
        ("Beside published figures", tables.published(rows, published)),
        ("How far stamped images are from the target class (MMD²)", tables.hiding(rows)),
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
    frames = (tables.leaderboard(rows), tables.attacks(rows), tables.cells(rows))
    note = f"% needs \\usepackage{{booktabs}}; percent. {tables.AVERAGED}\n"
    return "\n".join([note, *(str(tables.render(frame, "latex")) for frame in frames)])
