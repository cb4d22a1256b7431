"""Content-addressed results on disk: artifacts (safetensors), one JSON record per cell.

    STORE/artifacts/ab/abcd…/   weights.safetensors …, meta.json with a sha256 per file
    STORE/records/abcd….json    one per cell, with a checksum over itself
    STORE/boards/NAME@V.json    which cells a board consists of
    STORE/scratch/1234…/        checkpoints and job files of work under way
    STORE/scratch.key           what makes the names of these folders tell nothing
    STORE/damaged/              what failed its checksum; set aside, never deleted
    STORE/locks/                one lock per key: several runners may share a store

Everything is written under a temporary name and renamed, so a reader sees all of it or none. A
lock dies with the process that holds it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arena.core.registry import BadInput, nearest
from arena.records import BOARD, RECORD, misfit

if TYPE_CHECKING:
    from filelock import FileLock
    from torch import Tensor

log = logging.getLogger("arena")

FORMAT = 1  # of the folder layout; a store of another format is refused, never rewritten
# what reading a file of JSON that was damaged, or is somebody else's, may raise
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


class DiskFull(OSError):
    """The disk is full; nothing half-written was left."""


def digest(value: object) -> str:
    """sha256 (hex) of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write under a temporary name beside `path`, then rename. Raises DiskFull."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _explained(error, path) from error


def check_writable(path: Path) -> Path:
    """`path`, where a file could be written there. Raises BadInput, before hours are spent."""
    if path.name in ("", "..") or path.is_dir():
        raise BadInput(f"{str(path)!r} is a folder; name a file in it.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise BadInput(f"{str(path)!r} cannot be written: {str(folder)!r} is a file.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"{str(path)!r} cannot be written: {str(folder)!r} is closed to you.")
    return path


def _explained(error: OSError, path: Path) -> OSError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(error.errno, f"the disk that holds {path.parent} is full")
    return error


@dataclass(frozen=True)
class Artifact:
    """A verified artifact: its folder and what its meta.json says."""

    folder: Path
    meta: dict[str, Any]

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_tensors(self.path(name))

    def sha256(self, name: str) -> str:
        return str(self.meta["files"][f"{name}.safetensors"])


