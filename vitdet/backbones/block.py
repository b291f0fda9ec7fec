"""The block of a plain ViT and the two forms of its attention (ViTDet, Sec. 3).

Parameter names as facebookresearch/detectron2, backbone/vit.py, and where q, k and v are split as
baaivision/EVA, EVA-02/det, backbone/vit.py. Linear layers are called as modules, so that what is
hooked to them or put in their place (adapters, quantised layers) is met.

Tokens are a map (B, H, W, C). Where class and register tokens take part they are a sequence (B, P +
H * W, C), the P prefix tokens first.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from vitdet.layers.attention import attention
from vitdet.layers.parts import DropPath, LayerScale, Linear, window_partition, window_reverse
from vitdet.layers.positions import RelPosResize, rel_pos_terms
from vitdet.layers.rope import Rope, RotaryTables, Size, rotate
from vitdet.utils.checks import InputError

QkvBias = bool | Literal["qv"]


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        dim: channels C.
        num_heads: heads N.
        bias: whether q, k and v have one, or "qv": of q and v as parameters of their own, and none
            of k (EVA-01, ViTAE-B's global blocks).
        split: whether q, k and v have projections of their own (EVA-02). A bias is then "qv".
        inner_norm: a norm before the output projection, or None (StreamPETR `subln`).
        rel_pos_size: (H, W) of the map that the position tables are made for, None for none.
        rel_pos_resize: how a table is fitted to another map, see `vitdet.layers.positions`.
        backend: kernel, see `vitdet.layers.attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        bias: QkvBias = True,
        *,
        split: bool = False,
        inner_norm: nn.Module | None = None,
        rel_pos_size: Size | None = None,
        rel_pos_resize: RelPosResize = "interpolate",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise InputError(f"num_heads: expected a divisor of {dim}, got {num_heads}. Change it.")
        self.num_heads, self.backend, self.split = num_heads, backend, split
        self.rel_pos_resize: RelPosResize = rel_pos_resize
        if split:
            self.q_proj, self.k_proj, self.v_proj = (Linear(dim, dim, bias=False) for _ in range(3))
        else:
            self.qkv = Linear(dim, 3 * dim, bias=bias is True)
        apart = bool(bias) if split else bias == "qv"
        self.q_bias = nn.Parameter(torch.zeros(dim)) if apart else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if apart else None
        self.inner_attn_ln = inner_norm or nn.Identity()
        self.proj = Linear(dim, dim)
        self.rel_pos_h: nn.Parameter | None = None
        self.rel_pos_w: nn.Parameter | None = None
        if rel_pos_size is not None:
            height, width = rel_pos_size
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * height - 1, dim // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * width - 1, dim // num_heads))

    def forward(
        self, x: torch.Tensor, size: Size | None = None, rope: RotaryTables | None = None
    ) -> torch.Tensor:
        """Let every token attend to every other.

        Args:
            x: tokens (B, H, W, C), or (B, P + H * W, C) with P prefix tokens first.
            size: (H, W) of a sequence, None for a map.
            rope: rotary tables of the H * W tokens; prefix tokens are not turned.
        """
        q, k, v = self._heads(x)  # each (B, N, L, D)
        rel_pos = None
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            places = size or (x.shape[1], x.shape[2])
            rel_pos = rel_pos_terms(q, self.rel_pos_h, self.rel_pos_w, places, self.rel_pos_resize)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        y = attention(q, k, v, rel_pos=rel_pos, backend=self.backend)
        return self.proj(self.inner_attn_ln(y.transpose(1, 2).reshape(x.shape)))

    def _heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shape = (self.num_heads, x.shape[-1] // self.num_heads)
        if self.split:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            if self.q_bias is not None and self.v_bias is not None:
                q, v = q + self.q_bias.to(q.dtype), v + self.v_bias.to(v.dtype)
            return tuple(y.view(x.shape[0], -1, *shape).transpose(1, 2) for y in (q, k, v))
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
            qkv = qkv + bias.to(qkv.dtype)
        return qkv.view(x.shape[0], -1, 3, *shape).permute(2, 0, 3, 1, 4).unbind(0)


class Block(nn.Module):
    """Transformer block with attention in windows or over the whole map (ViTDet, Fig. 2).

    Args:
        norms: the norm before the attention and that before the MLP.
        attn: the attention.
        mlp: the feed-forward layer.
        drop_path: probability that a branch is left out in training.
        window_size: side of a window in tokens, 0 for the whole map.
        shift: by how many tokens the windows start above and left of the map.
        layer_scale: whether both branches have a learned factor a channel.
        residual: a propagation block after the MLP, or None.
        branch: convolutions beside the attention, from the block's input (B, C, H, W) (ViTAE,
            Sec. 3.3), or None. Stochastic depth leaves it out on its own.
        rope: makes the rotary tables for what attends (a window or the map) on a map, or None.
    """

    def __init__(
        self,
        norms: tuple[nn.Module, nn.Module],
        attn: Attention,
        mlp: nn.Module,
        *,
        drop_path: float = 0.0,
        window_size: int = 0,
        shift: int = 0,
        layer_scale: bool = False,
        residual: nn.Module | None = None,
        branch: nn.Module | None = None,
        rope: Rope | None = None,
    ) -> None:
        super().__init__()
        dim = attn.proj.out_features
        self.norm1, self.norm2 = norms
        self.attn, self.mlp, self.residual, self.rope = attn, mlp, residual, rope
        self.PCM = branch  # the published name: parallel convolution module
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.window_size, self.shift = window_size, shift

    def forward(
        self, x: torch.Tensor, size: Size | None = None, rope: RotaryTables | None = None
    ) -> torch.Tensor:
        """Map tokens to tokens of the same shape; for arguments see `Attention.forward`."""
        y = self.norm1(x)
        if not self.window_size:
            y = self.attn(y, size, rope)
        elif size is None:
            y = self._windows(y, rope)
        else:
            y = self._windows_with_prefix(y, size, rope)
        y = x + self.drop_path(self.ls1(y))
        if self.PCM is not None:
            y = y + self.drop_path(self.PCM(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = y + self.drop_path(self.ls2(self.mlp(self.norm2(y))))
        if self.residual is None:
            return x
        if size is None:
            return self.residual(x)
        prefix, places = split_prefix(x, size)
        return torch.cat((prefix, self.residual(places).flatten(1, 2)), dim=1)

    def _windows(self, x: torch.Tensor, rope: RotaryTables | None) -> torch.Tensor:
        """Attention in windows of a map x (B, H, W, C)."""
        if self.shift:
            x = F.pad(x, (0, 0, self.shift, 0, self.shift, 0))
        # Padded after the norm: padding tokens are zero, their k and v the bias alone.
        windows = self.attn(window_partition(x, self.window_size), None, rope)
        x = window_reverse(windows, (x.shape[1], x.shape[2]))
        return x[:, self.shift :, self.shift :]

    def _windows_with_prefix(
        self, x: torch.Tensor, size: Size, rope: RotaryTables | None
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


def split_prefix(x: torch.Tensor, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Part tokens (B, P + H * W, C) into prefix tokens (B, P, C) and a map (B, H, W, C)."""
    prefix, places = x.split((x.shape[1] - size[0] * size[1], size[0] * size[1]), dim=1)
    return prefix, places.unflatten(1, size)
