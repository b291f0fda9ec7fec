"""Mask R-CNN on the plain ViT-B with the simple feature pyramid, at 1024 x 1024 pixels.

ViT-L and ViT-H are the same with `embed_dim`, `depth`, `num_heads`, `drop_path_rate` and
`global_block_indexes` changed; `cascade` and `lvis_heads` change the heads.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from vitdet.backbones.vit import ViT
from vitdet.pyramid import SimpleFeaturePyramid

from .mask_rcnn import model

model.backbone = L(SimpleFeaturePyramid)(
    net=L(ViT)(
        img_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        drop_path_rate=0.1,
        norm_eps=1e-6,
        use_abs_pos=True,
        use_rel_pos=True,
        window_size=14,
        global_block_indexes=[2, 5, 8, 11],  # the last block of each quarter
        residual_block_indexes=[],
        pretrain_img_size=224,
        pretrain_use_cls_token=True,
        out_feature="last_feat",
    ),
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=[4.0, 2.0, 1.0, 0.5],  # strides 4, 8, 16, 32: p2 to p5
    top_block=L(LastLevelMaxPool)(),  # p6
    norm="LN",
    square_pad=1024,
)
