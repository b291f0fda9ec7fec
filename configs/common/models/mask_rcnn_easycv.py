"""Mask R-CNN of alibaba/EasyCV on ViT-B at 1024 x 1024 pixels, both generations.

`model` is that from v0.7 on: detectron2's, with GroupNorm of one group, over a whole map, where
detectron2 has LayerNorm over channels. `before_v07` turns it into the first generation. Sources:
configs/detection/vitdet of either.
"""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from vitdet.layers.norms import group_norm

from .mask_rcnn_vitdet import model


def _set_norms(model: DictConfig, eps: float, in_rpn: bool) -> None:
    norm = L(group_norm)(num_groups=1, eps=eps)
    model.backbone.norm, model.backbone.norm_eps = "GN1", eps
    model.proposal_generator.head.norm = norm if in_rpn else None
    model.roi_heads.box_head.conv_norm = norm
    if "mask_head" in model.roi_heads:
        model.roi_heads.mask_head.conv_norm = norm


def before_v07(model: DictConfig, aggregation: str = "attn") -> None:
    """Make `model` that of EasyCV before v0.7.

    Args:
        model: changed in place.
        aggregation: how windows exchange information after every third block: "attn", or the kind
            of convolutions with BatchNorm: "conv", "basicblock", "bottleneck".
    """
    backbone, net = model.backbone, model.backbone.net
    net.pretrain_img_size, net.pretrain_use_cls_token = 1024, False
    net.final_norm = True
    if aggregation != "attn":
        kinds = {"conv": "naive", "basicblock": "basic", "bottleneck": "bottleneck"}
        net.residual_block_indexes, net.global_block_indexes = net.global_block_indexes, []
        net.propagation, net.propagation_norm = kinds[aggregation], "BN"
    backbone.halve_channels = False
    backbone.upsample_norm, backbone.upsample_norm_eps = "LN", 1e-6
    _set_norms(model, eps=1e-5, in_rpn=True)
    model.roi_heads.proposal_matcher.allow_low_quality_matches = True


_set_norms(model, eps=1e-6, in_rpn=False)
