"""EVA-02 backbone: a plain ViT with rotary positions and SwiGLU.

Fang et al., "EVA-02: A Visual Representation for Neon Genesis", Sec. 2.1 and 3.2. Parameter names
and numbers as baaivision/EVA, EVA-02/det, modeling/backbone/vit.py, and as the ViT-Large of
exiawsh/StreamPETR, models/backbones/eva_vit.py, whose global blocks are larger windows.

The published tables of rotary positions are as large as the square training image; another map
fails there, or silently gets wrong positions. Here they are made for the map at hand.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.base import LayeredBackbone, check_block_indexes
from vitdet.layers.attention import attention, check_backend
from vitdet.layers.drop_path import DropPath, drop_path_rates
from vitdet.layers.linear import Linear, linear
from vitdet.layers.mlp import SwiGLU
from vitdet.layers.patch_embed import PatchEmbed
from vitdet.layers.pos_embed import PosEmbedResize, resize_pos_embed
from vitdet.layers.propagation import ConvPropagation
from vitdet.layers.rope import RopeResize, RotaryTables, check_head_dim, rotary_tables, rotate
from vitdet.layers.windows import window_partition, window_reverse
from vitdet.utils.checks import fail

_ROPE_RESIZES = ("extend", "stretch")


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions.

    Three projections without a bias; q and v get one as parameters of their own, k has none.

    Args:
        dim: channels C.
        num_heads: heads N.
        qkv_bias: whether q and v have a bias.
        inner_norm_eps: epsilon of a LayerNorm before the output projection, None for no norm.
        backend: kernel, see `vitdet.layers.attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        inner_norm_eps: float | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.q_proj = Linear(dim, dim, bias=False)
        self.k_proj = Linear(dim, dim, bias=False)
        self.v_proj = Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.inner_attn_ln = (
            nn.Identity() if inner_norm_eps is None else nn.LayerNorm(dim, eps=inner_norm_eps)
        )
        self.proj = Linear(dim, dim)

    def forward(self, x: torch.Tensor, rope: RotaryTables) -> torch.Tensor:
        """Map tokens x (B, H, W, C) to (B, H, W, C); `rope` belongs to an H x W map."""
        B, H, W, C = x.shape
        shape = (B, H * W, self.num_heads, C // self.num_heads)
        q = linear(x, self.q_proj.weight, self.q_bias).view(shape).transpose(1, 2)
        k = self.k_proj(x).view(shape).transpose(1, 2)
        v = linear(x, self.v_proj.weight, self.v_bias).view(shape).transpose(1, 2)
        x = attention(rotate(q, rope), rotate(k, rope), v, backend=self.backend)  # (B, N, L, D)
        return self.proj(self.inner_attn_ln(x.transpose(1, 2).reshape(B, H, W, C)))


class Block(nn.Module):
    """Transformer block with attention in windows or over the whole map.

    Args:
        dim: channels C.
        attn: the attention, a finished part.
        mlp: the feed-forward layer, a finished part.
        drop_path: probability that a branch is left out in training.
        norm_eps: epsilon of the two LayerNorms.
        window_size: side of a window in tokens, 0 for the whole map.
        residual: a propagation block after the MLP, or None.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        mlp: SwiGLU,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        window_size: int = 0,
        residual: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)
        self.window_size = window_size
        self.residual = residual

    def forward(self, x: torch.Tensor, rope: RotaryTables) -> torch.Tensor:
        """Map tokens x (B, H, W, C) to (B, H, W, C); `rope` belongs to a window or the map."""
        y = self.norm1(x)
        if self.window_size:
            # Padded after the norm: padding tokens have q = q_bias, k = 0 and v = v_bias.
            windows = self.attn(window_partition(y, self.window_size), rope)
            y = window_reverse(windows, (x.shape[1], x.shape[2]))
        else:
            y = self.attn(y, rope)
        x = x + self.drop_path(y)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x if self.residual is None else self.residual(x)


