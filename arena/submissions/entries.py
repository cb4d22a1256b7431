"""Entries of a board: one verified card per JSON file under leaderboards/BOARD/entries/.

Each entry is a file of its own, so that a submission is one pull request and merges never
conflict; the table is made from the files, never kept beside them.

An entry's status:
    withdrawn    its maintainers took it back, with a reason
    broken       an attack that entered later, that is established in the mean over its seeds
                 (undefended ASR of 80 % or more, accuracy within 5 points of the clean twin), keeps
                 an ASR of 50 % or more behind this defense, which had brought the board's own
                 established attacks below that
    reproduced   cells were run again by the verifier, and their figures hold
    claimed      its metrics were computed again from stored weights; the method was not run again
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from arena.boards import Board, folder_of, read_board
from arena.core.checks import ESTABLISHED_ASR, ESTABLISHED_DROP
from arena.core.registry import BadInput, nearest
from arena.report.statistics import summarise
from arena.store import digest
from arena.submissions import cards
from arena.submissions.cards import Altered, Card

VERSION = 1
BROKEN_ASR = 0.5
Entry = dict[str, Any]


# ---------------------------------------------------------------------------------------- entering


def add(path: Path, boards: Path) -> Path:
    """Enter the verified card at `path`; returns the entry's file. Raises BadInput, Altered."""
    value = cards.read_json(path, "card")
    if not is_verified(value):
        raise BadInput(
            f"{str(path)!r} is not verified; `arena submit verify {path}` writes a card that is."
        )
    card = cards.check_schema(value.get("card"))
    cards.check_whole(card)
    verification = check_verification(value["verification"], card)
    folder, board = check_new(card, boards)
    if not verification["holds"]:
        raise BadInput("Not all of this card's figures hold, so it does not enter the board.")
    if why := unverified({"verification": verification}, board):
        raise BadInput(why)
    entry = {
        "entry_version": VERSION,
        "card": card,
        "verification": verification,
        "added": datetime.now(UTC).isoformat(timespec="seconds"),
        "withdrawn": None,
    }
    target = folder / "entries" / f"{card['method']['name']}-{card['hash'][:12]}.json"
    cards.write(target, entry)
    return target


def is_verified(value: Any) -> bool:
    """Whether what a file says holds a verification beside a card."""
    return isinstance(value, Mapping) and bool(value.get("verification"))


def check_new(card: Card, boards: Path) -> tuple[Path, Board]:
    """The folder and the board that a card may enter, once verified. Raises BadInput, Altered."""
    folder, board = board_folder(card, boards)
    check_board(card, board, folder)
    for known_path, known in read_all(folder):
        told = known["card"]["method"]
        if known["card"]["hash"] == card["hash"]:
            raise BadInput(f"This card is there already, as {str(known_path)!r}.")
        same = all(told[name] == card["method"][name] for name in ("sha256", "spec", "role"))
        if same and known["card"]["board"] == card["board"] and not known["withdrawn"]:
            raise BadInput(
                f"The same method with the same settings is there already, as {str(known_path)!r}; "
                "withdraw that first."
            )
    return folder, board


def unverified(entry: Mapping[str, Any], board: Board) -> str:
    """Why an entry's verification does not count on the board, in a sentence; '' where it does."""
    return _shut(cards.check_seal(entry["verification"], "verification"), board)


def check_open(card: Card, boards: Path, key: Path | None) -> None:
    """Raise BadInput, Altered where the card may not enter even if a verification that is signed
    with `key` holds."""
    _, board = check_new(card, boards)
    signed = cards.signature("", key)
    if why := _shut(signed["public_key"] if signed else None, board):
        raise BadInput(why)


def _shut(key: str | None, board: Board) -> str:
    if not board.verifiers or key in board.verifiers:
        return ""
    return (
        f"The board {board.name!r} lets in what one of its verifiers has signed; this verification "
        f"is {'not signed' if key is None else f'signed by {key[:16]}'}."
    )


def withdraw(text: str, reason: str, boards: Path) -> Path:
    """Mark an entry as withdrawn; it stays readable. Raises BadInput."""
    if not reason.strip() or len(reason) > 500 or not reason.isprintable():
        raise BadInput("--reason is one line of at most 500 letters.")
    path = find(text, boards)
    entry = read_entry(path)
    if entry["withdrawn"]:
        raise BadInput(f"{path.stem} is withdrawn already: {entry['withdrawn']['reason']}")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    cards.write(path, {**entry, "withdrawn": {"reason": reason.strip(), "at": now}})
    return path


