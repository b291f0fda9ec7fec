"""Rotary positions of a map (Su et al., "RoFormer", Sec. 3.4.2; EVA-02, Sec. 2.1, on two axes).

Channels 2i and 2i + 1 of a query or key are a point in a plane, turned by an angle that grows with
the token's place: the first half of a head's channels by the row, the second half by the column.
The product of a turned query and a turned key depends on their offset alone.

The tables are functions of the map's size, computed once a forward pass for all blocks. They are in
no state dict: the published files hold copies (`rope_win.freqs_cos`, ...) that fit one size only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from vitdet.utils.checks import fail

Size = tuple[int, int]
RopeResize = Literal["extend", "stretch"]


class RotaryTables(NamedTuple):
    """Cosine and sine of every token's angles, each (L, D) in float32, row-major over the map.

    The planes are channels 2i and 2i + 1, with `halves` channels i and i + D / 2.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    halves: bool = False


def check_head_dim(dim: int, num_heads: int) -> None:
    """Raise an InputError unless a head's channels split into pairs for rows and for columns."""
    if dim % (4 * num_heads):
        fail(
            "num_heads with rotary positions",
            expected=f"a head of a multiple of 4 channels, out of {dim}",
            got=f"{num_heads} heads",
            remedy="Change num_heads or embed_dim.",
        )


def rotary_tables(
    size: Size,
    head_dim: int,
    *,
    places: Size = (1, 1),
    grid: Size = (1, 1),
    theta: float = 10000.0,
    device: torch.device | None = None,
) -> RotaryTables:
    """Compute the tables of a map of any size.

    Token i of an axis has the position i / places * grid, each of that axis. The angle of frequency
    j is that position times theta ** (-2 j / (D / 2)), j = 0 to D / 4 - 1. On a square map of
    `places` tokens the numbers are those of baaivision/EVA, EVA-02/det, backbone/utils.py
    VisionRotaryEmbeddingFast.

    Args:
        size: (H, W) in tokens.
        head_dim: channels D of a head, a multiple of 4.
        places: so many rows, and so many columns, span `grid`.
        grid: (H, W) of the map that the weights were pretrained with, in its tokens.
        theta: base of the frequencies.
        device: where to put them.

    Returns:
        Tables of L = H * W rows.
    """
    half = head_dim // 2
    exponents = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
    frequencies = 1.0 / theta**exponents  # (D / 4,)
    axes = []
    for length, across, spanned in zip(size, places, grid, strict=True):
        positions = torch.arange(length, dtype=torch.float32, device=device) / across * spanned
        axes.append((positions[:, None] * frequencies).repeat_interleave(2, dim=1))  # (S, D / 2)
    rows, columns = axes
    shape = (*size, half)

    def spread(of_rows: torch.Tensor, of_columns: torch.Tensor) -> torch.Tensor:
        both = (of_rows[:, None].expand(shape), of_columns[None].expand(shape))
        return torch.cat(both, dim=-1).flatten(0, 1)  # (L, D)

    return RotaryTables(spread(rows.cos(), columns.cos()), spread(rows.sin(), columns.sin()))


def centred_tables(
    size: Size,
    head_dim: int,
    places: Size,
    *,
    theta: float = 100.0,
    device: torch.device | None = None,
) -> RotaryTables:
    """Compute the tables of DINOv3 (Simeoni et al., "DINOv3", Sec. 3.2) of a map or a window.

    An axis of the whole map spans -1 to 1 whatever its length; a token stands in the middle of its
    place. The angle of frequency j is 2 pi times that, over theta ** (2 j / (D / 2)). Numbers and
    order of channels as facebookresearch/dinov3, layers/rope_position_encoding.py, at inference;
    the published files hold the periods rounded to bfloat16.

    Args:
        size: (H, W) in tokens of what attends: the map, or a window of it.
        head_dim: channels D of a head, a multiple of 4.
        places: (H, W) of the map. In a window the offsets are those of the map.
        theta: base of the periods.
        device: where to put them.

    Returns:
        Tables of L = H * W rows, over halves.
    """
    half = head_dim // 2
    exponents = 2.0 * torch.arange(head_dim // 4, dtype=torch.float32, device=device) / half
    periods = theta**exponents  # (D / 4,)
    axes = []
    for length, whole in zip(size, places, strict=True):
        middles = torch.arange(0.5, length, dtype=torch.float32, device=device) / whole
        axes.append(2 * math.pi * (2 * middles - 1)[:, None] / periods)  # (S, D / 4)
    shape = (*size, head_dim // 4)
    both = (axes[0][:, None].expand(shape), axes[1][None].expand(shape))
    angles = torch.cat(both, dim=-1).flatten(0, 1).tile(2)  # (L, D)
    return RotaryTables(angles.cos(), angles.sin(), halves=True)


def rotate(x: torch.Tensor, tables: RotaryTables) -> torch.Tensor:
    """Turn queries or keys by their tokens' angles.

    Args:
        x: (B, N, P + L, D). The P prefix tokens, which have no place, stay as they are.
        tables: of the L tokens.

    Returns:
        (B, N, P + L, D) in the type of x; computed in the wider of its type and float32.
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


@dataclass(frozen=True)
class EvaRope:
    """Rotary positions of EVA-02.

    Args:
        head_dim: channels D of a head.
        grid: (H, W) in tokens of the pretraining's map.
        places: so many rows and columns of tokens span it, and a larger map continues them; None:
            what attends spans it, whatever its size.
    """

    head_dim: int
    grid: Size
    places: Size | None = None

    def __call__(self, attends: Size, whole: Size, device: torch.device) -> RotaryTables:
        """Return the tables of what attends, a window or the map."""
        del whole
        places = self.places or attends
        return rotary_tables(attends, self.head_dim, places=places, grid=self.grid, device=device)


@dataclass(frozen=True)
class Dinov3Rope:
    """Rotary positions of DINOv3, see `centred_tables`."""

    head_dim: int

    def __call__(self, attends: Size, whole: Size, device: torch.device) -> RotaryTables:
        """Return the tables of what attends, with the offsets of the whole map."""
        return centred_tables(attends, self.head_dim, whole, device=device)


def eva_ropes(
    head_dim: int, grid: int | Sequence[int] | None, train_size: Size, resize: RopeResize
) -> tuple[EvaRope, EvaRope]:
    """Return EVA-02's rotary positions of window blocks and of global blocks.

    A window always spans the pretraining's grid. In global blocks the training map spans it, and
    every other map has its positions ("extend"): a rectangle, or a smaller square, is a cut of it
    and keeps its distances, and what reaches beyond continues them. With "stretch" the map at hand
    spans the grid on each axis, as in huggingface/pytorch-image-models, models/eva.py.

    Args:
        head_dim: channels D of a head.
        grid: side in tokens of the pretraining's map, or its (H, W) (pt_hw_seq_len,
            ref_feat_shape); None: a token is a token everywhere (without intp_freq).
        train_size: (H, W) of the training image in tokens.
        resize: "extend" or "stretch".
    """
    if grid is None:
        unscaled = EvaRope(head_dim, (1, 1), (1, 1))
        return unscaled, unscaled
    height, width = (grid, grid) if isinstance(grid, int) else grid
    window = EvaRope(head_dim, (height, width))
    return window, window if resize == "stretch" else replace(window, places=train_size)
