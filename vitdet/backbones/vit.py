"""Plain vision transformers: patches, finished blocks, a map. `eva02`, `vitae`: other defaults.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", and EVA-01, CLIP,
DeiT-III, DINOv2, DINOv3, Perception Encoder (arXiv 2504.13181), SAM 3's trunk. Parameter names as
facebookresearch/detectron2, backbone/vit.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitdet.backbones.base import LayeredBackbone, check_indexes, init_linear
from vitdet.backbones.block import Attention, Block, QkvBias, split_prefix
from vitdet.layers.attention import check_backend
from vitdet.layers.norms import layer_norm
from vitdet.layers.parts import (
    Activation,
    ConvPropagation,
    FeedForward,
    Mlp,
    PatchEmbed,
    PropagationKind,
    PropagationNorm,
    SwiGLU,
    drop_path_rates,
)
from vitdet.layers.positions import PosEmbedResize, RelPosResize, resize_pos_embed
from vitdet.layers.rope import Rope, RopeResize, RotaryTables, Size, make_ropes
from vitdet.utils.checks import InputError, check_word


class PlainViT(LayeredBackbone):
    """Images to tokens, blocks, tokens to a map; class and register tokens where there are any.

    Arguments that are not told here are those of `ViT`.

    Args:
        patch_embed: images to tokens (B, H, W, C).
        blocks: finished.
        pos_grid: (H, W) in tokens of the grid of `pos_embed`, None for no absolute positions.
        class_row: whether it has a first row for a class token.
        norm_pre: a norm before the first block, as in CLIP, or None.
        norm: a norm after the last block, or None.
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
        names = [out_feature, *(f"block{i}" for i in sorted(out_block_indexes))]
        self.set_outputs(dict.fromkeys(names, (dim, self.patch_size)))
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

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
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


# --- the builder -------------------------------------------------------------------------------

_WORDS = {
    "ffn_layer": ("mlp", "swiglu", "swiglu_norm"),
    "act_layer": ("gelu", "gelu_tanh", "quick_gelu"),
    "rope": ("none", "dinov3", "eva02", "pe"),
    "rope_resize": ("extend", "stretch"),
    "qkv_bias": (True, False, "qv"),
    "rel_pos_resize": ("interpolate", "crop", "beit"),
    "pos_embed_resize": ("bicubic", "bicubic_antialias", "bilinear", "tile", "crop"),
    "propagation": ("naive", "basic", "bottleneck"),
    "propagation_norm": ("LN", "BN"),
}


