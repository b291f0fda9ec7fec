"""Absolute position embeddings: one learned vector for each place of a grid."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

from vitdet.utils.checks import InputError

PosEmbedResize = Literal["bicubic", "bicubic_antialias", "crop"]


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
            aligned), "bicubic_antialias" as timm (layers/pos_embed.py), "crop" takes the upper left
            H x W places, which is right for a map of the training scale that is only smaller.
        grid: (S, T), None for a square.

    Returns:
        (1, H, W, C); the grid itself, without any arithmetic, when it has the map's size.

    Raises:
        InputError: no such grid, or one that is smaller than what a crop needs.
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
        mode="bicubic",
        align_corners=False,
        antialias=mode == "bicubic_antialias",
    )
    return places.permute(0, 2, 3, 1)
