"""Submissions: strangers' methods are checked and run in workers; cards cannot be bent."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import arena

from arena import boards as boards_module
from arena.boards import board_from, read_board
from arena.core.registry import BadInput, Registry, attacks, defenses, spec_of, strangers_imported
from arena.referee import sandbox
from arena.store import Store
from arena.submissions import cards, entries, held_back, running, sources, verifying
from arena.submissions.cards import Altered
from arena.submissions.templates import KINDS, new

ROOT = Path(__file__).parents[1]
BOARD = """name = "tiny"
version = 1
dataset = ["signs:size=300,classes=5"]
model = ["fastnet_tiny"]
attack = ["patch"]
defense = ["none"]
seed = [0]
recipe = "smoke:min_steps=16"
clean_share = 0.2
"""
SECRET = b"a secret of sixteen bytes and more"
HELD_BACK = f"""
[held_back]
commitment = "{hashlib.sha256(SECRET).hexdigest()}"
draws = ["seed", "target", "trigger"]
choices = {{ own_attack = {{ size = [5, 6, 7] }}, patch = {{ size = [3, 4] }} }}
"""
SPY = '''"""Tells where it is imported.

Source: a test.
"""

import os
from copy import deepcopy
from pathlib import Path

from arena.core.registry import method, param

with Path(__file__).with_name("imported_in").open("a") as stream:
    stream.write(f"{os.getpid()}\\n")


@method
class Spy:
    share: float = param(0.5, "a share", above=0, high=1)

    def repair(self, model, clean, rng):
        return deepcopy(model)
'''


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Files that a test registers are gone after it."""
    before = [dict(r._added) for r in (attacks, defenses)]
    yield
    for each, known in zip((attacks, defenses), before, strict=True):
        each._added.clear()
        each._added.update(known)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a board, methods of each kind, and a card of the defense."""
    folder = tmp_path_factory.mktemp("submissions")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ARENA_CACHE_DIR", str(folder / "cache"))
        patch.delenv("ARENA_STORE", raising=False)
        patch.setattr(boards_module, "NULL_DEFENSES", ("none",))  # the others only take time
        board = folder / "leaderboards" / "tiny" / "board.toml"
        board.parent.mkdir(parents=True)
        board.write_text(BOARD)
        for kind in KINDS:
            new(kind, f"own_{kind}", folder)
        assert arena("submit", "key", "key.pem").code == 0
        words = "run own_defense.py --board tiny --claim attack=patch,asr=3.5,source=paper"
        more = "--key key.pem --author Somebody --store store --device cpu"
        done = arena("submit", *words.split(), *more.split())
        assert done.code == 0, done.err
        done = arena(
            *[
                "submit",
                "verify",
                "own_defense.card.json",
                "--store",
                "store",
                "-s",
                "1",
                "--sample",
                "1",
                "--device",
                "cpu",
            ]
        )
        assert done.code == 0, done.out + done.err
        yield folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the current one."""
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def card(here: Path) -> dict[str, Any]:
    return json.loads((here / "own_defense.card.json").read_text())


@pytest.fixture
def verified(here: Path) -> dict[str, Any]:
    return json.loads((here / "own_defense.card.verified.json").read_text())


def boards(tmp_path: Path, text: str = BOARD) -> Path:
    path = tmp_path / "leaderboards" / "tiny" / "board.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path.parents[1]


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


# ---------------------------------------------------------------------------------- arena new


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_method_is_clean_and_its_test_passes(kind: str, here: Path) -> None:
    names = [f"own_{kind}.py", f"test_own_{kind}.py"]
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    first = ["--config", 'lint.isort.known-first-party=["arena"]']
    for command in (["check", *config, *first], ["format", "--check", *config]):
        ruff = [sys.executable, "-m", "ruff", *command, *names]
        done = subprocess.run(ruff, cwd=here, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    made: dict[str, Any] = {"__file__": str(here / names[1]), "__name__": "made"}
    exec(compile((here / names[1]).read_text(), names[1], "exec"), made)
    tests = [value for name, value in made.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test()


@pytest.mark.slow
def test_new_methods_have_sound_types(here: Path) -> None:
    files = [f"{front}own_{kind}.py" for kind in KINDS for front in ("", "test_")]
    mypy = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", *files]
    done = subprocess.run(mypy, cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("atack", "mine"), "did you mean 'attack'?"),
        (("attack", "patch"), "There is an attack 'patch' already"),
        (("scanner", "nc"), "There is a defense 'nc' already"),
        (("attack", "<script>"), "is no name for a method"),
        (("attack", "class"), "is no name for a method"),
        (("attack", "../mine"), "is no name for a method"),
    ],
)
def test_bad_names_are_refused_and_nothing_is_written(
    words: tuple[str, str], told: str, tmp_path: Path
) -> None:
    done = arena("new", *words, "--to", tmp_path)
    assert done.code == 2
    assert told in done.err
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    assert arena("new", "attack", "mine", "--to", tmp_path).code == 0
    (tmp_path / "mine.py").unlink()
    assert arena("new", "attack", "mine", "--to", tmp_path).code == 2
    assert not (tmp_path / "mine.py").exists()


