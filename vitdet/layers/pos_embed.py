"""Absolute position embeddings: one learned vector for each place of a square grid."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

from vitdet.utils.checks import fail

PosEmbedResize = Literal["bicubic", "bicubic_antialias", "crop"]


def resize_pos_embed(
    pos_embed: torch.Tensor, size: tuple[int, int], mode: PosEmbedResize = "bicubic"
) -> torch.Tensor:
    """Fit a square grid of position embeddings to a map.

    Args:
        pos_embed: (1, S * S, C), without a class row.
        size: (H, W) of the map in tokens.
        mode: "bicubic" as detectron2 (backbone/utils.py get_abs_pos: no antialias, corners not
            aligned), "bicubic_antialias" as timm (layers/pos_embed.py), "crop" takes the upper left
            H x W places, which is right for a map of the training scale that is only smaller.

    Returns:
        (1, H, W, C); the grid itself, without any arithmetic, when S == H == W.

    Raises:
        InputError: the grid is not square, or smaller than what a crop needs.
    """
    side = math.isqrt(pos_embed.shape[1])
    if side * side != pos_embed.shape[1]:
        fail(
            "pos_embed",
            expected="a square grid, without a class row",
            got=f"{pos_embed.shape[1]} rows",
            remedy="Set pretrain_use_cls_token to what the weights were trained with.",
        )
    grid = pos_embed.reshape(1, side, side, -1)  # (1, S, S, C)
    height, width = size
    if (side, side) == (height, width):
        return grid
    if mode == "crop":
        if max(height, width) > side:
            fail(
                "pos_embed with resize 'crop'",
                expected=f"a map of at most {side}x{side} tokens",
                got=f"{height}x{width}",
                remedy="Use 'bicubic', or a larger pretrain_img_size.",
            )
        return grid[:, :height, :width]
    grid = F.interpolate(
        grid.permute(0, 3, 1, 2),
        size=(height, width),
        mode="bicubic",
        align_corners=False,
        antialias=mode == "bicubic_antialias",
    )
    return grid.permute(0, 2, 3, 1)
