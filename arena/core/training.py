"""The one trainer: `fit` trains victims, twins and every defense that needs training.

Whole batches are augmented on the device, convolutions run in bf16 where the hardware has it, and
nothing in the loop waits for the host. On the CPU the same generator gives the same weights bit
for bit (for one number of threads); a run that was stopped and resumed gives them too, since each
epoch draws from a stream of its own.

Source of the recipes: the CIFAR-10 speed-run literature (Page 2018; Jordan 2024, arXiv 2404.00498:
triangular schedule, Nesterov momentum, alternating flip, raised bias rate, lookahead averaging)
for `fast`; He et al. 2016 (arXiv 1512.03385) for `paper`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from arena.core.contracts import BatchHook, Images, LossHook, Step
from arena.core.progress import report
from arena.core.registry import BadInput, nearest
from arena.core.seeding import draw_seed, stream

if TYPE_CHECKING:
    from arena.core.models import Classifier

CHOICES = {
    "schedule": ("triangle", "cosine", "steps", "constant"),
    "border": ("reflect", "zero"),
}


@dataclass(frozen=True)
class Recipe:
    """How to train. Rates are for a loss averaged over the batch."""

    epochs: int = 12  # passes over the training set
    min_steps: int = 0  # small sets get more epochs, until at least so many updates were made
    batch: int = 512  # images per update; a smaller set lowers it
    lr: float = 0.4  # peak learning rate
    momentum: float = 0.9  # Nesterov
    weight_decay: float = 5e-4  # on everything that is trained
    label_smoothing: float = 0.1  # in [0, 1)
    schedule: str = "triangle"  # triangle: linear up, linear down; cosine; steps: x0.1; constant
    warmup: float = 0.2  # share of the run that the rate rises, in [0, 1)
    start_lr: float = 0.2  # first rate as a share of the peak
    final_lr: float = 0.0  # last rate as a share of the peak
    drop_at: tuple[float, ...] = (0.5, 0.75)  # shares of the run at which `steps` divides by ten
    bias_lr: float = 1.0  # factor on the rate of batch-norm biases (decay stays as it is)
    crop: int = 4  # random shift in pixels; 0: none
    border: str = "reflect"  # what a shift brings in at the edge: the mirror image, or zero
    flip: bool = True  # horizontal; every image alternates from epoch to epoch
    cutout: int = 0  # side of a square hole in pixels; 0: none
    average: bool = False  # lookahead: every 5 updates, pull the weights to their slow average

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise BadInput(f"A recipe's {name} cannot be {value!r}; {nearest(value, choices)}.")


SPEEDRUN: Mapping[str, object] = {  # for networks of arena.core.networks.fastnet
    "epochs": 5,
    "lr": 0.75,
    "momentum": 0.85,
    "weight_decay": 2.66e-3,
    "label_smoothing": 0.2,
    "warmup": 0.23,
    "final_lr": 0.07,
    "bias_lr": 64.0,
    "crop": 2,
    "average": True,
}

RECIPES: dict[str, Recipe] = {
    "smoke": Recipe(epochs=1, min_steps=60, batch=128, lr=0.2, crop=2),
    "fast": Recipe(min_steps=300, average=True),
    "paper": Recipe(
        epochs=200,
        batch=128,
        lr=0.1,
        label_smoothing=0.0,
        schedule="steps",
        warmup=0.0,
        start_lr=1.0,
    ),
}


def recipe(name: str, overrides: Mapping[str, object] | None = None) -> Recipe:
    """The named recipe with the network's own settings in it. Raises BadInput on another name."""
    if name not in RECIPES:
        raise BadInput(f"There is no recipe {name!r}; {nearest(name, RECIPES)}.")
    return replace(RECIPES[name], **dict(overrides or {}))  # type: ignore[arg-type]


