"""Sites: what is published is read, shown, compared and checked; nothing in it is believed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from test_cli import arena, assert_refused
from test_report import PICTURES, Reader, board, record

from arena.core.metric_list import METRICS
from arena.core.registry import BadInput
from arena.published import faults, read
from arena.report import rating, tables
from arena.report.changes import as_text, changes
from arena.report.figures import Point, called, draw, drawing, heat, pareto, write_names
from arena.report.page import Extras, build_page, citation
from arena.report.rows import COLUMNS, flatten, unflatten
from arena.report.site import (
    Board,
    _line,
    about_file,
    published_files,
    write_site,
)
from arena.report.statistics import holm, paired_p, smallest_p
from arena.submissions import entries

ROOT = Path(__file__).parents[1]
PUBLISHED = sorted((ROOT / "leaderboards").glob("*/results.json"))
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rating, "RESAMPLES", 20)  # as wide as 200 for what is asked here


def rows_of(records: list[dict]) -> list[dict]:
    return [flatten(item) for item in records]


def publish(folder: Path, records: list[dict], **about: Any) -> Path:
    """A published board of these records."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Board(folder.name, records, title=folder.name, pictures=PICTURES, **about)
    (folder / "about.json").write_text(about_file(made))
    rows = tables.render(tables.current(rows_of(records)), "json")
    (folder / "results.json").write_text(str(rows))
    for name, text in published_files(read(folder)).items():
        (folder / name).write_text(text)
    return folder


def card(folder: Path, name: str, records: list[dict], **changed: Any) -> Path:
    """An entry that `short_entries` reads."""
    path = folder / "entries" / name
    (folder / "board.toml").write_text('name = "toy"\ndataset = ["signs"]\nmodel = ["cnn"]\n')
    path.parent.mkdir(exist_ok=True)
    method = {"name": "mine", "role": "repair", "spec": "mine:x=1"} | changed.pop("method", {})
    board = {"name": "toy", "version": 1}
    body = {"board": board, "method": method, "cells": records, "signature": {"public_key": "k"}}
    state = changed.pop("status", "reproduced")
    path.write_text(json.dumps({"card": body | changed, "state": state}))
    return path


