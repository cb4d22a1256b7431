"""What strangers and accidents may hand in, drawn at random: one sentence, never a traceback.

The suite draws a few examples per target, the same in every run. A campaign draws others, as many
as are asked for: `pytest tests/test_fuzz.py --hypothesis-profile=campaign`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from arena import checkpoints, cli, data, inverting, subjects
from arena.boards import Board
from arena.core import foreign
from arena.core.inversion.families import families
from arena.core.measures import measures
from arena.core.recipes import recipe_for
from arena.core.registry import BadInput, attacks, defenses, spec_of, split_spec
from arena.data import catalogue
from arena.publishing import MARK
from arena.referee import isolate
from arena.runner import Runner
from arena.store import digest
from arena.submissions import sources

LONGEST = 60  # seconds: no case may hang
MEMORY = 3 << 30  # bytes more than there are now: no case may take them
SIGNS = "signs:size=100,classes=5"
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")


def fuzzed(few: int, **drawn: st.SearchStrategy[Any]) -> Callable[[Any], Any]:
    """A test over `few` examples, the same in every run; over the profile's in a campaign."""
    campaign = settings.get_current_profile_name() == "campaign"
    chosen = settings(
        max_examples=settings().max_examples if campaign else few,
        derandomize=not campaign,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],  # shrinking takes longer than finding
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: chosen(given(**drawn)(test))


# ------------------------------------------------------------------------------------- the property


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def arena(*words: str) -> Answer:
    """What the console script does with these words, in this process, with its streams' manners:
    what cannot be encoded is an error on standard output and escaped on standard error."""
    out, err = io.BytesIO(), io.BytesIO()
    told = io.TextIOWrapper(out, "utf-8", errors="strict", write_through=True)
    complained = io.TextIOWrapper(err, "utf-8", errors="backslashreplace", write_through=True)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(told),
        contextlib.redirect_stderr(complained),
        bounded(words),
    ):
        patch.setattr(sys, "argv", ["arena", *words])
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
    assert code is None or isinstance(code, int), code
    return Answer(code or 0, out.getvalue().decode(), err.getvalue().decode())


@contextlib.contextmanager
def bounded(what: object) -> Iterator[None]:
    """No more than LONGEST seconds and MEMORY bytes."""

    def hang(*_: object) -> None:
        raise TimeoutError(f"{what!r} took more than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, hang)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.alarm(LONGEST)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(answer: Answer) -> None:
    """Done, or one sentence and code 2. Warnings may stand before the sentence."""
    assert answer.code in (0, 1, 2), answer
    assert "Traceback" not in answer.err, answer.err
    if answer.code == 2:
        lines = answer.err.splitlines()
        assert lines, answer
        assert lines[-1].startswith("arena: "), answer.err
        assert answer.err.endswith((".\n", "?\n")), answer.err
        assert len(lines[-1]) < 2000, f"{len(lines[-1])} characters are no sentence"
        assert lines[-1].isprintable(), ascii(lines[-1])


def refused(what: Callable[[], Any]) -> Any:
    """What `what` returns, or None where it says BadInput in a sentence."""
    try:
        with bounded(what):
            return what()
    except BadInput:
        return None


@pytest.fixture(autouse=True, scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder deep in a temporary one, and a cache outside."""
    root = tmp_path_factory.mktemp("fuzz")
    folder = root / "a" / "b" / "c" / "here"
    folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ARENA_CACHE_DIR", str(root / "cache"))
        patch.setenv("HOME", str(root / "home"))
        for name in ("ARENA_DATA_DIR", "ARENA_STORE"):
            patch.delenv(name, raising=False)
        data.load(SIGNS)
        yield folder


def content(folder: Path) -> dict[str, str]:
    """sha256 by file: what must not change."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.is_symlink()
    }


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# ----------------------------------------------------------------------------------------- drawing

NASTY = (
    *(
        "",
        " ",
        "-",
        "--",
        "---",
        "\n",
        "\x00",
        "a\x00b",
        "\t",
        "../../x",
        "/",
        ".",
        "..",
        "~",
        "~x",
    ),
    *(
        "<script>alert(1)</script>",
        "'",
        '"',
        "%s%n",
        "{}",
        "${HOME}",
        "$(true)",
        "*",
        "\\",
        "\x1b[2J",
    ),
    *(
        "ü",
        "日本",
        "\u202e",
        "\ud800",
        "\udc80",
        "\ufeff",
        "😀",
        "a" * 10_000,
        "/" * 300,
        "x" * 300,
    ),
    *(
        "nan",
        "inf",
        "-inf",
        "1e400",
        "-1",
        "0",
        "-0.0",
        "1e-400",
        "9" * 30,
        "-" + "9" * 30,
        "1_000",
    ),
    *(
        "0x10",
        "١٢",
        "²",
        "9" * 5000,
        "None",
        "true",
        ":",
        ",",
        "=",
        "(",
        ")",
        "()",
        "a:b=(c",
        "/dev/null",
    ),
)
TEXT = st.one_of(st.sampled_from(NASTY), st.text(max_size=12))
NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**30, math.nan, math.inf, -math.inf, 1e308]),
    st.integers(),
    st.floats(),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT)
