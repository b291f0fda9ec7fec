"""Learned positions of a map: absolute ones, and decomposed relative ones (ViTDet, Sec. 3).

Absolute: one vector for each place of a grid. Relative (Li et al., "MViTv2", Sec. 4.1): a table
holds one vector for each offset between query and key along one axis, row q - k + S - 1 for a grid
of S places. The bias of a query and a key is q . rel_h[row offset] + q . rel_w[column offset], with
q before its scaling.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from vitdet.utils.checks import InputError

PosEmbedResize = Literal["bicubic", "bicubic_antialias", "bilinear", "tile", "crop"]
RelPosResize = Literal["interpolate", "crop", "beit"]
_BEIT_RATIO = 1.0903078


def resize_pos_embed(
    pos_embed: torch.Tensor,
    size: tuple[int, int],
    mode: PosEmbedResize = "bicubic",
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Fit a grid of position embeddings to a map.

    Args:
        pos_embed: (1, S * T, C), without a class row.
        size: (H, W) of the map in tokens.
        mode: "bicubic" as detectron2 (backbone/utils.py get_abs_pos: no antialias, corners not
            aligned), "bicubic_antialias" as timm (layers/pos_embed.py), "bilinear" as Perception
            Encoder (core/vision_encoder/pe.py). "tile" repeats the grid over the map, as Perception
            Encoder's detectors and SAM 3. "crop" takes the upper left H x W places, which is right
            for a map of the training scale that is only smaller.
        grid: (S, T), None for a square.

    Returns:
        (1, H, W, C); the grid itself, without any arithmetic, when it has the map's size.
    """
    rows = pos_embed.shape[1]
    S, T = grid or (math.isqrt(rows),) * 2
    if rows != S * T:
        raise InputError(
            f"pos_embed: expected {f'{S}x{T} places' if grid else 'a square grid'}, without a "
            f"class row, got {rows} rows. Set pretrain_use_cls_token to what the weights were "
            "trained with."
        )
    places = pos_embed.reshape(1, S, T, -1)
    height, width = size
    if size == (S, T):
        return places
    if mode == "tile":
        return places.repeat(1, height // S + 1, width // T + 1, 1)[:, :height, :width]
    if mode == "crop":
        if height > S or width > T:
            raise InputError(
                f"pos_embed with resize 'crop': expected a map of at most {S}x{T} tokens, got "
                f"{height}x{width}. Use 'bicubic', or a larger pretrain_img_size."
            )
        return places[:, :height, :width]
    places = F.interpolate(
        places.permute(0, 3, 1, 2),
        size=size,
        mode="bilinear" if mode == "bilinear" else "bicubic",
        align_corners=False,
        antialias=mode == "bicubic_antialias",
    )
    return places.permute(0, 2, 3, 1)


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
            higher resolution, see `_resize_as_beit`.

    Returns:
        (2 * size - 1, D); the table itself when it fits.
    """
    rows = 2 * size - 1
    if table.shape[0] == rows:
        return table
    if mode == "crop":
        spare = table.shape[0] - rows
        if spare < 0:
            raise InputError(
                f"rel_pos with resize 'crop': expected at most {(table.shape[0] + 1) // 2} tokens "
                f"along an axis, got {size}. Use 'interpolate', or a larger img_size."
            )
        return table[spare // 2 : spare // 2 + rows]
    if mode == "beit":
        return _resize_as_beit(table, rows)
    resized = F.interpolate(table.T[None], size=rows, mode="linear", align_corners=False)
    return resized[0].T


def rel_pos_terms(
    q: torch.Tensor,
    table_h: torch.Tensor,
    table_w: torch.Tensor,
    size: tuple[int, int],
    mode: RelPosResize = "interpolate",
) -> RelPos:
    """Compute the bias terms of every query.

    Queries q (B, N, L, D) are not scaled, L = H * W in row-major order; tables (2 * S - 1, D) are
    for rows and for columns, `mode` is that of `resize_rel_pos`.
    """
    B, N, L, D = q.shape
    height, width = size

    def vectors(table: torch.Tensor, side: int) -> torch.Tensor:  # of query and key (S, S, D)
        places = torch.arange(side, device=table.device)
        offsets = places[:, None] - places[None, :] + (side - 1)
        return resize_rel_pos(table, side, mode)[offsets].to(q.dtype)

    grid = q.reshape(B * N, height, width, D)
    h = torch.einsum("bhwd,hkd->bhwk", grid, vectors(table_h, height))  # (B * N, H, W, H)
    w = torch.einsum("bhwd,wkd->bhwk", grid, vectors(table_w, width))  # (B * N, H, W, W)
    return RelPos(h.reshape(B, N, L, height), w.reshape(B, N, L, width))


def _resize_as_beit(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Fit a table (2 * S - 1, D) to `rows` rows, without a gradient, as published.

    Its offsets are read as distances 1, 1 + q, 1 + q + q^2, ... on both sides of zero, with q =
    1.0903078, and a cubic spline through them is read at every token of the larger map
    (baaivision/EVA, EVA-01/det, backbone/utils.py get_rel_pos, interp_type "beit").
    """
    if table.shape[0] < 5:
        raise InputError(
            f"rel_pos with resize 'beit': expected a table of at least 5 rows, got "
            f"{table.shape[0]} rows. Use 'interpolate', or a larger window."
        )
    # In float64, which autocast leaves alone.
    numbers = _beit_weights(table.shape[0], rows)
    weights = torch.tensor(numbers, dtype=torch.float64, device=table.device)
    return (weights @ table.detach().double()).to(table.dtype)


def _beit_weights(source_rows: int, rows: int) -> list[list[float]]:
    return _spline(source_rows, rows)


# A compiler runs it instead of tracing it. torch.compiler.assume_constant_result sets the same, but
# imports the compiler: seconds for every program, of which few compile.
vars(_beit_weights)["_dynamo_marked_constant"] = True


# Numbers, not a tensor: one made under a mode of torch (fake tensors, a meta device) must not be
# given out outside of it.
@lru_cache(maxsize=64)
def _spline(source_rows: int, rows: int) -> list[list[float]]:
    """Return the weight (rows, source_rows) of every row of a table in every row of the new one."""
    distances = [1.0]
    for i in range(1, source_rows // 2):
        distances.append(distances[-1] + _BEIT_RATIO**i)
    source = np.array([-d for d in reversed(distances)] + [0.0, *distances])
    return cubic_spline_weights(source, np.arange(rows) - rows // 2).tolist()


def cubic_spline_weights(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return W such that W @ y is the cubic spline through (x, y), read at `places`.

    The spline has the same third derivative on both sides of the second and the last but one point
    ("not-a-knot"). Beyond the ends its outer pieces go on. x (n,) ascends, n is at least 4.
    """
    n, h = len(x), np.diff(x)
    # The second derivatives M of the spline solve A M = B y.
    A, B = np.zeros((2, n, n))
    for i in range(1, n - 1):
        A[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        B[i, i - 1 : i + 2] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
    A[0, :3] = h[1], -h[0] - h[1], h[0]
    A[-1, -3:] = h[-1], -h[-2] - h[-1], h[-2]
    second = np.linalg.solve(A, B)  # (n, n)
    piece = np.clip(np.searchsorted(x, places) - 1, 0, n - 2)
    width, values = h[piece, None], np.eye(n)

    def end(share: np.ndarray, point: np.ndarray) -> np.ndarray:
        """What one end of a piece adds through its value and through its second derivative."""
        bend = (share**3 / width - share * width) / 6
        return share / width * values[point] + bend * second[point]

    return end(x[piece + 1, None] - places[:, None], piece) + end(
        places[:, None] - x[piece, None], piece + 1
    )
