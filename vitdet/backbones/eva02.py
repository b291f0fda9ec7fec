"""EVA-02 backbone: a plain ViT with rotary positions, SwiGLU, and q, k and v apart.

Fang et al., "EVA-02: A Visual Representation for Neon Genesis", Sec. 2.1 and 3.2. Parameter names
and numbers as baaivision/EVA, EVA-02/det, modeling/backbone/vit.py, and as the ViT-Large of
exiawsh/StreamPETR, models/backbones/eva_vit.py, whose global blocks are larger windows.

The published tables of rotary positions are as large as the square training image; another map
fails there, or silently gets wrong positions. Here they are made for the map at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from vitdet.backbones.base import check_block_indexes, check_word
from vitdet.backbones.block import Block, SplitAttention
from vitdet.backbones.vit import PlainViT, grid_of, windows_of
from vitdet.layers.attention import check_backend
from vitdet.layers.drop_path import drop_path_rates
from vitdet.layers.mlp import SwiGLU
from vitdet.layers.norms import layer_norm
from vitdet.layers.patch_embed import PatchEmbed
from vitdet.layers.pos_embed import PosEmbedResize
from vitdet.layers.propagation import ConvPropagation
from vitdet.layers.rope import RopeResize, check_head_dim, eva_ropes


def EVA02ViT(
    *,
    img_size: int | Sequence[int] = 1024,
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
    rope_pretrain_grid: int | Sequence[int] | None = 16,
    rope_interpolate: bool = True,
    rope_resize: RopeResize = "extend",
    window_size: int = 0,
    global_window_size: int = 0,
    global_block_indexes: Collection[int] = (),
    residual_block_indexes: Collection[int] = (),
    checkpoint_blocks: Collection[int] = (),
    pretrain_img_size: int | Sequence[int] = 224,
    pretrain_use_cls_token: bool = True,
    inner_attn_norm: bool = False,
    inner_attn_norm_eps: float = 1e-5,
    frozen: bool = False,
    attention_backend: str = "auto",
    out_feature: str = "last_feat",
) -> PlainViT:
    """Build EVA-02 without class token and norm after the last block, and StreamPETR's ViT-L.

    Args, beside those of `vitdet.backbones.vit`:
        rope_pretrain_grid, rope_resize: see `vitdet.layers.rope.eva_ropes`.
        rope_interpolate: whether positions are scaled to that grid (intp_freq).
        global_window_size: side in tokens of the global blocks' windows, 0 for the whole map.
            StreamPETR, which gives the short side as `img_size`: 20 for 800 x 320 pixels.
        inner_attn_norm, inner_attn_norm_eps: a norm before the output projection (`subln`).
        frozen: whether no parameter learns.
    """
    check_backend(attention_backend)
    check_block_indexes("residual_block_indexes", residual_block_indexes, depth)
    check_head_dim(embed_dim, num_heads)
    check_word("rope_resize", rope_resize, ("extend", "stretch"))
    norm, hidden_dim = layer_norm(norm_eps), int(embed_dim * mlp_ratio)
    rope_grid = rope_pretrain_grid if rope_interpolate else None
    side = grid_of(img_size, patch_size)
    window_rope, global_rope = eva_ropes(embed_dim // num_heads, rope_grid, side, rope_resize)
    patch_embed, blocks = PatchEmbed(patch_size, in_chans, embed_dim), []
    windows = windows_of(window_size, global_block_indexes, depth)
    for i, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
        inner_norm = nn.LayerNorm(embed_dim, inner_attn_norm_eps) if inner_attn_norm else None
        block = Block(
            (norm(embed_dim), norm(embed_dim)),
            SplitAttention(
                embed_dim,
                num_heads,
                bias=qkv_bias,
                inner_norm=inner_norm,
                backend=attention_backend,
            ),
            SwiGLU(embed_dim, hidden_dim, norm_eps),
            drop_path=rate,
            window_size=windows[i] or global_window_size,
            residual=ConvPropagation(embed_dim) if i in residual_block_indexes else None,
            rope=window_rope if windows[i] else global_rope,
        )
        blocks.append(block)
    net = PlainViT(
        patch_embed,
        blocks,
        pos_grid=grid_of(pretrain_img_size, patch_size) if use_abs_pos else None,
        class_row=pretrain_use_cls_token,
        pos_embed_resize=pos_embed_resize,
        checkpoint_blocks=checkpoint_blocks,
        out_feature=out_feature,
    )
    return net.requires_grad_(not frozen)