JSON = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def spoilt(raw: bytes) -> st.SearchStrategy[bytes]:
    """`raw` truncated, or with bytes changed, repeated, left out or put in."""
    size = len(raw)
    at = st.integers(0, max(0, size - 1))
    return st.one_of(
        at.map(lambda i: raw[:i]),
        st.tuples(at, st.binary(min_size=1, max_size=9)).map(
            lambda p: raw[: p[0]] + p[1] + raw[p[0] + len(p[1]) :]
        ),
        st.tuples(at, st.binary(max_size=9)).map(lambda p: raw[: p[0]] + p[1] + raw[p[0] :]),
        st.tuples(at, at).map(lambda p: raw[: min(p)] + raw[max(p) :]),
        st.tuples(at, at).map(lambda p: raw + raw[min(p) : max(p)]),
        st.binary(max_size=60),
    )


SPEC_PARTS = st.one_of(
    st.sampled_from(
        [
            *attacks.names(), *defenses.names(), *families.names(), *measures.names(),
            *catalogue.CATALOGUE, "smoke", "fast", "paper", "timm:", "timm:resnet18", ":", ":", ":",
            *"=,()", "=", "=", ",", "target", "rate", "eps", "size", "epochs", "lr", "base", "side",
            "classes", "mode", "image", "1", "0.1", "-3", "1e9", "none", "true", "all_to_all",
        ]
    ),
    TEXT,
)  # fmt: skip


def fields_of(registry: Any) -> st.SearchStrategy[str]:
    """Specs of real names and fields with odd values."""

    def with_fields(name: str) -> st.SearchStrategy[str]:
        known = [field.name for field in registry.describe(name).fields] or ["x"]
        pair = st.tuples(st.sampled_from(known), st.one_of(SPEC_PARTS, NUMBERS.map(str)))
        return st.lists(pair, max_size=3).map(
            lambda pairs: name + (":" if pairs else "") + ",".join(f"{k}={v}" for k, v in pairs)
        )

    return st.sampled_from(registry.names()).flatmap(with_fields)


SPECS = st.one_of(
    st.lists(SPEC_PARTS, max_size=8).map("".join),
    *(fields_of(registry) for registry in (attacks, defenses, families, measures)),
)

# ------------------------------------------------------------------------------------ spec strings


@fuzzed(60, text=SPECS, recipe=st.one_of(st.sampled_from(["paper", "fast", "smoke"]), TEXT))
def test_specs(text: str, recipe: str) -> None:
    refused(lambda: split_spec(text))
    for registry in (attacks, defenses, families, measures):
        made = refused(lambda registry=registry: registry.build(text, recipe))
        if made is not None:
            assert registry.build(spec_of(made)) == made
    refused(lambda: recipe_for(text, "fastnet"))


@fuzzed(
    60,
    text=st.one_of(SPECS, st.lists(SPEC_PARTS, max_size=4).map(lambda p: "signs:" + ",".join(p))),
)
def test_data_set_specs(text: str) -> None:
    request = refused(lambda: catalogue.parse(text))
    if request is not None:
        assert catalogue.parse(request.name) == request


# ----------------------------------------------------------------------------------------- boards