# ------------------------------------------------------------------------- strangers' code


def test_a_strangers_file_is_read_and_not_imported(tmp_path: Path) -> None:
    path = tmp_path / "spy.py"
    path.write_text(SPY)
    defenses.add_file(path)
    method = defenses.build("spy:share=0.25")
    assert spec_of(method) == "spy:share=0.25"
    assert method == defenses.build("spy:share=0.25")
    with pytest.raises(BadInput, match="share must be at most 1"):
        defenses.build("spy:share=1.5")
    with pytest.raises(BadInput, match="process of its own"):
        method.repair(None, None, None)
    assert not (tmp_path / "imported_in").exists()
    with strangers_imported():
        assert type(defenses.build("spy")).__name__ == "Spy"
    assert (tmp_path / "imported_in").read_text() == f"{os.getpid()}\n"


def test_what_a_file_says_counts_for_its_identity(tmp_path: Path) -> None:
    from arena.identity import method_identity

    found = []
    for text in (SPY, SPY.replace("deepcopy(model)", "deepcopy(deepcopy(model))")):
        (tmp_path / "spy.py").write_text(text)
        defenses.add_file(tmp_path / "spy.py")
        found.append(method_identity(defenses.build("spy")))
        assert found[-1]["file"] == hashlib.sha256(text.encode()).hexdigest()
    assert found[0]["code"] != found[1]["code"]


def packaged(folder: Path, name: str, group: str, text: str, module: str = "") -> None:
    """An installed package, as pip leaves it."""
    package = folder / f"of_{name}"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')\n" if not module else "")
    (package / f"{name}.py").write_text(text)
    info = folder / f"of_{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: of-{name}\nVersion: 1.0\n")
    target = module or f"of_{name}.{name}"
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")


def test_broken_packages_take_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    good = SPY.replace("Spy", "Good")
    packaged(tmp_path, "good_one", "arena.defenses", good)
    packaged(tmp_path, "broken", "arena.defenses", "def (:\n")
    packaged(tmp_path, "finetune", "arena.defenses", good)
    packaged(tmp_path, "odd", "arena.defenses", good.replace("share: float", "share: list[int]"))
    packaged(tmp_path, "gone", "arena.defenses", good, module="no_such_package.gone")
    monkeypatch.syspath_prepend(tmp_path)
    found = Registry("defense", "arena.defenses", "arena.defenses")
    assert {"good_one", "finetune", "anp"} <= set(found.names())
    assert not {"broken", "odd", "gone"} & set(found.names())
    assert found.describe("finetune").module == "arena.defenses.finetune"
    assert found.build("good_one").share == 0.5
    assert "of_good_one" not in sys.modules  # its __init__ would have ended us
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4
    for name in ("broken", "finetune", "odd", "gone"):
        assert any(f"(package of-{name})" in line for line in told), name


