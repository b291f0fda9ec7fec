"""Wrappers round a built model: one image in, plain tensors out, nothing that depends on Python.

The model itself has no flags for this. `exportable` chooses its attention kernels for the time of
an export.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.modeling.roi_heads import BaseMaskRCNNHead, CascadeROIHeads, StandardROIHeads
from torch import nn

from vitdet.export import selection
from vitdet.export.selection import NEVER, Size
from vitdet.utils.checks import fail

# Kernels without own derivatives, in operations that every exporter knows, by attribute.
_KERNELS = {"backend": "eager", "sliding_chunk_backend": "autograd"}
MASKS = ("pasted", "boxes", "none")


class Graph(nn.Module):
    """A model with an image as input: base of what is exported.

    Attributes:
        part: "detector" or "backbone".
        outputs: names of the outputs, in their order.
        square: side of the square that images are padded to, 0 for none.
        stride: images are padded to a multiple of it where there is no square.
        size: the one (height, width) that is taken, None for any.
        any_size: whether a tracer can follow the model for all sizes at once. The chunks of a
            Vision Longformer are laid out in Python, so its map must have one size.
    """

    part = "detector"
    outputs: tuple[str, ...] = ()

    def __init__(self, model: Any, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.model = model
        self.size = size
        self.square = int(model.backbone.padding_constraints.get("square_size", 0))
        self.stride = int(model.backbone.size_divisibility)
        chunked = any(hasattr(module, "sliding_chunk_backend") for module in model.modules())
        self.any_size = bool(self.square) or not chunked
        self.bgr = getattr(model, "input_format", "RGB") == "BGR"
        self.eval()

    def normalised(self, image: torch.Tensor) -> torch.Tensor:
        """Return the image (3, H, W) as the backbone wants it, (1, 3, H', W')."""
        if self.size is not None:
            image = image.expand(3, *self.size)  # another size stops here
        if self.bgr:
            image = image.flip(0)
        x = (image.float() - self.model.pixel_mean) / self.model.pixel_std
        height, width = image.shape[-2:]
        if not self.square:
            x = F.pad(x, (0, -width % self.stride, 0, -height % self.stride))
            return x[None]
        right, below = (_least_zero(self.square - side) for side in (width, height))
        # A larger image stops at expand(); without it padding would cut it off.
        return F.pad(x, (0, right, 0, below)).expand(1, 3, self.square, self.square)


def _least_zero(number: Any) -> Any:
    return number.clamp(min=0) if isinstance(number, torch.Tensor) else max(number, 0)


class Features(Graph):
    """Backbone and pyramid: an RGB image (3, H, W) of 0 to 255 to the levels (1, C, H', W')."""

    part = "backbone"

    def __init__(self, model: Any, size: tuple[int, int] | None) -> None:
        super().__init__(model, size)
        self.outputs = tuple(model.backbone.output_shape())

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the levels in the order of `outputs`."""
        features = self.model.backbone(self.normalised(image))
        return tuple(features[name] for name in self.outputs)


class Detector(Graph):
    """A whole detector: an RGB image (3, H, W) of 0 to 255 to its detections.

    Outputs, in the order of falling scores: "boxes" (N, 4) XYXY in pixels of the image, "scores"
    (N,), "classes" (N,) from 0, and "masks": bool (N, H, W), or with `masks` "boxes" the
    probabilities (N, M, M) inside the boxes, for `selection.paste`.

    Attributes:
        threshold: detections score more.
        most: there are at most so many.
        late: whether lists stay at `most` rows, filled up, until the masks are made too. A tracer
            follows lists of any length; torch.export wants the lengths to be known.
    """

    def __init__(
        self,
        model: Any,
        size: tuple[int, int] | None,
        *,
        masks: str,
        late: bool,
        threshold: float,
        most: int,
    ) -> None:
        super().__init__(model, size)
        self.masks, self.late, self.threshold, self.most = masks, late, threshold, most
        self.outputs = ("boxes", "scores", "classes", *(("masks",) if masks != "none" else ()))
        if most < 0:
            remedy = "Set model.roi_heads.box_predictor.test_topk_per_image to a number."
            fail("detections an image to export", expected="a limit", got=most, remedy=remedy)


