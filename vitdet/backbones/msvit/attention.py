"""The attention kinds of a multi-scale vision longformer that attend exactly.

Zhang et al., "Multi-Scale Vision Longformer", Sec. 3; parameter names of
microsoft/VisionLongformerForObjectDetection, msvit/. Every kind is made from a stage and the side S
in tokens of the square map that its positions are for, and maps tokens (B, G + L, C) to the same
shape: G global tokens first, then the L = H * W tokens of the map in row-major order.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from vitdet.backbones.msvit.grid import NEIGHBOURS, ChunkGrid
from vitdet.backbones.msvit.positions import PosResize, dense_bias, fit_offsets
from vitdet.backbones.msvit.sliding_chunk import sliding_chunk_attention
from vitdet.backbones.msvit.stage import Size, Stage
from vitdet.layers.attention import attention
from vitdet.layers.linear import Linear


def split_heads(x: torch.Tensor, parts: int, num_heads: int) -> tuple[torch.Tensor, ...]:
    """Split (B, L, parts * C) into `parts` tensors (B, N, L, D)."""
    return x.unflatten(2, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """Return (B, N, L, D) as (B, L, C)."""
    return x.transpose(1, 2).flatten(2)


class RelativePositions(nn.Module):
    """An attention with learned biases where the stage has relative positions.

    Args:
        stage: the stage.
        rows: entries of the table for pairs of tokens of the map, 0 for no table.
    """

    def __init__(self, stage: Stage, rows: int) -> None:
        super().__init__()
        heads, count = stage.num_heads, stage.num_global_tokens
        self.num_heads, self.num_global, self.backend = heads, count, stage.attention_backend

        def table(*shape: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(shape)) if stage.use_rel_pos and all(shape) else None

        self.local_relative_position_bias_table = table(rows, heads)
        # from a global token to every token of the map, and back
        self.g2l_relative_position_bias = table(2, heads, count)
        self.g2g_relative_position_bias = table(heads, count, count)

    def to_global(self) -> torch.Tensor | None:
        """Return the bias (N, G) from a token of the map to the global ones."""
        both = self.g2l_relative_position_bias
        return None if both is None else both[1]

    def from_global(self, length: int) -> torch.Tensor | None:
        """Return the bias (N, G, G + length) from the global tokens to all."""
        both, among = self.g2l_relative_position_bias, self.g2g_relative_position_bias
        if both is None or among is None:
            return None
        return torch.cat([among, both[0][:, :, None].expand(-1, -1, length)], dim=2)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Attend with a learned bias (N, Lq, Lk), or None.

        The bias is no sum of a term for rows and one for columns, which `vitdet.layers.attention`
        wants, so it meets torch's kernel here.
        """
        if bias is None:
            return attention(q, k, v, backend=self.backend)
        bias = bias.to(q.dtype)[None].expand(q.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    @abstractmethod
    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        """Map tokens x (B, G + H * W, C) of a map of `size` (H, W) to the same shape."""


class FullAttention(RelativePositions):
    """Every token attends to every token."""

    def __init__(self, stage: Stage, map_size: int) -> None:
        super().__init__(stage, (2 * map_size - 1) ** 2)
        dim = stage.embed_dim
        self.rel_pos_resize: PosResize = stage.rel_pos_resize
        self.qkv = Linear(dim, 3 * dim, bias=stage.qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        """Map tokens x (B, G + H * W, C) of a map of `size` (H, W) to the same shape."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        return self.proj(join_heads(self.attend(q, k, v, self._bias(size))))

    def _bias(self, size: Size) -> torch.Tensor | None:
        """Return the bias (N, G + L, G + L)."""
        table = self.local_relative_position_bias_table
        if table is None:
            return None
        bias = dense_bias(fit_offsets(table, size, self.rel_pos_resize))
        length = bias.shape[1]
        to_global, from_global = self.to_global(), self.from_global(length)
        if to_global is not None and from_global is not None:
            bias = torch.cat([to_global[:, None].expand(-1, length, -1), bias], dim=2)
            bias = torch.cat([from_global, bias], dim=1)
        return bias


class _GlobalTokens(RelativePositions):
    """Global tokens attend to all tokens, with weights of their own or those of the others."""

    def __init__(self, stage: Stage, rows: int) -> None:
        super().__init__(stage, rows)
        dim, bias = stage.embed_dim, stage.qkv_bias
        self.query = Linear(dim, dim, bias=bias)
        self.kv = Linear(dim, 2 * dim, bias=bias)
        self.proj = Linear(dim, dim)
        own = stage.num_global_tokens > 0 and not stage.share_global_weights
        self.query_global = Linear(dim, dim, bias=bias) if own else None
        self.kv_global = Linear(dim, 2 * dim, bias=bias) if own else None
        self.proj_global = Linear(dim, dim) if own else None

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        """Map tokens x (B, G + H * W, C) of a map of `size` (H, W) to the same shape."""
        k, v = split_heads(self.kv(x), 2, self.num_heads)
        (q,) = split_heads(self.query(x[:, self.num_global :]), 1, self.num_heads)
        local = self.proj(join_heads(self.attend_locally(q, k, v, size)))
        if not self.num_global:
            return local
        if self.kv_global is not None:
            k, v = split_heads(self.kv_global(x), 2, self.num_heads)
        query, proj = self.query_global or self.query, self.proj_global or self.proj
        (q,) = split_heads(query(x[:, : self.num_global]), 1, self.num_heads)
        out = self.attend(q, k, v, self.from_global(k.shape[2] - self.num_global))
        return torch.cat([proj(join_heads(out)), local], dim=1)

    @abstractmethod
    def attend_locally(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: Size
    ) -> torch.Tensor:
        """Attend from the map: q (B, N, L, D), k and v (B, N, G + L, D), to (B, N, L, D)."""


class OnlyGlobalAttention(_GlobalTokens):
    """The tokens of the map attend to the global tokens alone, and these to everything."""

    def __init__(self, stage: Stage, map_size: int) -> None:
        del map_size
        super().__init__(stage, rows=0)  # no token of the map attends to another

    def attend_locally(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: Size
    ) -> torch.Tensor:
        """Attend from the map: q (B, N, L, D), k and v (B, N, G + L, D), to (B, N, L, D)."""
        bias = self.to_global()
        if bias is not None:
            bias = bias[:, None].expand(-1, size[0] * size[1], -1)
        first = slice(self.num_global)
        return self.attend(q, k[:, :, first], v[:, :, first], bias)


class VilAttention(_GlobalTokens):
    """Sliding chunks: the tokens of the map attend to those near them and to the global ones."""

    def __init__(self, stage: Stage, map_size: int) -> None:
        del map_size
        super().__init__(stage, (4 * stage.attention_size - 1) ** 2)
        self.window_size = stage.attention_size
        self.exact, self.mode = stage.exact, stage.mode
        self.sliding_chunk_backend = stage.sliding_chunk_backend

    def draw_mode(self) -> int:
        """Return the mode of this call, a neighbour drawn at random in training if so chosen."""
        if self.mode <= 0:
            return self.mode
        return int(torch.randint(1, 1 + len(NEIGHBOURS), (), device="cpu")) if self.training else 0

    def attend_locally(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: Size
    ) -> torch.Tensor:
        """Attend from the map: q (B, N, L, D), k and v (B, N, G + L, D), to (B, N, L, D)."""
        count = self.num_global
        table = self.local_relative_position_bias_table
        if table is not None:
            side = 4 * self.window_size - 1
            table = table.T.unflatten(1, (side, side))
        out = sliding_chunk_attention(
            q.unflatten(2, size),
            k[:, :, count:].unflatten(2, size),
            v[:, :, count:].unflatten(2, size),
            k[:, :, :count],
            v[:, :, :count],
            ChunkGrid(*size, self.window_size, self.exact, self.draw_mode()),
            table=table,
            global_bias=self.to_global(),
            backend=self.sliding_chunk_backend,
        )
        return out.flatten(2, 3)
