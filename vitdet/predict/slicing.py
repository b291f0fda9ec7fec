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

from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import RunLengths, decode, encode, encode_patch

Detect = Callable[[Sequence[np.ndarray]], list[Instances]]
Size = tuple[int, int]

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
            raise InputError(
                "slices: expected a size of at least 1 pixel and an overlap of 0 to 0.9, got size "
                f"{self.size}, overlap {self.overlap}. 640 with 0.25, for example."
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


def detect_sliced(
    detect: Detect, image: np.ndarray, slices: Slices, batch_size: int = 1
) -> tuple[Instances, list[RunLengths] | None]:
    """Return what is found in an image's parts, each object once, the best first; and its masks.

    These are in COCO's encoding, so memory is that of a batch of parts. An image of one part comes
    back as `detect` gave it, with `pred_masks` and None.

    Args:
        detect: see `Predictor.detect`.
        image: uint8 (height, width, 3).
        slices: how to cut.
        batch_size: parts that are detected together.
    """
    height, width = image.shape[:2]
    places = slices.places(height, width)
    if len(places) == 1:
        return detect([image])[0], None
    parts: list[Instances] = []
    if slices.whole:
        scale = min(1.0, _WHOLE_SIDE / max(height, width))
        smaller = (max(1, round(width * scale)), max(1, round(height * scale)))
        seen = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA) if scale < 1 else image
        parts.append(_in_image(detect([seen])[0], (0, 0), (height, width), (height, width)))
    for first in range(0, len(places), batch_size):
        batch = places[first : first + batch_size]
        crops = [image[y : y + slices.size, x : x + slices.size] for y, x in batch]
        for place, crop, found in zip(batch, crops, detect(crops), strict=True):
            parts.append(_in_image(found, place, crop.shape[:2], (height, width)))
    for number, part in enumerate(parts):
        part.owner = torch.full((len(part),), number)
    found = Instances.cat(parts)
    kept = keep(found.pred_boxes.tensor, found.scores, found.pred_classes, found.cut, found.owner)
    kept: Any = kept[found.scores[kept].argsort(descending=True, stable=True)]
    masks = None
    if found.has("mask"):
        encoded: Any = found.mask
        chosen = (encoded[row] for row in kept.tolist())
        masks = [_placed(mask, place, size, (height, width)) for mask, place, size in chosen]
    fields = {name: found.get(name)[kept] for name in ("pred_boxes", "scores", "pred_classes")}
    return Instances((height, width), **fields), masks


def _in_image(found: Instances, place: Size, size: Size, image: Size) -> Instances:
    """Take detections of a part of `size` at `place` to the pixels of an image of size `image`.

    `cut` says whether a border of the part may cut the object; `mask` has its encoded mask in what
    the detector saw, and place and size of the part.
    """
    boxes = found.pred_boxes.tensor.clone()
    boxes[:, 0::2] *= size[1] / found.image_size[1]
    boxes[:, 1::2] *= size[0] / found.image_size[0]
    cut = torch.zeros(len(boxes), dtype=torch.bool)
    for axis in (0, 1):  # x, y
        start, length, whole = place[1 - axis], size[1 - axis], image[1 - axis]
        cut |= (boxes[:, axis] < _AT_BORDER) & (start > 0)
        cut |= (boxes[:, axis + 2] > length - _AT_BORDER) & (start + length < whole)
    moved = Instances(image, scores=found.scores, pred_classes=found.pred_classes, cut=cut)
    moved.pred_boxes = Boxes(boxes + boxes.new_tensor([place[1], place[0]] * 2))
    if found.has("pred_masks"):
        moved.mask = [(mask, place, size) for mask in encode(found.pred_masks.numpy())]
    return moved


def _placed(mask: RunLengths, place: Size, size: Size, image: Size) -> RunLengths:
    """Encode a mask of a part anew in the whole image."""
    pixels = decode(mask).astype(np.uint8)
    if pixels.shape != size:
        pixels = cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_NEAREST)
    return encode_patch(pixels.astype(bool), place, image)


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

    `boxes` are (N, 4) in pixels of the image, `owner` (N,) the numbers of the parts.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[cut[order].to(torch.int8).argsort(stable=True)]
    area, kept = Boxes(boxes).area(), []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        common = pairwise_intersection(Boxes(boxes[best][None]), Boxes(boxes[order]))[0]
        same = common / (area[best] + area[order] - common) >= _SAME
        same |= cut[order] & (common / area[order] >= _FRAGMENT)
        order = order[~(same & (owner[order] != owner[best]) & (classes[order] == classes[best]))]
    return torch.stack(kept) if kept else order
