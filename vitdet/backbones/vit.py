"""Plain ViT backbone with window and global attention.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet). Parameter
names and numbers as facebookresearch/detectron2, modeling/backbone/vit.py.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.base import LayeredBackbone
from vitdet.layers.attention import attention, check_backend
from vitdet.layers.drop_path import DropPath, drop_path_rates
from vitdet.layers.mlp import LayerScale, Mlp
from vitdet.layers.patch_embed import PatchEmbed
from vitdet.layers.pos_embed import PosEmbedResize, resize_pos_embed
from vitdet.layers.propagation import BottleneckPropagation
from vitdet.layers.rel_pos import RelPosResize, rel_pos_terms
from vitdet.layers.windows import window_partition, window_reverse
from vitdet.utils.checks import fail


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
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_resize: RelPosResize = rel_pos_resize
        self.backend = backend
        self.rel_pos_h: nn.Parameter | None = None
        self.rel_pos_w: nn.Parameter | None = None
        if rel_pos_size is not None:
            shape = (2 * rel_pos_size - 1, dim // num_heads)
            self.rel_pos_h = nn.Parameter(torch.zeros(shape))
            self.rel_pos_w = nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens x (B, H, W, C) to (B, H, W, C); every token attends to every other."""
        B, H, W, C = x.shape
        qkv = self.qkv(x).view(B, H * W, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, L, D)
        rel_pos = None
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            rel_pos = rel_pos_terms(q, self.rel_pos_h, self.rel_pos_w, (H, W), self.rel_pos_resize)
        x = attention(q, k, v, rel_pos=rel_pos, backend=self.backend)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))


class Block(nn.Module):
    """Transformer block with attention in windows or over the whole map (ViTDet, Fig. 2).

    Args:
        dim: channels C.
        attn: the attention, a finished part.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: probability that a branch is left out in training.
        norm_eps: epsilon of the two LayerNorms.
        window_size: side of a window in tokens, 0 for the whole map.
        layer_scale: whether both branches have a learned factor a channel.
        residual: a propagation block after the MLP, or None.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        window_size: int = 0,
        layer_scale: bool = False,
        residual: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = attn
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path)
        self.window_size = window_size
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens x (B, H, W, C) to (B, H, W, C)."""
        y = self.norm1(x)
        if self.window_size:
            # Padded after the norm: padding tokens are zero, their k and v the bias alone.
            windows = self.attn(window_partition(y, self.window_size))
            y = window_reverse(windows, (x.shape[1], x.shape[2]))
        else:
            y = self.attn(y)
        x = x + self.drop_path(self.ls1(y))
        x = x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
        return x if self.residual is None else self.residual(x)


class ViT(LayeredBackbone):
    """Plain ViT without class token and without a norm after the last block (ViTDet, Sec. 3).

    Args:
        img_size: side in pixels of the square training image: the size of the global blocks'
            position tables.
        patch_size: side of a patch in pixels, the stride of the output.
        in_chans: channels of an image.
        embed_dim: channels C of a token.
        depth: number of blocks.
        num_heads: heads of every block.
        mlp_ratio: hidden channels of an MLP over C.
        qkv_bias: whether q, k and v have a bias.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_eps: epsilon of the LayerNorms.
        use_abs_pos: whether to add absolute positions.
        use_rel_pos: whether attention has decomposed relative positions.
        rel_pos_resize: "interpolate" (published) or "crop", see `vitdet.layers.rel_pos`.
        pos_embed_resize: "bicubic" (published), "bicubic_antialias" or "crop", see
            `vitdet.layers.pos_embed`.
        window_size: side of a window in tokens, 0 for no windows at all.
        global_block_indexes: blocks that attend to the whole map; all others use windows.
            detectron2's `window_block_indexes` lists the others.
        residual_block_indexes: blocks followed by a bottleneck propagation.
        checkpoint_blocks: blocks whose activations are recomputed in the backward pass.
        pretrain_img_size: side in pixels of the pretraining image: the size of `pos_embed`.
        pretrain_use_cls_token: whether `pos_embed` has a first row for a class token. It is kept,
            so that pretrained weights fit, and not used.
        layer_scale: whether branches have a learned factor a channel, as DINOv2 weights do.
        attention_backend: kernel, see `vitdet.layers.attention`.
        out_feature: name of the output.

    Raises:
        InputError: an index outside the blocks, sizes that do not divide, an unknown backend.
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
        use_abs_pos: bool = True,
        use_rel_pos: bool = False,
        rel_pos_resize: RelPosResize = "interpolate",
        pos_embed_resize: PosEmbedResize = "bicubic",
        window_size: int = 0,
        global_block_indexes: Collection[int] = (),
        residual_block_indexes: Collection[int] = (),
        checkpoint_blocks: Collection[int] = (),
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        layer_scale: bool = False,
        attention_backend: str = "auto",
        out_feature: str = "last_feat",
    ) -> None:
        super().__init__()
        check_backend(attention_backend)
        _check_indexes("global_block_indexes", global_block_indexes, depth)
        _check_indexes("residual_block_indexes", residual_block_indexes, depth)
        _check_indexes("checkpoint_blocks", checkpoint_blocks, depth)
        self.patch_size = patch_size
        self.pos_embed_resize: PosEmbedResize = pos_embed_resize
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.checkpoint_blocks = frozenset(checkpoint_blocks)
        self.out_feature = out_feature

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed: nn.Parameter | None = None
        if use_abs_pos:
            rows = (pretrain_img_size // patch_size) ** 2 + int(pretrain_use_cls_token)
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim))

        self.blocks = nn.ModuleList()
        for i, drop_path in enumerate(drop_path_rates(drop_path_rate, depth)):
            window = 0 if i in global_block_indexes else window_size
            attn = Attention(
                embed_dim,
                num_heads,
                qkv_bias=qkv_bias,
                rel_pos_size=(window or img_size // patch_size) if use_rel_pos else None,
                rel_pos_resize=rel_pos_resize,
                backend=attention_backend,
            )
            block = Block(
                embed_dim,
                attn,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path,
                norm_eps=norm_eps,
                window_size=window,
                layer_scale=layer_scale,
                residual=BottleneckPropagation(embed_dim) if i in residual_block_indexes else None,
            )
            self.blocks.append(block)

        # detectron2's Backbone.output_shape reads these three.
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: embed_dim}
        self._out_feature_strides = {out_feature: patch_size}
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialise as detectron2: linear layers and `pos_embed` from a truncated normal, 0.02."""
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

    # detectron2 declares forward() without arguments.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Map images x (B, 3, h, w) to {out_feature: (B, C, H, W)}, H = ceil(h / patch_size)."""
        x = self.patch_embed(x)  # (B, H, W, C)
        if self.pos_embed is not None:
            grid = self.pos_embed[:, 1:] if self.pretrain_use_cls_token else self.pos_embed
            x = x + resize_pos_embed(grid, (x.shape[1], x.shape[2]), self.pos_embed_resize)
        for i, block in enumerate(self.blocks):
            if i in self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return {self.out_feature: x.permute(0, 3, 1, 2)}


def _check_indexes(what: str, indexes: Collection[int], depth: int) -> None:
    wrong = [i for i in indexes if not 0 <= i < depth]
    if wrong:
        fail(
            what,
            expected=f"block numbers from 0 to {depth - 1}",
            got=str(wrong),
            remedy="The first block is 0.",
        )
