"""Spec strings, validated fields, and the catalogue that is read without importing."""

import dataclasses
import subprocess
import sys
from functools import partial
from importlib.metadata import EntryPoint

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena.core import registry
from arena.core.registry import (
    BadInput,
    Registry,
    attacks,
    code_hash,
    method,
    nearest,
    param,
    short_spec,
    spec_of,
    split_spec,
)


@method
class Toy:
    share: float = param(0.5, "a share", above=0, high=1)
    count: int = param(3, "a number", low=1, high=9)
    word: str = param("red", "a colour", choices=("red", "green"))
    text: str = param("x", "any text")
    flag: bool = param(False, "a switch")
    maybe: int | None = param(None, "a number or none", low=0)
    file: str | None = param(None, "a file", path=True)


# ----------------------------------------------------------------------------------- spec strings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("patch", ("patch", {})),
        (" patch : size = 3 ", ("patch", {"size": "3"})),
        ("a:b=1,c=x", ("a", {"b": "1", "c": "x"})),
        (
            "sdrm:base=(wanet:s=0.5,k=4),lam=0.3",
            ("sdrm", {"base": "wanet:s=0.5,k=4", "lam": "0.3"}),
        ),
        ("a:b=(c:d=(e:f=1,g=2),h=3)", ("a", {"b": "c:d=(e:f=1,g=2),h=3"})),
        ("a:b=()", ("a", {"b": ""})),
    ],
)
def test_a_spec_splits_into_name_and_values(text, expected):
    assert split_spec(text) == expected


@pytest.mark.parametrize(
    "text", ["", ":a=1", "a:", "a:b", "a:b=", "a:=1", "a:b=1,,c=2", "a:b=1,b=2", "a:b=(1", "a:b=1)"]
)
def test_bad_grammar_is_refused(text):
    with pytest.raises(BadInput):
        split_spec(text)


def balanced(text):
    depth = 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            return False
    return depth == 0


@given(
    share=st.floats(0, 1, exclude_min=True),
    count=st.integers(1, 9),
    text=st.text(alphabet="ab,=() :.-/e1", max_size=12).filter(balanced),
    flag=st.booleans(),
    maybe=st.none() | st.integers(0, 10**12),
)
def test_a_spec_survives_the_round_trip(share, count, text, flag, maybe):
    toy = Toy(share=share, count=count, text=text, flag=flag, maybe=maybe)
    hints = {"share": float, "count": int, "word": str, "text": str, "flag": bool}
    hints |= {"maybe": int | None, "file": str | None}
    for spec in (spec_of(toy), short_spec(toy)):
        name, values = split_spec(spec)
        assert name == "test_registry"
        parsed = {
            key: registry._parse_value(value, hints[key], key) for key, value in values.items()
        }
        assert Toy(**parsed) == toy


def test_full_specs_spell_out_all_fields_and_short_ones_the_changes():
    toy = Toy(share=1, maybe=4)
    full = "test_registry:share=1,count=3,word=red,text=x,flag=false,maybe=4,file=none"
    assert spec_of(toy) == full
    assert spec_of(Toy(share=1.0, maybe=4)) == full
    assert short_spec(toy) == "test_registry:share=1,maybe=4"
    assert short_spec(Toy()) == "test_registry"


# --------------------------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": 0}, "share must be above 0, got 0"),
        ({"share": 1.01}, "share must be at most 1"),
        ({"share": float("nan")}, "must be finite"),
        ({"share": True}, "share must be a number"),
        ({"count": 0}, "count must be at least 1"),
        ({"count": 2.0}, "count must be a whole number"),
        ({"count": True}, "count must be a whole number"),
        ({"word": "gren"}, "word cannot be 'gren'; did you mean 'green'"),
        ({"word": "zzz"}, "choose from green, red"),
        ({"flag": 1}, "flag must be true or false"),
        ({"maybe": "4"}, "maybe must be a whole number or none"),
        ({"maybe": -1}, "maybe must be at least 0"),
        ({"file": "/no/such/file"}, "there is no file '/no/such/file'"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(fields, message):
    with pytest.raises(BadInput, match=message):
        Toy(**fields)


def test_values_at_the_bounds_pass(tmp_path):
    path = tmp_path / "file"
    path.touch()
    Toy(share=1, count=1, maybe=0, file=str(path))
    Toy(count=9)


def test_a_method_is_frozen_and_checks_itself_after_its_fields():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Toy().count = 4

    @method
    class Picky:
        low: int = param(1, "lower", low=0)
        high: int = param(2, "upper")

        def __post_init__(self):
            if self.low > self.high:
                raise BadInput("low is above high")

    assert Picky().method_name == "test_registry"
    with pytest.raises(BadInput, match="above high"):
        Picky(low=3)
    with pytest.raises(BadInput, match="at least 0"):
        Picky(low=-1, high=-2)


def test_near_names_are_offered():
    assert nearest("pach", ["patch", "blend"]) == "did you mean 'patch'?"
    assert nearest("xyz", ["patch", "blend"]) == "choose from blend, patch"
    assert nearest("xyz", []) == "there is nothing to choose from"


# ------------------------------------------------------------------------------------ catalogue


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pach", "no attack 'pach'; did you mean 'patch'"),
        ("patch:sise=3", "no field 'sise'; did you mean 'size'"),
        ("none:size=3", "no field 'size'; it has no fields"),
        ("patch:margin=two", "margin must be a whole number, got 'two'"),
        ("patch:extend=yes", "extend must be true or false, got 'yes'"),
        ("patch:rate=none", "rate must be a number, got 'none'"),
    ],
)
def test_unknown_names_and_wrong_types_are_refused(spec, message):
    with pytest.raises(BadInput, match=message):
        attacks.build(spec)


