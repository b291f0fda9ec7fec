"""Cascade R-CNN: three box heads in a row, each trained at a higher overlap (arXiv 1712.00726)."""

from copy import deepcopy

from detectron2.config import LazyCall as L
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.roi_heads import CascadeROIHeads
from omegaconf import DictConfig

# overlap (IoU) that makes a proposal positive, and the weights of (x, y) and (width, height)
STAGES = [(0.5, 10, 5), (0.6, 20, 10), (0.7, 30, 15)]


def cascade(roi_heads: DictConfig) -> DictConfig:
    """Return `roi_heads` (StandardROIHeads) as a cascade of its box head; the mask head stays."""
    heads = deepcopy(roi_heads)
    box_head, predictor = heads.pop("box_head"), heads.pop("box_predictor")
    heads.pop("proposal_matcher")
    predictor.num_classes = "${...num_classes}"  # one level deeper than before, in a list
    predictor.cls_agnostic_bbox_reg = True
    heads._target_ = CascadeROIHeads
    heads.box_heads = [deepcopy(box_head) for _ in STAGES]
    heads.box_predictors = [deepcopy(predictor) for _ in STAGES]
    for stage, (_, xy, size) in zip(heads.box_predictors, STAGES, strict=True):
        stage.box2box_transform = L(Box2BoxTransform)(weights=[xy, xy, size, size])
    heads.proposal_matchers = [
        L(Matcher)(thresholds=[overlap], labels=[0, 1], allow_low_quality_matches=False)
        for overlap, _, _ in STAGES
    ]
    return heads
