"""Masks of annotation files: what pycocotools would not survive is found before it sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask
import pytest

from vitdet.data.masks import _lengths_of, mask_fault
from vitdet.utils.run_lengths import encode_segmentation

mask_util: Any = pycocotools.mask
IMAGE = {"height": 30, "width": 40}


def _compressed(mask: np.ndarray) -> str:
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode("ascii")


@pytest.mark.parametrize("seed", range(20))
def test_lengths_are_those_that_pycocotools_wrote(seed: int) -> None:
    draw = np.random.default_rng(seed)
    size = tuple(int(side) for side in draw.integers(1, 400, 2))
    mask = draw.random(size) < draw.choice([0.0, 0.001, 0.1, 0.5, 0.999, 1.0])
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    wanted = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    wanted = [0, *wanted] if flat[0] else wanted
    assert _lengths_of(_compressed(mask)) == wanted
    image = {"height": size[0], "width": size[1]}
    segmentation = {"size": list(size), "counts": _compressed(mask)}
    fault = mask_fault(segmentation, image)
    assert (fault is None) is bool(mask.any())
    listed = {"size": list(size), "counts": wanted}
    assert mask_fault(listed, image) == fault
    if fault is None:
        for each in (segmentation, listed):
            drawn = mask_util.decode(encode_segmentation(each, size))
            assert np.array_equal(drawn.astype(bool), mask)


@pytest.mark.parametrize(
    "counts",
    [
        [0, 1300],
        [-5, 1205],
        [0, 1200.5],
        [0, float("nan"), 1200],
        ["0", "1200"],
        [[0], 1200],
        "x",
        "\x00",
        "ooooooooooooooooooo",
        "P",
        "",
        None,
        3,
    ],
)
def test_run_lengths_that_are_none(counts: Any) -> None:
    fault = mask_fault({"size": [30, 40], "counts": counts}, IMAGE)
    assert fault is not None
    assert fault[:2] == ("wrong mask", "run lengths that add up to 1200")


def test_polygons_far_away_would_take_all_memory() -> None:
    square = [5, 5, 15, 5, 15, 15]
    assert mask_fault([square], IMAGE) is None
    assert mask_fault([[-300, 5, 15, 5, 15, 15]], IMAGE) is None  # cut off at the edge
    for value in (1e9, -1e30, 401):
        fault = mask_fault([square, [value, 5, 15, 5, 15, 15]], IMAGE)
        assert fault is not None
        assert fault[:2] == ("wrong mask", "points near the image of 40 x 30")