def test_an_installed_defense_reaches_a_card(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged(tmp_path, "spy_package", "arena.defenses", SPY, module="of_spy_package.spy_package")
    monkeypatch.setenv(sandbox.OFF, "1")  # it writes beside itself, which namespaces do not allow
    monkeypatch.syspath_prepend(tmp_path)
    for each in (attacks, defenses):
        monkeypatch.setattr(each, "_files", Registry(each.kind, each.package, each.group)._files)
    words = "submit run spy_package --board tiny --store store --device cpu --out"
    done = arena(*words.split(), tmp_path / "card.json")
    assert done.code == 0, done.err
    card = cards.read_card(tmp_path / "card.json")
    assert card["method"]["package"] == "of_spy_package.spy_package"
    own = [cell for cell in card["cells"] if cell["defense"]["name"] == "spy_package"]
    assert len(own) == 2
    assert {cell["status"] for cell in own} <= {"ok", "not_established"}
    processes = (tmp_path / "of_spy_package" / "imported_in").read_text().split()
    assert str(os.getpid()) not in processes
    assert len(processes) == 2  # one per cell; what measures its models does not import it


# ------------------------------------------------------------------------------ arena submit check

METHOD = '''"""A method.

Source: a test.
"""

from copy import deepcopy
from typing import ClassVar

import torch

from arena.core.registry import method, param


@method
class Mine:
    share: float = param(0.5, "a share", above=0, high=1)

    def repair(self, model, clean, rng):
        return deepcopy(model)
'''


def test_a_methods_file_is_a_file_of_a_methods_size(tmp_path: Path) -> None:
    (large := tmp_path / "large.py").write_text(METHOD + "#" * 2**20)
    os.mkfifo(pipe := tmp_path / "pipe.py")  # reading it would never end
    (folder := tmp_path / "folder.py").mkdir()
    for path, told in ((large, "larger than"), (pipe, "no file that"), (folder, "no file that")):
        done = arena("submit", "check", path)
        assert done.code == 2
        assert told in done.err
        assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("mine", "class Mine:", "class Mine(:", "is no Python, line 15"),
        ("mine", "@method\n", "", "holds no class marked @method"),
        ("mine", "@method\n", "@method\nclass Two:\n    ...\n\n\n@method\n", "2 classes marked"),
        ("<script>", "", "", "is no name for a method"),
        ("anp", "", "", "is one of the arena's"),
        ("mine", "share: float", "share: list[int]", "is annotated 'list[int]'"),
        ("mine", "param(0.5", "param(1.5", "share must be at most 1"),
        ("mine", "param(0.5", "param(float(1)", "must be given as a literal"),
        ("mine", 'param(0.5, "a share", above=0, high=1)', "0.5 + 0.1", "given as a literal"),
        ("mine", "    def repair", "    def mend", "can do nothing"),
        ("mine", "(self, model, clean, rng)", "(self, model, clean)", "is written otherwise"),
        ("mine", "Source: a test.", "", "no `Source:`"),
        ("mine", "import torch", "import torch\nimport arena.store", "it imports arena.store"),
        ("mine", "import torch", "import torch\nfrom arena import runner", "arena.runner"),
        (
            "mine",
            "import torch",
            "import torch\nX = " + "-" * 60_000 + "1",
            "is no Python: too deep.",
        ),
        ("mine", "import torch", "import torch\nX = \0", "null bytes"),
        ("mine", "    share", "    share: int = 3\n    share", "the field share is there twice"),
        ("mine", "share:", "method_name:", "a field cannot be called 'method_name'"),
        ("mine", "share:", "repair:", "a field cannot be called 'repair'"),
        ("mine", "above=0", "choices=3", "does not take, choices"),
        ("mine", "above=0", 'under={"quick": 1}', "under is by recipe, 'smoke' or 'fast'"),
        ("mine", "0.5,", "[0.5],", "its fields cannot be read"),
        (
            "mine",
            'share: float = param(0.5, "a share", above=0, high=1)',
            'file: str | None = param("/etc/passwd", "a file", path=True)',
            "its default must be None",
        ),
        ("mine", "a share", "\\ud800", "share has half a character"),
        ("mine", '"""', '"""\\ud800', "its docstring has half a character"),
        ("mine", "share: float", "target: float", "target is read by the referee and must be int"),
        (
            "mine",
            "    share",
            '    needs_share = "all"\n    share',
            "must be float or int",
        ),
        ("mine", "    share", "    needs_share: ClassVar[float] = 2.0\n    share", "from 0 to 1"),
        (
            "mine",
            "    def rep",
            "    def needs_share(self):\n        ...\n\n    def rep",
            "literal",
        ),
    ],
)
def test_what_can_be_seen_without_running(
    name: str, old: str, new: str, told: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text(METHOD.replace(old, new, 1))
    done = arena("submit", "check", path, "--json")
    assert done.code == 1, done.err
    report = json.loads(done.out)
    failed = [each for each in report["checks"] if each["state"] == "failed"]
    assert len(failed) == 1, failed
    assert told in failed[0]["seen"]
    assert failed[0]["mend"]


def test_a_file_that_is_none_is_bad_input(tmp_path: Path) -> None:
    assert arena("submit", "check", tmp_path / "gone.py").code == 2
    assert arena("submit", "check", "anp").code in (1, 2)
    with pytest.raises(BadInput, match="one of the arena's own"):
        sources.find("anp", tmp_path)


BODIES = {
    "impure": "next(model.parameters()).data.add_(1)\n        return deepcopy(model)",
    "undetermined": "model = deepcopy(model)\n"
    "        next(model.parameters()).data.add_(torch.rand(1))\n        return model",
    "remembers": "Mine.calls = getattr(Mine, 'calls', 0) + (rng.initial_seed() != SEEN[0])\n"
    "        SEEN.append(rng.initial_seed())\n        model = deepcopy(model)\n"
    "        next(model.parameters()).data.add_(len(set(SEEN)))\n        return model",
    "wrong": "return 3",
    "fine": "return deepcopy(model)",
}


@pytest.mark.parametrize(
    ("name", "failing"),
    [
        ("impure", "purity"),
        ("undetermined", "determinism"),
        ("remembers", "no memory"),
        ("wrong", "call"),
        ("fine", ""),
    ],
)
def test_a_trial_finds_what_methods_should_not_do(
    name: str, failing: str, tmp_path: Path, planted: Any, clean: Any
) -> None:
    from arena.referee.trial import ranges_of, trial
    from arena.store import save_tensors

    text = METHOD.replace("return deepcopy(model)", BODIES[name])
    text = text.replace("@method", "SEEN = [None]\n\n\n@method")
    path = tmp_path / "mine.py"
    path.write_text(text)
    described = defenses.add_file(path)
    save_tensors(tmp_path / "clean.safetensors", {"x": clean.x, "y": clean.y})
    job = {
        "spec": "mine",
        "power": "repair",
        "clean": str(tmp_path / "clean.safetensors"),
        "weights": "",
        "ranges": ranges_of("mine", described.fields),
    }
    with strangers_imported():
        found = trial(job, next(planted.parameters()).device, lambda _: copy.deepcopy(planted))
    failed = [each["name"] for each in found["checks"] if not each["passed"]]
    assert failed == ([failing] if failing else [])
    assert [each["passed"] for each in found["checks"] if each["name"] == "range"] == [True] * 3


def test_a_range_that_is_not_kept_is_found(tmp_path: Path) -> None:
    from arena.referee.trial import ranges_of

    wide = (SimpleNamespace(name="n", type="int", low=1, high=9, above=None, choices=None),)
    assert ranges_of("m", wide) == [("m:n=1", True), ("m:n=0", False), ("m:n=9", True),
                                    ("m:n=10", False)]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        "attack",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("defense", "scanner", "detector")
        ),
    ],
)
def test_what_arena_new_writes_passes_the_check(kind: str, here: Path) -> None:
    done = arena("submit", "check", f"own_{kind}.py", "--json")
    assert done.code == 0, done.out + done.err
    names = [each["name"] for each in json.loads(done.out)["checks"]]
    for name in ("contract", "smoke run", "purity", "determinism", "no memory"):
        assert name in names


