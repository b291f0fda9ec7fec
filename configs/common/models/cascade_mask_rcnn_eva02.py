"""Cascade Mask R-CNN on EVA-02-B with the simple feature pyramid, at 1024 x 1024 pixels.

Source: "EVA-02: A Visual Representation for Neon Genesis" (arXiv 2303.11331), Sec. 3.2, with the
numbers of baaivision/EVA, EVA-02/det (eva2_mim_to_coco/..._b_4attn_1024_lrd0p7.py). Heads as in
`cascade.py`.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.pyramid import SimpleFeaturePyramid

from .cascade import cascade
from .mask_rcnn import model

model.backbone = L(SimpleFeaturePyramid)(
    net=L(EVA02ViT)(
        img_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4 * 2 / 3,  # SwiGLU has three matrices where an MLP has two
        qkv_bias=True,
        drop_path_rate=0.1,
        norm_eps=1e-6,
        use_abs_pos=True,
        rope_pretrain_grid=16,  # pretrained with 16 x 16 tokens
        rope_interpolate=True,
        window_size=16,
        global_block_indexes=[2, 5, 8, 11],  # the last block of each quarter
        residual_block_indexes=[],
        checkpoint_blocks=[],
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
model.roi_heads = cascade(model.roi_heads)
