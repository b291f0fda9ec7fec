"""The attention kinds of the Vision Longformer: definitions written out, and what was broken."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitdet.backbones.msvit import approximate
from vitdet.backbones.msvit.approximate import (
    FastAttention,
    InstanceNorm,
    LinformerAttention,
    PerformerAttention,
    SRAttention,
)
from vitdet.backbones.msvit.attention import FullAttention, OnlyGlobalAttention, VilAttention
from vitdet.backbones.msvit.positions import dense_bias, fit_axis, fit_grid, fit_offsets

DIM, HEADS = 8, 2

full = partial(FullAttention, DIM, HEADS, qkv_bias=True, map_size=6, rel_pos_resize="crop")
vil = partial(VilAttention, DIM, HEADS, qkv_bias=True, window_size=3)
only_global = partial(OnlyGlobalAttention, DIM, HEADS, qkv_bias=True)


def filled(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double()


def tokens(over: int, size: tuple[int, int]) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, over + size[0] * size[1], DIM, dtype=torch.float64)


def places(size: tuple[int, int]) -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(size[0]), torch.arange(size[1]))


# --- full attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 6), (4, 5), (3, 6), (1, 1)])
@pytest.mark.parametrize("over", [0, 2])
def test_full_attention_has_relative_positions_at_every_size(size, over):
    """The published one refuses every size but its own."""
    attn, x = filled(full(over, use_rel_pos=True)), tokens(over, size)
    q, k, v = attn.qkv(x).view(2, -1, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
    offsets = places(size)[:, None] - places(size)[None] + 5
    table = attn.local_relative_position_bias_table
    bias = torch.zeros(HEADS, x.shape[1], x.shape[1], dtype=torch.float64)
    bias[:, over:, over:] = table.view(11, 11, HEADS)[offsets[..., 0], offsets[..., 1]].permute(
        2, 0, 1
    )
    if over:
        bias[:, :over, :over] = attn.g2g_relative_position_bias
        bias[:, :over, over:] = attn.g2l_relative_position_bias[0][:, :, None]
        bias[:, over:, :over] = attn.g2l_relative_position_bias[1][:, None]
    weights = (q @ k.mT * (DIM // HEADS) ** -0.5 + bias).softmax(-1)
    expected = attn.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x, size), expected)


def test_full_attention_takes_maps_larger_than_its_table():
    attn = filled(full(1, use_rel_pos=True))
    out = attn(tokens(1, (9, 5)), (9, 5))
    assert out.shape == (2, 46, DIM)
    attn.rel_pos_resize = "interpolate"
    assert not torch.equal(attn(tokens(1, (9, 5)), (9, 5)), out)  # columns stretched too


def test_offsets_are_cropped_or_stretched():
    table = torch.arange(25.0).view(25, 1)  # S = 3
    square = table.view(1, 5, 5)
    assert torch.equal(fit_offsets(table, (3, 3), "interpolate"), square)
    assert torch.equal(fit_offsets(table, (2, 3), "crop"), square[:, 1:4])
    stretched = fit_offsets(table, (4, 3), "crop")  # rows are too few, columns fit
    assert stretched.shape == (1, 7, 5)
    torch.testing.assert_close(stretched[0, 3], square[0, 2])  # offset 0 stays in the middle
    torch.testing.assert_close(stretched[0, :, 2].diff()[1:-1], torch.full((4,), 5.0) * 5 / 7)
    small = fit_offsets(table, (2, 2), "interpolate")
    expected = F.interpolate(square[None], size=(3, 3), mode="bilinear", align_corners=False)
    assert torch.equal(small, expected[0])


def test_other_tables_are_cropped_or_stretched():
    line = torch.arange(4.0).view(1, 4, 1)
    assert fit_axis(line, 2, "crop").flatten().tolist() == [0, 1]
    assert fit_axis(line, 2, "interpolate").flatten().tolist() == [0.5, 2.5]
    assert fit_axis(line, 8, "crop").flatten().tolist() == [
        0,
        0.25,
        0.75,
        1.25,
        1.75,
        2.25,
        2.75,
        3,
    ]
    grid = torch.arange(9.0).view(9, 1)
    assert fit_grid(grid, (3, 3), "interpolate").flatten().tolist() == list(range(9))
    assert fit_grid(grid, (2, 3), "crop").flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert fit_grid(grid, (2, 6), "crop").shape == (12, 1)


def test_dense_bias_is_indexed_by_query_minus_key():
    bias = dense_bias(torch.arange(15.0).view(1, 3, 5))  # 2 x 3 places
    offsets = places((2, 3))[:, None] - places((2, 3))[None] + torch.tensor([1, 2])
    assert torch.equal(bias[0], (offsets[..., 0] * 5 + offsets[..., 1]).float())


# --- sliding chunks and global tokens ----------------------------------------------------------


@pytest.mark.parametrize("over", [0, 2])
def test_one_chunk_that_holds_the_map_is_full_attention(over):
    wide = filled(vil(over, use_rel_pos=False, share_weights=True, window_size=5))
    whole = filled(full(over, use_rel_pos=False))
    whole.qkv.weight.data = torch.cat([wide.query.weight, wide.kv.weight])
    whole.qkv.bias.data = torch.cat([wide.query.bias, wide.kv.bias])
    whole.proj.load_state_dict(wide.proj.state_dict())
    x = tokens(over, (4, 5))
    torch.testing.assert_close(wide(x, (4, 5)), whole(x, (4, 5)))


@pytest.mark.parametrize("make", [vil, only_global])
def test_global_tokens_have_weights_of_their_own_or_not(make):
    shared = filled(make(2, use_rel_pos=True, share_weights=True))
    assert not [name for name in shared.state_dict() if "_global." in name]
    own = filled(make(2, use_rel_pos=True, share_weights=False))
    state = shared.state_dict()
    own.load_state_dict(
        {name: state[name.replace("_global.", ".")] for name in own.state_dict()}, strict=True
    )
    x, size = tokens(2, (5, 4)), (5, 4)
    torch.testing.assert_close(own(x, size), shared(x, size))
    for name in ("query_global", "kv_global", "proj_global"):
        nn.init.normal_(own.get_submodule(name).weight)
    assert torch.equal(own(x, size)[:, 2:], shared(x, size)[:, 2:])  # the map's tokens stay
    assert (own(x, size)[:, :2] - shared(x, size)[:, :2]).abs().min() > 1e-3


def test_only_global_tokens_carry_information_across_the_map():
    attn, size = filled(only_global(2, use_rel_pos=True, share_weights=True)), (5, 4)
    assert attn.local_relative_position_bias_table is None  # no pair of the map's tokens meets
    x = tokens(2, size)
    changed = x.clone()
    changed[:, 2] += 1  # the first token of the map
    difference = (attn(x, size) - attn(changed, size)).abs().sum((0, 2)) > 1e-9
    assert difference.tolist() == [True, True, True] + [False] * 19


def test_random_neighbours_in_training_alone():
    attn, size = filled(vil(1, use_rel_pos=True, share_weights=True, mode=1)), (7, 7)
    every = filled(vil(1, use_rel_pos=True, share_weights=True))
    x = tokens(1, size)
    assert torch.equal(attn.eval()(x, size), every(x, size))
    attn.train()
    torch.manual_seed(0)
    drawn = [attn.draw_mode() for _ in range(400)]
    assert sorted(set(drawn)) == list(range(1, 9))
    assert min(drawn.count(k) for k in range(1, 9)) > 25
    torch.manual_seed(0)
    first = attn(x, size)
    fixed = filled(vil(1, use_rel_pos=True, share_weights=True))
    fixed.draw_mode = lambda: drawn[0]
    assert torch.equal(first, fixed(x, size))
    attn.mode = -1
    assert attn.draw_mode() == -1
    assert attn.eval().draw_mode() == -1


# --- the approximations ------------------------------------------------------------------------


def test_instance_norm_has_the_right_gradient():
    """torch's own has not, for one image and a gradient that is not contiguous (torch 2.15)."""
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    norm = InstanceNorm()
    expected = F.instance_norm(x, eps=1e-5)
    torch.testing.assert_close(norm(x), expected)
    assert torch.autograd.gradcheck(lambda x: norm(x).flatten(2).mT, (x,))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (2, 3), (1, 1), (3, 1)])
