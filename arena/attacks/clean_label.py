"""Clean-label: images of the target class, made hard to recognise, carry grids in their corners.

PGD on a network of the attacker's own pushes the poisoned images away from their class, so that a
victim learns the grids instead; every label stays right. Test images carry the grids alone.

Source: Turner, Tsipras and Madry 2019, https://arxiv.org/abs/1912.02771, with their code for the
    grids; L-inf 8/255, target 3 and half of its images as in DECK; 100 steps of 1.5/255 as in
    BackdoorBox.
Departs: the grids stand in all four corners, as the paper has them for training with augmentation
    (the arena's recipes augment); its code's default is corners=bottom_right, without augmentation.
    Shifts cost much even so (CIFAR-10, fastnet, 5 epochs, one draw of poison: ASR 82 %, 100 %
    without them); --recipe fast:epochs=20,crop=0,flip=false has none, as its code by default.
    Upper grids are copies of the lower ones, as in that code. DECK speaks of a 2x2 grid at the top
    left, which its reference does not have: corners=top_left,size=2 takes four pixels of the 3x3
    one. The surrogate is a small network, trained adversarially for few epochs with examples of two
    steps, always in L-inf: trained on those of one step it may end with no robustness at all, and
    then the attack fails. Perturbed images are rounded to 8 bits towards the originals, so that the
    bound still holds. The paper's second way to make images hard, through a GAN, is not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Generator, Tensor

from arena.core import adversarial, poisoning
from arena.core.contracts import Images, Poisoned, Trigger
from arena.core.inversion.frozen import Frozen
from arena.core.progress import report
from arena.core.registry import BadInput, method, param
from arena.core.triggers import Add

_CORNERS = ("bottom_right", "bottom_left", "top_right", "top_left")
_GRID = ((-1, -1, 1), (-1, 1, -1), (1, -1, 1))  # at the right; those at the left are mirrored


@method
class CleanLabel:
    """The attacker changes pixels of target-class images and knows the data, not the victim."""

    threat: ClassVar[str] = "poisons data"
    scopes: ClassVar[tuple[str, ...]] = ("universal",)
    labels: ClassVar[str] = "kept"
    trigger_kind: ClassVar[str] = "static"
    keeps_labels: ClassVar[bool] = True

    target: int = param(3, "class that the trigger forces", low=0, source="DECK; Turner et al. 0")
    rate: float = param(
        0.5,
        "poisoned share of the target class",
        above=0,
        high=1,
        source="DECK; Turner et al.'s code 1, BackdoorBox 0.25",
    )
    norm: str = param(
        "linf",
        "what bounds the perturbation: linf, the largest change of a value; l2, the Euclidean norm",
        choices=("linf", "l2"),
        source="linf: DECK",
    )
    eps: float | None = param(
        None,
        "radius of the perturbation in 1/255; none: 8 for linf, that is 8/255 in images of [0, 1], "
        "and 300 for l2, that is 300/255",
        above=0,
        source="8: DECK; 300: Turner et al.'s code",
    )
    step: float | None = param(
        None, "length of a PGD step in 1/255; none: 3/16 of eps", above=0, source="BackdoorBox"
    )
    steps: int = param(
        100,
        "PGD steps; 0: none, not even the random start",
        low=0,
        source="BackdoorBox",
        under={"smoke": 2},
    )
    corners: str = param(
        "four",
        "which corners carry a grid",
        choices=("four", "bottom_right", "bottom_left", "top_right", "top_left"),
        source="four: Turner et al., with augmentation",
    )
    size: int = param(
        3, "side of a grid in px; 2: the four pixels at the foot of the 3x3 one", low=2, high=3
    )
    amplitude: int = param(
        255,
        "what is added to bright and taken from dark pixels, in 1/255, then clipped; 255: they "
        "become white and black",
        low=1,
        high=255,
        source="255; Turner et al. also less, such as 32",
    )
    surrogate: str = param(
        "fastnet_robust",
        "network on which the images are perturbed",
        under={"smoke": "fastnet_tiny"},
    )
    surrogate_epochs: int = param(
        8, "passes over the data in its training", low=1, under={"smoke": 1}
    )
    surrogate_updates: int = param(
        300,
        "least number of updates in its training: small sets get more passes",
        low=1,
        under={"smoke": 1},
    )
    surrogate_eps: float = param(
        8.0, "L-inf radius of the examples that it is trained on, in 1/255", above=0
    )
    surrogate_steps: int = param(
        2, "steps per example that it is trained on; 0: it is trained on plain images", low=0
    )

    @property
    def scope(self) -> str:
        return poisoning.scope(self)

    def check(self, shape: tuple[int, int, int], counts: Sequence[int]) -> None:
        poisoning.check_classes(self, counts)
        poisoning.check_rate(self, counts)
        room = 2 * self.size if self.corners == "four" else self.size
        if min(shape[1:]) < room:
            raise BadInput(
                f"clean_label: the grids need images of {room} px a side and more, these are "
                f"{shape[1]}x{shape[2]} px."
            )
        if self.steps:
            adversarial.check_surrogate("clean_label", self.surrogate, shape)

    def prepare(self, train: Images, rng: Generator) -> Trigger:
        height, width = train.x.shape[2:]
        return Trigger(Add(self._signs(height, width) * (self.amplitude / 255)))

    def poison(self, train: Images, trigger: Trigger, rng: Generator) -> Poisoned:
        if not self.steps:
            return poisoning.clean_label(train, trigger, self.target, self.rate, rng)
        model = self._surrogate(train)
        candidates = int((train.y == self.target).sum())
        done, total = 0, poisoning.how_many(self.rate, candidates, candidates)

        def craft(x: Tensor) -> Tensor:  # draws: it lives no longer than this poisoning
            nonlocal done
            out = trigger.stamp(self._hard(model, x, rng))
            done += len(x)
            report("perturbing images", done, total)
            return out

        return poisoning.clean_label(train, Trigger(craft), self.target, self.rate, rng)

    def _hard(self, model: Frozen, x: Tensor, rng: Generator) -> Tensor:
        """Images of the target class, float in [0, 1], after PGD away from it, at 8 bits."""
        default = 8.0 if self.norm == "linf" else 300.0
        eps = (default if self.eps is None else self.eps) / 255
        hard = adversarial.pgd(
            model, x, torch.full((len(x),), self.target, device=x.device),
            norm=self.norm,
            eps=eps,
            step=3 / 16 * eps if self.step is None else self.step / 255,
            steps=self.steps,
            rng=rng,
        )  # fmt: skip
        return x + adversarial.to_levels(hard - x)

    def _signs(self, height: int, width: int) -> Tensor:
        """(1, height, width) float32: 1 where the grids are bright, -1 where dark, 0 elsewhere."""
        right = torch.tensor(_GRID, dtype=torch.float32)[-self.size :, -self.size :]
        signs = torch.zeros(1, height, width)
        for corner in _CORNERS if self.corners == "four" else (self.corners,):
            rows = slice(self.size) if corner.startswith("top") else slice(-self.size, None)
            columns = slice(self.size) if corner.endswith("left") else slice(-self.size, None)
            signs[0, rows, columns] = right.flip(1) if corner.endswith("left") else right
        return signs

    def _surrogate(self, train: Images) -> Frozen:
        model = adversarial.surrogate(
            self.surrogate, train,
            epochs=self.surrogate_epochs,
            updates=self.surrogate_updates,
            eps=self.surrogate_eps / 255 if self.surrogate_steps else 0.0,
            steps=self.surrogate_steps,
        )  # fmt: skip
        return Frozen(model)  # twice as fast, over a hundred steps
