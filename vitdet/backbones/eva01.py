"""EVA-01 backbone: a plain ViT with the biases, scales and norms of BEiT.

Fang et al., "EVA: Exploring the Limits of Masked Visual Representation Learning at Scale", Sec. 3.
Parameter names and numbers as baaivision/EVA, EVA-01/det, modeling/backbone/vit.py. The defaults
are the published detector's: 1B parameters, width 1408, 40 blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.base import LayeredBackbone, check_block_indexes
from vitdet.layers.attention import attention, check_backend
from vitdet.layers.drop_path import DropPath, drop_path_rates
from vitdet.layers.geometric import resize_rel_pos_geometric
from vitdet.layers.linear import Linear, linear
from vitdet.layers.mlp import Mlp
from vitdet.layers.patch_embed import PatchEmbed
from vitdet.layers.pos_embed import PosEmbedResize, resize_pos_embed
from vitdet.layers.propagation import ConvPropagation
from vitdet.layers.rel_pos import RelPos, RelPosResize, rel_pos_terms
from vitdet.layers.windows import window_partition, window_reverse
from vitdet.utils.checks import fail

QkvBias = Literal["qv", "full", "none"]
_QKV_BIASES = ("qv", "full", "none")
_REL_POS_RESIZES = ("interpolate", "crop", "beit")


class Float32LayerNorm(nn.Module):
    """LayerNorm that computes in float32 whatever the type of its input and its parameters.

    A class of its own, not an `nn.LayerNorm`, so that the published weight decay rules treat it as
    they did (LayerNormWithForceFP32).

    Args:
        dim: channels C.
        eps: added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (..., C)."""
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), weight.shape, weight, bias, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """Return what `print(module)` shows."""
        return f"{self.weight.numel()}, eps={self.eps}"


class Attention(nn.Module):
    """Multi-head self-attention with decomposed relative positions and a choice of biases.

    Args:
        dim: channels C.
        num_heads: heads N.
        qkv_bias: "qv" for biases of q and v as parameters of their own, "full" for those of the
            layer that makes q, k and v, "none".
        rel_pos_size: side of the square map that the position tables are made for, None for none.
        rel_pos_resize: how a table is fitted to another map: "interpolate" or "crop", see
            `vitdet.layers.rel_pos`, or "beit", see `vitdet.layers.geometric`.
        backend: kernel, see `vitdet.layers.attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: QkvBias = "qv",
        rel_pos_size: int | None = None,
        rel_pos_resize: RelPosResize | Literal["beit"] = "interpolate",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            fail("num_heads", expected=f"a divisor of {dim}", got=num_heads, remedy="Change it.")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias == "full")
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias == "qv" else None
        self.proj = Linear(dim, dim)
        self.rel_pos_resize: RelPosResize | Literal["beit"] = rel_pos_resize
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
        bias = self.qkv.bias
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = linear(x, self.qkv.weight, bias)
        qkv = qkv.view(B, H * W, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, L, D)
        x = attention(q, k, v, rel_pos=self._rel_pos(q, (H, W)), backend=self.backend)
        return self.proj(x.transpose(1, 2).reshape(B, H, W, C))

    def _rel_pos(self, q: torch.Tensor, size: tuple[int, int]) -> RelPos | None:
        table_h, table_w = self.rel_pos_h, self.rel_pos_w
        if table_h is None or table_w is None:
            return None
        if self.rel_pos_resize == "beit":
            fitted_h = resize_rel_pos_geometric(table_h, size[0])
            return rel_pos_terms(q, fitted_h, resize_rel_pos_geometric(table_w, size[1]), size)
        return rel_pos_terms(q, table_h, table_w, size, self.rel_pos_resize)


class Block(nn.Module):
    """Transformer block with attention in windows or over the whole map.

    Args:
        dim: channels C.
        attn: the attention, a finished part.
        make_norm: makes the two norms.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path: probability that a branch is left out in training.
        window_size: side of a window in tokens, 0 for the whole map.
        gamma: whether both branches have a learned factor a channel.
        residual: a propagation block after the MLP, or None.
    """

    def __init__(
        self,
        dim: int,
        attn: Attention,
        make_norm: Callable[[int], nn.Module],
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        window_size: int = 0,
        gamma: bool = False,
        residual: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(dim)
        self.attn = attn
        self.norm2 = make_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma_1 = nn.Parameter(torch.ones(dim)) if gamma else None
        self.gamma_2 = nn.Parameter(torch.ones(dim)) if gamma else None
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
        x = x + self.drop_path(y if self.gamma_1 is None else self.gamma_1 * y)
        y = self.mlp(self.norm2(x))
        x = x + self.drop_path(y if self.gamma_2 is None else self.gamma_2 * y)
        return x if self.residual is None else self.residual(x)


class EVA01ViT(LayeredBackbone):
    """EVA-01 without class token and without a norm after the last block.

    Args:
        img_size: side in pixels of the square training image: the size of the global blocks'
            position tables.
        patch_size: side of a patch in pixels, the stride of the output.
        in_chans: channels of an image.
        embed_dim: channels C of a token.
        depth: number of blocks.
        num_heads: heads of every block.
        mlp_ratio: hidden channels of an MLP over C.
        qkv_bias: "qv" (published), "full" as a plain ViT, or "none"; see `Attention`.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_eps: epsilon of the LayerNorms.
        norm_float32: whether they compute in float32 in a model of another type.
        use_abs_pos: whether to add absolute positions.
        pos_embed_resize: "bicubic" (published), "bicubic_antialias" or "crop", see
            `vitdet.layers.pos_embed`.
        use_rel_pos: whether attention has decomposed relative positions.
        rel_pos_resize: "interpolate" (published for training), "beit" (for evaluation at a higher
            resolution; no gradient reaches a resized table) or "crop"; see `Attention`.
        window_size: side of a window in tokens, 0 for no windows at all.
        global_block_indexes: blocks that attend to the whole map; all others use windows.
        residual_block_indexes: blocks followed by a bottleneck propagation.
        checkpoint_blocks: blocks whose activations are recomputed in the backward pass.
        pretrain_img_size: side in pixels of the image that `pos_embed` has the grid of.
        pretrain_use_cls_token: whether `pos_embed` has a first row for a class token. It is kept,
            so that pretrained weights fit, and not used.
        gamma: whether branches have a learned factor a channel, `gamma_1` and `gamma_2`.
        freeze_patch_embed: whether the patch embedding does not learn.
        attention_backend: kernel, see `vitdet.layers.attention`.
        out_feature: name of the output.

    Raises:
        InputError: an index outside the blocks, sizes that do not divide, an unknown word.
    """

    def __init__(
        self,
        *,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 1408,
        depth: int = 40,
        num_heads: int = 16,
        mlp_ratio: float = 6144 / 1408,
        qkv_bias: QkvBias = "qv",
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-6,
        norm_float32: bool = False,
        use_abs_pos: bool = True,
        pos_embed_resize: PosEmbedResize = "bicubic",
        use_rel_pos: bool = False,
        rel_pos_resize: RelPosResize | Literal["beit"] = "interpolate",
        window_size: int = 0,
        global_block_indexes: Collection[int] = (),
        residual_block_indexes: Collection[int] = (),
        checkpoint_blocks: Collection[int] = (),
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        gamma: bool = False,
        freeze_patch_embed: bool = False,
        attention_backend: str = "auto",
        out_feature: str = "last_feat",
    ) -> None:
        super().__init__()
        check_backend(attention_backend, rel_pos=use_rel_pos)
        check_block_indexes("global_block_indexes", global_block_indexes, depth)
        check_block_indexes("residual_block_indexes", residual_block_indexes, depth)
        check_block_indexes("checkpoint_blocks", checkpoint_blocks, depth)
        _check_word("qkv_bias", qkv_bias, _QKV_BIASES)
        _check_word("rel_pos_resize", rel_pos_resize, _REL_POS_RESIZES)
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
                qkv_bias,
                rel_pos_size=(window or img_size // patch_size) if use_rel_pos else None,
                rel_pos_resize=rel_pos_resize,
                backend=attention_backend,
            )
            block = Block(
                embed_dim,
                attn,
                partial(Float32LayerNorm if norm_float32 else nn.LayerNorm, eps=norm_eps),
                mlp_ratio=mlp_ratio,
                drop_path=drop_path,
                window_size=window,
                gamma=gamma,
                residual=ConvPropagation(embed_dim) if i in residual_block_indexes else None,
            )
            self.blocks.append(block)

        # detectron2's Backbone.output_shape reads these three.
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: embed_dim}
        self._out_feature_strides = {out_feature: patch_size}
        self._init_weights()
        if freeze_patch_embed:
            self.patch_embed.requires_grad_(False)

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


def _check_word(what: str, word: str, known: Collection[str]) -> None:
    if word not in known:
        fail(what, expected=f"one of {', '.join(known)}", got=repr(word), remedy="Take one.")
