"""A linear layer that takes the faster of torch's two matrix libraries on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_weight

# Products of fewer multiply-adds are no slower as F.linear.
_WORK = 2**24


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute what `F.linear` computes.

    torch sends float32 matrix products on a CPU to MKL, which leaves half of an AMD processor
    unused, and convolutions to oneDNN, which does not (benchmarks/linear.py). So a product is
    written as a convolution with a 1 x 1 kernel there. Elsewhere it is `F.linear`; so it is under
    tracing and compilation, which have their own ways to fast code and want plain graphs.
    """
    if not _as_convolution(x, weight.shape[0]):
        return F.linear(x, weight, bias)
    y = F.conv2d(_pixels(x), weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], weight.shape[0])


def transposed_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a^T b for a (L, M) and b (L, N): the weight gradient of a linear layer.

    Without gradients of its own; by the same route as `linear`.
    """
    if not _as_convolution(a, b.shape[1]):
        return a.T @ b
    size = (a.shape[1], b.shape[1], 1, 1)
    return conv2d_weight(_pixels(b), size, _pixels(a))[:, :, 0, 0]


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """View rows (..., C) as an image (1, C, L, 1), channels last."""
    return x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _as_convolution(x: torch.Tensor, columns: int) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() * columns >= _WORK
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and torch.backends.mkldnn.is_available()
    )


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., C) to (..., C out)."""
        return linear(input, self.weight, self.bias)