def finetuning(
    *,
    epochs: int,
    lr: float,
    decay_every: int,
    batch: int,
    momentum: float,
    weight_decay: float,
    crop: int,
    cutout: int,
) -> Recipe:
    """The fine-tuning of NAD: the rate is divided by ten every `decay_every` epochs.

    Source: Li et al. 2021, arXiv 2101.05930; DECK and MOTH fine-tune alike.
    """
    return Recipe(
        epochs=epochs,
        batch=batch,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        label_smoothing=0.0,
        schedule="steps",
        warmup=0.0,
        drop_at=tuple(epoch / epochs for epoch in range(decay_every, epochs, decay_every)),
        crop=crop,
        border="zero",
        cutout=cutout,
    )


def changed(plan: Recipe, changes: Mapping[str, object]) -> Recipe:
    """`plan` with some fields replaced. Raises BadInput on a field that no recipe has."""
    known = {f.name for f in fields(Recipe)}
    for name in changes:
        if name not in known:
            raise BadInput(f"A recipe has no field {name!r}; {nearest(name, known)}.")
    return replace(plan, **changes)  # type: ignore[arg-type]


class Checkpoint(Protocol):
    """Where a long training keeps its state between epochs.

    `save` is handed the live tensors: it must copy or write them before it returns.
    """

    def load(self) -> dict[str, Any] | None: ...
    def save(self, state: dict[str, Any]) -> None: ...


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 convolutions are fast there: CUDA from Ampere on, CPUs with AVX512-bf16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        return bool(supported())
    return False


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 where the hardware has it, else nothing."""
    if has_bf16(device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def to_float(x: Tensor) -> Tensor:
    """uint8 in [0, 255] -> float32 in [0, 1]."""
    return x.to(torch.float32, copy=True).div_(255)


def split(images: Images, share: float, rng: Generator) -> tuple[Images, Images]:
    """Two disjoint random parts, the first with round(share * N) images."""
    order = torch.randperm(len(images), generator=rng).to(images.y.device)
    cut = round(share * len(images))
    return images.take(order[:cut]), images.take(order[cut:])


def check_clean(clean: Images, model: Classifier) -> None:
    """Raise BadInput unless `clean` has images of the model's shape, and of every class."""
    _, classes, shape = model.spec
    if tuple(clean.x.shape[1:]) != tuple(shape):
        given, wanted = ("x".join(map(str, s)) for s in (clean.x.shape[1:], shape))
        raise BadInput(f"The clean images are {given}, but the model takes {wanted}.")
    counts = torch.bincount(clean.y.cpu(), minlength=classes)
    if len(counts) > classes:
        raise BadInput(f"The clean set has class {len(counts) - 1}, the model only {classes}.")
    if missing := (counts == 0).nonzero().flatten().tolist():
        raise BadInput(
            f"The clean set of {len(clean)} images has none of class {missing[0]}; "
            f"give it at least one of each of the {classes} classes."
        )


def check_held_out(
    clean: Images, share: float, method: str, mend: str = "give more images or another held_out"
) -> None:
    """Raise BadInput unless `split` leaves an image to hold out (where share > 0) and two more."""
    held = round(share * len(clean))
    if (share > 0 and not held) or len(clean) - held < 2:
        raise BadInput(
            f"{method}: of {len(clean)} clean images {held} would be held out and "
            f"{len(clean) - held} trained on; {mend}."
        )


@torch.no_grad()
def logits(model: nn.Module, x: Tensor, batch: int = 1000) -> Tensor:
    """Model outputs in evaluation mode. x: (N, C, H, W) uint8 or float -> (N, classes) float32.

    Every module's training mode is given back as it was. Raises ValueError where N is 0.
    """
    if len(x) == 0:
        raise ValueError("there are no images to classify")
    device = device_of(model)
    with evaluating(model), autocast(device):
        parts = [model(_prepare(part, device)).float() for part in x.split(batch)]
    return torch.cat(parts)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module leaves in the mode in which it came."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def accuracy(model: nn.Module, images: Images, batch: int = 1000) -> float:
    """Share of `images` given their label, in [0, 1]."""
    y = images.y.to(device_of(model))
    return float((logits(model, images.x, batch).argmax(1) == y).double().mean())