class EVA02ViT(LayeredBackbone):
    """EVA-02 without class token and without a norm after the last block.

    Positions of tokens, in tokens of the pretraining: a window of `window_size` always spans the
    pretraining's whole grid. A global block's token i of an axis is at i / (img_size / patch_size)
    * rope_pretrain_grid, on both axes and for every map ("extend"): a rectangle, or a smaller
    square, is a cut of the training square and keeps its distances, and what reaches beyond the
    square continues them. With "stretch" the map at hand spans the pretraining's grid on each axis,
    as timm does. With `rope_interpolate` False a token is a token everywhere.

    Args:
        img_size: side in pixels of the square training image, for the positions of global blocks.
            StreamPETR gives the short side.
        patch_size: side of a patch in pixels, the stride of the output.
        in_chans: channels of an image.
        embed_dim: channels C of a token.
        depth: number of blocks.
        num_heads: heads of every block; a head has a multiple of 4 channels.
        mlp_ratio: hidden channels of the SwiGLU over C.
        qkv_bias: whether q and v have a bias.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_eps: epsilon of the LayerNorms.
        use_abs_pos: whether to add absolute positions.
        pos_embed_resize: "bicubic" (published), "bicubic_antialias" or "crop", see
            `vitdet.layers.pos_embed`.
        rope_pretrain_grid: side in tokens of the pretraining's map (pt_hw_seq_len).
        rope_interpolate: whether positions are scaled to that map (intp_freq).
        rope_resize: "extend" or "stretch", see above.
        window_size: side of a window in tokens, 0 for no windows at all.
        global_window_size: side in tokens of the global blocks' windows, 0 for the whole map.
            StreamPETR: 20 for 800 x 320 pixels, 50 for 1600 x 800.
        global_block_indexes: blocks that are global; all others use windows.
        residual_block_indexes: blocks followed by a bottleneck propagation.
        checkpoint_blocks: blocks whose activations are recomputed in the backward pass.
        pretrain_img_size: side in pixels of the image that `pos_embed` has the grid of.
        pretrain_use_cls_token: whether `pos_embed` has a first row for a class token. It is kept,
            so that pretrained weights fit, and not used.
        inner_attn_norm: whether attention has a LayerNorm before its output projection (StreamPETR
            `subln`).
        inner_attn_norm_eps: its epsilon; StreamPETR leaves it at torch's default.
        frozen: whether no parameter learns.
        attention_backend: kernel, see `vitdet.layers.attention`.
        out_feature: name of the output.

    Raises:
        InputError: an index outside the blocks, heads that do not fit, an unknown word.
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
        mlp_ratio: float = 4 * 2 / 3,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        use_abs_pos: bool = True,
        pos_embed_resize: PosEmbedResize = "bicubic",
        rope_pretrain_grid: int = 16,
        rope_interpolate: bool = True,
        rope_resize: RopeResize = "extend",
        window_size: int = 0,
        global_window_size: int = 0,
        global_block_indexes: Collection[int] = (),
        residual_block_indexes: Collection[int] = (),
        checkpoint_blocks: Collection[int] = (),
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        inner_attn_norm: bool = False,
        inner_attn_norm_eps: float = 1e-5,
        frozen: bool = False,
        attention_backend: str = "auto",
        out_feature: str = "last_feat",
    ) -> None:
        super().__init__()
        check_backend(attention_backend)
        check_block_indexes("global_block_indexes", global_block_indexes, depth)
        check_block_indexes("residual_block_indexes", residual_block_indexes, depth)
        check_block_indexes("checkpoint_blocks", checkpoint_blocks, depth)
        check_head_dim(embed_dim, num_heads)
        if rope_resize not in _ROPE_RESIZES:
            expected = " or ".join(_ROPE_RESIZES)
            fail("rope_resize", expected=expected, got=repr(rope_resize), remedy="Take one.")
        self.patch_size = patch_size
        self.head_dim = embed_dim // num_heads
        self.pos_embed_resize: PosEmbedResize = pos_embed_resize
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.rope_pretrain_grid = rope_pretrain_grid
        self.rope_interpolate = rope_interpolate
        self.rope_resize: RopeResize = rope_resize
        self.train_grid = img_size // patch_size
        self.window_size = window_size
        self.global_window_size = global_window_size
        self.local_blocks = frozenset(range(depth) if window_size else ()) - {*global_block_indexes}
        self.checkpoint_blocks = frozenset(checkpoint_blocks)
        self.out_feature = out_feature

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed: nn.Parameter | None = None
        if use_abs_pos:
            rows = (pretrain_img_size // patch_size) ** 2 + int(pretrain_use_cls_token)
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim))

        self.blocks = nn.ModuleList()
        for i, drop_path in enumerate(drop_path_rates(drop_path_rate, depth)):
            inner_eps = inner_attn_norm_eps if inner_attn_norm else None
            block = Block(
                embed_dim,
                Attention(embed_dim, num_heads, qkv_bias, inner_eps, attention_backend),
                SwiGLU(embed_dim, int(embed_dim * mlp_ratio), norm_eps),
                drop_path=drop_path,
                norm_eps=norm_eps,
                window_size=window_size if i in self.local_blocks else global_window_size,
                residual=ConvPropagation(embed_dim) if i in residual_block_indexes else None,
            )
            self.blocks.append(block)

        # detectron2's Backbone.output_shape reads these three.
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: embed_dim}
        self._out_feature_strides = {out_feature: patch_size}
        self._init_weights()
        if frozen:
            self.requires_grad_(False)

    def _init_weights(self) -> None:
        """Initialise as published: linear layers and `pos_embed` from a truncated normal, 0.02."""
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def layer_id(self, name: str) -> int:
        """Return 0 for the embeddings, i + 1 for block i, num_layers + 1 for propagation blocks."""
        if name.startswith(("pos_embed", "patch_embed")):
            return 0
        parts = name.split(".")
        if parts[0] == "blocks" and "residual" not in parts:
            return int(parts[1]) + 1
        return self.num_layers + 1

    def local_tables(self, device: torch.device) -> RotaryTables:
        """Return the rotary tables of a window: it spans the pretraining's grid."""
        size = (self.window_size, self.window_size)
        return self._tables(size, size, device)

    def global_tables(self, size: tuple[int, int], device: torch.device) -> RotaryTables:
        """Return the rotary tables of a global block for a map of `size` (H, W) tokens."""
        if self.global_window_size:
            size = (self.global_window_size, self.global_window_size)
        training = (self.train_grid, self.train_grid)
        return self._tables(size, size if self.rope_resize == "stretch" else training, device)

    def _tables(
        self, size: tuple[int, int], places: tuple[int, int], device: torch.device
    ) -> RotaryTables:
        grid = self.rope_pretrain_grid
        if not self.rope_interpolate:
            places, grid = (1, 1), 1
        return rotary_tables(size, self.head_dim, places=places, grid=grid, device=device)

    # detectron2 declares forward() without arguments.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Map images x (B, 3, h, w) to {out_feature: (B, C, H, W)}, H = ceil(h / patch_size)."""
        x = self.patch_embed(x)  # (B, H, W, C)
        size = (x.shape[1], x.shape[2])
        if self.pos_embed is not None:
            grid = self.pos_embed[:, 1:] if self.pretrain_use_cls_token else self.pos_embed
            x = x + resize_pos_embed(grid, size, self.pos_embed_resize)
        # Made once for all blocks of the pass. They cost less than one block's norm.
        local_rope = self.local_tables(x.device) if self.local_blocks else None
        global_rope = self.global_tables(size, x.device)
        for i, block in enumerate(self.blocks):
            rope = local_rope if i in self.local_blocks else global_rope
            if i in self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope)
        return {self.out_feature: x.permute(0, 3, 1, 2)}
