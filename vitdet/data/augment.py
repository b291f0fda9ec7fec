"""Augmentations in detectron2's transforms, as recipes name them, and a fast way to apply them.

detectron2's transforms make every step in full: the enlarged picture before its crop, a bitmap of
the whole crop for each object. A `View` knows from the sizes alone what will be left, and makes
only that, with detectron2's arithmetic (facebookresearch/detectron2 data/transforms,
structures/masks.py; fvcore transforms).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import shapely
from detectron2.data import transforms as T
from PIL import Image

from vitdet.data.images import Size
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import mask_util

Drawn = tuple[tuple[int, int, int, int], np.ndarray]  # a tight box XYXY; uint8 pixels inside it

_TOLERANCE = 1 / 64  # pixels that an enlarged image may be out of place
NOTHING: Drawn = ((0, 0, 0, 0), np.zeros((0, 0), dtype=np.uint8))


class ResizeScale(T.ResizeScale):
    """As detectron2's, but an image that is very long keeps a pixel of its shorter side."""

    def _get_resize(self, image: np.ndarray, scale: float) -> Any:
        return _with_a_pixel(super()._get_resize(image, scale))


class ResizeShortestEdge(T.ResizeShortestEdge):
    """As detectron2's, but an image that is very long keeps a pixel of its shorter side."""

    def get_transform(self, image: np.ndarray) -> Any:
        """Return the resize for an image (height, width, channels)."""
        return _with_a_pixel(super().get_transform(image))


def _with_a_pixel(transform: Any) -> Any:
    if isinstance(transform, T.ResizeTransform):
        resize: Any = transform  # its attributes are set by name
        resize.new_h, resize.new_w = max(1, resize.new_h), max(1, resize.new_w)
    return transform


def large_scale_jitter(
    size: int = 1024, min_scale: float = 0.1, max_scale: float = 2.0, flip: bool = True
) -> list[T.Augmentation]:
    """Flip half of the images, scale by a random factor, crop: ViTDet's training augmentation.

    "Simple Copy-Paste" (Ghiasi et al. 2021), Sec. 3, with the values of "Exploring Plain Vision
    Transformer Backbones for Object Detection" (Li et al. 2022), Appendix A.2, in the order of
    facebookresearch/detectron2 configs/common/data/coco.py. `size` is the side in pixels of the
    crop, and of the square that scale 1 fits the image into. Nothing is padded: the model does.
    """
    scale = ResizeScale(min_scale, max_scale, target_height=size, target_width=size)
    square: Any = (size, size)  # annotated as a tuple of one
    return [*_flip(flip), scale, T.FixedSizeCrop(crop_size=square, pad=False)]


def resize_shortest_edge(
    size: int | Sequence[int] = 1024, max_size: int = 1024, flip: bool = False
) -> list[T.Augmentation]:
    """Resize so that the shorter side is `size` pixels and the longer one at most `max_size`.

    Of several sizes one is drawn at random for each image.
    """
    sizes = [size] if isinstance(size, int) else list(size)
    return [*_flip(flip), ResizeShortestEdge(sizes, max_size=max_size, sample_style="choice")]


def fixed_resize(height: int, width: int, flip: bool = False) -> list[T.Augmentation]:
    """Resize to exactly `height` x `width` pixels without keeping the aspect ratio."""
    return [*_flip(flip), T.Resize((height, width))]


def _flip(wanted: bool) -> list[T.Augmentation]:
    return [T.RandomFlip(horizontal=True)] if wanted else []


