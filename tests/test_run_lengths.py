from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import pytest

from vitdet.utils.run_lengths import covers, encode


def _theirs(masks: np.ndarray) -> list[dict]:
    found = mask_util.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    return [{"size": each["size"], "counts": each["counts"].decode("ascii")} for each in found]


def _mask(*places: tuple[slice, slice], size: tuple[int, int] = (7, 9)) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    for place in places:
        mask[place] = True
    return mask


MASKS = {
    "nothing": _mask(),
    "everything": _mask(np.s_[:, :]),
    "one pixel": _mask(np.s_[3:4, 5:6]),
    "first pixel": _mask(np.s_[0:1, 0:1]),
    "last pixel": _mask(np.s_[6:7, 8:9]),
    "inside": _mask(np.s_[2:5, 3:6]),
    "whole columns": _mask(np.s_[:, 2:5]),  # one run over three columns
    "last columns": _mask(np.s_[:, 6:]),
    "whole rows": _mask(np.s_[3:5, :]),
    "frame": _mask(np.s_[0], np.s_[6], np.s_[:, 0], np.s_[:, 8]),
    "two corners": _mask(np.s_[:2, :2], np.s_[5:, 7:]),
    "from edge to edge": _mask(np.s_[4:, 2], np.s_[:3, 3]),  # one run over two columns
    "columns apart": _mask(np.s_[:, 1], np.s_[:, 4]),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_text_is_that_of_pycocotools(name):
    masks = MASKS[name][None]
    assert encode(masks) == _theirs(masks)
    np.testing.assert_array_equal(mask_util.decode(encode(masks)[0]), MASKS[name])


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (13, 1), (31, 17), (40, 300)])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_noise(size, share):
    masks = np.random.default_rng(0).random((5, *size)) < share
    assert encode(masks) == _theirs(masks)


def test_large_shapes_beside_small_ones():
    y, x = np.mgrid[:200, :300]
    rng = np.random.default_rng(1)
    masks = np.stack(
        [
            (x - rng.uniform(0, 300)) ** 2 + (y - rng.uniform(0, 200)) ** 2 < radius**2
            for radius in (1, 3, 10, 50, 150, 400)
        ]
    )
    assert encode(masks) == _theirs(masks)


def test_masks_that_lie_otherwise_in_memory():
    masks = np.random.default_rng(2).random((20, 30, 3)) < 0.3
    assert encode(masks.transpose(2, 0, 1)) == _theirs(masks.transpose(2, 0, 1))


def test_no_masks():
    assert encode(np.zeros((0, 20, 30), dtype=bool)) == []


def test_run_lengths_that_cover_their_image():
    rng = np.random.default_rng(0)
    for density in (0, 0.01, 0.5, 0.99, 1):
        pixels = rng.random((30, 70, 90)) < density
        for mask, encoded in zip(pixels, encode(pixels), strict=True):
            assert covers(encoded, (70, 90))
            assert covers(encoded | {"counts": encoded["counts"].encode()}, (70, 90))
            assert not covers(encoded, (90, 70))
            for wrong in (encoded["counts"] + "1", encoded["counts"][:-1], "", 7, [6299]):
                assert not covers(encoded | {"counts": wrong}, (70, 90))
            ends = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
            counts = np.diff([0, *ends, mask.size]).tolist()
            assert covers(encoded | {"counts": counts}, (70, 90))
            assert not covers(encoded | {"counts": [*counts, -1, 1]}, (70, 90))