def _prepare(x: Tensor, device: torch.device) -> Tensor:
    x = x.to(device, non_blocking=True)
    x = to_float(x) if x.dtype == torch.uint8 else x
    return x.contiguous(memory_format=torch.channels_last)


def fit(
    model: nn.Module,
    data: Images,
    plan: Recipe,
    rng: Generator,
    *,
    on_image: BatchHook | None = None,
    on_batch: BatchHook | None = None,
    extra_loss: LossHook | None = None,
    levels: Sequence[str] = (),
    also: Sequence[torch.optim.Optimizer] = (),
    carry: Mapping[str, Any] | None = None,
    checkpoint: Checkpoint | None = None,
    what: str = "training",
) -> nn.Module:
    """Train `model` in place on its device and return it in evaluation mode.

    data: uint8 images (N, C, H, W); moved to the device whole when they fit there.
    on_image: changes each float batch before augmentation, so that what it stamps is shifted and
        mirrored as stored images are. Both hooks see the images' rows in `data`, keep the batch's
        size, and draw only from the generator that they are handed.
    on_batch: changes each float batch after augmentation.
    extra_loss: adds a scalar to the cross-entropy; it sees the outputs of `levels` (feature
        levels of a Classifier) in the very pass that made the logits.
    also: optimisers of the caller, zeroed before and stepped after every backward pass.
    carry: objects of the caller with `state_dict`/`load_state_dict` (a generator network, its
        optimiser) that change during training and must survive a resumption.
    checkpoint: the state after each epoch is kept there, and read from there at the start.
    Raises ValueError on fewer than 2 images and on float ones, FloatingPointError when the loss is
    no longer finite.
    """
    if data.x.dtype != torch.uint8:
        raise ValueError(f"training needs uint8 images, got {data.x.dtype}")
    if len(data) < 2:
        raise ValueError(f"training needs at least 2 images, got {len(data)}")
    seed = draw_seed(rng)
    device = device_of(model)
    batch = min(plan.batch, len(data))
    steps = len(data) // batch  # the last, smaller batch is left out: it would upset batch norm
    epochs = max(plan.epochs, math.ceil(plan.min_steps / steps))
    model.to(memory_format=torch.channels_last)
    optimizer = _optimizer(model, plan, device)
    slow = _Lookahead(model, epochs * steps) if plan.average else None
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, **(carry or {})}
    if slow is not None:
        parts["slow"] = slow

    first = 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        first = int(state["epoch"])
        for name, part in parts.items():
            part.load_state_dict(state[name])
        for weights, kept in optimizer.state.items():  # fused SGD wants both in one memory layout
            kept["momentum_buffer"] = torch.empty_like(weights).copy_(kept["momentum_buffer"])
    if first == epochs:
        return model.eval()
    images = _Augmented(data, plan, seed, device, on_image)
    seen: dict[str, Tensor] = {}
    model.train()
    for epoch in range(first, epochs):
        draws = stream(seed, "steps", epoch)
        running = torch.zeros((), device=device)
        for step, shown in enumerate(images.epoch(epoch, batch, draws), start=epoch * steps):
            _set_rate(optimizer, _rate(plan, step, epochs * steps))
            if on_batch is not None:
                shown = _same_size(on_batch(shown, draws), len(shown))
            with autocast(device), _watched(model, levels, seen):
                out = model(shown.x)
            out = out.float()
            loss = F.cross_entropy(out, shown.y, label_smoothing=plan.label_smoothing)
            if extra_loss is not None:
                done = step / (epochs * steps)
                seen_now = Step(model, shown, out, loss, dict(seen), draws, done)
                loss = loss + extra_loss(seen_now)
            for every in (optimizer, *also):
                every.zero_grad(set_to_none=True)
            loss.backward()
            for every in (optimizer, *also):
                every.step()
            running += loss.detach()
            if slow is not None:
                slow.after(step)
            report(what, step + 1, epochs * steps)
        mean = float(running) / steps  # the epoch's one wait for the device
        if not math.isfinite(mean):
            raise FloatingPointError(f"the training loss became {mean} in epoch {epoch + 1}")
        report(what, (epoch + 1) * steps, epochs * steps, loss=mean, epoch=epoch + 1)
        if slow is not None and epoch + 1 == epochs:
            slow.finish()
        if checkpoint is not None:
            state = {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save({**state, "epoch": epoch + 1})
    return model.eval()


@contextmanager
def _watched(model: nn.Module, levels: Sequence[str], seen: dict[str, Tensor]) -> Iterator[None]:
    """Inside, forward passes leave the outputs of the model's feature levels in `seen`."""
    with ExitStack() as hooks:
        for level in levels:

            def keep(_: nn.Module, __: object, out: Tensor, level: str = level) -> None:
                seen[level] = out

            module = model.get_submodule(cast("Classifier", model).levels[level])
            hooks.callback(module.register_forward_hook(keep).remove)
        yield


def _same_size(batch: Images, size: int) -> Images:
    if len(batch) != size or len(batch.x) != size:
        raise ValueError(f"a hook turned a batch of {size} images into one of {len(batch.x)}")
    return batch


def _optimizer(model: nn.Module, plan: Recipe, device: torch.device) -> torch.optim.Optimizer:
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    biases = {id(m.bias) for m in model.modules() if isinstance(m, norms) and m.bias is not None}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in biases], "scale": 1.0},
        {
            "params": [p for p in trained if id(p) in biases],
            "scale": plan.bias_lr,
            "weight_decay": plan.weight_decay / plan.bias_lr,
        },
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=plan.lr,
        momentum=plan.momentum,
        weight_decay=plan.weight_decay,
        nesterov=plan.momentum > 0,
        fused=device.type in ("cpu", "cuda"),
    )


