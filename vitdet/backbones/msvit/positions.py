"""Position tables of a stage, fitted to the map at hand.

A stage's tables are made for a square of S x S tokens. "crop" takes the part of a table that a
smaller map needs, which is right at the scale of training, and what the published code does with
absolute positions; it refuses larger maps, ours stretch the table. "interpolate" always stretches.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

PosResize = Literal["crop", "interpolate"]


def fit_axis(table: torch.Tensor, size: int, mode: PosResize) -> torch.Tensor:
    """Fit positions along one axis, (1, S, C), to `size` places: (1, size, C)."""
    if mode == "crop" and size <= table.shape[1]:
        return table[:, :size]
    if size == table.shape[1]:
        return table
    return F.interpolate(table.mT, size=size, mode="linear", align_corners=False).mT


def fit_offsets(table: torch.Tensor, size: tuple[int, int], mode: PosResize) -> torch.Tensor:
    """Fit relative positions to a map of H x W tokens.

    Args:
        table: ((2 * S - 1) ** 2, N), row-major, offset query - key + S - 1 on each axis.
        size: (H, W).
        mode: see above; "crop" takes the offsets in the middle.

    Returns:
        (N, 2 * H - 1, 2 * W - 1).
    """
    side = round(table.shape[0] ** 0.5)
    rows, columns = 2 * size[0] - 1, 2 * size[1] - 1
    square = table.T.unflatten(1, (side, side))
    if mode == "crop":  # an axis at a time: one may be smaller and the other larger
        top, left = max(side - rows, 0) // 2, max(side - columns, 0) // 2
        square = square[:, top : side - top, left : side - left]
    return _resized(square, (rows, columns))


def fit_grid(table: torch.Tensor, size: tuple[int, int], mode: PosResize) -> torch.Tensor:
    """Fit a table of one row a token, (S * S, F), to a map of H x W tokens: (H * W, F)."""
    side = round(table.shape[0] ** 0.5)
    grid = table.T.unflatten(1, (side, side))
    if mode == "crop":
        grid = grid[:, : size[0], : size[1]]
    return _resized(grid, size).flatten(1).T


def _resized(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Stretch a grid (C, H, W) bilinearly, where it has another size."""
    if grid.shape[1:] == size:
        return grid
    return F.interpolate(grid[None], size=size, mode="bilinear", align_corners=False)[0]


def dense_bias(table: torch.Tensor) -> torch.Tensor:
    """Lay out relative positions (N, 2 * H - 1, 2 * W - 1) as (N, L, L), L = H * W."""
    height, width = (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2
    # As key minus query, the entries of one query are a window that moves with the query.
    windows = table.flip(1, 2).unfold(1, height, 1).unfold(2, width, 1).flip(1, 2)
    return windows.flatten(3, 4).flatten(1, 2)  # (N, H, W, H, W) before
