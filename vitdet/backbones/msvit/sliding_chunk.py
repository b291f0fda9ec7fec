"""Sliding-chunk attention: a local attention on a grid, memory linear in the number of tokens.

Zhang et al., "Multi-Scale Vision Longformer", Sec. 3.2 and Fig. 3. Every kernel computes the same:
softmax(q k^T + bias) v over the global tokens and the slots of `grid.ChunkGrid`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vitdet.backbones.msvit import flex
from vitdet.backbones.msvit.by_hand import by_hand
from vitdet.backbones.msvit.grid import ChunkGrid, Chunks
from vitdet.backbones.msvit.precision import working_dtype
from vitdet.utils.checks import fail, nearest


class Kernel(NamedTuple):
    """A kernel: `run` computes, `can_run` tells whether it can for this pattern."""

    run: Callable[[Chunks, ChunkGrid], torch.Tensor]
    can_run: Callable[[Chunks, ChunkGrid], bool]


def sliding_chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_global: torch.Tensor,
    v_global: torch.Tensor,
    grid: ChunkGrid,
    *,
    table: torch.Tensor | None = None,
    global_bias: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attend from every token of a map to the tokens near it and to the global tokens.

    Args:
        q: (B, N, H, W, D) queries.
        k: (B, N, H, W, D) keys.
        v: (B, N, H, W, D) values.
        k_global: (B, N, G, D) keys of the global tokens, G may be 0.
        v_global: (B, N, G, D) values of the global tokens.
        grid: the chunks and the pattern.
        table: (N, 4 * w - 1, 4 * w - 1) relative positions, see `ChunkGrid.slot_bias`; None: none.
        global_bias: (N, G) bias from every token to the global ones; None: none.
        scale: factor on q k^T, D ** -0.5 when None.
        backend: name of a kernel in KERNELS, or "auto": by_hand, which was the fastest of those
            that can train on a CPU in every size measured (benchmarks/sliding_chunk.py) and keeps
            no scores for the backward pass. No GPU was measured.

    Returns:
        (B, N, H, W, D).

    Raises:
        InputError: no such kernel, or it cannot run for this pattern.
    """
    check_backend(backend)
    kernel = KERNELS["by_hand" if backend == "auto" else backend]
    bias = _bias(grid, table, global_bias, k_global.shape[2], q)
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = grid.chunks(q * factor), grid.chunks(k), grid.chunks(v)
    chunks = Chunks(q, k, v, k_global, v_global, bias)
    if not kernel.can_run(chunks, grid):
        fail(
            f"sliding-chunk backend {backend!r}",
            expected="inputs that it supports",
            got=f"exact {grid.exact} on {q.device}{', training' if q.requires_grad else ''}",
            remedy="Use backend 'auto'.",
        )
    return grid.tokens(kernel.run(chunks, grid))


def _bias(
    grid: ChunkGrid,
    table: torch.Tensor | None,
    global_bias: torch.Tensor | None,
    num_global: int,
    like: torch.Tensor,
) -> torch.Tensor | None:
    """Return what is added to the scores of every chunk (N or 1, w * w, keys), None for nothing."""
    if table is None and global_bias is None and grid.exact != 1:
        return None
    heads = like.shape[1]
    area = grid.window**2
    local = like.new_zeros(1, area, len(grid.slots) * area, dtype=torch.float32)
    if table is not None:
        local = grid.slot_bias(table)
    if grid.exact == 1:
        local = local.masked_fill(grid.too_far(like.device), -torch.inf)
    to_global = local.new_zeros(1, 1, num_global)
    if global_bias is not None:
        to_global = global_bias[:, None]
    if local.shape[0] != to_global.shape[0]:
        local, to_global = local.expand(heads, -1, -1), to_global.expand(heads, -1, -1)
    return torch.cat([to_global.expand(-1, area, -1).to(local.dtype), local], dim=2)


# --- scores of all chunks at once --------------------------------------------------------------


def gather(chunks: torch.Tensor, over: torch.Tensor, grid: ChunkGrid) -> torch.Tensor:
    """Return what every chunk attends to: (B, N, rows, columns, G + slots * w * w, D)."""
    around = grid.with_border(chunks)
    parts = [over[:, :, None, None].expand(-1, -1, grid.rows, grid.columns, -1, -1)]
    for row, column in grid.slots:
        part = around.narrow(2, 1 + row, grid.rows).narrow(3, 1 + column, grid.columns)
        parts.append(part)
    return torch.cat(parts, dim=4)


def _unseen(grid: ChunkGrid, num_global: int, device: torch.device) -> torch.Tensor:
    """Return bool (rows, columns, G + slots * w * w); global tokens are always seen."""
    return F.pad(grid.unseen(device), (num_global, 0))


def autograd(x: Chunks, grid: ChunkGrid) -> torch.Tensor:
    """Plain operations, derived by autograd; holds every score. The definition."""
    k, v = gather(x.k, x.k_global, grid), gather(x.v, x.v_global, grid)
    scores = (x.q @ k.transpose(-2, -1)).to(working_dtype(x.q))
    if x.bias is not None:
        scores = scores + x.bias[:, None, None]
    unseen = _unseen(grid, x.k_global.shape[2], scores.device)
    scores = scores.masked_fill(unseen[:, :, None], -torch.inf)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def sdpa(x: Chunks, grid: ChunkGrid) -> torch.Tensor:
    """torch's fused attention, every chunk a sequence of its own."""
    B, N, rows, columns, area, _ = x.q.shape
    k, v = gather(x.k, x.k_global, grid), gather(x.v, x.v_global, grid)
    unseen = _unseen(grid, x.k_global.shape[2], x.q.device).flatten(0, 1)[:, None, None]
    mask = torch.zeros(unseen.shape, dtype=x.q.dtype, device=x.q.device)
    mask = mask.masked_fill(unseen, -torch.inf)  # (chunks, 1, 1, keys)
    if x.bias is not None:
        mask = mask + x.bias.to(x.q.dtype)
    mask = mask.expand(B, *mask.shape).flatten(0, 1)

    def sequences(chunks: torch.Tensor) -> torch.Tensor:
        return chunks.flatten(2, 3).transpose(1, 2).flatten(0, 1)  # (B * chunks, N, ., D)

    mask = mask.expand(-1, N, area, -1)
    out = F.scaled_dot_product_attention(
        sequences(x.q), sequences(k), sequences(v), attn_mask=mask, scale=1.0
    )
    return out.unflatten(0, (B, rows * columns)).transpose(1, 2).unflatten(2, (rows, columns))


def _always(x: Chunks, grid: ChunkGrid) -> bool:  # noqa: ARG001 (one signature for all)
    """Every device, type and pattern."""
    return True


KERNELS: dict[str, Kernel] = {
    "by_hand": Kernel(by_hand, _always),
    "autograd": Kernel(autograd, _always),
    "sdpa": Kernel(sdpa, _always),
    "flex": Kernel(flex.attention, flex.can_run),
}


def check_backend(backend: str) -> None:
    """Raise an InputError unless `backend` is "auto" or the name of a kernel."""
    names = ["auto", *KERNELS]
    if backend not in names:
        meant = nearest(backend, names)
        fail(
            "sliding-chunk backend",
            expected=f"one of {', '.join(names)}",
            got=repr(backend),
            remedy=f"Did you mean {meant!r}?" if meant else "Take one of these.",
        )
