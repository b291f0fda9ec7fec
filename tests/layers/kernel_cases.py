"""What every kernel is compared with eager on, here and on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vitdet.layers.attention import attention
from vitdet.layers.positions import RelPos


class Case(NamedTuple):
    """A grid (height, width) with `heads` heads of `head_dim`, for a batch of `batch`."""

    size: tuple[int, int]
    head_dim: int = 32
    dtype: str = "float32"
    heads: int = 2
    batch: int = 1

    def __str__(self):
        return f"{self.size[0]}x{self.size[1]}-{self.head_dim}-{self.dtype}"


# Windows, rectangles, odd rows longer and shorter than a tile of keys, every width of a head.
CASES = [
    Case((14, 14), 64, batch=2),
    Case((5, 9), 32, batch=2, heads=3),
    Case((9, 5), 80),
    Case((3, 37), 128),
    Case((16, 4), 64),
    Case((1, 5), 16),
    Case((5, 9), 64, "bfloat16"),
    Case((9, 5), 80, "bfloat16"),
    Case((5, 9), 64, "float16"),
]
# Largest difference from eager in float32: values, and gradients of 1 a channel.
TOLERANCE = {"float32": (2e-6, 1e-5), "float16": (4e-3, 1e-2), "bfloat16": (3e-2, 8e-2)}


def run(case, backend, dtype, device, bias=True):
    """Return output and gradients, of tensors that are the same for every kernel and type."""
    generator = torch.Generator().manual_seed(1)
    H, W = case.size
    B, N, L, D = case.batch, case.heads, H * W, case.head_dim

    def draw(*shape):
        # Numbers of the case's type, so that a run in float32 is the exact answer.
        drawn = torch.randn(shape, generator=generator).to(getattr(torch, case.dtype))
        return drawn.to(device, dtype).requires_grad_()

    # q, k and v are views of one tensor, as the layer makes them.
    qkv, h, w = draw(B, L, 3, N, D), draw(B, N, L, H), draw(B, N, L, W)
    weights = draw(B, N, L, D).detach()
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    leaves = {"qkv": qkv, "h": h, "w": w} if bias else {"qkv": qkv}
    out = attention(q, k, v, rel_pos=RelPos(h, w) if bias else None, backend=backend)
    assert out.dtype == dtype
    (out * weights).sum().backward()
    found = {"out": out.detach()}
    return found | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def differences(case, backend, device="cpu", bias=True):
    """Return the largest difference from eager in float32, of the output and of each gradient."""
    expected = run(case, "eager", torch.float32, device, bias)
    found = run(case, backend, getattr(torch, case.dtype), device, bias)
    assert found.keys() == expected.keys()
    return {name: (found[name] - expected[name]).abs().max().item() for name in found}


def check(found, dtype, bias=True):
    """Assert that differences are within the tolerance; one that is not a number never is."""
    assert set(found) == ({"out", "qkv", "h", "w"} if bias else {"out", "qkv"})
    value, gradient = TOLERANCE[dtype]
    for name, difference in found.items():
        assert difference <= (value if name == "out" else gradient), (name, difference)
