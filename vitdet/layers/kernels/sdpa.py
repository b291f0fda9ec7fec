"""torch's fused attention, without an L x L bias in memory.

The relative-position bias h[q, row of k] + w[q, column of k] reaches the fused kernel in one of two
ways. Factorised: it is the inner product of [h[q], w[q]] with two one-hot vectors that tell the row
and the column of k, so attention of [scale * q, h, w] with [k, onehot_row, onehot_column] is the
biased attention, exactly. Blocked: some queries at a time, with their part of the bias as a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitdet.layers.rel_pos import RelPos

# Largest bias of one block of queries, in numbers (64 MiB in float32).
_BLOCK = 2**24


def can_run(q: torch.Tensor, rel_pos: RelPos | None) -> bool:  # noqa: ARG001 (one signature for all)
    """Every device, type and size."""
    return True


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_pos: RelPos | None, scale: float
) -> torch.Tensor:
    """Compute what `eager.attention` computes; see there for arguments and shapes."""
    if rel_pos is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    # Measured on a CPU (benchmarks/attention.py): without gradients blocks are the faster way at
    # every size. With gradients a block's mask would be kept for the backward pass, L x L in all.
    gradients = torch.is_grad_enabled() and (q.requires_grad or rel_pos.h.requires_grad)
    if q.device.type == "cpu" and not gradients:
        return blocked(q, k, v, rel_pos, scale)
    return factorised(q, k, v, rel_pos, scale)


def factorised(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_pos: RelPos, scale: float
) -> torch.Tensor:
    """Attention over D + H + W channels, memory linear in L, with gradients."""
    B, N, L, D = q.shape
    height, width = rel_pos.h.shape[-1], rel_pos.w.shape[-1]
    place = torch.arange(L, device=q.device)
    onehot = torch.zeros(L, height + width, dtype=k.dtype, device=k.device)
    onehot[place, place // width] = 1
    onehot[place, height + place % width] = 1
    q = torch.cat([q * scale, rel_pos.h, rel_pos.w], dim=-1)  # (B, N, L, D + H + W)
    k = torch.cat([k, onehot.expand(B, N, -1, -1)], dim=-1)
    # torch's fused kernels want q, k and v of one width.
    v = F.pad(v, (0, height + width))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :D]


def blocked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_pos: RelPos, scale: float
) -> torch.Tensor:
    """Attention of some queries at a time, each block with its own bias."""
    B, N, L, _ = q.shape
    rows = max(1, min(L, _BLOCK // (B * N * L)))
    blocks = []
    for start in range(0, L, rows):
        part = slice(start, start + rows)
        bias = rel_pos.h[:, :, part, :, None] + rel_pos.w[:, :, part, None, :]
        mask = bias.flatten(-2)  # (B, N, rows, L)
        blocks.append(
            F.scaled_dot_product_attention(q[:, :, part], k, v, attn_mask=mask, scale=scale)
        )
    return torch.cat(blocks, dim=2)