@dataclass(frozen=True)
class View:
    """A horizontal flip or none, then a resize or none, then a crop or none."""

    source: Size  # (height, width) of the image
    resized: Size  # (height, width) of the whole image after the resize
    flip: bool = False
    # (top, left, height, width) of what is kept of the resized image, None for everything; it may
    # reach over the right and bottom edge
    crop: tuple[int, int, int, int] | None = None
    interpolation: int = Image.Resampling.BILINEAR  # Pillow's filter

    @property
    def size(self) -> Size:
        """(height, width) of the result."""
        if self.crop is None:
            return self.resized
        top, left, height, width = self.crop
        return min(height, self.resized[0] - top), min(width, self.resized[1] - left)

    @property
    def corner(self) -> Size:
        """(top, left) of the result in the resized image."""
        return self.crop[:2] if self.crop else (0, 0)

    @property
    def shrink(self) -> float:
        """How many times smaller the result shows the image; below 1 where it is enlarged."""
        return min(old / new for old, new in zip(self.source, self.resized, strict=True))

    def halved(self) -> View:
        """Return the same view at half the size."""
        height, width = (max(1, side // 2) for side in self.resized)
        if self.crop is None:
            return replace(self, resized=(height, width))
        top, left, *sides = (value // 2 for value in self.crop)
        rows, columns = (max(1, side) for side in sides)
        crop = (min(top, height - 1), min(left, width - 1), rows, columns)
        return replace(self, resized=(height, width), crop=crop)

    def then(self, transform: T.Transform) -> View:
        """Return the view after one more transform; another kind or order is an InputError."""
        if isinstance(transform, T.TransformList):
            view = self
            for each in transform.transforms:
                view = view.then(each)
            return view
        if isinstance(transform, T.NoOpTransform):
            return self
        part: Any = transform  # its attributes are set by name
        if self.crop is None and isinstance(transform, T.CropTransform):
            return replace(self, crop=(int(part.y0), int(part.x0), int(part.h), int(part.w)))
        if self.crop is None and self.resized == self.source:
            if isinstance(transform, T.HFlipTransform):
                return replace(self, flip=not self.flip)
            if isinstance(transform, T.ResizeTransform):
                size = (max(1, int(part.new_h)), max(1, int(part.new_w)))
                return replace(self, resized=size, interpolation=part.interp)
        raise InputError(
            "mapper.augmentations with mapper.fast=True: expected horizontal flips, then a resize, "
            f"then a crop, got {type(transform).__name__} as the next step. Use mapper.fast=False."
        )

    def image(self, picture: Image.Image, reduction: int = 1) -> np.ndarray:
        """Return what is left of the upright image, uint8 (height, width, channels).

        It may have been decoded `reduction` times smaller than `source`.
        """
        if self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        larger = self.resized[0] >= picture.height and self.resized[1] >= picture.width
        if larger and reduction == 1 and self.interpolation == Image.Resampling.BILINEAR:
            return self._enlarged(np.asarray(picture))
        # Pillow averages over all pixels that fall together. Where the reduction does not divide
        # the width, the last pixel is not whole, and a flip puts it first.
        shift = picture.width - self.source[1] / reduction if self.flip else 0.0
        (top, left), (height, width) = self.corner, self.size
        down = self.source[0] / self.resized[0] / reduction
        across = self.source[1] / self.resized[1] / reduction
        box = (
            left * across + shift,
            top * down,
            min((left + width) * across + shift, picture.width),
            min((top + height) * down, picture.height),
        )
        resampling = Image.Resampling(self.interpolation)
        return np.asarray(picture.resize((width, height), resampling, box=box))

    def _enlarged(self, pixels: np.ndarray) -> np.ndarray:
        """Interpolate between pixels (height, width, channels), only where the crop is."""
        (top, left), (height, width) = self.corner, self.size
        first_row, end_row, above = _part(self.source[0], self.resized[0], top, height)
        first, end, before = _part(self.source[1], self.resized[1], left, width)
        down, across = (new / old for old, new in zip(self.source, self.resized, strict=True))
        # the exact variant rounds to nearest, the usual one mostly down
        part, how = pixels[first_row:end_row, first:end], cv2.INTER_LINEAR_EXACT
        enlarged = cv2.resize(part, None, fx=across, fy=down, interpolation=how)
        return enlarged[above : above + height, before : before + width]

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Return boxes (N, 4) XYXY of the source as boxes of the view, clipped to it."""
        corners = self._moved(boxes.reshape(-1, 2)).reshape(-1, 2, 2) - self.corner[::-1]
        ordered = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        return np.minimum(ordered.clip(min=0), (*self.size[::-1], *self.size[::-1]))

    def masks(self, segmentations: Sequence[Any]) -> list[Drawn]:
        """Draw objects, each a list of polygons or run lengths, into the view; some are empty."""
        listed = [each if isinstance(each, list) else [] for each in segmentations]
        polygons: list[list[np.ndarray]] = [[] for _ in listed]
        if any(listed):  # all points at once
            parts = [np.asarray(each, np.float64).reshape(-1, 2) for o in listed for each in o]
            ends = np.cumsum([len(part) for part in parts])
            moved = iter(np.split(self._moved(np.concatenate(parts)), ends[:-1]))
            for found, given in zip(polygons, listed, strict=True):
                for _ in given:
                    polygon = next(moved)
                    found.extend([polygon] if self.crop is None else _cropped(polygon, self.crop))
        return [
            _drawn(parts, self.size) if isinstance(item, list) else self._sampled(item)
            for item, parts in zip(segmentations, polygons, strict=True)
        ]

    def _moved(self, points: np.ndarray) -> np.ndarray:
        """Flip and resize points (N, 2) xy."""
        xs, ys = points[:, 0], points[:, 1]
        if self.flip:
            xs = self.source[1] - xs
        across = self.resized[1] * 1.0 / self.source[1]
        down = self.resized[0] * 1.0 / self.source[0]
        return np.stack([xs * across, ys * down], axis=1)

    def _sampled(self, encoded: Any) -> Drawn:
        """Take the pixels of a run-length encoded mask that Pillow's nearest-pixel resize takes."""
        left, top, width, height = (int(value) for value in mask_util.toBbox(encoded))
        rows = _nearest(self.source[0], self.resized[0])[self.corner[0] :][: self.size[0]]
        columns = _nearest(self.source[1], self.resized[1])[self.corner[1] :][: self.size[1]]
        if self.flip:
            columns = self.source[1] - 1 - columns
        # only those in which the object has a pixel
        down = np.flatnonzero((rows >= top) & (rows < top + height))
        across = np.flatnonzero((columns >= left) & (columns < left + width))
        if not down.size or not across.size:
            return NOTHING
        pixels = mask_util.decode(encoded)[np.ix_(rows[down], columns[across])]
        return tight(int(down[0]), int(across[0]), np.ascontiguousarray(pixels))


class _Sizes:
    """Stands in for detectron2's AugInput: augmentations draw from the size, not the pixels."""

    def __init__(self, source: Size) -> None:
        self.view = View(source=source, resized=source)

    @property
    def image(self) -> np.ndarray:
        return np.broadcast_to(np.uint8(0), (*self.view.size, 3))

    def transform(self, transform: T.Transform) -> None:
        self.view = self.view.then(transform)


def draw_view(augmentations: T.AugmentationList, source: Size) -> View:
    """Let augmentations draw the same random numbers as for an image of (height, width) `source`.

    Anything but flip, resize and crop, in this order, is an InputError.
    """
    sizes: Any = _Sizes(source)
    augmentations(sizes)
    return sizes.view


def _cropped(polygon: np.ndarray, crop: tuple[int, int, int, int]) -> list[np.ndarray]:
    """Cut a polygon (points, 2) as fvcore's CropTransform; pieces in the crop's coordinates.

    Most lie wholly inside or outside, which is seen sooner.
    """
    top, left, height, width = crop
    near, far = np.array([[left, top], [left + width, top + height]])
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    if (high <= near).any() or (low >= far).any():
        return []
    shape = shapely.Polygon(polygon)
    if (low >= near).all() and (high <= far).all() and shape.is_valid:
        return [polygon - near]
    cut = shape.buffer(0.0).intersection(shapely.box(*near, *far))
    return [
        shapely.get_coordinates(part.exterior)[:-1] - near
        for part in shapely.get_parts(cut)
        if isinstance(part, shapely.Polygon) and part.is_valid and not part.is_empty
    ]


def _drawn(polygons: list[np.ndarray], size: Size) -> Drawn:
    """Fill polygons (points, 2) as pycocotools fills them on a canvas of `size`."""
    if not polygons:
        return NOTHING
    low = np.min([polygon.min(axis=0) for polygon in polygons], axis=0)
    high = np.max([polygon.max(axis=0) for polygon in polygons], axis=0)
    # corners are rounded to a fifth of a pixel, hence the margin of one
    left, top = (max(0, int(value) - 1) for value in low)
    width, height = (min(int(end) + 2, side) for end, side in zip(high, size[::-1], strict=True))
    if width <= left or height <= top:
        return NOTHING
    # the canvas ends where the object ends; if it began where the object begins, sums would be
    # rounded otherwise, and now and then a pixel with them
    flat = [polygon.ravel() for polygon in polygons]
    encoded = mask_util.merge(mask_util.frPyObjects(flat, height, width))
    columns = mask_util.decode(encoded).T[left:, top:]  # (width, height) in memory
    return tight(top, left, cv2.transpose(columns))


def tight(top: int, left: int, pixels: np.ndarray) -> Drawn:
    """Cut a mask to the smallest rectangle round its pixels."""
    x, y, width, height = cv2.boundingRect(pixels)
    if not width:
        return NOTHING
    left, top = left + x, top + y
    return (left, top, left + width, top + height), pixels[y : y + height, x : x + width]


def _part(old: int, new: int, first: int, count: int) -> tuple[int, int, int]:
    """Find the part of a row of `old` pixels that some of the `new` are interpolated from.

    It begins where, nearly, an edge between two new pixels lies. Returned are its begin and end,
    and the place of the new pixel `first` in the enlarged part.
    """
    scale = new / old
    leftmost = max(0, int((first + 0.5) / scale - 0.5))
    edges = np.arange(leftmost + 1) * scale
    begin = np.flatnonzero(np.abs(edges - edges.round()) <= _TOLERANCE)[-1]
    end = min(old, int((first + count) / scale) + 2)
    return int(begin), end, first - int(edges[begin].round())


def _nearest(old: int, new: int) -> np.ndarray:
    """Which of `old` pixels in a row each of `new` shows, int32, by asking Pillow."""
    ramp = Image.fromarray(np.arange(old, dtype=np.int32)[None])
    return np.asarray(ramp.resize((new, 1), Image.Resampling.NEAREST))[0]
