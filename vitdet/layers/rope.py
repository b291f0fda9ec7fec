"""Rotary positions of a map (Su et al., "RoFormer", Sec. 3.4.2; EVA-02, Sec. 2.1, on two axes).

Pairs of channels of a query or key are points in a plane, turned by an angle that grows with the
token's place: the first half of a head's channels by the row, the second half by the column. The
product of a turned query and a turned key depends on their offset alone.

The tables are functions of the map's size, computed once a forward pass for all blocks. They are in
no state dict: the published files hold copies (`rope_win.freqs_cos`, ...) that fit one size only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from vitdet.utils.checks import InputError

Size = tuple[int, int]
RopeResize = Literal["extend", "stretch"]


class RotaryTables(NamedTuple):
    """Cosine and sine of every token's angles, each (L, D) in float32, row-major over the map.

    The planes are channels 2i and 2i + 1, with `halves` channels i and i + D / 2.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    halves: bool = False


# Tables of what attends (a window or the map), given its (H, W) and that of the map.
Rope = Callable[[Size, Size, torch.device], RotaryTables]


@dataclass(frozen=True)
class EvaRope:
    """Rotary positions of EVA-02.

    Token i of an axis has the position i / places * grid, each of that axis. The angle of frequency
    j is that position times 10000 ** (-2 j / (D / 2)), j = 0 to D / 4 - 1. On a square map of
    `places` tokens the numbers are those of baaivision/EVA, EVA-02/det, backbone/utils.py
    VisionRotaryEmbeddingFast.

    Perception Encoder counts from 1, which tells the places from a class token, and has the
    columns first (facebookresearch/perception_models, core/vision_encoder/rope.py and
    apps/detection/detectron2_pe/modeling/backbone/pev1_det.py).

    Args:
        head_dim: channels D of a head, a multiple of 4.
        grid: (H, W) in tokens of the pretraining's map.
        places: so many rows and columns of tokens span it, and a larger map continues them; None:
            what attends spans it, whatever its size.
        first: the position of the first row and column.
        columns_first: whether the first half of the channels turns with the column.
    """

    head_dim: int
    grid: Size = (1, 1)
    places: Size | None = (1, 1)
    first: int = 0
    columns_first: bool = False

    def __call__(self, attends: Size, whole: Size, device: torch.device) -> RotaryTables:
        """Return the tables of what attends, a window or the map."""
        del whole
        half = self.head_dim // 2
        exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
        frequencies = 1.0 / 10000.0**exponents  # (D / 4,)
        axes = []
        for length, across, span in zip(attends, self.places or attends, self.grid, strict=True):
            positions = torch.arange(length, dtype=torch.float32, device=device) / across * span
            positions = positions + self.first if self.first else positions
            axes.append((positions[:, None] * frequencies).repeat_interleave(2, 1))  # (S, D / 2)
        angles = _spread(*axes)
        angles = angles.roll(half, dims=1) if self.columns_first else angles
        return RotaryTables(angles.cos(), angles.sin())


@dataclass(frozen=True)
class Dinov3Rope:
    """Rotary positions of DINOv3 (Simeoni et al., "DINOv3", Sec. 3.2).

    An axis of the whole map spans -1 to 1 whatever its length; a token stands in the middle of its
    place. The angle of frequency j is 2 pi times that, over 100 ** (2 j / (D / 2)). Numbers and
    order of channels as facebookresearch/dinov3, layers/rope_position_encoding.py, at inference;
    the published files hold the periods rounded to bfloat16. D (`head_dim`) is a multiple of 4.
    """

    head_dim: int

    def __call__(self, attends: Size, whole: Size, device: torch.device) -> RotaryTables:
        """Return the tables of what attends, with the offsets of the whole map."""
        count = torch.arange(self.head_dim // 4, dtype=torch.float32, device=device)
        periods = 100.0 ** (2.0 * count / (self.head_dim // 2))  # (D / 4,)
        axes = []
        for length, side in zip(attends, whole, strict=True):
            middles = torch.arange(0.5, length, dtype=torch.float32, device=device) / side
            axes.append(2 * math.pi * (2 * middles - 1)[:, None] / periods)  # (S, D / 4)
        angles = _spread(*axes).tile(2)  # (L, D)
        return RotaryTables(angles.cos(), angles.sin(), halves=True)


def _spread(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return (H * W, 2 * C): those of a place's row (H, C), then those of its column (W, C)."""
    shape = (rows.shape[0], columns.shape[0], rows.shape[1])  # an export follows these, not len()
    both = (rows[:, None].expand(shape), columns[None].expand(shape))
    return torch.cat(both, dim=-1).flatten(0, 1)


def rotate(x: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
    """Turn queries or keys x (B, N, P + L, D) by their tokens' angles.

    The P prefix tokens, which have no place, stay as they are. The result has the type of x; it is
    computed in the wider of that and float32.
    """
    prefix = x.shape[2] - tables.cos.shape[0]
    if prefix:
        return torch.cat((x[:, :, :prefix], rotate(x[:, :, prefix:], tables)), dim=2)
    if tables.halves:
        first, second = x.chunk(2, dim=-1)
        quarter_turn = torch.cat((-second, first), dim=-1)
    else:
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        quarter_turn = torch.stack((-second, first), dim=-1).flatten(-2)
    return (x * tables.cos + quarter_turn * tables.sin).to(x.dtype)


def make_ropes(
    kind: Literal["eva02", "dinov3", "pe"],
    head_dim: float,
    grid: int | Sequence[int] | None,
    train_size: Size,
    resize: RopeResize = "extend",
) -> tuple[Rope, Rope]:
    """Return the rotary positions of window blocks and of global blocks.

    Of EVA-02: a window always spans the pretraining's grid. In global blocks the training map spans
    it, and every other map has its positions ("extend"): a rectangle, or a smaller square, is a cut
    of it and keeps its distances, and what reaches beyond continues them. With "stretch" the map at
    hand spans the grid on each axis, as in huggingface/pytorch-image-models, models/eva.py.

    Of Perception Encoder: the same with its own order and start. SAM 3's trunk (facebookresearch/
    sam3, sam3/model/vitdet.py) has it with its window as the grid.

    Args:
        kind: "eva02", "pe", or "dinov3", to which what follows `head_dim` means nothing.
        head_dim: channels D of a head.
        grid: side in tokens of the pretraining's map, or its (H, W) (pt_hw_seq_len,
            ref_feat_shape); None: a token is a token everywhere (without intp_freq).
        train_size: (H, W) of the training image in tokens.
        resize: "extend" or "stretch".
    """
    dim = int(head_dim)
    if head_dim % 4:
        raise InputError(
            "num_heads with rotary positions: expected a head of a multiple of 4 channels, got "
            f"{head_dim:g}. Change num_heads or embed_dim."
        )
    if kind == "dinov3":
        return Dinov3Rope(dim), Dinov3Rope(dim)
    rope = EvaRope(dim, first=1, columns_first=True) if kind == "pe" else EvaRope(dim)
    if grid is None:
        return rope, rope
    height, width = (grid, grid) if isinstance(grid, int) else grid
    window = replace(rope, grid=(height, width), places=None)
    return window, window if resize == "stretch" else replace(window, places=train_size)
