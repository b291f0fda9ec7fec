"""The ways in which a ViT's windows exchange information (ViTDet, Table 2) and fit a map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vitdet.backbones.vit import ViT
from vitdet.layers.windows import resize_map
from vitdet.utils.checks import InputError

SMALL: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 16, "depth": 4}
SMALL |= {"num_heads": 2, "use_rel_pos": True, "pretrain_img_size": 64, "window_size": 4}


def randomised(**changes: Any) -> ViT:
    torch.manual_seed(0)
    net = ViT(**{**SMALL, **changes})
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


def reach(net: ViT) -> torch.Tensor:
    """Return which of the 8 x 8 tokens see a change of the first one."""
    image = torch.randn(1, 3, 64, 64)
    changed = image.clone()
    changed[..., :8, :8] += 1
    difference = net(image)["last_feat"] - net(changed)["last_feat"]
    return difference.abs().sum(1)[0] > 0


@pytest.mark.parametrize(
    ("changes", "seen"),
    [
        ({}, 16),
        ({"global_block_indexes": [1]}, 64),
        # A shifted window has its first 2 x 2 tokens within the first window of the others.
        ({"shifted_block_indexes": [0]}, 16),
        ({"shifted_block_indexes": [1]}, 64),
        ({"depth": 2, "shifted_block_indexes": [1]}, 36),
        # One token further, then the four windows that this touches.
        ({"residual_block_indexes": [0], "propagation": "naive"}, 64),
        ({"residual_block_indexes": [3], "propagation": "naive"}, 25),
        ({"residual_block_indexes": [3], "propagation": "basic"}, 36),
        ({"residual_block_indexes": [3], "propagation": "bottleneck"}, 25),
    ],
)
def test_how_far_information_reaches(changes: dict[str, Any], seen: int) -> None:
    assert reach(randomised(**changes)).sum() == seen


def test_shifted_windows_are_windows_of_the_padded_map() -> None:
    """Against attention in windows of a map that was padded by hand."""
    block = randomised(shifted_block_indexes=[0]).blocks[0]
    plain = randomised().blocks[0]
    x = torch.randn(2, 8, 8, 16)
    normed = torch.zeros(2, 12, 12, 16)
    normed[:, 2:10, 2:10] = plain.norm1(x)
    windows = normed.unflatten(1, (3, 4)).unflatten(3, (3, 4)).transpose(2, 3).flatten(0, 2)
    y = plain.attn(windows).view(2, 3, 3, 4, 4, 16).transpose(2, 3).reshape(2, 12, 12, 16)
    y = x + y[:, 2:10, 2:10]
    y = y + plain.mlp(plain.norm2(y))
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-5)


def test_maps_can_be_resized_to_whole_windows_and_back() -> None:
    net, plain = randomised(window_size=3, window_fit="interpolate"), randomised(window_size=3)
    x = torch.randn(1, 8, 8, 16)
    block, other = net.blocks[1], plain.blocks[1]
    y = resize_map(other.norm1(x), (6, 6))
    windows = y.unflatten(1, (2, 3)).unflatten(3, (2, 3)).transpose(2, 3).flatten(0, 2)
    y = other.attn(windows).view(1, 2, 2, 3, 3, 16).transpose(2, 3).reshape(1, 6, 6, 16)
    y = x + resize_map(y, (8, 8))
    y = y + other.mlp(other.norm2(y))
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-5)
    image = torch.randn(1, 3, 48, 72)  # 6 x 9 tokens: whole windows either way
    torch.testing.assert_close(net(image)["last_feat"], plain(image)["last_feat"])


def test_gradients_reach_every_parameter_of_every_choice() -> None:
    for changes in (
        {"shifted_block_indexes": [1, 3]},
        {"window_fit": "interpolate", "window_size": 3},
        {"residual_block_indexes": [1, 3], "propagation": "basic", "propagation_norm": "BN"},
    ):
        net = randomised(**changes).train()
        image = torch.randn(1, 3, 64, 64, requires_grad=True)
        net(image)["last_feat"].square().sum().backward()
        unseen = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        # A bias of k changes no softmax; joined with those of q and v it has a gradient.
        assert unseen == []
        assert image.grad is not None


def test_maps_of_blocks_are_outputs_too() -> None:
    net = randomised(out_block_indexes=[3, 0], final_norm=True)
    assert list(net.output_shape()) == ["last_feat", "block0", "block3"]
    outputs = net(torch.randn(1, 3, 64, 64))
    assert list(outputs) == ["last_feat", "block0", "block3"]
    last = outputs["block3"].permute(0, 2, 3, 1)
    assert torch.equal(net.norm(last).permute(0, 3, 1, 2), outputs["last_feat"])
    assert not torch.equal(outputs["block0"], outputs["block3"])
    with_class = randomised(
        out_block_indexes=[1], use_cls_token=True, use_rel_pos=False, window_size=0
    )
    assert with_class(torch.randn(1, 3, 64, 64))["block1"].shape == (1, 16, 8, 8)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shifted_block_indexes": [4]}, r"shifted_block_indexes: .* from 0 to 3, got \[4\]"),
        (
            {"shifted_block_indexes": [1, 2], "global_block_indexes": [2]},
            r"shifted_block_indexes: expected window blocks, got \[2\]. A block that sees",
        ),
        ({"window_fit": "pads"}, "window_fit: expected one of pad, interpolate, got 'pads'. Did"),
        ({"propagation": "convs"}, "propagation: expected one of naive, basic, bottleneck"),
        ({"out_block_indexes": [7]}, r"out_block_indexes: .* got \[7\]"),
    ],
)
def test_wrong_choices(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        ViT(**{**SMALL, **changes})
