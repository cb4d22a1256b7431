"""What `arena list`, `arena info` and `arena show` say: plain data first, text for people after.

Only the models need torch; everything else is read without importing it.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from arena.boards import QUICKSTART, Board, read_board
from arena.core.inversion.families import families
from arena.core.measures import COLUMNS, measures
from arena.core.metric_list import METRICS
from arena.core.registry import BadInput, Field, Method, attacks, defenses, nearest, show_value
from arena.data.catalogue import CATALOGUE, DatasetInfo

Line = dict[str, Any]

BOARDS = Path("leaderboards")  # below the current folder
LIBRARIES = {
    "timm:NAME": "any image classifier of timm, newly initialised",
    "torchvision:NAME": "any image classifier of torchvision, newly initialised",
}
_DETAILS = {"fields", "splits", "version", "clean_share", "file"}  # for `info` and for scripts
_TALLEST = 4  # lines that a cell may take; the rest is an ellipsis


# --------------------------------------------------------------------------------------- the lists


def _attacks() -> list[Line]:
    return [_attack_line(method) for method in attacks.describe_all()]


def _attack_line(method: Method) -> Line:
    return {
        "name": method.name,
        "summary": method.summary,
        "threat": _threat(method),
        "scope": list(method.traits.get("scopes", ("universal",))),
        "labels": method.traits.get("labels", "changed"),
        "trigger": method.traits.get("trigger_kind", "static"),
        "fields": _defaults(method.fields),
    }


def _threat(method: Method) -> str:
    if "controls training" in method.powers:
        return "controls training"
    return str(method.traits.get("threat", "poisons data"))


def _defenses(power: str | None = None) -> list[Line]:
    return [
        {
            "name": method.name,
            "summary": method.summary,
            "null": bool(method.traits.get("null", False)),
            "powers": list(method.powers),
            "fields": _defaults(method.fields),
        }
        for method in defenses.describe_all()
        if power is None or power in method.powers
    ]


def _triggers() -> list[Line]:
    return [
        {
            "name": method.name,
            "summary": method.summary,
            "size in": method.traits["unit"],
            "fields": _defaults(method.fields),
        }
        for method in families.describe_all()
    ]


def _measures() -> list[Line]:
    return [
        {"name": method.name, "summary": method.summary, "fields": _defaults(method.fields)}
        for method in measures.describe_all()
    ]


def _defaults(fields: tuple[Field, ...]) -> list[str]:
    return [f"{field.name}={show_value(field.default)}" for field in fields]


def _datasets() -> list[Line]:
    return [
        {
            "name": info.name,
            "summary": info.summary,
            "classes": info.classes,
            "side": info.side,
            "channels": info.channels,
            "splits": info.splits,
            "hub": info.hub,
        }
        for info in CATALOGUE.values()
    ]


def _models() -> list[Line]:
    from arena.core import models

    known = {name: models.info(name) for name in models.names()}
    return [
        {"name": name, "summary": network.summary, "source": network.source}
        for name, network in known.items()
    ] + [{"name": name, "summary": text, "source": ""} for name, text in LIBRARIES.items()]


def _metrics() -> list[Line]:
    return [metric._asdict() for metric in (*METRICS, *COLUMNS)]


def _boards() -> list[Line]:
    return [
        {
            "name": board.name,
            "summary": board.title,
            **{k: v for k, v in board.definition().items() if k not in ("title", "timeout")},
            "file": file,
        }
        for board, file in _known_boards()
    ]


def _known_boards() -> Iterator[tuple[Board, str]]:
    """Every board and its file; the built-in one has none. Raises BadInput for a broken file."""
    yield QUICKSTART, ""
    for path in sorted(BOARDS.glob("*/board.toml")):
        yield read_board(path), str(path)


LISTS: dict[str, Callable[[], list[Line]]] = {
    "attacks": _attacks,
    "defenses": _defenses,
    "scanners": lambda: _defenses("scans"),
    "detectors": lambda: _defenses("detects"),
    "triggers": _triggers,
    "measures": _measures,
    "datasets": _datasets,
    "models": _models,
    "metrics": _metrics,
    "boards": _boards,
}
"""What can be listed -> its lines as plain data, each with a `name`."""


# ------------------------------------------------------------------------------------- one by name


def describe(name: str) -> Line:
    """Everything of that name, as plain data: {"name": …, "found": [one entry per kind]}.

    Models are looked up (and torch imported) only where nothing else has the name. Raises BadInput
    with the nearest name of all.
    """
    found: list[Line] = []
    for registry in (attacks, defenses, families, measures):
        if name in registry.names():
            found.append(_method(registry.describe(name)))
    if name in CATALOGUE:
        found.append(_dataset(CATALOGUE[name]))
    found += [
        {
            "kind": "metric",
            "name": metric.name,
            "summary": metric.definition,
            "unit": metric.unit,
            "better": metric.better,
            "source": metric.source,
        }
        for metric in (*METRICS, *COLUMNS)
        if metric.name == name
    ]
    found += [
        {
            "kind": "board",
            "name": name,
            "summary": board.title,
            **{k: v for k, v in board.definition().items() if k != "title"},
            "example": f"arena run {file}" if file else f"arena {name}",
        }
        for board, file in _known_boards()
        if board.name == name
    ]
    return {"name": name, "found": found or [_model(name)]}


def _method(method: Method) -> Line:
    attack = method.kind == "attack"
    shown = [field for field in method.fields if field.default is not None][:2]
    example = ",".join(f"{field.name}={show_value(field.default)}" for field in shown)
    about = {k: v for k, v in _attack_line(method).items() if k in ("scope", "labels", "trigger")}
    return {
        "kind": method.kind,
        "name": method.name,
        "summary": method.summary,
        "powers": list(method.powers),
        **({"threat": _threat(method), **about} if attack else {}),
        "null": bool(method.traits.get("null", False)),
        "docstring": method.doc,
        "source": method.source,
        "departs": method.departs,
        "fields": [
            {
                "name": field.name,
                "type": field.type,
                "default": field.default,
                "under": dict(field.under),
                "range": field.range,
                "doc": field.doc,
                "source": field.source,
            }
            for field in method.fields
        ],
        "example": " or ".join(
            f"{words} {method.name}{':' if example else ''}{example}" for words in _asked(method)
        ),
        "file": method.path,
    }


def _asked(method: Method) -> list[str]:
    """The words of a command line before the method's spec, for each of its powers."""
    if method.kind == "trigger family":
        return ["arena distance CELL --method"]
    if method.kind == "measure":
        return ["arena run --measure"]
    powers = {
        "repairs": "-D",
        "scans": "arena scan CELL --method",
        "detects": "arena detect CELL --method",
    }
    return [words for power, words in powers.items() if power in method.powers] or ["-a"]


