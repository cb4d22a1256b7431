"""A network made ready to be asked a million times: frozen, folded, in low precision.

Inversion needs gradients for triggers and none for weights, in evaluation mode. There a batch norm
is a scale and a shift, which the convolution before it can do as well; on small maps such passes
over memory cost more than the convolutions.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from arena.core import training
from arena.core.models import Classifier, passes

Precision = Literal["auto", "bf16", "fp32"]


class Frozen(nn.Module):
    """float32 (N, C, H, W) in [0, 1] -> logits (N, classes) float32, as `model` in evaluation mode.

    model: a Classifier, or any network from images in [0, 1] to logits. This is a copy of it, which
    stays on its device: later changes do not show here. Gradients flow to the images alone.
    """

    def __init__(self, model: nn.Module, precision: Precision = "auto") -> None:
        super().__init__()
        self.device = training.device_of(model)
        low = training.has_bf16(self.device) if precision == "auto" else precision == "bf16"
        self.dtype = torch.bfloat16 if low else torch.float32
        self.normalize: nn.Module
        copied = copy.deepcopy(model).eval().requires_grad_(False)
        body, self.normalize = copied, nn.Identity()
        if isinstance(copied, Classifier):
            body, self.normalize = copied.body, copied.normalize
        self.body = folded(body).to(self.dtype).to(memory_format=torch.channels_last)
        self.body.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.normalize(x).to(self.dtype).contiguous(memory_format=torch.channels_last)
        logits = self.body(x).float()
        passes.forward += len(x)
        passes.backward += len(x) if logits.requires_grad else 0
        return logits

    def watched(self, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The logits, and what these modules of `body` put out, (N, C, …) by name."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> RemovableHandle:
            def hook(module: nn.Module, args: object, out: Tensor) -> Tensor:
                seen[name] = channels_second(module, out)
                return out.clone()  # a ReLU behind it may work in place

            return self.body.get_submodule(name).register_forward_hook(hook)

        handles = [keep(name) for name in layers]
        try:
            return self(x), seen
        finally:
            for handle in handles:
                handle.remove()


def channels_second(module: nn.Module, out: Tensor) -> Tensor:
    """A module's output as (N, C, …); a linear layer has its channels last."""
    return out.movedim(-1, 1) if isinstance(module, nn.Linear) else out


def folded(body: nn.Module) -> nn.Module:
    """`body` (in evaluation mode) with every batch norm that directly follows a convolution folded
    into it; as it is where it cannot be traced."""
    from torch.fx.experimental.optimization import fuse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return fuse(body)
        except Exception:  # whatever a foreign network's code does under a tracer
            return body


def saved_bytes(run: Callable[[], object], besides: nn.Module) -> int:
    """What the result of `run` keeps in memory for a backward pass, without a module's weights."""
    weights = {p.untyped_storage().data_ptr() for p in (*besides.parameters(), *besides.buffers())}
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        kept = run()  # alive until here, so that no address is used twice
    del kept
    return sum(seen.values())
