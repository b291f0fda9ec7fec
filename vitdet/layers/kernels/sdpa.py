"""torch's fused attention, without an L x L bias in memory.

The relative-position bias h[q, row of k] + w[q, column of k] reaches the fused kernel factorised:
it is the inner product of [h[q], w[q]] with two one-hot vectors that tell the row and the column of
k, so attention of [scale * q, h, w] with [k, onehot_row, onehot_column] is the biased attention,
exactly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vitdet.layers.rel_pos import RelPos


def can_run(q: torch.Tensor, rel_pos: RelPos | None) -> bool:  # noqa: ARG001 (one signature for all)
    """Every device, type and size."""
    return True


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_pos: RelPos | None, scale: float
) -> torch.Tensor:
    """Compute what `eager.attention` computes; see there for arguments and shapes."""
    if rel_pos is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    B, N, L, D = q.shape
    height, width = rel_pos.h.shape[-1], rel_pos.w.shape[-1]
    place = torch.arange(L, device=q.device)
    onehot = torch.zeros(L, height + width, dtype=k.dtype, device=k.device)
    onehot[place, place // width] = 1
    onehot[place, height + place % width] = 1
    q = torch.cat([q * scale, rel_pos.h, rel_pos.w], dim=-1)  # (B, N, L, D + H + W)
    k = torch.cat([k, onehot.expand(B, N, -1, -1)], dim=-1)
    # torch's fused kernels want q, k and v of one width, and on CUDA a multiple of 8; for others it
    # would hold an L x L matrix.
    spare = -(D + height + width) % 8
    q, k, v = F.pad(q, (0, spare)), F.pad(k, (0, spare)), F.pad(v, (0, height + width + spare))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :D]
