"""Test-time augmentation: an image seen flipped and at several scales, one answer.

As facebookresearch/detectron2 modeling/test_time_augmentation.py does for Mask R-CNN: boxes found
in all views are united and duplicates suppressed; then every view predicts masks for these boxes,
and the mask probabilities are averaged. Views are resized from the image itself, and a view that is
larger than the square that the backbone pads to is padded to a larger square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.layers import batched_nms
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from vitdet.postprocess import maskness, soft_nms
from vitdet.utils.checks import InputError

_LARGEST = 4.0  # times the size of the recipe: beyond it a mistyped scale takes all memory
Size = tuple[int, int]


@dataclass(frozen=True)
class TestTimeAugmentation:
    """The views of an image.

    Attributes:
        scales: sizes of the views, as factors of the size that the recipe gives an image.
        flip: whether each is seen in a mirror, too.

    Raises:
        InputError: no scale, or one that is not above 0 and at most 4.
    """

    __test__ = False  # pytest takes the name for a test

    scales: tuple[float, ...] = (1.0,)
    flip: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        if not self.scales or not all(0 < scale <= _LARGEST for scale in self.scales):
            got = ", ".join(map(str, self.scales)) or "none"
            text = (
                f"expected scales above 0 and at most {_LARGEST:g}, got {got}. 1 is the recipe's."
            )
            raise InputError(f"test-time augmentation: {text}")


class _View(NamedTuple):
    """An image as one pass sees it: its (height, width) before padding, features, detections."""

    size: Size
    flipped: bool
    features: dict[str, torch.Tensor]
    found: Instances


def check_detector(detector: nn.Module) -> None:
    """Raise InputError unless test-time augmentation knows how to run the detector."""
    if not isinstance(detector, GeneralizedRCNN):
        name = type(detector).__name__
        text = f"expected a Faster, Mask or Cascade R-CNN, got {name}. Predict without it."
        raise InputError(f"test-time augmentation: {text}")


def detect(
    detector: nn.Module, given: dict[str, Any], image: np.ndarray, tta: TestTimeAugmentation
) -> Instances:
    """Return the detections of all views together.

    Args:
        detector: an R-CNN, in evaluation mode.
        given: its input by the recipe: `image` uint8 (3, h, w), `height`, `width`.
        image: uint8 (height, width, 3), channels in the detector's order.
        tta: the views.
    """
    size = (int(given["height"]), int(given["width"]))
    run: Any = detector  # its parts are modules, not tensors
    heads = run.roi_heads
    views: list[_View] = []
    for scale in tta.scales:
        pixels = given["image"] if scale == 1 else _resized(given["image"], image, scale)
        views.append(_look(run, pixels, flipped=False))
        views += [_look(run, pixels.flip(-1), flipped=True)] if tta.flip else []
    for view in views:
        boxes = _carried(view.found.pred_boxes.tensor, view.size, size, view.flipped)
        view.found.pred_boxes = Boxes(boxes)
    merged = _merge(Instances.cat([Instances(size, **v.found.get_fields()) for v in views]), heads)
    if not heads.mask_on:
        shown: Any = merged.pred_boxes.nonempty()
        return merged[shown]
    merged.pred_masks = _mean_masks(heads, views, merged)
    threshold = getattr(heads, "maskness_thresh", None)
    if threshold is not None:
        merged.scores = merged.scores * maskness(merged.pred_masks, threshold)
        merged = merged[merged.scores.argsort(descending=True, stable=True)]
    return detector_postprocess(merged, *size)


def _resized(plain: torch.Tensor, image: np.ndarray, scale: float) -> torch.Tensor:
    height, width = (max(1, round(side * scale)) for side in plain.shape[-2:])
    resize = T.ResizeTransform(image.shape[0], image.shape[1], height, width, None)
    return torch.from_numpy(np.ascontiguousarray(resize.apply_image(image).transpose(2, 0, 1)))


def _look(detector: Any, pixels: torch.Tensor, *, flipped: bool) -> _View:
    """Run the detector on a view; boxes are in pixels of the view."""
    size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    normalised = (pixels.to(detector.device) - detector.pixel_mean) / detector.pixel_std
    constraints = dict(detector.backbone.padding_constraints)
    stride = max(1, detector.backbone.size_divisibility)
    if 0 < constraints.get("square_size", 0) < max(size):
        constraints["square_size"] = -(-max(size) // stride) * stride
    images = ImageList.from_tensors([normalised], stride, padding_constraints=constraints)
    features = detector.backbone(images.tensor)
    proposals, _ = detector.proposal_generator(images, features, None)
    found = detector.roi_heads._forward_box(features, proposals)[0]
    return _View(size, flipped, features if detector.roi_heads.mask_on else {}, found)


def _merge(found: Instances, heads: Any) -> Instances:
    """Suppress what several views found, by the rule and limits of the detector's own heads."""
    found.pred_boxes.clip(found.image_size)
    boxes, scores, classes = found.pred_boxes.tensor, found.scores, found.pred_classes
    predictor = heads.box_predictor
    if isinstance(predictor, nn.ModuleList):  # of a cascade's stages
        predictor: Any = predictor[-1]
    topk = predictor.test_topk_per_image
    limit = slice(topk if topk >= 0 else None)
    if not getattr(heads, "use_soft_nms", False):
        kept: Any = batched_nms(boxes, scores, classes, predictor.test_nms_thresh)
        return found[kept[limit]]
    kept, new = soft_nms(
        boxes,
        scores,
        classes if heads.class_wise else None,
        method=heads.method,
        iou_threshold=heads.iou_threshold,
        sigma=heads.sigma,
        min_score=heads.min_score,
    )
    found = found[kept[limit]]
    found.scores = new[limit]
    return found


def _mean_masks(heads: Any, views: list[_View], merged: Instances) -> torch.Tensor:
    """Return the mean mask probabilities (N, 1, M, M) of the boxes over all views."""
    found = []
    for view in views:
        boxes = _carried(merged.pred_boxes.tensor, merged.image_size, view.size, view.flipped)
        there = Instances(view.size, pred_boxes=Boxes(boxes), pred_classes=merged.pred_classes)
        masks = heads.forward_with_given_boxes(view.features, [there])[0].pred_masks.float()
        found.append(masks.flip(-1) if view.flipped else masks)
    return torch.stack(found).mean(0)


def _carried(boxes: torch.Tensor, old: Size, new: Size, flipped: bool) -> torch.Tensor:
    """Take boxes (N, 4) from an image of a size to one of another, mirrored or not."""
    vertical, horizontal = new[0] / old[0], new[1] / old[1]
    boxes = boxes * boxes.new_tensor([horizontal, vertical, horizontal, vertical])
    if not flipped:
        return boxes
    left, top, right, bottom = boxes.unbind(-1)
    return torch.stack([new[1] - right, top, new[1] - left, bottom], dim=-1)
