"""The sliding-chunk kernel on torch's flex attention: chunks in a row, blocks left out by a mask.

The tokens of a chunk stand together, so a block of queries meets few blocks of keys. torch compiles
this for a GPU (and for a CPU without gradients). Not compiled it is a dense attention: for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from vitdet.backbones.msvit.grid import ChunkGrid, Chunks

_BLOCK = 128  # flex attention's own


def can_run(x: Chunks, grid: ChunkGrid) -> bool:
    """Every pattern without wrapping (a wrapped map shows some keys twice); no CPU training."""
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in x)
    return grid.exact >= 0 and not (training and x.q.device.type == "cpu")


@cache
def _compiled() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def attention(x: Chunks, grid: ChunkGrid) -> torch.Tensor:
    """Compute what `sliding_chunk.autograd` computes; see there.

    Returns:
        (B, N, rows, columns, w * w, D).
    """
    num_global = x.k_global.shape[2]
    k = torch.cat([x.k_global, x.k.flatten(2, 4)], dim=2)
    v = torch.cat([x.v_global, x.v.flatten(2, 4)], dim=2)
    q = x.q.flatten(2, 4)
    mask = block_mask(grid, num_global, q.device)
    run = _compiled() if q.device.type == "cuda" else flex_attention
    out = run(q, k, v, score_mod=_add_bias(x.bias, grid, num_global), block_mask=mask, scale=1.0)
    return out.view_as(x.q)


def _add_bias(bias: torch.Tensor | None, grid: ChunkGrid, num_global: int) -> Any:
    """Return flex attention's score_mod, None without a bias."""
    if bias is None:
        return None
    area = grid.window**2
    slots = torch.full((9,), 0, device=bias.device)
    for i, (row, column) in enumerate(grid.slots):
        slots[3 * row + column + 4] = i
    shared = bias.shape[0] == 1

    def add(score: Any, _: Any, head: Any, query: Any, key: Any) -> Any:
        local = key - num_global
        is_local = local >= 0
        chunk, other = query // area, torch.where(is_local, local // area, query // area)
        row = (other // grid.columns - chunk // grid.columns).clamp(-1, 1)
        column = (other % grid.columns - chunk % grid.columns).clamp(-1, 1)
        place = num_global + slots[3 * row + column + 4] * area + local % area
        place = torch.where(is_local, place, key)
        return score + bias[head * 0 if shared else head, query % area, place]

    return add


def block_mask(grid: ChunkGrid, num_global: int, device: torch.device) -> BlockMask:
    """Return which blocks of keys a block of queries meets, and the mask within a block."""
    area, count = grid.window**2, grid.rows * grid.columns
    seen = torch.zeros(3, 3, dtype=torch.bool, device=device)
    for row, column in grid.slots:
        seen[1 + row, 1 + column] = True

    def near(chunk: Any, other: Any) -> Any:
        row = other // grid.columns - chunk // grid.columns
        column = other % grid.columns - chunk % grid.columns
        inside = (row.abs() <= 1) & (column.abs() <= 1)
        return inside & seen[row.clamp(-1, 1) + 1, column.clamp(-1, 1) + 1]

    def place(token: Any) -> tuple[Any, Any]:
        chunk, inner = token // area, token % area
        row = (chunk // grid.columns) * grid.window + inner // grid.window
        return row, (chunk % grid.columns) * grid.window + inner % grid.window

    def visible(_: Any, __: Any, query: Any, key: Any) -> Any:
        local = (key - num_global).clamp(min=0)
        row, column = place(local)
        real = near(query // area, local // area) & (row < grid.height) & (column < grid.width)
        if grid.exact == 1:
            own_row, own_column = place(query)
            real = real & ((row - own_row).abs() <= grid.window)
            real = real & ((column - own_column).abs() <= grid.window)
        return (key < num_global) | real

    # Which chunks touch a block: at most `touched`, one after another; -1 where there is none.
    def chunks_of(size: int, skip: int) -> torch.Tensor:
        starts = torch.arange(0, size, _BLOCK, device=device) - skip
        touched = _BLOCK // area + 2
        first = starts.clamp(min=0) // area
        last = (starts + _BLOCK - 1).clamp(max=size - skip - 1).div(area, rounding_mode="floor")
        chunks = first[:, None] + torch.arange(touched, device=device)
        return chunks.where((chunks <= last[:, None]) & (chunks < count), -1)

    queries, keys = chunks_of(count * area, 0), chunks_of(num_global + count * area, num_global)
    meet = near(queries[:, None, :, None], keys[None, :, None, :])
    meet &= (queries >= 0)[:, None, :, None] & (keys >= 0)[None, :, None, :]
    meet = meet.any((-2, -1))
    meet[:, : -(-num_global // _BLOCK)] = True
    number = meet.sum(1, dtype=torch.int32)[None, None]
    order = meet.int().argsort(dim=1, descending=True, stable=True).int()[None, None]
    return BlockMask.from_kv_blocks(
        number,
        order,
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(count * area, num_global + count * area),
    )
