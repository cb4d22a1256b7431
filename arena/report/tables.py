"""Tables from flat rows: leaderboard, cells, attacks, failures; and their five formats.

A frame holds exact numbers (fractions in [0, 1], `x_sd` beside `x`); only `view` rounds them, and
the human formats (table, md, latex, and the page) all show that one view.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from .rows import (
    BUDGET,
    COLUMNS,
    CONTEXT,
    INTERVALS,
    LEVELS,
    MEASURED,
    METRICS,
    UNITS,
    Row,
    aligned,
    measured_columns,
    number,
)
from .statistics import LEVEL, Summary, holm, over_attacks, paired_p, smallest_p, summarise

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table
    from rich.text import Text

FORMATS = ("table", "md", "csv", "json", "latex")
AVERAGED = (
    "Mean over attacks of the means over seeds; ± is the standard deviation over seeds of each "
    "seed's average over attacks. Only established attacks count; a collapsed model counts with "
    "the numbers it was left with. Best mean DER first; defenses with collapsed, failed or missing "
    "cells after all others, since a low ASR of a wrecked model is no repair."
)
MISSING = "–"

_OUTCOME = ("acc", "asr", "ra", "der", "acc_drop", "twin_acc_drop", "seconds")
_VICTIM = (
    "acc_before",
    "asr_before",
    "clean_twin_acc",
    "clean_twin_asr",
    "psnr",
    "ssim",
    "l2",
    "linf",
)
_SHORTS = ("attack_short", "defense_short", "null")
_CLEAN = ("acc", "acc_drop")  # of the twin


# ------------------------------------------------------------------------------------ selection


def current(rows: Iterable[Row]) -> list[Row]:
    """One row per cell, sorted. Of rows that differ only in code, the last finished stands.

    Short names that would stand for two specs (a default changed) give way to the full spec.
    """
    latest: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: (str(row["finished"]), row["key"])):
        latest[*_context(row), row["attack"], row["defense"], row["seed"]] = row
    chosen = sorted(latest.values(), key=_order)
    for kind in ("attack", "defense"):
        specs: dict[str, set[str]] = {}
        for row in chosen:
            specs.setdefault(row[f"{kind}_short"], set()).add(row[kind])
        chosen = [
            row | {f"{kind}_short": row[kind]} if len(specs[row[f"{kind}_short"]]) > 1 else row
            for row in chosen
        ]
    return chosen


def _context(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CONTEXT)


def _order(row: Row) -> tuple[Any, ...]:
    names = (*map(str, _context(row)), row["attack"], row["defense"])
    return (*names, row["seed"] if isinstance(row["seed"], int) else 0, str(row["seed"]))


def _victim(row: Row) -> tuple[Any, ...]:
    return (*_context(row), row["attack"], row["seed"])


def _by_establishment(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(rows whose attack was established, the others). It is a property of the victim."""
    weak = {_victim(row) for row in rows if row["status"] == "not_established"}
    return (
        [row for row in rows if _victim(row) not in weak],
        [row for row in rows if _victim(row) in weak],
    )


def _groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def established(rows: list[Row]) -> list[Row]:
    """The rows whose attack worked on their victim."""
    return _by_establishment(rows)[0]


def measured(row: Row) -> bool:
    """Whether the row's numbers enter the means: a collapsed model has numbers, and they count."""
    return row["status"] in ("ok", "collapsed")


def is_attacked(row: Row) -> bool:
    """Whether the row's model was attacked: "none" rows are the clean twin itself."""
    return bool(row["attack_name"] != "none")


# --------------------------------------------------------------------------------------- tables


