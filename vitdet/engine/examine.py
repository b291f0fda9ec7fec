"""What in a batch is not finite: run it once more, watched, and name module and parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from vitdet.engine.losses import Batch
from vitdet.engine.parallel import give_up_step, is_sharded
from vitdet.utils.env import seed_all

_MOST_NAMES = 8  # of parameters in a text


@dataclass
class Finding:
    """What a batch gives; true when something in it is not finite.

    Attributes:
        losses: by name, of the whole batch.
        grad_norm: of the whole gradient; NaN when detectron2 refused the proposals.
        module: the first one whose output is not finite, "" for none.
        faulty_weights: whether that module's own weights are not finite.
        parameters: names of those whose gradient is not finite, when all outputs are.
        seen: whether a batch was run.
    """

    losses: dict[str, float] = field(default_factory=dict)
    grad_norm: float = 0.0
    module: str = ""
    faulty_weights: bool = False
    parameters: list[str] = field(default_factory=list)
    seen: bool = True

    def __bool__(self) -> bool:
        finite = torch.tensor([self.grad_norm, *self.losses.values()]).isfinite().all()
        return bool(self.module or self.parameters) or not bool(finite)

    def text(self, rates: Mapping[str, float]) -> str:
        """Return module and parameters in words.

        Args:
            rates: learning rates by the names of parameters.
        """
        parts = []
        if self.module:
            also = ", its own weights are not finite" if self.faulty_weights else ""
            parts.append(f"first not finite: the output of {self.module}{also}")
        elif self.parameters:
            shown = [
                f"{name} at lr {rates[name]:.3g}" if name in rates else name
                for name in self.parameters[:_MOST_NAMES]
            ]
            more = ", ..." if len(self.parameters) > _MOST_NAMES else ""
            count = len(self.parameters)
            parts.append(f"gradient not finite in {count} parameters: {', '.join(shown)}{more}")
        elif self and math.isinf(self.grad_norm):
            parts.append("every number of it is finite, its norm is not")
        elif self and math.isnan(self.grad_norm):
            parts.append("the proposals are not finite")
        if self.seen and not self:
            parts.append("finite when the batch was run once more")
        return "; ".join(parts)


def examine(
    loss: nn.Module, parts: Sequence[Batch], seed: int, dtype: torch.dtype | None = None
) -> Finding:
    """Run the images of a step, and look at the output of every module and at the gradient.

    The gradients that the parameters hold stay as they are. Weights that are sharded over
    processes have no gradient of one process: there only outputs are looked at, and every process
    must call this.

    Args:
        loss: a DetectorLoss (of sharded weights: what `distributed` made of it), within an open
            event storage of detectron2.
        parts: the images, in the parts in which the step took them.
        seed: of the step's random numbers.
        dtype: of autocast, None for none.
    """
    found = Finding()
    detector: Any = loss.detector
    learning = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    sharded = is_sharded(detector)
    sums = [] if sharded else [torch.zeros_like(each) for each in learning.values()]
    device = next(detector.parameters()).device
    seed_all(seed)
    eager = torch.compiler.set_stance("force_eager")  # compiled blocks would not call the hooks
    grad = torch.set_grad_enabled(not sharded)
    with eager, grad, keeping_buffers(detector), _watched(detector, found):
        for part in parts:
            try:
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    losses = loss(part)
            except FloatingPointError:  # detectron2's proposals; the module is known by now
                give_up_step(loss)
                found.grad_norm = math.nan
                return found
            for name, value in losses.items():
                share = float(value.detach()) / len(parts)
                found.losses[name] = found.losses.get(name, 0.0) + share
            if sharded or found.module:  # of such an output every gradient is as bad
                give_up_step(loss)
            else:
                _add_gradient(sums, losses, list(learning.values()), len(parts))
    found.parameters = [
        name for name, each in zip(learning, sums, strict=False) if not bool(each.isfinite().all())
    ]
    found.grad_norm = float(nn.utils.get_total_norm(sums))
    return found


def bad_gradients(detector: nn.Module) -> list[str]:
    """Return the names of the parameters that hold a gradient which is not finite.

    Of weights that are sharded over processes, this process's part is looked at.
    """
    held = [(name, p.grad) for name, p in detector.named_parameters() if p.grad is not None]
    return [name for name, gradient in held if not _finite(gradient)]


@contextmanager
def keeping_buffers(module: nn.Module) -> Iterator[None]:
    """Put buffers (the running statistics of BatchNorm) back at the end of the block."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def _add_gradient(
    sums: list[torch.Tensor],
    losses: Mapping[str, torch.Tensor],
    parameters: list[nn.Parameter],
    parts: int,
) -> None:
    total = torch.stack(list(losses.values())).sum() / parts
    # Not backward(): it would add to the parameters' own gradients and wake the hooks on them.
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for place, gradient in enumerate(gradients):
        if gradient is not None:
            sums[place] += gradient


@contextmanager
def _watched(detector: nn.Module, found: Finding) -> Iterator[None]:
    """Note the first module whose output is not finite: the innermost one, as it ends first."""

    def hook_of(name: str) -> Any:
        def look(module: nn.Module, _: Any, output: Any) -> None:
            if not found.module and not all(_finite(each) for each in _tensors(output)):
                found.module = name
                weights = module.parameters(recurse=False)
                found.faulty_weights = not all(_finite(weight) for weight in weights)

        return look

    handles = [
        module.register_forward_hook(hook_of(name or "the detector"))
        for name, module in detector.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value.detach()
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


def _finite(value: torch.Tensor) -> bool:
    local = value.to_local() if isinstance(value, DTensor) else value
    return bool(local.isfinite().all())