def toml(value: object) -> str:
    """A TOML value; what has no spelling there is written as it comes."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{toml(str(k))} = {toml(v)}' for k, v in value.items())}}}"
    return "nan" if value is None else str(value)


TINY_BOARD = {
    "name": "tiny",
    "version": 1,
    "dataset": [SIGNS],
    "model": ["fastnet_tiny"],
    "attack": ["patch"],
    "defense": ["finetune"],
    "seed": [0],
    "recipe": "smoke",
}
BOARD_KEYS = st.one_of(st.sampled_from(list(Board.__dataclass_fields__)), TEXT)
BOARD_VALUES = st.one_of(
    JSON,
    SPECS,
    st.lists(SPECS, max_size=3),
    st.lists(NUMBERS, max_size=3),
    st.sampled_from([list(range(20_000)), ["patch"] * 5000, [[[[]]]], ["patch", 1, None]]),
    st.lists(
        st.dictionaries(st.sampled_from(["attack", "source", "acc", "asr", "x"]), JSON), max_size=2
    ),
)


def board_text(changes: dict[str, Any]) -> bytes:
    lines = [f"{k if k.isidentifier() and k.isascii() else toml(k)} = {toml(v)}"
             for k, v in {**TINY_BOARD, **changes}.items()]  # fmt: skip
    return "\n".join(lines).encode("utf-8", "surrogatepass")


BOARDS = st.one_of(
    st.dictionaries(BOARD_KEYS, BOARD_VALUES, min_size=1, max_size=2).map(board_text),
    spoilt(board_text({})),
    st.integers(0, 7).map(lambda i: board_text({}) + b"\n" + board_text({}).splitlines()[i]),
)


@fuzzed(50, raw=BOARDS)
@example(raw=board_text({"attack": ["x" * 10_000]}))  # no sentence has so many characters
@example(raw=board_text({"seed": list(range(20_000))}))  # nobody waits so long for a plan
@example(raw=board_text({"title": "\x1b[2J", "recipe": "\u202e"}))
def test_boards(here: Path, raw: bytes) -> None:
    folder = fresh(here / "boards")
    (folder / "board.toml").write_bytes(raw)
    check(arena("run", str(folder / "board.toml"), "--dry-run", "--store", str(folder / "store")))
    assert (folder / "board.toml").read_bytes() == raw
    assert [child.name for child in folder.iterdir()] == ["board.toml"]


# ------------------------------------------------------------------------------- the command line


def commands() -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {}

    def walk(command: Any, path: tuple[str, ...]) -> None:
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, (*path, name))
        if not hasattr(command, "commands"):
            found[path] = command

    walk(typer.main.get_command(cli.app), ())
    return found


COMMANDS = commands()
SENSIBLE = {
    "dataset": [SIGNS, "imagefolder:.", "signs:size=100", "cifar10", "imagefolder:"],
    "model": ["fastnet_tiny", "cnn", "timm:resnet18", "net.py:f", "pickle:x"],
    "attack": ["patch", "blend", "none", "sdrm:base=patch"],
    "defense": ["none", "finetune", "nc", "activation_clustering"],
    "cell": ["a", "0", "e"],
    "method": ["nc", "deck", "abs", "spectral", "uap"],
    "recipe": ["smoke", "fast", "paper"],
    "measure": ["pgd", "class_distance"],
    "device": ["cpu", "auto", "cuda:99"],
    "format": ["md", "csv", "json", "latex", "table"],
    "pairs": ["all", "sample:3", "0:1", "0:0", "sample:-1", "9:1"],
    "board": ["adhoc", "tiny"],
    "split": ["val", "test"],
    "checkpoint": ["none.pt", "w.safetensors", "."],
    "images": [".", "no"],
    "level": ["deep", "middle"],
    "store": ["STORE", "no"],
    "out": ["o/x.png", "x", "."],
    "picture": ["o/y.png"],
    "encoder": ["torchvision:vgg16", "x.safetensors", "no"],
    "kind": list(cli.KINDS),
    "name": ["patch", "nc", "acc", "signs"],
}


def words_of(command: tuple[str, ...]) -> st.SearchStrategy[list[str]]:
    """Some of the command's own options and arguments, with sensible and odd values."""
    parts: list[st.SearchStrategy[list[str]]] = []
    for parameter in COMMANDS[command].params:
        if parameter.name in ("help", "install_completion", "show_completion", "data_dir"):
            continue
        value = st.one_of(
            st.sampled_from(SENSIBLE.get(parameter.name, ["1", "0.5", "3"])),
            st.sampled_from(SENSIBLE.get(parameter.name, ["1", "0.5", "3"])),
            TEXT, NUMBERS.map(str), SPECS,
        )  # fmt: skip
        if parameter.param_type_name == "argument":
            parts.append(value.map(lambda v: [v]))
        elif getattr(parameter, "is_flag", False):
            parts.append(st.just([parameter.opts[0]]))
        else:
            parts.append(value.map(lambda v, name=parameter.opts[0]: [name, v]))
    chosen = st.lists(st.sampled_from(range(len(parts))), max_size=6, unique=True).flatmap(
        lambda places: st.tuples(*(parts[place] for place in places))
    )
    return chosen.map(lambda groups: [word for group in groups for word in group])


LINES = st.one_of(
    *(words_of(c).map(lambda words, c=c: [*c, *words]) for c in COMMANDS),
    st.lists(
        st.one_of(TEXT, st.sampled_from([*(c[0] for c in COMMANDS), "--json", "-h"])), max_size=4
    ),
)


