"""Stimulation of neurons: which inner channel, raised, sends images to which class.

A backdoor's neuron moves all images to one class, however they look; `stimulated` finds such
channels, and a `Driver` makes the engine look for triggers that raise them.

Source: Liu et al. 2019, ABS (Artificial Brain Stimulation), CCS, section 4, and its published code:
    a channel's whole map is set to values up to a multiple of the layer's largest activation; the
    label that gains most on almost all images is the neuron's, its lead over the second the score.
Departs: where a batch norm stands behind a convolution (of as many channels), its output is the
    layer: before the norm, zero would not mean silence. Sums at the ends of residual blocks are no
    layers unless a norm follows. Labels need N - 2 of N images, as in the code for ten, from 30
    images on nine tenths; as in the code for TrojAI, the score leaves the others out. Sums over
    images and pixels are means, divided by the layer's largest activation, so that weights do not
    depend on layer and resolution.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arena.core import training
from arena.core.contracts import Images
from arena.core.inversion.engine import Problem, State
from arena.core.inversion.frozen import Frozen, channels_second
from arena.core.progress import report
from arena.core.registry import BadInput
from arena.core.seeding import stream

SEEDS = 10  # images that neurons are stimulated on, where there are no more classes
_PIXELS = 512 * 32 * 32  # of the images in one pass


class Layer(NamedTuple):
    name: str  # of a module of the network's body
    channels: int
    largest: float  # activation after ReLU on the seed images


class Neuron(NamedTuple):
    layer: int  # place among the layers
    channel: int
    label: int  # class that it sends images to
    score: float  # its lead there


@dataclass(frozen=True, eq=False)
class Stimulation:
    """What stimulating every neuron (M of them) did."""

    layers: tuple[Layer, ...]
    layer: Tensor  # (M,) int64: place among the layers
    channel: Tensor  # (M,) int64
    elected: Tensor  # (M,) int64: the label that gained most on almost all images; -1: none
    score: Tensor  # (M,): its smallest lead, of images of other classes that elect it; -inf: none
    lead: Tensor  # (M, classes): each label's mean lead over the images of other classes

    def candidates(
        self, top: int = 20, first: int = 10, per_layer: int = 3, per_label: int = 0
    ) -> list[Neuron]:
        """Neurons with a label: the `first` best with so many per layer, then the best left; of
        each label `per_label` go before all others: its best, then that of the deepest layer, of
        the next before it, and so on."""
        order = [m for m in self._sorted(self.score) if self.elected[m] >= 0]
        chosen: list[int] = []
        counts = [0] * len(self.layers)
        for place in order:
            if len(chosen) < first and counts[int(self.layer[place])] < per_layer:
                counts[int(self.layer[place])] += 1
                chosen.append(place)
        ahead = set(chosen)
        chosen += [place for place in order if place not in ahead]
        if per_label:
            ahead = self._spread(chosen, per_label)
            chosen.sort(key=lambda place: place not in ahead)  # stable
        return [self._neuron(m, int(self.elected[m]), self.score) for m in chosen[:top]]

    def _spread(self, order: Sequence[int], count: int) -> set[int]:
        """Of neurons in an order, `count` of each label: its first, then its first in the deepest
        layer, in the next before it, and so on, then the rest."""
        of_label: dict[int, list[int]] = {}
        for place in order:
            of_label.setdefault(int(self.elected[place]), []).append(place)
        spread: set[int] = set()
        for own in of_label.values():
            firsts: dict[int, int] = {}
            for place in own:
                firsts.setdefault(int(self.layer[place]), place)
            deepest = [firsts[layer] for layer in sorted(firsts, reverse=True)]
            spread.update(list(dict.fromkeys([own[0], *deepest, *own]))[:count])
        return spread

    def ranked(self, label: int) -> list[Neuron]:
        """All neurons for a label: those that elected it by score, the rest by their mean lead."""
        own = (self.elected == label) & (self.score > -torch.inf)
        lead = self.lead[:, label]
        after = lead.masked_fill(own, -torch.inf)
        first = [m for m in self._sorted(self.score) if own[m]]
        rest = [m for m in self._sorted(after) if not own[m]]
        return [self._neuron(m, label, self.score) for m in first] + [
            self._neuron(m, label, lead) for m in rest
        ]

    def problem(self, neuron: Neuron) -> Problem:
        """The universal problem that a Driver raises this neuron for."""
        places = [one[:2] for one in self.ranked(neuron.label)]
        return Problem(None, neuron.label, places.index(neuron[:2]))

    def _sorted(self, values: Tensor) -> list[int]:
        return [int(m) for m in values.argsort(descending=True, stable=True)]

    def _neuron(self, place: int, label: int, score: Tensor) -> Neuron:
        return Neuron(int(self.layer[place]), int(self.channel[place]), label, float(score[place]))


def seeds_of(y: Tensor, count: int, seed: int) -> Tensor:
    """Rows of at least `count` images, evenly of all classes and one of each. y: (N,) int64."""
    ranks = torch.empty(len(y), dtype=torch.int64)
    for label in y.unique().tolist():
        own = (y == label).nonzero().flatten()
        ranks[own] = torch.randperm(len(own), generator=stream(seed, "stimulated images", label))
    order = (ranks * (int(y.max()) + 1) + y).argsort()
    return order[: max(count, len(y.unique()))]


def analysed(model: Frozen, images: Images, seed: int, count: int = SEEDS) -> Stimulation:
    """`stimulated` on a few of `images` (uint8)."""
    few = images.take(seeds_of(images.y.cpu(), count, seed).to(images.y.device))
    return stimulated(model, training.to_float(few.x.to(model.device)), few.y)


@torch.no_grad()
def stimulated(
    model: Frozen,
    x: Tensor,
    y: Tensor,
    *,
    values: int = 5,
    k: float = 8.0,
    batch: int | None = None,
) -> Stimulation:
    """Sets every channel to i * k / values of its layer's largest activation, i < values.

    x: (N, C, H, W) float32 in [0, 1] on the model's device; y: (N,) their classes; batch: images
    per pass. Raises BadInput for a network that has no layer but the one of its logits.
    """
    y = y.to(x.device)
    size = batch or max(1, _PIXELS // x[0, 0].numel())
    layers = layers_of(model, x, size)
    if not layers:
        raise BadInput("This network has no inner convolution or linear layer to stimulate.")
    whole, done = sum(layer.channels for layer in layers), 0
    group = max(1, size // (values * len(x)))  # channels whose logits are held at once
    parts: list[tuple[Tensor, ...]] = []
    for layer in layers:
        levels = torch.arange(values, device=x.device) * (k * layer.largest / values)
        for channels in torch.arange(layer.channels, device=x.device).split(group):
            items = torch.arange(len(channels) * values * len(x), device=x.device)
            answers = []
            for few in items.split(size):
                image, level = few % len(x), few // len(x) % values
                channel = channels[few // len(x) // values]
                answers.append(_raised(model, layer.name, x[image], channel, levels[level]))
            logits = torch.cat(answers).view(len(channels), values, len(x), -1)
            parts.append(_elected(logits[:, 1:].amax(1) - logits[:, 0], y))
            done += len(channels)
            report("stimulating neurons", done, whole)
    elected, score, lead = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Stimulation(
        layers=tuple(layers),
        layer=torch.tensor([i for i, layer in enumerate(layers) for _ in range(layer.channels)]),
        channel=torch.cat([torch.arange(layer.channels) for layer in layers]),
        elected=elected,
        score=score,
        lead=lead,
    )


def layers_of(model: Frozen, x: Tensor, batch: int) -> list[Layer]:
    """Layers whose neurons can be stimulated, as they are executed; not that of the logits."""
    calls: list[nn.Module] = []
    largest: dict[nn.Module, float] = {}
    channels: dict[nn.Module, int] = {}

    def hook(module: nn.Module, args: object, out: Tensor) -> None:
        calls.append(module)
        largest[module] = max(0.0, float(out.max()), largest.get(module, 0.0))
        channels[module] = channels_second(module, out).shape[1]

    names: dict[nn.Module, str] = {
        module: name
        for name, module in model.body.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))
    }
    handles = [module.register_forward_hook(hook) for module in names]
    try:
        for part in x.split(batch):
            calls.clear()
            model(part)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for module, after in zip(calls, [*calls[1:], None], strict=True):
        norm = isinstance(after, nn.BatchNorm2d) and channels[after] == channels[module]
        if not (norm and isinstance(module, nn.Conv2d)):
            found.append(module)
    return [
        Layer(names[module], channels[module], largest[module])
        for module in found[:-1]
        if largest[module] > 0 and calls.count(module) == 1
    ]


def _raised(model: Frozen, layer: str, x: Tensor, channels: Tensor, levels: Tensor) -> Tensor:
    """Logits of images (N, C, H, W), each with one channel of the layer set to a level."""

    def hook(module: nn.Module, args: object, out: Tensor) -> Tensor:
        changed = out.clone()
        maps = channels_second(module, changed)
        rows = torch.arange(len(x), device=x.device)
        maps[rows, channels] = levels.to(out.dtype).view(-1, *[1] * (maps.ndim - 2))
        return changed

    handle = model.body.get_submodule(layer).register_forward_hook(hook)
    try:
        return model(x)
    finally:
        handle.remove()


def _elected(gains: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (G,), scores (G,) and leads (G, classes) from gains (G, N, classes).

    An image of a label's own class says nothing about it. As in the published code, neither do
    images where another label gains more, of which there are few.
    """
    count, classes = gains.shape[1:]
    top = gains.topk(2, 2)
    best = top.indices[..., :1]
    rival = top.values[..., :1].expand_as(gains).scatter(2, best, top.values[..., 1:])
    margin = gains - rival
    wins = torch.zeros_like(gains, dtype=torch.bool).scatter(2, best, True)
    others = y[:, None] != torch.arange(classes, device=y.device)
    votes, label = wins.sum(1).max(1)
    least = margin.masked_fill(~(wins & others), torch.inf).amin(1).gather(1, label[:, None])[:, 0]
    agreed = (votes >= count - max(2, count // 10)) & least.isfinite() & (least > 0)
    lead = (margin * others).sum(1) / others.sum(0).clamp_min(1)
    return torch.where(agreed, label, -1), torch.where(agreed, least, -torch.inf), lead


class Driver:
    """A guide: every problem raises one neuron of its target, the restart's by rank.

    others: weight of the layer's other channels, which are to stay down.
    """

    def __init__(self, found: Stimulation, problems: Sequence[Problem], others: float) -> None:
        self.found, self.others = found, others
        ranked = {target: found.ranked(target) for target in {p.target for p in problems}}
        self.neurons = {p: ranked[p.target][p.restart % len(found.layer)] for p in problems}
        self.places = sorted({neuron.layer for neuron in self.neurons.values()})

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.found.layers[place].name for place in self.places)

    def assigned(self, problem: Problem) -> State:
        neuron = self.neurons[problem]
        return {
            "_layer": torch.tensor(neuron.layer),
            "_channel": torch.tensor(neuron.channel),
            "_largest": torch.tensor(self.found.layers[neuron.layer].largest),
        }

    def drive(self, at: State, outputs: Mapping[str, Tensor]) -> Tensor:
        """(K,): the neuron before and after ReLU, negative, and the layer's other channels."""
        total = torch.zeros_like(at["_largest"])
        for place, name in zip(self.places, self.layers, strict=True):
            out = outputs[name]
            spread = [1, *range(3, out.ndim)]  # images and pixels
            raised = (out + F.relu(out)).mean(spread, dtype=torch.float32)
            channel = at["_channel"].clamp(max=raised.shape[1] - 1)  # others have more channels
            neuron = raised.gather(1, channel[:, None])[:, 0]
            rest = raised.sum(1) - neuron
            each = (self.others * rest - neuron) / at["_largest"]
            total = torch.where(at["_layer"] == place, each, total)
        return total
