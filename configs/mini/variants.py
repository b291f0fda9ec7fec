"""Every kind of pyramid and propagation, tiny, on drawn shapes: benchmarks/variants.py.

    python train_net.py --config-file configs/mini/variants/global_attention.py

Each row changes "global_attention" in one place: mask_rcnn_vitdet_shapes.py without convolutions
and without relative positions, which are in no ablation of the paper. Sources are tables of ViTDet
(arXiv 2203.16527). 6000 images = 1500 iterations x 4, cosine, warm-up 200 iterations.
"""

from types import SimpleNamespace

from detectron2.config import LazyCall as L

from vitdet.backbones.vitae import ViTAE
from vitdet.backbones.vitae_s import ViTAES

from ..common.ablations import (
    convolutions,
    fpn_last_map,
    fpn_stages,
    no_propagation,
    no_pyramid,
    shifted_windows,
)
from ..common.models.mask_rcnn_easycv import before_v07
from ..common.rows import Recipes, Row, training
from .mask_rcnn_vitdet_shapes import dataloader, model, optimizer, schedule, train

model.backbone.net.update(use_rel_pos=False, residual_block_indexes=[])
train.update(num_images=6000, checkpoint_every=6000)
schedule.num_images = 6000


def easycv(parts: SimpleNamespace) -> None:
    """A last norm, deconvolutions that keep their channels, norms over a whole map."""
    before_v07(parts.model, "attn")
    parts.model.backbone.net.pretrain_img_size = 128


def vitae_b(parts: SimpleNamespace) -> None:
    """ViTAE-B."""
    parts.model.backbone.net = L(ViTAE)(
        img_size=128,
        patch_size=8,
        embed_dim=96,
        depth=6,
        num_heads=3,
        window_size=8,
        global_block_indexes=[2, 5],
        attention_backend="eager",
        out_feature="last_feat",
    )


def vitae_s(parts: SimpleNamespace) -> None:
    """Widths a quarter of the published ones, stride 8 instead of 16."""
    parts.model.backbone.net = L(ViTAES)(
        img_size=128,
        embed_dims=[16, 16, 48],
        token_dims=[24, 48, 96],
        downsample_ratios=[2, 2, 2],
        depths=[0, 0, 6],
        num_heads=[1, 1, 3],
        groups=[1, 1, 24],
        window_size=8,
        global_block_indexes=[2, 5],
        attention_backend="eager",
        out_feature="last_feat",
    )


CHANGES = {
    "global_attention": ("this project", ()),
    "no_pyramid": ('Table 1, "no feature pyramid"', (no_pyramid,)),
    "fpn_stages": ("Table 1 (a); three levels here, hence three stages", (fpn_stages,)),
    "fpn_last_map": ("Table 1 (b)", (fpn_last_map,)),
    "no_propagation": ('Table 2a, "none"', (no_propagation,)),
    "shifted_windows": ('Table 2a, "shifted win."', (shifted_windows,)),
    "conv_naive": ('Table 2b, "naive"', (convolutions("naive"),)),
    "conv_basic": ('Table 2b, "basic"', (convolutions("basic"),)),
    "conv_bottleneck": ('Table 2b, "bottleneck"', (convolutions("bottleneck"),)),
    "easycv_attention": ("alibaba/EasyCV before v0.7", (easycv,)),
    "vitae_b": ("ViTAE-Transformer/ViTDet", (vitae_b,)),
    "vitae_s": ("ViTAE-Transformer/ViTDet", (vitae_s,)),
}
ROWS = {
    name: Row("", 0, source, (*changes, training(output_dir=f"output/variants/{name}")), start="")
    for name, (source, changes) in CHANGES.items()
}
recipes = Recipes(ROWS, "variants", globals())