def _dataset(info: DatasetInfo) -> Line:
    path = "PATH" if info.takes_path else ""
    fields = [
        {
            "name": name,
            "type": "int",
            "default": info.side if name == "side" and default is None else default,
            "range": f"[{low}, {high}]",
            "doc": "pixels; images are resized" if name == "side" and info.name != "signs" else "",
            "source": "",
        }
        for name, (low, high, default) in info.fields.items()
    ]
    example = [path] if path else []
    if fields:
        example.append(f"{fields[0]['name']}={fields[0]['default'] or 64}")
    return {
        "kind": "data set",
        "name": info.name,
        "summary": info.summary,
        "classes": info.classes,
        "class_names": list(info.class_names),
        "side": info.side,
        "channels": info.channels,
        "splits": info.splits,
        "hub": info.hub,
        "licence": info.licence,
        "fields": fields,
        "example": f"-d {info.name}:{','.join(example)}",
    }


def _model(name: str) -> Line:
    from arena.core import models

    library = name.partition(":")[0] + ":NAME" in LIBRARIES
    if not library and name not in models.names():
        raise BadInput(f"Nothing here is called {name!r}; {nearest(name, _every_name())}")
    try:
        network = models.info(name)
    except ValueError as error:
        raise BadInput(str(error)) from error
    return {
        "kind": "model",
        "name": name,
        "summary": network.summary,
        "smallest_side": network.sides[0],
        "largest_side": network.sides[1],
        "levels": dict(zip(models.LEVELS, network.levels, strict=True)),
        "head": network.head,
        "recipe_changes": {recipe: dict(changes) for recipe, changes in network.overrides.items()},
        "source": network.source,
        "example": f"-m {name}",
    }


def _every_name() -> set[str]:
    return {line["name"] for make in LISTS.values() for line in make()}


# ---------------------------------------------------------------------------------- text for people


def width() -> int:
    """Characters of a line: the terminal's, or 120 where there is none."""
    return shutil.get_terminal_size((120, 24)).columns


