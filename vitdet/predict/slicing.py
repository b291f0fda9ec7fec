"""Large images in overlapping parts: small objects keep their pixels.

The idea is that of "Slicing Aided Hyper Inference" (Akyon et al. 2022, arXiv 2202.06934), Sec. 3.2.
Of detections that parts share, a part that shows the whole object is believed before one whose
border cuts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import pairwise_intersection

from vitdet.utils.checks import fail
from vitdet.utils.run_lengths import RunLengths, decode, encode, encode_patch

Size = tuple[int, int]  # (height, width)
Detect = Callable[[Sequence[np.ndarray]], list[Instances]]

_AT_BORDER = 2.0  # pixels from a part's border: an object that ends there may be cut
_SAME = 0.5  # IoU from which two boxes are one object
_FRAGMENT = 0.6  # share of a cut box inside another from which it is a piece of that object
_WHOLE_SIDE = 2048  # pixels: a larger image is looked at whole at this size, as are its masks


@dataclass(frozen=True)
class Slices:
    """How an image is cut.

    Attributes:
        size: side of the square parts in pixels of the image.
        overlap: share of a side that neighbours have in common; objects up to this size are whole
            in some part.
        whole: whether the whole image is looked at, too, for objects larger than that.

    Raises:
        InputError: a size below 1, or an overlap that is not from 0 up to 0.9.
    """

    size: int
    overlap: float = 0.25
    whole: bool = True

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap <= 0.9:
            fail(
                "slices",
                expected="a size of at least 1 pixel and an overlap of 0 to 0.9",
                got=f"size {self.size}, overlap {self.overlap}",
                remedy="640 with 0.25, for example.",
            )

    def places(self, height: int, width: int) -> list[tuple[int, int]]:
        """Return (top, left) of the parts, row by row; parts reach to the edges, none beyond."""
        return [(top, left) for top in self._starts(height) for left in self._starts(width)]

    def _starts(self, length: int) -> list[int]:
        rest = length - self.size
        if rest <= 0:
            return [0]
        steps = math.ceil(rest / (self.size * (1 - self.overlap)))
        return [round(rest * step / steps) for step in range(steps + 1)]


@dataclass(frozen=True)
class _Part:
    """What was found in a part, in pixels of the image.

    Attributes:
        place: (top, left).
        size: (height, width).
        found: boxes, scores and classes.
        cut: bool (N,), whether a border of the part may cut the object.
        masks: encoded, in the part or in a smaller picture of it; None without masks.
    """

    place: Size
    size: Size
    found: Instances
    cut: torch.Tensor
    masks: list[RunLengths] | None


def detect_sliced(
    detect: Detect, image: np.ndarray, slices: Slices, batch_size: int = 1
) -> tuple[Instances, list[RunLengths] | None]:
    """Return what is found in an image's parts, each object once, the best first.

    Masks are kept in COCO's encoding, so memory is that of a batch of parts.

    Args:
        detect: images uint8 (height, width, 3) -> instances, see `Predictor.detect`.
        image: uint8 (height, width, 3).
        slices: how to cut.
        batch_size: parts that are detected together.

    Returns:
        Instances without masks, and the masks. An image of one part comes back as `detect` gave
        it, with `pred_masks` and None.
    """
    height, width = image.shape[:2]
    places = slices.places(height, width)
    if len(places) == 1:
        return detect([image])[0], None
    parts = [_whole(detect, image)] if slices.whole else []
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        crops = [image[y : y + slices.size, x : x + slices.size] for y, x in batch]
        for place, crop, found in zip(batch, crops, detect(crops), strict=True):
            parts.append(_part(found, place, (crop.shape[0], crop.shape[1]), (height, width)))
    return _merged(parts, (height, width))


def _whole(detect: Detect, image: np.ndarray) -> _Part:
    size = (int(image.shape[0]), int(image.shape[1]))
    scale = _WHOLE_SIDE / max(size)
    if scale < 1:
        smaller = (max(1, round(size[1] * scale)), max(1, round(size[0] * scale)))
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return _part(detect([image])[0], (0, 0), size, size)


def _part(found: Instances, place: Size, part: Size, image: Size) -> _Part:
    """Move detections of a part of size `part` to their place in an image of size `image`."""
    top, left = place
    height, width = found.image_size
    boxes = found.pred_boxes.tensor.clone()
    boxes[:, 0::2] *= part[1] / width
    boxes[:, 1::2] *= part[0] / height
    x1, y1, x2, y2 = boxes.unbind(1)
    cut = (x1 < _AT_BORDER) & (left > 0) | (x2 > part[1] - _AT_BORDER) & (left + part[1] < image[1])
    cut |= (y1 < _AT_BORDER) & (top > 0) | (y2 > part[0] - _AT_BORDER) & (top + part[0] < image[0])
    moved = Instances(
        image,
        pred_boxes=Boxes(boxes + boxes.new_tensor([left, top, left, top])),
        scores=found.scores,
        pred_classes=found.pred_classes,
    )
    masks = encode(found.pred_masks.numpy()) if found.has("pred_masks") else None
    return _Part(place, part, moved, cut, masks)


def _merged(parts: Sequence[_Part], size: Size) -> tuple[Instances, list[RunLengths] | None]:
    found = Instances.cat([part.found for part in parts])
    cut = torch.cat([part.cut for part in parts])
    owner = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p.cut) for p in parts]))
    kept: Any = keep(found.pred_boxes.tensor, found.scores, found.pred_classes, cut, owner)
    kept = kept[found.scores[kept].argsort(descending=True, stable=True)]
    survivors: Instances = found[kept]
    if any(part.masks is None for part in parts):
        return survivors, None
    masks = [(part, mask) for part in parts for mask in part.masks or ()]
    wanted = [masks[index] for index in kept.tolist()]
    return survivors, [_placed(part, mask, size) for part, mask in wanted]


def _placed(part: _Part, mask: RunLengths, size: Size) -> RunLengths:
    """Encode a part's mask anew in the whole image."""
    pixels = decode(mask)
    if pixels.shape != part.size:
        wanted = (part.size[1], part.size[0])
        larger = cv2.resize(pixels.astype(np.uint8), wanted, interpolation=cv2.INTER_NEAREST)
        pixels = larger.astype(bool)
    return encode_patch(pixels, part.place, size)


