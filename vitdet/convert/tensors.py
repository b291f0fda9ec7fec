"""Functions of `rules.Make`: one weight of the model from tensors of a file."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vitdet.convert.rules import Function, Shape
from vitdet.utils.checks import InputError

Parts = Sequence[torch.Tensor | None]


def copy(parts: Parts, shape: Shape) -> torch.Tensor:
    """Return the tensor as it is: another name for the same weight."""
    del shape
    tensor = parts[0]
    assert tensor is not None
    return tensor


def join(parts: Parts, shape: Shape) -> torch.Tensor:
    """Concatenate along the first axis; absent parts are zeros: q, no k, v to one bias."""
    given = [part for part in parts if part is not None]
    rows, absent = sum(map(len, given)), len(parts) - len(given)
    left = max(shape[0] - rows, 0) // absent if absent else 0
    zeros = given[0].new_zeros((left, *given[0].shape[1:]))
    return torch.cat([zeros if part is None else part for part in parts])


def part(index: int, count: int = 3, to: int | None = None) -> Function:
    """Return the function that takes part `index` (or up to `to`) of `count` equal ones."""

    def take(parts: Parts, shape: Shape) -> torch.Tensor:
        whole = copy(parts, shape)
        rows, rest = divmod(len(whole), count)
        if rest:
            text = f"expected a multiple of {count} rows, got {len(whole)}. The file is damaged."
            raise InputError(f"attn.qkv: {text}")
        return whole[index * rows : (to or index + 1) * rows].clone()

    return take


def scaled_by_head(parts: Parts, shape: Shape) -> torch.Tensor:
    """Multiply a table (places, D) by D ** -0.5: tables learned for scaled queries."""
    table = copy(parts, shape)
    return table * table.shape[-1] ** -0.5


def grid_to_rows(parts: Parts, shape: Shape) -> torch.Tensor:
    """Flatten positions (1, H, W, C) to (1, H * W, C)."""
    tensor = copy(parts, shape)
    return tensor.flatten(1, 2) if tensor.ndim == 4 else tensor


def batched(parts: Parts, shape: Shape) -> torch.Tensor:
    """Put the axes of size one before it that the model's tensor has more."""
    tensor = copy(parts, shape)
    return tensor[(None,) * max(len(shape) - tensor.ndim, 0)]


def positions(parts: Parts, shape: Shape) -> torch.Tensor:
    """Return a class token or positions as (1, rows, C), from (C), (rows, C) or (1, H, W, C)."""
    return batched([grid_to_rows(parts, shape)], shape)


def kernel(parts: Parts, shape: Shape) -> torch.Tensor:
    """Return a patch kernel (C, channels, P, P), from a linear layer's (C, P * P * channels) too.

    The layer reads the rows of a patch, in each its pixels, in each their channels (SigLIP 2).
    """
    tensor = copy(parts, shape)
    if tensor.ndim != 2:
        return tensor
    side = math.isqrt(tensor.shape[1] // shape[1])
    if side * side * shape[1] != tensor.shape[1]:
        return tensor
    return tensor.unflatten(1, (side, side, shape[1])).permute(0, 3, 1, 2).contiguous()


def zeros(parts: Parts, shape: Shape) -> torch.Tensor:
    """Return zeros where a file has no tensor, of the kind of its neighbour."""
    return copy(parts, shape).new_zeros(shape)


def masked(parts: Parts, shape: Shape) -> torch.Tensor:
    """Return the bias where the mask is one, and zeros for k, where it is zero or not a number."""
    bias, mask = copy(parts, shape), copy(parts[1:], shape)
    return torch.where(mask == 1, bias, torch.zeros_like(bias))


def centred(parts: Parts, shape: Shape) -> torch.Tensor:
    """Put a kernel into the middle of a larger one, with zeros round it."""
    kernel = copy(parts, shape)
    more = shape[-1] - kernel.shape[-1] if kernel.ndim == len(shape) == 4 else 0
    return kernel if more <= 0 or more % 2 else F.pad(kernel, [more // 2] * 4)


def every_token(parts: Parts, shape: Shape) -> torch.Tensor:
    """Repeat what one global token has for as many as the model has."""
    tensor = copy(parts, shape)
    pairs = zip(tensor.shape, shape, strict=False)
    fits = tensor.ndim == len(shape) and all(rows in (1, wanted) for rows, wanted in pairs)
    return tensor.expand(shape).clone() if fits else tensor


def axis(parts: Parts, shape: Shape) -> torch.Tensor:
    """Stretch positions along one axis (1, S, C), linearly."""
    tensor = copy(parts, shape)
    if tensor.shape[1] == shape[1]:
        return tensor
    # not under autocast or in half precision: this is done once
    return F.interpolate(tensor.float().mT, size=shape[1], mode="linear").mT.to(tensor.dtype)


def offsets(parts: Parts, shape: Shape) -> torch.Tensor:
    """Stretch relative positions (side * side, N), bilinearly."""
    tensor = copy(parts, shape)
    return tensor if len(tensor) == shape[0] else _stretched(tensor, math.isqrt(shape[0]))


def tokens(parts: Parts, shape: Shape) -> torch.Tensor:
    """Stretch a projection (G + S * S, F) along the tokens of its square map, bilinearly."""
    tensor = copy(parts, shape)
    if len(tensor) == shape[0]:
        return tensor
    first = len(tensor) - math.isqrt(len(tensor)) ** 2  # global tokens
    map_side = math.isqrt(shape[0] - first)
    return torch.cat([tensor[:first], _stretched(tensor[first:], map_side)])


def _stretched(table: torch.Tensor, side: int) -> torch.Tensor:
    old = math.isqrt(len(table))
    if old * old != len(table):
        text = f"expected a square, got {len(table)} rows. Check --source-format."
        raise InputError(f"position table: {text}")
    square = table.float().T.unflatten(1, (old, old))[None]
    square = F.interpolate(square, size=(side, side), mode="bilinear", align_corners=False)
    return square[0].flatten(1).T.to(table.dtype).contiguous()