def _rate(plan: Recipe, step: int, total: int) -> float:
    """The learning rate of update `step` (from 0) of `total`."""
    rise = plan.warmup * total
    if step < rise:
        return plan.lr * (plan.start_lr + (1 - plan.start_lr) * step / rise)
    gone = (step - rise) / max(1.0, total - rise)
    match plan.schedule:
        case "constant":
            share = 1.0
        case "cosine":
            share = plan.final_lr + (1 - plan.final_lr) * (1 + math.cos(math.pi * gone)) / 2
        case "steps":
            share = 0.1 ** sum(step >= round(at * total) for at in plan.drop_at)
        case _:
            share = 1 - (1 - plan.final_lr) * gone
    return plan.lr * share


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


class _Augmented:
    """The training set on the device, padded once; yields augmented float batches."""

    def __init__(
        self,
        data: Images,
        plan: Recipe,
        seed: int,
        device: torch.device,
        on_image: BatchHook | None = None,
    ) -> None:
        self.on_image = on_image
        pad = min(plan.crop, data.x.shape[-1] - 1, data.x.shape[-2] - 1)
        self.plan, self.seed, self.device = plan, seed, device
        self.side, self.shifts = data.x.shape[-2:], 2 * pad + 1
        self.pad = pad
        bytes_padded = data.x.numel() * (1 + 2 * pad / data.x.shape[-1]) ** 2
        self.resident = _fits(bytes_padded, device)
        self.y = data.y.to(device)
        self.x = self._padded(data.x.to(device)) if self.resident else data.x
        start = torch.rand(len(data), generator=stream(seed, "flip")) < 0.5
        self.start = start.to(device)

    def _padded(self, x: Tensor) -> Tensor:
        if not self.pad:
            return x
        if self.plan.border == "zero":
            return F.pad(x, (self.pad,) * 4)
        # `reflect` is not implemented for uint8: pad by gathering mirrored rows and columns; this
        # also passes gradients on, where a hook's images have them
        rows, columns = (_mirrored(size, self.pad, x.device) for size in self.side)
        return x.index_select(2, rows).index_select(3, columns)

    def epoch(self, epoch: int, batch: int, hook_draws: Generator) -> Iterator[Images]:
        draws = stream(self.seed, "epoch", epoch)
        n = len(self.y)
        order = torch.randperm(n, generator=draws)
        shift = torch.randint(self.shifts, (2, n), generator=draws).to(self.device)
        hole = torch.rand((2, n), generator=draws).to(self.device)
        device_order = order.to(self.device, non_blocking=True)
        flips = (self.start ^ bool(epoch % 2)) if self.plan.flip else None
        for begin in range(0, n - batch + 1, batch):
            rows = device_order[begin : begin + batch]
            found = Images(self.x, self.y[rows], rows)
            if self.on_image is not None:
                x = to_float(self._plain(order[begin : begin + batch], rows))
                found = _same_size(self.on_image(replace(found, x=x), hook_draws), batch)
                here = torch.arange(batch, device=self.device)
                x = self._cropped(self._padded(found.x), here, shift[:, rows])
            elif self.resident:
                x = self._cropped(self.x, rows, shift[:, rows])
            else:
                part = self.x[order[begin : begin + batch]].to(self.device, non_blocking=True)
                here = torch.arange(len(part), device=self.device)
                x = self._cropped(self._padded(part), here, shift[:, rows])
            x = to_float(x) if x.dtype == torch.uint8 else x
            if flips is not None:
                x = torch.where(flips[rows, None, None, None], x.flip(-1), x)
            if self.plan.cutout:
                x = _cut_out(x, self.plan.cutout, hole[:, rows])
            yield replace(found, x=x.contiguous(memory_format=torch.channels_last))

    def _plain(self, order: Tensor, rows: Tensor) -> Tensor:
        """The stored images (uint8) at `rows`, without their borders; `order` is `rows` here."""
        if not self.resident:
            return self.x[order].to(self.device, non_blocking=True)
        height, width = self.side
        pad = self.pad
        return self.x[rows][:, :, pad : pad + height, pad : pad + width]

    def _cropped(self, padded: Tensor, rows: Tensor, shift: Tensor) -> Tensor:
        if not self.pad:
            return padded[rows]
        height, width = self.side
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N, C, P, P, H, W)
        return windows[rows, :, shift[0], shift[1]]


