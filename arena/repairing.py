"""One suspicious model: scanned, repaired in one or several ways, compared, and one recommended.

Accuracy is judged on clean images that no repair saw: the data set's validation images, of a folder
of one's own those held out for tests as well. Nobody knows a trigger here, so the scanner's verdict
before and after stands for it. It searches on the images held out where they are enough for it, for
triggers that a repair unlearned on its own images are hard to find on those again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from arena import scanning
from arena.boards import check_recipe
from arena.core import training
from arena.core.contracts import Images
from arena.core.registry import BadInput, defenses, nearest, short_spec, spec_of
from arena.core.whole import share_refusal
from arena.data import Dataset
from arena.store import Store
from arena.subjects import Subject, ask, ask_once, digest, with_weights

MAX_DROP = 0.05  # accuracy that a repair may cost to be recommended
_LEAST_SCANNED = 10  # images of each class that a scanner needs to be worth asking


@dataclass(frozen=True)
class Question:
    """What is tried: specs of defenses, and of a scanner (none: no scan)."""

    repairs: Sequence[str]
    scanner: str | None = None
    clean_share: float = 0.05
    max_drop: float = MAX_DROP
    recipe: str = "paper"  # what defenses shorten under it, they do


def repairs() -> list[str]:
    return [each.name for each in defenses.describe_all() if "repairs" in each.powers]


def check(question: Question) -> None:
    """Raise BadInput unless all names are known and can work; imports no more than they need."""
    if not 0 <= question.max_drop <= 1:
        raise BadInput(f"--max-drop must be from 0 to 1, got {question.max_drop:g}.")
    check_recipe(question.recipe)
    if not question.repairs:
        raise BadInput("Name a defense to repair with, such as -D finetune.")
    for text in question.repairs:
        name = text.partition(":")[0]
        if name not in (known := repairs()):
            if name in defenses.names():
                raise BadInput(f"{name} repairs nothing; defenses: {', '.join(known)}.")
            raise BadInput(f"There is no defense {name!r}; {nearest(name, known)}")
    asked = [defenses.build(text, question.recipe) for text in question.repairs]
    refusals = [share_refusal(method, question.clean_share) for method in asked]
    if all(refusals):  # else each is a row of its own
        raise BadInput(str(refusals[0]))
    if question.scanner is not None:
        scanning.check(question.scanner, question.recipe)


def repair(
    subject: Subject, question: Question, store: Store, *, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """What `arena repair` prints, as JSON values, and the weights of the repair recommended.

    A repair that fails is a row with its reason. Raises BadInput where none ends well, with the
    defenses that could work.
    """
    held = held_out(subject)
    asked = [defenses.build(text, question.recipe) for text in question.repairs]
    reasons, others = _usable(subject, asked, question, store, device)
    hint = _hint(others)
    if all(reasons):  # before anything is scanned
        raise BadInput(f"{reasons[0]} {hint}")
    judged = _Judge(question, store, device, held, _examined(subject, held, question))
    before = judged(subject)
    rows: list[dict[str, Any]] = []
    weights: dict[str, dict[str, Tensor]] = {}
    for method, reason in zip(asked, reasons, strict=True):
        name, row = short_spec(method), {"defense": short_spec(method), "spec": spec_of(method)}
        rows.append(row)
        if reason:
            row |= {"status": "failed", "reason": reason}
            continue
        try:
            found, state = ask_once(
                subject, "repair", method, store, clean_share=question.clean_share, device=device
            )
        except BadInput as error:
            row |= {"status": "failed", "reason": str(error)}
            continue
        repaired = with_weights(subject, state, name)
        weights[name] = state
        row |= {"status": "ok", "weights": digest(state), "budget": found["budget"]}
        row |= judged(repaired)
        row["accuracy_drop"] = before["accuracy"] - row["accuracy"]
    if not weights:
        reason = rows[0]["reason"].rstrip(".")
        raise BadInput(f"No repair ended well. {reason}. {hint}")
    chosen, why = recommended(before, rows, question.max_drop)
    if doubt := _doubt(subject, before["accuracy"], len(held), question.max_drop):
        chosen, why = None, doubt
    return {
        "model": subject.name,
        "weights": subject.digest,
        "data": subject.data.name,
        "labels": "model" if subject.self_labelled else "given",
        "validation_images": len(held),
        "clean_share": question.clean_share,
        "clean_images": next(r["budget"]["clean_images"] for r in rows if r["status"] == "ok"),
        "scanner": question.scanner,
        "scanned_images": judged.looked_at,
        "before": before,
        "repairs": rows,
        "possible": others,
        "recommended": chosen,
        "because": why,
    }, None if chosen is None else weights[chosen]


def unlabelled(subject: Subject, question: Question, store: Store, *, device: str = "cpu") -> str:
    """What to say of images without labels: what could be done with them, and with which repairs.

    subject: as `arena.subjects.of_unlabelled` makes it.
    """
    _, able = _usable(subject, (), question, store, device)
    said = (
        f"{subject.data.name.partition(':')[2]} holds images without labels: sort them into a "
        "folder per class, or let the model's own answers stand for labels (--labels model)"
    )
    if not able:
        return f"{said}; these are too few or lack a class, so that no defense could work."
    return f"{said}, with which could work: {', '.join(able)}."


def _usable(
    subject: Subject, asked: Sequence[Any], question: Question, store: Store, device: str
) -> tuple[list[str], list[str]]:
    """Why each of the defenses asked cannot work here (empty where it can), and the others' names
    that can."""
    specs = [spec_of(method) for method in asked]
    named = {method.method_name for method in asked}
    free = [name for name in repairs() if name not in named and not _is_null(name)]
    if _is_folder(subject):  # whoever trains anew wants a training set, not somebody's pictures
        free = [name for name in free if not defenses.describe(name).traits.get("needs_share")]
    asking = {
        "specs": [*specs, *free],
        "recipe": question.recipe,
        "clean_share": question.clean_share,
    }
    answer, _ = ask(
        subject, "usable", asking, store, clean_share=question.clean_share, device=device
    )
    reasons: dict[str, str] = answer["reasons"]
    return [reasons[spec] for spec in specs], [name for name in free if not reasons[name]]


def _is_null(name: str) -> bool:
    return bool(defenses.describe(name).traits.get("null", False))


def _hint(others: Sequence[str]) -> str:
    if not others:
        return "No other defense can work with these images either."
    return f"With these images and this model could work: {', '.join(others)}."


def _is_folder(subject: Subject) -> bool:
    return subject.data.name.startswith("imagefolder:")


def held_out(subject: Subject) -> Images:
    """Clean images that no repair is given. Raises BadInput where there are none."""
    data = subject.data
    held = data.val
    if _is_folder(subject):  # nobody publishes figures on its test images
        held = Images(torch.cat([data.val.x, data.test.x]), torch.cat([data.val.y, data.test.y]))
    if not len(held):
        raise BadInput(f"{data.name} has no image to judge repairs on; give more images.")
    return held


def _examined(subject: Subject, held: Images, question: Question) -> Dataset | None:
    """Data with the images held out as the clean set that the scanner searches on, where each class
    has as many as it wants; None: it has the repairs' own."""
    if question.scanner is None:
        return None
    classes = subject.data.num_classes
    fewest = int(held.y.bincount(minlength=classes).min())
    scanner = defenses.build(question.scanner, question.recipe)
    wanted = getattr(scanner, "samples", 0) / max(1, classes - 1)
    if fewest < max(wanted, _LEAST_SCANNED):
        return None
    return replace(subject.data, train=held)