@pytest.fixture(scope="module")
def idle() -> Iterator[list[Any]]:
    """Nothing is trained or searched; what would be is listed."""
    asked: list[Any] = []

    def refuse(what: Any, *_: object, **__: object) -> Any:
        asked.append(what)
        raise isolate.Failed("failed", "nothing is done here")

    def halt(*_: object, **__: object) -> Any:
        raise BadInput("nothing is searched here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolate, "run", refuse)
        patch.setattr(inverting, "invert", halt)
        patch.setattr(Runner, "run", halt)
        yield asked


@fuzzed(60, words=LINES)
@example(words=["leaderboard", "build", "--store", "STORE"])
@example(words=["submit", "key", "."])
def test_command_lines(here: Path, idle: list[Any], stored: Path, words: list[str]) -> None:
    if any("\x00" in word for word in words):  # no system passes it on
        return
    folder = fresh(here.parent / "line" / "1" / "2" / "3" / "4")
    before = content(stored)
    if words[:2] == ["leaderboard", "build"]:  # makes its pages again, and nothing else
        before = {n: what for n, what in before.items() if not n.startswith("leaderboard/")}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        check(arena(*(str(stored) if word == "STORE" else word for word in words)))
    after = content(stored)
    assert {name: after.get(name) for name in before} == before
    hidden = [file for file in folder.rglob(".*") if file.is_file() and file.name != MARK]
    assert not hidden, "half written"


@pytest.fixture(scope="module")
def stored(examined: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(examined[0], tmp_path_factory.mktemp("stored") / "store"))


# -------------------------------------------------------------------------------------- checkpoints


def safetensors(header: Any, body: bytes, size: int | None = None) -> bytes:
    """A safetensors file; `size`: what it says of its header's length."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if size is None else size).to_bytes(8, "little") + raw + body


DTYPES = ["F32", "F16", "BF16", "F64", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X9", 7, None]
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES),
        "shape": st.one_of(
            st.lists(st.sampled_from([0, 1, 2, 3, -1, 2**31, 2**62, 2**64, "2"]), max_size=4), JSON
        ),
        "data_offsets": st.one_of(
            st.lists(st.sampled_from([0, 4, 8, 16, 24, -4, 2**40, 2**63]), max_size=3), JSON
        ),
    }
)
SAFETENSORS = st.builds(
    safetensors,
    st.one_of(st.dictionaries(TEXT.filter(str.isprintable), st.one_of(TENSOR, JSON)), JSON).filter(
        lambda v: _writes(v)
    ),
    st.sampled_from([b"", bytes(4), bytes(16), b"\xff" * 24]),
    st.sampled_from([None, None, None, 0, 1, 7, 2**20, 2**40, 2**63, 2**64 - 1]),
)


def _writes(value: object) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.dumps(value).encode()
        return True
    return False


TENSORS = st.sampled_from(
    [
        torch.zeros(2), torch.full((2, 2), math.nan), torch.zeros(0), torch.tensor(3),
        torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.bool), torch.zeros(2, 2).to_sparse(),
        torch.zeros(1).expand(10**9),
        torch.zeros(3, device="meta"),
        torch.nn.Parameter(torch.zeros(2)), torch.zeros(4)[::2],
    ]
)  # fmt: skip
PICKLED = st.recursive(
    st.one_of(PLAIN, TENSORS, st.binary(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(
                st.sampled_from(["state_dict", "model", "net", "module.a", "a", "body.a"]), TEXT,
                st.integers(),
            ),
            inner, max_size=3,
        ),
    ),
    max_leaves=5,
)  # fmt: skip


def pickled(value: Any) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.fixture(scope="module")
def network() -> dict[str, torch.Tensor]:
    """The weights of a small network of five classes."""
    from arena.core import models
    from arena.core.seeding import stream

    return models.build("fastnet_tiny", 5, (3, 32, 32), stream(0, "shell")).state_dict()


def read(here: Path, raw: bytes, ending: str) -> dict[str, torch.Tensor] | None:
    file = fresh(here / "weights") / f"weights{ending}"
    file.write_bytes(raw)
    found: dict[str, torch.Tensor] | None = refused(lambda: checkpoints.read_weights(file))
    if found is not None:
        assert all(isinstance(name, str) for name in found)
        refused(lambda: subjects.of_checkpoint(file, "fastnet_tiny", SIGNS))
    assert file.read_bytes() == raw
    assert list(file.parent.iterdir()) == [file]
    return found


@fuzzed(60, raw=SAFETENSORS)
def test_safetensors(here: Path, raw: bytes) -> None:
    read(here, raw, ".safetensors")


@fuzzed(60, value=PICKLED)
def test_checkpoints_of_torch(here: Path, value: Any) -> None:
    try:
        raw = pickled(value)
    except Exception:  # not everything can be saved
        return
    read(here, raw, ".pt")


@fuzzed(25, data_=st.data(), ending=st.sampled_from([".pt", ".safetensors"]))
def test_spoilt_checkpoints(
    here: Path, network: dict[str, torch.Tensor], data_: st.DataObject, ending: str
) -> None:
    if ending == ".pt":
        raw = pickled(network)
    else:
        from safetensors.torch import save

        raw = save(network)
    read(here, data_.draw(spoilt(raw)), ending)


CHANGES: list[Callable[[torch.Tensor], Any]] = [
    lambda v: v.to(torch.float64), lambda v: v.half(), lambda v: v.to(torch.bfloat16),
    lambda v: torch.full(v.shape, math.nan), lambda v: torch.full(v.shape, math.inf),
    lambda v: v.flatten()[:1], lambda v: v[None],
    lambda v: torch.zeros(v.shape, dtype=torch.int64),
    lambda v: torch.zeros(v.shape, dtype=torch.complex64),
    lambda v: torch.zeros(v.shape).to_sparse(),
    lambda v: torch.zeros(v.shape, device="meta"), lambda v: torch.full(v.shape, 1e38),
    lambda v: torch.zeros(v.shape, dtype=torch.bool), lambda v: torch.zeros(1).expand(v.shape),
    lambda v: torch.zeros(0), lambda v: torch.zeros(v.shape, dtype=torch.float8_e4m3fn),
]  # fmt: skip


@fuzzed(
    30,
    at=st.integers(0, 1000),
    change=st.sampled_from(CHANGES),
    name=st.one_of(st.none(), TEXT),
    ending=st.sampled_from([".pt", ".safetensors"]),
    strip=st.booleans(),
)
@example(at=5, change=CHANGES[8], name=None, ending=".pt", strip=False)  # complex
@example(at=5, change=CHANGES[9], name=None, ending=".pt", strip=False)  # sparse
def test_changed_weights(
    here: Path,
    network: dict[str, torch.Tensor],
    at: int,
    change: Callable[[torch.Tensor], Any],
    name: str | None,
    ending: str,
    strip: bool,
) -> None:
    weights = dict(network)
    key = list(weights)[at % len(weights)]
    value = change(weights.pop(key)) if network[key].ndim else torch.tensor(math.nan)
    weights[key if name is None else name] = value
    if strip:
        weights = {k.removeprefix("body."): v for k, v in weights.items() if "normalize" not in k}
    file = fresh(here / "weights") / f"weights{ending}"
    try:
        if ending == ".pt":
            torch.save(weights, file)
        else:
            from safetensors.torch import save_file

            save_file(weights, file)
    except Exception:  # not everything can be saved
        return
    made = refused(lambda: subjects.of_checkpoint(file, "fastnet_tiny", SIGNS))
    if made is not None:
        state = made.model.state_dict()
        assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in network.items()}
        assert all(bool(v.isfinite().all()) for v in state.values())


NETS = st.one_of(
    st.sampled_from(
        [
            "", "f = 1", "def f(): return 1", "def f(): raise SystemExit(3)", "raise SystemExit(3)",
            "import torch\ndef f(): return torch.nn.Identity()",
            "def f(x): return x", "import torch\nf = torch.nn.Identity", "\x00", "def f(:",
            "import torch\ndef f(): return torch.nn.Linear(1, 10**7)", "def f(): return f()",
            "import torch\ndef f(): return torch.nn.Sequential(torch.nn.Flatten())",
            *(
                f"import torch\nclass N(torch.nn.Module):\n def forward(self, x): {body}\n"
                "def f(): return N()"
                for body in (
                    "return x[:, 0, 0, :5]", "raise SystemExit", "return x.sum().expand(2, 5)",
                    "return torch.zeros(len(x), 5) * float('nan')",
                )
            ),
        ]
    ),
    st.text(max_size=30),
)  # fmt: skip


@fuzzed(25, code=NETS, function=st.sampled_from(["f", "f", "f", "g", "__name__"]))
@example(code="raise SystemExit(3)", function="f")
@example(code="def f(): raise SystemExit(3)", function="f")
def test_factories(here: Path, code: str, function: str) -> None:
    file = fresh(here / "nets") / "net.py"
    file.write_bytes(code.encode("utf-8", "surrogatepass"))
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        refused(lambda: foreign.build(f"{file}:{function}", 5, (3, 32, 32)))
    finally:
        sys.dont_write_bytecode = before


# ------------------------------------------------------------------------------ strangers' methods

METHOD = '''"""Does nothing.

Source: a test.
"""

from typing import ClassVar

from arena.core.registry import method, param


@method
class Mine:
    needs_share: ClassVar[float] = 0.0
    share: float = param(0.5, "a share", above=0, high=1, under={"fast": 0.1})
    word: str = param("a", "a word", choices=("a", "b"))
    target: int | None = 0

    def repair(self, model, clean, rng):
        return model

    def prepare(self, train, rng): ...

    def poison(self, train, trigger, rng): ...
'''
PARTS = (
    "Does nothing", "Source: a test.", "ClassVar[float]", "0.0", "share", "float", "0.5",
    "a share", "above=0", "high=1", "under", '{"fast": 0.1}', "str", '"a"', '("a", "b")', "target",
    "int | None", "@method", "class Mine", "def repair", "def prepare", "param(",
    "choices", "needs_share",
)  # fmt: skip
PUT = st.one_of(
    st.sampled_from(
        [
            "", "0", "-1", "None", "True", "1e999", "-0.0", "10**10**10", "9" * 5000, "'x'", "[1]",
            "{}", "{3: 0.5}", "(1, 2)", "b'x'", "x", "int", "list[int]", "float | None", "...",
            "'\\ud800'", "repair", "__init__", "method_name", "class", "path=True", "folder=True",
            "spec='attack'", "(" * 300, "-" * 20_000 + "1", "a" + ".b" * 900, "\0", "\n", "\t",
            '"""', "é", "lambda: 0", "f'{1}'", "*x", "**x", "@method\n@method", "low=1, low=2",
        ]
    ),
    st.text(max_size=8),
)  # fmt: skip


