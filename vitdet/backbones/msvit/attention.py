"""The attention kinds of a multi-scale vision longformer; the last three approximate (Sec. 4.4).

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

from vitdet.backbones.msvit.sliding_chunk import NEIGHBOURS, ChunkGrid, sliding_chunk_attention
from vitdet.backbones.msvit.stage import Size, Stage, dense_bias, fit_grid, fit_offsets
from vitdet.layers.attention import attention
from vitdet.layers.parts import Linear
from vitdet.utils.precision import no_autocast, working_dtype

_NORM_EPS = 1e-5  # of torch's InstanceNorm2d, as published
_KERNEL_EPS = 1e-4


def split_heads(x: torch.Tensor, parts: int, num_heads: int) -> tuple[torch.Tensor, ...]:
    """Split (B, L, parts * C) into `parts` tensors (B, N, L, D)."""
    return x.unflatten(2, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def join_heads(x: torch.Tensor) -> torch.Tensor:
    """Return (B, N, L, D) as (B, L, C)."""
    return x.transpose(1, 2).flatten(2)


class RelativePositions(nn.Module):
    """An attention with learned biases where the stage has relative positions.

    `rows` are the entries of the table for pairs of tokens of the map, 0 for no table.
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

        It is no sum of a term for rows and one for columns, which `vitdet.layers.attention` wants.
        """
        if bias is None:
            return attention(q, k, v, backend=self.backend)
        bias = bias.to(q.dtype)[None].expand(q.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class FullAttention(RelativePositions):
    """Every token attends to every token."""

    def __init__(self, stage: Stage, map_size: int) -> None:
        super().__init__(stage, (2 * map_size - 1) ** 2)
        dim = stage.embed_dim
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
        bias = dense_bias(fit_offsets(table, size))
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


# --- kinds that approximate full attention ------------------------------------------------------


class InstanceNorm(nn.Module):
    """Normalise maps over their places, without weights, in float32.

    torch's InstanceNorm2d refuses a map of one place, and in torch 2.15 on a CPU its gradient is
    wrong where the one that reaches it is not contiguous.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, H, W) to the same shape."""
        x = x.to(working_dtype(x))
        centred = x - x.mean((2, 3), keepdim=True)
        return centred * (centred.square().mean((2, 3), keepdim=True) + _NORM_EPS).rsqrt()


class SRAttention(nn.Module):
    """Spatial reduction (Wang et al., "Pyramid Vision Transformer", Sec. 3.2): fewer keys.

    A convolution makes one key and value from a square of tokens. A map smaller than a square is
    filled up with zeros; the rest of a side that is no multiple of it is left out, as published.
    """

    def __init__(self, stage: Stage, map_size: int) -> None:
        super().__init__()
        del map_size
        dim, bias = stage.embed_dim, stage.qkv_bias
        self.backend, self.reduction = stage.attention_backend, stage.attention_size
        self.num_heads, self.num_global = stage.num_heads, stage.num_global_tokens
        self.query = Linear(dim, dim, bias=bias)
        self.kv = Linear(dim, 2 * dim, bias=bias)
        self.proj_sr = nn.Conv2d(dim, dim, self.reduction, stride=self.reduction, bias=False)
        self.norm_sr = InstanceNorm()
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        """Map tokens x (B, G + H * W, C) of a map of `size` (H, W) to the same shape."""
        image = x[:, self.num_global :].mT.unflatten(2, size)  # (B, C, H, W)
        right, below = (max(0, self.reduction - side) for side in size[::-1])
        reduced = self.norm_sr(self.proj_sr(F.pad(image, (0, right, 0, below))))
        keys = torch.cat([x[:, : self.num_global], reduced.flatten(2).mT.to(x.dtype)], dim=1)
        (q,) = split_heads(self.query(x), 1, self.num_heads)
        k, v = split_heads(self.kv(keys), 2, self.num_heads)
        return self.proj(join_heads(attention(q, k, v, backend=self.backend)))


class LinformerAttention(nn.Module):
    """Keys and values projected along the tokens (Wang et al., "Linformer", Sec. 4).

    The projection is made for a square map; for another its rows are fitted to the tokens.
    """

    def __init__(self, stage: Stage, map_size: int) -> None:
        super().__init__()
        dim, bias, features = stage.embed_dim, stage.qkv_bias, stage.attention_size
        self.backend = stage.attention_backend
        self.num_heads, self.num_global = stage.num_heads, stage.num_global_tokens
        length = self.num_global + map_size**2
        self.proj_k = nn.Parameter(torch.zeros(length, features))
        self.proj_v = None if stage.share_kv else nn.Parameter(torch.zeros(length, features))
        self.query = Linear(dim, dim, bias=bias)
        self.kv = Linear(dim, 2 * dim, bias=bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        """Map tokens x (B, G + H * W, C) of a map of `size` (H, W) to the same shape."""
        (q,) = split_heads(self.query(x), 1, self.num_heads)
        k, v = split_heads(self.kv(x), 2, self.num_heads)
        for_k = self._fitted(self.proj_k, size)
        for_v = for_k if self.proj_v is None else self._fitted(self.proj_v, size)
        k, v = for_k.to(k.dtype).mT @ k, for_v.to(v.dtype).mT @ v  # (B, N, features, D)
        return self.proj(join_heads(attention(q, k, v, backend=self.backend)))

    def _fitted(self, projection: torch.Tensor, size: Size) -> torch.Tensor:
        places = fit_grid(projection[self.num_global :], size)
        return torch.cat([projection[: self.num_global], places])


class FastAttention(nn.Module):
    """Positive orthogonal random features (Choromanski et al., "Performers", Sec. 2.3, 2.4)."""

    def __init__(self, head_dim: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("projection_matrix", torch.zeros(num_features, head_dim))
        self.projection_matrix: torch.Tensor

    def redraw(self, seed: int) -> None:
        """Draw the features again; one seed gives the same ones on every device and process."""
        number, dim = self.projection_matrix.shape
        generator = torch.Generator("cpu").manual_seed(seed)

        def normal(rows: int) -> torch.Tensor:
            return torch.randn(rows, dim, generator=generator, device="cpu")

        blocks = []
        for _ in range(-(-number // dim)):
            q, r = torch.linalg.qr(normal(dim))
            # Without the signs every first direction lies in one half of the space (Mezzadri, "How
            # to generate random matrices from the classical compact groups"): biased weights.
            blocks.append((q * r.diagonal().sign()).mT)
        directions = torch.cat(blocks)[:number]
        lengths = normal(number).norm(dim=1, keepdim=True)
        with torch.no_grad():
            self.projection_matrix.copy_(directions * lengths)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Approximate softmax(q k^T / sqrt(D)) v for (B, N, L, D), in float32.

        As published, one maximum over the whole of k keeps its exponents small, so that a result
        depends a little (by `_KERNEL_EPS`) on what else is in the batch.
        """
        kind = working_dtype(q)
        with no_autocast(q):
            q, k = self._features(q.to(kind), over=(-1,)), self._features(k.to(kind), over=None)
            context = k.mT @ v.to(kind)  # (B, N, M, D)
            return (q @ context / (q @ k.sum(dim=-2)[..., None])).to(v.dtype)

    def _features(self, x: torch.Tensor, over: tuple[int, ...] | None) -> torch.Tensor:
        """Return the features (B, N, L, M) of x (B, N, L, D); maximum over those axes or all."""
        x = x * x.shape[-1] ** -0.25
        projected = x @ self.projection_matrix.to(x.dtype).mT
        highest = projected.amax() if over is None else projected.amax(over, keepdim=True)
        return (projected - x.square().sum(-1, keepdim=True) / 2 - highest).exp() + _KERNEL_EPS


class PerformerAttention(nn.Module):
    """Attention of all tokens by random features, linear in their number."""

    def __init__(self, stage: Stage, map_size: int) -> None:
        super().__init__()
        del map_size
        dim, self.num_heads = stage.embed_dim, stage.num_heads
        self.fast_attention = FastAttention(dim // self.num_heads, stage.attention_size)
        self.qkv = Linear(dim, 3 * dim, bias=stage.qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:  # noqa: ARG002
        """Map tokens x (B, G + H * W, C) of a map of `size` (H, W) to the same shape."""
        q, k, v = split_heads(self.qkv(x), 3, self.num_heads)
        return self.proj(join_heads(self.fast_attention(q, k, v)))
