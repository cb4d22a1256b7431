"""The command line: one sentence and exit code 2 for bad input; lists, pages and a small run."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from arena import cli, doctor, listing
from arena.core.inversion.families import families
from arena.core.measures import measures
from arena.core.registry import BadInput, attacks, defenses

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "torchvision", "timm", "pandas", "datasets", "pyarrow", "PIL", "numpy")


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def arena(*words: object) -> Answer:
    """What the console script does with these words, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (  # noqa: PT012
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        patch.setattr(sys, "argv", ["arena", *map(str, words)])
        cli.main()
    return Answer(int(ended.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with a cache outside and no data directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("ARENA_DATA_DIR", "ARENA_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ARENA_CACHE_DIR", str(tmp_path / "cache"))
    return folder


def assert_refused(answer: Answer, *words: str) -> None:
    """One sentence that holds `words`, and exit code 2."""
    assert answer.code == 2, answer
    assert answer.err.startswith("arena: ")
    assert answer.err.count("\n") == 1, answer.err
    assert answer.err.endswith((".\n", "?\n"))
    assert "?." not in answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""
    for word in words:
        assert word in answer.err, answer.err


# -------------------------------------------------------------------------------------- bad input

TINY = ("-d", "signs:size=100,classes=5", "-m", "fastnet_tiny", "--recipe", "smoke")
BAD = {
    "attack": (("run", "-a", "pach"), "'pach'", "'patch'"),
    "defense": (("run", "-D", "finetun"), "'finetun'", "'finetune'"),
    "data set": (("run", "-d", "sgns"), "'sgns'", "'signs'"),
    "model": (("run", "-m", "fastnt"), "'fastnt'", "'fastnet'"),
    "library model": (("run", "-m", "timm:resnet81"), "resnet81", "resnet18"),
    "measure": (("run", "--measure", "pdg"), "'pdg'", "'pgd'"),
    "measure field": (("run", "--measure", "pgd:esp=4"), "'esp'", "'eps'"),
    "measure range": (("run", *TINY, "--measure", "pgd:eps=0"), "eps", "above 0"),
    "measure twice": (("run", "--measure", "pgd", "--measure", "pgd:eps=4"), "'pgd'", "once"),
    "family of a measure": (
        ("run", *TINY, "--measure", "class_distance:method=nx"),
        "'nx'",
        "'nc'",
    ),
    "pairs of a measure": (("run", *TINY, "--measure", "class_distance:pairs=5:0"), "class 5"),
    "images of a measure": (
        ("run", *TINY, "--measure", "class_distance:samples=101"),
        "100",
        "101",
    ),
    "info measure": (("info", "class_distanc"), "'class_distanc'", "'class_distance'"),
    "attack field": (("run", "-a", "patch:rte=0.1"), "'rte'", "'rate'"),
    "defense field": (("run", "-D", "finetune:epoch=3"), "'epoch'", "'epochs'"),
    "data field": (("run", "-d", "signs:clases=5"), "'clases'", "'classes'"),
    "field without value": (("run", "-a", "patch:rate"), "'rate'", "field=value"),
    "range": (("run", "-a", "patch:rate=7"), "rate", "at most 1", "7"),
    "data range": (("run", "-d", "signs:classes=99"), "classes", "from 5 to 45", "99"),
    "choice": (("run", "-a", "patch:place=botom_right"), "place", "'bottom_right'"),
    "type": (("run", "-a", "patch:rate=much"), "rate", "a number", "'much'"),
    "file in a field": (("run", "-a", "patch:kind=image,image=no.png"), "image", "'no.png'"),
    "two fields": (("run", "-a", "patch:mode=all_to_all,victim=1"), "victim"),
    "recipe": (("run", "--recipe", "fst"), "'fst'", "'fast'"),
    "recipe field": (("run", *TINY, "--recipe", "fast:epoch=20"), "'epoch'", "'epochs'"),
    "recipe value": (("run", *TINY, "--recipe", "fast:epochs=0"), "epochs", "at least 1", "got 0"),
    "clean share": (("run", "--clean-share", "1.5"), "clean_share", "(0, 1]", "1.5"),
    "timeout": (("run", "--timeout", "0"), "timeout", "above 0"),
    "seed word": (("run", "-s", "one"), "--seed", "integer", "'one'"),
    "seed range": (("run", "-s", "-1"), "seed", "-1"),
    "workers": (("run", "--workers", "0"), "--workers", "0"),
    "option": (("run", "--atack", "patch"), "'--atack'", "'--attack'"),
    "command": (("lst", "attacks"), "'lst'", "'list'"),
    "missing argument": (("info",), "name"),
    "list kind": (("list", "atacks"), "'atacks'", "'attacks'"),
    "info": (("info", "fine_prunning"), "'fine_prunning'", "'fine_pruning'"),
    "info library": (("info", "timm:resnet81"), "resnet81", "resnet18"),
    "format": (("results", "--format", "jsn"), "'jsn'", "'json'"),
    "no store": (("results",), "--store"),
    "store that is not there": (("show", "ab", "--store", "gone"), "'gone'", "--store"),
    "device": (("run", *TINY, "--device", "cdua"), "'cdua'", "'cuda'"),
    "device number": (("run", *TINY, "--device", "cuda:x"), "'cuda:x'"),
    "board file": (("run", "leaderboards/gone/board.toml"), "'leaderboards/gone/board.toml'"),
    "image folder": (("run", "-d", "imagefolder:gone"), "gone"),
    "data directory": (("run", "-d", "cifar10", "--data-dir", "gone"), "gone", "cifar10"),
    "local only": (("run", "-d", "lisa"), "lisa", "--data-dir"),
    "too small": (("run", "-d", "signs:size=100", "-m", "timm:inception_v3"), "inception_v3", "32"),
    "target": (("run", *TINY, "-a", "patch:target=7"), "target", "7"),
    "poisoned share": (("run", *TINY, "-a", "patch:rate=0.001"), "rate", "less than one image"),
    "no share": (("run", *TINY, "-a", "patch:rate=0"), "rate", "above 0"),
    "large patch": (("run", *TINY, "-a", "patch:size=99"), "99x99", "32x32"),
    "victim is target": (("run", *TINY, "-a", "patch:victim=0,target=0"), "victim", "both 0"),
    "clean label": (("run", *TINY, "-a", "sig:rate=0.9,of=data"), "90 images", "only 20"),
    "base": (("run", *TINY, "-a", "sdrm:base=pach"), "'pach'", "'patch'"),
    "base that cannot be hidden": (("run", *TINY, "-a", "sdrm:base=blind"), "base=blind", "wanet"),
    "base field": (("run", *TINY, "-a", "sdrm:base=patch:rte=1"), "'rte'", "'rate'"),
    "style": (("run", *TINY, "-a", "dfst:style=gone"), "style", "gone"),
    "preview": (("preview", "pach"), "'pach'", "'patch'"),
    "preview target": (("preview", "patch:target=77"), "target", "77"),
    "picture in a folder's place": (("show", "ab", "--picture", ".."), "'..'", "name a file in it"),
    "picture's path of nothing": (("preview", "patch", "-o", "gone/.."), "'gone/..'", "a folder"),
    "key": (("submit", "key", "."), "'.'", "name a file in it"),
    "weights where the report goes": (("repair", "ab", "-o", "a.md"), "'a.md'", ".safetensors"),
    "preview of nothing": (("preview", "none", "-d", "signs:size=100,classes=5"), "no trigger"),
}


@pytest.mark.parametrize("words", BAD.values(), ids=BAD.keys())
def test_bad_input(empty: Path, words: tuple[tuple[str, ...], str]) -> None:
    command, *named = words
    assert_refused(arena(*command), *named)
    assert not list(empty.iterdir())


OUTPUTS = (
    ("preview", "patch", "-o"),
    ("show", "ab", "--picture"),
    *((name, "ab", "-o") for name in ("distance", "scan", "repair")),
    ("invert", "ab", "-v", "0", "-t", "1", "-o"),
    ("submit", "run", "m.py", "--board", "b", "--out"),
    ("submit", "verify", "card.json", "--out"),
    ("submit", "key"),
)


@pytest.mark.parametrize("words", OUTPUTS, ids=lambda words: " ".join(words[:2]))
def test_a_place_that_cannot_be_written_is_refused_first(
    empty: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.write_text("dear")
    assert_refused(arena(*words, str(folder)), "folder", "name a file in it")
    assert_refused(arena(*words, str(file / "new" / "x.png")), "x.png", "is a file")
    assert not list(empty.iterdir())
    assert file.read_text() == "dear"


def test_bad_pictures_for_an_attack(empty: Path, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    Image.new("RGB", (6, 6)).save(tmp_path / "p.png")
    Image.new("L", (5, 6)).save(tmp_path / "m.png")
    for spec, *named in (
        (f"dfst:style={nothing}", "holds no pictures"),
        (f"reflection:images={nothing}", "holds no pictures"),
        (f"patch:kind=image,image={tmp_path / 'p.png'},mask={tmp_path / 'm.png'}", "6x5", "6x6"),
    ):
        assert_refused(arena("run", *TINY, "-a", spec), *named)
    assert not list(empty.iterdir())


def test_a_colour_filter_wants_colours(empty: Path, tmp_path: Path) -> None:
    for row in range(16):
        split, label = ("train", "test")[row % 2], "ab"[row // 2 % 2]
        place = tmp_path / "grey" / split / label / f"{row}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), 10 * row).save(place)
    grey = f"imagefolder:{tmp_path / 'grey'}"
    assert_refused(arena("run", "-d", grey, "-a", "filter"), "filter", "three channels")
    assert not list(empty.iterdir())


BAD_BOARDS = {
    "key": ('atack = ["patch"]', "'atack'", "'attack'"),
    "toml": ("attack = [", "mine/board.toml", "cannot be read"),
    "type": ("seed = 'x'", "seed", "whole numbers", "'x'"),
    "yes as number": ("seed = true", "seed", "whole numbers"),
    "name": ("name = 'A board'", "'A board'"),
    "version": ("version = 0", "version", "0"),
    "nothing": ("attack = []", "attack"),
    "method": ("attack = ['blendd']", "'blendd'", "'blend'"),
    "measure": ("measure = ['pgdd']", "'pgdd'", "'pgd'"),
    "measures": ("measure = ['pgd', 'pgd:eps=4']", "'pgd'", "more than once"),
    "measure type": ("measure = [1]", "measure", "words"),
    "recipe": ("recipe = 'papr'", "'papr'", "'paper'"),
}


@pytest.mark.parametrize("case", BAD_BOARDS.values(), ids=BAD_BOARDS.keys())
def test_bad_board(empty: Path, tmp_path: Path, case: tuple[str, ...]) -> None:
    content, *named = case
    board = tmp_path / "boards" / "mine" / "board.toml"
    board.parent.mkdir(parents=True)
    board.write_text(content)
    assert_refused(arena("run", board), *named)
    assert not list(empty.iterdir())


def test_a_board_leaves_no_room_for_flags(empty: Path) -> None:
    assert_refused(arena("run", "board.toml", "-a", "patch"), "--attack")
    assert_refused(arena("run", "board.toml", "--measure", "pgd"), "--measure")


def test_a_folder_is_no_board(empty: Path, tmp_path: Path) -> None:
    assert_refused(arena("run", tmp_path), "folder", "board.toml")


def test_corrupt_parquet(empty: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "cifar10"
    data.mkdir(parents=True)
    for split in ("train", "test"):
        (data / f"{split}-00000-of-00001.parquet").write_bytes(b"PAR1 this is not Parquet PAR1")
    answer = arena("run", "-d", "cifar10", "--data-dir", data.parent)
    assert_refused(answer, ".parquet")
    assert not list(empty.iterdir())


def test_store_is_a_file(empty: Path, tmp_path: Path) -> None:
    file = tmp_path / "store"
    file.write_text("mine")
    for command in (("run", *TINY), ("quickstart",)):
        assert_refused(arena(*command, "--store", file), str(file), "folder")
    assert file.read_text() == "mine"
    assert not list(empty.iterdir())


def test_no_free_disk(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    assert_refused(arena("run", *TINY), "room")
    assert not list(empty.iterdir())


def test_no_free_disk_for_the_store(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from arena.store import Store

    monkeypatch.setattr(Store, "free_bytes", lambda store: 1000)
    assert_refused(arena("run", *TINY), "runs/adhoc", "room", "--store")
    assert not list(empty.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(empty: Path) -> None:
    assert_refused(arena("run", *TINY, "--device", "cuda"), "cuda", "no GPU", "--device cpu")
    assert not list(empty.iterdir())


# ---------------------------------------------------------------------------------- lists and info


@pytest.mark.parametrize("kind", cli.KINDS)
def test_list(empty: Path, kind: str) -> None:
    lines = json.loads(arena("list", kind, "--json").out)
    text = arena("list", kind)
    assert text.code == 0
    for line in lines:
        assert line["name"].split()[0] in text.out
    assert lines


def test_lists_are_complete() -> None:
    names = {kind: {line["name"] for line in make()} for kind, make in listing.LISTS.items()}
    assert names["attacks"] == set(attacks.names())
    assert names["defenses"] == set(defenses.names())
    assert names["measures"] == set(measures.names()) == {"class_distance", "pgd"}
    assert {"distance_gain", "robust_acc"} <= names["metrics"]
    assert {"fastnet", "resnet18", "timm:NAME"} <= names["models"]
    assert {"signs", "cifar10", "imagefolder"} <= names["datasets"]
    assert "quickstart" in names["boards"]


def test_boards_of_the_current_folder_are_listed(empty: Path) -> None:
    folder = empty / "leaderboards" / "mine"
    folder.mkdir(parents=True)
    (folder / "board.toml").write_text("title = 'My own'\n")
    assert [line["name"] for line in listing.LISTS["boards"]()] == ["quickstart", "mine"]
    assert "arena run leaderboards/mine/board.toml" in arena("info", "mine").out


@pytest.mark.parametrize("width", [40, 80, 200])
def test_columns_fit_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = [{"name": "one", "summary": "long " * 40}, {"name": "another", "summary": "short"}]
    text = listing.columns(lines).splitlines()
    assert max(map(len, text)) <= width
    assert {line.index(word) for line in text for word in ("summary", "short") if word in line} == {
        len("another") + 2
    }


@pytest.mark.parametrize(
    "name",
    [
        *dict.fromkeys([*attacks.names(), *defenses.names(), *measures.names()]),
        *("signs", "asr", "distance_gain", "resnet18"),
    ],
)
def test_info(empty: Path, name: str) -> None:
    found = json.loads(arena("info", name, "--json").out)["found"]
    text = arena("info", name).out
    for entry in found:
        assert f"{name} ({entry['kind']})" in text
        for field in entry.get("fields", ()):
            assert f"  {field['name']}: {field['type']}" in text


def test_info_tells_all_kinds_of_a_name() -> None:
    assert [entry["kind"] for entry in listing.describe("none")["found"]] == ["attack", "defense"]


def test_info_says_how_each_kind_of_method_is_asked() -> None:
    found = {
        (name, entry["kind"]): entry["example"]
        for name in ("pixel", "finetune", "spectral", "sig", "nc", "pgd")
        for entry in listing.describe(name)["found"]
    }
    repaired, scanned = found["pixel", "defense"].split(" or ")
    assert repaired.startswith("-D pixel:")
    assert scanned.startswith("arena scan CELL --method pixel:")
    assert found["pixel", "trigger family"].startswith("arena distance CELL --method pixel")
    assert found["spectral", "defense"].startswith("arena detect CELL --method spectral")
    assert found["finetune", "defense"].startswith("-D finetune")
    assert found["sig", "attack"].startswith("-a sig")
    assert found["pgd", "measure"].startswith("arena run --measure pgd:eps=8")


def test_info_of_a_field() -> None:
    (entry,) = listing.describe("patch")["found"]
    field = {f["name"]: f for f in entry["fields"]}["rate"]
    assert field["default"] == 0.1
    assert field["range"] == "(0, 1]"
    assert field["type"] == "float"
    assert field["doc"]
    assert entry["source"].startswith("Gu et al. 2017")


def test_info_of_a_field_that_recipes_shorten() -> None:
    (entry,) = listing.describe("moth")["found"]
    field = {f["name"]: f for f in entry["fields"]}["updates"]
    assert field["default"] == 800
    assert field["under"] == {"fast": 240, "smoke": 12}
    assert "updates: int = 800, 240 under fast, 12 under smoke in [1, " in listing.page(
        listing.describe("moth")
    )


@pytest.mark.parametrize("registry", [attacks, defenses, families, measures], ids=lambda r: r.kind)
def test_examples_can_be_built(registry) -> None:
    for name in registry.names():
        for entry in listing.describe(name)["found"]:
            if entry["kind"] == registry.kind:
                assert registry.build(entry["example"].rpartition(" ")[2]) == registry.build(name)


def test_info_names_the_nearest_of_all() -> None:
    with pytest.raises(BadInput, match="'resnet18'"):
        listing.describe("resnet-18")


# ------------------------------------------------------------------------------------------ doctor


def findings(answer: Answer) -> dict[str, dict[str, str]]:
    return {finding["what"]: finding for finding in json.loads(answer.out)}


def test_doctor(empty: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    (tmp_path / "data" / "mnist" / "train-0.parquet").touch()
    words = ("doctor", "--data-dir", tmp_path / "data")
    found = findings(arena(*words, "--json"))
    assert {"python", "torch", "processor", "bf16", "gpu", "memory", "isolation"} <= set(found)
    assert "mnist" in found["data"]["found"]
    assert found["data"]["state"] == "ok"
    for finding in found.values():
        assert (finding["state"] == "ok") == (finding["mend"] == "")
        assert finding["mend"] == "" or finding["mend"].endswith(".")
    text = arena(*words)
    assert text.code == 0
    assert text.out.count("mend: ") == sum(bool(f["mend"]) for f in found.values())
    assert not list(empty.iterdir())
    assert not (tmp_path / "cache").exists()


def test_doctor_finds_what_is_bad(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    monkeypatch.setattr(doctor, "PACKAGES", ("numpy", "no_such_package"))
    answer = arena("doctor", "--data-dir", "gone", "--json")
    found = findings(answer)
    assert answer.code == 1
    assert [found[what]["state"] for what in ("data", "cache", "store", "packages")] == ["bad"] * 4
    assert "no_such_package" in found["packages"]["found"]


def test_doctor_sees_a_wrong_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["numpy", "torch==2.8.0", "gdown; extra == 'gdown'"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: needs)
    assert doctor._mismatch("2.8.0+cu128") == ""
    assert "2.8.0" in doctor._mismatch("2.9.1")


# ---------------------------------------------------------------------------------------- start-up


@pytest.mark.parametrize(
    ("words", "most"), [(["--help"], 2.0), (["list", "attacks"], 3.0), (["info", "pgd"], 3.0)]
)
def test_start_up_is_light(words: list[str], most: float) -> None:
    """Generous limits: a loaded machine is no failure, an imported torch is."""
    started = time.monotonic()
    assert heavy_imports(*words) == []
    assert time.monotonic() - started < most


def heavy_imports(*words: str | Path) -> list[str]:
    """Of the slow packages those that a command imports."""
    code = (
        "import sys; from arena.cli import main; sys.argv[0] = 'arena'\n"
        "try: main()\n"
        f"finally: print(*({set(HEAVY)} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


# ------------------------------------------------------------------------------------- a small run

RUN = ("run", "-d", "signs:size=600,classes=5", "-m", "fastnet_tiny", "--recipe", "smoke")
MATRIX = (*RUN, "-a", "patch", "-D", "finetune:epochs=1", "-s", "0", "--device", "cpu")
NEEDED = {
    *("board", "dataset", "model", "attack", "defense", "seed", "status", "reason"),
    *("acc", "asr", "ra", "acc_before", "asr_before", "clean_twin_acc", "seconds"),
}
SHARES = ("acc", "asr", "ra", "acc_before", "asr_before", "clean_twin_acc")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The store of one small run: one attack, one defense, and the null methods."""
    folder = tmp_path_factory.mktemp("small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ARENA_CACHE_DIR", str(folder / "cache"))
        patch.delenv("ARENA_DATA_DIR", raising=False)
        plan = arena(*MATRIX, "--store", "demo", "--dry-run")
        assert plan.code == 0, plan.err
        assert "8 cells, 0 cached; 2 models to train" in plan.out
        assert not (folder / "demo").exists()  # a plan writes nothing
        answer = arena(*MATRIX, "--store", "demo")
        assert answer.code == 0, answer.err
        assert "8 cells done, 0 were there before" in answer.out
        yield folder / "demo"


def rows_of(store: Path, *words: str) -> list[dict]:
    return json.loads(arena("results", "--store", store, "--format", "json", *words).out)


def test_rows_for_scripts(store: Path) -> None:
    rows = rows_of(store)
    assert len(rows) == 8
    for row in rows:
        assert set(row) >= NEEDED
        assert all(row[name] is None or 0 <= row[name] <= 1 for name in SHARES)
        assert row["acc"] is not None
        assert (row["asr"] is None) == (row["attack_name"] == "none")
    assert {row["defense_name"] for row in rows} == {"none", "retrain", "random_prune", "finetune"}
    assert "rate=0.1" in {r["attack_name"]: r["attack"] for r in rows}["patch"]  # the full spec


def test_the_null_defense_moves_nothing(store: Path) -> None:
    for row in rows_of(store, "-D", "none"):
        assert [row[n] for n in ("acc", "asr", "ra")] == [
            row[f"{n}_before"] for n in ("acc", "asr", "ra")
        ]


def test_the_second_run_does_no_work(store: Path) -> None:
    def content() -> dict[str, int]:
        folders = ("artifacts", "records")
        files = (f for name in folders for f in (store / name).rglob("*") if f.is_file())
        return {str(file): file.stat().st_mtime_ns for file in files}

    before = content()
    answer = arena(*MATRIX, "--store", store)
    assert answer.code == 0, answer.err
    assert "0 cells done, 8 were there before" in answer.out
    assert content() == before


@pytest.mark.parametrize("format", ["table", "md", "csv", "latex"])
def test_null_methods_stand_in_every_table(store: Path, format: str) -> None:
    answer = arena("results", "--store", store, "--format", format)
    assert answer.code == 0
    text = answer.out.replace("\\", "")
    assert all(name in text for name in ("retrain", "random_prune", "finetune", "patch"))
    if format == "csv":
        assert len(list(csv.DictReader(io.StringIO(answer.out)))) >= 4


def test_looking_at_results_is_light(store: Path) -> None:
    assert heavy_imports("results", "--store", store, "--format", "json") == []
    assert heavy_imports("show", rows_of(store)[0]["key"], "--store", store) == []


def test_results_are_filtered(store: Path) -> None:
    assert len(rows_of(store, "-a", "patch", "-D", "retrain", "-s", "0")) == 1
    assert rows_of(store, "-s", "5") == []
    assert_refused(arena("results", "--store", store, "-a", "pach"), "'pach'", "'patch'")
    assert_refused(arena("results", "--store", store, "--board", "adhc"), "'adhc'", "'adhoc'")


def test_show(store: Path, tmp_path: Path) -> None:
    (row,) = rows_of(store, "-a", "patch", "-D", "finetune")
    record = json.loads(arena("show", row["key"], "--store", store, "--json").out)
    assert record["key"] == row["key"]
    picture = tmp_path / "strip.png"
    answer = arena("show", row["key"][:12], "--store", store, "--picture", picture)
    assert answer.code == 0, answer.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = " ".join(answer.out.split())
    for needed in (
        f"{row['acc_before']:.4f} -> {row['acc']:.4f}",
        "95 % interval",
        row["fingerprint"],
        record["weights"]["after"],
        record["attack"]["code"],
        record["hardware"]["device"],
        record["parents"]["twin"],
        record["finished"],
    ):
        assert needed in text
    for flag in record["flags"]:
        assert flag["remedy"] in text
    assert_refused(arena("show", "zz", "--store", store), "'zz'")
    assert_refused(arena("show", "", "--store", store), "''")


def test_measures_of_a_finished_run(store: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(store, tmp_path / "measured")
    asked = ("--measure", "pgd:images=20,steps=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARENA_CACHE_DIR", str(store.parent / "cache"))
        plan = arena(*MATRIX, *asked, "--store", copied, "--dry-run")
        assert "8 cells, 0 cached; 0 models to train" in plan.out
        answer = arena(*MATRIX, *asked, "--store", copied)
    assert answer.code == 0, answer.err
    assert "8 cells done, 0 were there before" in answer.out
    rows = rows_of(copied)
    for row, old in zip(rows, rows_of(store), strict=True):
        assert {name: row[name] for name in old} == old
        assert row["robust_against"] == "PGD-2 8/255"
        assert 0 <= row["robust_acc"] <= 1
    key = next(row["key"] for row in rows if row["defense_name"] == "finetune")
    text = " ".join(arena("show", key, "--store", copied).out.split())
    assert "Measures pgd:steps=2,images=20 robust acc" in text
    assert "robust acc" not in arena("show", key, "--store", store).out
    page = (copied / "leaderboard" / "adhoc" / "index.html").read_text()
    assert "<dt>robust_acc</dt>" in page
    assert "<dt>distance</dt>" not in page, "not asked for"
    unasked = (store / "leaderboard" / "adhoc" / "index.html").read_text()
    assert "<dt>robust_acc</dt>" not in unasked


def test_a_failed_measure_is_told_at_the_end(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arena.referee import isolate

    copied = shutil.copytree(store, tmp_path / "measured")
    monkeypatch.setenv("ARENA_CACHE_DIR", str(store.parent / "cache"))

    def run(job: dict, **options: object) -> dict:
        raise isolate.Failed("failed", "out of memory")

    monkeypatch.setattr(isolate, "run", run)
    answer = arena(*MATRIX, "--measure", "pgd", "--store", copied)
    assert answer.code == 1
    told = [line for line in answer.err.splitlines() if line.startswith("arena: ")]
    assert len(told) == 8
    assert all(line.endswith("pgd failed: of the repaired model: out of memory") for line in told)
    key = rows_of(copied)[0]["key"]
    assert (
        "failed: of the repaired model: out of memory" in arena("show", key, "--store", copied).out
    )


def test_leaderboard_build(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    answer = arena("leaderboard", "build", "--store", store, "--out", out)
    assert answer.code == 0, answer.err
    [folder] = [path for path in out.iterdir() if path.is_dir()]
    assert {path.suffix for path in folder.iterdir()} >= {".md", ".csv", ".json", ".html", ".tex"}
    page = (folder / "index.html").read_text()
    assert "data:image/png;base64," in page
    assert {path.stem for path in (folder / "figures").glob("*.png")} >= {"heat", "curves"}
    for path in answer.out.split():
        assert os.path.getsize(path)
    wrong = arena("leaderboard", "build", "adhc", "--store", store)
    assert_refused(wrong, "'adhc'", "'adhoc'")


# ------------------------------------------------------------------------------------- previews


def test_preview_writes_a_picture_and_trains_nothing(empty: Path) -> None:
    answer = arena("preview", "patch:size=6", "-d", "signs:size=100,classes=5", "-o", "p.png")
    assert answer.code == 0, answer
    assert "psnr" in answer.out
    assert "p.png" in answer.out
    with Image.open(empty / "p.png") as picture:
        assert picture.width > 8 * 128
    assert not list(empty.rglob("weights.safetensors"))
    told = arena("preview", "patch", "-d", "signs:size=100,classes=5", "--json", "-o", "q.png")
    assert json.loads(told.out)["stealth"]["linf"] > 0


def test_preview_says_where_a_trigger_is_still_to_be_learned(empty: Path) -> None:
    learned = arena("preview", "adaptive", "-d", "signs:size=100,classes=5", "-o", "p.png")
    assert "learns its trigger with the victim" in learned.out
    fixed = arena("preview", "patch", "-d", "signs:size=100,classes=5", "-o", "p.png")
    assert "learns" not in fixed.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run", "b.toml", "--data-dir", "elsewhere/data", "--store", "s"], "run b.toml"),
        (["run", "--store=s", "--workers", "2", "-a", "patch:rate=0.2"], "run -a patch:rate=0.2"),
        (["run", "-d", "imagefolder:my pictures"], "run -d 'imagefolder:my pictures'"),
        (["run", "--store", "--data-dir", "-s", "1"], "run -s 1"),
    ],
)
def test_tables_name_the_command_without_the_places_of_this_machine(words, told) -> None:
    assert cli._told(words) == f"arena {told}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_as_ctrl_c_does(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters send SIGTERM before they kill; a terminal that closes sends SIGHUP."""
    before = signal.getsignal(number)
    if before is signal.SIG_IGN:
        pytest.skip("whoever started the tests had it ignored, whose wish stands")

    def work(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("the signal did not stop it")

    monkeypatch.setattr(listing, "describe", work)
    answer = arena("info", "patch")
    assert (answer.code, answer.err.count("\n")) == (128 + number, 1)
    assert "goes on from here" in answer.err
    assert signal.getsignal(number) is before


def test_a_sandbox_that_is_required_and_cannot_be_had_is_one_sentence(tmp_path) -> None:
    matrix = [
        "-d",
        "signs:size=200,classes=5",
        "-m",
        "cnn",
        "-a",
        "patch",
        "-D",
        "none",
        "--recipe",
        "smoke",
    ]
    store = tmp_path / "store"
    done = subprocess.run(
        [sys.executable, "-m", "arena", "run", "--require-sandbox", *matrix, "--store", str(store)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ARENA_NO_SANDBOX": "1", "ARENA_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "arena: --require-sandbox: methods cannot be held in namespaces here "
        "(it was switched off); see `arena doctor`."
    )
    assert not store.exists()
