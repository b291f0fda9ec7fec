"""Attention on a CPU by blocks of scores that stay in the processor's cache, with gradients.

A block is some queries of one head against all keys, or several whole heads when these are small,
such as windows. Its scores are computed, biased, turned into weights and used up before the next
block begins, so nothing of size L x L reaches memory. The backward pass computes the scores again
from the logarithm of each query's sum, as flash attention does (Dao et al., "FlashAttention",
Sec. 3.1). Matrix products of long blocks go through `parts.linear`.

Against torch's fused kernel it has two advantages on a CPU: the position bias is added in the cache
instead of being read from memory, and products run in the faster of two libraries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vitdet.layers.parts import linear, transposed_product
from vitdet.layers.positions import RelPos

Tensor = torch.Tensor

# Numbers in a block: 8 MiB. Measured with 4096 keys (benchmarks/attention.py): half as many cost
# a quarter more time, twice as many the same.
_BLOCK = 2**21


def can_run(q: Tensor) -> bool:
    """Every type on a CPU; not under a compiler or a tracer, which would unroll all blocks."""
    plain = not torch.compiler.is_compiling() and not torch.jit.is_tracing()
    return plain and q.device.type == "cpu"


def attention(q: Tensor, k: Tensor, v: Tensor, rel_pos: RelPos | None, scale: float) -> Tensor:
    """Compute what `vitdet.layers.attention.eager` computes; see there for arguments and shapes."""
    B, N, L, _ = q.shape
    if B * N * L == 0:
        return torch.empty_like(v)
    # Batch and heads are one axis here, P pairs. Weights and sums of 16 bits would be too coarse;
    # in float32 they are also the faster way (two cores with bf16 instructions, 4096 tokens: 0.35
    # of sdpa's time in bfloat16, with gradients 0.53).
    dtype, wide = v.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v, *terms = (x.flatten(0, 1).to(wide).contiguous() for x in (q, k, v, *(rel_pos or ())))
    with torch.autocast("cpu", enabled=False):
        out = _Blocks.apply(q * scale, k, v, *(terms or (None, None)))
    return out.unflatten(0, (B, N)).to(dtype)


class _Blocks(torch.autograd.Function):
    """softmax(q k^T + bias) v for q, k, v (P, L, D), h (P, L, H) and w (P, L, W) or None."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (torch's takes anything)
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        h: Tensor | None,
        w: Tensor | None,
    ) -> Tensor:
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        logsumexp = q.new_empty(*q.shape[:2], 1)
        for pairs, rows in _block_slices(q.shape[0], q.shape[1], k.shape[1]):
            scores = _scores(q, k, h, w, pairs, rows)
            largest = scores.amax(dim=-1, keepdim=True)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            out[pairs, rows] = _product(weights, v[pairs].transpose(1, 2)).div_(total)
            logsumexp[pairs, rows] = largest + total.log()
        ctx.save_for_backward(q, k, v, h, w, out, logsumexp)
        return out

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, h, w, out, logsumexp = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dh = None if h is None else torch.empty_like(h)
        dw = None if w is None else torch.empty_like(w)
        dout = dout.contiguous()
        delta = (dout * out).sum(dim=-1, keepdim=True)
        for pairs, rows in _block_slices(q.shape[0], q.shape[1], k.shape[1]):
            weights = _scores(q, k, h, w, pairs, rows).sub_(logsumexp[pairs, rows]).exp_()
            dv[pairs] += _product_of_transposed(weights, dout[pairs, rows])
            dscores = _product(dout[pairs, rows], v[pairs])
            dscores = dscores.sub_(delta[pairs, rows]).mul_(weights)
            dk[pairs] += _product_of_transposed(dscores, q[pairs, rows])
            dq[pairs, rows] = _product(dscores, k[pairs].transpose(1, 2))
            if dh is not None and dw is not None:
                grid = dscores.unflatten(-1, (dh.shape[-1], dw.shape[-1]))
                dh[pairs, rows] = grid.sum(dim=-1)
                dw[pairs, rows] = grid.sum(dim=-2)
        return dq, dk, dv, dh, dw


def _block_slices(pairs: int, queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Yield the pairs and the queries of each block."""
    step = max(1, _BLOCK // (queries * keys))
    rows = queries if step > 1 else max(1, _BLOCK // keys)
    for pair in range(0, pairs, step):
        for row in range(0, queries, rows):
            yield slice(pair, pair + step), slice(row, row + rows)


def _scores(
    q: Tensor, k: Tensor, h: Tensor | None, w: Tensor | None, pairs: slice, rows: slice
) -> Tensor:
    """Return the biased scores (pairs, rows, L) of a block."""
    scores = _product(q[pairs, rows], k[pairs])
    if h is not None and w is not None:
        grid = scores.unflatten(-1, (h.shape[-1], w.shape[-1]))
        grid += h[pairs, rows, :, None]
        grid += w[pairs, rows, None, :]
    return scores


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a b^T for a (P, R, K) and b (P, S, K)."""
    return linear(a[0], b[0])[None] if a.shape[0] == 1 else torch.bmm(a, b.transpose(1, 2))


def _product_of_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return a^T b for a (P, R, S) and b (P, R, K)."""
    if a.shape[0] == 1:
        return transposed_product(a[0], b[0])[None]
    return torch.bmm(a.transpose(1, 2), b)
