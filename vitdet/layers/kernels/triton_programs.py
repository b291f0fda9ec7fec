"""The programs of `triton_rel_pos`, which alone imports this file, and only to run them.

Layouts: q, k, v (B, N, L, D) with any strides but D's, which is 1; outputs and their gradients
(B, L, N, D), as the layer after attention reads them; terms h (B, N, L, H) and w (B, N, L, W); sums
over keys, `lse` and `delta`, (B, N, L) in float32. Logits are in base 2.

A tile of keys is ROWS grid rows of COLUMNS places. Its logits, seen as (queries, ROWS, COLUMNS),
take h as one number a query and row and w as one tile for all rows. What a tile has beyond the
grid gets a term of -inf, so no other mask is needed. Queries beyond the grid repeat the last one.
"""

# pyright: reportArgumentType=false
# Triton's own types take no literal for a constexpr.

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _part(L, N, TILE: tl.constexpr):
    """Return which tile of which (batch, head) this program has: (tile, batch, head)."""
    tiles = tl.cdiv(L, TILE)
    part = tl.program_id(0)
    head = part // tiles
    return part % tiles, (head // N).to(tl.int64), head % N


@triton.jit
def _load(ptr, places, inside, D: tl.constexpr, D_TILE: tl.constexpr, EVEN: tl.constexpr):
    """Return the rows at `places` (in numbers) as (places, D_TILE), zero where not `inside`."""
    d = tl.arange(0, D_TILE)
    ptrs = ptr + places[:, None] + d[None, :]
    if EVEN and D == D_TILE:
        return tl.load(ptrs)
    if EVEN:
        return tl.load(ptrs, mask=(d < D)[None, :], other=0.0)
    return tl.load(ptrs, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store(ptr, places, inside, x, D: tl.constexpr, D_TILE: tl.constexpr):
    d = tl.arange(0, D_TILE)
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(ptr + places[:, None] + d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _term(ptr, queries, places, size):
    """Return a term of the bias as (queries, places) in base 2, -inf beyond the grid."""
    ptrs = ptr + queries[:, None] * size + places[None, :]
    term = tl.load(ptrs, mask=(places < size)[None, :], other=-float("inf"))
    return term.to(tl.float32) * LOG2_E


@triton.jit
def _row_term(ptr, queries, place, size):
    """Return the term of one place on the grid as (queries,) in base 2."""
    return tl.load(ptr + queries * size + place).to(tl.float32) * LOG2_E


@triton.jit
def _tile_keys(row, column, H, W, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the index of every key of a tile, and which of them are on the grid."""
    t = tl.arange(0, ROWS * COLUMNS)
    rows, columns = row + t // COLUMNS, column + t % COLUMNS
    return rows * W + columns, (rows < H) & (columns < W)


@triton.jit
def forward(
    q_ptr, k_ptr, v_ptr, h_ptr, w_ptr, out_ptr, lse_ptr,
    stride_b, stride_n, stride_l, N, H, W, scale,
    D: tl.constexpr, D_TILE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of queries, with running maximum and sum (Dao et al., Alg. 1)."""
    L = H * W
    tile, b, n = _part(L, N, QUERIES)
    start = b * stride_b + n * stride_n
    head = b * N + n
    m = tile * QUERIES + tl.arange(0, QUERIES)
    queries = tl.minimum(m, L - 1)
    q = _load(q_ptr + start, queries * stride_l, m < L, D, D_TILE, True)
    top = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, D_TILE], tl.float32)
    for column in range(0, W, COLUMNS):
        w = _term(w_ptr + head * L * W, queries, column + tl.arange(0, COLUMNS), W)
        for row in range(0, H, ROWS):
            keys, inside = _tile_keys(row, column, H, W, ROWS, COLUMNS)
            k = _load(k_ptr + start, keys * stride_l, inside, D, D_TILE, EVEN)
            v = _load(v_ptr + start, keys * stride_l, inside, D, D_TILE, EVEN)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
            if ROWS == 1:
                # h goes into the maximum and never touches the tile.
                h = _row_term(h_ptr + head * L * H, queries, row, H)
                logits += w
                new_top = tl.maximum(top, tl.max(logits, 1) + h)
                p = tl.exp2(logits - (new_top - h)[:, None])
            else:
                h = _term(h_ptr + head * L * H, queries, row + tl.arange(0, ROWS), H)
                cells = tl.reshape(logits, [QUERIES, ROWS, COLUMNS])
                cells = cells + w[:, None, :] + h[:, :, None]
                logits = tl.reshape(cells, [QUERIES, ROWS * COLUMNS])
                new_top = tl.maximum(top, tl.max(logits, 1))
                p = tl.exp2(logits - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
            top = new_top
    _store(out_ptr + (b * L * N + n) * D, queries * (N * D), m < L, out / total[:, None], D, D_TILE)
    tl.store(lse_ptr + head * L + queries, top + tl.log2(total), mask=m < L)


@triton.jit
def backward_queries(
    q_ptr, k_ptr, v_ptr, h_ptr, w_ptr, out_ptr, dout_ptr, lse_ptr,
    delta_ptr, dq_ptr, dh_ptr, dw_ptr,
    stride_b, stride_n, stride_l, B, N, H, W, scale,
    D: tl.constexpr, D_TILE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of queries and of its terms; also delta = sum of out * dout.

    dh is (columns / COLUMNS, B, N, H, L): each pass over some columns writes its own part, with
    neighbouring queries side by side. dw is (B, N, L, W).
    """
    L = H * W
    tile, b, n = _part(L, N, QUERIES)
    start = b * stride_b + n * stride_n
    head = b * N + n
    m = tile * QUERIES + tl.arange(0, QUERIES)
    queries = tl.minimum(m, L - 1)
    start_out = (b * L * N + n) * D
    q = _load(q_ptr + start, queries * stride_l, m < L, D, D_TILE, True)
    out = _load(out_ptr + start_out, queries * (N * D), m < L, D, D_TILE, True)
    dout = _load(dout_ptr + start_out, queries * (N * D), m < L, D, D_TILE, True)
    lse = tl.load(lse_ptr + head * L + queries)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(delta_ptr + head * L + queries, delta, mask=m < L)
    dq = tl.zeros([QUERIES, D_TILE], tl.float32)
    for column in range(0, W, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        w = _term(w_ptr + head * L * W, queries, columns, W)
        dw = tl.zeros([QUERIES, COLUMNS], tl.float32)
        dh_part = dh_ptr + ((column // COLUMNS) * B * N + head) * H * L
        for row in range(0, H, ROWS):
            rows = row + tl.arange(0, ROWS)
            keys, inside = _tile_keys(row, column, H, W, ROWS, COLUMNS)
            k = _load(k_ptr + start, keys * stride_l, inside, D, D_TILE, EVEN)
            v = _load(v_ptr + start, keys * stride_l, inside, D, D_TILE, EVEN)
            logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None]
            if ROWS == 1:
                h = _row_term(h_ptr + head * L * H, queries, row, H)
                p = tl.exp2(logits + w - (lse - h)[:, None])
                ds = p * dp
                dw += ds
                dh = tl.sum(ds, 1)[:, None]
            else:
                h = _term(h_ptr + head * L * H, queries, rows, H)
                cells = tl.reshape(logits, [QUERIES, ROWS, COLUMNS])
                cells = cells + w[:, None, :] + (h - lse[:, None])[:, :, None]
                ds = tl.exp2(tl.reshape(cells, [QUERIES, ROWS * COLUMNS])) * dp
                cells = tl.reshape(ds, [QUERIES, ROWS, COLUMNS])
                dw += tl.sum(cells, 1)
                dh = tl.sum(cells, 2)
            mask = (m < L)[:, None] & (rows < H)[None, :]
            ptrs = dh_part + rows[None, :] * L + queries[:, None]
            tl.store(ptrs, dh.to(dh_ptr.dtype.element_ty), mask=mask)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        mask = (m < L)[:, None] & (columns < W)[None, :]
        ptrs = dw_ptr + head * L * W + queries[:, None] * W + columns[None, :]
        tl.store(ptrs, dw.to(dw_ptr.dtype.element_ty), mask=mask)
    _store(dq_ptr + start_out, queries * (N * D), m < L, dq * scale, D, D_TILE)


@triton.jit
def backward_keys(
    q_ptr, k_ptr, v_ptr, h_ptr, w_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    stride_b, stride_n, stride_l, N, H, W, scale,
    D: tl.constexpr, D_TILE: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values. Tiles of logits are (keys, queries) here."""
    L = H * W
    across = tl.cdiv(W, COLUMNS)
    tiles = across * tl.cdiv(H, ROWS)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, n = head // N, head % N
    start = b * stride_b + n * stride_n
    start_out = (b * L * N + n) * D
    row, column = (tile // across) * ROWS, (tile % across) * COLUMNS
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    keys, inside = _tile_keys(row, column, H, W, ROWS, COLUMNS)
    k = _load(k_ptr + start, keys * stride_l, inside, D, D_TILE, EVEN)
    v = _load(v_ptr + start, keys * stride_l, inside, D, D_TILE, EVEN)
    dk = tl.zeros([ROWS * COLUMNS, D_TILE], tl.float32)
    dv = tl.zeros([ROWS * COLUMNS, D_TILE], tl.float32)
    for first in range(0, L, QUERIES):
        m = first + tl.arange(0, QUERIES)
        queries = tl.minimum(m, L - 1)
        q = _load(q_ptr + start, queries * stride_l, m < L, D, D_TILE, True)
        dout = _load(dout_ptr + start_out, queries * (N * D), m < L, D, D_TILE, True)
        # A repeated query counts once: exp2(-inf) is 0.
        lse = tl.load(lse_ptr + head * L + m, mask=m < L, other=float("inf"))
        delta = tl.load(delta_ptr + head * L + queries)
        w = _term(w_ptr + head * L * W, queries, columns, W)
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
        if ROWS == 1:
            h = _row_term(h_ptr + head * L * H, queries, row, H)
            p = tl.exp2(logits + tl.trans(w) - (lse - h)[None, :])
        else:
            h = _term(h_ptr + head * L * H, queries, rows, H)
            cells = tl.reshape(logits, [ROWS, COLUMNS, QUERIES])
            cells = cells + tl.trans(w)[None, :, :] + tl.trans(h - lse[:, None])[:, None, :]
            p = tl.exp2(tl.reshape(cells, [ROWS * COLUMNS, QUERIES]))
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :]
        dk = tl.dot((p * dp).to(q.dtype), q, dk, input_precision=PRECISION)
    _store(dk_ptr + start_out, keys * (N * D), inside, dk * scale, D, D_TILE)
    _store(dv_ptr + start_out, keys * (N * D), inside, dv, D, D_TILE)
