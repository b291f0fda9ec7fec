"""Decomposed relative positions (Li et al., "MViTv2", Sec. 4.1; ViTDet, Sec. 3, "rel. position").

A table holds one vector for each offset between query and key along one axis: row q - k + S - 1 for
a grid of S places. The bias of a query and a key is q . rel_h[row offset] + q . rel_w[column
offset], with q before its scaling.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from vitdet.layers.geometric import resize_rel_pos_geometric
from vitdet.utils.checks import fail

RelPosResize = Literal["interpolate", "crop", "beit"]


class RelPos(NamedTuple):
    """The two terms of a bias: bias(q, k) = h[q, row of k] + w[q, column of k].

    h is (B, N, L, H) and w is (B, N, L, W) for keys on an H x W grid in row-major order.
    """

    h: torch.Tensor
    w: torch.Tensor


def resize_rel_pos(
    table: torch.Tensor, size: int, mode: RelPosResize = "interpolate"
) -> torch.Tensor:
    """Fit a table (2 * S - 1, D) to a grid of `size` places along its axis.

    Args:
        table: (2 * S - 1, D), row q - k + S - 1.
        size: number of places along the axis.
        mode: "interpolate" stretches the offsets linearly, as detectron2 (backbone/utils.py
            get_rel_pos) does for every size but its own: right after a change of scale. "crop"
            keeps the middle rows: right for a rectangle at the training scale, where an offset of
            one token still means the same distance. "beit" is that of EVA-01's evaluation at a
            higher resolution, see `vitdet.layers.geometric`.

    Returns:
        (2 * size - 1, D); the table itself when it fits.

    Raises:
        InputError: a crop of a table that is too small.
    """
    rows = 2 * size - 1
    if table.shape[0] == rows:
        return table
    if mode == "crop":
        spare = table.shape[0] - rows
        if spare < 0:
            fail(
                "rel_pos with resize 'crop'",
                expected=f"at most {(table.shape[0] + 1) // 2} tokens along an axis",
                got=str(size),
                remedy="Use 'interpolate', or a larger img_size.",
            )
        return table[spare // 2 : spare // 2 + rows]
    if mode == "beit":
        return resize_rel_pos_geometric(table, size)
    resized = F.interpolate(table.T[None], size=rows, mode="linear", align_corners=False)
    return resized[0].T


def rel_pos_vectors(table: torch.Tensor, size: int) -> torch.Tensor:
    """Return the vectors (size, size, D) of every query and key along an axis, from its table."""
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places[None, :] + (size - 1)]


def rel_pos_terms(
    q: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    size: tuple[int, int],
    mode: RelPosResize = "interpolate",
) -> RelPos:
    """Compute the bias terms of every query.

    Args:
        q: (B, N, L, D) queries before scaling, L = H * W in row-major order.
        table_h: (2 * S - 1, D) for rows, `table_w` for columns.
        table_w: see `table_h`.
        size: (H, W).
        mode: see `resize_rel_pos`.

    Returns:
        RelPos of (B, N, L, H) and (B, N, L, W).
    """
    B, N, L, D = q.shape
    height, width = size
    vectors_h = rel_pos_vectors(resize_rel_pos(table_h, height, mode), height).to(q.dtype)
    vectors_w = rel_pos_vectors(resize_rel_pos(table_w, width, mode), width).to(q.dtype)
    grid = q.reshape(B * N, height, width, D)
    h = torch.einsum("bhwd,hkd->bhwk", grid, vectors_h)  # (B * N, H, W, H)
    w = torch.einsum("bhwd,wkd->bhwk", grid, vectors_w)  # (B * N, H, W, W)
    return RelPos(h.reshape(B, N, L, height), w.reshape(B, N, L, width))