def ViT(
    *,
    img_size: int | Sequence[int] = 1024,
    patch_size: int = 16,
    patch_bias: bool = True,
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
    rope: Literal["none", "dinov3", "eva02", "pe"] = "none",
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
        patch_bias: whether the patch embedding has a bias; not in Perception Encoder and SAM 3.
        in_chans: channels of an image.
        embed_dim: channels C of a token.
        depth: number of blocks.
        num_heads: heads of every block.
        mlp_ratio: hidden channels of the feed-forward layer over C.
        qkv_bias, split_qkv: see `Attention`.
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
        shifted_block_indexes: window blocks whose windows start half a window above and left of
            the map (Table 2a, "shifted win."), filled up with zeros, unmasked.
        residual_block_indexes: blocks followed by a propagation block of convolutions.
        propagation, propagation_norm: its kind and norm, see `vitdet.layers.parts`.
        parallel_branch: whether convolutions stand beside the attention, as in ViTAE-B, whose
            global blocks have a `qkv_bias` of "qv".
        checkpoint_blocks: blocks whose activations are recomputed in the backward pass.
        pretrain_img_size: as `img_size`, of the pretraining image: the size of `pos_embed`; None
            for that of `img_size`.
        pretrain_use_cls_token: whether `pos_embed` has a first row for a class token, kept so that
            pretrained weights fit.
        layer_scale: whether branches have a learned factor a channel, as DINOv2 weights do.
        use_cls_token: whether a class token takes part in the blocks, and in every window.
        num_register_tokens: how many register tokens do (Darcet et al., Sec. 2.2).
        pre_norm: whether there is a norm before the first block.
        final_norm: whether there is one after the last.
        ffn_layer: "mlp", "swiglu" (DINOv2-g, DINOv3-H+), or "swiglu_norm" (EVA-02).
        act_layer: of the MLP, "gelu", "gelu_tanh" (SigLIP) or "quick_gelu" (CLIP).
        rope: rotary positions, "dinov3", "eva02" or "pe" (Perception Encoder, SAM 3).
        rope_pretrain_grid: of the last two, see `vitdet.layers.rope.make_ropes`.
        rope_interpolate: whether positions are scaled to that grid (intp_freq).
        rope_resize: see there.
        freeze_patch_embed: whether the patch embedding does not learn (EVA-01).
        frozen: whether no parameter learns.
        attention_backend: kernel, see `vitdet.layers.attention`.
        out_feature: name of the output.
        out_block_indexes: blocks whose maps are outputs too, called "block0" and so on.
    """
    given = locals()
    _check(given)
    norm, hidden_dim = layer_norm(norm_eps), int(embed_dim * mlp_ratio)
    grid = _grid(img_size, patch_size)
    rope_grid = rope_pretrain_grid if rope_interpolate else None
    ropes: tuple[Rope | None, Rope | None] = (None, None)
    if rope != "none":
        ropes = make_ropes(rope, embed_dim / num_heads, rope_grid, grid, rope_resize)
    patch_embed, blocks = PatchEmbed(patch_size, in_chans, embed_dim, patch_bias), []
    for i, rate in enumerate(drop_path_rates(drop_path_rate, depth)):
        is_global = i in global_block_indexes or not window_size
        window = global_window_size if is_global else window_size
        residual = branch = None
        if i in residual_block_indexes:
            residual = ConvPropagation(embed_dim, propagation, propagation_norm)
        attn = Attention(
            embed_dim,
            num_heads,
            "qv" if parallel_branch and is_global and qkv_bias else qkv_bias,
            split=split_qkv,
            inner_norm=nn.LayerNorm(embed_dim, inner_attn_norm_eps) if inner_attn_norm else None,
            rel_pos_size=((window, window) if window else grid) if use_rel_pos else None,
            rel_pos_resize=rel_pos_resize,
            backend=attention_backend,
        )
        if parallel_branch:
            branch = _vitae_branch(embed_dim, hidden_dim)
        if ffn_layer == "mlp":
            mlp = Mlp(embed_dim, hidden_dim, act_layer)
        else:
            mlp = SwiGLU(embed_dim, hidden_dim, norm_eps, inner_norm=ffn_layer == "swiglu_norm")
        block = Block(
            (norm(embed_dim), norm(embed_dim)),
            attn,
            mlp,
            drop_path=rate,
            window_size=window,
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
        norm_pre=norm(embed_dim) if pre_norm else None,
        norm=norm(embed_dim) if final_norm else None,
        **{name: given[name] for name in _OF_THE_NET},
    )
    net.patch_embed.requires_grad_(not freeze_patch_embed)
    return net.requires_grad_(False) if frozen else net


_OF_THE_NET = ("pos_embed_resize", "use_cls_token", "num_register_tokens", "checkpoint_blocks")
_OF_THE_NET += ("out_feature", "out_block_indexes")


def _grid(img_size: int | Sequence[int], patch_size: int) -> Size:
    """Return the (H, W) in tokens of an image; a side that a patch does not divide is cut."""
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return height // patch_size, width // patch_size


def _vitae_branch(dim: int, hidden_dim: int) -> nn.Sequential:
    """Two 3x3 convolutions in groups of 4 channels, BatchNorm and SiLU between them."""
    return nn.Sequential(
        nn.Conv2d(dim, hidden_dim, 3, padding=1, groups=dim // 4),
        nn.BatchNorm2d(hidden_dim),
        nn.SiLU(),
        nn.Conv2d(hidden_dim, dim, 3, padding=1, groups=dim // 4),
    )


def _check(given: dict[str, Any]) -> None:
    """Raise an InputError for arguments of `ViT` that do not exist or exclude each other."""
    for what, known in _WORDS.items():
        check_word(what, given[what], known)
    check_backend(given["attention_backend"], rel_pos=given["use_rel_pos"])
    for what, blocks in given.items():
        if what.endswith("_indexes") or what == "checkpoint_blocks":
            check_indexes(what, blocks, range(given["depth"]))
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
        names = ("use_rel_pos", "shifted_block_indexes", "parallel_branch")
        why = "class or register tokens, which have no place on the map"
        excluded += [(name, why) for name in names]
    for name, why in excluded:
        if given[name]:
            raise InputError(
                f"{name}: expected none with {why}, got {given[name]!r}. Leave one of them out."
            )
