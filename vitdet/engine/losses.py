"""The losses of a detector as a mean over images, whatever the batch or the number of processes.

detectron2 normalises each loss by what one process sees (sampled anchors, foreground boxes), so
its value depends on how many images share a process; the published ViTDet recipes had one image a
GPU. Here every loss is normalised by its own image, and proposals are sampled under that image's
own random state, so a batch, the same batch spread over processes, and gradient accumulation have
the same gradient. The layers see the whole batch; only sampling and losses go image by image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.modeling import GeneralizedRCNN
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
from torch.nn.modules.batchnorm import _BatchNorm

from vitdet.utils.checks import InputError
from vitdet.utils.env import RandomStream, seed_from

logger = logging.getLogger(__name__)

Batch = list[dict[str, Any]]
Losses = dict[str, torch.Tensor]
Features = dict[str, torch.Tensor]  # levels (B, C, H, W)
Streams = Sequence[RandomStream]  # random numbers of each image, for sampling


class DetectorLoss(nn.Module):
    """Run a detector in training mode and average its losses over the images of the batch.

    Args:
        detector: detectron2 meta-architecture. Others than GeneralizedRCNN with detectron2's own
            heads (RetinaNet and FCOS normalise by a running mean over batches, PanopticFPN has one
            more head) get the whole batch and keep detectron2's normalisation.
        seed: seed of the run. Image `position` gets `seed_from(seed, position)`.
    """

    def __init__(self, detector: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        self.detector = detector
        self.seed = seed

    def check_parts(self, parts: int) -> None:
        """Raise an InputError unless `parts` backward passes add up to that of the whole batch."""
        if parts == 1:
            return
        if not by_image(self.detector):
            kind = type(self.detector).__name__
            text = f"{kind}'s losses are normalised by all images of a pass, parts do not add up"
            raise InputError(f"train.accumulate: expected 1 for it, got {parts}: {text}.")
        changes = [n for n, m in self.detector.named_modules() if isinstance(m, _BatchNorm)][:1]
        changes += ["model.backbone.square_pad=0"] if not square_size(self.detector) else []
        if changes:
            text = "train.accumulate=%d: %s sees the images of a part, not those of the whole batch"
            logger.warning(text, parts, " and ".join(changes))

    def forward(self, batch: Batch) -> Losses:
        """Return named scalar losses.

        Args:
            batch: detectron2 input dicts (image uint8 (3, H, W), instances) with "position", the
                number of the image in the stream of the run.

        Raises:
            InputError: a dict has no "position", or an image is larger than the model's square.
        """
        detector: Any = self.detector  # its parts are modules, not tensors
        check_image_sizes(detector, batch)
        if not by_image(detector):
            return detector(batch)
        streams = [RandomStream(seed_from(self.seed, _position(record))) for record in batch]
        images = detector.preprocess_image(batch)
        truths = [record["instances"].to(detector.device) for record in batch]
        features = detector.backbone(images.tensor)
        proposals, losses = _rpn(detector.proposal_generator, images, features, truths, streams)
        return losses | _roi_heads(detector.roi_heads, features, proposals, truths, streams)


def by_image(detector: Any) -> bool:
    """Whether the losses can be normalised by image: the forward and heads are detectron2's own.

    Heads of a subclass that only change what happens in evaluation say `trains_as_detectron2`.
    """
    if type(detector).forward is not GeneralizedRCNN.forward or not detector.proposal_generator:
        return False
    rpn, heads = detector.proposal_generator, detector.roi_heads
    known = type(heads) in (StandardROIHeads, CascadeROIHeads)
    if not known and not getattr(heads, "trains_as_detectron2", False):
        return False
    predictors = heads.box_predictor
    stages = predictors if isinstance(predictors, nn.ModuleList) else [predictors]
    plain_mask = not heads.mask_on or (
        heads.mask_pooler is not None and type(heads.mask_head) is MaskRCNNConvUpsampleHead
    )
    return (
        type(rpn) is RPN
        and all(type(each) is FastRCNNOutputLayers for each in stages)
        and not heads.keypoint_on
        and not heads.train_on_pred_boxes
        and plain_mask
    )


def check_image_sizes(detector: nn.Module, batch: Batch) -> None:
    """Raise an InputError for an image larger than the square that the backbone pads to.

    detectron2's ImageList (structures/image_list.py) cuts such an image off without a word.
    """
    square = square_size(detector)
    for record in batch if square else ():
        height, width = record["image"].shape[-2:]
        if max(height, width) > square:
            raise InputError(
                f"image {record.get('file_name', '(without a name)')}: expected at most {square} x "
                f"{square} pixels (model.backbone.square_pad), got {height} x {width}. Resize to "
                "less in the mapper's augmentations, or set square_pad to 0."
            )


def square_size(detector: nn.Module) -> int:
    """Return the side in pixels of the square that images are padded to, 0 when there is none."""
    backbone: Any = getattr(detector, "backbone", None)
    return backbone.padding_constraints.get("square_size", 0) if backbone is not None else 0


def _position(record: dict[str, Any]) -> int:
    if "position" not in record:
        text = f'expected a "position" (in the stream of the run), got only {sorted(record)}'
        remedy = "Use vitdet.data.loaders.build_train_loader, or add the number in your loader."
        raise InputError(f"training image {record.get('file_name')}: {text}. {remedy}")
    return record["position"]


def _rpn(
    rpn: Any, images: ImageList, features: Features, truths: list[Instances], streams: Streams
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


def _roi_heads(
    heads: Any,
    features: Features,
    proposals: list[Instances],
    truths: list[Instances],
    streams: Streams,
) -> Losses:
    sampled = []
    for each, truth, stream in zip(proposals, truths, streams, strict=True):
        with stream:
            sampled += heads.label_and_sample_proposals([each], [truth])
    levels = [features[name] for name in heads.box_in_features]
    if isinstance(heads, CascadeROIHeads):
        losses = _cascade(heads, levels, sampled, truths, streams)
    else:
        pooled = heads.box_pooler(levels, [each.proposal_boxes for each in sampled])
        predictions = heads.box_predictor(heads.box_head(pooled))
        losses = _box_losses(heads.box_predictor, predictions, sampled, streams)
    return losses | _mask(heads, features, sampled) if heads.mask_on else losses


def _cascade(
    heads: Any,
    levels: list[torch.Tensor],
    proposals: list[Instances],
    truths: list[Instances],
    streams: Streams,
) -> Losses:
    """Losses of every stage; a stage learns on the boxes of the one before ("Cascade R-CNN")."""
    sizes = [each.image_size for each in proposals]
    stages: list[tuple[Any, Any, list[Instances]]] = []
    for stage, predictor in enumerate(heads.box_predictor):
        if stages:
            last, predictions, proposals = stages[-1]
            boxes = last.predict_boxes(predictions, proposals)
            proposals = heads._create_proposals_from_boxes(boxes, sizes)
            proposals = heads._match_and_label_boxes(proposals, stage, truths)
        stages.append((predictor, heads._run_stage(levels, proposals, stage), proposals))
    losses: Losses = {}
    for stage, (predictor, predictions, boxes_of) in enumerate(stages):
        with get_event_storage().name_scope(f"stage{stage}"):
            found = _box_losses(predictor, predictions, boxes_of, streams)
        losses.update({f"{name}_stage{stage}": value for name, value in found.items()})
    return losses


def _box_losses(
    predictor: Any,
    predictions: tuple[torch.Tensor, torch.Tensor],  # logits and deltas of all boxes of a batch
    proposals: list[Instances],
    streams: Streams,
) -> Losses:
    counts = [len(each) for each in proposals]
    parts = zip(*(each.split(counts) for each in predictions), strict=True)
    found = []
    for part, each, stream in zip(parts, proposals, streams, strict=True):
        with stream:  # federated loss draws classes
            found.append(predictor.losses(part, [each]))
    return _mean(found)


def _mask(heads: Any, features: Features, proposals: list[Instances]) -> Losses:
    foreground, _ = select_foreground_proposals(proposals, heads.num_classes)
    levels = [features[name] for name in heads.mask_in_features]
    pooled = heads.mask_pooler(levels, [each.proposal_boxes for each in foreground])
    logits = heads.mask_head.layers(pooled).split([len(each) for each in foreground])
    weight = heads.mask_head.loss_weight
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
