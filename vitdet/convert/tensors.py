"""Functions of `rules.Make`: one weight of the model from tensors of a file."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vitdet.convert.rules import Function, Shape

Parts = Sequence[torch.Tensor | None]


def copy(parts: Parts, shape: Shape) -> torch.Tensor:
    """Return the tensor as it is: another name for the same weight."""
    del shape
    return _only(parts)


def join(parts: Parts, shape: Shape) -> torch.Tensor:
    """Concatenate along the first axis; absent parts are zeros: q, no k, v to one bias."""
    given = [part for part in parts if part is not None]
    rows = sum(len(part) for part in given)
    absent = len(parts) - len(given)
    spare = max(shape[0] - rows, 0) // absent if absent else 0
    zeros = given[0].new_zeros((spare, *given[0].shape[1:]))
    return torch.cat([zeros if part is None else part for part in parts])


def part(index: int, count: int = 3) -> Function:
    """Return the function that takes part `index` of `count` equal ones along the first axis."""

    def take(parts: Parts, shape: Shape) -> torch.Tensor:
        del shape
        whole = _only(parts)
        rows = len(whole) // count
        return whole[index * rows : (index + 1) * rows].clone()

    return take


def scaled(factor: float) -> Function:
    """Return the function that multiplies by a constant."""

    def scale(parts: Parts, shape: Shape) -> torch.Tensor:
        del shape
        return _only(parts) * factor

    return scale


def scaled_by_head(parts: Parts, shape: Shape) -> torch.Tensor:
    """Multiply a table (places, D) by D ** -0.5: tables learned for scaled queries."""
    del shape
    table = _only(parts)
    return table * table.shape[-1] ** -0.5


def reshaped(parts: Parts, shape: Shape) -> torch.Tensor:
    """Return the tensor in the model's shape where that is only another view of the numbers."""
    tensor = _only(parts)
    return tensor.reshape(shape) if tensor.numel() == math.prod(shape) else tensor


def grid_to_rows(parts: Parts, shape: Shape) -> torch.Tensor:
    """Flatten positions (1, H, W, C) to (1, H * W, C)."""
    del shape
    tensor = _only(parts)
    return tensor.flatten(1, 2) if tensor.ndim == 4 else tensor


def batched(parts: Parts, shape: Shape) -> torch.Tensor:
    """Put the axes of size one before it that the model's tensor has more."""
    tensor = _only(parts)
    return tensor[(None,) * max(len(shape) - tensor.ndim, 0)]


def zeros(parts: Parts, shape: Shape) -> torch.Tensor:
    """Return zeros where a file has no tensor, of the kind of its neighbour."""
    return _only(parts).new_zeros(shape)


def _only(parts: Parts) -> torch.Tensor:
    tensor = parts[0]
    if tensor is None:
        raise ValueError("a rule of a format: no tensor for a function of one")
    return tensor
