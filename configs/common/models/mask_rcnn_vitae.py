"""Mask R-CNN of ViTAE-Transformer/ViTDet: ViT-B, ViTAE-B or ViTAE-S at 1024 x 1024 pixels.

Source: ViTAE-Transformer/ViTDet, configs/ViTDet. Unlike detectron2's: a LayerNorm after the last
block, deconvolutions that keep all channels, LayerNorm with an epsilon of 1e-5 in pyramid and heads
and after the RPN's convolutions too, and ROI heads that take low-quality matches.
"""

from detectron2.config import LazyCall as L

from vitdet.backbones.vitae import ViTAE
from vitdet.backbones.vitae_s import ViTAES
from vitdet.layers.norms import channel_layer_norm

from .mask_rcnn_vitdet import model

vitae_b = L(ViTAE)(
    img_size=1024,
    patch_size=16,
    embed_dim=768,
    depth=12,
    num_heads=12,
    mlp_ratio=4.0,
    qkv_bias=True,
    drop_path_rate=0.1,
    norm_eps=1e-6,
    window_size=14,
    global_block_indexes=[2, 5, 8, 11],
    checkpoint_blocks=list(range(12)),  # as published
    out_feature="last_feat",
)
vitae_s = L(ViTAES)(
    img_size=1024,
    embed_dims=[64, 64, 192],
    token_dims=[96, 192, 384],
    downsample_ratios=[4, 2, 2],
    kernel_sizes=[7, 3, 3],
    dilations=[[1, 2, 3, 4], [1, 2, 3], [1, 2]],
    reduction_kinds=["performer", "performer", "performer_less"],
    reduction_groups=[1, 1, 1],
    depths=[0, 0, 14],
    num_heads=[1, 1, 6],
    groups=[1, 1, 96],
    mlp_ratio=3.0,
    qkv_bias=True,
    drop_path_rate=0.1,
    norm_eps=1e-6,
    window_size=14,
    global_block_indexes=[2, 5, 8, 13],
    out_feature="last_feat",
)
model.backbone.update(
    halve_channels=False, norm_eps=1e-5, upsample_norm="LN", upsample_norm_eps=1e-6
)
# the position table has the size of the model's own grid
model.backbone.net.update(pretrain_img_size=1024, pretrain_use_cls_token=False, final_norm=True)
_norm = L(channel_layer_norm)(eps=1e-5)
model.proposal_generator.head.norm = _norm
model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = _norm
model.roi_heads.proposal_matcher.allow_low_quality_matches = True