@fuzzed(60, changes=st.lists(st.tuples(st.sampled_from(PARTS), PUT), min_size=1, max_size=3))
@example(changes=[("target", "share")])
@example(changes=[("choices", "spec")])
@example(changes=[("high=1", "path=True")])
def test_method_files(here: Path, changes: list[tuple[str, str]]) -> None:
    text = METHOD
    for part, put in changes:
        text = text.replace(part, put, 1)
    file = fresh(here / "methods") / "mine.py"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    before = [dict(registry._added) for registry in (attacks, defenses)]
    try:
        found = refused(lambda: sources.find(str(file), here / "methods" / "kept"))
        if found is not None:  # what was accepted can be listed, built, named and written down
            known = attacks if found.kind == "attack" else defenses
            for recipe in ("paper", "fast", "smoke"):
                made = refused(partial(known.build, found.name, recipe))
                assert made is None or spec_of(made).startswith("mine")
            told = known.describe(found.name)
            json.dumps([told.summary, told.source, told.departs, str(told.fields)]).encode()
            f"{told.doc}{told.fields}".encode()
    finally:
        for registry, added in zip((attacks, defenses), before, strict=True):
            registry._added.clear()
            registry._added.update(added)


# ------------------------------------------------------------------------------------------- images


def picture(side: tuple[int, int] = (8, 8), mode: str = "RGB", kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new(mode, side, 0).save(out, kind)
    return out.getvalue()


def lying_png(width: int, height: int) -> bytes:
    """A small PNG whose header says another size."""
    import zlib

    raw = bytearray(picture())
    raw[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    raw[29:33] = zlib.crc32(bytes(raw[12:29])).to_bytes(4, "big")
    return bytes(raw)


IMAGES = st.one_of(
    st.just(picture()),
    st.just(picture()),
    st.builds(
        picture,
        st.tuples(st.sampled_from([1, 8, 9, 300]), st.sampled_from([1, 8, 2])),
        st.sampled_from(["RGB", "L"]),
        st.sampled_from(["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG", "PPM"]),
    ),
    st.builds(picture, mode=st.sampled_from(["1", "P", "RGBA", "LA", "I;16"])),
    spoilt(picture()),
    spoilt(picture(kind="JPEG")),
    spoilt(picture(kind="TIFF")),
    spoilt(picture(kind="GIF")),
    st.builds(
        lying_png,
        st.sampled_from([0, 1, 9, 60_000, 2**31 - 1]),
        st.sampled_from([0, 1, 9, 60_000, 2**31 - 1]),
    ),
    st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"P6 99999 99999 255\n", b"P6 0 0 255\n", b"GIF89a"]
    ),
)
SIDE = st.sampled_from(["", "", ",side=8", ",side=16"])


