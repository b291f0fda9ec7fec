"""The block of a plain ViT: attention over windows or the whole map, and a feed-forward layer.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet), Sec. 3.
Parameter names and numbers as facebookresearch/detectron2, modeling/backbone/vit.py.

Tokens are a map (B, H, W, C). Where class and register tokens take part they are a sequence
(B, P + H * W, C), the P prefix tokens first.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from vitdet.layers.attention import attention
from vitdet.layers.drop_path import DropPath
from vitdet.layers.linear import Linear
from vitdet.layers.mlp import LayerScale, Mlp, SwiGLU
from vitdet.layers.rel_pos import RelPosResize, rel_pos_terms
from vitdet.layers.rope import RotaryTables, rotate
from vitdet.layers.windows import resize_map, whole_windows, window_partition, window_reverse
from vitdet.utils.checks import fail

WindowFit = Literal["pad", "interpolate"]


class Attention(nn.Module):
    """Multi-head self-attention with decomposed relative positions.

    Args:
        dim: channels C.
        num_heads: heads N.
        qkv_bias: whether the layer that makes q, k and v has a bias.
        rel_pos_size: side of the square map that the position tables are made for, None for none.
        rel_pos_resize: how a table is fitted to another map, see `vitdet.layers.rel_pos`.
        backend: kernel, see `vitdet.layers.attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        rel_pos_size: int | None = None,
        rel_pos_resize: RelPosResize = "interpolate",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            fail("num_heads", expected=f"a divisor of {dim}", got=num_heads, remedy="Change it.")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
        self.rel_pos_resize: RelPosResize = rel_pos_resize
        self.backend = backend
        self.rel_pos_h: nn.Parameter | None = None
        self.rel_pos_w: nn.Parameter | None = None
        if rel_pos_size is not None:
            shape = (2 * rel_pos_size - 1, dim // num_heads)
            self.rel_pos_h = nn.Parameter(torch.zeros(shape))
            self.rel_pos_w = nn.Parameter(torch.zeros(shape))

    def forward(
        self,
        x: torch.Tensor,
        size: tuple[int, int] | None = None,
        rope: RotaryTables | None = None,
    ) -> torch.Tensor:
        """Let every token attend to every other.

        Args:
            x: tokens (B, H, W, C), or (B, P + H * W, C) with P prefix tokens first.
            size: (H, W) of a sequence, None for a map.
            rope: rotary tables of the H * W tokens; prefix tokens are not turned.

        Returns:
            The same shape.
        """
        B, C = x.shape[0], x.shape[-1]
        H, W = size or (x.shape[1], x.shape[2])
        qkv = self.qkv(x).view(B, -1, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, L, D)
        rel_pos = None
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            rel_pos = rel_pos_terms(q, self.rel_pos_h, self.rel_pos_w, (H, W), self.rel_pos_resize)
        if rope is not None:
            q, k = _rotate_places(q, rope), _rotate_places(k, rope)
        y = attention(q, k, v, rel_pos=rel_pos, backend=self.backend)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


def _rotate_places(x: torch.Tensor, rope: RotaryTables) -> torch.Tensor:
    """Turn the last tokens of x (B, N, L, D), as many as there are tables for."""
    spare = x.shape[2] - rope.cos.shape[0]
    if not spare:
        return rotate(x, rope)
    return torch.cat((x[:, :, :spare], rotate(x[:, :, spare:], rope)), dim=2)


class Block(nn.Module):
    """Transformer block with attention in windows or over the whole map (ViTDet, Fig. 2).

    Args:
        dim: channels C.
        attn: the attention, a finished part.
        mlp: the feed-forward layer, a finished part.
        drop_path: probability that a branch is left out in training.
        norm_eps: epsilon of the two LayerNorms.
        window_size: side of a window in tokens, 0 for the whole map.
        window_fit: how a map is fitted to whole windows, see `ViT`.
        shift: by how many tokens the windows start above and left of the map.
        layer_scale: whether both branches have a learned factor a channel.
        residual: a propagation block after the MLP, or None.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        mlp: Mlp | SwiGLU,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        window_size: int = 0,
        window_fit: WindowFit = "pad",
        shift: int = 0,
        layer_scale: bool = False,
        residual: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = mlp
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.window_size = window_size
        self.window_fit: WindowFit = window_fit
        self.shift = shift
        self.residual = residual

    def forward(
        self,
        x: torch.Tensor,
        size: tuple[int, int] | None = None,
        rope: RotaryTables | None = None,
    ) -> torch.Tensor:
        """Map tokens to tokens of the same shape; for arguments see `Attention.forward`.

        `rope` belongs to a window, or to the map where there are none.
        """
        y = self.norm1(x)
        if not self.window_size:
            y = self.attn(y, size, rope)
        elif size is None:
            y = self._windows(y, rope)
        else:
            y = self._windows_with_prefix(y, size, rope)
        x = x + self.drop_path(self.ls1(y))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        if self.residual is None:
            return x
        if size is None:
            return self.residual(x)
        prefix, places = split_prefix(x, size)
        return torch.cat((prefix, self.residual(places).flatten(1, 2)), dim=1)

    def _windows(self, x: torch.Tensor, rope: RotaryTables | None) -> torch.Tensor:
        """Attention in windows of a map x (B, H, W, C)."""
        size = (x.shape[1], x.shape[2])
        if self.window_fit == "interpolate":
            x = resize_map(x, whole_windows(size, self.window_size))
        if self.shift:
            x = F.pad(x, (0, 0, self.shift, 0, self.shift, 0))
        # Padded after the norm: padding tokens are zero, their k and v the bias alone.
        windows = self.attn(window_partition(x, self.window_size), None, rope)
        x = window_reverse(windows, (x.shape[1], x.shape[2]))[:, self.shift :, self.shift :]
        return resize_map(x, size)

    def _windows_with_prefix(
        self, x: torch.Tensor, size: tuple[int, int], rope: RotaryTables | None
    ) -> torch.Tensor:
        """Attention in windows of tokens x (B, P + H * W, C).

        The prefix tokens join every window; what becomes of them is the mean over the windows. So
        one window over the whole map is global attention.
        """
        prefix, places = split_prefix(x, size)
        windows = window_partition(places, self.window_size)  # (B * windows, S, S, C)
        count, window = windows.shape[0] // x.shape[0], (self.window_size, self.window_size)
        joined = torch.cat((prefix.repeat_interleave(count, 0), windows.flatten(1, 2)), dim=1)
        prefixes, windows = split_prefix(self.attn(joined, window, rope), window)
        prefix = prefixes.unflatten(0, (-1, count)).mean(dim=1)
        return torch.cat((prefix, window_reverse(windows, size).flatten(1, 2)), dim=1)


def split_prefix(x: torch.Tensor, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Part tokens (B, P + H * W, C) into prefix tokens (B, P, C) and a map (B, H, W, C)."""
    prefix, places = x.split((x.shape[1] - size[0] * size[1], size[0] * size[1]), dim=1)
    return prefix, places.unflatten(1, size)
