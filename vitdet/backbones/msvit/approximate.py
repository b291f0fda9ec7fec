"""Attention kinds that approximate full attention, of the ablation (same paper, Sec. 4.4).

Interfaces and sources as in `attention`: made from a stage and its map's side, tokens (B, G + L, C)
to the same shape.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from vitdet.backbones.msvit.attention import join_heads, split_heads
from vitdet.backbones.msvit.positions import PosResize, fit_grid
from vitdet.backbones.msvit.stage import Size, Stage
from vitdet.layers.attention import attention
from vitdet.layers.linear import Linear
from vitdet.utils.precision import no_autocast, working_dtype

_NORM_EPS = 1e-5  # of torch's InstanceNorm2d, as published
_KERNEL_EPS = 1e-4


class InstanceNorm(nn.Module):
    """Normalise maps over their places, without weights, in float32.

    Not torch's InstanceNorm2d: that refuses a map of one place, whose result is zero, and in torch
    2.15 on a CPU its gradient is wrong where the one that reaches it is not contiguous.
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
        self.resize: PosResize = stage.rel_pos_resize
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
        places = fit_grid(projection[self.num_global :], size, self.resize)
        return torch.cat([projection[: self.num_global], places])


class FastAttention(nn.Module):
    """Positive orthogonal random features (Choromanski et al., "Performers", Sec. 2.3, 2.4).

    Args:
        head_dim: channels D of a head.
        num_features: random features M.
    """

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

        def directions_of_a_block() -> torch.Tensor:
            q, r = torch.linalg.qr(normal(dim))
            # Without the signs every first direction lies in one half of the space (Mezzadri, "How
            # to generate random matrices from the classical compact groups"): biased weights.
            return (q * r.diagonal().sign()).mT

        blocks = [directions_of_a_block() for _ in range(-(-number // dim))]
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