# ------------------------------------------------------------------------------------------ cards


def test_a_card_tells_all_of_it(card: dict[str, Any], here: Path) -> None:
    source = (here / "own_defense.py").read_text()
    assert card["method"]["source"] == source
    assert card["method"]["sha256"] == hashlib.sha256(source.encode()).hexdigest()
    names = {cell["defense"]["name"] for cell in card["cells"]}
    assert names == {"none", "own_defense"}
    assert {cell["attack"]["name"] for cell in card["cells"]} == {"none", "patch"}
    [claim] = card["claims"]
    [asr] = [
        cell["metrics"]["asr"]
        for cell in card["cells"]
        if (cell["attack"]["name"], cell["defense"]["name"]) == ("patch", "own_defense")
    ]
    assert (claim["asr"], claim["source"]) == (3.5, "paper")
    assert claim["measured"]["asr"] == pytest.approx(100 * asr)
    assert card["signature"]["public_key"] == (here / "key.pem.pub").read_text().strip()
    assert card["isolation"]
    assert card["budget"] == {"clean_share": 0.2, "seconds": 3600.0, "memory_gb": 16.0}
    assert (os.stat("key.pem").st_mode & 0o777) == 0o600


def improved(card: dict[str, Any]) -> dict[str, Any]:
    """A card whose defense looks better than it is."""
    card = copy.deepcopy(card)
    for cell in card["cells"]:
        if cell["defense"]["name"] == "own_defense" and cell["attack"]["name"] == "patch":
            cell["metrics"]["asr"] = 0.01
    return card


def rehashed(card: dict[str, Any], key: Path | None = None) -> dict[str, Any]:
    return cards.sealed(card, key)


def consistent(card: dict[str, Any]) -> dict[str, Any]:
    """With all derived figures made to fit."""
    from arena.core.metric_list import der, wilson

    for cell in card["cells"]:
        metrics, counts = cell["metrics"], cell["counts"]
        if metrics.get("asr") is not None:
            names = ("acc_before", "acc", "asr_before", "asr")
            metrics["der"] = der(*(metrics[name] for name in names))
            n = counts["triggered"]
            cell["intervals"]["asr"] = list(wilson(round(metrics["asr"] * n), n))
    card["summary"] = cards.summary_of(card["cells"])
    card["claims"] = cards.claims_with_measured(
        card["claims"], card["summary"], card["method"]["short"]
    )
    return card


def refused(tmp_path: Path, card: dict[str, Any], *more: str) -> str:
    """The sentence with which `arena submit verify` refuses a card; no cell is run."""
    path = written(tmp_path / "altered.json", card)
    done = arena("submit", "verify", path, "--device", "cpu", *more)
    assert done.code == 1, done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "altered.verified.json").exists()
    return done.err


def test_an_altered_card_is_refused(card: dict[str, Any], tmp_path: Path) -> None:
    assert "does not have the hash" in refused(tmp_path, improved(card))
    unsigned = {**rehashed(improved(card)), "signature": card["signature"]}
    assert "its signature is not one of" in refused(tmp_path, unsigned)
    assert "does not follow" in refused(tmp_path, rehashed(improved(card)))
    card["method"]["source"] += "\n"
    assert "has another hash" in refused(tmp_path, rehashed(card))


def test_another_key_is_no_signature(card: dict[str, Any], here: Path, tmp_path: Path) -> None:
    public = cards.new_key(tmp_path / "other.pem")
    swapped = {**card, "signature": {**card["signature"], "public_key": public}}
    assert "its signature is not one of" in refused(tmp_path, swapped)
    resigned = rehashed(card, tmp_path / "other.pem")
    own = (here / "key.pem.pub").read_text().strip()
    assert "is not signed by" in refused(tmp_path, resigned, "--signed-by", own)


def test_a_forged_card_that_is_consistent_does_not_hold(
    card: dict[str, Any], here: Path, tmp_path: Path
) -> None:
    forged = rehashed(consistent(improved(card)))
    path = written(tmp_path / "forged.json", forged)
    done = arena("submit", "verify", path, "--store", here / "store", "--sample", 0, "--json")
    assert done.code == 1, done.err
    found = json.loads(done.out)
    wrong = {
        (cell["defense"], name)
        for cell in found["cells"]
        for name, figure in cell["figures"].items()
        if not figure["holds"]
    }
    assert wrong == {(card["method"]["short"], "asr")}
    told = arena("leaderboard", "add", tmp_path / "forged.verified.json", "--to", boards(tmp_path))
    assert told.code == 2
    assert "Not all of this card's figures hold" in told.err


