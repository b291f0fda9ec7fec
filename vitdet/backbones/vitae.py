"""ViTAE-B: a plain ViT whose blocks have a convolution branch beside attention.

Xu et al., "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias", Sec. 3.3
(normal cell). Parameter names and numbers as ViTAE-Transformer/ViTDet,
mmdet/models/backbones/vitae.py, with two differences. The relative positions there are learned for
scaled queries; here, as everywhere in this project, for unscaled ones, and conversion multiplies
the tables. And any input size works here.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.base import LayeredBackbone, check_block_indexes
from vitdet.layers.attention import attention, check_backend
from vitdet.layers.drop_path import DropPath, drop_path_rates
from vitdet.layers.linear import Linear
from vitdet.layers.mlp import Mlp
from vitdet.layers.patch_embed import PatchEmbed
from vitdet.layers.pos_embed import PosEmbedResize, resize_pos_embed
from vitdet.layers.rel_pos import RelPosResize, rel_pos_terms
from vitdet.layers.windows import window_partition, window_reverse
from vitdet.utils.checks import fail


class CellAttention(nn.Module):
    """Multi-head self-attention with decomposed relative positions.

    Args:
        dim: channels C.
        num_heads: heads N.
        rel_pos_size: side of the square map that the position tables are made for.
        qkv_bias: whether q, k and v have biases.
        separate_biases: whether they are two vectors `q_bias` and `v_bias`, and k has none, as in
            ViTAE-B's global blocks.
        rel_pos_resize: how a table is fitted to another map, see `vitdet.layers.rel_pos`.
        backend: kernel, see `vitdet.layers.attention`.

    Raises:
        InputError: heads that do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rel_pos_size: int,
        *,
        qkv_bias: bool = True,
        separate_biases: bool = False,
        rel_pos_resize: RelPosResize = "interpolate",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            fail("num_heads", expected=f"a divisor of {dim}", got=num_heads, remedy="Change it.")
        self.num_heads = num_heads
        self.rel_pos_resize: RelPosResize = rel_pos_resize
        self.backend = backend
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias and not separate_biases)
        self.q_bias: nn.Parameter | None = None
        self.v_bias: nn.Parameter | None = None
        if qkv_bias and separate_biases:
            self.q_bias = nn.Parameter(torch.zeros(dim))
            self.v_bias = nn.Parameter(torch.zeros(dim))
        shape = (2 * rel_pos_size - 1, dim // num_heads)
        self.rel_pos_h = nn.Parameter(torch.zeros(shape))
        self.rel_pos_w = nn.Parameter(torch.zeros(shape))
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens x (B, H, W, C) to (B, H, W, C); every token attends to every other."""
        B, H, W, C = x.shape
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
            qkv = qkv + bias.to(qkv.dtype)
        qkv = qkv.view(B, H * W, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, L, D)
        rel_pos = rel_pos_terms(q, self.rel_pos_h, self.rel_pos_w, (H, W), self.rel_pos_resize)
        x = attention(q, k, v, rel_pos=rel_pos, backend=self.backend)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))


class NormalCell(nn.Module):
    """Attention and convolutions side by side, then an MLP (ViTAE, Sec. 3.3).

    The convolutions see the input of the cell, before any norm. Each branch is left out on its own
    in stochastic depth.

    Args:
        dim: channels C.
        attn: the attention, a finished part.
        convolutions: the convolution branch, from a map (B, C, H, W) to one of the same shape.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: probability that a branch is left out in training.
        norm_eps: epsilon of the two LayerNorms.
        window_size: side of a window of the attention in tokens, 0 for the whole map.
    """

    def __init__(
        self,
        dim: int,
        attn: CellAttention,
        convolutions: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        window_size: int = 0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.PCM = convolutions  # the published name: parallel convolution module
        self.drop_path = DropPath(drop_path)
        self.window_size = window_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens x (B, H, W, C) to (B, H, W, C)."""
        convolved = self.PCM(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = self.norm1(x)
        if self.window_size:
            # Padded after the norm: padding tokens are zero, their q, k and v the bias alone.
            windows = self.attn(window_partition(y, self.window_size))
            y = window_reverse(windows, (x.shape[1], x.shape[2]))
        else:
            y = self.attn(y)
        x = x + self.drop_path(y) + self.drop_path(convolved)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def convolution_branch(dim: int, hidden_dim: int, groups: int) -> nn.Sequential:
    """Return ViTAE-B's branch: grouped 3x3 convolution, BatchNorm, SiLU, grouped 3x3 convolution.

    Args:
        dim: channels of input and output.
        hidden_dim: channels between.
        groups: groups of both convolutions.
    """
    return nn.Sequential(
        nn.Conv2d(dim, hidden_dim, 3, padding=1, groups=groups),
        nn.BatchNorm2d(hidden_dim),
        nn.SiLU(),
        nn.Conv2d(hidden_dim, dim, 3, padding=1, groups=groups),
    )


def init_linear(model: nn.Module) -> None:
    """Draw the weights of all linear layers from a truncated normal, 0.02; biases are zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class ViTAE(LayeredBackbone):
    """ViTAE-B with window and global attention and a norm after the last cell.

    Args:
        img_size: side in pixels of the square training image: the size of the absolute positions
            and of the global blocks' relative ones.
        patch_size: side of a patch in pixels, the stride of the output.
        in_chans: channels of an image.
        embed_dim: channels C of a token, a multiple of 4: the convolutions have groups of 4.
        depth: number of cells.
        num_heads: heads of every cell.
        mlp_ratio: hidden channels of MLP and convolution branch over C.
        qkv_bias: whether q, k and v have biases.
        drop_path_rate: stochastic depth of the last cell; it grows linearly from 0.
        norm_eps: epsilon of the LayerNorms.
        rel_pos_resize: "interpolate" or "crop", see `vitdet.layers.rel_pos`.
        pos_embed_resize: "bicubic", "bicubic_antialias" or "crop", see `vitdet.layers.pos_embed`.
        window_size: side of a window in tokens.
        global_block_indexes: cells that attend to the whole map; all others use windows.
        checkpoint_blocks: cells whose activations are recomputed in the backward pass. BatchNorm
            then sees each batch twice, in the published training (`use_checkpoint`) too.
        attention_backend: kernel, see `vitdet.layers.attention`.
        out_feature: name of the output.

    Raises:
        InputError: an index outside the cells, sizes that do not divide, an unknown backend.
    """

    def __init__(
        self,
        *,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        rel_pos_resize: RelPosResize = "interpolate",
        pos_embed_resize: PosEmbedResize = "bicubic",
        window_size: int = 14,
        global_block_indexes: Collection[int] = (),
        checkpoint_blocks: Collection[int] = (),
        attention_backend: str = "auto",
        out_feature: str = "last_feat",
    ) -> None:
        super().__init__()
        check_backend(attention_backend)
        check_block_indexes("global_block_indexes", global_block_indexes, depth)
        check_block_indexes("checkpoint_blocks", checkpoint_blocks, depth)
        if embed_dim % 4:
            fail("embed_dim", expected="a multiple of 4", got=embed_dim, remedy="Change it.")
        side = img_size // patch_size
        self.patch_size = patch_size
        self.pos_embed_resize: PosEmbedResize = pos_embed_resize
        self.checkpoint_blocks = frozenset(checkpoint_blocks)
        self.out_feature = out_feature

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, embed_dim))
        self.blocks = nn.ModuleList()
        for i, drop_path in enumerate(drop_path_rates(drop_path_rate, depth)):
            window = 0 if i in global_block_indexes else window_size
            attn = CellAttention(
                embed_dim,
                num_heads,
                window or side,
                qkv_bias=qkv_bias,
                separate_biases=not window,
                rel_pos_resize=rel_pos_resize,
                backend=attention_backend,
            )
            convolutions = convolution_branch(
                embed_dim, int(embed_dim * mlp_ratio), groups=embed_dim // 4
            )
            self.blocks.append(
                NormalCell(embed_dim, attn, convolutions, mlp_ratio, drop_path, norm_eps, window)
            )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)

        # detectron2's Backbone.output_shape reads these three.
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: embed_dim}
        self._out_feature_strides = {out_feature: patch_size}
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_linear(self)

    @property
    def num_layers(self) -> int:
        """Number of cells."""
        return len(self.blocks)

    def layer_id(self, name: str) -> int:
        """Return 0 for the embeddings, i + 1 for cell i, num_layers + 1 for the last norm."""
        if name.startswith(("pos_embed", "patch_embed")):
            return 0
        parts = name.split(".")
        return int(parts[1]) + 1 if parts[0] == "blocks" else self.num_layers + 1

    # detectron2 declares forward() without arguments.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Map images x (B, 3, h, w) to {out_feature: (B, C, H, W)}, H = ceil(h / patch_size)."""
        x = self.patch_embed(x)  # (B, H, W, C)
        size = (x.shape[1], x.shape[2])
        x = x + resize_pos_embed(self.pos_embed, size, self.pos_embed_resize)
        for i, block in enumerate(self.blocks):
            if i in self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return {self.out_feature: self.norm(x).permute(0, 3, 1, 2)}
