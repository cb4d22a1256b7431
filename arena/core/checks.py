"""Self-suspicion: flags on a row, each with its meaning and its remedy.

Thresholds are the arena's own conventions, the same for every method; none was fitted to a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ESTABLISHED_ASR = 0.80  # an attack below this did not work
ESTABLISHED_DROP = 0.05  # nor did one that costs more clean accuracy than this
COLLAPSED_DROP = 0.10  # a repair that costs more is no repair
HARM_DROP = 0.05  # what a repair may cost a healthy model
DESTROYED_SHARE = 0.5  # of the clean twin's accuracy must survive the trigger
CLEAN_ASR = 0.2  # triggered images that a clean model sends to the target by itself


@dataclass(frozen=True)
class Flag:
    name: str
    meaning: str
    remedy: str


FLAGS = {
    flag.name: flag
    for flag in (
        Flag(
            "not_established",
            "The attack did not work: ASR below 80 %, or more than 5 points below the clean twin.",
            "Poison more, train longer, or read this cell as a test of the attack alone.",
        ),
        Flag(
            "collapsed",
            "The repair cost more than 10 points of accuracy, or most images now get one class.",
            "A low ASR means nothing here; lower the learning rate or prune less.",
        ),
        Flag(
            "harms_clean_twin",
            "The same defense costs a healthy model more than 5 points of accuracy.",
            "Whoever cannot know whether a model is backdoored pays this price for nothing.",
        ),
        Flag(
            "destroys_images",
            "A clean model loses half of its accuracy on the triggered images.",
            "The trigger destroys the image; weaken it, since such images are no backdoor.",
        ),
        Flag(
            "clean_model_falls",
            "A clean model sends over 20 % of the triggered images to the target.",
            "The ASR is not the backdoor's alone; subtract this share or change the trigger.",
        ),
        Flag(
            "not_recovered",
            "ASR fell by over 50 points, but triggered images did not get their true class back.",
            "The backdoor's target moved or the model fails on such images; look at RA.",
        ),
        Flag(
            "probabilities",
            "The model seems to return probabilities, not logits.",
            "Take the softmax out of the network: losses and margins assume logits.",
        ),
        Flag(
            "not_repeatable",
            "Two passes over the same images gave different answers.",
            "Evaluation must be deterministic; look for dropout or noise at test time.",
        ),
        Flag(
            "null_moved",
            "The null defense `none` changed a figure.",
            "The referee is at fault, not the method; please report it.",
        ),
    )
}


def status(metrics: Mapping[str, float | None], top_class_share: float, classes: int) -> str:
    """ok, not_established or collapsed, from a cell's metrics.

    top_class_share: share of clean test images given the most frequent answer, in [0, 1].
    """
    acc, before, asr = metrics["acc"], metrics["acc_before"], metrics["asr_before"]
    twin = metrics.get("clean_twin_acc")
    assert acc is not None
    assert before is not None
    if asr is not None and (
        asr < ESTABLISHED_ASR or (twin is not None and before < twin - ESTABLISHED_DROP)
    ):
        return "not_established"
    if acc < before - COLLAPSED_DROP or (classes > 2 and top_class_share > 0.5):
        return "collapsed"
    return "ok"


def flags(
    metrics: Mapping[str, float | None],
    state: str,
    *,
    null_defense: bool = False,
    probabilities: bool = False,
    repeatable: bool = True,
) -> list[Flag]:
    """The flags that a cell raises, in a fixed order."""

    def over(name: str, bound: float) -> bool:
        value = metrics.get(name)
        return value is not None and value > bound

    def fell(before: str, after: str) -> float:
        one, two = metrics.get(before), metrics.get(after)
        return 0.0 if one is None or two is None else one - two

    twin_acc, twin_ra = metrics.get("clean_twin_acc"), metrics.get("clean_twin_ra")
    raised = {
        "not_established": state == "not_established",
        "collapsed": state == "collapsed",
        "harms_clean_twin": over("twin_acc_drop", HARM_DROP),
        "destroys_images": twin_acc is not None
        and twin_ra is not None
        and twin_ra < DESTROYED_SHARE * twin_acc,
        "clean_model_falls": over("clean_twin_asr", CLEAN_ASR),
        "not_recovered": fell("asr_before", "asr") > 0.5 and -fell("ra_before", "ra") < 0.25,
        "probabilities": probabilities,
        "not_repeatable": not repeatable,
        "null_moved": null_defense
        and any(fell(f"{name}_before", name) for name in ("acc", "asr", "ra")),
    }
    return [FLAGS[name] for name, up in raised.items() if up]
