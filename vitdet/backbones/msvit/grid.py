"""The chunks of a map, which of them attend to each other, and what is outside of the map.

Zhang et al., "Multi-Scale Vision Longformer", Sec. 3.2, with the modes of
microsoft/VisionLongformerForObjectDetection, msvit/slidingchunk_2d.py. A map of H x W tokens is cut
into chunks of w x w, filled up with zeros below and on the right. A query attends to the tokens of
some chunks, the *slots*, by their offset from its own chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from vitdet.utils.checks import InputError

NEIGHBOURS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
_ALL = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1))


def check_pattern(exact: int, mode: int) -> None:
    """Raise an InputError unless `exact` and `mode` exist."""
    if exact not in (0, 1, -1) or mode not in range(-1, len(NEIGHBOURS) + 1):
        raise InputError(
            f"exact and mode: expected exact 0, 1 or -1, and mode 0, -1 or 1 to 8, got exact "
            f"{exact}, mode {mode}. 0 and 0 are the published recipes' values."
        )


@dataclass(frozen=True)
class ChunkGrid:
    """Chunks of a map and the pattern of the attention.

    Args:
        height: rows of tokens H.
        width: columns of tokens W.
        window: side w of a chunk in tokens.
        exact: 0: every real token of the slots; 1: of those the ones at most w rows and w columns
            away (the published code has this for mode 0 alone); -1: the chunk grid wraps around,
            and zeros that fill up the map are seen where a slot is reached around an edge.
        mode: 0: own chunk and its 8 neighbours; -1: own chunk; k from 1 to 8: own chunk and
            NEIGHBOURS[k - 1].
    """

    height: int
    width: int
    window: int
    exact: int = 0
    mode: int = 0

    def __post_init__(self) -> None:
        """Check the pattern."""
        check_pattern(self.exact, self.mode)

    @property
    def rows(self) -> int:
        """Rows of chunks."""
        return -(-self.height // self.window)

    @property
    def columns(self) -> int:
        """Columns of chunks."""
        return -(-self.width // self.window)

    @property
    def slots(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) from a query's chunk to each chunk that it attends to."""
        if self.mode == 0:
            return _ALL
        return ((0, 0),) if self.mode < 0 else ((0, 0), NEIGHBOURS[self.mode - 1])

    def chunks(self, x: torch.Tensor) -> torch.Tensor:
        """Cut tokens (B, N, H, W, D) into (B, N, rows, columns, w * w, D), filled up with zeros."""
        side = self.window
        below, right = self.rows * side - self.height, self.columns * side - self.width
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        x = x.unflatten(3, (self.columns, side)).unflatten(2, (self.rows, side))
        return x.transpose(3, 4).flatten(4, 5)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Undo `chunks`: (B, N, rows, columns, w * w, D) to (B, N, H, W, D)."""
        x = x.unflatten(4, (self.window, self.window)).transpose(3, 4)
        x = x.flatten(4, 5).flatten(2, 3)
        return x[:, :, : self.height, : self.width]

    def with_border(self, x: torch.Tensor) -> torch.Tensor:
        """Put a border of one chunk round chunks (B, N, rows, columns, ...): zeros, or wrapped."""
        if self.exact >= 0:
            return F.pad(x, (0, 0, 0, 0, 1, 1, 1, 1))
        x = torch.cat([x[:, :, -1:], x, x[:, :, :1]], dim=2)
        return torch.cat([x[:, :, :, -1:], x, x[:, :, :, :1]], dim=3)

    def unseen(self, device: torch.device) -> torch.Tensor:
        """Return which keys no query of a chunk sees.

        Returns:
            bool (rows, columns, slots * w * w).
        """
        below = self._outside(self.height, self.rows, 0, device)  # (rows, slots, w)
        right = self._outside(self.width, self.columns, 1, device)  # (columns, slots, w)
        unseen = below[:, None, :, :, None] | right[None, :, :, None, :]
        return unseen.flatten(2)

    def _outside(self, size: int, count: int, axis: int, device: torch.device) -> torch.Tensor:
        chunk = torch.arange(count, device=device)[:, None, None]
        step = torch.tensor([slot[axis] for slot in self.slots], device=device)[:, None]
        place = (chunk + step) * self.window + torch.arange(self.window, device=device)
        if self.exact < 0:  # reached around an edge, the zeros of the filling are seen
            inside = (chunk + step >= 0) & (chunk + step < count)
            return inside & (place >= size)
        return (place < 0) | (place >= size)

    def slot_bias(self, table: torch.Tensor) -> torch.Tensor:
        """Lay out a table of relative positions for the keys of a chunk.

        Args:
            table: (N, 4 * w - 1, 4 * w - 1), entry (row of query - row of key + 2 * w - 1, the same
                for columns).

        Returns:
            (N, w * w, slots * w * w).
        """
        side = self.window
        # As key minus query the entries of one query are a window that moves with the query.
        windows = table.flip(1, 2).unfold(1, 3 * side, 1).unfold(2, 3 * side, 1).flip(1, 2)
        # (N, w, w, 3 * w, 3 * w) to (N, w * w, 3, 3, w * w): query, chunk of key, key
        bias = windows.unflatten(4, (3, side)).unflatten(3, (3, side)).transpose(4, 5)
        bias = bias.flatten(5, 6).flatten(1, 2)
        bias = torch.stack([bias[:, :, 1 + row, 1 + column] for row, column in self.slots], dim=2)
        return bias.flatten(2)

    def too_far(self, device: torch.device) -> torch.Tensor:
        """Return which keys of the slots are more than w rows or columns away from a query.

        Returns:
            bool (w * w, slots * w * w).
        """
        places = torch.arange(self.window, device=device)
        far = []
        for axis in (0, 1):
            step = torch.tensor([slot[axis] for slot in self.slots], device=device)[:, None]
            key = step * self.window + places  # (slots, w)
            far.append((key - places[:, None, None]).abs() > self.window)  # (w, slots, w)
        either = far[0][:, None, :, :, None] | far[1][None, :, :, None, :]
        return either.flatten(2).flatten(0, 1)


class Chunks(NamedTuple):
    """What a sliding-chunk kernel gets.

    q is (B, N, rows, columns, w * w, D) and scaled; k and v are the same. The global tokens' are
    (B, N, G, D). bias is (N or 1, w * w, G + slots * w * w), or None for none.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_global: torch.Tensor
    v_global: torch.Tensor
    bias: torch.Tensor | None