def _mirrored(size: int, pad: int, device: torch.device) -> Tensor:
    index = torch.arange(-pad, size + pad, device=device).abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


def _cut_out(x: Tensor, side: int, centre: Tensor) -> Tensor:
    """Zero a square of `side` px per image (DeVries and Taylor 2017); it may hang over the edge."""
    inside = []
    for place, size in zip(centre, x.shape[-2:], strict=True):
        start = ((place * size).floor() - side // 2)[:, None]
        at = torch.arange(size, device=x.device)
        inside.append((at >= start) & (at < start + side))
    rows, columns = inside
    return x.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0.0)


def _fits(size: float, device: torch.device) -> bool:
    """Whether `size` bytes may stay on the device beside the model and its activations."""
    if device.type == "cuda":
        return size < 0.5 * torch.cuda.mem_get_info(device)[0]
    return size < 4e9


class _Lookahead:
    """Slow weights (Zhang et al. 2019, as used by Jordan 2024): every 5 updates the slow weights
    move towards the fast ones, which then start again from there; less and less as time goes on."""

    EVERY = 5

    def __init__(self, model: nn.Module, total: int) -> None:
        self.model, self.total = model, total
        self.slow = {k: v.detach().clone() for k, v in self._state().items()}

    def _state(self) -> dict[str, Tensor]:
        return {k: v for k, v in self.model.state_dict().items() if v.is_floating_point()}

    @torch.no_grad()
    def _pull(self, decay: float) -> None:
        fast = list(self._state().values())
        slow = list(self.slow.values())
        torch._foreach_lerp_(slow, fast, 1 - decay)
        torch._foreach_copy_(fast, slow)

    def after(self, step: int) -> None:
        if (step + 1) % self.EVERY == 0:
            self._pull(0.95**self.EVERY * (step / self.total) ** 3)

    def finish(self) -> None:
        """The slow weights are the result."""
        self._pull(1.0)

    def state_dict(self) -> dict[str, Tensor]:
        return self.slow

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.slow.items():
            value.copy_(state[name])
