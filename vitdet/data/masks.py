"""Masks of annotation files: polygons, and run lengths as numbers or as text."""

from __future__ import annotations

import math
from typing import Any

from vitdet.utils.run_lengths import encode_segmentation, mask_util

_FAR = 10  # times the image's longer side: a polygon may go so far, and is cut off at the edge


def is_polygon(part: Any) -> bool:
    """Whether a list has the coordinates of three or more points."""
    return isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0


def mask_fault(segmentation: Any, image: dict[str, Any]) -> tuple[str, str, str] | None:
    """Return (kind, expected, got) of what is wrong with a mask, None for nothing.

    What is not found here pycocotools can draw: it checks nothing itself, and would take all memory
    or write beyond its own.
    """
    size = (image["height"], image["width"])
    if isinstance(segmentation, dict):
        fault = _run_lengths_fault(segmentation, size)
    elif isinstance(segmentation, list) and segmentation:
        fault = _polygons_fault(segmentation, size)
    else:
        return "empty mask", "a segmentation, as other annotations have", repr(segmentation)
    if fault is None and not mask_util.area(encode_segmentation(segmentation, size)):
        return "empty mask", "a mask that covers a pixel of the image", "none"
    return fault


def _run_lengths_fault(
    segmentation: dict[str, Any], size: tuple[int, int]
) -> tuple[str, str, str] | None:
    if segmentation.get("size") not in (list(size), size) or "counts" not in segmentation:
        expected = f"a run-length encoding of size {list(size)} (height, width)"
        return "wrong mask", expected, repr(segmentation.get("size"))[:80]
    counts = segmentation["counts"]
    lengths = _lengths_of(counts) if isinstance(counts, str | bytes) else counts
    if (
        not isinstance(lengths, list)
        or not all_finite(lengths)
        or min(lengths, default=0) < 0
        or sum(lengths) != math.prod(size)
    ):
        return "wrong mask", f"run lengths that add up to {math.prod(size)}", repr(counts)[:80]
    return None


def _lengths_of(text: str | bytes) -> list[int] | None:
    """Return the run lengths of COCO's compressed form, None where it is none.

    Six bits a character from "0" on: five of a number, the lowest first, and one for more to come;
    from the third number on it is the difference to the last but one (pycocotools, maskApi.c).
    """
    lengths: list[int] = []
    value = shift = 0
    for character in text.encode() if isinstance(text, str) else text:
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return None if shift else lengths


def _polygons_fault(polygons: list[Any], size: tuple[int, int]) -> tuple[str, str, str] | None:
    if not all(is_polygon(part) and all_finite(part) for part in polygons):
        expected = "polygons as lists x1, y1, x2, y2, ... of at least three points"
        return "wrong mask", expected, repr(polygons)[:80]
    # pycocotools walks along every edge, also where it is millions of pixels outside
    far = _FAR * max(size)
    if any(abs(value) > far for part in polygons for value in part):
        return "wrong mask", f"points near the image of {size[1]} x {size[0]}", repr(polygons)[:80]
    return None


def all_finite(values: list[Any]) -> bool:
    """Whether all values are numbers, none of them endless."""
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)
