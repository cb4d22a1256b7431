"""Putting a site where others see it: a folder for any static host, or a Hugging Face data set."""

from __future__ import annotations

import re
import shutil
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from arena.core.registry import BadInput

MARK = ".arena-site"  # in a folder that a site was published to: it may be replaced


class Published(NamedTuple):
    to: str
    files: list[str]  # relative paths
    bytes: int
    done: bool  # False: a dry run


def publish(site: Path, to: str, *, really: bool, api: Any = None) -> Published:
    """Publish the files below `site` to a folder or to `hf://OWNER/NAME` (a data set).

    Nothing is written unless `really`. A folder is replaced as a whole, and only where it is empty
    or holds an earlier site. api: a huggingface_hub.HfApi or what looks like one; made when needed.
    Raises BadInput with what is wrong with the target.
    """
    files = sorted(path for path in site.rglob("*") if path.is_file())
    if not (site / "index.html").is_file():
        raise BadInput(f"{str(site)!r} holds no site: there is no index.html in it.")
    told = Published(
        to, [str(p.relative_to(site)) for p in files], sum(p.stat().st_size for p in files), really
    )
    scheme, separator, rest = to.partition("://")
    if separator and scheme != "hf":
        raise BadInput(f"A site goes to a folder or to hf://OWNER/NAME, not to {scheme}://.")
    if separator:
        _to_hub(site, rest, really, api)
    else:
        _to_folder(site, Path(to).expanduser(), really)
    return told


def _to_hub(site: Path, name: str, really: bool, api: Any) -> None:
    name = name.strip("/").removeprefix("datasets/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise BadInput(f"A data set is written hf://OWNER/NAME, got {'hf://' + name!r}.")
    if not really:
        return
    if api is None:
        try:
            from huggingface_hub import HfApi
        except ImportError as error:
            raise BadInput(
                "hf:// needs huggingface_hub: `pip install huggingface_hub`, or name a folder."
            ) from error
        api = HfApi()
    try:
        api.create_repo(name, repo_type="dataset", exist_ok=True)
        api.upload_folder(
            repo_id=name,
            repo_type="dataset",
            folder_path=str(site),
            commit_message="Backdoor Arena: leaderboards",
            delete_patterns=["*.html", "*/tables/*", "*/figures/*"],
        )
    except Exception as error:  # the hub's own kinds, and those of the network below it
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInput(f"hf://{name} could not be written: {text}") from error


def _to_folder(site: Path, folder: Path, really: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{str(folder)!r} is a file; name a folder.")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise BadInput(f"{str(folder)!r} is the folder you are in, or above it; name another one.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise BadInput(f"{str(folder)!r} holds files that no site put there; name an empty folder.")
    if not really:
        return
    new = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(site, new)
        (new / MARK).write_text("Made by `arena leaderboard publish`; replaced by the next one.\n")
        old = None
        if folder.exists():
            old = new.with_name(f"{new.name}.old")
            folder.rename(old)
        new.rename(folder)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise BadInput(f"{str(folder)!r} cannot be written ({error.strerror}).") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
