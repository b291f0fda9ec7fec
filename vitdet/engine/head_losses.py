"""Losses of detectron2's two-stage heads for a whole batch at once, normalised image by image.

detectron2's heads divide a loss by what the whole batch holds (sampled boxes, foreground boxes), so
running them on a batch is not the mean over its images. Running them once an image is, but repeats
every small layer B times. Here the layers see the batch, and only the sampling and the losses go
image by image: the same numbers as one image at a time, for one pass through the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
    select_foreground_proposals,
)
from detectron2.modeling.roi_heads.mask_head import mask_rcnn_loss
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import nn

from vitdet.utils.env import RandomStream

Losses = dict[str, torch.Tensor]
Features = dict[str, torch.Tensor]
Predictions = tuple[torch.Tensor, torch.Tensor]  # logits and deltas of all boxes of a batch


def can_batch(detector: nn.Module) -> bool:
    """Whether the heads are those of detectron2 that `batch_losses` knows piece by piece."""
    rpn: Any = detector.proposal_generator
    roi_heads: Any = detector.roi_heads
    known = type(roi_heads) in (StandardROIHeads, CascadeROIHeads)
    if not known and not getattr(roi_heads, "trains_as_detectron2", False):
        return False
    return (
        type(rpn) is RPN
        and all(type(each) is FastRCNNOutputLayers for each in _stages(roi_heads.box_predictor))
        and not roi_heads.keypoint_on
        and not roi_heads.train_on_pred_boxes
        and (not roi_heads.mask_on or _is_plain_mask(roi_heads))
    )


def _is_plain_mask(roi_heads: Any) -> bool:
    return (
        roi_heads.mask_pooler is not None and type(roi_heads.mask_head) is MaskRCNNConvUpsampleHead
    )


def batch_losses(
    detector: Any,
    images: ImageList,
    features: Features,
    truths: Sequence[Instances],
    streams: Sequence[RandomStream],
) -> Losses:
    """Return the losses of proposal generator and ROI heads, each the mean over the images.

    Args:
        detector: one that `can_batch`.
        images: B images.
        features: levels (B, C, H, W) by name.
        truths: ground truth of the B images.
        streams: random numbers of the B images, for sampling.
    """
    proposals, losses = _rpn(detector.proposal_generator, images, features, truths, streams)
    roi_heads = detector.roi_heads
    sampled = []
    for each, truth, stream in zip(proposals, truths, streams, strict=True):
        with stream:
            sampled += roi_heads.label_and_sample_proposals([each], [truth])
    if isinstance(roi_heads, CascadeROIHeads):
        losses.update(_cascade(roi_heads, features, sampled, truths, streams))
    else:
        levels = [features[name] for name in roi_heads.box_in_features]
        pooled = roi_heads.box_pooler(levels, [each.proposal_boxes for each in sampled])
        predictor = roi_heads.box_predictor
        predictions = predictor(roi_heads.box_head(pooled))
        losses.update(_box_losses(predictor, predictions, sampled, streams))
    if roi_heads.mask_on:
        losses.update(_mask(roi_heads, features, sampled))
    return losses


def _rpn(
    rpn: Any,
    images: ImageList,
    features: Features,
    truths: Sequence[Instances],
    streams: Sequence[RandomStream],
) -> tuple[list[Instances], Losses]:
    """Return proposals and losses. detectron2's RPN divides by the number of images itself."""
    levels = [features[name] for name in rpn.in_features]
    anchors = rpn.anchor_generator(levels)
    box_dim = rpn.anchor_generator.box_dim
    logits, deltas = rpn.rpn_head(levels)
    # An anchor's number runs over rows, columns and shapes: (B, A, H, W) to (B, H * W * A).
    logits = [each.permute(0, 2, 3, 1).flatten(1) for each in logits]
    deltas = [
        each.unflatten(1, (-1, box_dim)).permute(0, 3, 4, 1, 2).flatten(1, 3) for each in deltas
    ]
    labels, boxes = [], []
    for truth, stream in zip(truths, streams, strict=True):
        with stream:
            (label,), (box,) = rpn.label_and_sample_anchors(anchors, [truth])
        labels.append(label)
        boxes.append(box)
    losses = rpn.losses(anchors, logits, labels, deltas, boxes)
    return rpn.predict_proposals(anchors, logits, deltas, images.image_sizes), losses


def _cascade(
    roi_heads: Any,
    features: Features,
    proposals: list[Instances],
    truths: Sequence[Instances],
    streams: Sequence[RandomStream],
) -> Losses:
    """Losses of every stage; a stage learns on the boxes of the one before ("Cascade R-CNN")."""
    levels = [features[name] for name in roi_heads.box_in_features]
    sizes = [each.image_size for each in proposals]
    stages: list[tuple[Any, Predictions, list[Instances]]] = []
    for stage, predictor in enumerate(roi_heads.box_predictor):
        if stages:
            last, predictions, proposals = stages[-1]
            boxes = last.predict_boxes(predictions, proposals)
            proposals = roi_heads._create_proposals_from_boxes(boxes, sizes)
            proposals = roi_heads._match_and_label_boxes(proposals, stage, truths)
        stages.append((predictor, roi_heads._run_stage(levels, proposals, stage), proposals))
    losses: Losses = {}
    for stage, (predictor, predictions, boxes_of) in enumerate(stages):
        with get_event_storage().name_scope(f"stage{stage}"):
            found = _box_losses(predictor, predictions, boxes_of, streams)
        losses.update({f"{name}_stage{stage}": value for name, value in found.items()})
    return losses


def _box_losses(
    predictor: Any,
    predictions: Predictions,
    proposals: list[Instances],
    streams: Sequence[RandomStream],
) -> Losses:
    counts = [len(each) for each in proposals]
    parts = zip(*(each.split(counts) for each in predictions), strict=True)
    found = []
    for part, each, stream in zip(parts, proposals, streams, strict=True):
        with stream:  # federated loss draws classes
            found.append(predictor.losses(part, [each]))
    return _mean(found)


def _mask(roi_heads: Any, features: Features, proposals: list[Instances]) -> Losses:
    foreground, _ = select_foreground_proposals(proposals, roi_heads.num_classes)
    levels = [features[name] for name in roi_heads.mask_in_features]
    pooled = roi_heads.mask_pooler(levels, [each.proposal_boxes for each in foreground])
    logits = roi_heads.mask_head.layers(pooled).split([len(each) for each in foreground])
    weight = roi_heads.mask_head.loss_weight
    return _mean(
        [
            {"loss_mask": mask_rcnn_loss(part, [each]) * weight}
            for part, each in zip(logits, foreground, strict=True)
        ]
    )


def _mean(found: Sequence[Losses]) -> Losses:
    return {
        name: torch.stack([each[name] for each in found]).sum() / len(found) for name in found[0]
    }


def _stages(box_predictor: Any) -> Sequence[nn.Module]:
    return list(box_predictor) if isinstance(box_predictor, nn.ModuleList) else [box_predictor]
