"""Plain ViT backbone with window and global attention.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection" (ViTDet). Parameter
names and numbers as facebookresearch/detectron2, modeling/backbone/vit.py.

The parts that ViTDet leaves out are off by default. With them the network computes what CLIP,
DeiT-III, DINOv2 and DINOv3 compute, under the names of huggingface/pytorch-image-models,
models/vision_transformer.py. Where class and register tokens take part, the tokens are a sequence
(B, P + H * W, C), the P prefix tokens first.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.base import LayeredBackbone, check_block_indexes
from vitdet.backbones.vit_block import Attention, Block, WindowFit, split_prefix
from vitdet.layers.attention import check_backend
from vitdet.layers.drop_path import drop_path_rates
from vitdet.layers.mlp import Activation, FeedForward, make_feed_forward
from vitdet.layers.patch_embed import PatchEmbed
from vitdet.layers.pos_embed import PosEmbedResize, resize_pos_embed
from vitdet.layers.propagation import (
    ConvPropagation,
    PropagationKind,
    PropagationNorm,
    check_propagation,
)
from vitdet.layers.rel_pos import RelPosResize
from vitdet.layers.rope import RotaryTables, centred_tables, check_head_dim, rotary_tables
from vitdet.utils.checks import fail, nearest

Rope = Literal["none", "dinov3", "eva02"]
_CHOICES = {
    "ffn_layer": ("mlp", "swiglu", "swiglu_norm"),
    "act_layer": ("gelu", "quick_gelu"),
    "rope": ("none", "dinov3", "eva02"),
    "window_fit": ("pad", "interpolate"),
}
_EVA02_GRID = 16  # side of the map that EVA-02's rotary positions were trained on


class ViT(LayeredBackbone):
    """Plain ViT, by default without class token and norm after the last block (ViTDet, Sec. 3).

    In window blocks the class and register tokens join every window, see `Block`; no published
    network has both, so use them where most blocks are global.

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
        window_fit: "pad" (published) fills windows up with zeros; "interpolate" resizes the map to
            whole windows before attention and back after it, 64 to 56 places for windows of 14.
        shifted_block_indexes: window blocks whose windows start half a window above and left of
            the map (Table 2a, "shifted win."). The rest is filled up with zeros, unmasked, as
            everywhere else; Swin rolls and masks instead.
        residual_block_indexes: blocks followed by a propagation block of convolutions.
        propagation: "naive", "basic" or "bottleneck", see `vitdet.layers.propagation`.
        propagation_norm: "LN", or "BN" for the blocks of EasyCV before v0.7.
        checkpoint_blocks: blocks whose activations are recomputed in the backward pass.
        pretrain_img_size: side in pixels of the pretraining image: the size of `pos_embed`.
        pretrain_use_cls_token: whether `pos_embed` has a first row for a class token. It is kept,
            so that pretrained weights fit, and used with `use_cls_token` only.
        layer_scale: whether branches have a learned factor a channel, as DINOv2 weights do.
        use_cls_token: whether a class token takes part in the blocks.
        num_register_tokens: how many register tokens do (Darcet et al., "Vision Transformers Need
            Registers", Sec. 2.2).
        pre_norm: whether a LayerNorm stands before the first block, as in CLIP.
        final_norm: whether one stands after the last block.
        ffn_layer: "mlp", "swiglu" (DINOv2-g, DINOv3-H+), or "swiglu_norm" (EVA-02).
        act_layer: of the MLP, "gelu" or "quick_gelu", see `vitdet.layers.mlp`.
        rope: rotary positions: "none", "dinov3", or "eva02" (a map or window of any size spans the
            pretraining's grid, as in huggingface/pytorch-image-models, models/eva.py).
        attention_backend: kernel, see `vitdet.layers.attention`.
        out_feature: name of the output.
        out_block_indexes: blocks whose maps are outputs too, called "block0" and so on.

    Raises:
        InputError: an index outside the blocks, sizes that do not divide, an unknown choice;
            relative positions, shifted or interpolated windows together with class or register
            tokens.
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
        window_fit: WindowFit = "pad",
        shifted_block_indexes: Collection[int] = (),
        residual_block_indexes: Collection[int] = (),
        propagation: PropagationKind = "bottleneck",
        propagation_norm: PropagationNorm = "LN",
        checkpoint_blocks: Collection[int] = (),
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        layer_scale: bool = False,
        use_cls_token: bool = False,
        num_register_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = False,
        ffn_layer: FeedForward = "mlp",
        act_layer: Activation = "gelu",
        rope: Rope = "none",
        attention_backend: str = "auto",
        out_feature: str = "last_feat",
        out_block_indexes: Collection[int] = (),
    ) -> None:
        super().__init__()
        check_backend(attention_backend, rel_pos=use_rel_pos)
        check_block_indexes("out_block_indexes", out_block_indexes, depth)
        check_block_indexes("global_block_indexes", global_block_indexes, depth)
        check_block_indexes("residual_block_indexes", residual_block_indexes, depth)
        check_propagation(propagation, propagation_norm)
        _check_shifted(shifted_block_indexes, global_block_indexes, depth)
        check_block_indexes("checkpoint_blocks", checkpoint_blocks, depth)
        _check_choice("ffn_layer", ffn_layer)
        _check_choice("act_layer", act_layer)
        _check_choice("rope", rope)
        _check_choice("window_fit", window_fit)
        self.num_prefix_tokens = int(use_cls_token) + num_register_tokens
        if self.num_prefix_tokens:
            _check_prefix(use_rel_pos, window_fit, shifted_block_indexes)
        if rope != "none":
            check_head_dim(embed_dim, num_heads)
        self.patch_size = patch_size
        self.head_dim = embed_dim // num_heads
        self.rope: Rope = rope
        self.pos_embed_resize: PosEmbedResize = pos_embed_resize
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.checkpoint_blocks = frozenset(checkpoint_blocks)
        self.out_feature = out_feature
        self.out_blocks = frozenset(out_block_indexes)

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed: nn.Parameter | None = None
        if use_abs_pos:
            rows = (pretrain_img_size // patch_size) ** 2 + int(pretrain_use_cls_token)
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if use_cls_token else None
        self.reg_token: nn.Parameter | None = None
        if num_register_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        self.norm_pre = nn.LayerNorm(embed_dim, eps=norm_eps) if pre_norm else nn.Identity()

        hidden_dim = int(embed_dim * mlp_ratio)
        self.windows = [0 if i in global_block_indexes else window_size for i in range(depth)]
        self.blocks = nn.ModuleList()
        for i, drop_path in enumerate(drop_path_rates(drop_path_rate, depth)):
            window = self.windows[i]
            residual = None
            if i in residual_block_indexes:
                residual = ConvPropagation(embed_dim, propagation, propagation_norm)
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
                make_feed_forward(ffn_layer, embed_dim, hidden_dim, act_layer, norm_eps),
                drop_path=drop_path,
                norm_eps=norm_eps,
                window_size=window,
                window_fit=window_fit,
                shift=window // 2 if i in shifted_block_indexes else 0,
                layer_scale=layer_scale,
                residual=residual,
            )
            self.blocks.append(block)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps) if final_norm else nn.Identity()

        # detectron2's Backbone.output_shape reads these three.
        self._out_features = [out_feature, *(f"block{i}" for i in sorted(out_block_indexes))]
        self._out_feature_channels = dict.fromkeys(self._out_features, embed_dim)
        self._out_feature_strides = dict.fromkeys(self._out_features, patch_size)
        self._init_weights()

    def _init_weights(self) -> None:
        """Initialise as detectron2: linear layers and embeddings from a truncated normal, 0.02."""
        for embedding in (self.pos_embed, self.cls_token, self.reg_token):
            if embedding is not None:
                nn.init.trunc_normal_(embedding, std=0.02)
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
        if name.startswith(("pos_embed", "patch_embed", "cls_token", "reg_token", "norm_pre")):
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
        blocks: dict[int, torch.Tensor] = {}
        x, size = self.forward_tokens(x, blocks)
        maps = {self.out_feature: x, **{f"block{i}": tokens for i, tokens in blocks.items()}}
        if self.num_prefix_tokens:
            maps = {name: split_prefix(tokens, size)[1] for name, tokens in maps.items()}
        return {name: tokens.permute(0, 3, 1, 2) for name, tokens in maps.items()}

    def forward_tokens(
        self, images: torch.Tensor, blocks: dict[int, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return the tokens after the last block (and norm) and the size (H, W) of their map.

        Args:
            images: (B, 3, h, w).
            blocks: is given the tokens after each of `out_block_indexes`.

        Returns:
            Tokens (B, H, W, C); with prefix tokens (B, P + H * W, C), the class token first, then
            the register tokens.
        """
        x = self.patch_embed(images)  # (B, H, W, C)
        H, W = x.shape[1], x.shape[2]
        if self.pos_embed is not None:
            grid = self.pos_embed[:, 1:] if self.pretrain_use_cls_token else self.pos_embed
            x = x + resize_pos_embed(grid, (H, W), self.pos_embed_resize)
        if self.num_prefix_tokens:
            prefix = self._prefix().expand(x.shape[0], -1, -1)
            x = torch.cat((prefix, x.flatten(1, 2)), dim=1)
        x = self.norm_pre(x)
        size = (H, W) if self.num_prefix_tokens else None
        # Made once a pass for each size of window. They cost less than one block's norm.
        ropes = {window: self._rope((H, W), window, x.device) for window in {*self.windows}}
        for i, block in enumerate(self.blocks):
            rope = ropes[self.windows[i]]
            if i in self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, size, rope, use_reentrant=False)
            else:
                x = block(x, size, rope)
            if blocks is not None and i in self.out_blocks:
                blocks[i] = x
        return self.norm(x), (H, W)

    def _prefix(self) -> torch.Tensor:
        """Return class and register tokens (1, P, C)."""
        tokens = []
        if self.cls_token is not None:
            has_row = self.pos_embed is not None and self.pretrain_use_cls_token
            row = self.pos_embed[:, :1] if has_row and self.pos_embed is not None else 0.0
            tokens.append(self.cls_token + row)
        if self.reg_token is not None:
            tokens.append(self.reg_token)
        return torch.cat(tokens, dim=1)

    def _rope(
        self, places: tuple[int, int], window: int, device: torch.device
    ) -> RotaryTables | None:
        """Return the rotary tables of a block, `window` 0 for a global one."""
        size = (window, window) if window else places
        if self.rope == "dinov3":
            return centred_tables(size, self.head_dim, places, device=device)
        if self.rope == "eva02":
            grid = _EVA02_GRID
            return rotary_tables(size, self.head_dim, places=size, grid=grid, device=device)
        return None


def _check_choice(what: str, value: str) -> None:
    names = _CHOICES[what]
    if value not in names:
        meant = nearest(value, names)
        remedy = f"Did you mean {meant!r}?" if meant else "Take one of these."
        fail(what, expected=f"one of {', '.join(names)}", got=repr(value), remedy=remedy)


def _check_shifted(shifted: Collection[int], global_blocks: Collection[int], depth: int) -> None:
    check_block_indexes("shifted_block_indexes", shifted, depth)
    if both := sorted(set(shifted) & set(global_blocks)):
        remedy = "A block that sees the whole map has no windows to shift."
        fail("shifted_block_indexes", expected="window blocks", got=str(both), remedy=remedy)


def _check_prefix(
    use_rel_pos: bool, window_fit: WindowFit, shifted_blocks: Collection[int]
) -> None:
    """Raise an InputError for what class and register tokens cannot take part in."""
    for what, asked_for, plain in (
        ("use_rel_pos", use_rel_pos, False),
        ("window_fit", window_fit, "pad"),
        ("shifted_block_indexes", list(shifted_blocks), []),
    ):
        if asked_for != plain:
            fail(
                what,
                expected=f"{plain!r} with class or register tokens, which have no place on the map",
                got=repr(asked_for),
                remedy="Set use_cls_token=False and num_register_tokens=0, or leave this out.",
            )
