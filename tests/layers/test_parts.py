"""Windows, positions, norms, propagation and stochastic depth against their definitions."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import get_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import resample_abs_pos_embed

from vitdet.layers.drop_path import DropPath, drop_path_rates
from vitdet.layers.norms import ChannelLayerNorm, channel_layer_norm
from vitdet.layers.patch_embed import PatchEmbed
from vitdet.layers.pos_embed import resize_pos_embed
from vitdet.layers.propagation import ConvPropagation
from vitdet.layers.windows import window_partition, window_reverse
from vitdet.utils.checks import InputError


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_windows_there_and_back(B, H, W, window):
    x = torch.arange(B * H * W * 2.0).reshape(B, H, W, 2) + 1
    windows = window_partition(x, window)
    assert windows.shape == (B * -(-H // window) * -(-W // window), window, window, 2)
    assert windows.count_nonzero() == x.numel()  # the rest is padding, zero
    assert torch.equal(window_reverse(windows, (H, W)), x)


def test_windows_are_squares_of_neighbours_padded_right_and_below():
    x = torch.arange(6.0).reshape(1, 2, 3, 1)
    first, second = window_partition(x, 2)[..., 0]
    assert first.tolist() == [[0, 1], [3, 4]]
    assert second.tolist() == [[2, 0], [5, 0]]


def test_channel_norm_equals_detectron2():
    torch.manual_seed(0)
    ours, theirs = ChannelLayerNorm(6), get_norm("LN", 6)
    state = {"weight": torch.randn(6), "bias": torch.randn(6)}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(2, 6, 3, 5) * 0.01  # small, so that eps shows
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    assert channel_layer_norm(eps=1e-5)(6).eps == 1e-5


def test_propagation_starts_as_the_identity():
    x = torch.randn(1, 4, 5, 8)
    block = ConvPropagation(8)
    assert torch.equal(block(x), x)
    torch.nn.init.ones_(block.norm3.weight)
    assert not torch.equal(block(x), x)


def test_drop_path_keeps_the_mean_and_is_off_in_evaluation():
    torch.manual_seed(0)
    drop = DropPath(0.25)
    out = drop(torch.ones(4000, 1, 2))
    assert out.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(out[..., 0], out[..., 1])  # a sample is dropped as a whole
    assert out.mean() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(out), out)
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\), got 1"):
        DropPath(1)


def test_drop_path_rates_grow_linearly():
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0]


def test_patch_embed_pads_instead_of_cutting():
    embed = PatchEmbed(4, 3, 5)
    image = torch.randn(1, 3, 6, 8)
    padded = torch.zeros(1, 3, 8, 8)
    padded[:, :, :6] = image
    assert embed(image).shape == (1, 2, 2, 5)
    assert torch.equal(embed(image), embed(padded))


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
    with pytest.raises(InputError, match="a map of at most 7x7 tokens, got 8x3"):
        resize_pos_embed(table, (8, 3), "crop")
    with pytest.raises(InputError, match="a square grid, without a class row, got 50 rows"):
        resize_pos_embed(torch.zeros(1, 50, 6), (7, 7))
