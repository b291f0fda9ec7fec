"""Augmentation lists in detectron2's transforms, as the recipes name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import transforms as T


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
    """Flip, scale by a random factor, crop: the training augmentation of ViTDet.

    "Simple Copy-Paste" (Ghiasi et al. 2021), Sec. 3, with the values of "Exploring Plain Vision
    Transformer Backbones for Object Detection" (Li et al. 2022), Appendix A.2. Order and padding
    are those of facebookresearch/detectron2 configs/common/data/coco.py with projects/ViTDet: the
    image is not padded here; the model pads after normalisation.

    Args:
        size: side in pixels of the square that scale 1 fits the image into, and of the crop.
        min_scale, max_scale: limits of the factor.
        flip: whether to flip horizontally half of the time.
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