def loaded(spec: str, folder: Path) -> None:
    before = content(folder)
    cached = Path(os.environ["ARENA_CACHE_DIR"])
    found = refused(lambda: data.load(spec))
    assert content(folder) == before
    assert not list(cached.glob("*.tmp*")), "half an entry was left in the cache"
    if found is not None:
        assert len(found.classes) >= 1
        for split in (found.train, found.val, found.test):
            assert split.x.dtype == torch.uint8
            assert len(split.x) == len(split.y) > 0
            assert 0 <= int(split.y.min()) <= int(split.y.max()) < len(found.classes)
    for entry in cached.iterdir():  # the campaign's would fill the disk
        if entry.name != "sha256" and len(list(cached.iterdir())) > 60 and entry.is_dir():
            shutil.rmtree(entry)


FILES = st.tuples(
    st.sampled_from(["a/", "b/", "10/", "9/", "train/a/", "test/a/", "val/b/", "", "a/b/"]),
    st.sampled_from(["x", "y1", "y2", "y10", "class_0_x", "class_1_y", ".z", "ü"]),
    st.sampled_from([".png", ".PNG", ".jpg", ".tif", ".gif", ".webp", ".txt", ""]),
)


@fuzzed(30, files=st.dictionaries(FILES, IMAGES, max_size=12), side=SIDE)
def test_image_folders(here: Path, files: Mapping[tuple[str, str, str], bytes], side: str) -> None:
    folder = fresh(here / "photos")
    for (label, name, ending), raw in files.items():
        file = folder / f"{label}{name}{ending}"
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(raw)
    loaded(f"imagefolder:{folder}{side}", folder)


