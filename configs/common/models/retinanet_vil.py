"""RetinaNet on ViL-Tiny with a feature pyramid network, images at most 1333 pixels long.

The pyramid takes stages 2 to 4; P6 and P7 come from stage 4 itself, not from P5. Heads as
detectron2's defaults.
"""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

from .mask_rcnn_vil import model as _mask_rcnn

model = L(RetinaNet)(
    backbone=_mask_rcnn.backbone,
    head=L(RetinaNetHead)(
        input_shape=[L(ShapeSpec)(channels=256) for _ in range(5)],
        num_classes="${..num_classes}",
        conv_dims=[256, 256, 256, 256],
        prior_prob=0.01,
        num_anchors=9,
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)],  # pixels
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64, 128],
        offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=80,
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    focal_loss_alpha=0.25,
    focal_loss_gamma=2.0,
    smooth_l1_beta=0.0,
    test_score_thresh=0.05,
    test_topk_candidates=1000,
    test_nms_thresh=0.5,
    max_detections_per_image=100,
    input_format=_mask_rcnn.input_format,
    pixel_mean=_mask_rcnn.pixel_mean,
    pixel_std=_mask_rcnn.pixel_std,
)

model.backbone.bottom_up.out_features = ["layer2", "layer3", "layer4"]
model.backbone.top_block = L(LastLevelP6P7)(
    in_channels="${..bottom_up.embed_dim.3}", out_channels=256, in_feature="layer4"
)