def _doubt(subject: Subject, accuracy: float, held: int, max_drop: float) -> str:
    """Why nothing can be recommended, whatever the repairs have made; empty: it can.

    Who allows any drop takes what there is.
    """
    if max_drop >= 1:
        return ""
    if max_drop and held * max_drop < 1:
        return (
            f"accuracy on {held} images cannot tell a drop of {100 * max_drop:g} points, since one "
            f"image is {100 / held:.1f}; give more images, or allow more with --max-drop"
        )
    classes = subject.data.num_classes
    if accuracy <= 1 / classes and not subject.self_labelled:
        return (
            f"the model is right on {100 * accuracy:.1f} % of the images, no better than guessing "
            f"among {classes} classes: are the classes in the order that it was trained on (those "
            "of a folder are in the order of their names), and the images of its kind?"
        )
    return ""


@dataclass(frozen=True)
class _Judge:
    """Asked what a model is worth, before and after."""

    question: Question
    store: Store
    device: str
    held: Images  # images that accuracy is measured on
    examined: Dataset | None  # data whose training images the scanner has; None: the repairs' own

    @property
    def looked_at(self) -> str | None:
        """The images that a scanner has: `others` than the repairs', or the `same`."""
        if self.question.scanner is None:
            return None
        return "same" if self.examined is None else "others"

    def __call__(self, subject: Subject) -> dict[str, Any]:
        question, share = self.question, self.question.clean_share
        model = subject.model.to(self.device)
        found: dict[str, Any] = {"accuracy": training.accuracy(model, self.held)}
        model.cpu()
        if question.scanner is None:
            return found
        if self.examined is not None:
            subject, share = replace(subject, data=self.examined, poisoned=None), 1.0
        verdict, _ = scanning.scan(
            subject, question.scanner, self.store,
            clean_share=share, recipe=question.recipe, device=self.device,
        )  # fmt: skip
        kept = ("backdoored", "score", "threshold", "target", "target_name", "victim")
        return found | {"scan": {name: verdict[name] for name in (*kept, "victim_name")}}


def recommended(
    before: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], max_drop: float
) -> tuple[str | None, str]:
    """The defense to take, and why; None where none is to be recommended.

    Of the repairs that cost at most `max_drop`, those that the scanner finds nothing in; of these
    the one that the scanner finds least suspicious, where it was suspicious before, else the most
    accurate.
    """
    cheap = [
        row for row in rows if row["status"] == "ok" and row["accuracy_drop"] <= max_drop + 1e-9
    ]
    if not cheap:
        return None, f"every repair costs more than {100 * max_drop:g} points of accuracy"
    if "scan" not in before:
        best = max(cheap, key=lambda row: float(row["accuracy"]))
        return best["defense"], (
            "it costs least accuracy; without --scan nothing is known of what it removed"
        )
    clear = [row for row in cheap if not row["scan"]["backdoored"]]
    if not clear:
        return None, "the scanner still suspects a backdoor after every repair that costs little"
    if not before["scan"]["backdoored"]:
        best = max(clear, key=lambda row: float(row["accuracy"]))
        return best["defense"], (
            "the scanner suspected nothing before; it costs least accuracy, and no repair may be "
            "needed"
        )
    best = min(clear, key=lambda row: float(row["scan"]["score"]))
    return best["defense"], "the scanner's suspicion is gone, and lowest of all repairs"