def find(text: str, boards: Path) -> Path:
    """An entry's file by its path or its name. Raises BadInput."""
    if (path := Path(text)).is_file():
        return path
    known = {p.stem: p for p in sorted(boards.glob("*/entries/*.json"))}
    found = [p for stem, p in known.items() if stem.startswith(text.removesuffix(".json"))]
    if len(found) != 1:
        raise BadInput(f"There is no entry {text!r}; {nearest(text, known)}.")
    return found[0]


def board_folder(card: Card, boards: Path) -> tuple[Path, Board]:
    """The folder of the card's board, and what its board.toml says. Raises BadInput."""
    folder = folder_of(card["board"]["name"], boards)
    return folder, read_board(folder / "board.toml")


def check_board(card: Card, board: Board, folder: Path) -> None:
    """Raise BadInput unless the card was made on the board as it is now."""
    told = card["board"]
    if told["version"] != board.version:
        raise BadInput(
            f"The card was made on version {told['version']} of the board {board.name!r}, which is "
            f"at version {board.version} now; run it again there."
        )
    if told["hash"] != digest(json.loads(json.dumps(board.definition()))):
        raise BadInput(
            f"The board of this card says other things than {str(folder / 'board.toml')!r}, "
            "though their versions are the same; run it again there."
        )
    if (board.held_back is not None) != told["held_back"]:
        raise BadInput(
            f"Rows of the board {board.name!r} come from what it holds back, and this card from "
            "its public part; its maintainer runs the submission with --secret."
        )
    for _, entry in read_all(folder):
        other = entry["card"]
        if other["board"]["version"] != told["version"]:
            continue
        if difference := changed(other, card):
            raise BadInput(
                f"{difference} is not what it was for {other['method']['name']}, which is on "
                f"version {told['version']} of the board: that makes a new version of the board."
            )


def changed(one: Card, two: Card) -> str:
    """What differs between two cards that must be the same on one version of a board: data, code
    of the board's attacks. Empty where nothing does."""
    facts = [
        {("the data set", c["dataset"]["name"]): c["dataset"]["fingerprint"] for c in card["cells"]}
        | {
            ("the code of the attack", c["attack"]["spec"]): c["attack"]["code"]
            for c in card["cells"]
            if c["attack"]["name"] != card["method"]["name"]
        }
        for card in (one, two)
    ]
    for what, name in facts[0].keys() & facts[1].keys():
        if facts[0][what, name] != facts[1][what, name]:
            return f"{what[0].upper()}{what[1:]} {name.partition(':')[0]}"
    scored = [card.get("scoring") for card in (one, two)]
    return "The code of the metrics" if scored[0] != scored[1] else ""


def check_verification(value: Any, card: Card) -> Mapping[str, Any]:
    """A verification that belongs to the card. Raises BadInput, Altered."""
    wanted = ("verification_version", "card", "holds", "cells", "how", "at", "hash", "signature")
    if not isinstance(value, Mapping) or any(name not in value for name in wanted):
        raise BadInput("The verification is not one that `arena submit verify` wrote.")
    cards.check_signature(value["signature"], "verification")
    if not isinstance(value["cells"], list) or not isinstance(value["holds"], bool):
        raise BadInput("The verification is not one that `arena submit verify` wrote.")
    cards.check_seal(value, "verification")
    if value["card"] != card["hash"]:
        raise Altered("The verification belongs to another card.")
    try:
        judged = [bool(f["holds"]) for cell in value["cells"] for f in cell["figures"].values()]
        counted = dict(Counter(cell["how"] for cell in value["cells"]))
    except (AttributeError, LookupError, TypeError) as error:
        raise BadInput("The verification is not one that `arena submit verify` wrote.") from error
    if value["holds"] != (bool(judged) and all(judged)) or value["how"] != counted:
        raise Altered("The verification is inconsistent: its verdict does not follow.")
    return value


# ----------------------------------------------------------------------------------------- reading


def read_entry(path: Path) -> Entry:
    """An entry whose card and verification are whole. Raises BadInput, Altered."""
    value = cards.read_json(path, "entry")
    wanted = ("entry_version", "card", "verification", "added", "withdrawn")
    if not isinstance(value, Mapping) or any(name not in value for name in wanted):
        raise BadInput(f"{str(path)!r} is no entry that `arena leaderboard add` wrote.")
    card = cards.check_schema(value["card"])
    cards.check_whole(card)
    check_verification(value["verification"], card)
    named = f"{card['method']['name']}-{card['hash'][:12]}"
    if path.stem != named or not re.fullmatch(r"[a-z0-9_]+-[0-9a-f]{12}", path.stem):
        raise Altered(f"The entry {path.name!r} has another name than its card: {named}.json.")
    withdrawn = value["withdrawn"]
    if withdrawn is not None and not (isinstance(withdrawn, Mapping) and "reason" in withdrawn):
        raise BadInput(f"{str(path)!r} is no entry that `arena leaderboard add` wrote.")
    return dict(value)


