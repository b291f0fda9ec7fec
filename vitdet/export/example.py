"""An image to follow a model with: a tracer keeps what it sees, so it has to see the general case.

Where a side in tokens is a multiple of a window, or that of a position table, our layers leave out
padding or resizing. A graph that was followed there would leave it out for every size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitdet.export.graphs import Graph

_STEPS = range(3, 65)  # sides that are tried, in strides


def example_image(graph: Graph, dtype: torch.dtype) -> torch.Tensor:
    """Return a grey image (3, H, W) to follow `graph` with: of its size, or of a telling one."""
    height, width = graph.size or (_sides(graph) if not graph.square else _part_of(graph.square))
    return torch.full((3, height, width), 128, dtype=dtype)


def _part_of(square: int) -> tuple[int, int]:
    """Return a size that has to be padded both ways."""
    return square - square // 4, square - square // 8


def _sides(graph: Graph) -> tuple[int, int]:
    """Return two sides in pixels, different, with no part that our layers could leave out."""
    model: Any = graph.model
    patch = int(getattr(getattr(model.backbone, "net", None), "patch_size", graph.stride))
    grids = {steps: steps * graph.stride // patch for steps in _STEPS}
    windows, tables = _special(model)
    # a window that divides them all is no case to tell apart
    windows = {w for w in windows if any(grid % w for grid in grids.values())}
    general = [
        steps
        for steps, grid in grids.items()
        if grid not in tables and all(grid % window for window in windows)
    ]
    first, second, *_ = [*general, *_STEPS]
    # Pixels that are no multiple of the stride: they have to be padded.
    return first * graph.stride - graph.stride // 4, second * graph.stride - graph.stride // 8


def _special(model: nn.Module) -> tuple[set[int], set[int]]:
    """Return the sides of windows and of position tables, in tokens."""
    sides = (getattr(module, "window_size", 0) for module in model.modules())
    windows = {side for side in sides if isinstance(side, int) and side > 1}
    tables = {
        (parameter.shape[0] + 1) // 2
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in ("rel_pos_h", "rel_pos_w")
    }
    return windows, tables