class RegionDetector(Detector):
    """Faster, Mask and Cascade Mask R-CNN, with the heads of detectron2 or `vitdet.heads`."""

    def __init__(self, model: Any, size: tuple[int, int] | None, *, masks: str, late: bool) -> None:
        heads = model.roi_heads
        if not isinstance(heads, StandardROIHeads):
            _refuse("ROI heads", "StandardROIHeads or CascadeROIHeads", type(heads).__name__)
        if heads.keypoint_on:
            _refuse("ROI heads", "boxes and masks", "keypoints")
        if heads.mask_on and not isinstance(heads.mask_head, BaseMaskRCNNHead):
            _refuse("mask head", "detectron2's Mask R-CNN head", type(heads.mask_head).__name__)
        cascade = isinstance(heads, CascadeROIHeads)
        predictor: Any = heads.box_predictor[-1] if cascade else heads.box_predictor
        override = getattr(heads, "override_score_thresh", None)
        super().__init__(
            model,
            size,
            masks=masks if heads.mask_on else "none",
            late=late,
            threshold=predictor.test_score_thresh if override is None else override,
            most=predictor.test_topk_per_image,
        )
        self.nms_threshold = predictor.test_nms_thresh
        self.soft = bool(getattr(heads, "use_soft_nms", False))
        self.maskness = getattr(heads, "maskness_thresh", None)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the detections, see `Detector`."""
        size = (image.shape[-2], image.shape[-1])
        features = self.model.backbone(self.normalised(image))
        boxes, valid = selection.proposals(self.model.proposal_generator, features, size)
        boxes, scores = self._refined(features, boxes, size)
        right = valid & selection.finite(boxes) & selection.finite(scores)
        scores = torch.where(right[:, None], scores[:, :-1], torch.full_like(scores[:, :-1], NEVER))
        boxes = torch.where(right[:, None, None], boxes, torch.zeros_like(boxes))
        boxes = selection.clip(boxes[:, 0] if boxes.shape[1] == 1 else boxes, size)
        found: tuple[torch.Tensor, ...]
        found = self._selected(*selection.above(boxes, scores, self.threshold, self.most), size)
        if not self.late:
            found = selection.seen(*found)
        if self.model.roi_heads.mask_on and (self.maskness is not None or self.masks != "none"):
            found = self._with_masks(features, *found[:3])
        if self.late:
            found = selection.seen(*found)
        if self.masks != "pasted":
            return found[: len(self.outputs)]
        boxes, scores, classes, masks = (*found,)
        return boxes, scores, classes, selection.paste(masks, boxes, size)

    def _refined(
        self, features: dict[str, torch.Tensor], boxes: torch.Tensor, size: Size
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return boxes (R, 1 or classes, 4) and scores (R, classes + 1) of all stages."""
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.box_in_features]
        cascade = isinstance(heads, CascadeROIHeads)
        stages = (
            zip(heads.box_head, heads.box_predictor, strict=True)
            if cascade
            else [(heads.box_head, heads.box_predictor)]
        )
        probabilities = []
        for number, (head, predictor) in enumerate(stages):
            boxes = selection.clip(boxes, size) if number else boxes
            logits, deltas = predictor(head(selection.pool(heads.box_pooler, maps, boxes)))
            sigmoid = predictor.use_sigmoid_ce
            probabilities.append(logits.sigmoid() if sigmoid else logits.softmax(dim=-1))
            boxes = predictor.box2box_transform.apply_deltas(deltas, boxes)
        # Boxes of the last stage, scores of all ("Cascade R-CNN", Sec. 4.2).
        return boxes.unflatten(1, (-1, 4)), torch.stack(probabilities).mean(dim=0)

    def _selected(
        self, boxes: torch.Tensor, scores: torch.Tensor, classes: torch.Tensor, size: Size
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `most` detections, filled up, of candidates (K, 4), (K,) and (K,)."""
        heads, moved = self.model.roi_heads, boxes
        if not self.soft or heads.class_wise:
            step = (size[0] + 1, size[1] + 1)
            moved = selection.apart(boxes, classes, heads.num_classes, step)
        if self.soft:
            place, scores = selection.soft_nms(moved, scores, heads, self.most)
        else:
            scores = selection.hard_nms(moved, scores, self.nms_threshold)
            scores, place = scores.topk(self.most)
        return boxes[place], scores, classes[place]

    def _with_masks(
        self,
        features: dict[str, torch.Tensor],
        boxes: torch.Tensor,
        scores: torch.Tensor,
        classes: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Return the detections with probabilities (N, M, M), rescored by them if so set."""
        heads = self.model.roi_heads
        maps = [features[name] for name in heads.mask_in_features]
        logits = heads.mask_head.layers(selection.pool(heads.mask_pooler, maps, boxes))
        if logits.shape[1] == 1:
            masks = logits[:, 0].sigmoid()
        else:
            rows = torch.arange(classes.shape[0], device=classes.device)
            masks = logits[rows, classes].sigmoid()
        if self.maskness is None:
            return boxes, scores, classes, masks
        flat = masks.flatten(1)
        inside = flat > self.maskness
        sure = (flat * inside).sum(1) / inside.sum(1).clamp(min=1)
        # A filler keeps its NEVER, which times 0 would be no number.
        scores = torch.where(scores > NEVER, scores * sure, scores)
        order = scores.argsort(descending=True)
        return boxes[order], scores[order], classes[order], masks[order]


class DenseDetector(Detector):
    """RetinaNet: boxes without masks."""

    def __init__(self, model: Any, size: tuple[int, int] | None) -> None:
        super().__init__(
            model,
            size,
            masks="none",
            late=True,
            threshold=model.test_score_thresh,
            most=model.max_detections_per_image,
        )

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the detections, see `Detector`."""
        size, model = (image.shape[-2], image.shape[-1]), self.model
        features = model.backbone(self.normalised(image))
        maps = [features[name] for name in model.head_in_features]
        anchors = (each.tensor for each in model.anchor_generator(maps))
        levels = [self._level(*each) for each in zip(anchors, *model.head(maps), strict=True)]
        boxes, scores, classes = (torch.cat(each) for each in zip(*levels, strict=True))
        # Boxes are cut to the image after NMS only: the step is as far as they reach.
        step = boxes.max() - boxes.min() + 1
        moved = selection.apart(boxes, classes, model.num_classes, (step, step))
        scores = selection.hard_nms(moved, scores, model.test_nms_thresh)
        scores, place = scores.topk(min(self.most, scores.shape[0]))
        return selection.seen(selection.clip(boxes[place], size), scores, classes[place])

    def _level(
        self, anchors: torch.Tensor, logits: torch.Tensor, deltas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the best candidates of a level, filled up to a fixed number."""
        model = self.model
        scores = logits[0].unflatten(0, (-1, model.num_classes)).permute(2, 3, 0, 1).flatten(0, 2)
        deltas = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)
        most = model.test_topk_candidates
        rows, scores, classes = selection.places_above(scores.sigmoid(), self.threshold, most)
        scores, place = scores.topk(most)
        rows, classes = rows[place], classes[place]
        boxes = model.box2box_transform.apply_deltas(deltas[rows], anchors[rows])
        # Fillers have no area, so that they overlap nothing.
        boxes = torch.where((scores > NEVER)[:, None], boxes, torch.zeros_like(boxes))
        return boxes, scores, classes


