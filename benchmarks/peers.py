"""ViTDet's backbone in other projects, with our weights, each checked to compute what ours does.

The sizes are those that all of them can have: positions of the image's own grid and decomposed
relative positions. Segment Anything's and timm's encoders end with a neck, which is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from vitdet.backbones.vit import ViT
from vitdet.convert.out import export

OURS = "vitdet"
TOLERANCE = 2e-4  # of the largest entry, float32
Weights = Mapping[str, torch.Tensor]


class Sizes(NamedTuple):
    """A plain ViT: `global_blocks` see the whole map, all others windows."""

    size: int = 1024
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    patch_size: int = 16
    window_size: int = 14
    global_blocks: tuple[int, ...] = (2, 5, 8, 11)


MODELS: dict[str, Callable[[int], Sizes]] = {
    "b": Sizes,
    "l": lambda size: Sizes(size, 1024, 24, 16, global_blocks=(5, 11, 17, 23)),
    "tiny": lambda size: Sizes(size, 32, 4, 2, window_size=3, global_blocks=(1, 3)),
}


class Peer(NamedTuple):
    """A backbone and how its map of tokens (B, C, H, W) comes out of it."""

    net: nn.Module
    tokens: Callable[[torch.Tensor], torch.Tensor]


def ours(sizes: Sizes, **options: Any) -> Peer:
    """Return our backbone with random weights, all of them large enough to matter."""
    torch.manual_seed(0)
    net = ViT(
        img_size=sizes.size,
        patch_size=sizes.patch_size,
        embed_dim=sizes.embed_dim,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        window_size=sizes.window_size,
        global_block_indexes=sizes.global_blocks,
        use_rel_pos=True,
        pretrain_img_size=sizes.size,
        **options,
    )
    with torch.no_grad():
        for name, value in net.named_parameters():
            if value.ndim == 1 or "rel_pos" in name:  # biases are zero at the start, norms one
                value.add_(0.1 * torch.randn_like(value))
            elif value.ndim == 2:
                value.normal_(std=value.shape[1] ** -0.5)
    return Peer(net.eval(), lambda images: net(images)["last_feat"])


def detectron2(sizes: Sizes, weights: Weights) -> Peer:
    """Return detectron2's, which has our names (facebookresearch/detectron2, backbone/vit.py)."""
    from detectron2.modeling.backbone.vit import ViT as Theirs

    net = Theirs(
        **_same_names(sizes),
        window_block_indexes=[i for i in range(sizes.depth) if i not in sizes.global_blocks],
        pretrain_img_size=sizes.size,
    )
    net.load_state_dict(dict(weights))
    return Peer(net, lambda images: net(images)["last_feat"])


def transformers(sizes: Sizes, weights: Weights) -> Peer:
    """Return huggingface/transformers' VitDetBackbone."""
    import transformers as package

    config = package.VitDetConfig(
        hidden_size=sizes.embed_dim,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.num_heads,
        image_size=sizes.size,
        pretrain_image_size=sizes.size,
        patch_size=sizes.patch_size,
        window_size=sizes.window_size,
        window_block_indices=[i for i in range(sizes.depth) if i not in sizes.global_blocks],
        use_relative_position_embeddings=True,
        out_features=[f"stage{sizes.depth}"],
    )
    net = package.VitDetBackbone(config)
    net.load_state_dict(export(weights, "hf_vitdet")[0])
    return Peer(net, lambda images: net(images).feature_maps[0])


def segment_anything(sizes: Sizes, weights: Weights) -> Peer:
    """Return facebookresearch/segment-anything's ImageEncoderViT."""
    from segment_anything.modeling import ImageEncoderViT

    net = ImageEncoderViT(
        **_same_names(sizes),
        global_attn_indexes=sizes.global_blocks,
    )
    net.neck = nn.Identity()
    net.load_state_dict(_sam_names(weights))
    return Peer(net, net)


def timm(sizes: Sizes, weights: Weights) -> Peer:
    """Return huggingface/pytorch-image-models' samvit."""
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    net = VisionTransformerSAM(
        **_same_names(sizes),
        global_attn_indexes=sizes.global_blocks,
        num_classes=0,
    )
    net.neck = nn.Identity()
    named = {name.replace(".lin", ".fc"): value for name, value in _sam_names(weights).items()}
    net.load_state_dict(named)
    return Peer(net, net.forward_features)


def _same_names(sizes: Sizes) -> dict[str, Any]:
    """Return what detectron2, Segment Anything and timm call by the same names."""
    return {
        "img_size": sizes.size,
        "patch_size": sizes.patch_size,
        "embed_dim": sizes.embed_dim,
        "depth": sizes.depth,
        "num_heads": sizes.num_heads,
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "use_rel_pos": True,
        "window_size": sizes.window_size,
    }


def _sam_names(weights: Weights) -> dict[str, torch.Tensor]:
    # SAM has no row for a class token, and ViTDet reads none
    return export(weights, "sam", allow_inexact=True)[0]


PEERS: dict[str, Callable[[Sizes, Weights], Peer]] = {
    "detectron2": detectron2,
    "transformers": transformers,
    "segment-anything": segment_anything,
    "timm": timm,
}


def build(name: str, sizes: Sizes, weights: Weights | None = None) -> Peer:
    """Return a backbone by name: ours, or another project's with `weights` (ours by default)."""
    if name == OURS:
        return ours(sizes)
    net, tokens = PEERS[name](sizes, weights or ours(sizes).net.state_dict())
    return Peer(net.eval(), tokens)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest expected entry."""
    if got.shape != expected.shape:
        raise SystemExit(f"outputs differ: {tuple(got.shape)} for {tuple(expected.shape)}")
    return ((got - expected).abs().max() / expected.abs().max()).item()


def check(
    name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE
) -> float:
    """Return the difference of two outputs; stop where they do not agree."""
    found = difference(got.float(), expected.float())
    if not found <= tolerance:  # also where it is no number
        text = f"{name}: outputs differ by {found:.2g} of the largest entry"
        raise SystemExit(f"{text}, more than {tolerance:g}")
    return found
