"""The builder of plain vision transformers. `eva02` and `vitae` are the same with other defaults.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", and EVA-01, CLIP,
DeiT-III, DINOv2, DINOv3.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from torch import nn

from vitdet.backbones.base import check_indexes
from vitdet.backbones.block import Attention, Block, QkvBias, WindowFit
from vitdet.backbones.plain import PlainViT
from vitdet.layers.attention import check_backend
from vitdet.layers.norms import layer_norm
from vitdet.layers.parts import (
    Activation,
    FeedForward,
    PatchEmbed,
    drop_path_rates,
    make_feed_forward,
)
from vitdet.layers.positions import PosEmbedResize, RelPosResize
from vitdet.layers.propagation import (
    ConvPropagation,
    PropagationKind,
    PropagationNorm,
    check_propagation,
    parallel_convolutions,
)
from vitdet.layers.rope import Rope, RopeResize, Size, make_ropes
from vitdet.utils.checks import InputError, check_word

_WORDS = {
    "ffn_layer": ("mlp", "swiglu", "swiglu_norm"),
    "act_layer": ("gelu", "gelu_tanh", "quick_gelu"),
    "rope": ("none", "dinov3", "eva02"),
    "rope_resize": ("extend", "stretch"),
    "window_fit": ("pad", "interpolate"),
    "qkv_bias": (True, False, "qv"),
    "rel_pos_resize": ("interpolate", "crop", "beit"),
}


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
    split_qkv: bool = False,
    inner_attn_norm: bool = False,
    inner_attn_norm_eps: float = 1e-5,
    drop_path_rate: float = 0.0,
    norm_eps: float = 1e-6,
    use_abs_pos: bool = True,
    use_rel_pos: bool = False,
    rel_pos_resize: RelPosResize = "interpolate",
    pos_embed_resize: PosEmbedResize = "bicubic",
    window_size: int = 0,
    global_window_size: int = 0,
    global_block_indexes: Collection[int] = (),
    window_fit: WindowFit = "pad",
    shifted_block_indexes: Collection[int] = (),
    residual_block_indexes: Collection[int] = (),
    propagation: PropagationKind = "bottleneck",
    propagation_norm: PropagationNorm = "LN",
    parallel_branch: bool = False,
    checkpoint_blocks: Collection[int] = (),
    pretrain_img_size: int | Sequence[int] | None = 224,
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
    rope_interpolate: bool = True,
    rope_resize: RopeResize = "extend",
    freeze_patch_embed: bool = False,
    frozen: bool = False,
    attention_backend: str = "auto",
    out_feature: str = "last_feat",
    out_block_indexes: Collection[int] = (),
) -> PlainViT:
    """Build a plain ViT, by default without class token and norm after the last block.

    Args:
        img_size: side in pixels of the square training image, or its (height, width): the size of
            the global blocks' tables.
        patch_size: side of a patch in pixels, the stride of the output.
        in_chans: channels of an image.
        embed_dim: channels C of a token.
        depth: number of blocks.
        num_heads: heads of every block.
        mlp_ratio: hidden channels of the feed-forward layer over C.
        qkv_bias: whether q, k and v have a bias, or "qv": of q and v as parameters of their own,
            and none of k (EVA-01).
        split_qkv: whether q, k and v have projections of their own (EVA-02).
        inner_attn_norm: a norm before the output projection (`subln`).
        inner_attn_norm_eps: its epsilon.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        norm_eps: epsilon of the LayerNorms.
        use_abs_pos: whether to add absolute positions.
        use_rel_pos: whether attention has decomposed relative positions.
        rel_pos_resize: how they are fitted to another map, see `vitdet.layers.positions`.
        pos_embed_resize: the same of absolute positions.
        window_size: side of a window in tokens, 0 for no windows at all.
        global_window_size: side in tokens of the global blocks' windows, 0 for the whole map.
            StreamPETR, which gives the short side as `img_size`: 20 for 800 x 320 pixels.
        global_block_indexes: blocks that attend to the whole map; detectron2's
            `window_block_indexes` lists the others.
        window_fit: see `Block`. Class and register tokens join every window.
        shifted_block_indexes: window blocks whose windows start half a window above and left of
            the map (Table 2a, "shifted win."), filled up with zeros, unmasked.
        residual_block_indexes: blocks followed by a propagation block of convolutions.
        propagation: its kind, see `vitdet.layers.propagation`.
        propagation_norm: its norm.
        parallel_branch: whether convolutions stand beside the attention, as in ViTAE-B, whose
            global blocks have a `qkv_bias` of "qv".
        checkpoint_blocks: blocks whose activations are recomputed in the backward pass.
        pretrain_img_size: as `img_size`, of the pretraining image: the size of `pos_embed`; None
            for that of `img_size`.
        pretrain_use_cls_token: whether `pos_embed` has a first row for a class token, kept so that
            pretrained weights fit.
        layer_scale: whether branches have a learned factor a channel, as DINOv2 weights do.
        use_cls_token: whether a class token takes part in the blocks.
        num_register_tokens: how many register tokens do.
        pre_norm: whether there is a norm before the first block.
        final_norm: whether there is one after the last.
        ffn_layer: "mlp", "swiglu" (DINOv2-g, DINOv3-H+), or "swiglu_norm" (EVA-02).
        act_layer: of the MLP, "gelu", "gelu_tanh" (SigLIP) or "quick_gelu" (CLIP).
        rope: rotary positions, "dinov3" or "eva02".
        rope_pretrain_grid: of "eva02", see `vitdet.layers.rope.make_ropes`.
        rope_interpolate: whether positions are scaled to that grid (intp_freq).
        rope_resize: see there.
        freeze_patch_embed: whether the patch embedding does not learn (EVA-01).
        frozen: whether no parameter learns.
        attention_backend: kernel, see `vitdet.layers.attention`.
        out_feature: name of the output.
        out_block_indexes: blocks whose maps are outputs too, called "block0" and so on.

    Raises:
        InputError: an index outside the blocks, sizes that do not divide, an unknown word.
    """
    given = locals()
    for what, known in _WORDS.items():
        check_word(what, given[what], known)
    check_backend(attention_backend, rel_pos=use_rel_pos)
    check_propagation(propagation, propagation_norm)
    for what in ("global_block_indexes", "residual_block_indexes", "shifted_block_indexes"):
        check_indexes(what, given[what], range(depth))
    _check_together(given)
    norm, hidden_dim = layer_norm(norm_eps), int(embed_dim * mlp_ratio)
    grid = _grid(img_size, patch_size)
    rope_grid = rope_pretrain_grid if rope_interpolate else None
    ropes: tuple[Rope | None, Rope | None] = (None, None)
    if rope != "none":
        ropes = make_ropes(rope, embed_dim / num_heads, rope_grid, grid, rope_resize)
    patch_embed, blocks = PatchEmbed(patch_size, in_chans, embed_dim), []
    for i, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
        is_global = i in global_block_indexes or not window_size
        window = global_window_size if is_global else window_size
        residual = branch = None
        if i in residual_block_indexes:
            residual = ConvPropagation(embed_dim, propagation, propagation_norm)
        inner = nn.LayerNorm(embed_dim, inner_attn_norm_eps) if inner_attn_norm else None
        attn = Attention(
            embed_dim,
            num_heads,
            "qv" if parallel_branch and is_global and qkv_bias else qkv_bias,
            split=split_qkv,
            inner_norm=inner,
            rel_pos_size=((window, window) if window else grid) if use_rel_pos else None,
            rel_pos_resize=rel_pos_resize,
            backend=attention_backend,
        )
        if parallel_branch:
            branch = parallel_convolutions(embed_dim, hidden_dim, embed_dim // 4)
        block = Block(
            (norm(embed_dim), norm(embed_dim)),
            attn,
            make_feed_forward(ffn_layer, embed_dim, hidden_dim, act_layer, norm_eps),
            drop_path=rate,
            window_size=window,
            window_fit=window_fit,
            shift=window // 2 if i in shifted_block_indexes else 0,
            layer_scale=layer_scale,
            residual=residual,
            branch=branch,
            rope=ropes[is_global],
        )
        blocks.append(block)
    pretrain_size = img_size if pretrain_img_size is None else pretrain_img_size
    net = PlainViT(
        patch_embed,
        blocks,
        pos_grid=_grid(pretrain_size, patch_size) if use_abs_pos else None,
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
    return net.requires_grad_(False) if frozen else net


def _grid(img_size: int | Sequence[int], patch_size: int) -> Size:
    """Return the (H, W) in tokens of an image; a side that a patch does not divide is cut."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return height // patch_size, width // patch_size


def _check_together(given: dict[str, Any]) -> None:
    """Raise an InputError for arguments of `ViT` that exclude each other."""
    both = set(given["shifted_block_indexes"]) & set(given["global_block_indexes"])
    if both:
        raise InputError(
            f"shifted_block_indexes: expected window blocks, got {sorted(both)}. A block that sees "
            "the whole map has no windows to shift."
        )
    if given["parallel_branch"] and given["embed_dim"] % 4:
        raise InputError(
            f"embed_dim: expected a multiple of 4, for the branch's groups, got "
            f"{given['embed_dim']}."
        )
    excluded = [("use_rel_pos", "split_qkv")] if given["split_qkv"] else []
    if given["use_cls_token"] or given["num_register_tokens"]:
        names = ("use_rel_pos", "shifted_block_indexes", "parallel_branch", "window_fit")
        why = "class or register tokens, which have no place on the map"
        excluded += [(name, why) for name in names]
    for name, why in excluded:
        value, plain = given[name], "pad" if name == "window_fit" else False
        if value != plain and (plain or value):
            raise InputError(
                f"{name}: expected {plain!r} with {why}, got {value!r}. Leave one of them out."
            )
