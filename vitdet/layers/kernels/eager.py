"""The reference kernel: the definition, with the whole L x L matrix in memory."""

from __future__ import annotations

import torch

from vitdet.layers.rel_pos import RelPos


def can_run(q: torch.Tensor, rel_pos: RelPos | None) -> bool:  # noqa: ARG001 (one signature for all)
    """Every device, type and size."""
    return True


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_pos: RelPos | None, scale: float
) -> torch.Tensor:
    """Compute softmax(scale * q k^T + bias) v.

    Args:
        q: (B, N, L, D).
        k: (B, N, L, D).
        v: (B, N, L, D).
        rel_pos: terms of the bias, or None.
        scale: factor on q k^T; the bias is not scaled.

    Returns:
        (B, N, L, D).
    """
    logits = (q * scale) @ k.transpose(-2, -1)  # (B, N, L, L)
    if rel_pos is not None:
        B, N, L = logits.shape[:3]
        grid = logits.view(B, N, L, rel_pos.h.shape[-1], rel_pos.w.shape[-1])
        logits = (grid + rel_pos.h[..., :, None] + rel_pos.w[..., None, :]).view(B, N, L, -1)
    return logits.softmax(dim=-1) @ v
