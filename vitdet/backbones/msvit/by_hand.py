"""The sliding-chunk kernel with a backward pass by hand: some chunks at a time, nothing kept.

The forward pass keeps inputs and output. The backward pass computes the weights again, block by
block, as Dao et al., "FlashAttention", Sec. 3.1, do for whole sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vitdet.backbones.msvit.grid import ChunkGrid, Chunks
from vitdet.backbones.msvit.precision import no_autocast, working_dtype

# Largest number of scores of a block; on a CPU they should stay in its cache.
_SCORES = {"cpu": 2**20}
_SCORES_ELSEWHERE = 2**26


def by_hand(x: Chunks, grid: ChunkGrid) -> torch.Tensor:
    """Compute what `sliding_chunk.autograd` computes.

    Products and softmax are float32 for half precision inputs, whatever autocast says.

    Returns:
        (B, N, rows, columns, w * w, D).
    """
    k, v = grid.with_border(x.k), grid.with_border(x.v)
    return _ByHand.apply(x.q, k, v, x.k_global, x.v_global, x.bias, grid)  # pyright: ignore


@dataclass(frozen=True)
class _Block:
    """The chunks of some rows and columns; `unseen` is (rows, columns, slots * w * w)."""

    grid: ChunkGrid
    rows: range
    columns: range
    unseen: torch.Tensor

    def at(self, border: int = 0, slot: tuple[int, int] = (0, 0)) -> tuple[slice, ...]:
        """Return where these chunks, or their neighbours, lie in (B, N, rows, columns, ...)."""
        starts = (axis.start + border + step for axis, step in zip(self._axes, slot, strict=True))
        ends = (axis.stop + border + step for axis, step in zip(self._axes, slot, strict=True))
        return (slice(None), slice(None), *map(slice, starts, ends))

    @property
    def _axes(self) -> tuple[range, range]:
        return self.rows, self.columns

    def _slots(self, num_global: int, area: int) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """Yield where a slot's keys lie among all keys of a chunk, and its chunks in the map."""
        for i, slot in enumerate(self.grid.slots):
            first = num_global + i * area
            yield slice(first, first + area), self.at(1, slot)

    def gather(self, around: torch.Tensor, over: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write what these chunks attend to into `out` (B, N, rows, columns, keys, D).

        Args:
            around: (B, N, 2 + rows, 2 + columns, w * w, D), all chunks with a border.
            over: (B, N, G, D), the global tokens.
            out: at least as many rows and columns as this block has.
        """
        out = out[:, :, : len(self.rows), : len(self.columns)]
        out[..., : over.shape[2], :] = over[:, :, None, None]
        for keys, chunks in self._slots(over.shape[2], around.shape[4]):
            out[..., keys, :] = around[chunks]
        return out

    def scatter(self, gradient: torch.Tensor, around: torch.Tensor, over: torch.Tensor) -> None:
        """Add the gradient of what `gather` wrote to those of its sources."""
        over += gradient[..., : over.shape[2], :].sum((2, 3))
        for keys, chunks in self._slots(over.shape[2], around.shape[4]):
            around[chunks] += gradient[..., keys, :]

    def weights(self, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return softmax(q k^T + bias), (B, N, rows, columns, w * w, keys)."""
        scores = q @ k.transpose(-2, -1)
        if bias is not None:
            scores += bias[:, None, None]
        local = scores[..., scores.shape[-1] - self.unseen.shape[-1] :]
        inside = slice(self.columns.start, self.columns.stop)
        for row in set(self.grid.edges(0)) & set(self.rows):
            mask = self.unseen[row, inside, None]
            local[:, :, row - self.rows.start].masked_fill_(mask, -torch.inf)
        inside = slice(self.rows.start, self.rows.stop)
        for column in set(self.grid.edges(1)) & set(self.columns):
            mask = self.unseen[inside, column, None]
            local[:, :, :, column - self.columns.start].masked_fill_(mask, -torch.inf)
        return scores.softmax(dim=-1)


def _blocks(grid: ChunkGrid, scores: int, device: torch.device) -> tuple[list[_Block], int, int]:
    """Cut the map into blocks.

    Args:
        grid: the chunks.
        scores: number of scores of one chunk, over batch and heads.
        device: whose limit counts.

    Returns:
        The blocks, and the most rows and columns of chunks that one has.
    """
    limit = max(1, _SCORES.get(device.type, _SCORES_ELSEWHERE) // scores)
    columns = min(grid.columns, limit)
    rows = min(grid.rows, limit // columns)
    unseen = grid.unseen(device)
    blocks = [
        _Block(
            grid,
            range(row, min(row + rows, grid.rows)),
            range(column, min(column + columns, grid.columns)),
            unseen,
        )
        for row in range(0, grid.rows, rows)
        for column in range(0, grid.columns, columns)
    ]
    return blocks, rows, columns


def _buffer(q: torch.Tensor, rows: int, columns: int, keys: int) -> torch.Tensor:
    B, N, _, _, _, D = q.shape
    return q.new_empty(B, N, rows, columns, keys, D, dtype=working_dtype(q))


class _ByHand(torch.autograd.Function):
    """q (B, N, rows, columns, w * w, D); k and v the same with a border of one chunk."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        k_global: torch.Tensor,
        v_global: torch.Tensor,
        bias: torch.Tensor | None,
        grid: ChunkGrid,
    ) -> torch.Tensor:
        """Return the context, shaped as q."""
        B, N, _, _, area, _ = q.shape
        keys = k_global.shape[2] + len(grid.slots) * area
        blocks, rows, columns = _blocks(grid, B * N * area * keys, q.device)
        out, buffer = torch.empty_like(q), _buffer(q, rows, columns, keys)
        with no_autocast(q):
            for block in blocks:
                own = q[block.at()].to(buffer.dtype)
                weights = block.weights(own, block.gather(k, k_global, buffer), bias)
                out[block.at()] = (weights @ block.gather(v, v_global, buffer)).to(out.dtype)
        ctx.save_for_backward(q, k, v, k_global, v_global, bias, out)
        ctx.grid = grid
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of the inputs."""
        q, k, v, k_global, v_global, bias, out = ctx.saved_tensors
        B, N, _, _, area, _ = q.shape
        keys = k_global.shape[2] + len(ctx.grid.slots) * area
        blocks, rows, columns = _blocks(ctx.grid, B * N * area * keys, q.device)
        k_block, v_block = (_buffer(q, rows, columns, keys) for _ in range(2))
        working = k_block.dtype
        sources = (k, v, k_global, v_global)
        dk, dv, dk_global, dv_global = (torch.zeros_like(x, dtype=working) for x in sources)
        dq = torch.empty_like(q)
        dbias = None if bias is None else torch.zeros_like(bias, dtype=working)
        with no_autocast(q):
            for block in blocks:
                at = block.at()
                own, above = q[at].to(working), gradient[at].to(working)
                k_near = block.gather(k, k_global, k_block)
                v_near = block.gather(v, v_global, v_block)
                weights = block.weights(own, k_near, bias)
                block.scatter(weights.transpose(-2, -1) @ above, dv, dv_global)
                # of the softmax: weights * (d weights - sum of weights * d weights)
                dscores = above @ v_near.transpose(-2, -1)
                dscores -= (above * out[at]).sum(-1, keepdim=True)
                dscores *= weights
                dq[at] = (dscores @ k_near).to(dq.dtype)
                block.scatter(dscores.transpose(-2, -1) @ own, dk, dk_global)
                if dbias is not None:
                    summed = dscores.sum((0, 2, 3))
                    dbias += summed if dbias.shape[0] == N else summed.sum(0, keepdim=True)
        near = (dk.to(k.dtype), dv.to(v.dtype))
        over = (dk_global.to(k_global.dtype), dv_global.to(v_global.dtype))
        if bias is not None and dbias is not None:
            dbias = dbias.to(bias.dtype)
        return dq, *near, *over, dbias, None