def columns(lines: list[Line]) -> str:
    """An aligned table of `lines`, fitted to the terminal; long cells are wrapped, then cut."""
    names = [name for name in lines[0] if name not in _DETAILS and name != "summary"]
    if "summary" in lines[0]:
        names.append("summary")  # prose stands last
    table = [names, *([_text(line.get(name)) for name in names] for line in lines)]
    places = range(len(names))
    sizes = [max(len(row[at]) for row in table) for at in places]
    words = [max(len(word) for row in table for word in row[at].split() or [""]) for at in places]
    room = width() - 2 * (len(names) - 1)
    while sum(sizes) > room and sizes != words:  # words stay whole: rather too wide than unreadable
        spare = [at for at in places if sizes[at] > words[at]]
        sizes[max(spare, key=sizes.__getitem__)] -= 1
    return "\n".join(_row(row, sizes) for row in table)


def _row(cells: list[str], widths: list[int]) -> str:
    parts = [_wrapped(cell, size) for cell, size in zip(cells, widths, strict=True)]
    return "\n".join(
        "  ".join(f"{part:<{size}}" for part, size in zip(line, widths, strict=True)).rstrip()
        for line in zip_longest(*parts, fillvalue="")
    )


def _wrapped(text: str, size: int) -> list[str]:
    return textwrap.wrap(text, max(size, 1), max_lines=_TALLEST, placeholder=" …") or [""]


def _text(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case list() | tuple():
            return ", ".join(map(_text, value)) or "-"
        case Mapping():
            return ", ".join(f"{k} {_text(v)}" for k, v in value.items()) or "-"
    return str(value)


def page(found: Line) -> str:
    """What `describe` found, to read."""
    return "\n\n\n".join(_entry(entry) for entry in found["found"])


def _entry(entry: Line) -> str:
    skipped = {"kind", "name", "summary", "docstring", "fields", "source", "departs", "example"}
    blocks = [f"{entry['name']} ({entry['kind']})"]
    about = entry.get("docstring") or entry["summary"]
    if about:
        blocks.append(textwrap.indent(about, "  "))
    facts = {k: v for k, v in entry.items() if k not in skipped and v not in (None, "", [], {})}
    if not entry.get("docstring") and entry.get("source"):
        facts["source"] = entry["source"]
    if facts:
        blocks.append(_facts({k.replace("_", " "): _text(v) for k, v in facts.items()}))
    if entry.get("fields"):
        blocks.append("Fields:\n" + "\n".join(_field(field) for field in entry["fields"]))
    if entry.get("example"):
        blocks.append(f"Example: {entry['example']}")
    return "\n\n".join(blocks)


def _field(field: Line) -> str:
    limits = f" in {field['range']}" if field["range"] else ""
    under = "".join(f", {show_value(v)} under {k}" for k, v in field.get("under", {}).items())
    head = f"  {field['name']}: {field['type']} = {show_value(field['default'])}{under}{limits}"
    about = field["doc"] + (f" (source: {field['source']})" if field["source"] else "")
    return "\n".join([head, *_indented(about)])


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, width(), initial_indent=" " * 6, subsequent_indent=" " * 6)


def _facts(facts: Mapping[str, str]) -> str:
    """Aligned `name  value` lines, wrapped."""
    margin = max(map(len, facts)) + 4
    room = max(width() - margin, 20)
    return "\n".join(
        f"  {name:<{margin - 2}}" + f"\n{' ' * margin}".join(_lines_of(text, room))
        for name, text in facts.items()
    )


def _lines_of(text: str, room: int) -> list[str]:
    """Lines; a hash that is longer than the room stays whole, to be copied."""
    return textwrap.wrap(text, room, break_long_words=False) or ["-"]