def graph_of(
    model: nn.Module,
    part: str,
    size: tuple[int, int] | None = None,
    *,
    masks: str = "pasted",
    late: bool = False,
) -> Graph:
    """Return the wrapper of a built model.

    Args:
        model: a detector of detectron2's kinds.
        part: "detector", or "backbone" for backbone and pyramid.
        size: the one (height, width) of image that it takes; None for any.
        masks: of a detector: "pasted", "boxes" or "none", see `Detector`.
        late: see `Detector`.

    Raises:
        InputError: a model that no wrapper is for.
    """
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        _refuse("model", "a detector with a backbone", type(model).__name__)
    if str(getattr(model, "input_format", "RGB")) not in ("RGB", "BGR"):
        _refuse("model.input_format", "RGB or BGR", str(getattr(model, "input_format", "")))
    if part == "backbone":
        graph: Graph = Features(model, size)
    elif isinstance(model, GeneralizedRCNN) and model.proposal_generator is not None:
        graph = RegionDetector(model, size, masks=masks, late=late)
    elif isinstance(model, RetinaNet):
        graph = DenseDetector(model, size)
    else:
        _refuse("model", "R-CNN with an RPN, or RetinaNet", type(model).__name__)
    if size is not None and graph.square and max(size) > graph.square:
        fail(
            "--size",
            expected=f"at most {graph.square} x {graph.square} (model.backbone.square_pad)",
            got=f"{size[0]} x {size[1]}",
            remedy="Take a smaller size, or add model.backbone.square_pad=0.",
        )
    return graph


def _refuse(what: str, expected: str, got: str) -> NoReturn:
    fail(
        f"{what} to export",
        expected=expected,
        got=got,
        remedy="Export --part backbone, which does not depend on it.",
    )


@contextmanager
def exportable(model: nn.Module) -> Iterator[None]:
    """Give a model attention kernels of plain operations, and back its own at the end."""
    before: list[tuple[nn.Module, str, str]] = []
    try:
        for module in model.modules():
            for attribute, kernel in _KERNELS.items():
                own = getattr(module, attribute, None)
                if isinstance(own, str):
                    before.append((module, attribute, own))
                    setattr(module, attribute, kernel)
        yield
    finally:
        for module, attribute, own in before:
            setattr(module, attribute, own)
