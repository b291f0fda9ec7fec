"""Plain vision transformers: a network of finished blocks, and its builder.

`ViT` builds that of Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection",
and of EVA-01, CLIP, DeiT-III, DINOv2, DINOv3; `vitdet.backbones.eva02` and `vitdet.backbones.vitae`
have two more builders. Parameter names as facebookresearch/detectron2, backbone/vit.py.

Arguments that all builders have:
    img_size: side in pixels of the square training image, or its (height, width): the size of the
        global blocks' tables.
    patch_size: side of a patch in pixels, the stride of the output.
    in_chans: channels of an image.
    embed_dim, depth, num_heads: channels C of a token, blocks, heads of every block.
    mlp_ratio: hidden channels of the feed-forward layer over C.
    qkv_bias: whether q, k and v have a bias.
    drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
    norm_eps: epsilon of the LayerNorms.
    use_abs_pos: whether to add absolute positions.
    use_rel_pos: whether attention has decomposed relative positions.
    rel_pos_resize, pos_embed_resize: see `vitdet.layers.rel_pos` and `vitdet.layers.pos_embed`.
    window_size: side of a window in tokens, 0 for no windows at all.
    global_block_indexes: blocks that attend to the whole map; detectron2's `window_block_indexes`
        lists the others.
    residual_block_indexes: blocks followed by a propagation block of convolutions.
    checkpoint_blocks: blocks whose activations are recomputed in the backward pass.
    pretrain_img_size: as `img_size`, of the pretraining image: the size of `pos_embed`.
    pretrain_use_cls_token: whether `pos_embed` has a first row for a class token, kept so that
        pretrained weights fit.
    attention_backend: kernel, see `vitdet.layers.attention`.
    out_feature: name of the output.

All raise an InputError for an index outside the blocks, sizes that do not divide, an unknown word.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.base import LayeredBackbone, check_block_indexes, check_word, init_linear
from vitdet.backbones.block import Attention, Block, QkvBias, WindowFit, split_prefix
from vitdet.layers.attention import check_backend
from vitdet.layers.drop_path import drop_path_rates
from vitdet.layers.mlp import Activation, FeedForward, make_feed_forward
from vitdet.layers.norms import layer_norm
from vitdet.layers.patch_embed import PatchEmbed
from vitdet.layers.pos_embed import PosEmbedResize, resize_pos_embed
from vitdet.layers.propagation import (
    ConvPropagation,
    PropagationKind,
    PropagationNorm,
    check_propagation,
)
from vitdet.layers.rel_pos import RelPosResize
from vitdet.layers.rope import (
    Dinov3Rope,
    RopeResize,
    RotaryTables,
    Size,
    check_head_dim,
    eva_ropes,
)
from vitdet.utils.checks import InputError


class PlainViT(LayeredBackbone):
    """Images to tokens, blocks, tokens to a map; class and register tokens where there are any.

    Args:
        patch_embed: images to tokens (B, H, W, C).
        blocks: finished.
        pos_grid: (H, W) in tokens of the grid of `pos_embed`, None for no absolute positions.
        class_row: whether it has a first row for a class token.
        pos_embed_resize: see the module.
        use_cls_token: whether a class token takes part in the blocks.
        num_register_tokens: how many register tokens do (Darcet et al., Sec. 2.2).
        norm_pre: a norm before the first block, as in CLIP, or None.
        norm: a norm after the last block, or None.
        checkpoint_blocks: see the module.
        out_feature: see the module.
        out_block_indexes: blocks whose maps are outputs too, called "block0" and so on.

    Raises:
        InputError: a block number that does not exist.
    """

    def __init__(
        self,
        patch_embed: PatchEmbed,
        blocks: Sequence[Block],
        *,
        pos_grid: Size | None,
        class_row: bool = False,
        pos_embed_resize: PosEmbedResize = "bicubic",
        use_cls_token: bool = False,
        num_register_tokens: int = 0,
        norm_pre: nn.Module | None = None,
        norm: nn.Module | None = None,
        checkpoint_blocks: Collection[int] = (),
        out_feature: str = "last_feat",
        out_block_indexes: Collection[int] = (),
    ) -> None:
        super().__init__()
        check_block_indexes("checkpoint_blocks", checkpoint_blocks, len(blocks))
        check_block_indexes("out_block_indexes", out_block_indexes, len(blocks))
        dim = patch_embed.proj.out_channels

        def embedding(rows: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(1, rows, dim)) if rows else None

        self.patch_size, self.out_feature = patch_embed.patch_size, out_feature
        self.class_row, self.pos_grid = class_row, pos_grid
        self.pos_embed_resize: PosEmbedResize = pos_embed_resize
        self.num_prefix_tokens = use_cls_token + num_register_tokens
        self.checkpoint_blocks = frozenset(checkpoint_blocks)
        self.out_blocks = frozenset(out_block_indexes)
        self.patch_embed = patch_embed
        self.pos_embed = embedding(pos_grid[0] * pos_grid[1] + class_row) if pos_grid else None
        self.cls_token = embedding(int(use_cls_token))
        self.reg_token = embedding(num_register_tokens)
        self.norm_pre = norm_pre or nn.Identity()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm or nn.Identity()

        # detectron2's Backbone.output_shape reads these three.
        self._out_features = [out_feature, *(f"block{i}" for i in sorted(out_block_indexes))]
        self._out_feature_channels = dict.fromkeys(self._out_features, dim)
        self._out_feature_strides = dict.fromkeys(self._out_features, self.patch_size)
        for each in (self.pos_embed, self.cls_token, self.reg_token):
            if each is not None:
                nn.init.trunc_normal_(each, std=0.02)
        init_linear(self)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def layer_id(self, name: str) -> int:
        """Return 0 for the embeddings, i + 1 for block i, num_layers + 1 for propagation blocks."""
        if name.startswith(("pos_embed", "patch_embed", "cls_token", "reg_token", "norm_pre")):
            return 0
        parts = name.split(".")
        inside = parts[0] == "blocks" and "residual" not in parts
        return int(parts[1]) + 1 if inside else self.num_layers + 1

    def units(self) -> list[Any]:
        """Return the blocks."""
        return list(self.blocks)

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
    ) -> tuple[torch.Tensor, Size]:
        """Return the tokens after the last block (and norm) and the size (H, W) of their map.

        Args:
            images: (B, 3, h, w).
            blocks: is given the tokens after each of `out_block_indexes`.

        Returns:
            Tokens (B, H, W, C); with prefix tokens (B, P + H * W, C), the class token first, then
            the register tokens.
        """
        x = self.patch_embed(images)  # (B, H, W, C)
        places = (x.shape[1], x.shape[2])
        if self.pos_embed is not None:
            grid = self.pos_embed[:, 1:] if self.class_row else self.pos_embed
            x = x + resize_pos_embed(grid, places, self.pos_embed_resize, self.pos_grid)
        if self.num_prefix_tokens:
            prefix = self._prefix().expand(x.shape[0], -1, -1)
            x = torch.cat((prefix, x.flatten(1, 2)), dim=1)
        x = self.norm_pre(x)
        size = places if self.num_prefix_tokens else None
        tables: dict[tuple[object, int], RotaryTables] = {}  # cost less than one block's norm
        for i, block in enumerate(self.units()):
            rope, window = block.rope, block.window_size
            if rope is not None and (rope, window) not in tables:
                attends = (window, window) if window else places
                tables[rope, window] = rope(attends, places, x.device)
            turn = tables.get((rope, window))
            if i in self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, size, turn, use_reentrant=False)
            else:
                x = block(x, size, turn)
            if blocks is not None and i in self.out_blocks:
                blocks[i] = x
        return self.norm(x), places

    def _prefix(self) -> torch.Tensor:
        """Return class and register tokens (1, P, C)."""
        tokens = []
        if self.cls_token is not None:
            row = self.pos_embed[:, :1] if self.pos_embed is not None and self.class_row else 0.0
            tokens.append(self.cls_token + row)
        if self.reg_token is not None:
            tokens.append(self.reg_token)
        return torch.cat(tokens, dim=1)


def windows_of(window_size: int, global_blocks: Collection[int], depth: int) -> list[int]:
    """Return the side of every block's windows, 0 for a global block."""
    check_block_indexes("global_block_indexes", global_blocks, depth)
    return [0 if i in global_blocks else window_size for i in range(depth)]


