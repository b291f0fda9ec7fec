"""Relative positions resized the way of BEiT: cubic, from places that spread geometrically.

The table's offsets are read as distances 1, 1 + q, 1 + q + q^2, ... on both sides of zero, with q =
1.0903078, and a cubic spline through them is read at every token of the larger map. EVA-01 was
evaluated with it at higher resolution (baaivision/EVA, EVA-01/det, backbone/utils.py get_rel_pos,
interp_type "beit").
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

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
    weights = _weights(table.shape[0], rows).to(table.device)
    # In float64, which autocast leaves alone.
    return (weights @ table.detach().double()).to(table.dtype)


@lru_cache(maxsize=64)
def _weights(source_rows: int, rows: int) -> torch.Tensor:
    """Return the weight (rows, source_rows) of every row of a table in every row of the new one."""
    distances = [1.0]
    for i in range(1, source_rows // 2):
        distances.append(distances[-1] + _RATIO**i)
    on_cpu: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    source = torch.tensor([-d for d in reversed(distances)] + [0.0, *distances], **on_cpu)
    places = torch.arange(rows, **on_cpu) - rows // 2
    return cubic_spline_weights(source, places)


def cubic_spline_weights(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return W such that W @ y is the cubic spline through (x, y), read at `places`.

    The spline has the same third derivative on both sides of the second and the last but one point
    ("not-a-knot"). Beyond the ends its outer pieces go on.

    Args:
        x: (n,) points in ascending order, n at least 4.
        places: (m,) where to read.

    Returns:
        (m, n) in float64.
    """
    x, places = x.double().cpu(), places.double().cpu()
    n, h = len(x), x.diff()
    # The second derivatives M of the spline solve A M = B y.
    A, B = torch.zeros(2, n, n, dtype=torch.float64, device="cpu")
    for i in range(1, n - 1):
        A[i, i - 1 : i + 2] = torch.stack([h[i - 1], 2 * (h[i - 1] + h[i]), h[i]])
        B[i, i - 1 : i + 2] = torch.stack([1 / h[i - 1], -1 / h[i - 1] - 1 / h[i], 1 / h[i]]) * 6
    A[0, :3] = torch.stack([h[1], -h[0] - h[1], h[0]])
    A[-1, -3:] = torch.stack([h[-1], -h[-2] - h[-1], h[-2]])
    second = torch.linalg.solve(A, B)  # (n, n)
    piece = torch.searchsorted(x, places).sub(1).clamp(0, n - 2)
    width = h[piece, None]
    after, before = places[:, None] - x[piece, None], x[piece + 1, None] - places[:, None]
    values = torch.eye(n, dtype=torch.float64, device="cpu")

    def end(share: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
        """What one end of a piece adds through its value and through its second derivative."""
        bend = (share**3 / width - share * width) / 6
        return share / width * values[point] + bend * second[point]

    return end(before, piece) + end(after, piece + 1)
