"""Rotary positions against their formula, one token and one pair of channels at a time."""

from __future__ import annotations

import cmath

import pytest
import torch

from vitdet.layers.rope import check_head_dim, rotary_tables, rotate
from vitdet.utils.checks import InputError


def angle(token: int, size: tuple[int, int], pair: int, head_dim: int, places, grid) -> float:
    """The definition: the first half of the pairs turns by the row, the second by the column."""
    row, column = divmod(token, size[1])
    quarter = head_dim // 4
    if pair < quarter:
        position, frequency = row / places[0] * grid, pair
    else:
        position, frequency = column / places[1] * grid, pair - quarter
    return position * 10000 ** (-2 * frequency / (head_dim // 2))


@pytest.mark.parametrize("head_dim", [4, 16, 64])
@pytest.mark.parametrize(
    ("size", "places", "grid"),
    [
        ((16, 16), (16, 16), 16),  # a window
        ((20, 50), (20, 20), 16),  # 320 x 800 pixels, which continues the positions of 320 x 320
        ((20, 50), (20, 50), 16),  # the same, stretched
        ((3, 5), (1, 1), 1),  # not interpolated
        ((1, 7), (4, 4), 14),
    ],
)
def test_tables_equal_the_formula(size, places, grid, head_dim):
    tables = rotary_tables(size, head_dim, places=places, grid=(grid, grid))
    L = size[0] * size[1]
    angles = torch.tensor(
        [
            [angle(i, size, c // 2, head_dim, places, grid) for c in range(head_dim)]
            for i in range(L)
        ],
        dtype=torch.float64,
    )
    assert tables.cos.shape == tables.sin.shape == (L, head_dim)
    assert tables.cos.dtype == torch.float32
    # the largest angles are near 40, where float32 is good to 4e-6
    torch.testing.assert_close(tables.cos.double(), angles.cos(), rtol=0, atol=5e-6)
    torch.testing.assert_close(tables.sin.double(), angles.sin(), rtol=0, atol=5e-6)


def test_pairs_of_neighbouring_channels_turn_like_complex_numbers():
    torch.manual_seed(0)
    size, head_dim = (2, 3), 8
    x = torch.randn(1, 2, 6, head_dim, dtype=torch.float64)
    got = rotate(x, rotary_tables(size, head_dim, places=(2, 2), grid=(16, 16)))
    for n in range(2):
        for token in range(6):
            for pair in range(head_dim // 2):
                turn = cmath.exp(1j * angle(token, size, pair, head_dim, (2, 2), 16))
                before = complex(*x[0, n, token, 2 * pair : 2 * pair + 2].tolist())
                after = complex(*got[0, n, token, 2 * pair : 2 * pair + 2].tolist())
                assert abs(before * turn - after) < 1e-5


def test_products_depend_on_the_offset_alone():
    """The same query and key everywhere: their product is a function of the offset of the places.

    This is what makes it right to continue the positions over a rectangle.
    """
    torch.manual_seed(0)
    size, head_dim = (4, 9), 16
    tables = rotary_tables(size, head_dim, places=(4, 4), grid=(16, 16))
    query, key = torch.randn(2, head_dim)
    everywhere = torch.ones(1, 1, size[0] * size[1], 1)
    q, k = rotate(query * everywhere, tables)[0, 0], rotate(key * everywhere, tables)[0, 0]
    products = (q @ k.T).reshape(*size, *size)
    seen: dict[tuple[int, int], float] = {}
    for i in range(size[0]):
        for j in range(size[1]):
            for a in range(size[0]):
                for b in range(size[1]):
                    value = products[i, j, a, b].item()
                    assert value == pytest.approx(seen.setdefault((i - a, j - b), value), abs=2e-5)
    assert len({round(value, 3) for value in seen.values()}) > 100


def test_a_map_is_a_cut_of_a_larger_one():
    large = rotary_tables((6, 8), 16, places=(6, 6), grid=(16, 16))
    small = rotary_tables((4, 5), 16, places=(6, 6), grid=(16, 16))
    for whole, part in ((large.cos, small.cos), (large.sin, small.sin)):
        assert torch.equal(whole.reshape(6, 8, 16)[:4, :5].flatten(0, 1), part)


def test_low_precision_inputs_are_turned_in_float32():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 6, 16).bfloat16()
    tables = rotary_tables((2, 3), 16, places=(2, 3), grid=(16, 16))
    low = rotate(x, tables)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, rotate(x.float(), tables).bfloat16())


def test_no_number_is_needed_to_know_the_shapes():
    tables = rotary_tables((20, 50), 64, device=torch.device("meta"))
    assert tables.cos.shape == (1000, 64)
    assert rotate(torch.empty(2, 3, 1000, 64, device="meta"), tables).shape == (2, 3, 1000, 64)


def test_heads_must_split_into_rows_columns_and_pairs():
    check_head_dim(48, 3)
    with pytest.raises(InputError, match=r"a head of a multiple of 4 channels, out of 48, got 8"):
        check_head_dim(48, 8)


def test_frequencies_span_one_to_theta():
    tables = rotary_tables((2, 1), 64, theta=100.0)
    angles = tables.sin[1].double().asin()
    assert angles[0].item() == pytest.approx(1.0, abs=1e-6)
    assert angles[31].item() == pytest.approx(100 ** (-30 / 32), abs=1e-6)
    assert tables.sin[1, 63].item() == 0.0  # one column: no turn
