"""Positions, absolute, relative and rotary, against their definitions."""

import cmath

import pytest
import torch
from timm.layers import resample_abs_pos_embed
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vitdet.layers.positions import resize_pos_embed, resize_rel_pos
from vitdet.layers.rope import Dinov3Rope, EvaRope, make_ropes, rotate
from vitdet.utils.checks import InputError

CPU = torch.device("cpu")


def test_pos_embed_modes():
    torch.manual_seed(0)
    table = torch.randn(1, 49, 6)
    grid = table.reshape(1, 7, 7, 6)
    assert torch.equal(resize_pos_embed(table, (7, 7)), grid)
    assert torch.equal(resize_pos_embed(table, (3, 5), "crop"), grid[:, :3, :5])
    timm = resample_abs_pos_embed(table, [4, 9], [7, 7], num_prefix_tokens=0)
    ours = resize_pos_embed(table, (4, 9), "bicubic_antialias")
    torch.testing.assert_close(ours, timm.reshape(1, 4, 9, 6), rtol=0, atol=1e-6)
    assert (resize_pos_embed(table, (4, 9)) - ours).abs().max() > 0.1
    tiled = resize_pos_embed(table, (4, 15), "tile")
    rows, columns = torch.arange(4), torch.arange(15) % 7
    assert torch.equal(tiled, grid[:, rows][:, :, columns])
    halves = resize_pos_embed(table[:, :2], (1, 4), "bilinear", (1, 2))[0, 0]
    shares = torch.tensor([1.0, 0.75, 0.25, 0.0])[:, None]
    torch.testing.assert_close(halves, table[0, 0] * shares + table[0, 1] * (1 - shares))
    with pytest.raises(InputError, match="a map of at most 7x7 tokens, got 8x3"):
        resize_pos_embed(table, (8, 3), "crop")
    with pytest.raises(InputError, match="a square grid, without a class row, got 50 rows"):
        resize_pos_embed(torch.zeros(1, 50, 6), (7, 7))


def test_crop_keeps_the_offsets_and_interpolation_stretches_them():
    table = torch.arange(-6.0, 7.0)[:, None]  # S = 7, the value is the offset
    assert resize_rel_pos(table, 4, "crop")[:, 0].tolist() == [-3, -2, -1, 0, 1, 2, 3]
    stretched = resize_rel_pos(table, 4, "interpolate")[:, 0]
    assert stretched[3] == 0
    assert stretched[4] == pytest.approx(13 / 7)  # one of our tokens is 13 / 7 of the table's
    assert resize_rel_pos(table, 7) is table
    with pytest.raises(InputError, match="expected at most 7 tokens along an axis, got 8"):
        resize_rel_pos(table, 8, "crop")
    with pytest.raises(InputError, match=r"'beit': expected a table of at least 5 rows, got 3 r"):
        resize_rel_pos(torch.zeros(3, 4), 4, "beit")


# --- BEiT's cubic resize -----------------------------------------------------------------------


