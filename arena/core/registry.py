"""Names to methods: discovery by folder and entry points, spec strings, validated fields.

A method is one file: its name is the file's name, its hyper-parameters are the fields of one
frozen dataclass. `catalogue` reads files without importing them (no torch), so that listing is
instant; `build` imports the one file that is asked for.

Code of strangers (entry points of other packages, files that are registered with `add_file`) is
imported by workers only. Everywhere else `build` gives a stand-in, made from what the file says:
its fields and its literal class attributes, and no code.

A spec string is `name` or `name:field=value,field=value`; a value that holds commas (the spec of
another method, say) is put in parentheses: `sdrm:base=(wanet:s=0.5,k=4),lam=0.3`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import logging
import re
import stat
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

log = logging.getLogger("arena")
T = TypeVar("T")

POWERS = {  # what a class can do, by the method that it has
    "poison": "poisons data",
    "train": "controls training",
    "repair": "repairs",
    "scan": "scans",
    "score": "detects",
}

_LARGEST_FILE = 2**20  # bytes; a card carries the whole of it
FILE_ROOM = "method_file_"  # the package that a registered file's module pretends to be in
READ_BY_REFEREE: dict[str, tuple[type, ...]] = {  # attributes, and what they may be
    "target": (int, type(None)),
    "victim": (int, type(None)),
    "mode": (str,),
    "keeps_labels": (bool,),
    "labels": (str,),
    "threat": (str,),
    "needs_share": (float, int),
}
_UNCOUNTED = {"arena.core.registry", "arena.core.progress"}  # they compute no result, see code_hash
_FIELD_TYPES: dict[str, Any] = {
    "int": int, "float": float, "str": str, "bool": bool, "None": type(None),
}  # fmt: skip
_strangers: dict[str, Path] = {}  # modules that are never imported here -> their files
_importing: ContextVar[bool] = ContextVar("strangers are imported", default=False)

_SETTINGS: dict[str, tuple[type, ...]] = {  # of `param`, and the literals that they may be
    **dict.fromkeys(("low", "high", "above"), (int, float)),
    **dict.fromkeys(("doc", "spec", "source"), (str,)),
    **dict.fromkeys(("path", "folder"), (bool,)),
    "choices": (tuple,),
    "under": (dict,),
}
_FIELD_NAME = r"[A-Za-z][A-Za-z0-9_]{0,39}"
_TAKEN = {*POWERS, "check", "prepare", "method_name"}  # what a class has beside its fields
_SHORTER = {"smoke": ("smoke", "fast"), "fast": ("fast",)}  # whose values hold, the nearest first


class BadInput(ValueError):
    """What the user gave cannot be used; the message is one sentence with the mend in it."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or the choices where none is near."""
    options = sorted(choices)
    if near := difflib.get_close_matches(word, options, n=1, cutoff=0.5):
        return f"did you mean {near[0]!r}?"
    return f"choose from {', '.join(options)}" if options else "there is nothing to choose from"


