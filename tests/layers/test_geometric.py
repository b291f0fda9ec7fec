"""The cubic resize of position tables, by the properties that define it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from vitdet.layers.geometric import cubic_spline_weights, resize_rel_pos_geometric
from vitdet.utils.checks import InputError

POINTS = torch.tensor([-3.0, -1.5, 0.0, 1.0, 2.0, 5.0, 6.5], dtype=torch.float64)


def spline(y: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(cubic_spline_weights(POINTS.numpy(), places.numpy())) @ y


def test_a_cubic_is_reproduced_and_continued():
    def cubic(x: torch.Tensor) -> torch.Tensor:
        return 2 * x**3 - x**2 + 3 * x - 1

    places = torch.linspace(-6, 9, 31, dtype=torch.float64)
    torch.testing.assert_close(spline(cubic(POINTS), places), cubic(places), rtol=0, atol=1e-10)


def test_the_spline_goes_through_its_points_smoothly():
    torch.manual_seed(0)
    y = torch.randn(7, dtype=torch.float64)
    assert torch.equal(spline(y, POINTS), y)
    step = 1e-3
    offsets = torch.tensor([-3, -2, -1, 1, 2, 3], dtype=torch.float64) * step
    for i, point in enumerate(POINTS[1:-1], 1):
        left = [*spline(y, point + offsets[:3]).tolist(), y[i].item()]
        right = [y[i].item(), *spline(y, point + offsets[3:]).tolist()]

        def derivatives(values: list[float]) -> torch.Tensor:
            """First to third derivative of the cubic through four points, at point i."""
            at = torch.arange(4, dtype=torch.float64) * step
            at = at if values is right else at - 3 * step  # noqa: B023 (called at once)
            powers = torch.stack([at**k for k in range(4)], dim=1)
            solution = torch.linalg.solve(powers, torch.tensor(values, dtype=torch.float64))
            return solution[1:] * torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)

        before, after = derivatives(left), derivatives(right)
        torch.testing.assert_close(before[:2], after[:2], rtol=0, atol=1e-4)
        if i in (1, 5):  # "not-a-knot": even the third derivative goes on
            torch.testing.assert_close(before[2], after[2], rtol=0, atol=1e-2)
        else:
            assert (before[2] - after[2]).abs() > 0.1


def test_near_offsets_stay_and_far_ones_come_from_nearer_rows():
    torch.manual_seed(0)
    table = torch.randn(9, 3)  # S = 5
    resized = resize_rel_pos_geometric(table, 8)
    assert resized.shape == (15, 3)
    torch.testing.assert_close(resized[6:9], table[3:6], rtol=0, atol=1e-6)  # offsets -1, 0, 1
    q = 1.0903078
    distances = torch.tensor([0, 1, 1 + q, 1 + q + q**2, 1 + q + q**2 + q**3])
    linear = torch.cat([-distances.flip(0)[:-1], distances])[:, None]
    offsets = torch.arange(-7.0, 8.0)[:, None]
    torch.testing.assert_close(resize_rel_pos_geometric(linear, 8), offsets, rtol=0, atol=1e-5)


def test_a_table_that_fits_is_itself_and_learns_others_do_not():
    table = torch.randn(9, 4, requires_grad=True)
    assert resize_rel_pos_geometric(table, 5) is table
    assert not resize_rel_pos_geometric(table, 6).requires_grad
    half = resize_rel_pos_geometric(table.bfloat16(), 6)
    assert half.dtype == torch.bfloat16
    assert resize_rel_pos_geometric(table.to("meta"), 6).shape == (11, 4)


def test_what_ran_under_a_fake_mode_is_forgotten():
    table = torch.randn(9, 4)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(resize_rel_pos_geometric(table, 11), FakeTensor)
    with torch.device("meta"):
        resize_rel_pos_geometric(torch.randn(9, 4), 13)
    for size in (11, 13):
        real = resize_rel_pos_geometric(table, size)
        assert type(real) is torch.Tensor
        assert real.device.type == "cpu"
        torch.testing.assert_close(real[size - 1], table[4])  # the offset zero stays


def test_a_compiled_graph_is_not_cut():
    compiled = torch.compile(resize_rel_pos_geometric, backend="aot_eager", fullgraph=True)
    table = torch.randn(9, 4)
    torch.testing.assert_close(compiled(table, 7), resize_rel_pos_geometric(table, 7))


def test_autocast_does_not_round_the_weights():
    table = torch.randn(9, 4)
    exact = resize_rel_pos_geometric(table, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize_rel_pos_geometric(table, 7), exact)


def test_three_rows_make_no_cubic():
    text = r"rel_pos with resize 'beit': expected a table of at least 5 rows, got 3 rows\."
    with pytest.raises(InputError, match=text):
        resize_rel_pos_geometric(torch.zeros(3, 4), 4)