class Store:
    """See the module's docstring. Opening creates nothing; the first write makes the folders."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser()
        if self.root.exists() and not self.root.is_dir():
            raise BadInput(f"The store {str(root)!r} is a file; name a folder.")
        marker = self.root / "store.json"
        if marker.exists():
            try:
                found = json.loads(marker.read_text())["format"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise BadInput(f'{marker} is damaged; write {{"format": {FORMAT}}}.') from error
            if found != FORMAT:
                raise BadInput(
                    f"The store {str(root)!r} has format {found}, this version reads {FORMAT}; "
                    "name another folder with --store."
                )

    def create(self) -> None:
        """Make the folders. Raises BadInput where that is not possible."""
        try:
            for name in ("artifacts", "records", "boards", "scratch", "damaged", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
            if not (self.root / "store.json").exists():
                write_atomically(self.root / "store.json", json.dumps({"format": FORMAT}))
            with tempfile.TemporaryFile(dir=self.root / "locks"):
                pass  # folders that are there may still be closed to us
        except DiskFull:
            raise
        except OSError as error:
            raise BadInput(
                f"The store {str(self.root)!r} cannot be written ({error.strerror}); "
                "name another folder with --store."
            ) from error

    @contextmanager
    def unless_refused(self) -> Iterator[None]:
        """What is done within and refused in the end (BadInput) takes the folders that it made away
        again, unless something is kept in them by then or somebody else works there."""
        made = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        try:
            yield
        except BadInput:
            if made and not self._is_used():
                shutil.rmtree(self.root, ignore_errors=True)
                for folder in made[1:]:
                    with suppress(OSError):
                        folder.rmdir()
            raise

    def _is_used(self) -> bool:
        """Whether anything is kept here, or anybody works here."""
        from filelock import FileLock, Timeout

        kept = ("artifacts", "records", "boards", "scratch", "damaged", "pictures")
        if any(path.is_file() for name in kept for path in (self.root / name).rglob("*")):
            return True
        try:
            for path in (self.root / "locks").glob("*.lock"):
                with FileLock(path).acquire(timeout=0):
                    pass
        except Timeout:
            return True
        return False

    # -------------------------------------------------------------------------------- artifacts

    def _folder(self, key: str) -> Path:
        return self.root / "artifacts" / key[:2] / key

    def has(self, key: str) -> bool:
        """Whether the artifact is there (not yet whether it is sound: `artifact` tells)."""
        return (self._folder(key) / "meta.json").is_file()

    def artifact(self, key: str) -> Artifact | None:
        """The artifact after checking every file's sha256; a damaged one is said, set aside and
        reported as absent, so that it is computed again."""
        folder = self._folder(key)
        if not folder.is_dir():
            return None
        try:
            meta = json.loads((folder / "meta.json").read_text())
            for name, expected in meta["files"].items():
                if file_sha256(folder / name) != expected:
                    raise ValueError(f"{name} does not have its checksum")
            if meta["checksum"] != digest({k: v for k, v in meta.items() if k != "checksum"}):
                raise ValueError("meta.json does not have its checksum")
        except _UNREADABLE as error:
            self._set_aside(folder, error)
            return None
        return Artifact(folder, meta)

    def save(
        self, key: str, parts: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]
    ) -> Artifact:
        """Write an artifact: one safetensors file per part, then the folder appears at once.

        Only for the holder of the key's lock, who also clears what a kill left half-written."""
        temporary = self.root / "artifacts" / f".new-{key}"
        folder = self._folder(key)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            files = {}
            for name, tensors in parts.items():
                path = temporary / f"{name}.safetensors"
                save_tensors(path, tensors)
                files[path.name] = file_sha256(path)
            body = {**meta, "files": files}
            write_atomically(
                temporary / "meta.json",
                json.dumps({**body, "checksum": digest(body)}, indent=1, sort_keys=True),
            )
            folder.parent.mkdir(exist_ok=True)
            if (kept := self.artifact(key)) is not None:
                if kept.meta["files"] == files:  # from a run stopped before its record
                    return kept
                self._set_aside(folder, ValueError("other values were computed now"))
            temporary.rename(folder)
        except OSError as error:
            raise _explained(error, temporary) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        artifact = self.artifact(key)
        assert artifact is not None
        return artifact

    def _set_aside(self, path: Path, why: Exception) -> None:
        aside = self.root / "damaged" / f"{path.name}-{uuid.uuid4().hex[:8]}"
        try:
            aside.parent.mkdir(exist_ok=True)
            path.rename(aside)
        except FileNotFoundError:  # another runner noticed first
            return
        except OSError as error:  # a store that may only be read
            log.warning("%s is damaged (%s) and cannot be set aside (%s).", path, why, error)
            return
        log.warning("%s is damaged (%s): set aside in %s, computed again.", path, why, aside)

    # ---------------------------------------------------------------------------------- records

    def _record_path(self, key: str) -> Path:
        return self.root / "records" / f"{key}.json"

    def record(self, key: str) -> dict[str, Any] | None:
        """The cell's record, or None when absent or damaged (then said and set aside)."""
        return self._read_record(self._record_path(key))

    def _read_record(self, path: Path) -> dict[str, Any] | None:
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            self._set_aside(path, error)
            return None
        try:
            record = json.loads(text)
            checksum = record.pop("checksum")
            if checksum != digest(record) or record["key"] != path.stem:
                raise ValueError("it does not have its checksum")
            if fault := misfit(record, RECORD):
                raise ValueError(f"it is no record of this version: {fault}")
        except _UNREADABLE as error:
            self._set_aside(path, error)
            return None
        return dict(record)

    def write_record(self, record: Mapping[str, Any]) -> None:
        body = {**record, "checksum": digest(record)}
        write_atomically(
            self._record_path(record["key"]), json.dumps(body, indent=1, sort_keys=True) + "\n"
        )

    def records(self) -> list[dict[str, Any]]:
        """All sound records, in the order of their keys."""
        paths = sorted((self.root / "records").glob("*.json"))
        return [record for path in paths if (record := self._read_record(path)) is not None]

    def find(self, prefix: str) -> dict[str, Any]:
        """The record whose key starts with `prefix`. Raises BadInput unless there is just one."""
        keys = [path.stem for path in sorted((self.root / "records").glob("*.json"))]
        found = [key for key in keys if key.startswith(prefix.lower())]
        if not found or not prefix:
            raise BadInput(
                f"There is no cell {prefix!r} in {str(self.root)!r}; see `arena results`."
            )
        if len(found) > 1:
            raise BadInput(
                f"{prefix!r} stands for {len(found)} cells, {found[0][:12]} and {found[1][:12]} "
                "among them; give more letters."
            )
        record = self.record(found[0])
        if record is None:
            raise BadInput(f"The record of cell {found[0][:12]} is damaged; run its board again.")
        return record

    # ----------------------------------------------------------------------------------- boards

    def write_board(self, name: str, version: int, body: Mapping[str, Any]) -> None:
        path = self.root / "boards" / f"{name}@{version}.json"
        write_atomically(path, json.dumps({**body, "checksum": digest(body)}, indent=1) + "\n")

    def boards(self) -> list[dict[str, Any]]:
        """The boards that were run here: name, version, definition, command and cell keys."""
        found = []
        for path in sorted((self.root / "boards").glob("*.json")):
            try:
                body = json.loads(path.read_text(encoding="utf-8"))
                if body.pop("checksum") != digest(body):
                    raise ValueError("it does not have its checksum")
                if fault := misfit(body, BOARD):
                    raise ValueError(f"it is no board of this version: {fault}")
                if path.stem != f"{body['name']}@{body['version']}":
                    raise ValueError("it has another board's name")
            except _UNREADABLE as error:
                self._set_aside(path, error)
                continue
            found.append(body)
        return found

    def board_records(
        self, name: str | None = None, version: int | None = None
    ) -> list[dict[str, Any]]:
        """Records of a board, or of all boards, each as a row of its board: those of `version`, or
        of the newest. Versions share cells, and two of them in one table would say everything
        twice. Raises BadInput."""
        boards = self.boards()
        if name is not None:
            names = {board["name"] for board in boards}
            if name not in names:
                raise BadInput(f"There is no board {name!r} in this store; {nearest(name, names)}.")
            boards = [board for board in boards if board["name"] == name]
        newest: dict[str, int] = {}
        for board in boards:
            newest[board["name"]] = max(board["version"], newest.get(board["name"], 0))
        boards = [b for b in boards if b["version"] == (version or newest[b["name"]])]
        found = {record["key"]: record for record in self.records()}
        return [
            {
                **_of_board(found[key], board),
                "board": {"name": board["name"], "version": board["version"]},
            }
            for board in boards
            for key in board["cells"]
            if key in found
        ]

    # ----------------------------------------------------------------------- locks and work space

    def lock(self, key: str) -> FileLock:
        """A lock on `key` between processes; not yet taken. It dies with its holder."""
        from filelock import FileLock

        return FileLock(self.root / "locks" / f"{key}.lock", thread_local=False)

    def scratch(self, key: str) -> Path:
        """The work folder of `key`; only the holder of its lock may use it.

        Its name tells nothing to a method that works there and could otherwise look up, in a list
        of keys, which attack it is to undo."""
        folder = self._work_folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def clear_scratch(self, key: str) -> None:
        shutil.rmtree(self._work_folder(key), ignore_errors=True)

    def _work_folder(self, key: str) -> Path:
        name = hashlib.blake2b(key.encode(), key=self._secret(), digest_size=16).hexdigest()
        return self.root / "scratch" / name

    def _secret(self) -> bytes:
        """32 bytes that are drawn once for this store."""
        path = self.root / "scratch.key"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
            draft.write_bytes(os.urandom(32))
            with suppress(FileExistsError):
                os.link(draft, path)  # unlike a renaming, this never replaces another's
            draft.unlink()
        return path.read_bytes()

    def free_bytes(self) -> int:
        folder = self.root
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free


def _of_board(record: dict[str, Any], board: Mapping[str, Any]) -> dict[str, Any]:
    """The record without what other boards had measured of the same cell."""
    asked = (board.get("definition") or {}).get("measure", ())
    kept = {spec: found for spec, found in record.get("measures", {}).items() if spec in asked}
    rest = {name: value for name, value in record.items() if name != "measures"}
    return rest | ({"measures": kept} if kept else {})


def open_store(folder: Path | None) -> Store:
    """The store named, or the one used last below runs/. Raises BadInput."""
    if folder is None:
        known = [path.parent for path in Path("runs").glob("*/store.json")]
        if not known:
            raise BadInput("There is no store below runs/; name one with --store.")
        folder = max(known, key=lambda each: (each / "boards").stat().st_mtime)
    if not (folder / "store.json").is_file():
        raise BadInput(f"There is no store in {str(folder)!r}; name another folder with --store.")
    return Store(folder)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, written atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary)
        except SafetensorError as error:  # hides the number of the error in its text
            found = re.search(r"\(os error (\d+)\)", str(error))
            raise OSError(int(found[1]) if found else errno.EIO, str(error)) from error
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _explained(error, path) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)