def param(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[Any, ...] | None = None,
    above: float | None = None,
    path: bool = False,
    folder: bool = False,
    spec: str = "",
    under: Mapping[str, Any] | None = None,
    source: str = "",
) -> Any:
    """A hyper-parameter: its default, what it means with its unit, and its range.

    low, high: inclusive bounds; above: exclusive lower bound; path, folder: the value names a file
    or a folder, whose content counts as part of the setting; spec: the value is the spec of another
    method of that kind ("attack"), which counts with all its fields and its code; under: values in
    the default's place under a recipe that shortens the method ("fast", "smoke").
    """
    metadata = {
        "doc": doc,
        "low": low,
        "high": high,
        "above": above,
        "choices": choices,
        "path": path,
        "folder": folder,
        "spec": spec,
        "under": dict(under or {}),
        "source": source,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Field:
    """A hyper-parameter as listed."""

    name: str
    type: str
    default: Any
    doc: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[Any, ...] | None = None
    path: bool = False
    folder: bool = False
    spec: str = ""
    under: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""

    @property
    def range(self) -> str:
        if self.choices:
            return " | ".join(map(show_value, self.choices))
        left = (
            f"({self.above:g}"
            if self.above is not None
            else f"[{self.low:g}"
            if self.low is not None
            else "("
        )
        right = f"{self.high:g}]" if self.high is not None else ")"
        return "" if (left, right) == ("(", ")") else f"{left}, {right}"


@dataclass(frozen=True)
class Method:
    """A method as listed, read from its file without importing it."""

    name: str
    kind: str  # attack or defense
    module: str
    path: str
    doc: str
    fields: tuple[Field, ...]
    powers: tuple[str, ...]
    traits: Mapping[str, Any]  # plain class attributes: null, scope, labels, dynamic …

    @property
    def summary(self) -> str:
        return self.doc.strip().split("\n\n")[0].replace("\n", " ")

    @property
    def source(self) -> str:
        return _section(self.doc, "Source:")

    @property
    def departs(self) -> str:
        return _section(self.doc, "Departs:")


def _section(doc: str, head: str) -> str:
    lines = doc.splitlines()
    for start, line in enumerate(lines):
        if line.strip().startswith(head):
            found = [line.strip().removeprefix(head).strip()]
            for more in lines[start + 1 :]:
                if not more.strip() or not more.startswith((" ", "\t")):
                    break
                found.append(more.strip())
            return " ".join(found)
    return ""


# ------------------------------------------------------------------------------------- registering


@dataclass_transform(frozen_default=True, field_specifiers=(param,))
def method(cls: type[T]) -> type[T]:
    """Make a class a method: a frozen dataclass whose fields are checked when it is built."""
    own_check = cls.__dict__.get("__post_init__")

    def check(self: Any) -> None:
        validate(self)
        if own_check is not None:
            own_check(self)

    cls.__post_init__ = check  # type: ignore[attr-defined]
    made = dataclass(frozen=True)(cls)
    made.method_name = made.__module__.rpartition(".")[2]  # type: ignore[attr-defined]
    return made


def validate(instance: Any) -> None:
    """Raise BadInput unless every field has the declared type and lies in its range."""
    name = type(instance).__module__.rpartition(".")[2]
    hints = typing.get_type_hints(type(instance))
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        where = f"{name}: {field.name}"
        if not _is(value, hints[field.name]):
            raise BadInput(
                f"{where} must be {_type_name(hints[field.name])}, got {show_value(value)!r}."
            )
        rule = field.metadata
        if value is None or not rule:
            continue
        if rule["choices"] and value not in rule["choices"]:
            hint = nearest(str(value), map(show_value, rule["choices"]))
            raise BadInput(f"{where} cannot be {show_value(value)!r}; {hint}.")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low, high, above = rule["low"], rule["high"], rule["above"]
            if not (abs(value) < float("inf")):
                raise BadInput(f"{where} must be finite, got {value}.")
            if low is not None and value < low:
                raise BadInput(f"{where} must be at least {low:g}, got {value:g}.")
            if above is not None and value <= above:
                raise BadInput(f"{where} must be above {above:g}, got {value:g}.")
            if high is not None and value > high:
                raise BadInput(f"{where} must be at most {high:g}, got {value:g}.")
        if rule["path"] and value and not Path(value).expanduser().is_file():
            raise BadInput(f"{where}: there is no file {value!r}.")
        if rule["folder"] and value and not Path(value).expanduser().is_dir():
            raise BadInput(f"{where}: there is no folder {value!r}.")
        if rule["spec"] and value:
            registry_of(rule["spec"]).build(value)


def _is(value: Any, hint: Any) -> bool:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        kind = type(None) if option is None else option
        if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return True
        if kind is int and isinstance(value, bool):
            continue
        if isinstance(value, kind):
            return True
    return False


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    return " or ".join("none" if o in (None, type(None)) else names.get(o, str(o)) for o in options)


# ----------------------------------------------------------------------------------- spec strings


def split_spec(text: str) -> tuple[str, dict[str, str]]:
    """`name:field=value,…` -> name and the fields as text. Raises BadInput on bad grammar."""
    name, colon, rest = text.strip().partition(":")
    if not name or (colon and not rest):
        raise BadInput(f"{text!r} is not a spec; write name or name:field=value,field=value.")
    values: dict[str, str] = {}
    for part in _split_commas(rest, text) if rest else ():
        key, equals, value = part.partition("=")
        key, value = key.strip(), value.strip()
        if not equals or not key or not value:
            raise BadInput(f"{part!r} in {text!r} is not field=value.")
        if key in values:
            raise BadInput(f"{text!r} sets {key} twice.")
        if value.startswith("(") and value.endswith(")"):
            value = value[1:-1]
        values[key] = value
    return name.strip(), values


def _split_commas(rest: str, text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            parts.append(rest[start:at])
            start = at + 1
    if depth:
        raise BadInput(f"the parentheses in {text!r} do not match.")
    return [*parts, rest[start:]]


def show_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    text = str(value)
    plain = text and text == text.strip() and not set(text) & set(",=()")
    return text if plain else f"({text})"


def _parse_value(text: str, hint: Any, where: str) -> Any:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    if text.lower() in ("none", "null") and (type(None) in options or None in options):
        return None
    for option in options:
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        if option is str:
            return text
    raise BadInput(f"{where} must be {_type_name(hint)}, got {text!r}.")


def spec_of(instance: Any) -> str:
    """The full spec: every field spelt out, so that a changed default is a new row."""
    return _spec(instance, everything=True)


def short_spec(instance: Any) -> str:
    """The spec for people: only the fields that differ from their defaults."""
    return _spec(instance, everything=False)


def _spec(instance: Any, *, everything: bool) -> str:
    pairs = []
    for field in dataclasses.fields(instance):
        value: Any = getattr(instance, field.name)
        default: Any = field.default
        if kind := field.metadata.get("spec", ""):
            value, default = (
                v and _spec(registry_of(kind).build(v), everything=everything)
                for v in (value, default)
            )
        if everything or value != default:
            pairs.append(f"{field.name}={show_value(value)}")
    name = str(instance.method_name)
    return f"{name}:{','.join(pairs)}" if pairs else name


# ---------------------------------------------------------------------------------------- catalogue


class Registry:
    """The methods of one kind: files of a package folder, and entry points of other packages."""

    def __init__(self, kind: str, package: str, group: str) -> None:
        self.kind, self.package, self.group = kind, package, group
        self._added: dict[str, tuple[str, Path]] = {}

    @cache  # noqa: B019 - two registries live as long as the program
    def _files(self) -> dict[str, tuple[str, Path]]:
        """name -> (module, file); nothing is imported. A package that cannot be used is told of
        once and left out: it takes nothing away from the others."""
        folder = Path(__file__).parents[1] / self.package.rpartition(".")[2]
        found = {
            path.stem: (f"{self.package}.{path.stem}", path)
            for path in sorted(folder.glob("*.py"))
            if not path.stem.startswith("_")
        }
        for point in _points(self.group):
            name = point.module.rpartition(".")[2]
            try:
                path = _origin(point.module)
                if path is None:
                    raise BadInput("its file cannot be found")
                if name in found:
                    raise BadInput(f"there is another {self.kind} of that name")
                _stand_in(_read(name, self.kind, point.module, path))
            except Exception as error:  # whatever is wrong with somebody's file
                distribution = getattr(point, "dist", None)
                package = "" if distribution is None else f" (package {distribution.name})"
                log.warning(
                    "The %s %r of %s%s is left out: %s.",
                    self.kind,
                    name,
                    point.module,
                    package,
                    (str(error) or type(error).__name__).rstrip("."),
                )
                continue
            found[name] = (point.module, path)
            _strangers[point.module] = path
        return found

    def add_file(self, path: Path) -> Method:
        """Make a file outside the package a method under its own name; nothing is imported.

        Raises BadInput where it is no method, or has the name of one of the arena's.
        """
        name, content = path.stem, read_method_file(path)
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
            raise BadInput(
                f"{name!r} is no name for a method: a small letter, then small letters, digits "
                "and '_', 40 at most."
            )
        if (known := self._files().get(name)) and known[0].startswith(f"{self.package}."):
            raise BadInput(f"{self.kind} {name!r} is one of the arena's; name the file otherwise.")
        module = f"{FILE_ROOM}{hashlib.sha256(content).hexdigest()[:16]}.{name}"
        described = _read(name, self.kind, module, path)
        try:
            _stand_in(described)()  # its defaults lie in their ranges
        except BadInput:
            raise
        except Exception as error:  # literals that are no settings of a field: choices=3
            raise BadInput(f"{name}: its fields cannot be read ({error}); see `param`.") from error
        _strangers[module] = path
        self._added[name] = (module, path)
        return described

    def is_strange(self, name: str) -> bool:
        """Whether the method's code is somebody else's."""
        return not self._locate(name)[0].startswith(f"{self.package}.")

    def names(self) -> list[str]:
        return list(self._files() | self._added)

    def describe(self, name: str) -> Method:
        """Read a method's file: docstring, fields, powers. Raises BadInput for unknown names."""
        module, path = self._locate(name)
        return _read(name, self.kind, module, path)

    def describe_all(self) -> list[Method]:
        return [self.describe(name) for name in self.names()]

    def load(self, name: str) -> type[Any]:
        """Import the method's file and return its class."""
        module_name, path = self._locate(name)
        if module_name.startswith(FILE_ROOM):
            module = _imported(module_name, path)
        else:
            module = importlib.import_module(module_name)
        found = [
            value
            for value in vars(module).values()
            if isinstance(value, type)
            and value.__module__ == module.__name__
            and "method_name" in vars(value)
        ]
        if len(found) != 1:
            raise BadInput(f"{module_name} must hold exactly one @method class, has {len(found)}.")
        return found[0]

    def build(self, text: str, recipe: str = "paper") -> Any:
        """An instance from a spec string. Raises BadInput with the nearest valid choice.

        recipe: a training recipe's name or spec; what the method shortens under it is in the
        default's place for fields that the spec does not name.
        """
        name, values = split_spec(text)
        described = self.describe(name)
        strange = self.is_strange(name) and not _importing.get()
        cls = _stand_in(described) if strange else self.load(name)
        hints = typing.get_type_hints(cls)
        known = [field.name for field in described.fields]
        for key in values:
            if key not in known:
                hint = nearest(key, known) if known else "it has no fields"
                raise BadInput(f"{self.kind} {name!r} has no field {key!r}; {hint}.")
        parsed = {
            key: _parse_value(value, hints[key], f"{name}: {key}") for key, value in values.items()
        }
        return cls(**{**_shortened(described.fields, recipe), **parsed})

    def _locate(self, name: str) -> tuple[str, Path]:
        files = self._files() | self._added
        if name not in files:
            raise BadInput(f"There is no {self.kind} {name!r}; {nearest(name, files)}.")
        return files[name]


def _shortened(fields: Iterable[Field], recipe: str) -> dict[str, Any]:
    """The values that fields have under a recipe in their defaults' place."""
    ways = _SHORTER.get(split_spec(recipe)[0], ())
    found = ((f.name, [f.under[way] for way in ways if way in f.under]) for f in fields)
    return {name: values[0] for name, values in found if values}


attacks = Registry("attack", "arena.attacks", "arena.attacks")
defenses = Registry("defense", "arena.defenses", "arena.defenses")


def registry_of(kind: str) -> Registry:
    return {"attack": attacks, "defense": defenses}[kind]


# ---------------------------------------------------------------------------------------- strangers


@contextmanager
def strangers_imported() -> Iterator[None]:
    """Inside, strangers' code is imported: in workers, and where a user runs methods himself."""
    before = _importing.set(True)
    try:
        yield
    finally:
        _importing.reset(before)


def import_strangers() -> None:
    """From now on, for the rest of this process."""
    _importing.set(True)


def files_of(instance: Any) -> list[str]:
    """The registered files that a worker needs to build `instance` and what it wraps."""
    module = type(instance).__module__
    found = [str(_strangers[module])] if module.startswith(FILE_ROOM) else []
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if (kind := field.metadata.get("spec")) and value:
            found += files_of(registry_of(kind).build(value))
    return found


def stranger_of(instance: Any) -> Path | None:
    """The file of a method that is not the arena's own; None for the arena's."""
    return _strangers.get(type(instance).__module__)


def add_files(paths: Iterable[str]) -> None:
    """Register each file with the kind of method that it holds. Raises BadInput."""
    for path in map(Path, paths):
        registry_of(kind_of(path)).add_file(path)


def kind_of(path: Path) -> str:
    """attack or defense, by what the class in the file can do. Raises BadInput."""
    powers = _read(path.stem, "", f"{FILE_ROOM}.{path.stem}", path, read_method_file(path)).powers
    return "attack" if {POWERS["poison"], POWERS["train"]} & set(powers) else "defense"


def read_method_file(path: Path) -> bytes:
    """The content of a method's file. Raises BadInput."""
    if path.suffix != ".py":
        raise BadInput(f"{str(path)!r} is no method: a Python file (.py) is wanted.")
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # reading a pipe would wait for ever
            raise BadInput(f"{str(path)!r} is no file that can be read; name the method's own.")
        if about.st_size > _LARGEST_FILE:
            raise BadInput(f"{str(path)!r} is larger than a method's file may be (1 MB).")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadInput(f"There is no file {str(path)!r}.") from error
    except OSError as error:
        raise BadInput(f"{str(path)!r} cannot be read ({error.strerror}).") from error


def _points(group: str) -> list[Any]:
    try:
        return list(entry_points(group=group))
    except Exception as error:  # a damaged installation of whatever package
        log.warning("No packages are asked for %s: %s.", group, error)
        return []


def _origin(module: str) -> Path | None:
    """A module's file; no package on the way to it is imported, as `find_spec` would."""
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or ():
        if (path := Path(folder, *rest).with_suffix(".py")).is_file():
            return path
    return None


def _imported(module: str, path: Path) -> types.ModuleType:
    """A registered file as a module."""
    if module in sys.modules:
        return sys.modules[module]
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[module] = made  # dataclasses look their own module up
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[module]
        raise
    return made


_stand_ins: dict[tuple[str, str], type[Any]] = {}  # equal instances need one class


def _stand_in(described: Method) -> type[Any]:
    """A class with the method's fields and traits and none of its code. Raises BadInput."""
    if (known := _stand_ins.get((described.module, described.path))) is not None:
        return known
    fields = []
    for each in described.fields:
        settings = {
            name: getattr(each, name)
            for name in ("low", "high", "above", "choices", "path", "folder", "spec", "under")
        }
        hint = _field_type(each.type, f"{described.name}: {each.name}")
        if (each.path or each.folder) and (each.default is not None or each.under):
            raise BadInput(  # a worker is shown what these name: only who runs it says what
                f"{described.name}: {each.name} names a file, so its default must be None."
            )
        fields.append((each.name, hint, param(each.default, each.doc, **settings)))
    powers = {
        name: _only_in_workers(described.name)
        for name, power in POWERS.items()
        if power in described.powers
    }
    traits = {name: value for name, value in described.traits.items() if name in READ_BY_REFEREE}
    for name, value in {**traits, **{each.name: each.default for each in described.fields}}.items():
        _check_attribute(described.name, name, value)
    own: dict[str, Any] = {**traits, **powers, "__post_init__": validate}
    if described.kind == "attack":
        own |= {"check": _check_classes, "prepare": _only_in_workers(described.name)}
    made = dataclasses.make_dataclass(described.name, fields, namespace=own, frozen=True)
    made.__module__ = described.module
    made.method_name = described.name  # type: ignore[attr-defined]
    _stand_ins[described.module, described.path] = made
    return made


def _field_type(text: str, where: str) -> Any:
    words = [word.strip() for word in text.split("|")]
    if not all(word in _FIELD_TYPES for word in words) or set(words) == {"None"}:
        raise BadInput(
            f"{where} is annotated {text!r}; fields are int, float, str or bool, or one of these "
            "or None (int | None)."
        )
    kinds = [_FIELD_TYPES[word] for word in words]
    return typing.Union[tuple(kinds)] if len(kinds) > 1 else kinds[0]  # noqa: UP007


def _only_in_workers(name: str) -> Any:
    def refuse(self: Any, *_: Any) -> Any:
        raise BadInput(f"{name} is not the arena's own: it runs in a process of its own only.")

    return refuse


def _check_classes(self: Any, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
    from arena.core.poisoning import check_classes

    for role in ("target", "victim"):
        if (getattr(self, role, None) or 0) < 0:
            raise BadInput(f"{self.method_name}: {role} {getattr(self, role)} is not a class.")
    check_classes(self, counts)


def _check_attribute(method: str, name: str, value: Any) -> None:
    """Raise BadInput where the referee would read something that it cannot use."""
    if (kinds := READ_BY_REFEREE.get(name)) is None:
        return
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        told = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise BadInput(
            f"{method}: {name} is read by the referee and must be {told}, not {value!r}."
        )
    share: Any = value if name == "needs_share" else 0
    if not 0 <= share <= 1:
        raise BadInput(f"{method}: needs_share is a share, from 0 to 1, not {value}.")


@cache
def _read(name: str, kind: str, module: str, path: Path, content: bytes | None = None) -> Method:
    try:
        tree = ast.parse(path.read_bytes() if content is None else content)
        if not module.startswith("arena."):
            ast.unparse(tree)  # what parses may yet be too deep to be written, as hashes need it
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line, told = "", str(error) or "too deep"
        if isinstance(error, SyntaxError):
            line, told = (f", line {error.lineno}" if error.lineno else ""), error.msg
        raise BadInput(f"{path.name} is no Python{line}: {told.rstrip('.')}.") from error
    doc = ast.get_docstring(tree) or ""
    if not _is_text(doc):
        raise BadInput(f"{path.name}: its docstring has half a character (a lone surrogate).")
    marked = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(mark).rpartition(".")[2] == "method" for mark in node.decorator_list)
    ]
    if not marked:
        raise BadInput(f"{path.name} holds no class marked @method.")
    if len(marked) > 1:
        raise BadInput(f"{path.name} holds {len(marked)} classes marked @method; one is wanted.")
    [node] = marked
    fields: list[Field] = []
    traits: dict[str, Any] = {}
    powers: list[str] = []
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            if ast.unparse(item.annotation).startswith("ClassVar"):
                traits[item.target.id] = (
                    _literal(item.value, f"{name}: {item.target.id}") if item.value else None
                )
            elif item.target.id in {field.name for field in fields}:
                raise BadInput(f"{name}: the field {item.target.id} is there twice.")
            elif item.target.id in _TAKEN or not re.fullmatch(_FIELD_NAME, item.target.id):
                raise BadInput(f"{name}: a field cannot be called {item.target.id!r}.")
            elif item.value is not None:
                fields.append(_read_field(item.target.id, item.annotation, item.value, name))
            else:
                raise BadInput(f"{name}: {item.target.id} has no default; every field needs one.")
        elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            if (attribute := item.targets[0].id) in READ_BY_REFEREE:
                traits[attribute] = _literal(item.value, f"{name}: {attribute}")
        elif isinstance(item, ast.FunctionDef) and item.name in POWERS:
            powers.append(POWERS[item.name])
    return Method(name, kind, module, str(path), doc, tuple(fields), tuple(powers), traits)


def _read_field(name: str, annotation: ast.expr, value: ast.expr, of: str) -> Field:
    kind, where = ast.unparse(annotation), f"{of}: {name}"
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("param")):
        return Field(name, kind, _literal(value, where), "")
    known = {field.name for field in dataclasses.fields(Field)} - {"name", "type"}
    settings = {k.arg: _literal(k.value, where) for k in value.keywords if k.arg}
    given = [_literal(argument, where) for argument in value.args]
    settings = {**dict(zip(("default", "doc"), given, strict=False)), **settings}
    if len(given) > 2 or set(settings) - known or not {"default", "doc"} <= set(settings):
        raise BadInput(f"{where} is not param(default, doc, low=…, high=…), see `param`.")
    if wrong := [key for key, kinds in _SETTINGS.items() if not _fits(settings.get(key), kinds)]:
        raise BadInput(f"{where} has a setting that `param` does not take, {wrong[0]}.")
    settings["under"] = settings.get("under") or {}
    if not set(settings["under"]) <= set(_SHORTER):
        raise BadInput(f"{where}: under is by recipe, {' or '.join(map(repr, _SHORTER))}.")
    return Field(name, kind, **settings)


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    return value is None or type(value) in kinds


