"""Functions of `rules.Make`: one weight of the model from tensors of a file."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vitdet.convert.rules import Function, Shape
from vitdet.utils.checks import fail

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


def part(index: int, count: int = 3, to: int | None = None) -> Function:
    """Return the function that takes part `index` (or up to `to`) of `count` equal ones."""

    def take(parts: Parts, shape: Shape) -> torch.Tensor:
        del shape
        whole = _only(parts)
        rows = len(whole) // count
        if len(whole) % count:
            got, remedy = len(whole), "The file is damaged."
            fail("attn.qkv", expected=f"a multiple of {count} rows", got=got, remedy=remedy)
        return whole[index * rows : (to or index + 1) * rows].clone()

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


def masked(parts: Parts, shape: Shape) -> torch.Tensor:
    """Return the bias where the mask is one, and zeros for k, where it is zero or not a number."""
    del shape
    bias, mask = parts
    assert bias is not None
    assert mask is not None
    return torch.where(mask == 1, bias, torch.zeros_like(bias))


def centred(parts: Parts, shape: Shape) -> torch.Tensor:
    """Put a kernel into the middle of a larger one, with zeros round it."""
    kernel = _only(parts)
    spare = shape[-1] - kernel.shape[-1] if kernel.ndim == len(shape) == 4 else 0
    if spare <= 0 or spare % 2:
        return kernel
    return F.pad(kernel, [spare // 2] * 4)


def every_token(parts: Parts, shape: Shape) -> torch.Tensor:
    """Repeat what one global token has for as many as the model has."""
    tensor = _only(parts)
    fits = tensor.ndim == len(shape) and all(
        rows in (1, wanted) for rows, wanted in zip(tensor.shape, shape, strict=True)
    )
    return tensor.expand(shape).clone() if fits else tensor


def axis(parts: Parts, shape: Shape) -> torch.Tensor:
    """Stretch positions along one axis (1, S, C), linearly."""
    tensor = _only(parts)
    if tensor.shape[1] == shape[1]:
        return tensor
    # not under autocast or in half precision: this is done once
    return F.interpolate(tensor.float().mT, size=shape[1], mode="linear").mT.to(tensor.dtype)


def offsets(parts: Parts, shape: Shape) -> torch.Tensor:
    """Stretch relative positions (side * side, N), bilinearly."""
    tensor = _only(parts)
    return tensor if len(tensor) == shape[0] else _stretched(tensor, math.isqrt(shape[0]))


def tokens(parts: Parts, shape: Shape) -> torch.Tensor:
    """Stretch a projection (G + S * S, F) along the tokens of its square map, bilinearly."""
    tensor = _only(parts)
    if len(tensor) == shape[0]:
        return tensor
    over = len(tensor) - math.isqrt(len(tensor)) ** 2
    map_side = math.isqrt(shape[0] - over)
    return torch.cat([tensor[:over], _stretched(tensor[over:], map_side)])


def _stretched(table: torch.Tensor, side: int) -> torch.Tensor:
    old = math.isqrt(len(table))
    if old * old != len(table):
        remedy = "Check --source-format."
        fail("position table", expected="a square", got=f"{len(table)} rows", remedy=remedy)
    square = table.float().T.unflatten(1, (old, old))[None]
    square = F.interpolate(square, size=(side, side), mode="bilinear", align_corners=False)
    return square[0].flatten(1).T.to(table.dtype).contiguous()


def _only(parts: Parts) -> torch.Tensor:
    tensor = parts[0]
    if tensor is None:
        raise ValueError("a rule of a format: no tensor for a function of one")
    return tensor