def leaderboard(rows: Iterable[Row]) -> pd.DataFrame:
    """One line per board, data set, model, recipe and defense; in each group best mean DER first,
    and defenses with collapsed, failed or missing cells after all others.

    The means are those of `statistics.over_attacks` over the established attacks. `notes` counts
    what went wrong among the cells that the line should have; no line is left out for it.
    """
    strong, weak = _by_establishment(current(rows))
    expected = {
        context: {(row["attack"], row["seed"]) for row in group if is_attacked(row)}
        for context, group in _groups(strong, _context).items()
    }
    extra = [name for name in measured_columns(strong + weak) if not name.endswith("_before")]
    lines: list[Row] = []
    scores: dict[tuple[Any, str], dict[tuple[str, int], float]] = {}
    everyone = _groups(strong + weak, lambda row: (_context(row), row["defense"]))
    counting = _groups(filter(is_attacked, strong), lambda row: (_context(row), row["defense"]))
    for (context, defense), group in everyone.items():
        counted = counting.get((context, defense), [])
        done = [row for row in counted if measured(row)]
        pairs = expected.get(context, set())
        absent = len(pairs) - len(counted)
        line = dict(zip(CONTEXT, context, strict=True)) | {"defense": defense}
        for name in (*_OUTCOME, *_numbers(extra)):
            values = {(row["attack"], row["seed"]): row.get(name) for row in done}
            line |= _spread(name, over_attacks(values))
        line |= _units(extra, done)
        scores[context, defense] = {
            (row["attack"], row["seed"]): row["der"] for row in done if row["der"] is not None
        }
        line |= {
            "unsound": absent > 0 or any(row["status"] != "ok" for row in counted),
            "attacks": len({row["attack"] for row in done}),
            "seeds": len({row["seed"] for row in done}),
            "notes": _notes(counted, len(pairs), absent) if pairs else "no attack was established",
        }
        lines.append(line | {name: group[0][name] for name in ("defense_short", "null")})
    lines.sort(
        key=lambda line: (
            *(str(line[name]) for name in CONTEXT),
            line["unsound"],
            *(_last(line["der"], -1), _last(line["asr"], 1), _last(line["acc"], -1)),
            line["defense"],
        )
    )
    for context, group in _groups(lines, _context).items():
        _stand(group, [scores[context, line["defense"]] for line in group])
    columns = (*CONTEXT, "defense", *_paired(_OUTCOME), *_columns(extra))
    columns += ("attacks", "seeds", "notes", *_STANDING)
    return _frame(lines, (*columns, "defense_short", "null"))


_STANDING = ("standing", "p_best", "pairs")


def _stand(lines: list[Row], scores: list[dict[tuple[str, int], float]]) -> None:
    """Enter how each defense stands to the first, which is the best: "best", "tied" where the test
    could tell it from that and does not, or nothing. Only defenses without mishaps are compared."""
    for line in lines:
        line |= {"standing": "", "p_best": None, "pairs": 0}
    sound = [k for k, line in enumerate(lines) if not line["unsound"] and line["der"] is not None]
    if not sound:
        return
    best, *others = sound
    lines[best] |= {"standing": "best", "pairs": len(scores[best])}
    raw = []
    for place in others:
        shared = sorted(scores[best].keys() & scores[place].keys())
        pair = [[scores[k][key] for key in shared] for k in (best, place)]
        raw.append(paired_p(*pair) if shared else 1.0)
        lines[place]["pairs"] = len(shared)
    able = smallest_p(lines[best]["pairs"]) * len(others) < LEVEL  # else every defense were tied
    for place, p in zip(others, holm(raw), strict=True):
        lines[place] |= {"p_best": p, "standing": "tied" if able and p >= LEVEL else ""}


def standing_note(frame: pd.DataFrame) -> str:
    """What the marks of `leaderboard` say, and what they cannot say for lack of pairs."""
    best = frame[frame["standing"] == "best"]
    if not len(best):
        return "No defense went through without mishap, so none is marked as the best."
    pairs, compared = int(best["pairs"].max()), int(frame["p_best"].notna().sum())
    bold = "Bold: the best mean DER among defenses without mishaps."
    test = (
        f"Wilcoxon's signed-rank test over {pairs} pair{'s' * (pairs != 1)} of attack and seed, "
        f"Holm's correction for {compared} comparison{'s' * (compared != 1)}"
    )
    least = smallest_p(pairs) * compared
    if not compared:
        return f"{bold} There is no other to compare it with."
    if least >= LEVEL:
        return (
            f"{bold} Whether others differ from it significantly cannot be told: in {test}, p "
            f"cannot fall below {min(least, 1):.2g}. More seeds or attacks would tell."
        )
    return f"{bold} ≈: not significantly different from it ({test}, p ≥ {LEVEL:g})."


def cells(rows: Iterable[Row]) -> pd.DataFrame:
    """One line per data set, model, attack and defense: mean and sd over seeds.

    Attacks that were not established stand apart, in `not_established`.
    """
    chosen = current(rows)
    return _cells(_by_establishment(chosen)[0], measured_columns(chosen))


