"""Relative positions resized the way of BEiT: cubic, from places that spread geometrically.

The table's offsets are read as distances 1, 1 + q, 1 + q + q^2, ... on both sides of zero, with q =
1.0903078, and a cubic spline through them is read at every token of the larger map. EVA-01 was
evaluated with it at higher resolution (baaivision/EVA, EVA-01/det, backbone/utils.py get_rel_pos,
interp_type "beit").
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from vitdet.utils.checks import fail

_RATIO = 1.0903078


def resize_rel_pos_geometric(table: torch.Tensor, size: int) -> torch.Tensor:
    """Fit a table (2 * S - 1, D) to a grid of `size` places along its axis.

    Args:
        table: (2 * S - 1, D), row q - k + S - 1, S at least 3.
        size: number of places along the axis.

    Returns:
        (2 * size - 1, D); the table itself when it fits, else without a gradient, as published.

    Raises:
        InputError: fewer than 5 rows, which give no cubic.
    """
    rows = 2 * size - 1
    if table.shape[0] == rows:
        return table
    if table.shape[0] < 5:
        fail(
            "rel_pos with resize 'beit'",
            expected="a table of at least 5 rows",
            got=f"{table.shape[0]} rows",
            remedy="Use 'interpolate', or a larger window.",
        )
    # In float64, which autocast leaves alone.
    numbers = _weights(table.shape[0], rows)
    weights = torch.tensor(numbers, dtype=torch.float64, device=table.device)
    return (weights @ table.detach().double()).to(table.dtype)


@torch.compiler.assume_constant_result  # a compiler runs it instead of tracing it
def _weights(source_rows: int, rows: int) -> list[list[float]]:
    return _spline(source_rows, rows)


# Numbers, not a tensor: one that was made under a mode of torch (fake tensors, a meta device) must
# not be met again outside.
@lru_cache(maxsize=64)
def _spline(source_rows: int, rows: int) -> list[list[float]]:
    """Return the weight (rows, source_rows) of every row of a table in every row of the new one."""
    distances = [1.0]
    for i in range(1, source_rows // 2):
        distances.append(distances[-1] + _RATIO**i)
    source = np.array([-d for d in reversed(distances)] + [0.0, *distances])
    return cubic_spline_weights(source, np.arange(rows) - rows // 2).tolist()


def cubic_spline_weights(x: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return W such that W @ y is the cubic spline through (x, y), read at `places`.

    The spline has the same third derivative on both sides of the second and the last but one point
    ("not-a-knot"). Beyond the ends its outer pieces go on.

    Args:
        x: (n,) points in ascending order, n at least 4.
        places: (m,) where to read.

    Returns:
        (m, n) in float64.
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