def read_all(folder: Path) -> list[tuple[Path, Entry]]:
    """The entries of a board's folder, of all its versions, in the order in which they came.
    Raises BadInput, Altered."""
    found = [(path, read_entry(path)) for path in sorted((folder / "entries").glob("*.json"))]
    return sorted(found, key=lambda pair: (pair[1]["added"], pair[0].name))


def rows(folder: Path) -> list[dict[str, Any]]:
    """What a table of entries shows, one row per entry, with its status."""
    board, found = read_board(folder / "board.toml"), read_all(folder)
    return [_row(path, entry, found, board) for path, entry in found]


def _row(
    path: Path, entry: Entry, others: Sequence[tuple[Path, Entry]], board: Board
) -> dict[str, Any]:
    card = entry["card"]
    state, why = status(entry, [other for _, other in others])
    means = {
        name: summarise(group["figures"][name]["mean"] for group in _own(card, name)).mean
        for name in ("acc", "asr", "score", "auroc")
    }
    return {
        "entry": path.stem,
        "board": card["board"]["name"],
        "version": card["board"]["version"],
        "current": card["board"]["version"] == board.version,
        "method": card["method"]["short"],
        "role": card["method"]["role"],
        "author": card["author"],
        "status": state,
        "why": why,
        **means,
        "claims": list(card["claims"]),
        "isolation": card["isolation"],
        "signed": card["signature"]["public_key"] if card["signature"] else None,
        "verified": entry["verification"]["how"],
        "added": entry["added"],
        "hash": card["hash"],
    }


def _own(card: Card, figure: str) -> Iterator[Mapping[str, Any]]:
    """The groups of the summary that tell of the method: its own, without the clean twin."""
    method = card["method"]
    for group in card["summary"]:
        if figure not in group["figures"] or group["attack"] == "none":
            continue
        mine = group["attack"] if method["role"] == "attack" else group["defense"]
        undefended = method["role"] != "attack" or group["defense"] == "none"
        if mine == method["short"] and undefended:
            yield group


def status(entry: Entry, others: Sequence[Entry]) -> tuple[str, str]:
    """An entry's status and what it rests on; see the module's docstring."""
    if entry["withdrawn"]:
        return "withdrawn", str(entry["withdrawn"]["reason"])
    if broken := breakers(entry, others):
        return "broken", f"by {', '.join(broken)}"
    how = entry["verification"]["how"]
    if "rerun" in how:
        return "reproduced", f"{how['rerun']} cells were run again"
    return "claimed", "metrics were computed again from stored weights"


def breakers(entry: Entry, others: Sequence[Entry]) -> list[str]:
    """Attacks that entered the same version of the board later and get through this defense."""
    card = entry["card"]
    if card["method"]["role"] != "repair" or not _withstood(card):
        return []
    found = []
    for other in others:
        attack = other["card"]
        later = other["added"] > entry["added"] and not other["withdrawn"]
        same = attack["board"] == card["board"]
        if not (later and same and attack["method"]["role"] == "attack"):
            continue
        asr = _mean_asr(
            c
            for c in attack["cells"]
            if c["attack"]["name"] == attack["method"]["name"]
            and _established(c)
            and c["defense"]["spec"] == card["method"]["spec"]
            and c["defense"]["code"] == card["method"]["code"]
        )
        if asr is not None and asr >= BROKEN_ASR:
            found.append(attack["method"]["name"])
    return found


def _withstood(card: Card) -> bool:
    asr = _mean_asr(
        c
        for c in card["cells"]
        if c["defense"]["spec"] == card["method"]["spec"] and _established(c)
    )
    return asr is not None and asr < BROKEN_ASR


def _established(cell: Mapping[str, Any]) -> bool:
    metrics = cell["metrics"]
    asr, acc = metrics.get("asr_before"), metrics.get("acc_before")
    if asr is None or acc is None or asr < ESTABLISHED_ASR:
        return False
    twin = metrics.get("clean_twin_acc")
    return twin is None or bool(acc >= twin - ESTABLISHED_DROP)


def _mean_asr(cells: Any) -> float | None:
    return summarise(cell["metrics"].get("asr") for cell in cells).mean


def entered_defenses(folder: Path, board: Board) -> list[Card]:
    """Cards of the defenses that stand on this version of the board, the newest of each name; an
    attack that is submitted has to face them, too. Raises BadInput, Altered."""
    newest: dict[str, Card] = {}
    for _, entry in read_all(folder):
        card = entry["card"]
        if (
            card["method"]["role"] == "repair"
            and card["board"]["version"] == board.version
            and not entry["withdrawn"]
        ):
            newest[card["method"]["name"]] = card
    return list(newest.values())