def test_cells_cannot_be_left_out_or_invented(card: dict[str, Any], tmp_path: Path) -> None:
    fewer = copy.deepcopy(card)
    fewer["cells"] = [c for c in card["cells"] if c["defense"]["name"] != "none"]
    assert "The card lacks 2 cells" in refused(tmp_path, rehashed(consistent(fewer)))
    other = copy.deepcopy(card)
    other["cells"][0]["seed"] = 5
    assert "a cell that its board does not" in refused(tmp_path, rehashed(consistent(other)))


def test_a_signature_needs_a_key(here: Path, tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("nothing")
    words = "submit run own_defense.py --board tiny --key"
    done = arena(*words.split(), tmp_path / "no.pem", "--store", tmp_path / "s")
    assert done.code == 2
    assert "no Ed25519 key" in done.err
    assert arena("submit", "key", "key.pem").code == 2


CAMPAIGN = settings.get_current_profile_name() == "campaign"  # see test_fuzz.py


@settings(
    max_examples=settings().max_examples if CAMPAIGN else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damaged_cards_are_refused_with_a_sentence(
    data: st.DataObject, card: dict[str, Any], tmp_path: Path
) -> None:
    strange = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5),
        st.lists(st.integers(), max_size=2), st.just({}), st.just(10**400),
    )  # fmt: skip
    broken = copy.deepcopy(card)
    inside: Any = broken
    while True:
        keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(inside[key], dict | list) or not inside[key] or data.draw(st.booleans()):
            break
        inside = inside[key]
    value = data.draw(strange)
    if value == inside[key] and type(value) is type(inside[key]):
        return
    inside[key] = value
    try:
        sealed = cards.sealed(broken) if data.draw(st.booleans()) else broken
    except ValueError:  # NaN
        sealed = broken
    path = written(tmp_path / "broken.json", sealed)
    with pytest.raises((BadInput, Altered)) as refusal:
        entries.board_folder(cards.read_card(path), tmp_path)  # where there is no board at all
    assert "\n" not in str(refusal.value)


NO_CARDS = (
    "", "[", "[1]", "null", '{"a": 1, "a": 2}', '{"a": 1e999}', '{"card_version": 1}',
    '{"card_version": 9}', "[" * 9999,
)  # fmt: skip


