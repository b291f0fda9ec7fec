"""Mask R-CNN of ViTAE-Transformer/ViTDet: ViT-B, ViTAE-B or ViTAE-S at 1024 x 1024 pixels.

Source: ViTAE-Transformer/ViTDet, configs/ViTDet. Unlike detectron2's: a LayerNorm after the last
block, deconvolutions that keep all channels, LayerNorm with an epsilon of 1e-5 in pyramid and heads
and after the RPN's convolutions too, and ROI heads that take low-quality matches.
"""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from omegaconf import DictConfig

from vitdet.backbones.vit import ViT
from vitdet.backbones.vitae import ViTAE
from vitdet.backbones.vitae_s import ViTAES
from vitdet.layers.norms import channel_layer_norm
from vitdet.pyramid import SimpleFeaturePyramid

from .mask_rcnn import model


def mmdet_heads(model: DictConfig, norm: DictConfig, rpn_norm: DictConfig | None) -> None:
    """Set the norms of RPN, box head and mask head of `model`."""
    model.proposal_generator.head.norm = rpn_norm
    model.roi_heads.box_head.conv_norm = norm
    model.roi_heads.mask_head.conv_norm = norm


vit_b = L(ViT)(
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
    global_block_indexes=[2, 5, 8, 11],  # every third block (`interval`)
    residual_block_indexes=[],
    pretrain_img_size=1024,  # the position table has the size of the model's own grid
    pretrain_use_cls_token=False,
    final_norm=True,
    out_feature="last_feat",
)
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

model.backbone = L(SimpleFeaturePyramid)(
    net=vit_b,
    in_feature="${.net.out_feature}",
    out_channels=256,
    scale_factors=[4.0, 2.0, 1.0, 0.5],  # strides 4, 8, 16, 32: p2 to p5
    halve_channels=False,
    top_block=L(LastLevelMaxPool)(),  # p6
    norm="LN",
    norm_eps=1e-5,
    upsample_norm="LN",
    upsample_norm_eps=1e-6,
    square_pad=1024,
)
_NORM = L(channel_layer_norm)(eps=1e-5)
mmdet_heads(model, norm=_NORM, rpn_norm=_NORM)
model.roi_heads.proposal_matcher.allow_low_quality_matches = True