def test_near_offsets_stay_and_far_ones_come_from_nearer_rows():
    torch.manual_seed(0)
    table = torch.randn(9, 3)  # S = 5
    resized = resize_rel_pos(table, 8, "beit")
    torch.testing.assert_close(resized[6:9], table[3:6], rtol=0, atol=1e-6)  # offsets -1, 0, 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_rel_pos(table, 8, "beit"), resized)
    q = 1.0903078
    distances = torch.tensor([0, 1, 1 + q, 1 + q + q**2, 1 + q + q**2 + q**3])
    linear = torch.cat([-distances.flip(0)[:-1], distances])[:, None]
    offsets = torch.arange(-7.0, 8.0)[:, None]
    torch.testing.assert_close(resize_rel_pos(linear, 8, "beit"), offsets, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_spline_is_a_constant_of_compiled_code():
    table = torch.randn(9, 3)
    compiled = torch.compile(resize_rel_pos, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(table, 8, "beit"), resize_rel_pos(table, 8, "beit"))


def test_what_ran_under_a_fake_mode_is_forgotten():
    table = torch.randn(9, 4, requires_grad=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(resize_rel_pos(table, 11, "beit"), FakeTensor)
    assert resize_rel_pos(table.to("meta"), 13, "beit").shape == (25, 4)
    for size in (11, 13):
        real = resize_rel_pos(table, size, "beit")
        assert type(real) is torch.Tensor
        assert not real.requires_grad
        torch.testing.assert_close(real[size - 1], table[4].detach())  # the offset zero stays


# --- rotary ------------------------------------------------------------------------------------


def angle(token, size, pair, head_dim, places, grid):
    """The definition: the first half of the pairs turns by the row, the second by the column."""
    row, column = divmod(token, size[1])
    quarter = head_dim // 4
    axis = int(pair >= quarter)
    position = (row, column)[axis] / places[axis] * grid
    return position * 10000 ** (-2 * (pair - axis * quarter) / (head_dim // 2))


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
def test_tables_equal_the_formula_and_turn_pairs_like_complex_numbers(size, places, grid, head_dim):
    tables = EvaRope(head_dim, (grid, grid), places)(size, size, CPU)
    L, pairs = size[0] * size[1], range(head_dim // 2)
    angles = torch.tensor(
        [[angle(i, size, pair, head_dim, places, grid) for pair in pairs] for i in range(L)],
        dtype=torch.float64,
    )
    # the largest angles are near 40, where float32 is good to 4e-6
    for table, function in ((tables.cos, torch.cos), (tables.sin, torch.sin)):
        expected = function(angles).repeat_interleave(2, dim=1)
        torch.testing.assert_close(table.double(), expected, rtol=0, atol=5e-6)
    assert tables.cos.dtype == torch.float32
    x = torch.randn(1, 1, L, head_dim, dtype=torch.float64)
    got = rotate(x, tables)
    for token, pair in ((0, 0), (L - 1, 1), (L // 2, head_dim // 2 - 1)):
        before, after = (complex(*y[0, 0, token, 2 * pair : 2 * pair + 2]) for y in (x, got))
        assert abs(before * cmath.exp(1j * angles[token, pair].item()) - after) < 2e-5
    low = rotate(x.bfloat16(), tables)
    assert torch.equal(low, rotate(x.bfloat16().float(), tables).bfloat16())


def test_perception_encoder_has_columns_first_and_counts_from_one():
    window, whole = make_ropes("pe", 8, 4, (8, 8))
    for rope, size, step in ((window, (2, 2), 2.0), (whole, (8, 8), 0.5), (whole, (2, 5), 0.5)):
        tables, frequencies = rope(size, size, CPU), torch.tensor([1.0, 1.0, 0.01, 0.01])
        places = torch.cartesian_prod(*map(torch.arange, size)) * step + 1
        angles = torch.cat([places[:, 1:] * frequencies, places[:, :1] * frequencies], dim=1)
        torch.testing.assert_close(tables.cos, angles.cos())
        torch.testing.assert_close(tables.sin, angles.sin())
    assert make_ropes("pe", 8, None, (8, 8))[0]((1, 3), (1, 3), CPU).sin[:, 0].tolist() == (
        pytest.approx(torch.tensor([1.0, 2.0, 3.0]).sin().tolist())
    )


def test_heads_must_split_into_rows_columns_and_pairs():
    with pytest.raises(InputError, match=r"a head of a multiple of 4 channels, got 6\. Change"):
        make_ropes("eva02", 48 / 8, 16, (4, 4))


@pytest.mark.parametrize("rope", [EvaRope(8, (4, 4), (4, 4)), Dinov3Rope(8)])
def test_a_trace_follows_the_size_of_the_map(rope):
    """One exported file is for maps of any size."""

    def cosines(x):
        size = (x.shape[0], x.shape[1])
        return rope(size, size, x.device).cos

    traced = torch.jit.trace(cosines, torch.zeros(4, 6))
    other = torch.zeros(3, 5)
    torch.testing.assert_close(traced(other), cosines(other), rtol=0, atol=0)