def test_srformer_takes_every_size(size):
    """The published one stops at a map that is reduced to one place."""
    attn = filled(SRAttention(DIM, HEADS, 1, qkv_bias=True, reduction=2))
    x = tokens(1, size)
    image = x[:, 1:].mT.unflatten(2, size)
    image = F.pad(image, (0, max(0, 2 - size[1]), 0, max(0, 2 - size[0])))
    reduced = F.conv2d(image, attn.proj_sr.weight, stride=2).flatten(2)
    mean, variance = reduced.mean(2, keepdim=True), reduced.var(2, keepdim=True, unbiased=False)
    keys = torch.cat([x[:, :1], ((reduced - mean) / (variance + 1e-5).sqrt()).mT], 1)
    q = attn.query(x).view(2, -1, HEADS, DIM // HEADS).transpose(1, 2)
    k, v = attn.kv(keys).view(2, -1, 2, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT * (DIM // HEADS) ** -0.5).softmax(-1)
    expected = attn.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x, size), expected)


@pytest.mark.parametrize("share_kv", [True, False])
def test_linformer_takes_every_number_of_tokens(share_kv):
    """The published one refuses every length but its own."""
    make = partial(LinformerAttention, DIM, HEADS, 1, qkv_bias=True, num_features=3)
    attn = filled(make(share_kv=share_kv, map_size=4, resize="crop"))
    assert (attn.proj_v is None) == share_kv
    for size in ((4, 4), (3, 2), (6, 4), (9, 9)):
        x = tokens(1, size)
        q = attn.query(x).view(2, -1, HEADS, DIM // HEADS).transpose(1, 2)
        k, v = attn.kv(x).view(2, -1, 2, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)
        for_k = attn.proj_k
        if size == (3, 2):
            for_k = attn.proj_k[[0, 1, 2, 5, 6, 9, 10]]
        elif size != (4, 4):
            local = fit_grid(attn.proj_k[1:], size, "crop")
            for_k = torch.cat([attn.proj_k[:1], local])
            assert len(for_k) == 1 + size[0] * size[1]
        if not share_kv:
            attn.proj_v.data.copy_(attn.proj_k)
        k, v = (torch.einsum("lf,bnld->bnfd", for_k, each) for each in (k, v))
        weights = (q @ k.mT * (DIM // HEADS) ** -0.5).softmax(-1)
        expected = attn.proj((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(attn(x, size), expected)


def test_performer_approaches_softmax_attention(monkeypatch):
    monkeypatch.setattr(approximate, "_KERNEL_EPS", 0.0)  # keeps features from zero: a bias
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 10, 4).double() * 0.7
    exact = F.scaled_dot_product_attention(q, k, v)
    errors = []
    for number in (8, 64, 4096):
        fast = FastAttention(4, number)
        fast.redraw(0)
        errors.append(float((fast.double()(q, k, v) - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1  # 0.25 if the first direction of each block lay in one half


def test_performer_features_are_orthogonal_and_a_function_of_the_seed():
    fast, same = FastAttention(8, 20), FastAttention(8, 20)
    state = torch.get_rng_state()
    fast.redraw(3)
    same.redraw(3)
    assert torch.equal(torch.get_rng_state(), state)  # nothing else is drawn differently
    assert torch.equal(fast.projection_matrix, same.projection_matrix)
    same.redraw(4)
    assert not torch.equal(fast.projection_matrix, same.projection_matrix)
    directions = F.normalize(fast.projection_matrix[:8], dim=1)
    torch.testing.assert_close(directions @ directions.T, torch.eye(8), rtol=0, atol=1e-5)
    lengths = fast.projection_matrix.norm(dim=1)
    assert len(set(lengths.tolist())) == 20  # lengths of normal vectors, not one length


def test_performer_is_float32_inside_mixed_precision():
    attn = PerformerAttention(DIM, HEADS, qkv_bias=True, num_features=6)
    attn.fast_attention.redraw(0)
    q, k, v = torch.randn(3, 1, HEADS, 9, DIM // HEADS)
    expected = attn.fast_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attn.fast_attention(q, k, v), expected)
        half = attn.fast_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)
