"""Masks as run lengths, in COCO's format.

pycocotools walks over every pixel of every mask. Most objects fill a small part of their image, so
here only the columns of an object are looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask

mask_util: Any = pycocotools.mask  # its type stubs know only one of each function's call forms

RunLengths = dict[str, Any]


def encode(masks: np.ndarray) -> list[RunLengths]:
    """Encode masks (bool, (N, height, width)) to the same text as pycocotools.mask.encode."""
    size = (int(masks.shape[1]), int(masks.shape[2]))
    rows, columns = (np.logical_or.reduce(masks, axis=axis) for axis in (2, 1))
    found = []
    for mask, row, column in zip(masks, rows, columns, strict=True):
        top, bottom = _extent(row)
        left, right = _extent(column)
        found.append(encode_patch(mask[top:bottom, left:right], (top, left), size))
    return found


def encode_patch(patch: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> RunLengths:
    """Encode a mask in an image of `size`, given from its `corner` (top, left) on; bool."""
    top, left = corner
    # Whole columns: a run from the image's lower edge goes on at the upper edge of the next one.
    line = np.zeros(patch.shape[1] * size[0] + 2, dtype=bool)  # no object at its ends
    line[1:-1].reshape(-1, size[0])[:, top : top + len(patch)] = patch.T
    ends = left * size[0] + np.flatnonzero(line[1:] != line[:-1])
    pixels = size[0] * size[1]
    counts = np.diff(ends, prepend=0, append=pixels)
    if len(ends) and ends[-1] == pixels:
        counts = counts[:-1]
    encoded = mask_util.frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    return {"size": list(size), "counts": encoded["counts"].decode("ascii")}


def encode_segmentation(segmentation: Any, size: tuple[int, int]) -> RunLengths:
    """Return polygons, or run lengths as numbers or text, as those that pycocotools takes."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, *size))
    return compressed(segmentation)


def compressed(segmentation: Any) -> Any:
    """Compress run lengths that are written as a list of counts; leave others alone."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def covers(lengths: RunLengths, image_size: tuple[int, int]) -> bool:
    """Whether run lengths, as numbers or as text, add up to the pixels of an image.

    pycocotools checks nothing: with others it computes for ever, or writes beyond its memory.
    """
    counts, size = lengths.get("counts"), lengths.get("size")
    if not isinstance(size, list | tuple) or list(size) != list(image_size):
        return False
    if isinstance(counts, str | bytes):
        found = _read_text(counts if isinstance(counts, bytes) else counts.encode())
    elif isinstance(counts, list) and all(type(each) is int for each in counts):
        found = np.array(counts, dtype=object)
    else:
        return False
    return found is not None and bool((found >= 0).all()) and found.sum() == size[0] * size[1]


def _read_text(text: bytes) -> np.ndarray | None:
    """Return the run lengths of COCO's compressed form (pycocotools, maskApi.c), None for no such.

    Six bits a character from "0" on: five of a number, the lowest first, and one for more to come;
    from the fourth number on it is the difference to the last but one.
    """
    bits = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((bits & 32) == 0)
    if not len(ends) or bits.min() < 0 or bits.max() > 63 or ends[-1] != len(bits) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    places = 5 * (np.arange(len(bits)) - np.repeat(starts, ends - starts + 1))
    if places.max() > 35:  # more than any image has
        return None
    numbers = np.add.reduceat((bits & 31) << places, starts)
    numbers -= np.where(bits[ends] & 16, 1 << (places[ends] + 5), 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers


def decode(lengths: RunLengths) -> np.ndarray:
    """Return the mask of an encoding, bool (height, width)."""
    return mask_util.decode(lengths).astype(bool)


def _extent(filled: np.ndarray) -> tuple[int, int]:
    """First place with a pixel of the object, and the one after the last; (0, 0) for none."""
    places = np.flatnonzero(filled)
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)
