"""Where a submission's code comes from: a file, an installed package, the source on a card.

Before anything else a file is copied under the sha256 of its content, so that what was checked,
what was run and what stands on the card are the same bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from arena.core.registry import (
    BadInput,
    Method,
    attacks,
    defenses,
    kind_of,
    nearest,
    read_method_file,
    registry_of,
)
from arena.store import write_atomically

ROLE_OF = {"repairs": "repair", "scans": "scan", "detects": "detect"}


@dataclass(frozen=True)
class Submission:
    """A method that is not the arena's own, known to its registry."""

    described: Method
    kind: str  # attack or defense
    role: str  # attack, repair, scan or detect: the part that it plays on a board
    spec: str  # as it was asked for, with the fields that were set
    source: str
    sha256: str  # of the source's bytes
    package: str = ""  # that it is installed with

    @property
    def name(self) -> str:
        return self.described.name


def find(text: str, keep: Path, role: str | None = None) -> Submission:
    """`path/to/mine.py`, `path/to/mine.py:field=value` or the name of an installed method.

    keep: where the copy of a file is put. role: of a class that can do several things. Raises
    BadInput.
    """
    path, colon, fields = _split(text)
    if path is None:
        name = text.partition(":")[0]
        return _installed(name, text, role)
    return of_source(path.stem, read_method_file(path), keep, f"{path.stem}{colon}{fields}", role)


def of_source(
    name: str, content: bytes, keep: Path, spec: str = "", role: str | None = None
) -> Submission:
    """The method in `content`, whose file is called NAME.py. Raises BadInput."""
    try:
        source = content.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{name}.py is no text in UTF-8.") from error
    sha256 = hashlib.sha256(content).hexdigest()
    copy = keep.resolve() / sha256[:16] / f"{Path(name).name}.py"
    if not copy.is_file() or copy.read_bytes() != content:
        write_atomically(copy, content)
    kind = kind_of(copy)
    described = registry_of(kind).add_file(copy)
    return Submission(described, kind, _role(described, kind, role), spec or name, source, sha256)


def _split(text: str) -> tuple[Path | None, str, str]:
    head, middle, fields = text.partition(".py:")
    if middle:
        return Path(f"{head}.py").expanduser(), ":", fields
    path = Path(text).expanduser()
    if text.endswith(".py") or "/" in text.partition(":")[0] or path.is_file():
        return path, "", ""
    return None, "", ""


def _installed(name: str, spec: str, role: str | None) -> Submission:
    for kind, registry in (("attack", attacks), ("defense", defenses)):
        if name not in registry.names():
            continue
        if not registry.is_strange(name):
            raise BadInput(
                f"{name!r} is one of the arena's own; a submission is a file (mine.py) or a method "
                "of another package."
            )
        described = registry.describe(name)
        content = Path(described.path).read_bytes()
        return Submission(
            described,
            kind,
            _role(described, kind, role),
            spec,
            content.decode(errors="replace"),
            hashlib.sha256(content.decode(errors="replace").encode()).hexdigest(),
            described.module,
        )
    strange = [n for r in (attacks, defenses) for n in r.names() if r.is_strange(n)]
    hint = nearest(name, strange) if strange else "name a Python file (mine.py)"
    raise BadInput(f"There is no submission {name!r}; {hint}.")


def _role(described: Method, kind: str, wanted: str | None) -> str:
    if kind == "attack":
        found = ["attack"]
    else:
        found = [role for power, role in ROLE_OF.items() if power in described.powers]
    if not found:
        raise BadInput(
            f"{described.name} can do nothing: its class needs repair, scan or score, or prepare "
            "and poison."
        )
    if wanted is None:
        return found[0]
    if wanted not in found:
        raise BadInput(f"{described.name} cannot {wanted}; {nearest(wanted, found)}.")
    return wanted
