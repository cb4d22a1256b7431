"""What makes a method's results, and what records say of a method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from arena.core.registry import (
    code_hash,
    files_of,
    registry_of,
    short_spec,
    spec_of,
    stranger_of,
)
from arena.store import file_sha256


def method_identity(instance: Any) -> dict[str, Any]:
    """What makes a method's results: full spec, code (of a stranger also the sha256 of the file),
    the content of files and folders that it names, and the same of the methods that it wraps."""
    files: dict[str, Any] = {}
    wrapped: dict[str, Any] = {}
    for f in dataclasses.fields(instance):
        if not (value := getattr(instance, f.name)):
            continue
        if f.metadata.get("path"):
            files[f.name] = file_sha256(Path(value).expanduser())
        elif f.metadata.get("folder"):
            folder = Path(value).expanduser()
            files[f.name] = {
                str(path.relative_to(folder)): file_sha256(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
        elif kind := f.metadata.get("spec"):
            wrapped[f.name] = method_identity(registry_of(kind).build(value))
    for name, inner in getattr(instance, "wraps", {}).items():
        wrapped[name] = method_identity(inner)
    found = {"spec": spec_of(instance), "code": code_hash(type(instance).__module__)}
    if (path := stranger_of(instance)) is not None:
        found["file"] = file_sha256(path)
    return found | ({"files": files} if files else {}) | ({"wrapped": wrapped} if wrapped else {})


def method_files(instance: Any) -> list[str]:
    """The files and folders that a method names, those of the methods that it wraps, and where the
    code of one lies that is no part of the arena: what its process must see."""
    found: list[str] = []
    for f in dataclasses.fields(instance):
        if not (value := getattr(instance, f.name)):
            continue
        if f.metadata.get("path") or f.metadata.get("folder"):
            found.append(str(Path(value).expanduser()))
        elif kind := f.metadata.get("spec"):
            found += method_files(registry_of(kind).build(value))
    for inner in getattr(instance, "wraps", {}).values():
        found += method_files(inner)
    found += files_of(instance)
    if (file := stranger_of(instance)) is not None and str(file) not in found:
        depth = type(instance).__module__.count(".")
        found.append(str(file.parents[depth - 1] if depth else file))  # its whole package
    return sorted(set(found))


def is_foreign(instance: Any) -> bool:
    """Whether a method, or one that it wraps, is somebody else's code."""
    wrapped = list(getattr(instance, "wraps", {}).values())
    for f in dataclasses.fields(instance):
        if (kind := f.metadata.get("spec")) and (value := getattr(instance, f.name)):
            wrapped.append(registry_of(kind).build(value))
    return not type(instance).__module__.startswith("arena.") or any(map(is_foreign, wrapped))


def describe_attack(attack: Any) -> dict[str, Any]:
    from arena.core.poisoning import scope

    controls = hasattr(attack, "train")
    return {
        "name": attack.method_name,
        "short": short_spec(attack),
        **method_identity(attack),
        "threat": "controls training" if controls else getattr(attack, "threat", "poisons data"),
        "scope": scope(attack) if attack.method_name != "none" else "none",
        "labels": "kept" if _keeps_labels(attack) else "changed",
        "trigger": getattr(attack, "trigger_kind", "static"),
    }


def _keeps_labels(attack: Any) -> bool:
    """As it is set up: some attacks keep labels or change them, as a field says."""
    return bool(getattr(attack, "keeps_labels", getattr(attack, "labels", "changed") == "kept"))


def describe_defense(defense: Any) -> dict[str, Any]:
    return {
        "name": defense.method_name,
        "short": short_spec(defense),
        **method_identity(defense),
        "null": bool(getattr(defense, "null", False)),
    }