@pytest.fixture
def short_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries need no verification here; those that have one are in test_submissions."""

    def read_all(folder: Path) -> list[tuple[Path, dict]]:
        paths = sorted((folder / "entries").glob("*.json"))
        return [(path, json.loads(path.read_text())) for path in paths]

    def unverified(entry: dict, board: object) -> str:
        return "nobody has verified it." if entry["state"] == "claimed" else ""

    monkeypatch.setattr(entries, "read_all", read_all)
    monkeypatch.setattr(entries, "status", lambda entry, others: (entry["state"], ""))
    monkeypatch.setattr(entries, "unverified", unverified)


# ----------------------------------------------------------------------------------- statistics


def test_holm_published_values() -> None:
    # Holm's example: 0.01, 0.04, 0.03 of three; the second keeps the order of the first ones
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_paired_p_known_values() -> None:
    assert paired_p([1, 2, 3, 4, 5, 6], [0] * 6) == pytest.approx(2 / 2**6) == smallest_p(6)
    assert paired_p([0.5, 0.7], [0.5, 0.7]) == 1.0
    assert paired_p([0.5], [0.7]) == 1.0, "one pair tells nothing"
    assert paired_p([1, -1, 2, -2], [0] * 4) == 1.0
    with pytest.raises(ValueError, match="pairs are needed"):
        paired_p([1.0], [])


def contest(gap: float, attacks: int = 8) -> list[dict]:
    """Three defenses, of which the last is worse by `gap` on every attack, and more each time."""
    names = {"anp": 0.95, "nad": 0.95, "nc": 0.95 - gap}
    return [
        record(f"a{k}", name, der=der + 0.002 * k * (name == "nad") * (-1) ** k - 0.001 * k * gap)
        for k in range(attacks)
        for name, der in names.items()
    ]


def test_the_best_and_those_not_told_from_it_are_marked() -> None:
    frame = tables.leaderboard(rows_of(contest(0.2))).set_index("defense_short")
    assert set(frame.loc[["anp", "nad"], "standing"]) == {"best", "tied"}
    assert frame.loc["nc", "standing"] == ""
    assert frame.loc["nc", "p_best"] < 0.05
    text = str(tables.render(tables.leaderboard(rows_of(contest(0.2))), "md"))
    assert text.count("**") == 2 + 2, "the title and the best"
    assert text.count(" ≈ ") == 1
    latex = str(tables.render(tables.leaderboard(rows_of(contest(0.2))), "latex"))
    assert latex.count("\\mathbf") == 1
    assert latex.count("^{\\approx}") == 1


def test_where_the_test_cannot_tell_nothing_is_tied() -> None:
    frame = tables.leaderboard(rows_of(contest(0.2, attacks=3)))
    assert list(frame["standing"]) == ["best", "", ""]
    assert "cannot be told" in tables.standing_note(frame)


def test_a_defense_with_mishaps_is_never_the_best() -> None:
    frame = tables.leaderboard(rows_of(board())).set_index("defense_short")
    assert math.isnan(frame.loc["anp", "p_best"]), "its seed 1 timed out: it is not compared"
    assert frame.loc["retrain", "standing"] == "best"


# --------------------------------------------------------------------------------------- rating


def duel(attack: str, defense: str, asr: float, acc: float = 0.92, **more: Any) -> dict:
    return record(attack, defense, asr=asr, acc=acc, asr_before=1.0, acc_before=0.92, **more)


def test_a_duels_share_is_the_asr_taken_times_the_accuracy_left() -> None:
    items = [duel("a", "d", 0.25, 0.46), duel("a", "e", 1.0), duel("b", "d", 0.0)]
    items += [duel("b", "e", 0.0, status="failed"), duel("c", "d", 0.0, status="not_applicable")]
    shares = {(d.attack, d.defense): d.share for d in rating.duels(rows_of(items))}
    assert shares == {
        ("a", "d"): pytest.approx(0.75 * 0.5),
        ("a", "e"): 0.0,
        ("b", "d"): 1.0,
        ("b", "e"): 0.0,
    }


def test_the_rating_orders_who_won_and_tolerates_missing_cells() -> None:
    items = [duel(a, "strong", 0.02) for a in "abc"] + [duel(a, "weak", 0.9) for a in "bc"]
    items += [duel("a", "middle", 0.5), duel("b", "middle", 0.45)]
    found = rating.rating(rows_of(items))
    order = [line.name for line in found if line.kind == "defense"]
    assert order == ["strong", "middle", "weak"]
    assert all(line.low <= line.rating + 1e-6 for line in found)
    assert sum(line.rating for line in found) / len(found) == pytest.approx(rating.CENTRE)
    assert found == rating.rating(rows_of(items[::-1])), "the order of the rows does not matter"
    strong = next(line for line in found if line.name == "strong")
    assert (strong.duels, strong.mean, strong.worst) == (
        3,
        pytest.approx(0.98),
        pytest.approx(0.98),
    )


def test_no_duels_no_rating() -> None:
    assert rating.rating([]) == []
    assert (
        rating.rating(rows_of([record("none"), duel("a", "d", 0.1, status="not_established")]))
        == []
    )


# -------------------------------------------------------------------------------------- figures


def test_the_pareto_front_is_what_nobody_beats() -> None:
    points = [
        Point(n, d, a, 1, False)
        for n, d, a in [("p", 1, 50), ("q", 3, 2), ("r", 4, 2), ("s", 0, 99)]
    ]
    assert [p.name for p in pareto(points)] == ["s", "p", "q"]


def test_a_method_has_its_fields_only_beside_another_of_its_name() -> None:
    specs = ["moth:updates=240", "nc:steps=20", "nc", "d" * 40]
    assert called(specs) == ["moth", "nc:steps=20", "nc", "d" * 25 + "…"]


@pytest.mark.parametrize("close", [0.0, 0.2, 1.0])
def test_names_in_a_figure_hide_neither_each_other_nor_points(close: float) -> None:
    """Ten defenses in one place, near each other, or apart."""
    from matplotlib.figure import Figure

    found = [Point(f"defense_{n}", close * n, 90 * close * (n % 3), 9, False) for n in range(10)]
    found.append(Point("far", 20, 100, 1, True))
    sheet = Figure(figsize=(6.4, 4.6), layout="constrained", dpi=110)
    axes = sheet.add_subplot()
    for point in found:
        axes.scatter(point.drop, point.asr)
    axes.margins(0.12)
    boxes = write_names(sheet, axes, found)
    assert len(boxes) == len(found)
    for place, box in enumerate(boxes):
        assert not box.count_overlaps(boxes[:place])
        assert all(axes.bbox.contains(*corner) for corner in box.corners())
        for point in found:
            assert not box.contains(*axes.transData.transform((point.drop, point.asr)))


def test_figures_are_files_of_both_kinds_and_the_same_bytes() -> None:
    rows = rows_of(board())
    drawn = draw(rows)
    assert [d.name for d in drawn.drawings] == ["heat", "tradeoff", "cost"]
    for one in drawn.drawings:
        assert one.png.startswith(b"\x89PNG")
        assert b"<svg" in one.svg[:600]
    attacked = filter(tables.is_attacked, tables.current(rows_of(board()[::-1])))
    again = heat(tables.established(list(attacked)))
    assert not isinstance(again, str)
    title, caption, paint, _ = again
    other = drawing("heat", title, caption, paint)
    assert (other.png, other.svg) == (drawn.drawings[0].png, drawn.drawings[0].svg)


def test_what_cannot_be_drawn_is_named_with_the_reason() -> None:
    assert draw([]).absent == [("all figures", "no attack was established")]
    bare = rows_of([record(metrics={}, budget={})])
    assert {title for title, _ in draw(bare).absent} == {"heat", "trade-off", "cost"}


def test_names_with_dollars_and_other_scripts_are_drawn() -> None:
    items = [record("patch", name) for name in ("$x^{$", "防御", "b" * 200)]
    assert draw(rows_of(items)).drawings


# ------------------------------------------------------------------------------- published boards


def test_a_row_comes_back_from_its_record() -> None:
    for item in board():
        row = flatten(item)
        assert flatten(unflatten(row)) == row
    assert unflatten(record()) == record(), "a record is one already"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([], "a row is a JSON object"),
        ({"board": "x"}, "has no version"),
        (flatten(record()) | {"seed": [1]}, "seed is no word"),
    ],
)
def test_what_is_no_row_is_refused(row: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unflatten(row)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_boards_hold_together(path: Path) -> None:
    assert faults(path.parent) == []
    assert all(set(COLUMNS) <= set(row) for row in json.loads(path.read_text()))


def test_a_stale_table_and_an_unverified_card_are_faults(
    tmp_path: Path, short_entries: None
) -> None:
    folder = publish(tmp_path / "toy", board())
    assert faults(folder) == []
    (folder / "leaderboard.md").write_text("92 % of everything")
    mine = record("patch", "mine", key="m")
    card(folder, "a.json", [mine], status="claimed", signature=None)
    found = faults(folder)
    assert any("leaderboard.md is not what results.json makes" in fault for fault in found)
    assert "toy/entries/a.json: nobody has verified it." in found
    answer = arena("leaderboard", "check", tmp_path)
    assert answer.code == 1
    (folder / "entries/a.json").unlink()
    assert arena("leaderboard", "check", tmp_path, "--fix").code == 0


def test_a_papers_figure_that_no_row_answers_is_a_fault(tmp_path: Path) -> None:
    """As where it names an attack in short, and rows have the full spec."""
    rows = [flatten(item) for item in board()]
    folder = publish(tmp_path / "toy", board())
    path = folder / "about.json"
    full = {"attack": rows[-1]["attack"], "defense": rows[-1]["defense"], "source": "a paper"}
    for changed, told in (
        ({}, []),
        ({"defense": ""}, []),
        ({"attack": "gone"}, ["toy/about.json: no row has the spec of what a paper tells of."]),
        ({"defense": "gone"}, ["toy/about.json: no row has the spec of what a paper tells of."]),
    ):
        path.write_text(json.dumps({**json.loads(path.read_text()), "published": [full | changed]}))
        arena("leaderboard", "check", tmp_path, "--fix")
        assert faults(folder) == told
    path.write_text(json.dumps({**json.loads(path.read_text()), "published": [{"asr": 3}, 4]}))
    assert "Traceback" not in arena("leaderboard", "check", tmp_path, "--fix").err
    assert faults(folder) == []


def test_a_site_of_published_boards(tmp_path: Path, short_entries: None) -> None:
    folder = publish(tmp_path / "boards/toy", board())
    publish(tmp_path / "boards/empty", [record(key="e", board={"name": "empty", "version": 1})])
    (tmp_path / "boards/empty/results.json").write_text("[]")
    card(folder, "mine.json", [record("patch", "mine", key="m")])
    card(folder, "no.json", [record("patch", "other", key="o")], status="withdrawn")
    answer = arena(
        "leaderboard", "build", "--published", tmp_path / "boards", "--out", tmp_path / "s"
    )
    assert answer.code == 0, answer.err
    site = tmp_path / "s"
    page = (site / "toy/index.html").read_text()
    text = "".join(Reader(page, site=True).text)
    assert "mine.json" in page
    assert (
        "mine" in json.loads((site / "toy/tables/cells.json").read_text())[-1].values()
        or "mine" in (site / "toy/tables/cells.csv").read_text()
    )
    assert "other:epochs" not in (site / "toy/tables/cells.csv").read_text()
    assert "no.json is withdrawn: its cells enter no table." in text
    assert "has no rows yet" in (site / "empty/index.html").read_text()
    for name in ("leaderboard", "cells", "attacks", "rating", "failures"):
        for suffix in ("md", "csv", "json", "tex"):
            assert (site / f"toy/tables/{name}.{suffix}").stat().st_size
    for name in ("heat", "tradeoff", "cost"):
        assert (site / f"toy/figures/{name}.svg").exists()
        assert f'src="figures/{name}.png"' in page
    index = (site / "index.html").read_text()
    assert 'href="toy/index.html"' in index
    assert "every cell" in index.lower()
    wrong = arena("leaderboard", "build", "toi", "--published", tmp_path / "boards")
    assert_refused(wrong, "'toi'", "'toy'")


def test_a_board_of_a_site_can_be_published_as_it_is(tmp_path: Path) -> None:
    metrics = [metric._asdict() for metric in METRICS]
    made = Board("toy", board(), "A toy", pictures=PICTURES, metrics=metrics)
    write_site([made], tmp_path / "site")
    folder = tmp_path / "site/toy"
    assert faults(folder) == []
    found = read(folder)
    assert found.pictures == PICTURES
    assert dict(found.facts)["Hardware"] == ["device cpu"]
    assert [flatten(row) for row in found.records] == tables.current(rows_of(board()))


def test_two_cards_for_one_cell_are_shown_once_and_told(
    tmp_path: Path, short_entries: None
) -> None:
    folder = publish(tmp_path / "toy", board())
    mine = record("patch", "mine", key="m")
    card(folder, "a.json", [mine])
    card(folder, "b.json", [mine | {"key": "n", "metrics": {**mine["metrics"], "acc": 0.1}}])
    found = read(folder)
    assert len(found.records) == len(board()) + 1
    assert found.notes == ["b.json: 1 cell also in a.json; shown as there."]
    assert any("also in a.json" in fault for fault in faults(folder))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("results.json", "{", "cannot be read as JSON"),
        ("results.json", "{}", "does not hold a list of rows"),
        ("results.json", '[{"board": 1}]', "has no version"),
        ("about.json", "[]", "does not hold a JSON object"),
        ("about.json", '{"pictures": {"a": {"images": [{}]}}}', "the pictures cannot be read"),
        ("entries/x.json", "[" * 100_000, "is no JSON of ours"),
        ("entries/x.json", "3", "is no entry that"),
        ("entries/x.json", '{"card": {}}', "is no entry that"),
    ],
)
def test_files_that_are_none_are_refused_in_one_sentence(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    folder = publish(tmp_path / "toy", [record()])
    (folder / "entries").mkdir(exist_ok=True)
    (folder / name).write_text(text)
    with pytest.raises(BadInput, match=said):
        read(folder)
    answer = arena("leaderboard", "build", "--published", tmp_path, "--out", tmp_path / "site")
    assert (answer.code, "Traceback" in answer.err) == (2, False)
    assert not (tmp_path / "site").exists(), "nothing half-written"


def test_hostile_words_stay_words(tmp_path: Path, short_entries: None) -> None:
    item = record("patch", "mine")
    item["defense"] |= {"short": HOSTILE, "spec": HOSTILE + "x" * 200, "name": HOSTILE}
    item |= {"reason": "</script><script>alert(2)</script>", "status": "failed"}
    item["metrics"]["acc"] = math.inf
    folder = publish(tmp_path / "toy", [record()])
    hostile = {"name": HOSTILE, "spec": HOSTILE}
    card(
        folder,
        "x.json",
        [json.loads(json.dumps(item).replace("Infinity", "1e999"))],
        method=hostile,
    )
    write_site([read(folder)], tmp_path / "site")
    for page in (tmp_path / "site").rglob("*.html"):
        text = page.read_text()
        assert HOSTILE not in text
        assert "<script>alert" not in text
        assert Reader(text, site=True).tags.count("script") == 3
    for figure in (tmp_path / "site").rglob("*.svg"):
        assert "<script" not in figure.read_text()


def test_null_methods_alone_are_no_contest(tmp_path: Path) -> None:
    alone = record("patch", "none", null=True)
    lines = [_line(Board("toy", rows), rows_of(rows)) for rows in ([alone], board())]
    assert [line["best"] for line in lines] == [tables.MISSING, lines[1]["best"]]
    assert lines[1]["best"] != tables.MISSING


def test_a_site_keeps_to_its_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot have a folder"):
        write_site([Board("../x", [record()])], tmp_path / "site")
    with pytest.raises(BadInput, match="Two boards are called 'x'"):
        write_site([Board("x", []), Board("x", [])], tmp_path / "site")


def test_the_citation_names_version_and_hash(tmp_path: Path) -> None:
    import hashlib

    folder = publish(tmp_path / "toy", board())
    cited = citation("A & B", rows_of(board()))
    assert cited.sha256 == hashlib.sha256((folder / "results.json").read_bytes()).hexdigest()
    assert "toy v1" in cited.text
    assert "title = {A \\& B}" in cited.bibtex
    assert cited.sha256 in build_page(board(), {})


def test_a_run_that_is_alone_asks_for_no_files_beside_its_page() -> None:
    page = build_page(board(), {})
    assert "tables/" not in page.split("<script")[0]
    assert "tables/leaderboard.csv" in build_page(board(), {}, extras=Extras(exports=True))


def test_a_reason_for_which_figures_are_left_out_is_said_once() -> None:
    absent = [("examples", "no images"), ("cost", "no cell has its seconds"), ("ASR", "no images")]
    page = build_page(board(), {}, extras=Extras(absent=absent))
    assert "Left out: cost (no cell has its seconds); examples, ASR (no images)." in page


# ------------------------------------------------------------------------------------- differences


def test_equal_results_have_no_differences() -> None:
    assert changes(rows_of(board()), rows_of(board()[::-1])) == []
    assert as_text([]) == "No differences."


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"key": "new"}, "code: the key differs"),
        (
            {"dataset": {"name": "signs:side=32", "fingerprint": "beef"}, "key": "new"},
            "data: f00d → beef",
        ),
        ({"board": {"name": "toy", "version": 2}}, "version: 1 → 2"),
        ({}, "the same code, data and seed, run again"),
        ({"commit": "decade"}, "commit: c0ffee → decade"),
    ],
)
def test_a_change_says_why(changed: dict, why: str) -> None:
    (found,) = changes(rows_of([record(acc=0.9)]), rows_of([record(acc=0.8, **changed)]))
    assert found.figures == {"acc": (0.9, 0.8)}
    assert any(why in reason for reason in found.why)


def test_cells_of_one_side_say_what_the_other_lacks() -> None:
    one = [record(), record("blend")]
    other = [record(), record("blend", seed=1), record("patch", "new")]
    kinds = {(c.kind, c.attack, c.defense): c.why for c in changes(rows_of(one), rows_of(other))}
    assert kinds["removed", "blend", "none"] == ("the cell was not run on one side",)
    assert kinds["added", "blend", "none"] == ("seed: only one side has 1",)
    assert kinds["added", "patch", "new"] == ("defense new: the other lacks it",)


def test_diff_exits_as_it_found(tmp_path: Path) -> None:
    one = publish(tmp_path / "one", [record(), record("blend")])
    other = publish(tmp_path / "other", [record(acc=0.5, key="k"), record("blend")])
    assert arena("leaderboard", "diff", one, one / "results.json").code == 0
    answer = arena("leaderboard", "diff", one, other)
    assert answer.code == 1
    assert "acc 90.0 → 50.0" in answer.out
    told = json.loads(arena("leaderboard", "diff", one, other, "--json").out)
    assert told[0]["figures"]["acc"] == [0.9, 0.5]
    assert_refused(arena("leaderboard", "diff", one, tmp_path / "gone"), "no results.json")


# -------------------------------------------------------------------------------------- publishing


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "index.html").write_text("x")
    return folder


def test_publishing_to_a_folder_replaces_only_a_site(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arena.publishing import publish as send

    to = tmp_path / "host/here"
    assert not send(site, str(to), really=False).done
    assert not to.exists(), "a dry run writes nothing"
    send(site, str(to), really=True)
    (to / "stale.html").write_text("old")
    assert send(site, str(to), really=True).files == ["index.html"]
    assert {p.name for p in to.iterdir()} == {"index.html", ".arena-site"}
    assert [p.name for p in to.parent.iterdir()] == ["here"], "nothing is left beside it"
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.tex").write_text("dear")
    with pytest.raises(BadInput, match="no site put there"):
        send(site, str(other), really=True)
    assert (other / "chapter.tex").read_text() == "dear"
    with monkeypatch.context() as patch:
        patch.chdir(to)
        for here in (".", str(to), ".."):
            with pytest.raises(BadInput, match="the folder you are in"):
                send(site, here, really=True)


class Hub:
    def __init__(self, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.error = error

    def create_repo(self, name: str, **options: Any) -> None:
        if self.error:
            raise self.error
        self.calls.append(("create", {"name": name, **options}))

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload", options))


def test_publishing_to_the_hub(site: Path) -> None:
    from arena.publishing import publish as send

    hub = Hub()
    assert not send(site, "hf://me/boards", really=False, api=hub).done
    assert hub.calls == [], "a dry run asks nobody"
    send(site, "hf://datasets/me/boards", really=True, api=hub)
    assert [name for name, _ in hub.calls] == ["create", "upload"]
    assert hub.calls[0][1] == {"name": "me/boards", "repo_type": "dataset", "exist_ok": True}
    assert hub.calls[1][1]["folder_path"] == str(site)
    for wrong in ("hf://me", "hf://a/b/c", "s3://bucket"):
        with pytest.raises(BadInput):
            send(site, wrong, really=True, api=hub)
    with pytest.raises(BadInput, match="hf://me/boards could not be written: no token"):
        send(site, "hf://me/boards", really=True, api=Hub(OSError("no token")))


def test_publish_is_a_dry_run_by_default(tmp_path: Path) -> None:
    publish(tmp_path / "boards/toy", [record()])
    words = (
        "leaderboard",
        "publish",
        "--published",
        tmp_path / "boards",
        "--to",
        tmp_path / "host",
    )
    answer = arena(*words)
    assert answer.code == 0, answer.err
    assert "Dry run" in answer.out
    assert not (tmp_path / "host").exists()
    assert arena(*words, "--yes").code == 0
    assert (tmp_path / "host/toy/index.html").exists()
