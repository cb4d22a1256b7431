"""The README's promises: its example runs, its commands exist, its boards are real."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from arena.boards import read_board
from arena.core.measures import measures
from arena.core.registry import attacks, defenses
from arena.core.training import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.S)


def test_python_example_runs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten lines of Python load, poison, train, repair and evaluate."""
    monkeypatch.setenv("ARENA_CACHE_DIR", os.environ.get("ARENA_CACHE_DIR", str(tmp_path)))
    (code,) = (body for language, body in BLOCKS if language == "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    victim = eval(next(line for line in lines if line.startswith("victim")).removeprefix("victim"))
    assert victim["asr"] > 0.8
    assert victim["acc"] > 0.5


def test_first_two_blocks_are_set_up_and_tests() -> None:
    first, second = (body.strip() for language, body in BLOCKS[:2])
    assert first.endswith("arena quickstart")
    assert "pip install" in first
    assert second.endswith("-m pytest -n 2 --dist loadfile")


def test_board_in_readme_is_the_published_one(tmp_path: Path) -> None:
    (text,) = (body for language, body in BLOCKS if language == "toml")
    path = tmp_path / "board.toml"
    path.write_text(text)
    shown = read_board(path).definition()
    published = read_board(ROOT / "leaderboards/cifar10-fast/board.toml").definition()
    assert {k: shown[k] for k in shown if k != "title"} == {
        k: published[k] for k in published if k != "title"
    }


@pytest.mark.parametrize("path", sorted((ROOT / "leaderboards").glob("*/board.toml")), ids=str)
def test_published_boards_name_what_exists(path: Path) -> None:
    board = read_board(path)
    assert board.name == path.parent.name
    assert board.attacks()
    assert board.defenses()
    board.measures()


def test_commands_and_recipes_are_documented() -> None:
    from arena.cli import app

    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        assert f"arena {name}" in README or name == "quickstart", name
    assert all(f"`{recipe}`" in README for recipe in RECIPES)


def test_every_method_is_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    names = [*attacks.names(), *defenses.names(), *measures.names()]
    assert [name for name in names if f"`{name}`" not in changelog] == []
