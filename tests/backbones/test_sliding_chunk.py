"""Sliding chunks: every kernel equals a brute-force list of what each query sees."""

import itertools

import pytest
import torch

from vitdet.backbones.msvit import sliding_chunk
from vitdet.backbones.msvit.sliding_chunk import (
    NEIGHBOURS,
    ChunkGrid,
    sliding_chunk_attention,
)

BACKENDS = ("strips", "autograd")
HEADS, DIM = 2, 4


def visible(grid, row, column):
    """List (token or -1 for filling, row offset, column offset) of what a query sees.

    Offsets are query minus key, as if the neighbouring chunk lay there where it is reached from.
    """
    side, found = grid.window, []
    slots = [(0, 0)] if grid.mode else list(itertools.product((-1, 0, 1), repeat=2))
    slots += [NEIGHBOURS[grid.mode - 1]] if grid.mode > 0 else []
    own = row // side, column // side
    for (down, right), i, j in itertools.product(slots, range(side), range(side)):
        chunk = own[0] + down, own[1] + right
        offset = row - (chunk[0] * side + i), column - (chunk[1] * side + j)
        wrapped = chunk[0] % grid.rows, chunk[1] % grid.columns
        r, c = wrapped[0] * side + i, wrapped[1] * side + j
        if grid.exact >= 0 and wrapped != chunk:
            continue
        if grid.exact == 1 and max(map(abs, offset)) > side:
            continue
        filling = r >= grid.height, c >= grid.width
        if any(fill and at == to for fill, at, to in zip(filling, chunk, wrapped, strict=True)):
            continue
        found.append((-1 if any(filling) else r * grid.width + c, *offset))
    return found


def brute_force(q, k, v, k_global, v_global, grid, table, global_bias):
    """Attend query by query."""
    k, v = (torch.cat([x.flatten(2, 3), torch.zeros_like(x[:, :, 0, :1])], 2) for x in (k, v))
    out, count = torch.zeros_like(q), k_global.shape[2]
    for row, column in itertools.product(range(grid.height), range(grid.width)):
        seen = visible(grid, row, column)
        token = torch.tensor([entry[0] for entry in seen])
        pairs = ((k_global, k), (v_global, v))
        keys, values = (torch.cat([g, x[:, :, token]], 2) for g, x in pairs)
        scores = (q[:, :, row, column, None] @ keys.mT)[:, :, 0] * q.shape[-1] ** -0.5
        if table is not None:
            offsets = torch.tensor([entry[1:] for entry in seen]) + 2 * grid.window - 1
            local = table[:, offsets[:, 0], offsets[:, 1]]
            scores = torch.cat([scores[..., :count], scores[..., count:] + local], -1)
        if global_bias is not None:
            scores = torch.cat([scores[..., :count] + global_bias, scores[..., count:]], -1)
        out[:, :, row, column] = (scores.softmax(-1)[:, :, None] @ values)[:, :, 0]
    return out


def inputs(height, width, window, count=2, biased=True, dtype=torch.float64, batch=2):
    """q, k, v, k_global, v_global and the two biases."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, HEADS, height, width, DIM, dtype=dtype) for _ in range(3))
    k_global, v_global = (torch.randn(batch, HEADS, count, DIM, dtype=dtype) for _ in range(2))
    side = 4 * window - 1
    table = torch.randn(HEADS, side, side, dtype=torch.float64) if biased else None
    bias = torch.randn(HEADS, count, dtype=torch.float64) if biased and count else None
    every = [q, k, v, k_global, v_global, table, bias]
    return [None if x is None else x.requires_grad_() for x in every]


def run(tensors, grid, backend):
    *five, table, bias = tensors
    return sliding_chunk_attention(*five, grid, table=table, global_bias=bias, backend=backend)


def gradients(out, tensors):
    torch.manual_seed(1)
    given = [x for x in tensors if x is not None]
    return torch.autograd.grad(out, given, torch.randn(out.shape).to(out))


@pytest.mark.parametrize("exact", [0, 1, -1])
@pytest.mark.parametrize("mode", range(-1, 9))
@pytest.mark.parametrize(("height", "width", "window"), [(5, 7, 3), (4, 3, 2), (1, 5, 2)])
def test_kernels_equal_brute_force(exact, mode, height, width, window):
    biased = (mode + height) % 2 == 0
    tensors = inputs(height, width, window, count=height % 3, biased=biased, batch=1)
    grid = ChunkGrid(height, width, window, exact, mode)
    expected = brute_force(*tensors[:5], grid, *tensors[5:])
    wanted = gradients(expected, tensors)
    for backend in BACKENDS:
        out = run(tensors, grid, backend)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        for got, want in zip(gradients(out, tensors), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scores", [1, 700, 5000])
def test_strips_is_the_same_at_any_height_and_holds_few_scores(scores, monkeypatch):
    tensors, grid = inputs(11, 13, 3), ChunkGrid(11, 13, 3)
    expected = run(tensors, grid, "autograd")
    assert torch.equal(run(tensors, grid, "auto"), run(tensors, grid, "strips"))
    monkeypatch.setattr(sliding_chunk, "_SCORES_ON_CPU", scores)
    sizes, softmax = [], torch.Tensor.softmax

    def noting(x, dim):
        sizes.append(x.numel())
        return softmax(x, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", noting)
    out = run(tensors, grid, "strips")
    torch.testing.assert_close(out, expected)
    pairs = zip(gradients(out, tensors), gradients(expected, tensors), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want)
    row = 2 * HEADS * 9 * 5 * (81 + 2)  # batch of two, five chunks of nine tokens
    assert max(sizes) <= max(scores, row)
    assert sum(sizes) == 2 * 4 * row  # forward and backward, four rows of chunks


def test_strips_keeps_full_precision_under_autocast():
    """The published operator computes in half precision on a GPU even where nobody asked for it."""
    tensors, grid = inputs(7, 8, 3, dtype=torch.float32), ChunkGrid(7, 8, 3)
    out = run(tensors, grid, "strips")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(tensors, grid, "strips")
    assert torch.equal(mixed, out)
    assert all(map(torch.equal, gradients(mixed, tensors), gradients(out, tensors)))
