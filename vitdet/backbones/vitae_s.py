"""ViTAE-S: stages of reduction cells and normal cells, from the pixels down to a stride of 16.

Xu et al., "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias", Sec. 3.2
(reduction cell) and 3.3 (normal cell). Parameter names and numbers as ViTAE-Transformer/ViTDet,
mmdet/models/backbones/vitae_s.py, with the differences that `vitdet.backbones.vitae` names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.base import LayeredBackbone, check_indexes, init_linear
from vitdet.backbones.block import Attention, Block
from vitdet.layers.attention import check_backend
from vitdet.layers.norms import layer_norm
from vitdet.layers.parts import Linear, Mlp, drop_path_rates
from vitdet.layers.positions import RelPosResize
from vitdet.utils.checks import InputError, check_word
from vitdet.utils.precision import no_autocast

ReductionKind = Literal["performer", "performer_less"]


class PyramidReduction(nn.Module):
    """Strided convolutions of several dilations beside each other (ViTAE, Sec. 3.2).

    `stride` rounds a side that it does not divide up.
    """

    def __init__(
        self, in_chans: int, embed_dim: int, kernel_size: int, stride: int, dilations: Sequence[int]
    ) -> None:
        super().__init__()
        if kernel_size < stride - 1:
            raise InputError(
                f"kernel_sizes: expected {stride - 1} or more, got {kernel_size}. A smaller kernel "
                "leaves pixels out."
            )
        self.stride = stride
        self.out_channels = embed_dim * len(dilations)
        self.convs = nn.ModuleList()
        for dilation in dilations:
            padding = math.ceil(((kernel_size - 1) * dilation + 1 - stride) / 2)
            conv = nn.Conv2d(in_chans, embed_dim, kernel_size, stride, padding, dilation)
            self.convs.append(nn.Sequential(conv, nn.GELU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, h, w) to (B, H, W, out_channels), H = ceil(h / stride)."""
        # Sides that the stride does not divide get more zeros, on both ends as published.
        spare = math.ceil(self.stride / 2) - 1
        above, left = (spare if side % self.stride else 0 for side in x.shape[-2:])
        if above or left:
            x = F.pad(x, (left, left, above, above))
        levels = [conv(x) for conv in self.convs]
        return torch.cat(levels, dim=1).permute(0, 2, 3, 1)