def table_size(window_size: int, grid: Size) -> Size:
    """Return the (H, W) of what a block attends to in training."""
    return (window_size, window_size) if window_size else grid


def grid_of(img_size: int | Sequence[int], patch_size: int) -> Size:
    """Return the (H, W) in tokens of an image; a side that a patch does not divide is cut."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return height // patch_size, width // patch_size


def ViT(
    *,
    img_size: int | Sequence[int] = 1024,
    patch_size: int = 16,
    in_chans: int = 3,
    embed_dim: int = 768,
    depth: int = 12,
    num_heads: int = 12,
    mlp_ratio: float = 4.0,
    qkv_bias: QkvBias = True,
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
    pretrain_img_size: int | Sequence[int] = 224,
    pretrain_use_cls_token: bool = True,
    layer_scale: bool = False,
    use_cls_token: bool = False,
    num_register_tokens: int = 0,
    pre_norm: bool = False,
    final_norm: bool = False,
    ffn_layer: FeedForward = "mlp",
    act_layer: Activation = "gelu",
    rope: Literal["none", "dinov3", "eva02"] = "none",
    rope_pretrain_grid: int | Sequence[int] | None = 16,
    rope_resize: RopeResize = "extend",
    freeze_patch_embed: bool = False,
    attention_backend: str = "auto",
    out_feature: str = "last_feat",
    out_block_indexes: Collection[int] = (),
) -> PlainViT:
    """Build a plain ViT, by default without class token and norm after the last block.

    In window blocks the class and register tokens join every window, see `Block`.

    Args, beside those of the module:
        qkv_bias: also "qv": biases of q and v as parameters of their own, and none of k (EVA-01).
        window_fit: see `Block`.
        shifted_block_indexes: window blocks whose windows start half a window above and left of
            the map (Table 2a, "shifted win."), filled up with zeros, unmasked.
        propagation, propagation_norm: see `vitdet.layers.propagation`.
        layer_scale: whether branches have a learned factor a channel, as DINOv2 weights do.
        use_cls_token, num_register_tokens, out_block_indexes: see `PlainViT`.
        pre_norm, final_norm: whether there is a norm before the first and after the last block.
        ffn_layer: "mlp", "swiglu" (DINOv2-g, DINOv3-H+), or "swiglu_norm" (EVA-02).
        act_layer: of the MLP, "gelu" or "quick_gelu".
        rope: rotary positions, "dinov3" or "eva02".
        rope_pretrain_grid, rope_resize: of "eva02", see `vitdet.layers.rope.eva_ropes`.
        freeze_patch_embed: whether the patch embedding does not learn (EVA-01).
    """
    check_backend(attention_backend, rel_pos=use_rel_pos)
    check_block_indexes("residual_block_indexes", residual_block_indexes, depth)
    check_propagation(propagation, propagation_norm)
    _check_shifted(shifted_block_indexes, global_block_indexes, depth)
    check_word("ffn_layer", ffn_layer, ("mlp", "swiglu", "swiglu_norm"))
    check_word("act_layer", act_layer, ("gelu", "quick_gelu"))
    check_word("rope", rope, ("none", "dinov3", "eva02"))
    check_word("window_fit", window_fit, ("pad", "interpolate"))
    check_word("qkv_bias", qkv_bias, (True, False, "qv"))
    check_word("rel_pos_resize", rel_pos_resize, ("interpolate", "crop", "beit"))
    if use_cls_token or num_register_tokens:
        _check_prefix(use_rel_pos, window_fit, shifted_block_indexes)
    if rope != "none":
        check_head_dim(embed_dim, num_heads)
    check_word("rope_resize", rope_resize, ("extend", "stretch"))
    norm, hidden_dim = layer_norm(norm_eps), int(embed_dim * mlp_ratio)
    head_dim, grid = embed_dim // num_heads, grid_of(img_size, patch_size)
    ropes = {
        "none": (None, None),
        "dinov3": (Dinov3Rope(head_dim),) * 2,
        "eva02": eva_ropes(head_dim, rope_pretrain_grid, grid, rope_resize),
    }
    window_rope, global_rope = ropes[rope]
    patch_embed, blocks = PatchEmbed(patch_size, in_chans, embed_dim), []
    windows = windows_of(window_size, global_block_indexes, depth)
    for i, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
        residual = None
        if i in residual_block_indexes:
            residual = ConvPropagation(embed_dim, propagation, propagation_norm)
        attn = Attention(
            embed_dim,
            num_heads,
            bias=qkv_bias,
            rel_pos_size=table_size(windows[i], grid) if use_rel_pos else None,
            rel_pos_resize=rel_pos_resize,
            backend=attention_backend,
        )
        block = Block(
            (norm(embed_dim), norm(embed_dim)),
            attn,
            make_feed_forward(ffn_layer, embed_dim, hidden_dim, act_layer, norm_eps),
            drop_path=rate,
            window_size=windows[i],
            window_fit=window_fit,
            shift=windows[i] // 2 if i in shifted_block_indexes else 0,
            layer_scale=layer_scale,
            residual=residual,
            rope=window_rope if windows[i] else global_rope,
        )
        blocks.append(block)
    net = PlainViT(
        patch_embed,
        blocks,
        pos_grid=grid_of(pretrain_img_size, patch_size) if use_abs_pos else None,
        class_row=pretrain_use_cls_token,
        pos_embed_resize=pos_embed_resize,
        use_cls_token=use_cls_token,
        num_register_tokens=num_register_tokens,
        norm_pre=norm(embed_dim) if pre_norm else None,
        norm=norm(embed_dim) if final_norm else None,
        checkpoint_blocks=checkpoint_blocks,
        out_feature=out_feature,
        out_block_indexes=out_block_indexes,
    )
    net.patch_embed.requires_grad_(not freeze_patch_embed)
    return net


def _check_shifted(shifted: Collection[int], global_blocks: Collection[int], depth: int) -> None:
    check_block_indexes("shifted_block_indexes", shifted, depth)
    if both := sorted(set(shifted) & set(global_blocks)):
        raise InputError(
            f"shifted_block_indexes: expected window blocks, got {both}. A block that sees the "
            "whole map has no windows to shift."
        )


def _check_prefix(rel_pos: bool, window_fit: WindowFit, shifted: Collection[int]) -> None:
    """Raise an InputError for what class and register tokens cannot take part in."""
    for what, asked_for, plain in (
        ("use_rel_pos", rel_pos, False),
        ("window_fit", window_fit, "pad"),
        ("shifted_block_indexes", list(shifted), []),
    ):
        if asked_for != plain:
            raise InputError(
                f"{what}: expected {plain!r} with class or register tokens, which have no place on "
                f"the map, got {asked_for!r}. Set use_cls_token=False and num_register_tokens=0, "
                "or leave this out."
            )
