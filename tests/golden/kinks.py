"""Take the side of near ties from a float64 run, so that gradients can be compared.

A ReLU whose input lies within rounding of zero, or a maximum of two values that nearly tie, has one
gradient on one side and another on the other. Among the million ReLUs of a detector some lie there,
and two correct float32 computations (two attention kernels, say) may take different sides: single
gradients then differ by 1e-3. The stored results were made with inputs for which the published code
took the same sides in float32 and in float64. So a float64 run of our model decides the ties, and
only the ties: values further apart than the tolerance of an output stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .compare import TOLERANCE


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """Run a block with a float32 model in float64 and with the eager attention."""
    backends = {module: module.backend for module in model.modules() if hasattr(module, "backend")}
    for module in backends:
        module.backend = "eager"  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    model.double()
    with torch.no_grad():
        yield
    model.float()
    for module, backend in backends.items():
        module.backend = backend


class Kinks:
    """Keeps the inputs of every ReLU and maximum of one run, to decide the ties of a later one."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: dict[str, list[torch.Tensor]] = {}
        self.modules = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.ReLU | nn.MaxPool2d)
        }
        assert self.modules, "a detector has ReLUs"
        assert not any(getattr(module, "inplace", False) for module in self.modules.values())

    @contextmanager
    def hooked(self, hook: Callable[[Kinks, str, nn.Module, Any, Any], Any]) -> Iterator[None]:
        """Call a hook, `Kinks.keep` or `Kinks.decide`, after every one of them."""
        handles = [
            module.register_forward_hook(partial(hook, self, name))
            for name, module in self.modules.items()
        ]
        yield
        for handle in handles:
            handle.remove()

    def keep(self, name: str, _: nn.Module, given: Any, __: torch.Tensor) -> None:
        """Keep the input, in the order of the calls."""
        self._kept.setdefault(name, []).append(given[0])

    def decide(
        self, name: str, module: nn.Module, given: Any, output: torch.Tensor
    ) -> torch.Tensor:
        """Decide ties by the kept inputs; calls beyond the kept ones are left alone."""
        if not self._kept.get(name):
            return output
        (x,), reference = given, self._kept[name].pop(0)
        assert reference.shape == x.shape, f"{name}: another shape than in float64"
        if isinstance(module, nn.MaxPool2d):
            sizes = module.kernel_size, module.stride, module.padding
            _, index = F.max_pool2d(reference, *sizes, return_indices=True)
            chosen = x.flatten(2).gather(2, index.flatten(2)).view_as(output)
            return torch.where(output - chosen < TOLERANCE, chosen, output)
        return torch.where(reference.abs() < TOLERANCE, x * (reference > 0), output)