WEAK_VIEW = (
    *(*CONTEXT, "attack", "defense", "acc", "acc_sd", "asr", "asr_sd", "ra", "ra_sd", "seeds"),
    *("notes", *_SHORTS),
)
"""What is worth reading of `not_established`: a DER would credit defenses for a weak attack."""


def not_established(rows: Iterable[Row]) -> pd.DataFrame:
    """The columns of `cells` for the victims whose attack did not work: shown, never ranked."""
    chosen = current(rows)
    return _cells(_by_establishment(chosen)[1], measured_columns(chosen))


def _cells(rows: list[Row], extra: Iterable[str]) -> pd.DataFrame:
    lines: list[Row] = []
    groups = _groups(rows, lambda row: (_context(row), row["attack"], row["defense"]))
    for (context, attack, defense), group in groups.items():
        shown = [row for row in group if measured(row) or row["status"] == "not_established"]
        line = dict(zip(CONTEXT, context, strict=True))
        line |= {"threat": group[0]["threat"], "attack": attack, "defense": defense}
        for name in (*_OUTCOME, *_numbers(extra)):
            line |= _spread(name, summarise(row.get(name) for row in shown))
        line |= _units(extra, shown)
        # why an attack is weak is said once per attack, in `attacks`, not once per defense
        reasons = all(row["status"] != "not_established" for row in group)
        line |= {"seeds": len(shown), "notes": _notes(group, len(group), 0, reasons)}
        lines.append(line | {name: group[0][name] for name in _SHORTS})
    columns = (*CONTEXT, "threat", "attack", "defense", *_paired(_OUTCOME), *_columns(extra))
    return _frame(lines, (*columns, "seeds", "notes", *_SHORTS))


def attacks(rows: Iterable[Row]) -> pd.DataFrame:
    """One line per attack: the victim before any defense, its clean twin, the trigger's stealth.

    `clean_twin_asr` is the share of triggered images that the clean twin already sends to the
    target: what the trigger does without any backdoor.
    """
    chosen = current(rows)
    weak = {_victim(row) for row in _by_establishment(chosen)[1]}
    extra = [
        name
        for name in measured_columns(chosen)
        if name.endswith("_before") or name in UNITS.values()
    ]
    lines: list[Row] = []
    groups = _groups(filter(is_attacked, chosen), lambda row: (_context(row), row["attack"]))
    for (context, attack), group in groups.items():
        victims = _groups(group, _victim)
        failed = sum(victim in weak for victim in victims)
        line = dict(zip(CONTEXT, context, strict=True))
        line |= {"threat": group[0]["threat"], "attack": attack}
        # every defense repeats its victim's numbers: one value per victim
        for name in (*_VICTIM, *_numbers(extra)):
            firsts = [
                next((row[name] for row in same if row.get(name) is not None), None)
                for same in victims.values()
            ]
            line |= _spread(name, summarise(firsts))
        line |= _units(extra, group)
        why = _because(row for row in group if row["status"] == "not_established")
        note = f"not established {failed} of {len(victims)}{why}" if failed else ""
        lines.append(
            line | {"seeds": len(victims), "notes": note, "attack_short": group[0]["attack_short"]}
        )
    lines.sort(key=lambda line: (*map(str, _context(line)), line["threat"], line["attack_short"]))
    columns = (*CONTEXT, "threat", "attack", *_paired(_VICTIM), *_columns(extra))
    return _frame(lines, (*columns, "seeds", "notes", "attack_short"))


def hiding(rows: Iterable[Row]) -> pd.DataFrame:
    """One line per attack and feature level: MMD² of stamped images to the target class's features.

    Beside it what tells whether that is far: the class against itself (intra), and against the
    nearest other class (inter). SDRM, Table 2.
    """
    lines: list[Row] = []
    chosen = [row for row in current(rows) if is_attacked(row)]
    groups = _groups(chosen, lambda row: (_context(row), row["attack"]))
    for (context, attack), group in groups.items():
        victims = _groups(group, _victim).values()
        for level in LEVELS:
            line = dict(zip(CONTEXT, context, strict=True)) | {"attack": attack, "level": level}
            for kind in ("stamped", "intra", "inter"):
                values = [same[0][f"mmd_{kind}_{level}"] for same in victims]
                line |= _spread(f"mmd_{kind}", summarise(values))
            if line["mmd_stamped"] is not None:
                lines.append(
                    line | {"seeds": len(victims), "attack_short": group[0]["attack_short"]}
                )
    lines.sort(key=lambda line: (*map(str, _context(line)), line["attack_short"]))
    kinds = _paired(("mmd_stamped", "mmd_intra", "mmd_inter"))
    return _frame(lines, (*CONTEXT, "attack", "level", *kinds, "seeds", "attack_short"))