def cell(record: Mapping[str, Any]) -> str:
    """One record, to read: outcome, metrics, budget, flags, then where everything came from."""
    attack, defense = record["attack"], record["defense"]
    reason = f": {record['reason']}" if record.get("reason") else ""
    blocks = [
        f"{defense['short']} against {attack['short']}, {record['model']} on "
        f"{record['dataset']['name']}, seed {record['seed']}\n"
        f"cell {record['key']}\n"
        f"status {record['status']}{reason}"
    ]
    for title, facts in (
        ("Metrics", _metric_lines(record)),
        ("Budget", {k: _number(v) for k, v in (record.get("budget") or {}).items()}),
    ):
        if facts:
            blocks.append(f"{title}\n{_facts(facts)}")
    if measured := record.get("measures"):
        said = {found["short"]: _measure_line(found) for found in measured.values()}
        blocks.append(f"Measures\n{_facts(said)}")
    if probes := record.get("probes"):
        said = {
            name: f"true class {_number(p['ra'])}, target {_number(p['asr'])}, {p['images']} images"
            for name, p in probes.items()
        }
        blocks.append(f"Near misses, before any defense\n{_facts(said)}")
    if mmd := record.get("mmd"):
        said = {
            level: ", ".join(f"{name} {_number(value)}" for name, value in row.items())
            for level, row in mmd.items()
        }
        blocks.append(
            "MMD² to clean target-class features, before any defense (stamped images, the class "
            f"itself, the nearest other class)\n{_facts(said)}"
        )
    if parts := record.get("parts"):
        said = {
            part["name"]: ", ".join(
                [*(f"{k.replace('_', ' ')} {_number(v)}" for k, v in part["figures"].items()), key]
            )
            for key, part in parts.items()
        }
        blocks.append(f"Trained parts, on images held out\n{_facts(said)}")
    if flags := record.get("flags"):
        marks = {f["name"]: f"{f['meaning']} Remedy: {f['remedy']}" for f in flags}
        blocks.append(f"Flags\n{_facts(marks)}")
    blocks.append(f"Methods\n{_facts(_method_lines(attack, defense))}")
    blocks.append(f"Provenance\n{_facts(_provenance(record))}")
    if record.get("details"):
        blocks.append("Details\n" + textwrap.indent(str(record["details"]).rstrip(), "  "))
    return "\n\n".join(blocks)


def _metric_lines(record: Mapping[str, Any]) -> dict[str, str]:
    metrics, intervals = record.get("metrics") or {}, record.get("intervals") or {}
    lines = {}
    for name, value in metrics.items():
        if name.endswith("_before") and name.removesuffix("_before") in metrics:
            continue
        text = _number(value)
        if f"{name}_before" in metrics:
            text = f"{_number(metrics[f'{name}_before'])} -> {text}"
        if interval := intervals.get(name):
            text += f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})"
        lines[name] = text
    return lines


def _measure_line(found: Mapping[str, Any]) -> str:
    """`distance 3.1000 -> 4.2000, distance gain 0.3548, …`, and how it was found; or why not."""
    if found["status"] != "ok":
        return f"failed: {found['reason']}"
    columns, after = found["columns"], found["after"]
    told = []
    for name, value in columns.items():
        if name.endswith("_before"):
            continue
        before = f"{_number(columns[f'{name}_before'])} -> " if f"{name}_before" in columns else ""
        told.append(f"{name.replace('_', ' ')} {before}{_number(value)}")
    told += [f"{after[name]} {name}" for name in after if name in _COUNTED]
    return f"{', '.join(told)} ({after['seconds']:.0f} s on {after['device']})"


_COUNTED = ("images", "pairs", "unreached")  # figures of readings that are numbers of something


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else _text(value)


def _method_lines(attack: Mapping[str, Any], defense: Mapping[str, Any]) -> dict[str, str]:
    return {
        "attack": attack["spec"],
        "attack code": attack["code"],
        **{k: _text(attack[k]) for k in ("threat", "scope", "labels", "trigger") if k in attack},
        "defense": defense["spec"],
        "defense code": defense["code"],
    }


def _provenance(record: Mapping[str, Any]) -> dict[str, str]:
    data, weights = record["dataset"], record.get("weights") or {}
    known = {
        "board": f"{record['board']['name']} version {record['board']['version']}",
        "data": f"{data['name']}: {data['train']} training, {data['test']} test images",
        "data source": data["source"],
        "fingerprint": data["fingerprint"],
        "recipe": f"{record['recipe']}: {_text(record['plan'])}",
        "clean share": _text(record["clean_share"]),
        "clean rows": record.get("clean_rows"),
        "poisoned rows": record.get("poisoned_rows"),
        "seed": _text(record["seed"]),
        "weights before": weights.get("before"),
        "weights after": weights.get("after"),
        **{k.replace("_", " "): v for k, v in (record.get("parents") or {}).items()},
        "isolation": ", ".join(filter(None, map(record.get, ("isolation", "isolation_note")))),
        "hardware": _text(record["hardware"]),
        "versions": _text(record["versions"]),
        "commit": record.get("commit"),
        "started": record.get("started"),
        "finished": record.get("finished"),
        "command": record.get("command"),
    }
    return {name: _text(value) for name, value in known.items() if value not in (None, "")}


