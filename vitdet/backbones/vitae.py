"""ViTAE-B: a plain ViT whose blocks have a convolution branch beside attention.

Xu et al., "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias", Sec. 3.3
(normal cell). Parameter names and numbers as ViTAE-Transformer/ViTDet,
mmdet/models/backbones/vitae.py, with two differences. The relative positions there are learned for
scaled queries; here, as everywhere in this project, for unscaled ones, and conversion multiplies
the tables. And any input size works here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vitdet.backbones.block import Attention, Block
from vitdet.backbones.vit import PlainViT, grid_of, table_size, windows_of
from vitdet.layers.attention import check_backend
from vitdet.layers.drop_path import drop_path_rates
from vitdet.layers.mlp import Mlp
from vitdet.layers.norms import layer_norm
from vitdet.layers.patch_embed import PatchEmbed
from vitdet.layers.pos_embed import PosEmbedResize
from vitdet.layers.propagation import parallel_convolutions
from vitdet.layers.rel_pos import RelPosResize
from vitdet.utils.checks import InputError


def ViTAE(
    *,
    img_size: int | Sequence[int] = 1024,
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
) -> PlainViT:
    """Build ViTAE-B: convolutions beside attention, and a norm after the last block.

    `embed_dim` is a multiple of 4: the convolutions have groups of 4. BatchNorm sees each batch
    twice in `checkpoint_blocks`, as published. For the arguments see `vitdet.backbones.vit`.
    """
    check_backend(attention_backend)
    if embed_dim % 4:
        raise InputError(f"embed_dim: expected a multiple of 4, got {embed_dim}. Change it.")
    norm, hidden_dim = layer_norm(norm_eps), int(embed_dim * mlp_ratio)
    grid = grid_of(img_size, patch_size)
    patch_embed, blocks = PatchEmbed(patch_size, in_chans, embed_dim), []
    windows = windows_of(window_size, global_block_indexes, depth)
    for i, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
        attn = Attention(
            embed_dim,
            num_heads,
            bias=qkv_bias and (True if windows[i] else "qv"),
            rel_pos_size=table_size(windows[i], grid),
            rel_pos_resize=rel_pos_resize,
            backend=attention_backend,
        )
        branch = parallel_convolutions(embed_dim, hidden_dim, embed_dim // 4)
        block = Block(
            (norm(embed_dim), norm(embed_dim)),
            attn,
            Mlp(embed_dim, hidden_dim),
            drop_path=rate,
            window_size=windows[i],
            branch=branch,
        )
        blocks.append(block)
    return PlainViT(
        patch_embed,
        blocks,
        pos_grid=grid,
        pos_embed_resize=pos_embed_resize,
        norm=norm(embed_dim),
        checkpoint_blocks=checkpoint_blocks,
        out_feature=out_feature,
    )
