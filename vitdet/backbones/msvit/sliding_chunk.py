"""Sliding-chunk attention: a local attention on a grid, memory linear in the number of tokens.

Zhang et al., "Multi-Scale Vision Longformer", Sec. 3.2 and Fig. 3: softmax(q k^T + bias) v over the
global tokens and the slots of `grid.ChunkGrid`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.msvit.grid import ChunkGrid, Chunks
from vitdet.utils.checks import check_word
from vitdet.utils.precision import no_autocast, working_dtype


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
        backend: "strips" goes row of chunks by row of chunks and keeps no scores for the backward
            pass; "autograd" is the whole map at once; "auto" is strips.

    Returns:
        (B, N, H, W, D).

    Raises:
        InputError: no such backend.
    """
    check_backend(backend)
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
