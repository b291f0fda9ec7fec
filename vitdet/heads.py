"""Switches that detectron2's own heads lack. The heads themselves are detectron2's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.layers import Conv2d
from detectron2.modeling import roi_heads
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detectron2.structures import Boxes, Instances
from torch import nn

from vitdet.postprocess import SoftNMSMethod, check_soft_nms, maskness, soft_nms
from vitdet.utils.checks import InputError

Size = tuple[int, int]  # (height, width)


def rpn_head(
    *,
    in_channels: int,
    num_anchors: int,
    conv_dims: Sequence[int] = (-1, -1),
    norm: Callable[[int], nn.Module] | None = None,
) -> StandardRPNHead:
    """Build detectron2's RPN head, with a norm after each 3x3 convolution if wanted.

    `norm` makes one from a number of channels: the ViTDet paper (Appendix A.2) has LayerNorm here,
    detectron2's published models have none. The rest is detectron2's.
    """
    head = StandardRPNHead(in_channels=in_channels, num_anchors=num_anchors, conv_dims=conv_dims)
    if norm is not None:
        for conv in head.conv.modules():
            if isinstance(conv, Conv2d):
                conv.norm = norm(conv.out_channels)
                conv.bias = None
    return head


class InferenceRecipe:
    """How box predictions become detections: what both ROI heads below add to detectron2's.

    Published AP of EVA-02 depends on these arguments (baaivision/EVA, EVA-02/det, README
    "Evaluation"; most names are its own). With all of them at their defaults the heads are
    detectron2's, and training never depends on them. Unlike there, the predictor's
    `test_topk_per_image` holds on every path, and rescored detections are put in the order of
    their new scores.

    Args:
        use_soft_nms: lower the scores of overlapping boxes instead of dropping them, see
            `vitdet.postprocess.soft_nms`; the predictor's `test_nms_thresh` then counts nothing.
        method: "linear", "gaussian" or "hard".
        iou_threshold: overlap from which soft-NMS acts (not "gaussian").
        sigma: width of "gaussian".
        min_score: boxes that soft-NMS brings below this score are dropped.
        class_wise: whether boxes of different classes leave each other alone in soft-NMS.
        override_score_thresh: boxes need a score above it, instead of above the predictor's
            `test_score_thresh`; None for the predictor's.
        maskness_thresh: multiply each score by the mean of its mask over the pixels above this
            probability; None for not at all.
        heads: the arguments of detectron2's class.
    """

    trains_as_detectron2 = True  # read by vitdet.engine.losses

    box_predictor: Any
    mask_on: bool
    training: bool

    def __init__(
        self,
        *,
        use_soft_nms: bool = False,
        method: SoftNMSMethod = "linear",
        iou_threshold: float = 0.3,
        sigma: float = 0.5,
        min_score: float = 1e-3,
        class_wise: bool = True,
        override_score_thresh: float | None = None,
        maskness_thresh: float | None = None,
        **heads: Any,
    ) -> None:
        super().__init__(**heads)
        check_soft_nms(method, iou_threshold, sigma, min_score)
        if maskness_thresh is not None and not self.mask_on:
            raise InputError(
                "model.roi_heads.maskness_thresh: expected a mask head, got none. Set it to null "
                "for a detector of boxes alone."
            )
        self.use_soft_nms, self.class_wise = use_soft_nms, class_wise
        self.method: SoftNMSMethod = method
        self.iou_threshold, self.sigma, self.min_score = iou_threshold, sigma, min_score
        self.override_score_thresh = override_score_thresh
        self.maskness_thresh = maskness_thresh

    @property
    def plain(self) -> bool:
        """Whether boxes are selected as detectron2 does."""
        return not self.use_soft_nms and self.override_score_thresh is None

    def forward(
        self, images: Any, features: Any, proposals: list[Instances], targets: Any = None
    ) -> tuple[list[Instances], dict[str, torch.Tensor]]:
        """As detectron2's, and rescored by maskness."""
        found, losses = super().forward(images, features, proposals, targets)  # pyright: ignore
        if not self.training and self.maskness_thresh is not None:
            found = [_rescored(each, self.maskness_thresh) for each in found]
        return found, losses

    def detections(
        self, boxes: Sequence[torch.Tensor], scores: Sequence[torch.Tensor], sizes: Sequence[Size]
    ) -> list[Instances]:
        """Return the detections of every image, cut to its size (height, width).

        An image has boxes (R, 4) or (R, 4 * classes), and scores (R, classes + 1), the last column
        background.
        """
        predictor = self.box_predictor
        predictor = predictor[-1] if isinstance(predictor, nn.ModuleList) else predictor
        assert isinstance(predictor, FastRCNNOutputLayers)
        threshold = self.override_score_thresh
        threshold = predictor.test_score_thresh if threshold is None else threshold
        topk, nms = predictor.test_topk_per_image, predictor.test_nms_thresh
        if self.use_soft_nms:
            images = zip(boxes, scores, sizes, strict=True)
            return [self._soft_nms(*image, threshold, topk) for image in images]
        return fast_rcnn_inference(list(boxes), list(scores), list(sizes), threshold, nms, topk)[0]

    def _soft_nms(
        self, boxes: torch.Tensor, scores: torch.Tensor, size: Size, threshold: float, topk: int
    ) -> Instances:
        finite = boxes.isfinite().all(1) & scores.isfinite().all(1)
        boxes, scores = boxes[finite], scores[finite, :-1]
        rows, classes = (scores > threshold).nonzero(as_tuple=True)
        boxes = boxes.unflatten(1, (-1, 4))
        candidates = Boxes(boxes[rows, classes if boxes.shape[1] > 1 else 0])
        candidates.clip(size)
        kept, new = soft_nms(
            candidates.tensor,
            scores[rows, classes],
            classes if self.class_wise else None,
            method=self.method,
            iou_threshold=self.iou_threshold,
            sigma=self.sigma,
            min_score=self.min_score,
        )
        if topk >= 0:
            kept, new = kept[:topk], new[:topk]
        return Instances(size, pred_boxes=candidates[kept], scores=new, pred_classes=classes[kept])