def published(rows: Iterable[Row], figures: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per attack that has a published figure: what was measured, and how far it is off.

    figures: each with "attack" (the full spec), "source", and "acc", "asr" in percent or None.
    `asr_gap` is the measured ASR less the published one. Those with "defense" stand in
    `published_repairs`.
    """
    known = {figure["attack"]: figure for figure in figures if not figure.get("defense")}
    lines: list[Row] = []
    for line in _records(attacks(rows)):
        if (figure := known.get(line["attack"])) is None:
            continue
        for name in ("acc", "asr"):
            value = number(figure.get(name))
            line[f"published_{name}"] = None if value is None else value / 100
        pair = line["asr_before"], line["published_asr"]
        line["asr_gap"] = None if None in pair else pair[0] - pair[1]
        lines.append(line | {"source": figure["source"]})
    columns = (*CONTEXT, "attack", *_paired(("asr_before",)), "published_asr", "asr_gap")
    columns += ("clean_twin_asr", *_paired(("acc_before",)), "clean_twin_acc", "published_acc")
    return _frame(lines, (*columns, "seeds", "source", "attack_short"))


def published_repairs(rows: Iterable[Row], figures: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """One line per attack and defense that have a published figure: what the repair left and cost.

    figures: as of `published`, with "defense" (the full spec) as well; `published_drop` is from the
    victim's own figure to that after the repair, where the board has both.
    """
    told = [*figures]
    before = {f["attack"]: number(f.get("acc")) for f in told if not f.get("defense")}
    known = {(f["attack"], f["defense"]): f for f in told if f.get("defense")}
    lines: list[Row] = []
    chosen = current(rows)
    for frame in (cells(chosen), not_established(chosen)):
        for line in _records(frame):
            if line["attack"] == "none":  # in `unattacked`
                continue
            if (figure := known.get((line["attack"], line["defense"]))) is None:
                continue
            acc, asr = number(figure.get("acc")), number(figure.get("asr"))
            whole = before.get(line["attack"])
            line["published_asr"] = None if asr is None else asr / 100
            line["published_acc"] = None if acc is None else acc / 100
            drop = None if acc is None or whole is None else (whole - acc) / 100
            line["published_drop"] = drop
            lines.append(line | {"source": figure["source"]})
    columns = (*CONTEXT, "attack", "defense", *_paired(("asr",)), "published_asr")
    columns += (*_paired(("acc_drop",)), "published_drop", *_paired(("acc",)), "published_acc")
    return _frame(lines, (*columns, "seeds", "notes", "source", *_SHORTS))


def unattacked(rows: Iterable[Row], figures: Iterable[Mapping[str, Any]] = ()) -> pd.DataFrame:
    """One line per defense: what it makes of the clean twin, largest gain in class distance first,
    defenses with collapsed or failed cells after all others.

    Of boards that measure models beyond their answers, that attack nothing, or that have published
    figures for the attack "none"; no lines of others, whose tables tell what the twin loses.
    figures: as of `published`, with "gain" in percent; `published_drop` is from the network's own
    figure, where there is one.
    """
    chosen = current(rows)
    extra = measured_columns(chosen)
    known = {f.get("defense") or "": f for f in figures if f["attack"] == "none"}
    whole = number(known.get("", {}).get("acc"))
    attacked = {_context(row) for row in chosen if is_attacked(row)}
    lines: list[Row] = []
    own = (row for row in chosen if not is_attacked(row))
    groups = _groups(own, lambda row: (_context(row), row["defense"]))
    for (context, defense), group in groups.items():
        if not (_numbers(extra) or known or context not in attacked):
            continue
        shown = [row for row in group if measured(row)]
        figure = known.get(defense) or {}
        acc, gain = number(figure.get("acc")), number(figure.get("gain"))
        line = dict(zip(CONTEXT, context, strict=True)) | {"defense": defense}
        for name in (*_CLEAN, *_numbers(extra), "seconds"):
            line |= _spread(name, summarise(row.get(name) for row in shown))
        line |= _units(extra, shown) | {
            "published_gain": None if gain is None else gain / 100,
            "published_drop": None if acc is None or whole is None else (whole - acc) / 100,
            "seeds": len(shown),
            "notes": _notes(group, len(group), 0, True),
            "source": figure.get("source") or "",
            "unsound": any(row["status"] != "ok" for row in group),
        }
        lines.append(line | {name: group[0][name] for name in ("defense_short", "null")})
    lines.sort(
        key=lambda line: (
            *(str(line[name]) for name in CONTEXT),
            line["unsound"],
            *(_last(line.get("distance_gain"), -1), _last(line["acc_drop"], 1)),
            line["defense"],
        )
    )
    columns = [*CONTEXT, "defense", *_paired(_CLEAN), *_columns(extra)]
    told = any(figure.get("gain") is not None for figure in known.values())
    columns += ["published_gain"] * told + ["published_drop"] * (whole is not None)
    columns += [*_paired(("seconds",)), "seeds", "notes", *["source"] * bool(known)]
    return _frame(lines, (*columns, "defense_short", "null"))


def budgets(rows: Iterable[Row]) -> pd.DataFrame:
    """One line per defense: what its cells cost on average, those on the clean twin included, and
    none that broke off."""
    lines: list[Row] = []
    whole = [row for row in current(rows) if measured(row) or row["status"] == "not_established"]
    groups = _groups(whole, lambda row: (_context(row), row["defense"]))
    for (context, defense), group in groups.items():
        line = dict(zip(CONTEXT, context, strict=True)) | {"defense": defense}
        for name in BUDGET:
            line |= _spread(name, summarise([row[name] for row in group]))
        if line["seconds"] is not None:
            line |= {name: group[0][name] for name in ("defense_short", "null")}
            lines.append(line | {"runs": len(group)})
    lines.sort(key=lambda line: (*map(str, _context(line)), line["seconds"], line["defense"]))
    columns = (*CONTEXT, "defense", *_paired(BUDGET), "runs", "defense_short", "null")
    return _frame(lines, columns)


def measures(rows: Sequence[Row]) -> pd.DataFrame:
    """What the board's measures gave, one line per row as they come; no columns without any."""
    return _row_frame(rows)[[*measured_columns(rows)]]


def failures(rows: Iterable[Row]) -> pd.DataFrame:
    """Every cell that collapsed, failed, timed out or did not apply, with the reason."""
    fields = (*CONTEXT, "attack", "defense", "seed", "status", "reason", "key", *_SHORTS)
    lines = [
        {name: row[name] for name in fields}
        | {"status": _words(row["status"]), "reason": row["reason"] or "no reason was recorded"}
        for row in current(rows)
        if row["status"] not in ("ok", "not_established")
    ]
    return _frame(lines, fields)


def _notes(rows: list[Row], total: int, absent: int, reasons: bool = False) -> str:
    counts = Counter(_words(row["status"]) for row in rows if row["status"] != "ok")
    notes = [f"{status} {count} of {total}" for status, count in sorted(counts.items())]
    notes += [f"not run {absent} of {total}"] * bool(absent)
    flags = Counter(
        flag for row in rows for flag in dict.fromkeys(row["flags"]) if flag != row["status"]
    )
    notes += [f"{_words(flag)} {count} of {total}" for flag, count in sorted(flags.items())]
    lost = Counter(
        text.partition(":")[0]
        for row in rows
        for text in dict.fromkeys(row.get("unmeasured") or ())
    )
    notes += [f"{name} failed {count} of {total}" for name, count in sorted(lost.items())]
    text = ", ".join(notes)
    return text + _because(rows) if reasons else text


def _because(rows: Iterable[Row]) -> str:
    """ ": the distinct reasons" of rows that are not ok, or nothing. That of a collapse is in
    its flag's meaning, the same for all."""
    fine = ("ok", "collapsed")
    why = dict.fromkeys(r["reason"] for r in rows if r["status"] not in fine and r["reason"])
    return f": {'; '.join(why)}" if why else ""


def _words(status: str) -> str:
    return str(status).replace("_", " ")


def _spread(name: str, summary: Summary) -> Row:
    return {name: summary.mean, f"{name}_sd": summary.sd}


def _paired(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(column for name in names for column in (name, f"{name}_sd"))


def _numbers(extra: Iterable[str]) -> list[str]:
    return [name for name in extra if name in MEASURED]


def _columns(extra: Iterable[str]) -> tuple[str, ...]:
    """The columns of a table for what measures gave: numbers with their deviation, then units."""
    return (*_paired(_numbers(extra)), *(name for name in extra if name in UNITS.values()))


def _units(extra: Iterable[str], rows: Sequence[Row]) -> Row:
    """The units of a line's figures; each has one where all is well."""
    return {
        name: "; ".join(sorted({row.get(name) or "" for row in rows} - {""}))
        for name in extra
        if name in UNITS.values()
    }


def _last(value: float | None, sign: int) -> tuple[bool, float]:
    return value is None, 0.0 if value is None else sign * value


_FLOATS = {
    *METRICS,
    *MEASURED,
    *INTERVALS,
    *BUDGET,
    "published_acc",
    "published_asr",
    "published_drop",
    "published_gain",
    "asr_gap",
    "p_best",
}


def _frame(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    floats = [name for name in columns if name.removesuffix("_sd") in _FLOATS]
    data = {name: [line[name] for line in lines] for name in columns}
    types = dict.fromkeys(floats, "float64") | dict.fromkeys(
        {*columns} & {"attacks", "seeds", "pairs", "runs"}, int
    )
    return pd.DataFrame(data, columns=list(columns), dtype=object).astype(types)


def _row_frame(rows: Sequence[Row]) -> pd.DataFrame:
    import pandas as pd

    lines = aligned(rows)
    columns = list(lines[0]) if lines else list(COLUMNS)
    return pd.DataFrame(lines, columns=columns, dtype=object)  # ints stay ints


# ----------------------------------------------------------------------------------------- view

_PERCENT = {
    "acc": "ACC %",
    "asr": "ASR %",
    "ra": "RA %",
    "der": "DER %",
    "acc_drop": "ACC drop",
    "twin_acc_drop": "twin drop",
    "acc_before": "ACC %",
    "asr_before": "ASR %",
    "clean_twin_acc": "twin ACC %",
    "clean_twin_asr": "twin to target %",
    "published_acc": "published ACC %",
    "published_asr": "published ASR %",
    "published_drop": "published ACC drop",
    "published_gain": "published gain %",
    "asr_gap": "ASR gap",
    "distance_gain": "gain %",
    "robust_acc": "robust ACC %",
    "robust_acc_before": "robust ACC % before",
    "mean_share": "mean share %",
    "worst_share": "worst share %",
}
_STEALTH = ("psnr", "ssim", "l2", "linf")  # properties of the trigger: shown without their sd
_MMD = {"mmd_stamped": "stamped", "mmd_intra": "same class", "mmd_inter": "nearest other class"}
_BUDGET = {
    "peak_memory_mb": "peak MB",
    "clean_images": "clean images",
    "forward_images": "images forward",
    "backward_images": "images backward",
}
_DISTANCES = {"distance": "distance", "distance_before": "distance before"}
_DIGITS = {
    "psnr": 1,
    "ssim": 3,
    "l2": 2,
    "linf": 3,
    "seconds": 1,
    **dict.fromkeys(_BUDGET, 0),
    **dict.fromkeys(_MMD, 3),
    **dict.fromkeys(_DISTANCES, 2),
    "rating": 0,
    "low": 0,
    "high": 0,
}
_HEADINGS = {
    "psnr": "PSNR dB",
    "ssim": "SSIM",
    "l2": "L2",
    "linf": "L∞",
    **_BUDGET,
    **_MMD,
    **_DISTANCES,
}
_COUNTS = ("attacks", "seeds", "seed", "duels", "runs")
_TEXTS = (
    *(
        "kind",
        "name",
        "threat",
        "attack",
        "level",
        "defense",
        "status",
        "flags",
        "reason",
        "notes",
        "source",
    ),
    *(*UNITS.values(), "unmeasured"),
)
_ROW_VIEW = (
    *("attack", "defense", "seed", "acc", "asr", "ra", "der", "seconds"),
    *("status", "flags", "reason"),
)


@dataclass(frozen=True)
class Entry:
    """One rounded table entry; `value` is what it sorts by (None: not measured)."""

    text: str
    sd: str = ""
    value: float | str | None = None
    mark: str = ""  # "best", or "tied" with it

    def __str__(self) -> str:
        return f"{self.text} ± {self.sd}" if self.sd else self.text


@dataclass(frozen=True)
class View:
    """A table as people read it: percent with one decimal, the constant context as its title."""

    title: str
    names: tuple[str, ...]  # columns of the frame
    headings: tuple[str, ...]
    numeric: tuple[bool, ...]
    lines: tuple[tuple[Entry, ...], ...]
    null: tuple[bool, ...]  # which lines are null methods
    single: tuple[bool, ...]  # which lines rest on one seed


def view(frame: pd.DataFrame) -> View:
    """The readable form of a frame of this module. Context that never varies becomes the title, a
    unit that never varies part of its columns' headings."""
    records = _records(frame)
    constant = [
        name
        for name in CONTEXT
        if name in frame and records and len({str(record[name]) for record in records}) == 1
    ]
    names = [
        name
        for name in frame.columns
        if (name in CONTEXT and name not in constant)
        or name in _PERCENT
        or name in _DIGITS
        or name in _COUNTS
        or name in _TEXTS
    ]
    optional = ("threat", "flags", "reason", "notes", "unmeasured")
    hidden = {name for name in optional if not any(record.get(name) for record in records)}
    told: dict[str, str] = {}
    for column, name in UNITS.items():
        units = {unit for record in records if (unit := record.get(name))}
        if len(units) < 2:
            hidden.add(name)
            told |= dict.fromkeys((column, f"{column}_before"), "".join(f", {u}" for u in units))
    hidden |= {f"{name}_before" for name in names}  # the null defense's line tells it
    names = [name for name in names if name not in hidden]
    return View(
        title=context_title({name: records[0][name] for name in constant}) if records else "",
        names=tuple(names),
        headings=tuple(
            (_PERCENT.get(name) or _HEADINGS.get(name, name)) + told.get(name, "") for name in names
        ),
        numeric=tuple(name in _PERCENT or name in _DIGITS or name in _COUNTS for name in names),
        lines=tuple(tuple(_entry(record, name) for name in names) for record in records),
        null=tuple(bool(record.get("null")) for record in records),
        single=tuple(record.get("seeds") == 1 for record in records),
    )


def context_title(context: Mapping[str, Any]) -> str:
    """ "quickstart v1 · signs · fastnet · fast" of the context columns given."""
    parts = [str(context[name]) for name in CONTEXT if name in context and name != "version"]
    if "version" in context:
        parts[:1] = [f"{' '.join(parts[:1])} v{context['version']}".strip()]
    return " · ".join(map(clean_text, parts))


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal, the dash where it is None."""
    return MISSING if value is None else _decimal(100 * value, 1)


def clean_text(value: Any) -> str:
    """`value` on one line: white space becomes one space, unprintable characters U+FFFD."""
    text = " ".join(str(value).split())
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _decimal(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no "-0.0"


def _entry(record: Mapping[str, Any], name: str) -> Entry:
    value = record[name]
    if name in _PERCENT or name in _DIGITS:
        if value is None:
            return Entry(MISSING)
        scale, digits = (100, 1) if name in _PERCENT else (1, _DIGITS[name])
        sd = record.get(f"{name}_sd")
        spread = "" if sd is None or name in _STEALTH else _decimal(scale * sd, digits)
        mark = record.get("standing") or "" if name == "der" else ""
        return Entry(_decimal(scale * value, digits), spread, value, mark)
    if name in ("attack", "defense"):
        value = record.get(f"{name}_short", value)
        value = f"{value} (null)" if name == "defense" and record.get("null") else value
    if name in _COUNTS:
        return Entry(clean_text(value), value=value)
    text = clean_text(", ".join(value) if isinstance(value, list) else value)
    return Entry(text, value=text)


def _records(frame: pd.DataFrame) -> list[Row]:
    """The frame's lines with plain Python values, NaN as None."""
    columns = [frame[name].astype(object).tolist() for name in frame.columns]
    return [
        dict(zip(frame.columns, map(_plain, line), strict=True))
        for line in zip(*columns, strict=True)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value


# -------------------------------------------------------------------------------------- formats


def render(table: pd.DataFrame | Sequence[Row], format: str) -> str | Table | Text:
    """`table`, a frame of this module or flat rows, as text in one of `FORMATS`.

    md and latex are rounded for people, csv and json exact for scripts. "table" is no text but a
    rich renderable, so that it takes the terminal's width. Raises ValueError for other formats.
    """
    if format not in FORMATS:
        near = get_close_matches(format, FORMATS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(FORMATS)}"
        raise ValueError(f"no table format is called {format!r}; {hint}")
    frame = _row_frame(table) if isinstance(table, Sequence) else table
    if format == "csv":
        return _csv(frame)
    if format == "json":
        return json.dumps(_records(frame), indent=1, allow_nan=False) + "\n"
    if isinstance(table, Sequence):
        extra = measured_columns(table)
        frame = frame[[*CONTEXT, *_ROW_VIEW, *extra, *_SHORTS]]
    shown = view(frame)
    return {"md": markdown, "latex": latex, "table": _rich}[format](shown)


def _csv(frame: pd.DataFrame) -> str:
    if "flags" in frame:
        frame = frame.assign(flags=frame["flags"].map(" ".join))
    if "unmeasured" in frame:
        frame = frame.assign(unmeasured=frame["unmeasured"].map(lambda lost: "; ".join(lost or ())))
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text


def markdown(shown: View) -> str:
    """A GitHub table under its title."""
    from tabulate import tabulate

    title = f"**{escape_markdown(shown.title)}**\n\n" if shown.title else ""
    if not shown.lines:
        return f"{title}No rows.\n"
    marks = {"best": "**{}**", "tied": "{} ≈", "": "{}"}
    body = [
        [marks[entry.mark].format(escape_markdown(str(entry))) for entry in line]
        for line in shown.lines
    ]
    align = ["right" if numeric else "left" for numeric in shown.numeric]
    headings = list(map(escape_markdown, shown.headings))
    text = tabulate(body, headings, tablefmt="pipe", colalign=align, disable_numparse=True)
    return f"{title}{text}\n"


def latex(shown: View) -> str:
    """A booktabs table; the preamble needs \\usepackage{booktabs}."""
    if not shown.lines:
        return "% no rows\n"
    spec = "".join("r" if numeric else "l" for numeric in shown.numeric)
    lines = [
        " & ".join(
            _latex_entry(entry, numeric) for entry, numeric in zip(line, shown.numeric, strict=True)
        )
        for line in shown.lines
    ]
    return "\n".join(
        [
            "\\begin{table}",
            "\\centering",
            f"\\caption{{{escape_latex(shown.title)}}}",
            f"\\begin{{tabular}}{{{spec}}}",
            "\\toprule",
            " & ".join(map(escape_latex, shown.headings)) + " \\\\",
            "\\midrule",
            *(f"{line} \\\\" for line in lines),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def _latex_entry(entry: Entry, numeric: bool) -> str:
    if numeric and isinstance(entry.value, int | float):
        text = str(entry).replace("±", "\\pm")
        text = {"best": f"\\mathbf{{{text}}}", "tied": f"{text}^{{\\approx}}"}.get(entry.mark, text)
        return f"${text}$"
    return escape_latex(str(entry))


def _rich(shown: View) -> Table | Text:
    from rich.table import Table
    from rich.text import Text

    if not shown.lines:
        return Text("No rows.")
    table = Table(title=Text(shown.title), header_style="bold", title_justify="left")
    for heading, numeric in zip(shown.headings, shown.numeric, strict=True):
        text = Text(heading.replace(", ", "\n"))  # the unit below, since headings are not wrapped
        table.add_column(text, justify="right" if numeric else "left", no_wrap=numeric)
    for line, null in zip(shown.lines, shown.null, strict=True):
        bold = {"best": "bold", "tied": "underline"}
        texts = (Text(str(entry), style=bold.get(entry.mark, "")) for entry in line)
        table.add_row(*texts, style="dim" if null else "")
    return table


_MARKDOWN = re.compile(r"[\\|*`\[\]~$#]|(?<!\w)_|_(?!\w)")  # random_prune keeps its underscore
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_LATEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
    "–": "--",
    "∞": "$\\infty$",
    "·": "$\\cdot$",
    "±": "$\\pm$",
    **{letter: f"{{{letter}}}" for letter in "[]*"},  # after \\ they would be its arguments
}


def escape_markdown(text: str) -> str:
    safe = "".join(_HTML.get(letter, letter) for letter in clean_text(text))
    return _MARKDOWN.sub(lambda found: "\\" + found.group(), safe)


def escape_latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in clean_text(text))
