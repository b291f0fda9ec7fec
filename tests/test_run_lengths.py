"""Run lengths are pycocotools' own, and only those that fit their image are handed to it."""

import numpy as np
import pycocotools.mask as mask_util
import pytest

from vitdet.utils.run_lengths import covers, decode, encode


def _theirs(masks):
    found = mask_util.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    return [{"size": each["size"], "counts": each["counts"].decode("ascii")} for each in found]


def _cases():
    """Masks, (N, height, width), whose runs begin, end and go on at all edges."""
    places = {
        "nothing": (),
        "everything": (np.s_[:, :],),
        "one pixel": (np.s_[3:4, 5:6],),
        "first pixel": (np.s_[0:1, 0:1],),
        "last pixel": (np.s_[6:7, 8:9],),
        "whole columns": (np.s_[:, 2:5],),  # one run over three columns
        "last columns": (np.s_[:, 6:],),
        "whole rows": (np.s_[3:5, :],),
        "frame": (np.s_[0], np.s_[6], np.s_[:, 0], np.s_[:, 8]),
        "from edge to edge": (np.s_[4:, 2], np.s_[:3, 3]),  # one run over two columns
        "columns apart": (np.s_[:, 1], np.s_[:, 4]),
    }
    found = {"no masks": np.zeros((0, 20, 30), dtype=bool)}
    for name, parts in places.items():
        found[name] = np.zeros((1, 7, 9), dtype=bool)
        for part in parts:
            found[name][0][part] = True
    rng = np.random.default_rng(0)
    for size in ((1, 1), (1, 13), (13, 1), (40, 300)):
        for share in (0.02, 0.5, 0.98):
            found[f"noise {size} {share}"] = rng.random((5, *size)) < share
    found["other memory"] = (rng.random((20, 30, 3)) < 0.3).transpose(2, 0, 1)
    return found


@pytest.mark.parametrize("name", CASES := _cases())
def test_the_text_is_that_of_pycocotools(name):
    masks = CASES[name]
    assert encode(masks) == _theirs(masks)
    for mask, lengths in zip(masks, encode(masks), strict=True):
        np.testing.assert_array_equal(decode(lengths), mask)


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
