"""Boards: a named, versioned matrix, from board.toml or from the flags of `arena run`.

A board's keys and the flags are the same words:

    name = "quickstart"
    version = 1
    dataset = ["signs"]
    model = ["fastnet"]
    attack = ["patch", "blend"]
    defense = ["finetune", "fine_pruning"]
    seed = [0, 1, 2]
    recipe = "fast"
    clean_share = 0.05
    measure = ["class_distance:pairs=sample:20", "pgd"]  # `arena list measures`; none by default

    [[published]]        # as often as wanted: what a paper reports, shown beside what was measured
    attack = "patch"     # as in the list above
    asr = 99.0           # percent; acc and, for attack "none", gain (in class distance) likewise
    source = "paper, table, network"
    defense = "finetune" # what is told of a repair by it; without, of the victim

    [held_back]          # a part that only the maintainer can run, `arena submit run --secret`
    commitment = "…"     # sha256 of the file with the secret
    draws = ["seed", "target", "trigger"]
    choices = { patch = { size = [2, 3, 4] } }  # of `trigger`: what is drawn, by attack and field

The clean twin (attack `none`) and the null defenses (`none`, `retrain`, `random_prune`) stand in
every board, whether named or not. What a board measures is no part of a cell's key: a measure that
is added later is made up for, and nothing is repaired again.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from arena.core.measures import measures
from arena.core.registry import BadInput, Registry, attacks, defenses, nearest, split_spec

_OPTIONAL = ("measure", "memory", "held_back", "verifiers")
NULL_DEFENSES = ("none", "retrain", "random_prune")
HELD_BACK = ("seed", "target", "trigger")
RECIPE_NAMES = ("smoke", "fast", "paper")
MOST_CELLS = 50_000  # of one board: planning more than that takes minutes


@dataclass(frozen=True)
class Published:
    """What a paper reports about a victim, or about one that a defense repaired, in its setting."""

    attack: str  # a spec of the board's list
    source: str  # paper, table, network
    defense: str = ""  # another one; empty: before any defense
    acc: float | None = None  # percent
    asr: float | None = None  # percent
    gain: float | None = None  # in class distance, percent; of the attack "none" alone


@dataclass(frozen=True)
class HeldBack:
    """What of a board is drawn from a secret that its maintainer keeps."""

    commitment: str  # sha256 (hex) of the secret
    draws: tuple[str, ...]  # of HELD_BACK
    choices: tuple[tuple[str, str, tuple[Any, ...]], ...] = ()  # attack, field, values

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.commitment):
            raise BadInput(
                "held_back: commitment is the sha256 of the secret, 64 hexadecimal digits, got "
                f"{self.commitment!r}."
            )
        if not self.draws:
            raise BadInput(f"held_back: draws names nothing; choose from {', '.join(HELD_BACK)}.")
        for word in self.draws:
            if word not in HELD_BACK:
                raise BadInput(f"held_back cannot draw {word!r}; {nearest(word, HELD_BACK)}.")
        if self.choices and "trigger" not in self.draws:
            raise BadInput('held_back: choices need "trigger" among its draws.')


@dataclass(frozen=True)
class Board:
    """What is run: every combination of the lists."""

    name: str = "adhoc"
    version: int = 1
    title: str = ""
    dataset: tuple[str, ...] = ("signs",)
    model: tuple[str, ...] = ("fastnet",)
    attack: tuple[str, ...] = ("patch", "blend")
    defense: tuple[str, ...] = ("finetune", "fine_pruning")
    seed: tuple[int, ...] = (0,)
    recipe: str = "fast"  # or with fields of its own: fast:epochs=20
    clean_share: float = 0.05  # the defender's clean images, as a share of the training set
    timeout: float | None = None  # seconds that one method may take; None: as long as it wants
    measure: tuple[str, ...] = ()  # beside answers, of every victim and repaired model
    published: tuple[Published, ...] = ()
    memory: float | None = None  # GB that one method may take; None: as for any run
    held_back: HeldBack | None = None
    verifiers: tuple[str, ...] = ()  # public keys (hex) whose verifications let entries in

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", self.name):
            raise BadInput(
                f"A board's name is made of small letters, digits, '-' and '_', got {self.name!r}."
            )
        if self.version < 1:
            raise BadInput(f"A board's version is a whole number from 1, got {self.version}.")
        for key in ("dataset", "model", "attack", "defense", "seed"):
            if not getattr(self, key):
                raise BadInput(f"The board {self.name!r} names no {key}.")
        check_recipe(split_spec(self.recipe)[0])
        if not 0 < self.clean_share <= 1:
            raise BadInput(f"clean_share must lie in (0, 1], got {self.clean_share:g}.")
        if self.timeout is not None and not self.timeout > 0:
            raise BadInput(f"timeout must be above 0 seconds, got {self.timeout:g}.")
        if self.memory is not None and not self.memory > 0:
            raise BadInput(f"memory must be above 0 GB, got {self.memory:g}.")
        for key in self.verifiers:
            if not re.fullmatch(r"[0-9a-f]{64}", key):
                raise BadInput(f"A verifier is a public key of 64 hexadecimal digits, got {key!r}.")
        names = [split_spec(text)[0] for text in self.measure]
        for name in names:
            if names.count(name) > 1:
                raise BadInput(
                    f"The board {self.name!r} asks for the measure {name!r} more than once; its "
                    "columns hold one, so name it once or make two boards."
                )
        for figure in self.published:
            if figure.attack not in self.attack:
                raise BadInput(
                    f"The board {self.name!r} has published figures for {figure.attack!r}, which "
                    f"is not among its attacks; {nearest(figure.attack, self.attack)}."
                )
            if figure.defense and figure.defense not in self.defense:
                raise BadInput(
                    f"The board {self.name!r} has published figures for {figure.defense!r}, which "
                    f"is not among its defenses; {nearest(figure.defense, self.defense)}."
                )
        for seed in self.seed:
            if not 0 <= seed < 2**31:
                raise BadInput(f"A seed lies between 0 and 2147483647, got {seed}.")
        lists = (self.dataset, self.model, self.seed, ("none", *self.attack))
        cells = math.prod(map(len, (*lists, (*NULL_DEFENSES, *self.defense))))
        if cells > MOST_CELLS:
            raise BadInput(
                f"The board {self.name!r} is a matrix of {cells} cells; split it into boards of at "
                f"most {MOST_CELLS}."
            )

    def definition(self) -> dict[str, Any]:
        """The board as JSON, without its name, and without what it does not ask for."""
        found = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name != "name" and (name not in _OPTIONAL or value)
        }
        for figure in found.get("published", ()):
            if not figure["defense"]:
                del figure["defense"]
        return found

    def attacks(self) -> list[Any]:
        """The attacks as instances, the clean twin first. Raises BadInput."""
        return _built(attacks, ("none", *self.attack), self.recipe)

    def defenses(self) -> list[Any]:
        """The defenses as instances, the null methods first. Raises BadInput."""
        return _built(defenses, (*NULL_DEFENSES, *self.defense), self.recipe)

    def measures(self) -> list[Any]:
        """The measures as instances, as they were named. Raises BadInput."""
        return _built(measures, self.measure, self.recipe)


def check_recipe(name: str) -> None:
    """Raise BadInput with the nearest name unless there is such a recipe."""
    if name not in RECIPE_NAMES:
        raise BadInput(f"There is no recipe {name!r}; {nearest(name, RECIPE_NAMES)}.")


def _built(registry: Registry, specs: tuple[str, ...], recipe: str) -> list[Any]:
    made: list[Any] = []
    for text in specs:
        instance = registry.build(text, recipe)
        if instance not in made:
            made.append(instance)
    return made


def check_names(board: Board) -> None:
    """Check method names and field names without importing any method (fast, no torch)."""
    asked = ((attacks, board.attack), (defenses, board.defense), (measures, board.measure))
    for registry, specs in asked:
        for text in specs:
            name, values = split_spec(text)
            described = registry.describe(name)
            if registry is defenses and "repairs" not in described.powers:
                raise BadInput(
                    f"{name} {' and '.join(described.powers)} but repairs nothing; a board's "
                    "defenses repair models."
                )
            known = [field.name for field in described.fields]
            for key in values:
                if key not in known:
                    hint = nearest(key, known) if known else "it has no fields"
                    raise BadInput(f"{registry.kind} {name!r} has no field {key!r}; {hint}.")


def read_board(path: Path | str) -> Board:
    """A board from a TOML file. Raises BadInput with the culprit and the nearest valid choice."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"There is no board file {str(path)!r}.") from error
    except IsADirectoryError as error:
        raise BadInput(f"{str(path)!r} is a folder; name its board.toml.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise BadInput(f"The board {str(path)!r} cannot be read: {error}.") from error
    return board_from(raw, str(path), default_name=path.resolve().parent.name)


def folder_of(name: str, boards: Path) -> Path:
    """The folder of that board under `boards`, which holds its board.toml. Raises BadInput."""
    known = sorted(p.parent.name for p in boards.glob("*/board.toml"))
    if name not in known:
        raise BadInput(
            f"There is no board {name!r} in {str(boards)!r}; {nearest(name, known)}."
            if known
            else f"There is no board {name!r}: no folder of {str(boards)!r} has a board.toml."
        )
    return boards / name


def board_from(raw: Mapping[str, Any], where: str, default_name: str = "adhoc") -> Board:
    """A Board from loosely typed keys; one word may stand for a list of one."""
    known = {f.name: f for f in fields(Board)}
    values: dict[str, Any] = {"name": default_name}
    for key, value in raw.items():
        if key not in known:
            raise BadInput(f"{where}: there is no key {key!r}; {nearest(key, known)}.")
        if key == "published":
            values[key] = _published(value, where)
        elif key == "held_back":
            values[key] = _held_back(value, where)
        else:
            values[key] = _typed(key, value, str(known[key].type), where)
    return Board(**values)


def _published(value: Any, where: str) -> tuple[Published, ...]:
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise BadInput(f"{where}: published figures are written as tables, [[published]].")
    known = {f.name: str(f.type) for f in fields(Published)}
    found = []
    for each in value:
        for key in each:
            if key not in known:
                raise BadInput(
                    f"{where}: published figures have no key {key!r}; {nearest(key, known)}."
                )
        for key in ("attack", "source"):
            if key not in each:
                raise BadInput(f"{where}: published figures need the key {key!r}.")
        given = {key: value for key, value in each.items() if value is not None}
        figure = {key: _typed(key, value, known[key], where) for key, value in given.items()}
        for key in ("acc", "asr"):
            if not 0 <= figure.get(key, 0) <= 100:
                raise BadInput(f"{where}: {key} is a percentage, got {figure[key]:g}.")
        if "gain" in figure and (figure["attack"] != "none" or not figure.get("defense")):
            raise BadInput(
                f'{where}: a published gain is that of a defense with attack = "none", the clean '
                "twin's."
            )
        found.append(Published(**figure))
    return tuple(found)


def _held_back(value: Any, where: str) -> HeldBack:
    known = tuple(f.name for f in fields(HeldBack))
    if not isinstance(value, Mapping):
        raise BadInput(f"{where}: what is held back is written as a table, [held_back].")
    for key in value:
        if key not in known:
            raise BadInput(f"{where}: held_back has no key {key!r}; {nearest(key, known)}.")
    drawn = []
    choices = value.get("choices", {})
    if not isinstance(choices, Mapping):
        raise BadInput(f"{where}: choices are written as {{ attack = {{ field = [values] }} }}.")
    for attack, by_field in choices.items():
        if not isinstance(by_field, Mapping):
            raise BadInput(f"{where}: choices of {attack} are written as {{ field = [values] }}.")
        for field, values in by_field.items():
            plain = isinstance(values, list) and all(
                isinstance(each, str | int | float) for each in values
            )
            if not plain or not values:
                raise BadInput(f"{where}: choices of {attack}: {field} must be a list of values.")
            drawn.append((attack, field, tuple(values)))
    return HeldBack(
        _typed("commitment", value.get("commitment", ""), "str", where),
        _typed("draws", value.get("draws", []), "tuple[str, ...]", where),
        tuple(drawn),
    )


def _typed(key: str, value: Any, kind: str, where: str) -> Any:
    if kind.startswith("tuple"):
        of = int if "int" in kind else str
        items = value if isinstance(value, list) else [value]
        for item in items:
            if not isinstance(item, of) or isinstance(item, bool):
                need = "whole numbers" if of is int else "words"
                raise BadInput(f"{where}: {key} must be a list of {need}, got {item!r}.")
        return tuple(dict.fromkeys(items))
    wanted: tuple[type, ...] = {
        "str": (str,),
        "int": (int,),
        "float": (int, float),
        "float | None": (int, float),
    }[kind]
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise BadInput(f"{where}: {key} must be {_words(wanted)}, got {value!r}.")
    return value


def _words(kinds: tuple[type, ...]) -> str:
    return {str: "a word", int: "a whole number"}[kinds[0]] if len(kinds) == 1 else "a number"


QUICKSTART = Board(
    name="quickstart",
    title="Backdoor Arena: quickstart on the embedded signs",
    dataset=("signs",),
    model=("fastnet_small",),
    attack=("patch", "blend"),
    # The rate decides what fine-tuning does to a backdoor, so it stands there twice.
    defense=("finetune", "finetune:lr=0.1", "fine_pruning"),
    seed=(0,),
    recipe="smoke",  # a few minutes on two cores without bf16, too
)