LABELS = st.one_of(
    st.lists(st.integers(0, 2), min_size=6, max_size=12).map(lambda v: pa.array(v, pa.int64())),
    st.lists(st.sampled_from([0, 1, -1, None, 2**40, 2**62]), min_size=6, max_size=8).map(
        lambda v: pa.array(v, pa.int64())
    ),
    st.lists(st.sampled_from([0, 1, 2**63]), min_size=6, max_size=8).map(
        lambda v: pa.array(v, pa.uint64())
    ),
    st.lists(st.floats(), min_size=6, max_size=6).map(pa.array),
    st.lists(st.text("ab", max_size=2), min_size=6, max_size=6).map(pa.array),
    st.lists(st.booleans(), min_size=6, max_size=6).map(pa.array),
    st.lists(st.lists(st.integers(0, 3), max_size=2), min_size=6, max_size=6).map(
        lambda v: pa.array(v, pa.list_(pa.int64()))
    ),
    st.just(pa.array(["a", "b", "a"] * 2).dictionary_encode()),
    st.just(pa.nulls(6)),
)
NOT_LABELS = st.sampled_from(["image", "img", "x", "label", "bytes"])
FEATURES = st.one_of(
    st.just(b"{}"),
    st.binary(max_size=8),
    st.one_of(
        JSON,
        st.fixed_dictionaries({"info": JSON}),
        st.fixed_dictionaries({"info": st.fixed_dictionaries({"features": JSON})}),
        st.builds(
            lambda names, kind: {
                "info": {
                    "features": {
                        "label": {"names": names, "_type": kind}, "image": {"_type": "Image"},
                    }
                }
            },
            st.one_of(st.lists(TEXT, max_size=4), JSON),
            st.one_of(st.just("ClassLabel"), JSON),
        ),
    )
    .filter(_writes)
    .map(lambda value: json.dumps(value).encode()),
)  # fmt: skip


def images_of(raws: list[bytes | None], how: str) -> Any:
    match how:
        case "binary":
            return pa.array(raws, pa.binary())
        case "large":
            return pa.array(raws, pa.large_binary())
        case "text":
            return pa.array(["x"] * len(raws))
        case "numbers":
            return pa.array([{"bytes": 3}] * len(raws))
        case "path":
            return pa.array([{"path": "x.png"}] * len(raws))
        case "list":
            return pa.array([[raw] for raw in raws])
        case "dictionary":
            return pa.array(raws, pa.binary()).dictionary_encode()
    return pa.array([None if raw is None else {"bytes": raw, "path": None} for raw in raws])


TABLE: dict[str, Any] = {
    "labels": pa.array([0, 1, 2] * 4),
    "odd": [],
    "how": "struct",
    "name": "label",
    "damage": None,
    "spec": "parquet:{}",
    "split": "train",
}