def test_values_of_a_spec_get_the_types_of_their_fields():
    patch = attacks.build("patch:kind=square,rate=1,size=none,victim=2,extend=true,colour=(1,1,0)")
    assert (patch.rate, patch.size, patch.victim) == (1.0, None, 2)
    assert isinstance(patch.rate, float)
    assert patch.extend is True
    assert patch.colour == "1,1,0"
    assert attacks.build(spec_of(patch)) == patch


def test_listing_imports_no_torch():
    code = (
        "import sys; from arena.core.registry import attacks; from arena.core import metric_list;"
        "assert [m.summary for m in attacks.describe_all()]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def write(path, body):
    path.write_text(body, encoding="utf-8")
    registry._read.cache_clear()
    return path


TOY = '''"""A toy: it does nothing,
on two lines.

More.

Source: a book,
    its second page.
Departs: nowhere.
"""
from arena.core.registry import method, param
from typing import ClassVar

@method
class Outside:
    labels: ClassVar[str] = "kept"
    rate: float = param(0.1, "a share", above=0, high=1, source="the book")
    size: int = 3

    def poison(self): ...
    def scan(self): ...
'''


def test_a_file_is_read_without_running_it(tmp_path):
    path = write(tmp_path / "toy.py", TOY + "\nraise RuntimeError\n")
    toy = registry._read("toy", "attack", "toy", path)
    assert toy.summary == "A toy: it does nothing, on two lines."
    assert toy.source == "a book, its second page."
    assert toy.departs == "nowhere."
    assert toy.powers == ("poisons data", "scans")
    assert toy.traits == {"labels": "kept"}
    rate, size = toy.fields
    assert (rate.name, rate.type, rate.default, rate.doc) == ("rate", "float", 0.1, "a share")
    assert (rate.range, rate.source) == ("(0, 1]", "the book")
    assert (size.default, size.range) == (3, "")


SLOW = """'A toy: it takes its time.'
from arena.core.registry import method, param

@method
class Slow:
    steps: int = param(1000, "passes", low=1, under={"fast": 100, "smoke": 2})
    size: int = param(7, "images", low=1, under={"fast": 5})
    final: int = param(3, "rounds", low=1, under={"smoke": 1})
    plain: int = 4
"""


def test_recipes_shorten_what_a_spec_does_not_name(tmp_path, monkeypatch):
    write(tmp_path / "slow_toy.py", SLOW)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("toy", "slow_toy", "arena.defenses")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    toys = Registry("defense", "arena.defenses", "arena.defenses")

    def built(*words):
        toy = toys.build(*words)
        return toy.steps, toy.size, toy.final, toy.plain

    assert built("slow_toy") == built("slow_toy", "paper") == (1000, 7, 3, 4)
    assert built("slow_toy", "fast") == built("slow_toy", "fast:epochs=20") == (100, 5, 3, 4)
    assert built("slow_toy", "smoke") == (2, 5, 1, 4)  # fast holds where smoke says nothing
    assert built("slow_toy:steps=1000", "smoke") == (1000, 5, 1, 4)  # as asked
    # a row of a table says what was shortened
    assert short_spec(toys.build("slow_toy", "fast")) == "slow_toy:steps=100,size=5"
    assert toys.describe("slow_toy").fields[0].under == {"fast": 100, "smoke": 2}


def test_a_file_without_a_method_is_refused(tmp_path):
    path = write(tmp_path / "empty.py", '"""Nothing."""\nclass Plain: ...\n')
    with pytest.raises(BadInput, match="no class marked @method"):
        registry._read("empty", "attack", "empty", path)


def test_methods_of_other_packages_come_by_entry_points(tmp_path, monkeypatch):
    write(tmp_path / "outside_toy.py", TOY)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("toy", "outside_toy", "arena.attacks")
    missing = EntryPoint("gone", "no_such_module", "arena.attacks")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point, missing])
    found = Registry("attack", "arena.attacks", "arena.attacks")
    assert "outside_toy" in found.names()
    assert "patch" in found.names()
    assert found.build("outside_toy:rate=0.4").rate == 0.4
    assert found.describe("outside_toy").fields[0].default == 0.1


