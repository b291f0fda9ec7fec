"""The parts of a stage of a multi-scale vision longformer: embedding, attention block, MLP block.

Parameter names of microsoft/VisionLongformerForObjectDetection, msvit/msvit.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vitdet.backbones.msvit.approximate import LinformerAttention, PerformerAttention, SRAttention
from vitdet.backbones.msvit.arch import Stage
from vitdet.backbones.msvit.attention import FullAttention, OnlyGlobalAttention, VilAttention
from vitdet.backbones.msvit.positions import PosResize, fit_axis
from vitdet.layers.drop_path import DropPath
from vitdet.layers.mlp import Mlp

Size = tuple[int, int]


@dataclass(frozen=True)
class Options:
    """What all stages have in common; `backbone.MsViT` tells the meanings."""

    mlp_ratio: float
    qkv_bias: bool
    drop_rate: float
    norm_eps: float
    norm_embed: bool
    share_global_weights: bool
    share_kv: bool
    exact: int
    mode: int
    pos_embed_resize: PosResize
    rel_pos_resize: PosResize
    attention_backend: str
    sliding_chunk_backend: str


class StageEmbed(nn.Module):
    """Make the tokens of a stage from the map before it (B, C, h, w).

    Args:
        stage: the stage.
        in_chans: channels of the map before.
        map_size: side S in tokens of the square map that absolute positions are made for.
        pos_embed_resize: how they are fitted to another map, see `positions`.
        norm_eps: epsilon of the norm of the tokens; None for no norm.
        drop_rate: dropout after the positions.
    """

    def __init__(
        self,
        stage: Stage,
        in_chans: int,
        map_size: int,
        *,
        pos_embed_resize: PosResize,
        norm_eps: float | None,
        drop_rate: float,
    ) -> None:
        super().__init__()
        dim, side, over = stage.embed_dim, stage.patch_size, stage.num_global_tokens
        self.pos_embed_resize: PosResize = pos_embed_resize
        self.drop_rate = drop_rate
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=side, stride=side)
        self.norm_embed = None if norm_eps is None else nn.LayerNorm(dim, eps=norm_eps)
        self.cls_token = nn.Parameter(torch.zeros(1, over, dim)) if over else None
        self.x_pos_embed = self.y_pos_embed = self.cls_pos_embed = None
        if stage.use_abs_pos:
            self.x_pos_embed = nn.Parameter(torch.zeros(1, map_size, dim // 2))
            self.y_pos_embed = nn.Parameter(torch.zeros(1, map_size, dim // 2))
            self.cls_pos_embed = nn.Parameter(torch.zeros(1, over, dim)) if over else None

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, Size]:
        """Map (B, C, h, w) to tokens (B, G + H * W, C), H = h // patch_size, and (H, W)."""
        image = self.proj(image)
        B, _, H, W = image.shape
        x = image.flatten(2).mT
        if self.norm_embed is not None:
            x = self.norm_embed(x)
        if self.x_pos_embed is not None and self.y_pos_embed is not None:
            rows = fit_axis(self.x_pos_embed, H, self.pos_embed_resize)[:, :, None]
            columns = fit_axis(self.y_pos_embed, W, self.pos_embed_resize)[:, None]
            rows, columns = rows.expand(-1, -1, W, -1), columns.expand(-1, H, -1, -1)
            x = x + torch.cat([rows, columns], dim=-1).flatten(1, 2)
        if self.cls_token is not None:
            token = self.cls_token
            if self.cls_pos_embed is not None:
                token = token + self.cls_pos_embed
            x = torch.cat([token.expand(B, -1, -1).to(x.dtype), x], dim=1)
        return F.dropout(x, self.drop_rate, self.training), (H, W)


