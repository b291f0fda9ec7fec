"""Test-time augmentation: an image seen flipped and at several scales, one answer.

As facebookresearch/detectron2 modeling/test_time_augmentation.py does for Mask R-CNN: boxes found
in all views are united and duplicates suppressed; then every view predicts masks for these boxes,
and the mask probabilities are averaged. Views are resized from the image itself, and a view that is
larger than the square that the backbone pads to is padded to a larger square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.layers import batched_nms
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from vitdet.postprocess import maskness, soft_nms
from vitdet.utils.checks import fail

_LARGEST = 4.0  # times the size of the recipe: beyond it a mistyped scale takes all memory


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
            expected = f"scales above 0 and at most {_LARGEST:g}"
            got = ", ".join(map(str, self.scales)) or "none"
            fail("test-time augmentation", expected=expected, got=got, remedy="1 is the recipe's.")

    @property
    def neutral(self) -> bool:
        """Whether the only view is the recipe's own."""
        return self.scales == (1.0,) and not self.flip


@dataclass(frozen=True)
class _View:
    """An image as one pass of the detector sees it.

    Attributes:
        size: (height, width) in pixels, before padding.
        flipped: whether it is mirrored.
        images: normalised, padded.
        features: of the backbone.
    """

    size: tuple[int, int]
    flipped: bool
    images: ImageList
    features: dict[str, torch.Tensor]

    def boxes_to(self, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Take boxes (N, 4) of this view over to an image of `size`, unmirrored."""
        return _scaled(_mirrored(boxes, self.size[1]) if self.flipped else boxes, self.size, size)

    def boxes_from(self, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Take boxes (N, 4) of an unmirrored image of `size` over to this view."""
        scaled = _scaled(boxes, size, self.size)
        return _mirrored(scaled, self.size[1]) if self.flipped else scaled


def check_detector(detector: nn.Module) -> None:
    """Raise InputError unless test-time augmentation knows how to run the detector."""
    if not isinstance(detector, GeneralizedRCNN | DenseDetector):
        fail(
            "test-time augmentation",
            expected="a Faster, Mask or Cascade R-CNN, or a RetinaNet",
            got=type(detector).__name__,
            remedy="Predict without it.",
        )


def detect(
    detector: nn.Module, given: dict[str, Any], image: np.ndarray, tta: TestTimeAugmentation
) -> Instances:
    """Return the detections of all views together.

    Args:
        detector: an R-CNN or a RetinaNet, in evaluation mode.
        given: its input by the recipe: `image` uint8 (3, h, w), `height`, `width`.
        image: uint8 (height, width, 3), channels in the detector's order.
        tta: the views.

    Returns:
        detectron2's instances in pixels of `image`, with `pred_masks` if the detector has them.
    """
    size = (int(given["height"]), int(given["width"]))
    run: Any = detector  # its parts are modules, not tensors
    views: list[_View] = []
    found: list[Instances] = []
    for pixels, flipped in _pictures(given["image"], image, tta):
        view, boxes = _run(run, pixels, flipped)
        boxes.pred_boxes = Boxes(view.boxes_to(boxes.pred_boxes.tensor, size))
        found.append(Instances(size, **boxes.get_fields()))
        if _has_masks(run):  # its features are needed again
            views.append(view)
    merged = _merge(Instances.cat(found), run)
    if not views:
        shown: Any = merged.pred_boxes.nonempty()
        return merged[shown]
    merged.pred_masks = _mean_masks(run, views, merged)
    threshold = getattr(run.roi_heads, "maskness_thresh", None)
    if threshold is not None:
        merged.scores = merged.scores * maskness(merged.pred_masks, threshold)
        merged = merged[merged.scores.argsort(descending=True, stable=True)]
    return detector_postprocess(merged, *size)


def _pictures(
    plain: torch.Tensor, image: np.ndarray, tta: TestTimeAugmentation
) -> list[tuple[torch.Tensor, bool]]:
    """Return the image of each view, uint8 (3, h, w), and whether it is mirrored."""
    height, width = int(plain.shape[-2]), int(plain.shape[-1])
    found = []
    for scale in tta.scales:
        pixels = plain
        if scale != 1:
            wanted = (max(1, round(height * scale)), max(1, round(width * scale)))
            old = (int(image.shape[0]), int(image.shape[1]))
            resized = T.ResizeTransform(*old, *wanted, None).apply_image(image)
            pixels = torch.from_numpy(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        found.append((pixels, False))
        if tta.flip:
            found.append((pixels.flip(-1), True))
    return found


def _run(detector: Any, pixels: torch.Tensor, flipped: bool) -> tuple[_View, Instances]:
    """Return a view and the boxes that the detector finds in it, in pixels of the view."""
    size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    normalised = (pixels.to(detector.device) - detector.pixel_mean) / detector.pixel_std
    backbone = detector.backbone
    constraints = dict(backbone.padding_constraints)
    stride = max(1, backbone.size_divisibility)
    square = constraints.get("square_size", 0)
    if square and max(size) > square:
        constraints["square_size"] = -(-max(size) // stride) * stride
    images = ImageList.from_tensors([normalised], stride, padding_constraints=constraints)
    features = backbone(images.tensor)
    view = _View(size, flipped, images, features)
    if not hasattr(detector, "roi_heads"):
        maps = [features[name] for name in detector.head_in_features]
        return view, detector.forward_inference(images, maps, detector.head(maps))[0]
    proposals, _ = detector.proposal_generator(images, features, None)
    found = detector.roi_heads._forward_box(features, proposals)[0]
    return view, found


def _has_masks(detector: Any) -> bool:
    return bool(getattr(getattr(detector, "roi_heads", None), "mask_on", False))


def _merge(found: Instances, detector: Any) -> Instances:
    """Suppress what several views found, by the rule and limits of the detector's own heads."""
    heads: Any = getattr(detector, "roi_heads", None)
    found.pred_boxes.clip(found.image_size)
    kept: Any
    boxes, scores, classes = found.pred_boxes.tensor, found.scores, found.pred_classes
    if heads is None:
        kept = batched_nms(boxes, scores, classes, detector.test_nms_thresh)
        return found[kept[: detector.max_detections_per_image]]
    predictor = heads.box_predictor
    if isinstance(predictor, nn.ModuleList):  # of a cascade's stages
        predictor: Any = predictor[-1]
    if getattr(heads, "use_soft_nms", False):
        kept, new = soft_nms(
            boxes,
            scores,
            classes if heads.class_wise else None,
            method=heads.method,
            iou_threshold=heads.iou_threshold,
            sigma=heads.sigma,
            min_score=heads.min_score,
        )
        found = found[kept]
        found.scores = new
    else:
        kept = batched_nms(boxes, scores, classes, predictor.test_nms_thresh)
        found = found[kept]
    topk = predictor.test_topk_per_image
    return found[:topk] if topk >= 0 else found


def _mean_masks(detector: Any, views: Sequence[_View], merged: Instances) -> torch.Tensor:
    """Return the mean mask probabilities (N, 1, M, M) of the boxes over all views."""
    total: torch.Tensor | float = 0.0
    for view in views:
        boxes = view.boxes_from(merged.pred_boxes.tensor, merged.image_size)
        there = Instances(view.size, pred_boxes=Boxes(boxes), pred_classes=merged.pred_classes)
        masks = detector.roi_heads.forward_with_given_boxes(view.features, [there])[0].pred_masks
        total = total + (masks.flip(-1) if view.flipped else masks).float()
    assert isinstance(total, torch.Tensor)
    return total / len(views)


def _scaled(boxes: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    vertical, horizontal = new[0] / old[0], new[1] / old[1]
    return boxes * boxes.new_tensor([horizontal, vertical, horizontal, vertical])


def _mirrored(boxes: torch.Tensor, width: int) -> torch.Tensor:
    left, top, right, bottom = boxes.unbind(-1)
    return torch.stack([width - right, top, width - left, bottom], dim=-1)
