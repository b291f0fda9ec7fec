"""Stochastic depth (Huang et al., "Deep Networks with Stochastic Depth", Sec. 3)."""

from __future__ import annotations

import torch
from torch import nn


class DropPath(nn.Module):
    """Leave a residual branch out for a random part of the batch, in training only.

    Args:
        rate: probability in [0, 1) that a sample's branch is left out. What stays is divided by
            1 - rate.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop path rate: expected a number in [0, 1), got {rate}")
        self.rate = rate
        # A tensor, since a number would be a constant of compiled code, made again for every rate.
        # On the CPU: a scalar there meets tensors of every device.
        self.keep = torch.tensor(1.0 - rate, device="cpu")
        self.active = rate > 0.0

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        """Return branch (B, ...) with some samples zeroed and the others rescaled."""
        if not self.active or not self.training:
            return branch
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        kept = torch.rand(shape, device=branch.device) < self.keep
        return branch * (kept / self.keep).to(branch.dtype)

    def extra_repr(self) -> str:
        """Return what `print(module)` shows."""
        return f"rate={self.rate:.4g}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return the rates of `depth` blocks, growing linearly from 0 to `rate`."""
    return [rate * i / (depth - 1) if depth > 1 else 0.0 for i in range(depth)]