class AttentionBlock(nn.Module):
    """The first half of a transformer block.

    Args:
        dim: channels C.
        attn: the attention, a finished part.
        norm_eps: epsilon of the norm.
        drop_path: probability that the branch is left out in training.
        drop_rate: dropout after the attention.
    """

    def __init__(
        self, dim: int, attn: nn.Module, *, norm_eps: float, drop_path: float, drop_rate: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.drop_rate = drop_rate
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        """Map tokens x (B, G + H * W, C) of a map of `size` (H, W) to the same shape."""
        y = self.attn(self.norm(x), size)
        return x + self.drop_path(F.dropout(y, self.drop_rate, self.training))


class MlpBlock(nn.Module):
    """The second half of a transformer block.

    Args:
        dim: channels C.
        mlp_ratio: hidden channels over C.
        norm_eps: epsilon of the norm.
        drop_path: probability that the branch is left out in training.
        drop_rate: dropout after each of the two layers.
    """

    def __init__(
        self, dim: int, *, mlp_ratio: float, norm_eps: float, drop_path: float, drop_rate: float
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_rate = drop_rate
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens x (B, L, C) to the same shape."""
        y = F.gelu(self.mlp.fc1(self.norm(x)))
        y = self.mlp.fc2(F.dropout(y, self.drop_rate, self.training))
        return x + self.drop_path(F.dropout(y, self.drop_rate, self.training))


def build_attention(stage: Stage, map_size: int, options: Options) -> nn.Module:
    """Return an attention of a stage whose positions are made for `map_size` tokens a side."""
    dim, heads, over = stage.embed_dim, stage.num_heads, stage.num_global_tokens
    bias, size = options.qkv_bias, stage.attention_size
    backend = options.attention_backend
    if stage.attention == "srformer":
        return SRAttention(dim, heads, over, qkv_bias=bias, reduction=size, backend=backend)
    if stage.attention == "performer":
        return PerformerAttention(dim, heads, qkv_bias=bias, num_features=size)
    if stage.attention == "linformer":
        return LinformerAttention(
            dim,
            heads,
            over,
            qkv_bias=bias,
            num_features=size,
            share_kv=options.share_kv,
            map_size=map_size,
            resize=options.rel_pos_resize,
            backend=backend,
        )
    if stage.attention == "full":
        return FullAttention(
            dim,
            heads,
            over,
            qkv_bias=bias,
            use_rel_pos=stage.use_rel_pos,
            map_size=map_size,
            rel_pos_resize=options.rel_pos_resize,
            backend=backend,
        )
    if stage.attention == "only_global":
        return OnlyGlobalAttention(
            dim,
            heads,
            over,
            qkv_bias=bias,
            use_rel_pos=stage.use_rel_pos,
            share_weights=options.share_global_weights,
            backend=backend,
        )
    return VilAttention(
        dim,
        heads,
        over,
        qkv_bias=bias,
        use_rel_pos=stage.use_rel_pos,
        share_weights=options.share_global_weights,
        window_size=size,
        exact=options.exact,
        mode=options.mode,
        backend=backend,
        sliding_chunk_backend=options.sliding_chunk_backend,
    )


def build_stage(
    stage: Stage, in_chans: int, map_size: int, drop_path: Iterable[float], options: Options
) -> nn.ModuleList:
    """Return a stage: its embedding, then an attention block and an MLP block for each block.

    Args:
        stage: the stage.
        in_chans: channels of the map before.
        map_size: side in tokens of the square map that its positions are made for.
        drop_path: stochastic depth of its blocks.
        options: what all stages have in common.
    """
    eps, drop = options.norm_eps, options.drop_rate
    embed = StageEmbed(
        stage,
        in_chans,
        map_size,
        pos_embed_resize=options.pos_embed_resize,
        norm_eps=eps if options.norm_embed else None,
        drop_rate=drop,
    )
    layers = nn.ModuleList([embed])
    for rate in drop_path:
        dim, attn = stage.embed_dim, build_attention(stage, map_size, options)
        layers.append(AttentionBlock(dim, attn, norm_eps=eps, drop_path=rate, drop_rate=drop))
        layers.append(
            MlpBlock(
                dim,
                mlp_ratio=options.mlp_ratio,
                norm_eps=eps,
                drop_path=rate,
                drop_rate=drop,
            )
        )
    return layers
