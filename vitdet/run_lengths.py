"""Run-length encoding of predicted masks, in COCO's format.

pycocotools walks over every pixel of every mask. Most objects fill a small part of their image, so
here only the rectangle round an object is looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask

mask_util: Any = pycocotools.mask  # its type stubs know only one of each function's call forms

RunLengths = dict[str, Any]


def encode(masks: np.ndarray) -> list[RunLengths]:
    """Encode masks, to the same text as pycocotools.mask.encode.

    Args:
        masks: bool (N, height, width).

    Returns:
        {"size": [height, width], "counts": text} for each.
    """
    size = [int(side) for side in masks.shape[1:]]
    rows, columns = (np.logical_or.reduce(masks, axis=axis) for axis in (2, 1))
    found = []
    for mask, row, column in zip(masks, rows, columns, strict=True):
        ends = _ends(mask, np.flatnonzero(row), np.flatnonzero(column))
        counts = np.diff(ends, prepend=0, append=mask.size)
        if len(ends) and ends[-1] == mask.size:
            counts = counts[:-1]
        listed = {"size": size, "counts": counts.tolist()}
        encoded = mask_util.frPyObjects(listed, *size)
        found.append({"size": size, "counts": encoded["counts"].decode("ascii")})
    return found


def _ends(mask: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Where pixels change, counted down the columns (height, width) one after the other.

    Args:
        mask: bool (height, width).
        rows: those with a pixel of the object.
        columns: likewise.
    """
    if not len(rows):
        return rows
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    left, right = int(columns[0]), int(columns[-1]) + 1
    # One pixel more below each column, which is not the object's: there every run has ended.
    length = bottom - top + 1
    part = np.zeros((right - left, length), dtype=bool)
    part[:, :-1] = mask[top:bottom, left:right].T
    changes = np.flatnonzero(np.diff(part.ravel(), prepend=False))
    column, row = np.divmod(changes, length)
    ends = (left + column) * mask.shape[0] + top + row
    # A run from the image's lower edge goes on at the upper edge of the next column.
    apart = ends[1:-1:2] != ends[2::2]
    return ends[np.concatenate([[True], np.repeat(apart, 2), [True]])]
