"""Fit one tensor of a backbone to the shape that the model wants, where that has a meaning."""

from __future__ import annotations

import math
from typing import NoReturn

import torch
import torch.nn.functional as F

from vitdet.layers.positions import resize_pos_embed, resize_rel_pos
from vitdet.utils.checks import fail

Shape = tuple[int, ...]


def fit(
    name: str,
    tensor: torch.Tensor,
    shape: Shape,
    *,
    resize_patch_embed: bool,
    source: str,
    grid: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, list[str]]:
    """Return the tensor in the model's shape, and notes about what that took.

    Position embeddings are resized as detectron2 does at run time (bicubic), relative position
    tables linearly, patch kernels on demand. Anything else comes back as it is.

    Args:
        name: inside the backbone, as detectron2 spells it.
        tensor: the file's.
        shape: the model's.
        resize_patch_embed: whether a kernel may be resampled (bicubic), as
            baaivision/EVA does for its "p14to16" files.
        source: the file, for messages.
        grid: (H, W) of the model's absolute positions, None for a square.

    Raises:
        InputError: positions of the file that are no square grid, another patch size without the
            option.
    """
    if tuple(tensor.shape) == shape:
        return tensor, []
    if name == "pos_embed" and tensor.ndim == len(shape) == 3 and tensor.shape[2] == shape[2]:
        return _pos_embed(tensor, shape, source, grid)
    if name.endswith((".rel_pos_h", ".rel_pos_w")) and tensor.ndim == len(shape) == 2:
        places = (shape[0] + 1) // 2
        return resize_rel_pos(tensor.float(), places).to(tensor.dtype).contiguous(), []
    if name == "patch_embed.proj.weight" and tuple(tensor.shape[:2]) == shape[:2]:
        if not resize_patch_embed:
            _other_patch_size(tensor.shape[-1], shape[-1], source)
        return _patch_embed(tensor, shape)
    return tensor, []


def class_rows(rows: int, what: str, grid: tuple[int, int] | None = None) -> int:
    """Return how many of the rows of a position embedding stand before its grid: 0 or 1.

    The grid is a square where it is not given.
    """
    for spare in (0, 1):
        places = math.prod(grid) if grid else math.isqrt(rows - spare) ** 2
        if places == rows - spare:
            return spare
    fail(
        what,
        expected="a square grid, with or without one class row",
        got=f"{rows} rows",
        remedy="Files with more tokens (distillation) or other grids cannot be used.",
    )


def _pos_embed(
    tensor: torch.Tensor, shape: Shape, source: str, grid: tuple[int, int] | None
) -> tuple[torch.Tensor, list[str]]:
    want = class_rows(shape[1], f"{source}: pos_embed of the model", grid)
    side = math.isqrt(shape[1] - want)
    wanted = grid or (side, side)
    of_file = f"{source}: pos_embed of the file"
    same = tensor.shape[1] - math.prod(wanted) in (0, 1)
    have = class_rows(tensor.shape[1], of_file, wanted if same else None)
    notes = []
    places = tensor[:, have:]
    if places.shape[1] != math.prod(wanted):
        side = math.isqrt(places.shape[1])
        places = resize_pos_embed(places.float(), wanted).to(tensor.dtype).flatten(1, 2)
        if side > min(wanted):
            notes.append(
                f"pos_embed shrinks from {side}x{side} to {wanted[0]}x{wanted[1]} places: to keep "
                f"all, set the backbone's pretrain_img_size to {side} times its patch size"
            )
    if want and not have:
        notes.append("pos_embed: class row filled with zeros, the file has none")
        places = torch.cat([places.new_zeros(1, 1, shape[2]), places], dim=1)
    elif want:
        places = torch.cat([tensor[:, :1], places], dim=1)
    elif have:
        notes.append("pos_embed: class row dropped, the model has none")
    return places.contiguous(), notes


def _patch_embed(tensor: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, list[str]]:
    kernel = F.interpolate(tensor.float(), size=shape[-2:], mode="bicubic", align_corners=False)
    note = f"patch_embed resampled from {tensor.shape[-1]} to {shape[-1]} pixels"
    return kernel.to(tensor.dtype), [note]


def _other_patch_size(have: int, want: int, source: str) -> NoReturn:
    remedy = "Use a recipe with its patch size, or allow to resample the kernel (bicubic): "
    fail(
        f"{source}: patch_embed.proj.weight",
        expected=f"patch size {want} (model)",
        got=f"patch size {have} (file)",
        remedy=remedy + "--resize-patch-embed.",
    )
