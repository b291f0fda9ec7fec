"""Small detectors of every kind that can be exported, with objects to find."""

from __future__ import annotations

import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead

from tests.engine.tiny_recipe import cascade, detector_node, draw
from vitdet.heads import CascadeROIHeads, StandardROIHeads

SOFT = {"use_soft_nms": True, "iou_threshold": 0.6, "maskness_thresh": 0.5}
KINDS = ("mask", "no_square", "cascade", "soft", "boxes", "agnostic", "dense", "bgr")


def images():
    """Return drawn images, uint8 (3, H, W), of three sizes."""
    drawn = [draw(position)["image"] for position in range(3)]
    return [drawn[0], drawn[1][:, :50], drawn[2][:, :60, :40].contiguous()]


def model(kind, **backbone):
    """Return a detector of a kind, always the same, in evaluation mode."""
    return with_objects(instantiate(node(kind, **backbone)))


def with_objects(detector):
    """Give a detector seeded weights: clear orders, sure classes, boxes that differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if parameter.dim() > 1:
                spread = 0.1 if "pred" in name or "cls" in name or "logits" in name else 0.05
                parameter.normal_(0, spread, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.01, generator=generator)
    return detector.eval()


def node(kind, **backbone):
    """Return the config node of a kind."""
    made = detector_node()
    made.backbone.update(backbone)
    made.roi_heads.box_predictor.test_score_thresh = 0.05
    if kind == "no_square":
        made.backbone.square_pad = 0
    elif kind == "cascade":
        made.roi_heads = cascade(made.roi_heads)
        made.roi_heads._target_ = CascadeROIHeads
    elif kind == "soft":
        made.roi_heads._target_ = StandardROIHeads
        made.roi_heads.update(SOFT)
    elif kind == "boxes":
        made.roi_heads.update(mask_in_features=None, mask_pooler=None, mask_head=None)
    elif kind == "agnostic":
        made.roi_heads.box_predictor.cls_agnostic_bbox_reg = True
        made.roi_heads.mask_head.num_classes = 1
        made.roi_heads.box_predictor.use_sigmoid_ce = True
    elif kind == "dense":
        return _dense(made)
    elif kind == "bgr":
        made.update(input_format="BGR", pixel_mean=[100.0, 120.0, 140.0])
    return made


def _dense(made):
    names = ["p2", "p3", "p4", "p5"]
    shapes = [L(ShapeSpec)(channels=32) for _ in names]
    return L(RetinaNet)(
        backbone=made.backbone,
        head=L(RetinaNetHead)(
            input_shape=shapes, num_classes=2, num_anchors=1, conv_dims=[16], prior_prob=0.3
        ),
        head_in_features=names,
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[8], [16], [32], [48]], aspect_ratios=[1.0], strides=[4, 8, 16, 32], offset=0.5
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        anchor_matcher=L(Matcher)(
            thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        num_classes=2,
        test_topk_candidates=50,
        test_score_thresh=0.3,
        max_detections_per_image=20,
        pixel_mean=[120.0, 120.0, 120.0],
        pixel_std=[60.0, 60.0, 60.0],
        input_format="RGB",
    )
