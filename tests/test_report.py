"""The report: statistics with known answers, tables that hide nothing, files that stay inert."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arena.report import tables
from arena.report.page import build_page, write_leaderboard
from arena.report.rows import COLUMNS, MEASURED, aligned, flatten
from arena.report.statistics import Summary, over_attacks, summarise, wilson
from arena.watch import print_table

PNG = b"\x89PNG\r\n\x1a\n" + b"not looked at"
DEFENSES = {"none": 0.5, "retrain": 0.9, "finetune": 0.7, "anp": 0.95}
METRICS = [{"name": "ACC", "definition": "share of clean images", "unit": "", "source": "we"}]


def record(attack: str = "patch", defense: str = "none", seed: int = 0, **changes: Any) -> dict:
    """One record as the runner writes it; `changes` replace top-level fields or metrics."""
    twin = attack == "none"
    metrics = {
        "acc": 0.9,
        "asr": None if twin else 0.1,
        "ra": None if twin else 0.8,
        "der": None if twin else DEFENSES.get(defense, 0.6),
        "acc_drop": 0.02,
        "acc_before": 0.92,
        "asr_before": None if twin else 0.99,
        "clean_twin_acc": 0.93,
        "clean_twin_asr": 0.01,
        "twin_acc_drop": 0.01,
        "psnr": 25.0,
        "ssim": 0.97,
        "l2": 1.5,
        "linf": 1.0,
    }
    metrics |= {name: changes.pop(name) for name in [*changes] if name in metrics}
    base = {
        "key": f"{attack}/{defense}/{seed}/{changes.get('code', '')}",
        "board": {"name": "toy", "version": 1},
        "dataset": {"name": "signs:side=32", "fingerprint": "f00d", "source": "drawn"},
        "model": "fastnet",
        "recipe": "fast",
        "attack": {
            "name": attack,
            "spec": attack if twin else f"{attack}:target=0",
            "short": attack,
            "threat": "" if twin else "poisons data",
        },
        "defense": {
            "name": defense,
            "spec": f"{defense}:epochs=10",
            "short": defense,
            "null": defense in ("none", "retrain"),
        },
        "seed": seed,
        "status": "ok",
        "reason": "",
        "metrics": metrics,
        "counts": {"test": 100, "triggered": 90},
        "intervals": {"acc": [0.85, 0.94], "asr": None if twin else [0.05, 0.17]},
        "budget": {"seconds": 2.0, "clean_images": 240, "peak_memory_mb": None},
        "flags": [],
        "hardware": {"device": "cpu"},
        "versions": {"torch": "2"},
        "commit": "c0ffee",
        "started": "2026-01-01T00:00:00Z",
        "finished": "2026-01-01T00:01:00Z",
    }
    return base | changes


def board() -> list[dict]:
    """Three attacks (one not established), four defenses, two seeds, the twin, three mishaps."""
    records = [
        record(attack, defense, seed)
        for attack in ("none", "patch", "blend", "sig")
        for defense in DEFENSES
        for seed in (0, 1)
    ]
    for item in records:
        if item["attack"]["name"] == "sig":
            item |= {"status": "not_established", "reason": "ASR 0.40 is under 0.80"}
    broken = {item["key"]: item for item in records}
    lost = dict.fromkeys(("acc", "asr", "ra", "der", "acc_drop"))
    flag = {"name": "harms_clean_twin", "meaning": "it costs accuracy", "remedy": "tune less"}
    broken["patch/anp/1/"] |= {"status": "timeout", "reason": "stopped after 9 s", "metrics": lost}
    broken["blend/finetune/0/"] |= {"status": "collapsed", "reason": "one class", "flags": [flag]}
    broken["blend/finetune/1/"] |= {"status": "failed", "reason": "", "metrics": {"acc": math.nan}}
    return records


PICTURES = {
    "patch": {
        "images": [{"clean": PNG, "triggered": PNG, "difference": PNG, "label": "stop"}],
        "caption": "target 0",
        "psnr": 25.0,
    }
}


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return board()


@pytest.fixture(scope="module")
def rows(records: list[dict]) -> list[dict]:
    return [flatten(item) for item in records]


@pytest.fixture(scope="module")
def page(records: list[dict]) -> str:
    return build_page(records, PICTURES, metrics=METRICS, command="arena quickstart")


# ----------------------------------------------------------------------------------- statistics


def test_mean_and_sample_deviation() -> None:
    assert summarise([2.0, None, 4.0, 9.0]) == Summary(5.0, math.sqrt(13.0), 3)
    assert summarise([0.5]) == Summary(0.5, None, 1), "one seed has no spread"
    assert summarise([None]) == Summary(None, None, 0)


def test_every_attack_weighs_the_same() -> None:
    values = {("a", 0): 0.0, ("a", 1): 0.2, ("b", 0): 1.0, ("b", 1): 0.8, ("c", 0): 0.5}
    mean, sd, n = over_attacks(values)
    assert mean == pytest.approx((0.1 + 0.9 + 0.5) / 3)
    assert sd is None, "seed 1 misses attack c, and one complete seed has no spread"
    assert n == 2
    values["c", 1] = 0.8
    assert over_attacks(values).sd == pytest.approx(0.1 / math.sqrt(2))  # averages 0.5 and 0.6


@pytest.mark.parametrize(  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    ("successes", "n", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1),
    ],
)
def test_wilson_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_mirrors_and_ends_exactly() -> None:
    low, high = wilson(28, 29)
    assert (1 - high, 1 - low) == pytest.approx(wilson(1, 29))
    assert (wilson(0, 7)[0], wilson(7, 7)[1]) == (0.0, 1.0)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"got {successes} of {n}"):
        wilson(successes, n)


# ----------------------------------------------------------------------------------------- rows


def test_flat_row_has_the_columns_and_no_nan() -> None:
    item = record(asr=math.nan, psnr=math.inf)
    row = flatten(item)
    assert tuple(row) == COLUMNS
    assert row["asr"] is None
    assert row["psnr"] is None
    assert (row["acc"], row["acc_low"], row["clean_images"]) == (0.9, 0.85, 240)
    assert (row["attack"], row["defense"]) == ("patch:target=0", "none:epochs=10")


def test_a_record_without_its_cell_is_named() -> None:
    item = record()
    del item["attack"]
    with pytest.raises(ValueError, match="record patch/none/0/ does not name its cell: 'attack'"):
        flatten(item)


# --------------------------------------------------------------------------------------- tables


def test_leaderboard_is_sorted_and_keeps_null_methods(rows: list[dict]) -> None:
    frame = tables.leaderboard(rows)
    # best mean DER first; anp (a timeout) and finetune (a collapse, a failure) after the sound ones
    assert list(frame["defense_short"]) == ["retrain", "none", "anp", "finetune"]
    assert frame["der"][0] > frame["der"][1]
    assert frame["der"][2] > frame["der"][3]
    text = tables.render(frame, "md")
    assert "none (null)" in text
    assert "retrain (null)" in text
    assert "anp (null)" not in text


def test_not_established_attacks_stand_apart(rows: list[dict]) -> None:
    assert set(tables.leaderboard(rows)["attacks"]) == {2}, "patch and blend, neither sig nor none"
    assert "sig:target=0" not in set(tables.cells(rows)["attack"])
    assert set(tables.not_established(rows)["attack"]) == {"sig:target=0"}
    attacks = tables.attacks(rows).set_index("attack")
    assert attacks.loc["sig:target=0", "notes"] == "not established 2 of 2: ASR 0.40 is under 0.80"


FIGURES = [
    {"attack": "patch:target=0", "acc": 90.0, "asr": 100.0, "source": "a paper"},
    {"attack": "sig:target=0", "acc": None, "asr": 93.3, "source": "another"},
    {"attack": "wanet:target=0", "acc": 94.0, "asr": 99.5, "source": "of an attack not run"},
]


def test_published_figures_stand_beside_what_was_measured(rows: list[dict]) -> None:
    lines = tables.published(rows, FIGURES).set_index("attack")
    assert set(lines.index) == {"patch:target=0", "sig:target=0"}, "what was not run has no line"
    patch, sig = lines.loc["patch:target=0"], lines.loc["sig:target=0"]
    assert (patch["published_acc"], patch["published_asr"]) == (0.9, 1.0)
    assert patch["asr_gap"] == pytest.approx(0.99 - 1.0)
    assert sig["asr_gap"] == pytest.approx(0.99 - 0.933), "an attack not established has its line"
    assert math.isnan(sig["published_acc"])
    shown = tables.view(tables.published(rows, FIGURES))
    assert {"ASR gap", "published ASR %", "source"} <= set(shown.headings)


def test_pages_and_files_show_published_figures(tmp_path) -> None:
    records = [record("patch", defense) for defense in DEFENSES]
    write_leaderboard(records, PICTURES, tmp_path, published=FIGURES)
    for name in ("index.html", "leaderboard.md"):
        text = (tmp_path / name).read_text().split("<script>")[0]
        assert "Beside published figures" in text
        assert "a paper" in text
        assert "another" not in text
    write_leaderboard(records, PICTURES, tmp_path)
    assert "published figures" not in (tmp_path / "leaderboard.md").read_text()


def test_repairs_stand_beside_what_papers_report_of_them(rows: list[dict], tmp_path) -> None:
    first = next(r for r in rows if r["defense_name"] == "finetune" and r["attack_name"] == "patch")
    spec = first["defense"]
    told = {"attack": "patch:target=0", "defense": spec, "acc": 88.0, "asr": 20.0, "source": "it"}
    other = {**told, "defense": "gone:x=1"}
    frame = tables.published_repairs(rows, [*FIGURES, told, other])
    [line] = frame.to_dict("records")
    [own] = [
        cell
        for cell in tables.cells(rows).to_dict("records")
        if (cell["attack"], cell["defense"]) == ("patch:target=0", spec)
    ]
    assert (line["asr"], line["acc_drop"]) == (own["asr"], own["acc_drop"])
    assert (line["published_asr"], line["published_drop"]) == (0.2, pytest.approx(0.02))
    assert set(tables.published(rows, [*FIGURES, told])["attack"]) == {
        "patch:target=0",
        "sig:target=0",
    }
    [line] = tables.published_repairs(rows, [told]).to_dict("records")
    assert math.isnan(line["published_drop"]), "the paper's victim is not known"
    records = [record("patch", defense) for defense in DEFENSES]
    told["defense"] = records[0]["defense"]["spec"]
    write_leaderboard(records, PICTURES, tmp_path, published=[*FIGURES, told])
    for name in ("index.html", "leaderboard.md"):
        assert "Repairs beside published figures" in (tmp_path / name).read_text()


def test_a_weak_attack_moves_no_mean(rows: list[dict]) -> None:
    lucky = {"der": 1.0, "status": "ok"}  # whatever a defense says: the victim was none
    shifted = [
        row | lucky if (row["attack_name"], row["defense_name"]) == ("sig", "anp") else row
        for row in rows
    ]
    assert tables.leaderboard(shifted).equals(tables.leaderboard(rows))


def test_mishaps_are_counted_and_explained(rows: list[dict]) -> None:
    notes = tables.leaderboard(rows).set_index("defense_short")["notes"]
    assert notes["anp"] == "timeout 1 of 4"
    assert notes["finetune"] == "collapsed 1 of 4, failed 1 of 4, harms clean twin 1 of 4"
    assert notes["none"] == ""
    failures = tables.failures(rows).set_index("status")["reason"]
    assert failures["timeout"] == "stopped after 9 s"
    assert failures["failed"] == "no reason was recorded"
    assert set(failures.index) == {"collapsed", "failed", "timeout"}


def test_a_collapse_counts_and_a_failure_does_not() -> None:
    lost = record("patch", "anp", 1, status="failed", reason="crash", acc=0.1)
    dead = record("patch", "nad", 1, status="collapsed", reason="one class", acc=0.1)
    frame = tables.leaderboard(
        map(flatten, [record("patch", "anp"), lost, record("patch", "nad"), dead])
    ).set_index("defense_short")
    assert frame.loc["anp", "acc"] == pytest.approx(0.9)
    assert frame.loc["nad", "acc"] == pytest.approx(0.5)
    assert list(frame["seeds"]) == [1, 2]


def test_what_repairs_cost_is_averaged_over_all_cells_that_ended() -> None:
    records = [record(defense=name, seed=seed) for name in ("slow", "none") for seed in (0, 1, 2)]
    records.append(record("none", "slow"))
    for item, seconds in zip(records[:3], (10.0, 20.0, 99.0), strict=True):
        item["budget"] = {"seconds": seconds, "clean_images": 240, "peak_memory_mb": 500.0,
                          "forward_images": 1000 * seconds, "backward_images": 7}  # fmt: skip
    records[2]["status"] = "timeout"
    records[-1]["budget"] = {**records[0]["budget"], "seconds": 30.0}
    frame = tables.budgets([flatten(item) for item in records]).set_index("defense_short")
    assert list(frame.index) == ["none", "slow"], "the cheapest first"
    slow = frame.loc["slow"]
    assert (slow["seconds"], slow["seconds_sd"], slow["runs"]) == (20.0, 10.0, 3)
    assert slow["forward_images"] == pytest.approx((10_000 + 20_000 + 10_000) / 3)
    shown = tables.view(tables.budgets([flatten(item) for item in records]))
    assert "images forward" in shown.headings
    assert [str(entry) for entry in shown.lines[0]][2:4] == ["–", "240 ± 0"], "not measured"
    assert len(tables.budgets([])) == 0


def test_a_defense_that_always_fails_keeps_its_line() -> None:
    lost = record("patch", "anp", status="failed", reason="crash", metrics={})
    frame = tables.leaderboard(map(flatten, [record(), lost]))
    assert list(frame["defense_short"]) == ["none", "anp"]
    assert frame["notes"][1] == "failed 1 of 1"
    assert math.isnan(frame["der"][1])


def test_a_missing_run_is_noted() -> None:
    items = [record("patch"), record("blend"), record("patch", "anp")]
    notes = tables.leaderboard(map(flatten, items)).set_index("defense_short")["notes"]
    assert notes["anp"] == "not run 1 of 2"


def test_one_seed_shows_no_deviation() -> None:
    frame = tables.leaderboard([flatten(record())])
    assert frame["acc_sd"].isna().all()
    assert "±" not in tables.render(frame, "md")
    two = tables.leaderboard([flatten(record(acc=0.9)), flatten(record(seed=1, acc=0.92))])
    assert "91.0 ± 1.4" in tables.render(two, "md")


def test_a_rerun_replaces_and_equal_short_names_part() -> None:
    old, new = record(acc=0.1), record(acc=0.9, code="new", finished="2026-02-01T00:00:00Z")
    changed = copy.deepcopy(new) | {"key": "other"}
    changed["defense"]["spec"] = "none:epochs=20"
    frame = tables.leaderboard(map(flatten, [new, changed, old]))
    assert list(frame["acc"]) == [0.9, 0.9]
    assert list(frame["defense_short"]) == ["none:epochs=10", "none:epochs=20"]


def test_boards_and_data_sets_are_never_mixed() -> None:
    other = record(acc=0.5, key="x", dataset={"name": "cifar10"})
    frame = tables.leaderboard(map(flatten, [record(acc=0.9), other]))
    assert dict(zip(frame["dataset"], frame["acc"], strict=True)) == {
        "cifar10": 0.5,
        "signs:side=32": 0.9,
    }
    assert "cifar10" in tables.render(frame, "md")


def test_the_order_of_the_rows_does_not_matter(rows: list[dict]) -> None:
    for table in (tables.leaderboard, tables.cells, tables.attacks, tables.failures):
        assert table(rows[::-1]).equals(table(rows))


# -------------------------------------------------------------------------------------- formats


def test_json_is_valid_and_exact(rows: list[dict]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(tables.render(rows, "json"), parse_constant=refuse)
    assert read == rows
    lines = json.loads(tables.render(tables.leaderboard(rows), "json"), parse_constant=refuse)
    (line,) = (line for line in lines if line["defense"].startswith("anp:"))
    assert line["der"] == DEFENSES["anp"]
    assert line["der_sd"] is None, "seed 1 misses an attack"


def test_csv_is_exact() -> None:
    third = 1 / 3
    (line,) = csv.DictReader(io.StringIO(tables.render([flatten(record(acc=third))], "csv")))
    assert float(line["acc"]) == third
    assert line["clean_images"] == "240"
    assert line["peak_memory_mb"] == ""
    text = tables.render(tables.leaderboard([flatten(record(acc=third))]), "csv")
    (line,) = csv.DictReader(io.StringIO(text))
    assert (float(line["acc"]), line["acc_sd"]) == (third, "")


def test_latex_numbers() -> None:
    rows = [flatten(record(acc=0.909)), flatten(record(acc=0.915, seed=1))]
    text = tables.render(tables.leaderboard(rows), "latex")
    assert "$91.2 \\pm 0.4$" in text
    assert "ACC \\%" in text
    assert "\\toprule" in text


def test_small_negative_numbers_have_no_sign() -> None:
    shown = tables.view(tables.leaderboard([flatten(record(acc_drop=-1e-5))]))
    assert str(shown.lines[0][shown.names.index("acc_drop")]) == "0.0"


def test_terminal_table_shows_names_as_they_are() -> None:
    from rich.console import Console

    item = record()
    item["defense"]["short"] = "[red]x[/red]"
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(tables.render(tables.leaderboard([flatten(item)]), "table"))
    assert "[red]x[/red] (null)" in console.export_text()


def test_no_rows_is_said() -> None:
    assert tables.render([], "md") == "No rows.\n"
    assert tables.render(tables.leaderboard([]), "latex") == "% no rows\n"
    assert str(tables.render([], "table")) == "No rows."
    assert json.loads(tables.render([], "json")) == []
    assert tables.render([], "csv").strip().split(",") == list(COLUMNS)


def test_unknown_format_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="'latx'; did you mean 'latex'"):
        tables.render([], "latx")


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</td></table><!--",
    "{{ 7 * 7 }}{% raw %}",
    "a|b\\|c\\",
    "\\input{x}%&$",
    "[2em]*",
)
NAMES = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(min_size=1, max_size=20),
    st.text(alphabet="\\|`<>&\"'_$%#{}[]*~^!\n\r\t\0\ud800ab", min_size=1, max_size=12),
)
FUZZ = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def named(name: str) -> dict:
    flag = {"name": name, "meaning": name, "remedy": name}
    item = record(status="failed", reason=name, flags=[flag])
    item["defense"] |= {"short": name, "spec": name}
    item["attack"] |= {"short": name, "spec": name, "threat": name}
    return item


@FUZZ
@given(NAMES)
def test_markdown_keeps_its_columns(name: str) -> None:
    text = tables.render(tables.failures([flatten(named(name))]), "md")
    lines = text.split("**\n\n", 1)[1].splitlines()
    assert len(lines) == 3, "a name must not break its line"
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {6}
    assert "<" not in lines[2]


@FUZZ
@given(NAMES)
def test_latex_has_no_live_specials(name: str) -> None:
    text = tables.render(tables.failures([flatten(named(name))]), "latex")
    body = text.split("\\midrule\n")[1].split("\n\\bottomrule")[0]
    assert "\n" not in body
    assert body.endswith(" \\\\")
    bare = body.removesuffix(" \\\\")
    for macro in ("textbackslash", "textasciitilde", "textasciicircum", "textless", "textgreater"):
        bare = bare.replace(f"\\{macro}{{}}", "")
    bare = re.sub(r"\\[&%$#_{}]|\\textbar\{\}|\$\\(infty|cdot|pm)\$|\{[\[\]*]\}|\$0\$", "", bare)
    assert bare.count("&") == 4
    assert not set(bare) & set("\\%$#_{}~^[]*<>|")


class Reader(HTMLParser):
    """Collects the elements, and fails on any that could run or fetch."""

    ATTRIBUTES = frozenset(
        {
            *("lang", "charset", "name", "content", "http-equiv", "class", "style", "id", "href"),
            *("src", "alt", "title", "scope", "colspan", "tabindex", "role", "aria-label"),
            *("data-v", "data-cell", "data-attack", "type", "hidden", "aria-labelledby"),
            *("aria-live", "width", "height", "loading"),
        }
    )

    def __init__(self, page: str, site: bool = False) -> None:
        super().__init__()
        self.site = site
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag != "wbr":  # where a long name may break: as many as its joints
            self.tags.append(tag)
        for name, value in attributes:
            assert name in self.ATTRIBUTES, f"{tag} has the attribute {name}"
            if name in ("href", "src"):
                near = ("../index.html", "tables/", "figures/")
                inside = re.fullmatch(r"[\w.%-]+/index\.html", value or "") or (
                    value or ""
                ).startswith(near)
                own = (value or "").startswith(("#", "data:image/png;base64,"))
                assert own or (self.site and inside), value

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["script"] or data.lstrip().startswith("{"):
            self.text.append(data)


@settings(FUZZ, max_examples=25)
@given(NAMES)
def test_names_are_inert_in_the_page(name: str) -> None:
    plain = Reader(build_page([named("plain")], {"plain": PICTURES["patch"]}))
    odd = Reader(build_page([named(name)], {name: PICTURES["patch"]}))
    assert odd.tags == plain.tags


# ----------------------------------------------------------------------------------------- page


def test_a_script_as_a_name_stays_text(records: list[dict]) -> None:
    odd = "<script>alert(1)</script>"
    text = build_page(
        [named(odd)], {}, title=odd, command=odd, metrics=[{"name": odd, "definition": odd}]
    )
    assert odd not in text
    assert Reader(text).tags.count("script") == 3, "the data, the library, the page's own"
    assert odd in "".join(Reader(text).text)


def test_the_page_requests_nothing(page: str) -> None:
    library, own = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    assert library.startswith("/* Tabulator v")
    rest = page.replace(library, "")  # it may load data over the net, which the policy forbids
    assert not re.search(r"https?:|//[a-z]|url\(|@import|<link|<iframe|fetch\(", rest)
    assert own in rest
    assert "default-src 'none'" in page
    Reader(page)


def test_the_policy_admits_the_script_and_no_other(page: str) -> None:
    import base64
    import hashlib

    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.S)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert f"script-src {allowed};" in page


def test_the_page_shows_what_went_wrong(page: str) -> None:
    text = " ".join("".join(Reader(page).text).split())
    for phrase in (
        "toy v1",
        "c0ffee",
        "arena quickstart",
        "32 cells: 1 collapsed, 1 failed, 8 not established, 21 ok, 1 timeout",
        "stopped after 9 s",
        "it costs accuracy",
        "tune less",
        "no reason was recorded",
        "ASR 0.40 is under 0.80",
        "share of clean images",
        "none (null)",
        "patch/anp/1/",
        "clean twin",
        "PSNR 25.0 dB",
    ):
        assert phrase in text, phrase


def test_no_matrix_tile_is_blank(page: str) -> None:
    matrix = page.split('<table class="matrix">')[1].split("</table>")[0]
    tiles = re.findall(r'<td title="[^"]*">(.*?)</td>', matrix)
    assert len(tiles) == 3 * len(DEFENSES)  # the clean twin, patch, blend
    assert all(re.sub(r"<[^>]*>", "", tile).strip() for tile in tiles)
    assert "timeout 1 of 2" in matrix


def test_without_null_methods_the_page_says_so() -> None:
    assert "No null method was run" in build_page([record("patch", "anp")], {})
    assert "No null method was run" not in build_page([record()], {})


def test_pictures_must_be_png() -> None:
    bad = {"patch": {"images": [{"clean": b"GIF89a", "label": ""}]}}
    with pytest.raises(ValueError, match="the clean picture of attack 'patch'"):
        build_page([record()], bad)


# ------------------------------------------------------------------------------------- measures


def with_measures(item: dict, gain: float = 0.5, **changes: Any) -> dict:
    """The record with what two measures found, as the runner enters it."""
    distance = {"distance": 10 * (1 + gain), "distance_before": 10.0, "distance_gain": gain}
    robust = {"robust_acc": 0.25, "robust_acc_before": 0.05, "robust_against": "PGD-20 8/255"}
    entries = {
        "class_distance": {**distance, "distance_unit": "mask L1 (nc)"},
        "pgd": robust,
    }
    return item | {
        "measures": {
            f"{name}:x=1": {
                "name": name,
                "short": name,
                "status": "ok",
                "reason": "",
                "columns": columns,
            }
            for name, columns in entries.items()
        }
        | changes
    }


LOST = {"name": "pgd", "short": "pgd", "status": "failed", "reason": "out of memory"}


def test_measures_follow_the_metrics_where_there_are_any() -> None:
    row, plain = flatten(with_measures(record())), flatten(record("blend"))
    assert tuple(plain) == COLUMNS
    names = tuple(row)
    start = names.index("linf") + 1
    assert names[start : start + 7] == (*MEASURED, "distance_unit", "robust_against")
    assert tuple(name for name in names if name in COLUMNS) == COLUMNS
    assert (row["distance"], row["distance_gain"], row["robust_acc"]) == (15.0, 0.5, 0.25)
    both = aligned([plain, row])
    assert tuple(both[0]) == tuple(both[1]) == names
    assert both[0]["distance"] is None
    assert aligned([plain]) == [plain]
    assert tuple(aligned([plain])[0]) == COLUMNS


def test_a_failed_measure_is_told_with_its_reason() -> None:
    row = flatten(with_measures(record(), **{"pgd:x=1": LOST}))
    assert row["unmeasured"] == ["pgd: out of memory"]
    assert "robust_acc" not in row
    rows = [row, flatten(with_measures(record(seed=1)))]
    for table in (tables.leaderboard, tables.cells):
        frame = table(rows)
        assert list(frame["notes"]) == ["pgd failed 1 of 2"]
        assert list(frame["robust_acc"]) == [0.25]
    text = tables.render(rows, "csv")
    first, second = csv.DictReader(io.StringIO(text))
    assert first["unmeasured"] == "pgd: out of memory"
    assert (second["unmeasured"], second["robust_acc"]) == ("", "0.25")
    assert json.loads(tables.render(rows, "json"))[1]["unmeasured"] is None


def test_tables_hold_measures_only_where_there_are_any(rows: list[dict]) -> None:
    for table in (tables.leaderboard, tables.cells, tables.attacks, tables.not_established):
        plain = table(rows)
        assert not {"distance", "robust_acc", "distance_unit"} & set(plain.columns)
        found = table([flatten(with_measures(item)) for item in board()])
        extra = [name for name in found.columns if name not in plain.columns]
        assert [name for name in found.columns if name in plain.columns] == list(plain.columns)
        assert extra[-2:] == ["distance_unit", "robust_against"]
        assert set(found["distance_unit"]) <= {"mask L1 (nc)", ""}
        own = {name.removesuffix("_sd") for name in extra[:-2]}
        if table is tables.attacks:
            assert own == {"distance_before", "robust_acc_before"}
        elif table is tables.leaderboard:
            assert own == {"distance", "distance_gain", "robust_acc"}
        else:
            assert own == set(MEASURED)


def test_measures_are_averaged_and_their_unit_stands_in_the_heading() -> None:
    items = [with_measures(record(seed=seed), gain) for seed, gain in enumerate((0.2, 0.4))]
    rows = [flatten(item) for item in items]
    (line,) = json.loads(tables.render(tables.leaderboard(rows), "json"))
    assert line["distance_gain"] == pytest.approx(0.3)
    assert line["distance_gain_sd"] == pytest.approx(0.2 / math.sqrt(2))
    shown = tables.view(tables.cells(rows))
    assert "distance, mask L1 (nc)" in shown.headings
    assert "robust ACC %, PGD-20 8/255" in shown.headings
    assert not {"distance_unit", "distance_before", "robust_acc_before"} & set(shown.names)
    entries = {name: str(entry) for name, entry in zip(shown.names, shown.lines[0], strict=True)}
    assert entries["distance"] == "13.00 ± 1.41"
    assert entries["distance_gain"] == "30.0 ± 14.1"
    assert entries["robust_acc"] == "25.0 ± 0.0"
    assert "distance before, mask L1 (nc)" in tables.view(tables.attacks(rows)).headings

    other = flatten(with_measures(record("blend"))) | {"distance_unit": "pixels (pixel)"}
    mixed = tables.view(tables.cells([*rows, other]))
    assert "distance" in mixed.headings
    assert "distance_unit" in mixed.names, "two units: each line says its own"


def test_pages_and_files_hold_measures(tmp_path: Any) -> None:
    items = [with_measures(record("patch", defense)) for defense in DEFENSES]
    items += [record("blend", defense) for defense in DEFENSES]
    written = {p.name: p.read_text() for p in write_leaderboard(items, {}, tmp_path)}
    assert "distance, mask L1 (nc)" in written["leaderboard.md"]
    page = written["index.html"]
    assert "<dt>Measures</dt><dd><span>class_distance</span><span>pgd</span></dd>" in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert {"distance", "distance_gain", "robust_acc"} <= {*data["columns"]}
    place = data["columns"].index("distance")
    assert [run[place] for run in data["runs"]].count(15.0) == len(DEFENSES)
    assert [pair[1].get("distance") for pair in data["pairs"]].count([15.0, None]) == 4
    header = written["leaderboard.csv"].splitlines()[0].split(",")
    assert header.index("distance") == header.index("seconds_sd") + 1
    assert len(json.loads(written["results.json"])[0]) == len(COLUMNS) + 7
    plain = build_page([record()], {})
    assert "Measures" not in plain
    assert (
        "distance" not in json.loads(plain.split('id="data">')[1].split("</script>")[0])["columns"]
    )


# -------------------------------------------------------------------------- without a backdoor


def hardened() -> list[dict]:
    """Four defenses on clean twins of two seeds; one collapses."""
    gains = {"none": 0.0, "retrain": 2.0, "finetune": 0.1, "anp": 0.5}
    records = [
        with_measures(record("none", name, seed), gain + 0.2 * seed * (gain > 0))
        for name, gain in gains.items()
        for seed in (0, 1)
    ]
    for item in records:
        if item["defense"]["name"] == "retrain":
            item |= {"status": "collapsed", "reason": "one class"}
    return records


REPORTED = [
    {"attack": "none", "acc": 91.5, "source": "MOTH"},
    {"attack": "none", "defense": "anp:epochs=10", "acc": 90.5, "gain": 108.6, "source": "MOTH"},
]


def test_what_becomes_of_the_twin_has_its_table() -> None:
    rows = [flatten(item) for item in hardened()]
    frame = tables.unattacked(rows, REPORTED).set_index("defense_short")
    assert list(frame.index) == ["anp", "finetune", "none", "retrain"], "a collapse is no gain"
    assert frame.loc["anp", "distance_gain"] == pytest.approx(0.6)
    assert frame.loc["anp", "distance_gain_sd"] == pytest.approx(0.2 / math.sqrt(2))
    assert frame.loc["anp", "acc_drop"] == pytest.approx(0.02)
    assert frame.loc["anp", "published_gain"] == pytest.approx(1.086)
    assert frame.loc["anp", "published_drop"] == pytest.approx(0.01)
    assert math.isnan(frame.loc["finetune", "published_gain"])
    assert list(frame["source"]) == ["MOTH", "", "", ""]
    assert "collapsed 2 of 2" in frame.loc["retrain", "notes"]
    shown = tables.view(tables.unattacked(rows))
    assert {"gain %", "distance, mask L1 (nc)", "ACC drop"} <= {*shown.headings}
    assert not {"published_gain", "published_drop", "source"} & {*shown.names}
    assert len(tables.published_repairs(rows, REPORTED)) == 0, "told once"


def test_the_twin_has_its_table_where_it_tells_more_than_a_drop(rows: list[dict]) -> None:
    assert len(tables.unattacked(rows)) == 0
    assert len(tables.unattacked(rows, REPORTED)) == len(DEFENSES)
    assert len(tables.unattacked([flatten(with_measures(item)) for item in board()])) == 4
    assert len(tables.unattacked([flatten(record("none"))])) == 1, "nothing else is there"
    assert len(tables.unattacked([flatten(with_measures(record()))])) == 0, "there is no twin"


def test_a_board_without_attacks_ranks_nothing(tmp_path: Any, capsys: Any) -> None:
    write_leaderboard(hardened(), {}, tmp_path, published=REPORTED)
    texts = {path.name: path.read_text() for path in tmp_path.iterdir()}
    page, text, latex = (texts[f] for f in ("index.html", "leaderboard.md", "leaderboard.tex"))
    for shown in (page.split("<script")[0], text):
        assert "Without a backdoor" in shown
        assert "no attack was established" not in shown
        assert tables.AVERAGED not in shown
        assert "against every attack" not in shown
    assert "108.6" in text
    assert latex.count("begin{table}") == 1
    assert tables.AVERAGED not in latex
    print_table([flatten(item) for item in hardened()])
    told = capsys.readouterr().out
    assert "Without a backdoor" in told
    assert "over all attacks" not in told
    both = [*hardened(), with_measures(record("patch"))]
    write_leaderboard(both, {}, tmp_path)
    text = (tmp_path / "leaderboard.md").read_text()
    assert "Without a backdoor" in text
    assert tables.AVERAGED in text


# ---------------------------------------------------------------------------------------- files


def test_files_are_the_same_bytes_in_any_order(tmp_path: Any, records: list[dict]) -> None:
    one = write_leaderboard(records, PICTURES, tmp_path / "one", metrics=METRICS)
    two = write_leaderboard(reversed(records), PICTURES, tmp_path / "two", metrics=METRICS)
    names = ["leaderboard.md", "leaderboard.csv", "results.json", "leaderboard.tex", "index.html"]
    assert [path.name for path in one] == names
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
    assert len(list((tmp_path / "one").iterdir())) == len(names), "a temporary file was left"


def test_files_hold_every_cell(tmp_path: Any, records: list[dict]) -> None:
    written = {path.name: path.read_text() for path in write_leaderboard(records, {}, tmp_path)}
    assert len(json.loads(written["results.json"])) == len(records)
    lines = list(csv.DictReader(io.StringIO(written["leaderboard.csv"])))
    assert len(lines) == 4 * len(DEFENSES)  # attacks, the twin among them, not established too
    assert "stopped after 9 s" in written["leaderboard.md"]
    assert "not established 2 of 2" in written["leaderboard.md"]


def test_odd_characters_can_be_written(tmp_path: Any) -> None:
    for path in write_leaderboard([named("\ud800\0é")], {}, tmp_path):
        path.read_text(encoding="utf-8")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Any, records: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "leaderboard.md").write_text("old")

    def full(*_: object) -> Iterator[None]:
        raise OSError("disk full")

    monkeypatch.setattr("arena.report.page.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_leaderboard(records, {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["leaderboard.md"]
    assert (tmp_path / "leaderboard.md").read_text() == "old"


def test_no_records_and_clashing_keys_are_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="no records to show"):
        write_leaderboard([], {}, tmp_path)
    with pytest.raises(ValueError, match="two different records share the key"):
        build_page([record(), record(acc=0.2)], {})
    assert build_page([record(), record()], {}) == build_page([record()], {})


def test_report_imports_neither_torch_nor_the_table_libraries() -> None:
    code = (
        "import sys, arena.report.page, arena.report.tables\n"
        "print({'torch', 'pandas', 'tabulate', 'jinja2', 'rich'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_a_page_builds_without_torch(tmp_path: Any) -> None:
    code = (
        "import json, sys; sys.modules['torch'] = None\n"
        "from arena.report.page import write_leaderboard\n"
        "write_leaderboard(json.loads(sys.argv[1]), {}, sys.argv[2])"
    )
    item = json.dumps([record()])
    subprocess.run([sys.executable, "-c", code, item, str(tmp_path)], check=True)
    assert (tmp_path / "index.html").exists()
