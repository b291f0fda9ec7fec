"""Attention by blocks: the same numbers wherever the blocks are cut."""

from __future__ import annotations

import pytest
import torch

from vitdet.layers.attention import attention, automatic
from vitdet.layers.kernels import blocks, eager
from vitdet.layers.rel_pos import RelPos

B, N, H, W, D = 2, 3, 5, 7, 8
L = H * W


def tensors(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, N, L, D)] * 3 + [(B, N, L, H), (B, N, L, W)]
    made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [each.requires_grad_() for each in made]


# several heads a block, with a rest; one head; some queries of a head, with a rest; one query
@pytest.mark.parametrize("size", [4 * L * L, L * L, 6 * L, 3])
@pytest.mark.parametrize("with_rel_pos", [True, False])
def test_cut_anywhere(monkeypatch: pytest.MonkeyPatch, size: int, with_rel_pos: bool) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", size)
    results = []
    for kernel in (blocks.attention, eager.attention):
        q, k, v, h, w = tensors()
        out = kernel(q, k, v, RelPos(h, w) if with_rel_pos else None, 0.3)
        inputs = [q, k, v, h, w] if with_rel_pos else [q, k, v]
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        results.append([out, *(each.grad for each in inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_block_slices_cover_every_score_once() -> None:
    seen = torch.zeros(7, L)
    for pairs, rows in blocks._block_slices(7, L, 90):
        seen[pairs, rows] += 1
    assert (seen == 1).all()


def test_fewer_queries_than_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BLOCK", 2 * L)
    q, k, v, *_ = tensors()
    got = attention(q[:, :, :4], k, v, backend="blocks")
    expected = eager.attention(q[:, :, :4], k, v, None, D**-0.5)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_scores_far_from_zero_do_not_overflow() -> None:
    q, k, v, h, w = tensors(torch.float32)
    rel_pos = RelPos(500 + 0 * h, w)
    got = blocks.attention(40 * q, k, v, rel_pos, 1.0)
    torch.testing.assert_close(got, eager.attention(40 * q, k, v, rel_pos, 1.0))


def test_no_images() -> None:
    empty = torch.zeros(0, N, L, D)
    assert blocks.attention(empty, empty, empty, None, 1.0).shape == (0, N, L, D)


def test_gradients_of_gradients_are_refused() -> None:
    q, k, v, h, w = tensors()
    out = blocks.attention(q, k, v, RelPos(h, w), 1.0)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_bits_are_computed_with_more(dtype: torch.dtype) -> None:
    short = [each.detach().to(dtype).requires_grad_() for each in tensors()]
    exact = [each.detach().double().requires_grad_() for each in short]
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v, h, w = short
        got = blocks.attention(q, k, v, RelPos(h, w), 0.3)
        got.sum().backward()
    q, k, v, h, w = exact
    expected = eager.attention(q, k, v, RelPos(h, w), 0.3)
    expected.sum().backward()
    assert got.dtype == dtype
    rounding = torch.finfo(dtype).eps  # of the result alone
    torch.testing.assert_close(got.double(), expected, rtol=rounding, atol=1e-5)
    for ours, theirs in zip(short, exact, strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype == dtype
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=rounding, atol=1e-5)


def test_automatic_takes_it_with_positions_on_a_cpu() -> None:
    q, *_, h, w = (each.detach() for each in tensors(torch.float32))
    assert automatic(q, RelPos(h, w)) == "blocks"
    assert automatic(q, None) == "sdpa"
    assert automatic(q.bfloat16(), RelPos(h.bfloat16(), w.bfloat16())) == "blocks"
    assert automatic(q.to("meta"), RelPos(h.to("meta"), w.to("meta"))) == "sdpa"
