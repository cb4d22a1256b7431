"""Boards: typos are told, types are checked, the null methods are always there."""

from __future__ import annotations

from pathlib import Path

import pytest

from arena.boards import (
    NULL_DEFENSES,
    QUICKSTART,
    Board,
    Published,
    board_from,
    check_names,
    read_board,
)
from arena.core.registry import BadInput, spec_of

WHOLE = """
name = "demo"
version = 3
title = "A demo"
dataset = ["signs", "cifar10"]
model = "fastnet"
attack = ["patch", "blend"]
defense = ["finetune"]
seed = [0, 1]
recipe = "smoke"
measure = ["class_distance:pairs=sample:5", "pgd"]
clean_share = 0.1
timeout = 60
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "board.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_board_is_read(tmp_path: Path) -> None:
    assert read_board(write(tmp_path, WHOLE)) == Board(
        name="demo",
        version=3,
        title="A demo",
        dataset=("signs", "cifar10"),
        model=("fastnet",),
        attack=("patch", "blend"),
        defense=("finetune",),
        seed=(0, 1),
        recipe="smoke",
        measure=("class_distance:pairs=sample:5", "pgd"),
        clean_share=0.1,
        timeout=60,
    )


def test_a_board_without_a_name_has_its_folders(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert read_board(write(tmp_path / "mine", "seed = 4")) == Board(name="mine", seed=(4,))


FIGURE = Published("blend", "a paper, table 1", asr=99.5)
BOARDS = [QUICKSTART, Board(), Board(name="x", seed=(3, 1), timeout=2.5, published=(FIGURE,))]
BOARDS.append(Board(name="y", measure=("pgd:eps=4",)))


@pytest.mark.parametrize("board", BOARDS)
def test_a_definition_makes_the_board_again(board: Board) -> None:
    raw = {key: value for key, value in board.definition().items() if value is not None}
    assert board_from(raw, "here", default_name=board.name) == board


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('atack = ["patch"]', r"there is no key 'atack'; did you mean 'attack'\?"),
        ('seed = ["0"]', r"seed must be a list of whole numbers, got '0'"),
        ("seed = [true]", r"seed must be a list of whole numbers, got True"),
        ("seed = 0.5", r"seed must be a list of whole numbers, got 0.5"),
        ("model = [1]", r"model must be a list of words, got 1"),
        ("name = 3", r"name must be a word, got 3"),
        ('version = "1"', r"version must be a whole number, got '1'"),
        ("version = true", r"version must be a whole number, got True"),
        ('clean_share = "5%"', r"clean_share must be a number, got '5%'"),
        ("clean_share = 0", r"clean_share must lie in \(0, 1\], got 0"),
        ("clean_share = 1.5", r"clean_share must lie in \(0, 1\], got 1.5"),
        ("clean_share = nan", r"clean_share must lie in \(0, 1\], got nan"),
        ("published = 3", r"published figures are written as tables"),
        ('[[published]]\nattack = "patch"', r"published figures need the key 'source'"),
        ('[[published]]\natack = "patch"', r"published figures have no key 'atack'; did you mean"),
        (
            '[[published]]\nattack = "patc"\nsource = "x"',
            r"published figures for 'patc', which is not among its attacks; did you mean 'patch'",
        ),
        (
            '[[published]]\nattack = "patch"\nsource = "x"\ndefense = "nad"\ngain = 50.0',
            r'a published gain is that of a defense with attack = "none"',
        ),
        (
            '[[published]]\nattack = "patch"\nsource = "x"\nasr = 101',
            r"asr is a percentage, got 101",
        ),
        ("timeout = 0", r"timeout must be above 0 seconds, got 0"),
        ("timeout = nan", r"timeout must be above 0 seconds, got nan"),
        ('recipe = "fsat"', r"There is no recipe 'fsat'; did you mean 'fast'\?"),
        ("seed = [-1]", r"A seed lies between 0 and 2147483647, got -1"),
        ("seed = []", r"names no seed"),
        ("dataset = []", r"names no dataset"),
        ("version = 0", r"version is a whole number from 1, got 0"),
        ('name = "A/B"', r"made of small letters, digits, '-' and '_', got 'A/B'"),
        ('name = "', r"cannot be read"),
        (b"\xff\xfe", r"cannot be read"),
    ],
)
def test_bad_boards_are_told_in_one_sentence(
    tmp_path: Path, text: str | bytes, sentence: str
) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(BadInput, match=sentence) as caught:
        read_board(write(tmp_path / "mine", text))
    assert "\n" not in str(caught.value)


def test_missing_boards_and_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="There is no board file"):
        read_board(tmp_path / "board.toml")
    with pytest.raises(BadInput, match=r"is a folder; name its board.toml"):
        read_board(tmp_path)


def test_the_null_methods_stand_in_every_board() -> None:
    board = Board(attack=("patch",), defense=("finetune",))
    assert [m.method_name for m in board.attacks()] == ["none", "patch"]
    assert [m.method_name for m in board.defenses()] == [*NULL_DEFENSES, "finetune"]


def test_duplicates_are_merged() -> None:
    board = board_from(
        {
            "seed": [1, 0, 1],
            "attack": ["patch", "none", "patch", "patch:size=3"],
            "defense": ["finetune", "retrain", "finetune"],
        },
        "here",
    )
    assert board.seed == (1, 0)
    specs = [spec_of(attack) for attack in board.attacks()]
    assert len(specs) == len(set(specs))
    assert [d.method_name for d in board.defenses()] == [*NULL_DEFENSES, "finetune"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attack": ("pacth",)}, r"There is no attack 'pacth'; did you mean 'patch'\?"),
        ({"defense": ("finetun",)}, r"There is no defense 'finetun'; did you mean 'finetune'\?"),
        ({"attack": ("patch:sise=3",)}, r"has no field 'sise'; did you mean 'size'\?"),
        ({"defense": ("none:x=3",)}, r"has no field 'x'; it has no fields"),
        ({"attack": ("patch:size",)}, r"is not field=value"),
        ({"measure": ("pdg",)}, r"There is no measure 'pdg'; did you mean 'pgd'\?"),
        ({"measure": ("pgd:esp=4",)}, r"measure 'pgd' has no field 'esp'; did you mean 'eps'\?"),
    ],
)
def test_method_names_are_checked_without_importing_them(
    change: dict[str, tuple[str, ...]], sentence: str
) -> None:
    check_names(Board())
    with pytest.raises(BadInput, match=sentence):
        check_names(Board(**change))  # type: ignore[arg-type]


def test_each_measure_is_asked_for_once() -> None:
    with pytest.raises(BadInput, match="asks for the measure 'pgd' more than once"):
        Board(measure=("pgd", "class_distance", "pgd:eps=4"))
    board = board_from({"measure": ["pgd", "pgd"]}, "here")
    assert [spec_of(measure) for measure in board.measures()] == [
        "pgd:eps=8,steps=20,step=none,images=1000"
    ]
    assert "measure" not in Board().definition(), "boards of old are written as they were"
