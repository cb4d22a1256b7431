"""Sites in a real browser: they open from disk, ask nobody, and do what a reader expects."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import PICTURES, board, record

from arena.report.page import write_leaderboard
from arena.report.site import Board, write_site

pytestmark = pytest.mark.browser

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
READY = "body[data-ready=yes]"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


class Tab:
    """A page, and what must not happen in it."""

    def __init__(self, chromium: Any, **options: Any) -> None:
        self.context = chromium.new_context(**options)
        self.page = self.context.new_page()
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.faults.append("a dialog was opened"))
        self.page.on("console", self._said)
        self.page.on("request", self._asked)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.faults.append(f"{message.type}: {message.text}")

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.faults.append(f"request: {request.url}")

    def open(self, path: Path, hash: str = "") -> Any:
        self.page.goto("about:blank")
        self.page.goto(path.as_uri() + hash)
        self.page.wait_for_selector(READY, timeout=20_000)
        return self.page


@pytest.fixture
def tab(chromium: Any) -> Iterator[Tab]:
    made = Tab(chromium)
    yield made
    made.context.close()
    assert made.faults == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    odd = record("patch", "odd", key="odd")
    odd["defense"] |= {"short": HOSTILE, "spec": HOSTILE}
    single = record("wanet", "none", key="single", labels="kept")
    boards = [Board("toy", [*board(), odd, single], "A toy", pictures=PICTURES), Board("empty", [])]
    write_site(boards, folder)
    return folder


def column(page: Any, field: str) -> list[str]:
    cells = page.locator(f"#explorer .tabulator-row [tabulator-field={field}]")
    return [text.strip() for text in cells.all_inner_texts()]


def counted(page: Any, text: str) -> None:
    """Wait until the table tells so (the policy forbids the driver to wait by evaluating words)."""
    page.locator("#count", has_text=re.compile(f"^{re.escape(text)}")).wait_for()


def test_sorting_stays_in_the_address(tab: Tab, site: Path) -> None:
    page = tab.open(site / "toy/index.html")
    page.get_by_role("button", name="DER %").click()
    assert column(page, "der")[0].startswith("95.0")
    assert "sort=-der" in page.url
    page.get_by_role("button", name="DER %").press("Enter")  # the keyboard sorts as well
    assert "sort=der" in page.url
    again = tab.open(site / "toy/index.html", "#sort=der")
    assert column(again, "der")[0].startswith("50.0")
    head = page.locator("table.sortable th").first
    head.focus()
    head.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert "t0=0" in page.url


def test_filters_and_search_narrow_and_stay_in_the_address(tab: Tab, site: Path) -> None:
    page = tab.open(site / "toy/index.html")
    everything = page.locator("#count").inner_text()
    page.select_option("#filter-attack", "patch")
    counted(page, "5 of")
    assert set(column(page, "attack")) == {"patch"}
    page.fill("#filter-q", "retr")
    counted(page, "1 of")
    assert "attack=patch" in page.url
    assert "q=retr" in page.url
    again = tab.open(site / "toy/index.html", "#attack=patch&q=retr")
    assert column(again, "defense") == ["retrain (null)"]
    again.get_by_role("button", name="Clear").click()
    counted(again, everything)
    again.select_option("#filter-view", "runs")
    again.select_option("#filter-status", "timeout")
    counted(again, "1 of")
    assert column(again, "seed") == ["1"]
    last = tab.open(site / "toy/index.html", "#seconds=1")
    assert last.locator("#count").inner_text().startswith("0 ")
    assert "Nothing matches" in last.locator("#explorer").inner_text()


def test_a_record_opens_with_provenance_and_pictures(tab: Tab, site: Path) -> None:
    page = tab.open(site / "toy/index.html", "#attack=patch&q=anp")
    page.locator("#explorer").get_by_role("link", name="patch").click()
    record = page.locator("#record")
    assert record.is_visible()
    text = record.inner_text()
    for words in ("patch × anp", "anp:epochs=10", "seed 1: timeout", "poisons data"):
        assert words in text
    assert record.locator("img").count() == 3
    record.get_by_text("seed 1: timeout").click()
    for words in ("stopped after 9 s", "c0ffee", "patch/anp/1/", "device cpu", "torch 2"):
        assert words in record.inner_text()
    assert "cell=patch" in page.url
    page.keyboard.press("Escape")
    assert not record.is_visible()
    assert "cell=" not in page.url
    page.locator("table.matrix a").first.focus()
    page.keyboard.press("Enter")
    assert record.is_visible(), "a tile opens its records, by keyboard too"
    linked = tab.open(site / "toy/index.html", "#cell=patch%2Fanp%2F1")
    assert linked.locator("#record-title").inner_text() == "patch × anp"


def test_the_index_leads_to_boards_and_records(tab: Tab, site: Path) -> None:
    page = tab.open(site / "index.html", "#attack=patch&q=anp")
    page.locator("#explorer").get_by_role("link", name="patch").click()
    page.wait_for_url("**/toy/index.html#cell=**")
    page.wait_for_selector("#record[open]")
    assert "patch × anp" in page.locator("#record").inner_text()


def test_the_theme_switches_and_is_kept(chromium: Any, site: Path) -> None:
    tab = Tab(chromium, color_scheme="light")
    page = tab.open(site / "toy/index.html")
    colour = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(colour) == "rgb(255, 255, 255)"
    button = page.locator("#theme")
    button.click()
    button.click()
    assert button.inner_text() == "Theme: dark"
    assert page.evaluate(colour) == "rgb(21, 23, 26)"
    page.reload()
    page.wait_for_selector(READY)
    assert page.evaluate(colour) == "rgb(21, 23, 26)"
    tab.context.close()
    dark = Tab(chromium, color_scheme="dark")
    assert dark.open(site / "index.html").evaluate(colour) == "rgb(21, 23, 26)", "the system's"
    dark.context.close()
    assert tab.faults == dark.faults == []


def test_a_phone_scrolls_down_only(chromium: Any, site: Path) -> None:
    tab = Tab(chromium, viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    for path in ("index.html", "toy/index.html"):
        page = tab.open(site / path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
    page.locator("#explorer a").first.tap()
    assert page.locator("#record").is_visible()
    assert page.locator("#record").bounding_box()["width"] <= 360
    tab.context.close()
    assert tab.faults == []


def test_figures_load_and_nothing_shifts(tab: Tab, site: Path) -> None:
    tab.page.add_init_script(
        "window.shift = 0; new PerformanceObserver(list => list.getEntries().forEach("
        "e => { window.shift += e.value; })).observe({ type: 'layout-shift', buffered: true });"
    )
    page = tab.open(site / "toy/index.html")
    page.locator("#figures").scroll_into_view_if_needed()
    for image in page.locator("#figures img").all():
        image.scroll_into_view_if_needed()
        page.wait_for_timeout(150)
        assert image.evaluate("i => i.complete && i.naturalWidth > 0")
    assert page.evaluate("window.shift") < 0.1  # what Chromium's own measure calls good


def test_numbers_stand_right_and_one_seed_is_grey(tab: Tab, site: Path) -> None:
    page = tab.open(site / "toy/index.html", "#q=wanet")
    cell = page.locator("#explorer .tabulator-row [tabulator-field=acc]").first
    assert cell.evaluate("e => getComputedStyle(e).textAlign") == "right"
    assert "tabular-nums" in cell.evaluate("e => getComputedStyle(e).fontVariantNumeric")
    assert "single" in page.locator("#explorer .tabulator-row").first.get_attribute("class")
    assert page.locator("td.best").count() == 1


def test_hostile_words_run_nothing(tab: Tab, site: Path) -> None:
    for path in ("index.html", "toy/index.html"):
        page = tab.open(site / path, "#q=onerror")
        assert HOSTILE in " ".join(column(page, "defense"))
    page.locator("#explorer a").first.click()
    assert HOSTILE in page.locator("#record-title").inner_text()
    page.wait_for_timeout(200)  # what would run would have run; `tab` looks for it


def test_a_board_without_rows_says_so(tab: Tab, site: Path) -> None:
    tab.page.goto((site / "empty/index.html").as_uri())
    assert tab.page.locator("h1").is_visible()
    assert tab.page.locator("#theme").is_visible()


def test_five_thousand_rows_open_within_two_seconds(tab: Tab, tmp_path: Path) -> None:
    records = [
        record(f"attack{a}", f"defense{d}", seed, acc=0.9 - 0.001 * d, asr=a / 100)
        for a in range(50)
        for d in range(20)
        for seed in range(5)
    ]
    assert len(records) == 5000
    write_leaderboard(records, {}, tmp_path)
    started = time.monotonic()
    page = tab.open(tmp_path / "index.html", "#view=runs")
    seconds = time.monotonic() - started
    assert page.locator("#count").inner_text() == "5000 of 5000 runs"
    size = (tmp_path / "index.html").stat().st_size
    print(json.dumps({"seconds": round(seconds, 2), "bytes": size}))
    assert seconds < 2
    page.get_by_role("button", name="ASR %").click()
    assert column(page, "asr")[0].startswith("49.0")