class StandardROIHeads(InferenceRecipe, roi_heads.StandardROIHeads):
    """detectron2's heads of Faster and Mask R-CNN with an `InferenceRecipe`."""

    def _forward_box(self, features: Any, proposals: list[Instances]) -> Any:
        if self.training or self.plain:
            return super()._forward_box(features, proposals)
        levels = [features[name] for name in self.box_in_features]
        pooled = self.box_pooler(levels, [each.proposal_boxes for each in proposals])
        predictions = self.box_predictor(self.box_head(pooled))
        return self.detections(
            self.box_predictor.predict_boxes(predictions, proposals),
            self.box_predictor.predict_probs(predictions, proposals),
            [each.image_size for each in proposals],
        )


class CascadeROIHeads(InferenceRecipe, roi_heads.CascadeROIHeads):
    """detectron2's heads of Cascade R-CNN with an `InferenceRecipe`."""

    def _forward_box(self, features: Any, proposals: list[Instances], targets: Any = None) -> Any:
        if self.training or self.plain:
            return super()._forward_box(features, proposals, targets)
        levels = [features[name] for name in self.box_in_features]
        sizes = [each.image_size for each in proposals]
        boxes: list[torch.Tensor] = []
        stages: list[Sequence[torch.Tensor]] = []
        for stage, predictor in enumerate(self.box_predictor):
            if stage:  # a stage refines the boxes of the one before
                proposals = self._create_proposals_from_boxes(boxes, sizes)
            predictions = self._run_stage(levels, proposals, stage)
            boxes = predictor.predict_boxes(predictions, proposals)
            stages.append(predictor.predict_probs(predictions, proposals))
        # Boxes of the last stage, scores of all ("Cascade R-CNN", Sec. 4.2).
        share = 1.0 / len(stages)
        means = [torch.stack(scores).sum(0) * share for scores in zip(*stages, strict=True)]
        return self.detections(boxes, means, sizes)


def _rescored(found: Instances, threshold: float) -> Instances:
    """Return the detections of an image with score times maskness, in the order of these."""
    found.scores = found.scores * maskness(found.pred_masks, threshold)
    return found[found.scores.argsort(descending=True, stable=True)]