def test_an_entry_point_cannot_take_an_existing_name(tmp_path, monkeypatch, caplog):
    package = tmp_path / "outside_package"
    package.mkdir()
    (package / "__init__.py").touch()
    write(package / "patch.py", TOY)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("patch", "outside_package.patch", "arena.attacks")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    found = Registry("attack", "arena.attacks", "arena.attacks")
    assert found.build("patch:size=3").method_name == "patch"  # the arena's own
    assert found.describe("patch").module == "arena.attacks.patch"
    [told] = [record.getMessage() for record in caplog.records]
    assert "'patch' of outside_package.patch is left out: there is another attack" in told
    assert "outside_package" not in sys.modules


# ------------------------------------------------------------------------------------------ code


def hash_of(tmp_path, monkeypatch, body):
    (tmp_path / "hashed.py").write_text(body, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    code_hash.cache_clear()
    return code_hash("hashed")


def test_only_what_is_executed_counts_for_the_code_hash(tmp_path, monkeypatch):
    one = hash_of(tmp_path, monkeypatch, '"""Doc."""\ndef f():\n    """Doc."""\n    return 1\n')
    same = hash_of(tmp_path, monkeypatch, "# note\ndef f():\n\n    return 1  # one\n")
    other = hash_of(tmp_path, monkeypatch, "def f():\n    return 2\n")
    assert one == same
    assert one != other


def test_the_code_hash_follows_the_arena_modules_that_are_imported(tmp_path, monkeypatch):
    body, imported, real = (
        "from arena.core import seeding\n",
        tmp_path / "own.py",
        registry._file_of,
    )
    hashes = []
    for line in ("SEED = 1\n", "SEED = 2\n"):
        imported.write_text(line, encoding="utf-8")
        monkeypatch.setattr(
            registry, "_file_of", lambda m: imported if m == "arena.core.seeding" else real(m)
        )
        hashes.append(hash_of(tmp_path, monkeypatch, body))
    assert hashes[0] != hashes[1]


def test_what_computes_no_result_does_not_count(tmp_path, monkeypatch):
    body, other, real = (
        "from arena.core import seeding\nfrom arena.core.registry import param\n",
        tmp_path / "own.py",
        registry._file_of,
    )
    other.write_text("MESSAGE = 1\n", encoding="utf-8")
    one = hash_of(tmp_path, monkeypatch, body)
    names = ("arena.core.registry", "arena.core.progress")
    monkeypatch.setattr(registry, "_file_of", lambda m: other if m in names else real(m))
    assert hash_of(tmp_path, monkeypatch, body) == one


# ----------------------------------------------------------- fields that name methods and folders

WRAPPER = '''"""Wraps another attack.

Source: a test.
"""

from arena.core.registry import method, param


@method
class Wrapper:
    base: str = param("patch", "what is wrapped", spec="attack")
    images: str | None = param(None, "pictures", folder=True)

    def poison(self, train, trigger, rng):
        return None
'''


@pytest.fixture
def wrapping(tmp_path, monkeypatch):
    (tmp_path / "wrapper.py").write_text(WRAPPER)
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("wrapper", "wrapper", "arena.attacks")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    known = Registry("attack", "arena.attacks", "arena.attacks")
    monkeypatch.setattr(registry, "attacks", known)
    yield known
    sys.modules.pop("wrapper", None)


def test_a_wrapped_method_is_spelt_out_in_the_full_spec(wrapping):
    one = wrapping.build("wrapper:base=(patch:size=6,rate=0.2)")
    assert short_spec(one) == "wrapper:base=(patch:rate=0.2,size=6)"
    assert "base=(patch:target=0,rate=0.2," in spec_of(one)
    assert spec_of(wrapping.build(spec_of(one))) == spec_of(one)
    assert spec_of(one) == spec_of(wrapping.build("wrapper:base=(patch:rate=0.2,size=6)"))
    assert short_spec(wrapping.build("wrapper:base=patch")) == "wrapper"


def test_a_wrapped_method_is_checked_like_any_other(wrapping):
    with pytest.raises(BadInput, match="There is no attack 'pach'; did you mean 'patch'"):
        wrapping.build("wrapper:base=pach")
    with pytest.raises(BadInput, match="patch: rate must be at most 1"):
        wrapping.build("wrapper:base=(patch:rate=3)")


def test_a_folder_must_be_there(wrapping, tmp_path):
    with pytest.raises(BadInput, match="wrapper: images: there is no folder"):
        wrapping.build("wrapper:images=gone")
    assert wrapping.build(f"wrapper:images={tmp_path}").images == str(tmp_path)


def test_what_a_field_names_is_part_of_the_identity(wrapping, tmp_path):
    from arena.identity import method_identity

    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "one.png").write_bytes(b"1")
    build = partial(wrapping.build, f"wrapper:images={folder}")
    before = method_identity(build())
    assert before["wrapped"]["base"]["spec"].startswith("patch:target=0")
    assert before["wrapped"]["base"]["code"] == code_hash("arena.attacks.patch")
    (folder / "one.png").write_bytes(b"2")
    assert method_identity(build()) != before
