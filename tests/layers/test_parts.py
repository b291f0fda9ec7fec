"""Windows, norms, feed-forward and linear layers, propagation, stochastic depth."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitdet.layers.norms import ChannelLayerNorm, channel_layer_norm
from vitdet.layers.parts import (
    ConvPropagation,
    DropPath,
    Linear,
    Mlp,
    PatchEmbed,
    SwiGLU,
    drop_path_rates,
    window_partition,
    window_reverse,
)


def test_windows_are_squares_of_neighbours_padded_right_and_below():
    first, second = window_partition(torch.arange(6.0).reshape(1, 2, 3, 1), 2)[..., 0]
    assert first.tolist() == [[0, 1], [3, 4]]
    assert second.tolist() == [[2, 0], [5, 0]]
    for B, H, W, window in itertools.product((1, 3), (1, 5, 9), (1, 4, 7), (1, 2, 5)):
        x = torch.arange(B * H * W * 2.0).reshape(B, H, W, 2) + 1
        windows = window_partition(x, window)
        assert windows.shape == (B * -(-H // window) * -(-W // window), window, window, 2)
        assert windows.count_nonzero() == x.numel()  # the rest is padding, zero
        assert torch.equal(window_reverse(windows, (H, W)), x)


def test_channel_norm_equals_detectron2():
    ours, theirs = ChannelLayerNorm(6), get_norm("LN", 6)
    state = {"weight": torch.randn(6), "bias": torch.randn(6)}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    x = torch.randn(2, 6, 3, 5) * 0.01  # small, so that eps shows
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-6)
    assert channel_layer_norm(eps=1e-5)(6).eps == 1e-5


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
    assert drop_path_rates(0.3, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0]


def test_patch_embed_pads_instead_of_cutting():
    embed, image = PatchEmbed(4, 3, 5), torch.randn(1, 3, 6, 8)
    assert embed(image).shape == (1, 2, 2, 5)
    assert torch.equal(embed(image), embed(F.pad(image, (0, 0, 0, 2))))


def test_feed_forward_layers_by_their_formulas():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    for norm in (True, False):
        layer = SwiGLU(6, 10, norm_eps=1e-3, inner_norm=norm).double()
        gate = layer.w1(x)
        hidden = gate / (1 + torch.exp(-gate)) * layer.w2(x)
        hidden = F.layer_norm(hidden, (10,), eps=1e-3) if norm else hidden
        torch.testing.assert_close(layer(x), layer.w3(hidden), rtol=0, atol=1e-12)
    mlp = Mlp(6, 10, "quick_gelu").double()
    hidden = mlp.fc1(x)
    torch.testing.assert_close(mlp(x), mlp.fc2(hidden / (1 + (-1.702 * hidden).exp())))


# --- propagation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "norm", "shapes"),
    [
        ("naive", "LN", [(8, 8, 3)]),
        ("basic", "LN", [(8, 8, 3), (8, 8, 3)]),
        ("bottleneck", "LN", [(4, 8, 1), (4, 4, 3), (8, 4, 1)]),
        ("basic", "BN", [(8, 8, 3), (8, 8, 3)]),
        ("bottleneck", "BN", [(2, 8, 1), (2, 2, 3), (8, 2, 1)]),
    ],
)
def test_propagation_starts_as_the_identity(kind, norm, shapes):
    block, x = ConvPropagation(8, kind, norm), torch.randn(2, 4, 5, 8)
    found = [conv.weight.shape for conv in block.modules() if isinstance(conv, nn.Conv2d)]
    assert [(out, into, side) for out, into, side, _ in found] == shapes
    # The published block with BatchNorm ends with a ReLU, so it is no identity.
    assert torch.equal(block(x), x.relu() if norm == "BN" else x)
    nn.init.ones_(block.get_parameter(f"norm{len(shapes)}.weight"))
    assert not torch.allclose(block(x), x.relu() if norm == "BN" else x)


# --- linear layers: the numbers of `F.linear`, by the route that each case should take ----------


class Seen(TorchDispatchMode):
    """Collects the names of the operators that run."""

    names: set[str]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def is_convolution(layer, x):
    with Seen() as seen:
        seen.names = set()
        assert layer(x).shape == (*x.shape[:-1], layer.out_features)
    return "convolution" in seen.names


@pytest.fixture
def small_products_count_as_large(monkeypatch):
    monkeypatch.setattr("vitdet.layers.parts._WORK", 512 * 12 * 8)


@pytest.mark.usefixtures("small_products_count_as_large")
@pytest.mark.parametrize("shape", [(2, 16, 24, 12), (700, 12), (3, 5, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_torch(shape, bias):
    torch.manual_seed(0)
    x, layer = torch.randn(shape, requires_grad=True), Linear(12, 20, bias=bias)
    got, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    inputs, outside = [x, *layer.parameters()], torch.randn_like(got)
    pairs = (torch.autograd.grad(y, inputs, outside) for y in (got, expected))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("small_products_count_as_large")
def test_many_float32_tokens_are_a_convolution_and_nothing_else(monkeypatch):
    layer, x = Linear(12, 8), torch.randn(600, 12)
    assert is_convolution(layer, torch.randn(8, 8, 8, 12))
    turned = torch.randn(12, 40, 20).permute(1, 2, 0)
    torch.testing.assert_close(layer(turned), F.linear(turned, layer.weight, layer.bias))
    assert not is_convolution(layer, x[:511])
    assert not is_convolution(layer, x[:0])
    for dtype in (torch.float64, torch.bfloat16):
        assert not is_convolution(Linear(12, 8).to(dtype), x.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        assert not is_convolution(layer, x)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not is_convolution(layer, x)


@pytest.mark.slow
@pytest.mark.usefixtures("small_products_count_as_large")
def test_an_exported_product_is_a_plain_one():
    graph = torch.export.export(Linear(12, 8), (torch.randn(600, 12),)).graph
    called = {str(node.target) for node in graph.nodes}
    assert "aten.linear.default" in called
    assert not any("conv" in name for name in called)
