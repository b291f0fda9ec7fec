"""Sliding-chunk attention: a local attention on a grid, memory linear in the number of tokens.

Zhang et al., "Multi-Scale Vision Longformer", Sec. 3.2 and Fig. 3, with the modes of
microsoft/VisionLongformerForObjectDetection, msvit/slidingchunk_2d.py. A map of H x W tokens is cut
into chunks of w x w, filled up with zeros below and on the right. A query attends to the global
tokens and to the tokens of some chunks, the *slots*, by their offset from its own chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vitdet.utils.checks import InputError, check_word
from vitdet.utils.precision import no_autocast, working_dtype

NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
_ALL = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))


def check_pattern(exact: int, mode: int) -> None:
    """Raise an InputError unless `exact` and `mode` exist."""
    if exact not in (0, 1, -1) or mode not in range(-1, len(NEIGHBOURS) + 1):
        raise InputError(
            f"exact and mode: expected exact 0, 1 or -1, and mode 0, -1 or 1 to 8, got exact "
            f"{exact}, mode {mode}. 0 and 0 are the published recipes' values."
        )


@dataclass(frozen=True)
class ChunkGrid:
    """Chunks of a map and the pattern of the attention.

    Args:
        height, width: rows H and columns W of tokens.
        window: side w of a chunk in tokens.
        exact: 0: every real token of the slots; 1: of those the ones at most w rows and w columns
            away (the published code has this for mode 0 alone); -1: the chunk grid wraps around,
            and zeros that fill up the map are seen where a slot is reached around an edge.
        mode: 0: own chunk and its 8 neighbours; -1: own chunk; k from 1 to 8: own chunk and
            NEIGHBOURS[k - 1].
    """

    height: int
    width: int
    window: int
    exact: int = 0
    mode: int = 0

    @property
    def rows(self) -> int:
        """Rows of chunks."""
        return -(-self.height // self.window)

    @property
    def columns(self) -> int:
        """Columns of chunks."""
        return -(-self.width // self.window)

    @property
    def slots(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) from a query's chunk to each chunk that it attends to."""
        if self.mode == 0:
            return _ALL
        return ((0, 0),) if self.mode < 0 else ((0, 0), NEIGHBOURS[self.mode - 1])

    def chunks(self, x: torch.Tensor) -> torch.Tensor:
        """Cut tokens (B, N, H, W, D) into (B, N, rows, columns, w * w, D), filled up with zeros."""
        side = self.window
        below, right = self.rows * side - self.height, self.columns * side - self.width
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        x = x.unflatten(3, (self.columns, side)).unflatten(2, (self.rows, side))
        return x.transpose(3, 4).flatten(4, 5)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `chunks`: (B, N, rows, columns, w * w, D) to (B, N, H, W, D)."""
        x = x.unflatten(4, (self.window, self.window)).transpose(3, 4)
        x = x.flatten(4, 5).flatten(2, 3)
        return x[:, :, : self.height, : self.width]

    def with_border(self, x: torch.Tensor) -> torch.Tensor:
        """Put a border of one chunk round chunks (B, N, rows, columns, ...): zeros, or wrapped."""
        if self.exact >= 0:
            return F.pad(x, (0, 0, 0, 0, 1, 1, 1, 1))
        x = torch.cat([x[:, :, -1:], x, x[:, :, :1]], dim=2)
        return torch.cat([x[:, :, :, -1:], x, x[:, :, :, :1]], dim=3)

    def unseen(self, device: torch.device) -> torch.Tensor:
        """Return which keys no query of a chunk sees, bool (rows, columns, slots * w * w)."""
        below = self._outside(self.height, self.rows, 0, device)  # (rows, slots, w)
        right = self._outside(self.width, self.columns, 1, device)  # (columns, slots, w)
        unseen = below[:, None, :, :, None] | right[None, :, :, None, :]
        return unseen.flatten(2)

    def _outside(self, size: int, count: int, axis: int, device: torch.device) -> torch.Tensor:
        chunk = torch.arange(count, device=device)[:, None, None]
        step = torch.tensor([slot[axis] for slot in self.slots], device=device)[:, None]
        place = (chunk + step) * self.window + torch.arange(self.window, device=device)
        if self.exact < 0:  # reached around an edge, the zeros of the filling are seen
            inside = (chunk + step >= 0) & (chunk + step < count)
            return inside & (place >= size)
        return (place < 0) | (place >= size)

    def slot_bias(self, table: torch.Tensor) -> torch.Tensor:
        """Lay out a table of relative positions for the keys of a chunk: (N, w * w, slots * w * w).

        Its entries (N, 4 * w - 1, 4 * w - 1) are at (row of query - row of key + 2 * w - 1, the
        same for columns).
        """
        side = self.window
        # As key minus query the entries of one query are a window that moves with the query.
        windows = table.flip(1, 2).unfold(1, 3 * side, 1).unfold(2, 3 * side, 1).flip(1, 2)
        # (N, w, w, 3 * w, 3 * w) to (N, w * w, 3, 3, w * w): query, chunk of key, key
        bias = windows.unflatten(4, (3, side)).unflatten(3, (3, side)).transpose(4, 5)
        bias = bias.flatten(5, 6).flatten(1, 2)
        bias = torch.stack([bias[:, :, 1 + row, 1 + column] for row, column in self.slots], dim=2)
        return bias.flatten(2)

    def too_far(self, device: torch.device) -> torch.Tensor:
        """Which keys of the slots are more than w rows or columns away: (w * w, slots * w * w)."""
        places = torch.arange(self.window, device=device)
        far = []
        for axis in (0, 1):
            step = torch.tensor([slot[axis] for slot in self.slots], device=device)[:, None]
            key = step * self.window + places  # (slots, w)
            far.append((key - places[:, None, None]).abs() > self.window)  # (w, slots, w)
        either = far[0][:, None, :, :, None] | far[1][None, :, :, None, :]
        return either.flatten(2).flatten(0, 1)


class Chunks(NamedTuple):
    """What a sliding-chunk kernel gets.

    q is (B, N, rows, columns, w * w, D) and scaled; k and v are the same. The global tokens' are
    (B, N, G, D). bias is (N or 1, w * w, G + slots * w * w), or None for none.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_global: torch.Tensor
    v_global: torch.Tensor
    bias: torch.Tensor | None


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
        q, k, v: (B, N, H, W, D) queries, keys and values of the map.
        k_global, v_global: (B, N, G, D) those of the global tokens, G may be 0.
        grid: the chunks and the pattern.
        table: (N, 4 * w - 1, 4 * w - 1) relative positions, see `ChunkGrid.slot_bias`; None: none.
        global_bias: (N, G) bias from every token to the global ones; None: none.
        scale: factor on q k^T, D ** -0.5 when None.
        backend: "strips" goes row of chunks by row of chunks and keeps no scores for the backward
            pass; "autograd" is the whole map at once; "auto" is strips.

    Returns:
        (B, N, H, W, D).
    """
    bias = _bias(grid, table, global_bias, k_global.shape[2], q)
    factor: float = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = grid.chunks(q * factor), grid.chunks(k), grid.chunks(v)
    chunks = Chunks(q, k, v, k_global, v_global, bias)
    return grid.tokens(KERNELS["strips" if backend == "auto" else backend](chunks, grid))


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


_SCORES, _SCORES_ON_CPU = 2**26, 2**20  # of a strip: on a CPU they should stay in its cache


def gather(around: torch.Tensor, over: torch.Tensor, grid: ChunkGrid) -> torch.Tensor:
    """Return what every chunk attends to: (B, N, rows, columns, G + slots * w * w, D).

    `around` has a border of one chunk.
    """
    rows, columns = around.shape[2] - 2, around.shape[3] - 2
    near = [around[:, :, 1 + r : 1 + r + rows, 1 + c : 1 + c + columns] for r, c in grid.slots]
    return torch.cat([over[:, :, None, None].expand(-1, -1, rows, columns, -1, -1), *near], dim=4)


def _strip(x: Chunks, unseen: torch.Tensor, grid: ChunkGrid) -> torch.Tensor:
    """The definition, for some rows of chunks; k and v have a border of one chunk."""
    scores = x.q @ gather(x.k, x.k_global, grid).transpose(-2, -1)
    scores = scores.to(working_dtype(x.q))
    if x.bias is not None:
        scores = scores + x.bias[:, None, None]
    scores = scores.masked_fill(unseen[:, :, None], -torch.inf)
    return scores.softmax(dim=-1).to(x.v.dtype) @ gather(x.v, x.v_global, grid)


def strips(x: Chunks, grid: ChunkGrid) -> torch.Tensor:
    """Compute the definition strip by strip, and again in the backward pass: no scores are kept."""
    kind = working_dtype(x.q)
    bias = None if x.bias is None else x.bias.to(kind)
    q, k, v, k_global, v_global = (each.to(kind) for each in x[:5])
    k, v = grid.with_border(k), grid.with_border(v)
    unseen = _unseen(grid, k_global.shape[2], q.device)
    scores = q.shape[0] * q.shape[1] * q.shape[4] * grid.columns * unseen.shape[-1]  # of a row
    rows = max(1, (_SCORES_ON_CPU if q.device.type == "cpu" else _SCORES) // scores)
    out = []
    with no_autocast(q):
        for row in range(0, grid.rows, rows):
            here, near = slice(row, row + rows), slice(row, row + rows + 2)
            part = Chunks(q[:, :, here], k[:, :, near], v[:, :, near], k_global, v_global, bias)
            out.append(checkpoint(_strip, part, unseen[here], grid, use_reentrant=False))
    return torch.cat(out, dim=2).to(x.q.dtype)


def _unseen(grid: ChunkGrid, num_global: int, device: torch.device) -> torch.Tensor:
    """Return bool (rows, columns, G + slots * w * w); global tokens are always seen."""
    return F.pad(grid.unseen(device), (num_global, 0))


def autograd(x: Chunks, grid: ChunkGrid) -> torch.Tensor:
    """The definition over the whole map at once, derived by autograd."""
    around = x._replace(k=grid.with_border(x.k), v=grid.with_border(x.v))
    return _strip(around, _unseen(grid, x.k_global.shape[2], x.q.device), grid)


KERNELS = {"strips": strips, "autograd": autograd}


def check_backend(backend: str) -> None:
    """Raise an InputError unless `backend` is "auto" or the name of a kernel."""
    check_word("sliding-chunk backend", backend, ["auto", *KERNELS])