class TokenPerformer(nn.Module):
    """Linear attention with positive random features (Choromanski et al., "Rethinking Attention
    with Performers", Lemma 1), then an MLP.

    The values are the shortcut of the attention, because it changes the number of channels. The
    random features `w` are drawn once and never trained.
    """

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        features = dim // 2
        self.norm1 = nn.LayerNorm(in_dim)  # eps 1e-5 in the reduction cells, as published
        self.kqv = Linear(in_dim, 3 * dim)
        random_features = nn.init.orthogonal_(torch.empty(features, dim)) * math.sqrt(features)
        self.w = nn.Parameter(random_features, requires_grad=False)
        self.proj = Linear(dim, dim)
        self.dropout = nn.Dropout(0.1)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(Linear(dim, dim), nn.GELU(), Linear(dim, dim), nn.Dropout(0.1))

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """Map tokens x (B, H, W, in_dim) to (B, H, W, C); `shortcut` is added before the MLP."""
        B, H, W, _ = x.shape
        k, q, v = self.kqv(self.norm1(x)).view(B, H * W, -1).chunk(3, dim=-1)  # (B, L, C)
        y = v + self.dropout(self.proj(self._attend(q, k, v).to(v.dtype)))
        x = y.view(B, H, W, -1) + shortcut
        return x + self.mlp(self.norm2(x))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return phi(q) phi(k)^T v over its row sums, in float32 also in mixed precision."""
        with no_autocast(v):
            q, k, v = self._features(q.float()), self._features(k.float()), v.float()
            context = k.transpose(1, 2) @ v  # (B, features, C)
            total = q @ k.sum(dim=1).unsqueeze(-1)  # (B, L, 1)
            return (q @ context) / (total + 1e-8)

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        """Return phi(x) = exp(w x - |x|^2 / 2) / sqrt(m) for x (B, L, C): (B, L, m)."""
        features = self.w.float()
        half_square = x.square().sum(dim=-1, keepdim=True) / 2
        return torch.exp(x @ features.T - half_square) / math.sqrt(len(features))


class ReductionCell(nn.Module):
    """Makes a map smaller: dilated convolutions, attention, and a convolution branch beside them.

    `ratio` is the stride of the cell; "performer_less" is the dilated convolutions alone. For the
    others see `ViTAES`.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        token_dim: int,
        ratio: int,
        kernel_size: int,
        dilations: Sequence[int],
        kind: ReductionKind = "performer",
        groups: int = 1,
    ) -> None:
        super().__init__()
        check_word("downsample_ratios", ratio, (2, 4, 8))  # three convolutions, halving once each
        check_word("reduction_kinds", kind, ("performer", "performer_less"))
        self.PRM = PyramidReduction(in_chans, embed_dim, kernel_size, ratio, dilations)
        width = self.PRM.out_channels
        self.PCM = self.attn = None
        if kind == "performer":
            branch = [
                *_conv(in_chans, embed_dim, groups, 2, norm=False),
                *_conv(embed_dim, embed_dim, groups, 2 if ratio >= 4 else 1),
                *_conv(embed_dim, token_dim, groups, 2 if ratio >= 8 else 1, norm=False),
            ]
            self.PCM, self.attn = nn.Sequential(*branch), TokenPerformer(width, token_dim)
        elif width != token_dim:
            raise InputError(
                f"token_dims: expected {width}, got {token_dim}. The dilated convolutions are the "
                "output: set embed_dims or token_dims."
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (B, C, h, w) to tokens (B, H, W, token_dim), H = ceil(h / ratio)."""
        tokens = self.PRM(x)
        if self.PCM is None or self.attn is None:
            return tokens
        return self.attn(tokens, self.PCM(x).permute(0, 2, 3, 1))


def _conv(
    channels: int, out: int, groups: int, stride: int = 1, *, norm: bool = True
) -> list[nn.Module]:
    """Return a grouped 3x3 convolution, with BatchNorm or without, and SiLU."""
    conv = nn.Conv2d(channels, out, 3, stride=stride, padding=1, groups=groups)
    return [conv, *([nn.BatchNorm2d(out)] if norm else []), nn.SiLU()]


class ViTAES(LayeredBackbone):
    """ViTAE-S with window and global attention and a norm after the last cell.

    Every list has one entry a stage. Normal cells are counted through all stages.

    Args:
        img_size: side in pixels of the square training image: the size of the global cells'
            position tables. There are no absolute positions.
        in_chans: channels of an image.
        embed_dims: channels of each dilated convolution and of the branch of the reduction cells.
        token_dims: channels of the tokens.
        downsample_ratios: strides of the reduction cells.
        kernel_sizes, dilations: of the dilated convolutions.
        reduction_kinds: "performer" or "performer_less".
        reduction_groups: groups of the convolutions beside a reduction cell.
        depths: numbers of normal cells.
        num_heads, groups: their heads, and groups of their convolutions.
        mlp_ratio: hidden channels of MLP and convolution branch over the tokens' channels.
        qkv_bias: whether q, k and v have biases.
        drop_path_rate: stochastic depth of the last normal cell; it grows linearly from 0.
        norm_eps: epsilon of the LayerNorms of the normal cells and of the last one.
        rel_pos_resize: "interpolate" or "crop", see `vitdet.layers.positions`.
        window_size: side of a window in tokens.
        global_block_indexes: normal cells that attend to the whole map.
        checkpoint_blocks: normal cells whose activations are recomputed in the backward pass.
            BatchNorm then sees each batch twice.
        attention_backend: kernel, see `vitdet.layers.attention`.
        out_feature: name of the output.
    """

    def __init__(
        self,
        *,
        img_size: int = 1024,
        in_chans: int = 3,
        embed_dims: Sequence[int] = (64, 64, 192),
        token_dims: Sequence[int] = (96, 192, 384),
        downsample_ratios: Sequence[int] = (4, 2, 2),
        kernel_sizes: Sequence[int] = (7, 3, 3),
        dilations: Sequence[Sequence[int]] = ((1, 2, 3, 4), (1, 2, 3), (1, 2)),
        reduction_kinds: Sequence[ReductionKind] = ("performer", "performer", "performer_less"),
        reduction_groups: Sequence[int] = (1, 1, 1),
        depths: Sequence[int] = (0, 0, 14),
        num_heads: Sequence[int] = (1, 1, 6),
        groups: Sequence[int] = (1, 1, 96),
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        rel_pos_resize: RelPosResize = "interpolate",
        window_size: int = 14,
        global_block_indexes: Collection[int] = (),
        checkpoint_blocks: Collection[int] = (),
        attention_backend: str = "auto",
        out_feature: str = "last_feat",
    ) -> None:
        super().__init__()
        cells = embed_dims, token_dims, downsample_ratios, kernel_sizes, dilations, reduction_kinds
        cells = [*cells, reduction_groups]
        if len({len(entries) for entries in (depths, num_heads, groups, *cells)}) > 1:
            raise InputError(
                "ViTAES: expected lists of one length, one entry a stage, as depths has "
                f"{len(depths)}. Correct the others."
            )
        check_backend(attention_backend)
        check_indexes("global_block_indexes", global_block_indexes, range(sum(depths)))
        check_indexes("checkpoint_blocks", checkpoint_blocks, range(sum(depths)))
        self.depths = list(depths)
        self.checkpoint_blocks = frozenset(checkpoint_blocks)
        self.out_feature = out_feature

        rates = drop_path_rates(drop_path_rate, sum(depths))
        self.layers = nn.ModuleList()
        stride, channels, number, norm = 1, in_chans, 0, layer_norm(norm_eps)
        for s, depth in enumerate(depths):
            stride *= downsample_ratios[s]
            reduction = ReductionCell(channels, *(entries[s] for entries in cells))
            channels, hidden_dim = token_dims[s], int(token_dims[s] * mlp_ratio)
            normal = []
            for i in range(number, number + depth):
                window = 0 if i in global_block_indexes else window_size
                side = window or img_size // stride
                attn = Attention(
                    channels,
                    num_heads[s],
                    qkv_bias,
                    rel_pos_size=(side, side),
                    rel_pos_resize=rel_pos_resize,
                    backend=attention_backend,
                )
                branch = [
                    *_conv(channels, hidden_dim, groups[s]),
                    *_conv(hidden_dim, channels, groups[s]),
                    *_conv(channels, channels, groups[s], norm=False),
                ]
                cell = Block(
                    (norm(channels), norm(channels)),
                    attn,
                    Mlp(channels, hidden_dim),
                    drop_path=rates[i],
                    window_size=window,
                    branch=nn.Sequential(*branch),
                )
                normal.append(cell)
            self.layers.append(nn.ModuleDict({"RC": reduction, "NC": nn.ModuleList(normal)}))
            number += depth
        self.norm = norm(channels)
        self.set_outputs({out_feature: (channels, stride)})
        init_linear(self)

    @property
    def num_layers(self) -> int:
        """Number of cells of both kinds: 17 for ViTAE-S."""
        return sum(self.depths) + len(self.depths)

    def layer_id(self, name: str) -> int:
        """Return the number of a cell through all stages, the first reduction cell being 0.

        The last norm has num_layers + 1. ViTAE-Transformer/ViTDet, mmcv_custom
        layer_decay_optimizer_constructor.py with `layer_sep` [0, 1, 2].
        """
        parts = name.split(".")
        if parts[0] != "layers":
            return self.num_layers + 1
        stage = int(parts[1])
        before = sum(self.depths[:stage]) + stage
        return before + int(parts[3]) + 1 if parts[2] == "NC" else before

    def units(self) -> Sequence[nn.Module]:
        """Return the cells of both kinds."""
        return [unit for unit in self.layers.modules() if isinstance(unit, ReductionCell | Block)]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Map images x (B, 3, h, w) to {out_feature: (B, C, H, W)}, H = ceil(h / stride)."""
        number, tokens = 0, x.permute(0, 2, 3, 1)
        for cell in self.units():
            if isinstance(cell, ReductionCell):
                tokens = cell(tokens.permute(0, 3, 1, 2))  # (B, H, W, C)
                continue
            if number in self.checkpoint_blocks and self.training:
                tokens = checkpoint(cell, tokens, use_reentrant=False)
            else:
                tokens = cell(tokens)
            number += 1
        return {self.out_feature: self.norm(tokens).permute(0, 3, 1, 2)}