@pytest.mark.parametrize("text", NO_CARDS)
def test_what_is_no_card_is_bad_input(text: str, tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text(text)
    done = arena("submit", "verify", tmp_path / "card.json")
    assert done.code == 2
    assert len(done.err.strip().splitlines()) == 1


# ------------------------------------------------------------------- verification and its spread


def test_a_card_is_verified_from_weights_and_by_running_again(verified: dict[str, Any]) -> None:
    found = verified["verification"]
    assert found["card"] == verified["card"]["hash"]
    assert found["how"] == {"weights": 4, "rerun": 1}
    assert found["holds"]
    again = [cell for cell in found["cells"] if cell["how"] == "rerun"]
    assert [cell["defense"] for cell in again] == [verified["card"]["method"]["short"]]
    # on the same processor, with the same threads, exactly
    assert {f["within"] for cell in found["cells"] for n, f in cell["figures"].items()
            if n != "status"} == {0.0}  # fmt: skip


def test_elsewhere_figures_may_spread_as_seeds_do(card: dict[str, Any]) -> None:
    cell = copy.deepcopy(card["cells"][-1])
    cell["metrics"]["asr"] = 0.5
    alone = verifying._allowed(card, cell, "asr")
    group = {"dataset": cell["dataset"]["name"], "model": cell["model"]}
    group |= {"attack": cell["attack"]["short"], "defense": cell["defense"]["short"]}
    told = {**card, "summary": [{**group, "figures": {"asr": {"mean": 0.5, "sd": 0.1, "n": 3}}}]}
    wide = verifying._allowed(told, cell, "asr")
    assert 0.02 < alone < 0.4
    assert wide > max(alone, 0.3)
    held = verifying._figures(told, cell, {"asr": 0.7}, None, ("asr",))
    lost = verifying._figures(told, cell, {"asr": 0.7}, 0.0, ("asr",))
    assert held["asr"]["holds"]
    assert not lost["asr"]["holds"]


# ------------------------------------------------------------------------------------- leaderboards


def test_only_a_verified_card_enters_once(
    here: Path, verified: dict[str, Any], tmp_path: Path
) -> None:
    to = boards(tmp_path)
    with pytest.raises(BadInput, match="is not verified"):
        entries.add(here / "own_defense.card.json", to)
    path = here / "own_defense.card.verified.json"
    done = arena("leaderboard", "add", path, "--to", to)
    assert done.code == 0, done.err
    entry = to / "tiny" / "entries" / f"own_defense-{verified['card']['hash'][:12]}.json"
    assert done.out.strip() == str(entry)
    assert "is there already" in arena("leaderboard", "add", path, "--to", to).err
    again = {**verified["card"], "author": "Somebody else"}
    sealed = cards.sealed(again)
    verification = cards.sealed({**verified["verification"], "card": sealed["hash"]})
    other = written(tmp_path / "other.json", {"card": sealed, "verification": verification})
    assert "The same method with the same" in arena("leaderboard", "add", other, "--to", to).err
    told = arena("leaderboard", "entries", "tiny", "--to", to)
    assert "reproduced (1 cells were run again)" in told.out
    done = arena("leaderboard", "withdraw", entry.stem, "--reason", "a mistake", "--to", to)
    assert done.code == 0, done.err
    [row] = json.loads(arena("leaderboard", "entries", "tiny", "--json", "--to", to).out)
    assert (row["status"], row["why"]) == ("withdrawn", "a mistake")
    assert arena("leaderboard", "withdraw", entry.stem, "--reason", "x", "--to", to).code == 2
    assert arena("leaderboard", "add", other, "--to", to).code == 0


def test_a_card_that_is_not_verified_is_verified_when_it_is_added(
    here: Path, card: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = boards(tmp_path)
    path = written(tmp_path / "mine.json", card)
    done = arena("leaderboard", "add", path, "--to", to, "--by", "me", "--device", "cpu")
    assert done.code == 0, done.err
    [entry] = to.glob("tiny/entries/*.json")
    told = json.loads(entry.read_text())["verification"]
    assert (told["by"], told["how"]) == ("me", {"rerun": 2})
    monkeypatch.setattr(verifying, "verify", None)  # what cannot enter is refused before hours
    assert "is there already" in arena("leaderboard", "add", path, "--to", to).err
    strict = f'{BOARD}verifiers = ["{"0" * 64}"]\n'
    (to / "tiny" / "board.toml").write_text(strict)
    assert "says other things" in arena("leaderboard", "add", path, "--to", to).err


def test_a_card_that_does_not_hold_does_not_enter(
    card: dict[str, Any], here: Path, tmp_path: Path
) -> None:
    to = boards(tmp_path)
    forged = rehashed(consistent(improved(card)))
    path = written(tmp_path / "mine.json", forged)
    done = arena("leaderboard", "add", path, "--to", to, "--device", "cpu")
    assert done.code == 1
    assert "DOES NOT HOLD" in done.out
    assert not list(to.glob("tiny/entries/*"))


def test_a_verification_belongs_to_its_card(verified: dict[str, Any], tmp_path: Path) -> None:
    to = boards(tmp_path)

    def added(verification: dict[str, Any]) -> tuple[int, str]:
        value = {"card": verified["card"], "verification": verification}
        done = arena("leaderboard", "add", written(tmp_path / "v.json", value), "--to", to)
        return done.code, done.err

    found = verified["verification"]
    code, told = added(cards.sealed({**found, "card": "0" * 64}))
    assert (code, "belongs to another card" in told) == (1, True)
    code, told = added({**found, "by": "me"})
    assert (code, "was altered" in told) == (1, True)
    code, told = added(cards.sealed({**found, "holds": False}))
    assert (code, "its verdict does not follow" in told) == (1, True)


def test_a_board_may_name_its_verifiers(
    here: Path, verified: dict[str, Any], tmp_path: Path
) -> None:
    key = cards.new_key(tmp_path / "maintainer.pem")
    text = f'{BOARD}verifiers = ["{key}"]\n'
    to = boards(tmp_path, text)
    definition = json.loads(json.dumps(read_board(to / "tiny/board.toml").definition()))
    from arena.store import digest

    told = {**verified["card"]["board"], "definition": definition, "hash": digest(definition)}
    card = cards.sealed({**verified["card"], "board": told})
    for signing, code in ((None, 2), (here / "key.pem", 2), (tmp_path / "maintainer.pem", 0)):
        found = cards.sealed({**verified["verification"], "card": card["hash"]}, signing)
        if code:  # known before anything is verified with that key
            with pytest.raises(BadInput, match="lets in what one of its verifiers has signed"):
                entries.check_open(card, to, signing)
        else:
            entries.check_open(card, to, signing)
        value = {"card": card, "verification": found}
        done = arena("leaderboard", "add", written(tmp_path / "v.json", value), "--to", to)
        assert done.code == code, done.err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (BOARD.replace("version = 1", "version = 2"), "version 1 of the board 'tiny', which is at"),
        (BOARD.replace("clean_share = 0.2", "clean_share = 0.1"), "says other things"),
        (BOARD + HELD_BACK, "says other things"),
        (BOARD.replace('"tiny"', '"other"'), "There is no board"),
    ],
)
def test_a_card_of_another_board_does_not_enter(
    text: str, told: str, here: Path, tmp_path: Path
) -> None:
    to = boards(tmp_path, text)
    if '"other"' in text:
        (to / "tiny").rename(to / "other")
    done = arena("leaderboard", "add", here / "own_defense.card.verified.json", "--to", to)
    assert done.code == 2
    assert told in done.err
    assert not list(to.glob("*/entries/*"))


