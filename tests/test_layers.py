"""The arrows between rooms, read from the imports, and the rules for files."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "arena"
FILES = sorted(path for path in ROOT.rglob("*.py"))
METHODS = [
    p
    for p in FILES
    if p.parent.name in ("attacks", "defenses", "inversions", "measures") and p.stem != "__init__"
]
LONG = {"patch": 350}  # five kinds of patch in one method
MOST_LINES = 260


def name_of(path: Path) -> str:
    words = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


@cache
def imports(path: Path) -> frozenset[str]:
    """All that a file imports, wherever in it, by full name; what only type checkers see not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for line in node.body
        for inner in ast.walk(line)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.add(full if is_module(full) else module)
    return frozenset(found)


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def inside(room: str) -> list[Path]:
    """The files of a package, or the one file of a module."""
    prefix = f"arena.{room}"
    found = [p for p in FILES if name_of(p) == prefix or name_of(p).startswith(f"{prefix}.")]
    assert found, f"there is no arena.{room}"
    return found


def of_arena(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "arena"}


def is_of(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("core", ["arena.core"]),
        ("attacks", ["arena.core"]),
        ("defenses", ["arena.core"]),
        ("inversions", ["arena.core"]),
        ("measures", ["arena.core"]),
        ("data", ["arena.core", "arena.data"]),
        ("store", ["arena.core.registry", "arena.records"]),
        ("boards", ["arena.core.registry", "arena.core.measures"]),
        ("identity", ["arena.core", "arena.store"]),
        ("provenance", ["arena.core.training"]),
        ("api", ["arena.core", "arena.data"]),
        ("report", ["arena.core", "arena.report"]),
        ("referee", ["arena.core", "arena.data", "arena.referee", "arena.store"]),
    ],
)
def test_rooms_know_only_what_lies_below(room: str, allowed: list[str]) -> None:
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in inside(room)
        for name in of_arena(path)
        if not any(is_of(name, room) for room in allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("room", "outsiders"),
    [
        ("core", ["pandas", "typer", "rich", "datasets"]),  # pyarrow: a user's Parquet pictures
        ("attacks", ["pandas", "typer", "rich", "datasets", "pyarrow"]),
        ("defenses", ["pandas", "typer", "rich", "datasets", "pyarrow"]),
        ("report", ["torch", "torchvision", "timm", "safetensors"]),
        ("referee", ["pandas", "typer", "rich", "datasets", "pyarrow"]),
    ],
)
def test_rooms_that_do_without(room: str, outsiders: list[str]) -> None:
    wrong = [
        f"{name_of(path)} imports {name}"
        for path in inside(room)
        for name in imports(path)
        if name.split(".")[0] in outsiders
    ]
    assert wrong == []


def test_nobody_imports_the_command_line() -> None:
    found = [name_of(p) for p in FILES if any(is_of(n, "arena.cli") for n in imports(p))]
    assert found == ["arena.__main__"]  # `python -m arena`


def test_only_those_import_the_runner_who_run_boards() -> None:
    found = [name_of(p) for p in FILES if any(is_of(n, "arena.runner") for n in imports(p))]
    assert found == ["arena.cli", "arena.submissions.checking", "arena.submissions.running"]


def test_what_is_hashed_imports_by_full_name() -> None:
    # `code_hash` follows full names only; behind a relative import a change would go unseen.
    wrong = [
        name_of(path)
        for room in ("core", "attacks", "defenses", "measures")
        for path in inside(room)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert wrong == []


def test_no_file_is_a_rag_bag() -> None:
    bad = ("utils", "util", "base", "helpers", "common", "misc", "manager", "new", "old")
    wrong = [p for p in FILES if p.stem in bad or p.stem.rpartition("_")[2] in ("v2", "v3", "new")]
    assert wrong == []


@pytest.mark.parametrize("path", METHODS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_method_is_one_short_file_with_its_source(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "Source:" in (ast.get_docstring(ast.parse(text)) or "")
    assert len(text.splitlines()) <= LONG.get(path.stem, MOST_LINES)


def test_no_method_knows_another() -> None:
    rooms = ("arena.attacks", "arena.defenses", "arena.measures")
    assert [p for p in METHODS if any(is_of(n, r) for n in of_arena(p) for r in rooms)] == []
