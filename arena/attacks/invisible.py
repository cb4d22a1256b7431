"""Invisible: a bit string hidden in each image by a network, or one small change for all images.

form=encoder: an encoder, trained with a decoder on the attacker's data, adds a residual that
carries one fixed secret and differs from image to image. form=universal: one additive perturbation
of small norm that excites a neuron of a network of the attacker's own.

Source: encoder: ISSBA, Li et al. 2021, https://arxiv.org/abs/2012.03816, in BackdoorBox's form for
    32x32 images (20 bits, loss weights); 10 % as in both. universal: Li et al. 2020 (TDSC),
    https://arxiv.org/abs/1909.02742.
Departs: the encoder is trained at the data's own resolution and through 8-bit rounding, where ISSBA
    and DECK take one made for 224x224 images; SSIM stands in for LPIPS, and there is no critic
    (arena.core.steganography says why). An encoder whose secrets cannot be read is reported, not
    refused: the victim need not read the bits, and an attack that does not work is marked as such.
    universal: a shrinking ball takes the place of a norm penalty, so that the bound is met; bound,
    steps and rates are ours, since, as PixelBackdoor's authors found too, the paper gives few. The
    neuron is the one that speaks most for the target. The paper's other form, a text in the lowest
    bits, is not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core import adversarial, perturbation, steganography
from arena.core.contracts import Images, Poisoned, Trigger
from arena.core.poisoning import check_classes, check_rate, dirty_label, scope
from arena.core.registry import BadInput, method, param
from arena.core.triggers import Add

_ONLY_FOR = {
    "bits": "encoder",
    "updates": "encoder",
    "secret_updates": "encoder",
    "l2_weight": "encoder",
    "perceptual_weight": "encoder",
    "secret_weight": "encoder",
    "norm": "universal",
    "bound": "universal",
    "neuron": "universal",
    "steps": "universal",
    "surrogate": "universal",
    "surrogate_epochs": "universal",
    "surrogate_updates": "universal",
}


@method
class Invisible:
    """The secret, or the noise that the perturbation starts from, is drawn once per victim."""

    threat: ClassVar[str] = "poisons data"
    scopes: ClassVar[tuple[str, ...]] = ("universal", "label-specific")
    labels: ClassVar[str] = "changed"
    trigger_kind: ClassVar[str] = "dynamic"  # of the default form

    target: int = param(0, "class that the trigger forces", low=0)
    rate: float = param(
        0.1,
        "share of the training set that is poisoned; with a victim, share of the victim class",
        above=0,
        high=1,
        source="ISSBA",
    )
    form: str = param(
        "encoder",
        "encoder: a network hides a secret in each image; universal: one small change for all",
        choices=("encoder", "universal"),
        source="encoder: ISSBA; universal: Li et al. 2020",
    )
    bits: int = param(
        20,
        "encoder: length of the secret",
        low=1,
        source="BackdoorBox; ISSBA 100",
        under={"smoke": 3},
    )
    updates: int = param(
        2000, "encoder: updates of its training, 64 images each", low=1, under={"smoke": 4}
    )
    secret_updates: int = param(
        200,
        "encoder: first updates, in which only the secret counts",
        low=0,
        under={"smoke": 2},
    )
    l2_weight: float = param(
        2.0, "encoder: weight of the residual's mean square", low=0, source="BackdoorBox"
    )
    perceptual_weight: float = param(
        1.5, "encoder: weight of 1 - SSIM", low=0, source="BackdoorBox, for LPIPS"
    )
    secret_weight: float = param(
        1.5, "encoder: weight of the bits' cross-entropy", above=0, source="BackdoorBox"
    )
    norm: str = param(
        "l2",
        "universal: what is kept small: l2, the Euclidean norm; linf, the largest change of a "
        "value; l0, the number of pixels changed",
        choices=("l2", "linf", "l0"),
        source="Li et al. 2020",
    )
    bound: float | None = param(
        None,
        "universal: largest norm, of l2 and linf in 1/255; none: that of 4/255 everywhere, of l0 "
        "2 % of the pixels",
        above=0,
    )
    neuron: int | None = param(
        None,
        "universal: channel of the surrogate's deep level; none: the one with the largest weight "
        "for the target",
        low=0,
    )
    steps: int = param(500, "universal: steps of the search, 128 images each", low=1)
    surrogate: str = param("fastnet", "universal: network whose neuron is excited")
    surrogate_epochs: int = param(5, "universal: passes over the data in its training", low=1)
    surrogate_updates: int = param(
        300, "universal: least number of updates in its training: small sets get more passes", low=1
    )
    victim: int | None = param(
        None, "the only class that the trigger works on (label-specific); none: all classes", low=0
    )
    extend: bool = param(False, "append the poisoned copies and keep their originals")

    def __post_init__(self) -> None:
        for field in fields(self):
            form = _ONLY_FOR.get(field.name, self.form)
            if form != self.form and getattr(self, field.name) != field.default:
                raise BadInput(
                    f"invisible: {field.name} is only for form={form}, not form={self.form}."
                )
        if self.secret_updates > self.updates:
            raise BadInput(
                f"invisible: secret_updates must be at most updates, got {self.secret_updates} "
                f"of {self.updates}."
            )

    @property
    def scope(self) -> str:
        return scope(self)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        check_classes(self, counts)
        check_rate(self, counts, of="train" if self.victim is None else "candidates")
        if self.form == "universal":
            adversarial.check_surrogate("invisible", self.surrogate, shape)

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        if self.form == "universal":
            return Trigger(Add(self._perturbation(train, rng)))
        plan = steganography.Plan(
            bits=self.bits,
            updates=self.updates,
            secret_updates=self.secret_updates,
            l2_weight=self.l2_weight,
            perceptual_weight=self.perceptual_weight,
            secret_weight=self.secret_weight,
        )
        pair = steganography.steganograph(train, plan)
        return Trigger(Hide(pair.encoder, torch.randint(2, (self.bits,), generator=rng).float()))

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        return dirty_label(
            train, trigger, self.target, self.rate, rng,
            victim=self.victim,
            of="train" if self.victim is None else "candidates",
            extend=self.extend,
        )  # fmt: skip

    def _perturbation(self, train: Images, rng: Generator) -> Tensor:
        """(C, H, W) float32, in whole steps of 1/255."""
        model = adversarial.surrogate(
            self.surrogate, train, epochs=self.surrogate_epochs, updates=self.surrogate_updates
        )
        shape = model.spec.shape
        return perturbation.smallest_universal(
            model, train,
            perturbation.excitable_neuron(model, self.target) if self.neuron is None
            else self.neuron,
            norm=self.norm,
            bound=perturbation.default_bound(self.norm, shape) if self.bound is None
            else self.bound,
            steps=self.steps,
            rng=rng,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Hide:
    """The image map that hides one secret in each image."""

    encoder: steganography.Encoder  # frozen, in evaluation mode
    secret: Tensor  # (bits,) float32 of 0 and 1

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        encoder = self.encoder.to(x.device)
        secret = self.secret.to(x.device).expand(len(x), -1)
        with torch.autocast(x.device.type, enabled=False):  # else a batch would round otherwise
            residual = encoder(x, secret)
        return (x + residual).clamp_(0, 1)
