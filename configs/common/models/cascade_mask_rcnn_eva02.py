"""Cascade Mask R-CNN on EVA-02-B with the simple feature pyramid, at 1024 x 1024 pixels.

Source: "EVA-02: A Visual Representation for Neon Genesis" (arXiv 2303.11331), Sec. 3.2, with the
numbers of baaivision/EVA, EVA-02/det (eva2_mim_to_coco/..._b_4attn_1024_lrd0p7.py). Heads as in
`cascade.py`.
"""

from detectron2.config import LazyCall as L

from vitdet.backbones.eva02 import EVA02ViT

from .cascade import cascade
from .mask_rcnn_vitdet import model

model.backbone.net = L(EVA02ViT)(
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
)
model.roi_heads = cascade(model.roi_heads)
