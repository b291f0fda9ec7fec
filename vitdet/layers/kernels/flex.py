"""torch's flex_attention: a fused kernel that its compiler writes round the position bias.

The first call for a kind of input compiles, which takes seconds to a minute and needs a C++
compiler on a CPU and Triton on CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch.nn.attention.flex_attention import flex_attention

from vitdet.layers.rel_pos import RelPos

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON = find_spec("triton") is not None


def can_run(q: torch.Tensor, rel_pos: RelPos | None) -> bool:
    """With a bias, heads of 16 or more; on CUDA, or on a CPU where nothing needs a gradient.

    Without a bias it has nothing over `sdpa`. It has no backward pass on a CPU, and no grouping of
    terms of another type than q.
    """
    if rel_pos is None or q.dtype not in _TYPES or q.ndim != 4 or q.shape[-1] < 16:
        return False
    if rel_pos.h.dtype != q.dtype or rel_pos.w.dtype != q.dtype:
        return False
    if q.device.type == "cuda":
        return _TRITON
    gradients = torch.is_grad_enabled() and (q.requires_grad or rel_pos.h.requires_grad)
    return q.device.type == "cpu" and not gradients


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_pos: RelPos | None, scale: float
) -> torch.Tensor:
    """Compute what `eager.attention` computes; see there for arguments and shapes."""
    assert rel_pos is not None, "can_run() wants a bias"
    # Uncompiled it would be eager with a warning. A compiled caller takes it in as it is.
    run = _attend if torch.compiler.is_compiling() else _compiled(q.device.type)
    return run(q, k, v, rel_pos.h, rel_pos.w, scale)


@cache
def _compiled(device: str) -> Callable[..., torch.Tensor]:
    # The C++ that torch 2.15 writes for sizes that vary is none: there, each size is compiled.
    return torch.compile(_attend, dynamic=False if device == "cpu" else None)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    h: torch.Tensor,
    w: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    width = w.shape[-1]

    def biased(
        score: torch.Tensor,
        b: torch.Tensor,
        n: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
    ) -> torch.Tensor:
        return score + h[b, n, query, key // width] + w[b, n, query, key % width]

    out = flex_attention(q, k, v, score_mod=biased, scale=scale)
    assert isinstance(out, torch.Tensor)  # it returns more where it is asked for more
    return out