def distances(found: Mapping[str, Any]) -> str:
    """What `arena distance` found, as a table: rows are victims, columns targets."""
    names = found["classes"]
    labels = [f"{place} {name}" for place, name in enumerate(names)]
    wide = min(30, max(map(len, labels)))
    head = " " * wide + "".join(f"{f'to {place}':>8}" for place in range(len(names)))
    lines = [f"{found['model']}: {found['method']} distances, {found['unit']}", "", head]
    for label, row in zip(labels, found["distances"], strict=True):
        cells = "".join(f"{'·' if v is None else format(v, '.1f'):>8}" for v in row)
        lines.append(f"{label[:wide]:<{wide}}{cells}")
    lines.append("")
    mean = found["mean"]
    said = "no pair has a distance" if mean is None else f"mean {mean:.2f}"
    if found["also"]:
        said += f"; {found['also']['mean']:.2f} as {found['also']['unit']}"
    lines.append(f"{said} ({found['pairs']} pairs, {found['restarts']} restarts each)")
    if mean is not None and (start := found["start"]):
        rows = [start[s] for s, row in enumerate(found["distances"]) for v in row if v is not None]
        lines.append(f"images differ by {sum(rows) / len(rows):.2f} before anything is learned")
    if missing := found["unreached"]:
        which = ", ".join(f"{names[s]} to {names[t]}" for s, t in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        lines.append(
            f"no trigger reached {found['asked_asr']:.0%} for {len(missing)}: {which}{more}"
        )
    if found.get("improvement") is not None:
        before = found["baseline"]
        lines.append(
            f"{found['improvement']:+.1%} against {before['model']} (mean of the pairs' ratios)"
        )
    if "picture" in found:
        lines.append(f"heat map: {found['picture']}")
    return "\n".join(lines)


def trigger(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """What `arena invert` found, as lines."""
    victim = "all classes" if found["victim"] is None else names[found["victim"]]
    lines = [f"{found['model']}: {found['method']} trigger, {victim} to {names[found['target']]}"]
    size = "none reached the success asked for; this is the best of them"
    if found["reached"]:
        size = f"{found['size']:.2f} {found['unit']}"
    facts = {
        "size": size,
        "pixels changed": f"{found['pixels']}, by up to {255 * found['largest_change']:.0f} of 255",
        "ASR inverted on": f"{found['asr']:.1%} of {found['samples']} images",
        "ASR on test": f"{found['test_asr']:.1%} of {found['test_images']} images "
        f"({found['clean_asr']:.1%} without)",
    }
    for key, unit in (("rescaled", ""), ("rotated", "°"), ("pruned", " px")):
        if found[key]:
            facts[f"ASR {key}"] = ", ".join(f"{k}{unit}: {v:.1%}" for k, v in found[key].items())
    facts["picture"], facts["trigger"] = found["files"]["png"], found["files"]["safetensors"]
    return "\n".join([*lines, "", _facts(facts)])


def verdict(found: Mapping[str, Any]) -> str:
    """What `arena scan` found, as lines."""
    said = "no class stands out"
    if found["backdoored"]:
        said = f"backdoored: class {found['target']} ({found['target_name']}) is suspected"
        if found["victim"] is not None:
            said += f", for images of class {found['victim']} ({found['victim_name']})"
    lines = [
        f"{found['model']}: {said}",
        f"{found['method']}: score {found['score']:.2f}, suspicious above {found['threshold']:g}; "
        f"{found['clean_images']} clean images, {found['budget']['seconds']:.0f} s",
        "",
    ]
    wide = max(map(len, found["classes"]))
    for name, index in zip(found["classes"], found["per_class"] or [], strict=False):
        said = "no trigger" if index is None else f"{index:6.2f}"
        mark = " <" if index is not None and index > found["threshold"] else ""
        lines.append(f"  {name:<{wide}}  {said}{mark}")
    if "picture" in found:
        lines += ["", f"trigger: {found['picture']}"]
    return "\n".join(lines)


def detections(found: Mapping[str, Any]) -> str:
    """What `arena detect` found, as a table."""
    lines = [
        f"{found['model']}: inputs with the answer {found['target_name']!r}, "
        f"means of {found['draws']} draws",
        "",
        f"{'method':<24}{'level':<9}{'n':>5}{'ratio':>7}{'F1':>8}{'±':>7}{'all':>7}"
        f"{'prec.':>8}{'recall':>8}{'AUROC':>8}",
    ]
    for row in found["rows"]:
        spread = "" if row["f1_spread"] is None else f"{row['f1_spread']:.3f}"
        lines.append(
            f"{row['method'][:23]:<24}{row['level']:<9}{row['n']:>5}{row['ratio']:>7g}"
            f"{row['f1']:>8.3f}{spread:>7}{row['everything']:>7.3f}"
            f"{row['precision']:>8.3f}{row['recall']:>8.3f}{row['auroc']:>8.3f}"
        )
    rules = {row["method"]: row["rule"] for row in found["rows"]}
    lines += ["", "all: F1 of flagging everything. Flags are set by what nobody knows in practice:"]
    lines += [f"  {name}: {rule}" for name, rule in rules.items()]
    return "\n".join(lines)


_OWN_ANSWERS = (
    "The images have no labels; the model's own answers stand for them, so accuracy is how often a "
    "repaired model agrees with it."
)


def repairs(found: Mapping[str, Any]) -> str:
    """What `arena repair` found, as a page of Markdown."""
    scanned = found["scanner"] is not None
    head = ["defense", "ACC %", "drop"] + (["suspicion", "verdict"] if scanned else [])
    head += ["seconds", "MB", "images forward", "backward", "note"]
    rows = [["(none)", *_repaired(found["before"], scanned), *[""] * 5]]
    for row in found["repairs"]:
        name = f"**{row['defense']}**" if row["defense"] == found["recommended"] else row["defense"]
        if row["status"] != "ok":
            rows.append([name, *[""] * (len(head) - 2), row["reason"].replace("|", "\\|")])
            continue
        rows.append([name, *_repaired(row, scanned), *_spent(row["budget"]), ""])
    table = [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]
    looked = _SCANNED.get(found["scanned_images"], "")
    chosen, failed = found["recommended"], any(r["status"] != "ok" for r in found["repairs"])
    advice = f"Recommended: {chosen}" if chosen else "Nothing is recommended"
    lines = [
        f"# Repair of {found['model']}",
        "",
        f"{found['data']}; {found['clean_images']} clean images to repair with; accuracy on "
        f"{found['validation_images']} others.",
        *([f"Scanner: {found['scanner']}, {looked}."] if scanned else []),
        *([_OWN_ANSWERS] if found["labels"] == "model" else []),
        "",
        *table,
        "",
        f"{advice}: {found['because']}{'' if found['because'].endswith('?') else '.'}",
        "",
        *([] if chosen else [_ALL_THE_SAME, ""]),
        *([f"Could work, too: {', '.join(found['possible'])}.", ""] if failed else []),
        f"Weights before: sha256 {found['weights']}.",
    ]
    lines += [
        f"After {row['defense']} ({row['spec']}): sha256 {row['weights']}."
        for row in found["repairs"]
        if row["status"] == "ok"
    ]
    return "\n".join(lines)


_SCANNED = {
    "others": "on the images held out, which no repair saw",
    "same": "on the repairs' own images, since too few are held out: what a repair unlearned on "
    "these is harder to find there, so that verdicts after it flatter",
}
_ALL_THE_SAME = (
    "To have the weights of one all the same: the same command with that defense alone, without "
    "--scan, and with --max-drop 1; what was computed is kept."
)


def _spent(budget: Mapping[str, Any]) -> list[str]:
    """Seconds, peak memory in MB, and how many images went through the network either way."""
    return [
        f"{budget['seconds']:.0f}",
        "" if budget["peak_memory_mb"] is None else f"{budget['peak_memory_mb']:.0f}",
        f"{budget['forward_images']:,}",
        f"{budget['backward_images']:,}",
    ]


def _repaired(row: Mapping[str, Any], scanned: bool) -> list[str]:
    drop = f"{100 * row['accuracy_drop']:.1f}" if "accuracy_drop" in row else ""
    cells = [f"{100 * row['accuracy']:.1f}", drop]
    if scanned:
        verdict = row["scan"]
        said = f"backdoor to {verdict['target_name']}" if verdict["backdoored"] else "nothing found"
        cells += [f"{verdict['score']:.2f}", said]
    return cells