def test_changed_code_makes_a_new_version(verified: dict[str, Any], tmp_path: Path) -> None:
    card = verified["card"]
    other = copy.deepcopy(card)
    for cell in other["cells"]:
        cell["attack"]["code"] = "0" * 64
    assert "The code of the attack" in entries.changed(card, other)
    other = copy.deepcopy(card)
    for cell in other["cells"]:
        cell["dataset"]["fingerprint"] = "0" * 64
    assert "The data set signs" in entries.changed(card, other)
    assert entries.changed(card, {**card, "scoring": "0"}) == "The code of the metrics"
    assert entries.changed(card, card) == ""


def test_an_attack_that_comes_later_breaks_a_defense(verified: dict[str, Any]) -> None:
    defense = {**copy.deepcopy(verified), "added": "2026-01-01", "withdrawn": None}
    own = defense["card"]["method"]
    for cell in defense["card"]["cells"]:
        if cell["defense"]["name"] == "own_defense" and cell["attack"]["name"] != "none":
            cell["metrics"] |= {"asr": 0.02, "asr_before": 0.99, "acc_before": 0.9}
            cell["metrics"] |= {"clean_twin_acc": 0.9}

    def attacked(asr: float, before: float = 0.95, added: str = "2026-02-02") -> dict[str, Any]:
        cell = {
            "attack": {"name": "strong"},
            "defense": {"spec": own["spec"], "code": own["code"]},
            "metrics": {"asr": asr, "asr_before": before, "acc_before": 0.9, "clean_twin_acc": 0.9},
        }
        card = {"method": {"role": "attack", "name": "strong"}, "cells": [cell]}
        return {"card": card | {"board": defense["card"]["board"]}, "added": added,
                "withdrawn": None}  # fmt: skip

    assert entries.status(defense, [defense])[0] == "reproduced"
    assert entries.status(defense, [defense, attacked(0.8)]) == ("broken", "by strong")
    for harmless in (attacked(0.4), attacked(0.8, 0.7), attacked(0.8, added="2025-01-01")):
        assert entries.status(defense, [defense, harmless])[0] == "reproduced"
    assert entries.status(defense, [attacked(0.8) | {"withdrawn": {"reason": "x"}}])[0] != "broken"
    weights = {**defense, "verification": {**defense["verification"], "how": {"weights": 8}}}
    assert entries.status(weights, [])[0] == "claimed"


def test_an_attack_faces_the_defenses_that_entered(
    here: Path, card: dict[str, Any], tmp_path: Path
) -> None:
    to = boards(tmp_path)
    done = arena("leaderboard", "add", here / "own_defense.card.verified.json", "--to", to)
    assert done.code == 0, done.err
    out = tmp_path / "attack.card.json"
    words = (
        f"submit run own_attack.py --board tiny --to {to} --store store --device cpu --out {out}"
    )
    done = arena(*words.split())
    assert done.code == 0, done.err
    made = cards.read_card(out)
    assert [told["name"] for told in made["against"]] == ["own_defense"]
    behind = [c for c in made["cells"] if c["defense"]["name"] == "own_defense"]
    assert {c["attack"]["name"] for c in behind} == {"none", "own_attack"}
    assert {c["defense"]["code"] for c in behind} == {card["method"]["code"]}
    done = arena(*f"submit verify {out} --store store --sample 0 --device cpu".split())
    assert done.code == 0, done.out + done.err
    done = arena("leaderboard", "add", tmp_path / "attack.card.verified.json", "--to", to)
    assert done.code == 0, done.err
    listed = json.loads(arena("leaderboard", "entries", "tiny", "--json", "--to", to).out)
    assert {row["role"] for row in listed} == {"repair", "attack"}


# ------------------------------------------------------------- the other roles, what is held back


def test_scanners_and_detectors_are_asked_about_the_boards_models(
    here: Path, tmp_path: Path
) -> None:
    for kind, figure, cells in (("scanner", "score", 2), ("detector", "auroc", 1)):
        out = tmp_path / f"{kind}.json"
        words = f"submit run own_{kind}.py --board tiny --store store --device cpu --out {out}"
        done = arena(*words.split())
        assert done.code == 0, done.err
        found = cards.read_card(out)["cells"]
        assert len(found) == cells
        assert all(0 <= cell["metrics"][figure] <= 1 for cell in found)
        assert {cell["backdoored"] for cell in found} == ({True, False} if cells == 2 else {True})
    done = arena(*f"submit verify {tmp_path / 'scanner.json'} --sample 1 -s 1 --device cpu".split())
    assert done.code == 0, done.out + done.err


def test_auroc_counts_pairs() -> None:
    assert running.auroc([3, 2, 1, 0], [True, True, False, False]) == 1
    assert running.auroc([1, 1], [True, False]) == 0.5
    assert running.auroc([0, 2, 1], [True, False, True]) == 0