def keep(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    classes: torch.Tensor,
    cut: torch.Tensor,
    owner: torch.Tensor,
) -> torch.Tensor:
    """Return the places of detections that are objects of their own.

    Uncut detections come first, by score, then cut ones. One is dropped if an earlier one of its
    class, found in another part, is the same box (IoU); a cut one also if it lies for the most part
    in such a box. Detections of one part have been compared by the detector already.

    Args:
        boxes: (N, 4) in pixels of the image.
        scores: (N,).
        classes: (N,).
        cut: bool (N,).
        owner: (N,) number of the part.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[cut[order].to(torch.int8).argsort(stable=True)]
    kept: list[torch.Tensor] = []
    for label in classes.unique().tolist():
        rows = order[classes[order] == label]
        kept.append(rows[_survivors(boxes[rows], cut[rows], owner[rows])])
    return torch.cat([order[:0], *kept])


def _survivors(boxes: torch.Tensor, cut: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """Return bool (N,) for detections of one class in their order."""
    area = Boxes(boxes).area()
    alive = torch.ones(len(boxes), dtype=torch.bool)
    for i in range(len(boxes)):
        if not alive[i]:
            continue
        common = pairwise_intersection(Boxes(boxes[i : i + 1]), Boxes(boxes[i + 1 :]))[0]
        iou = common / (area[i] + area[i + 1 :] - common)
        inside = common / area[i + 1 :]
        same = (iou >= _SAME) | (cut[i + 1 :] & (inside >= _FRAGMENT))
        alive[i + 1 :] &= ~(same & (owner[i + 1 :] != owner[i]))
    return alive
