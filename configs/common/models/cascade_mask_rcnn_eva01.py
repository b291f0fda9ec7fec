"""Cascade Mask R-CNN on EVA-01 (1B) with the simple feature pyramid, at 1280 x 1280 pixels.

Source: "EVA: Exploring the Limits of Masked Visual Representation Learning at Scale" (arXiv
2211.07636), Sec. 3.2, with the numbers of baaivision/EVA, EVA-01/det
(COCO/cascade_mask_rcnn_vitdet_eva.py). Heads as in `cascade.py`. At 1536 pixels it was evaluated
with `square_pad=1536` and `net.rel_pos_resize="beit"`, and the tables of 1280.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from vitdet.backbones.vit import ViT
from vitdet.pyramid import SimpleFeaturePyramid

from .cascade import cascade
from .mask_rcnn import model

model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size=1280,
        patch_size=16,
        embed_dim=1408,
        depth=40,
        num_heads=16,
        mlp_ratio=6144 / 1408,
        qkv_bias="qv",
        drop_path_rate=0.6,
        norm_eps=1e-6,
        use_abs_pos=True,
        use_rel_pos=True,
        rel_pos_resize="interpolate",
        window_size=16,
        global_block_indexes=list(range(3, 40, 4)),  # every fourth block
        residual_block_indexes=[],
        checkpoint_blocks=list(range(40)),
        pretrain_img_size=224,
        pretrain_use_cls_token=True,
        layer_scale=False,
        freeze_patch_embed=True,
        out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=[4.0, 2.0, 1.0, 0.5],  # strides 4, 8, 16, 32: p2 to p5
    top_block=L(LastLevelMaxPool)(),  # p6
    norm="LN",
    square_pad=1280,
)
model.roi_heads = cascade(model.roi_heads)