@fuzzed(
    40,
    labels=LABELS,
    odd=st.lists(st.one_of(IMAGES, st.none()), max_size=2),
    how=st.sampled_from(
        ["struct"] * 6 + ["binary", "large", "text", "numbers", "path", "list", "dictionary"]
    ),
    name=st.sampled_from(["label"] * 5 + ["labels", "y", "odd", "", "image", "a.b", "ü\x00"]),
    features=st.one_of(st.none(), FEATURES),
    damage=st.one_of(st.none(), st.none(), st.none(), st.integers(0, 2**16)),
    spec=st.sampled_from(
        ["parquet:{},side=8", "parquet:{}", "parquet:{}", "mnist", "gtsrb", "lisa"]
    ),
    split=st.sampled_from(["train", "train", "train", "test", "train-00000-of-00002"]),
)
@example(**TABLE, features=b"\xc2")
@example(**TABLE, features=b"[]")
@example(
    **TABLE, features=b'{"info": {"features": {"label": {"names": 3, "_type": "ClassLabel"}}}}'
)
@example(**{**TABLE, "labels": pa.array([0, 1, 2**62] * 2)}, features=None)
@example(**{**TABLE, "labels": pa.array([0, 1, 2**63] * 2, pa.uint64())}, features=None)
@example(**{**TABLE, "name": "image"}, features=None)  # two columns of one name
@example(
    **{**TABLE, "how": "path"}, features=b'{"info": {"features": {"image": {"_type": "Image"}}}}'
)
def test_parquet(
    here: Path,
    labels: Any,
    odd: list[bytes | None],
    how: str,
    name: str,
    features: bytes | None,
    damage: int | None,
    spec: str,
    split: str,
) -> None:
    folder = fresh(here / "tables")
    raws = (odd + [picture()] * len(labels))[: len(labels)]
    table = pa.Table.from_arrays([images_of(raws, how), labels], ["image", name])
    if features is not None:
        table = table.replace_schema_metadata({b"huggingface": features})
    named = spec in catalogue.CATALOGUE
    place = folder / spec if named else folder
    place.mkdir(exist_ok=True)
    file = place / f"{split}.parquet"
    pq.write_table(table, file)
    if damage is not None:
        raw = bytearray(file.read_bytes())
        raw[damage % len(raw)] ^= 0x55
        file.write_bytes(bytes(raw[: len(raw) - damage % 7]) if damage % 3 == 0 else bytes(raw))
    with pytest.MonkeyPatch.context() as patch:
        if named:
            patch.setenv("ARENA_DATA_DIR", str(folder))
        loaded(spec.format(folder), folder)


# ------------------------------------------------------------------------------------------ records

SOUND = st.one_of(JSON, st.sampled_from([{}, [], "x", 10**400, {"*": 1}, [None]]))


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    if isinstance(value, dict):
        found += [each for key in value for each in places(value[key], (*at, key))]
    if isinstance(value, list):
        found += [each for i in range(min(2, len(value))) for each in places(value[i], (*at, i))]
    return found


def altered(body: dict[str, Any], at: tuple[Any, ...], value: Any) -> None:
    """Put `value` there; `...` takes it away."""
    for step in at[:-1]:
        body = body[step]
    if value is ...:
        del body[at[-1]]
    else:
        body[at[-1]] = value


READERS = (
    *(("results", "--format", f) for f in ("table", "md", "csv", "json", "latex")),
    ("leaderboard", "build"),
    ("show", "CELL"),
    ("show", "CELL", "--json"),
    ("results", "-a", "patch"),
)


@fuzzed(
    40,
    data_=st.data(),
    which=st.sampled_from(["record", "record", "record", "board", "raw", "foreign", "store.json"]),
    words=st.sampled_from(READERS),
)
def test_damaged_stores(
    here: Path, stored: Path, data_: st.DataObject, which: str, words: tuple[str, ...]
) -> None:
    folder = here / "damaged-store"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(stored, folder, copy_function=os.link)  # the artifacts are only read
    found = sorted((folder / ("boards" if which == "board" else "records")).glob("*.json"))
    path = found[data_.draw(st.integers(0, len(found) - 1))]
    key = path.stem[:12]
    raw = path.read_bytes()
    path.unlink()
    if which in ("record", "board"):
        body = json.loads(raw)
        body.pop("checksum")
        at = data_.draw(st.sampled_from(places(body)))
        altered(body, at, data_.draw(st.one_of(st.just(...), SOUND)))
        with contextlib.suppress(ValueError):  # what JSON cannot hold
            body["checksum"] = digest(body)
        path.write_text(json.dumps(body))
    elif which == "raw":
        path.write_bytes(data_.draw(spoilt(raw)))
    elif which == "foreign":
        path.write_bytes(raw)
        (folder / "records" / "x.json").write_bytes(data_.draw(st.binary(max_size=20)))
        (folder / "records" / "folder.json").mkdir()
        (folder / "boards" / "y.json").write_text(json.dumps(data_.draw(JSON.filter(_writes))))
    else:
        path.write_bytes(raw)
        marker = folder / "store.json"
        left = marker.read_bytes()
        marker.unlink()
        marker.write_bytes(data_.draw(spoilt(left)))
    shutil.rmtree(folder / "leaderboard", ignore_errors=True)  # may be made anew
    before = set(content(folder).values())
    check(arena(*(key if w == "CELL" else w for w in words), "--store", str(folder)))
    assert before <= set(content(folder).values()), "what was there is gone"