def test_an_attack_on_what_a_board_holds_back(here: Path, tmp_path: Path) -> None:
    to = boards(tmp_path, BOARD + HELD_BACK)
    (tmp_path / "secret").write_bytes(SECRET)
    out, store = tmp_path / "card.json", tmp_path / "store"
    words = f"submit run own_attack.py --board tiny --to {to} --store {store} --device cpu"
    done = arena(*words.split(), "--out", out, "--secret", tmp_path / "secret")
    assert done.code == 0, done.err
    card = cards.read_card(out)
    drawn = {record["seed"] for record in Store(store).records()}
    specs = {record["attack"]["spec"] for record in Store(store).records()}
    assert len(drawn) == 1
    assert drawn != {0}
    assert not specs & {cell["attack"]["spec"] for cell in card["cells"]} - {"none"}
    text = out.read_text()
    assert str(drawn.pop()) not in text
    assert "size=4" in text  # as it is in public
    assert SECRET.decode() not in text
    assert SECRET.hex() not in text
    assert not any(name in cell for cell in card["cells"] for name in held_back._TELLING)
    assert {cell["seed"] for cell in card["cells"]} == {0}
    keys = {record["key"] for record in Store(store).records()}
    assert not any(key in text for key in keys)
    done = arena("submit", "verify", out, "--store", store)
    assert done.code == 2
    assert "verifies it with --secret" in done.err
    words = f"submit verify {out} --store {store} --sample 0 --device cpu --secret"
    done = arena(*words.split(), tmp_path / "secret")
    assert done.code == 0, done.out + done.err
    done = arena("leaderboard", "add", tmp_path / "card.verified.json", "--to", to)
    assert done.code == 0, done.err


def test_secrets_are_checked_and_draws_repeat(tmp_path: Path) -> None:
    board = read_board(boards(tmp_path, BOARD + HELD_BACK) / "tiny/board.toml")
    (tmp_path / "other").write_bytes(b"x" * 32)
    with pytest.raises(BadInput, match="not the secret"):
        held_back.read_secret(tmp_path / "other", board)
    (tmp_path / "secret").write_bytes(SECRET)
    assert held_back.read_secret(tmp_path / "secret", board) == SECRET
    one = held_back.drawn(board, SECRET, 5)
    assert one == held_back.drawn(board, SECRET, 5)
    assert one != held_back.drawn(board, b"y" * 32, 5)
    assert one.seed != board.seed
    assert "target=" in one.attack[0]
    assert one.attack[0].partition("size=")[2] in ("3", "4")
    assert running.board_of({"board": {"name": "tiny", "definition": json.loads(
        json.dumps(board.definition()))}}) == board  # fmt: skip


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({"commitment": "x", "draws": ["seed"]}, "sha256"),
        ({"commitment": "0" * 64, "draws": ["sed"]}, "did you mean 'seed'"),
        ({"commitment": "0" * 64, "draws": []}, "draws names nothing"),
        ({"commitment": "0" * 64, "draw": []}, "no key 'draw'"),
        ("seed", "as a table"),
        ({"commitment": "0" * 64, "draws": ["seed"], "choices": {"a": {"b": 3}}}, "list of values"),
        ({"commitment": "0" * 64, "draws": ["seed"], "choices": {"a": {"b": [3]}}}, '"trigger"'),
    ],
)
def test_what_is_held_back_is_read_with_care(held: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        board_from({"held_back": held}, "board.toml")


@pytest.mark.parametrize(
    ("claim", "told"),
    [
        ("asr", "is no claim"),
        ("attack=patch", "says acc or asr"),
        ("attack=patch,asr=101", "is a percentage"),
        ("attack=patch,asr=x", "is a percentage"),
        ("atack=patch,asr=1", "did you mean 'attack'"),
        ("attack=blend,asr=1", "has no attack 'blend'"),
        ("gone.toml", "cannot be read"),
    ],
)
def test_claims_are_read_with_care(claim: str, told: str, here: Path, tmp_path: Path) -> None:
    words = "submit run own_defense.py --board tiny --claim"
    done = arena(*words.split(), claim, "--store", tmp_path / "s", "--out", tmp_path / "c.json")
    assert done.code == 2
    assert told in done.err
    assert not (tmp_path / "c.json").exists()


# ----------------------------------------------------------------------- what the repository shows


@pytest.mark.parametrize("folder", sorted((ROOT / "leaderboards").glob("*/")), ids=lambda p: p.name)
def test_published_boards_and_their_entries_are_whole(folder: Path) -> None:
    """Every file in leaderboards/: entries are whole and there once, tables come from the rows."""
    from arena.report.site import published_files, read_published

    board = read_board(folder / "board.toml")
    found = entries.read_all(folder)
    assert len({entry["card"]["hash"] for _, entry in found}) == len(found)
    for _, entry in found:
        assert entry["card"]["board"]["name"] == board.name
        assert entry["card"]["board"]["version"] <= board.version
    if not (folder / "results.json").exists():
        return
    rows = json.loads((folder / "results.json").read_text())
    assert len({row["key"] for row in rows}) == len(rows)
    assert {row["board"] for row in rows} == {board.name}
    assert {row["version"] for row in rows} <= set(range(1, board.version + 1))
    shares = ("acc", "asr", "ra")
    assert all(row[n] is None or 0 <= row[n] <= 1 for row in rows for n in shares)
    for name, text in published_files(read_published(folder)).items():
        made = (folder / name).read_text() == text
        assert made, f"{folder.name}/{name}: `arena leaderboard check --fix` makes it again"
