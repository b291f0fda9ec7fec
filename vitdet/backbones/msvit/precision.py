"""Full precision inside mixed precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the type to sum in: float32 for half precision, else that of x."""
    return torch.promote_types(x.dtype, torch.float32)


def no_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which products on the device of x have the types of their factors."""
    if x.device.type == "meta":  # has no autocast
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)