def _literal(value: ast.expr, where: str) -> Any:
    """The value that stands there, without running anything. Raises BadInput."""
    try:
        found = ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadInput(
            f"{where} must be given as a literal (0.1, 3, 'word', None), not "
            f"{ast.unparse(value)[:60]!r}: it is read without running the file."
        ) from error
    if not _is_text(found):
        raise BadInput(f"{where} has half a character (a lone surrogate), which no file can hold.")
    return found


def _is_text(value: Any) -> bool:
    """Whether all words in a literal can be written to a file."""
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value)
    if isinstance(value, dict):
        return all(_is_text(each) for pair in value.items() for each in pair)
    return not isinstance(value, list | tuple | set) or all(map(_is_text, value))


# ------------------------------------------------------------------------------------------ code


@cache
def code_hash(*modules: str) -> str:
    """sha256 (hex) over the code of `modules` and all of the arena that they import, transitively.

    Comments, docstrings and layout do not count: only what is executed makes old results stale.
    Nor do this module and `progress`: what a spec means stands in the key with every field's value.
    """
    seen: dict[str, str] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        if name in seen or name in _UNCOUNTED:
            continue
        path = _file_of(name)
        if path is None:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        seen[name] = ast.unparse(_without_docstrings(tree))
        todo += _arena_imports(tree)
        if name in _strangers and "." in name and not name.startswith(FILE_ROOM):
            for part, text in _package_code(name, path).items():
                seen[part] = text  # whatever of its own package it may import
    body = "\n".join(f"{name} {seen[name]}" for name in sorted(seen))
    return hashlib.sha256(body.encode()).hexdigest()


def _package_code(module: str, path: Path) -> dict[str, str]:
    """All Python files of the package that a stranger's method lies in."""
    root = path.parents[module.count(".") - 1]
    return {
        str(file.relative_to(root.parent)): file.read_text(encoding="utf-8", errors="replace")
        for file in sorted(root.rglob("*.py"))
    }


def _file_of(module: str) -> Path | None:
    if module in _strangers:
        return _strangers[module]
    loaded = sys.modules.get(module)
    origin = getattr(loaded, "__file__", None)
    if origin is None:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            return None
        origin = spec.origin if spec else None
    return Path(origin) if origin and origin.endswith(".py") else None


def _arena_imports(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("arena"):
            found.append(str(node.module))
            found += [f"{node.module}.{alias.name}" for alias in node.names]  # may be a module
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("arena")]
    return found


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return tree
