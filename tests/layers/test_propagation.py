"""Convolution propagation: what a new block does, what a trained one computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitdet.layers.propagation import KERNELS, NORMS, ConvPropagation
from vitdet.layers.windows import resize_map, whole_windows
from vitdet.utils.checks import InputError


def randomised(block: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    for name, buffer in block.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            buffer.normal_()
    return block.eval()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KERNELS)
def test_a_new_block_is_the_identity(kind: str, training: bool) -> None:
    x = torch.randn(2, 4, 5, 8)
    block = ConvPropagation(8, kind).train(training)  # pyright: ignore[reportArgumentType]
    assert torch.equal(block(x), x)
    nn.init.ones_(block.get_parameter(f"norm{len(KERNELS[kind])}.weight"))
    assert not torch.equal(block(x), x)


@pytest.mark.parametrize("kind", KERNELS)
def test_a_new_block_with_batch_norm_is_a_relu(kind: str) -> None:
    """The published block ends with one, so it is no identity, whatever its start."""
    x = torch.randn(2, 4, 5, 8)
    block = ConvPropagation(8, kind, "BN")  # pyright: ignore[reportArgumentType]
    assert torch.equal(block(x), x.relu())


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
def test_convolutions_of_each_kind(
    kind: str, norm: str, shapes: list[tuple[int, int, int]]
) -> None:
    block = ConvPropagation(8, kind, norm)  # pyright: ignore[reportArgumentType]
    found = [conv.weight.shape for conv in block.modules() if isinstance(conv, nn.Conv2d)]
    assert [(out, into, side) for out, into, side, _ in found] == shapes
    assert not [conv for conv in block.modules() if getattr(conv, "kernel_size", 0) and conv.bias]


def test_the_basic_block_by_hand() -> None:
    block, x = randomised(ConvPropagation(8, "basic")), torch.randn(2, 4, 5, 8)
    y = F.conv2d(x.permute(0, 3, 1, 2), block.conv1.weight, padding=1).permute(0, 2, 3, 1)
    y = F.gelu(F.layer_norm(y, (8,), block.norm1.weight, block.norm1.bias, 1e-6))
    y = F.conv2d(y.permute(0, 3, 1, 2), block.conv2.weight, padding=1).permute(0, 2, 3, 1)
    y = F.layer_norm(y, (8,), block.norm2.weight, block.norm2.bias, 1e-6)
    torch.testing.assert_close(block(x), x + y, rtol=0, atol=1e-5)


def test_batch_norm_remembers_in_training() -> None:
    block = randomised(ConvPropagation(8, "naive", "BN"))
    x = torch.randn(2, 4, 5, 8)
    norm = block.norm1
    y = F.conv2d(x.permute(0, 3, 1, 2), block.conv1.weight, padding=1)
    y = (y - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-5).sqrt()
    y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(block(x), (x + y.permute(0, 2, 3, 1)).relu(), rtol=0, atol=1e-5)
    before = norm.running_mean.clone()
    block.train()(x)
    assert not torch.equal(norm.running_mean, before)


@pytest.mark.parametrize(
    ("kind", "norm", "text"),
    [
        ("dense", "LN", "propagation: expected one of naive, basic, bottleneck, got 'dense'"),
        ("basic", "GN", f"propagation_norm: expected one of {', '.join(NORMS)}, got 'GN'"),
    ],
)
def test_wrong_choices(kind: str, norm: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        ConvPropagation(8, kind, norm)  # pyright: ignore[reportArgumentType]


def test_maps_are_fitted_to_whole_windows() -> None:
    assert whole_windows((64, 70), 14) == (56, 70)
    assert whole_windows((5, 30), 14) == (14, 28)
    x = torch.arange(64.0).view(1, 8, 8, 1)
    assert resize_map(x, (8, 8)) is x
    small = resize_map(x, (4, 8))
    # Bilinear without aligned corners: the mean of two rows.
    assert torch.equal(small, (x[:, ::2] + x[:, 1::2]) / 2)
