"""What the golden cases do not show of the pyramid and of the heads' switches."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import ImageList

from vitdet.backbones.vit import ViT
from vitdet.heads import rpn_head
from vitdet.layers.norms import ChannelLayerNorm, channel_layer_norm
from vitdet.pyramid import SimpleFeaturePyramid
from vitdet.utils.checks import InputError


def pyramid(**changes) -> SimpleFeaturePyramid:
    net = ViT(img_size=64, embed_dim=16, depth=2, num_heads=2, pretrain_img_size=64)
    return SimpleFeaturePyramid(net, **{"out_channels": 8, **changes})


def test_levels_and_strides():
    levels = pyramid(top_block=LastLevelMaxPool())
    strides = {name: shape.stride for name, shape in levels.output_shape().items()}
    assert strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    shapes = {name: tuple(x.shape) for name, x in levels(torch.zeros(1, 3, 64, 128)).items()}
    assert shapes == {f"p{k}": (1, 8, 64 // 2**k, 128 // 2**k) for k in range(2, 7)}
    assert list(pyramid(scale_factors=[0.5, 2.0]).output_shape()) == ["p5", "p3"]


def test_images_are_padded_so_that_no_pixel_is_lost():
    levels = pyramid()
    image = torch.ones(3, 250, 187)
    images = ImageList.from_tensors(
        [image], levels.size_divisibility, padding_constraints=levels.padding_constraints
    )
    assert images.tensor.shape == (1, 3, 256, 192)
    assert images.tensor.sum() == image.sum()
    square = pyramid(square_pad=320)
    images = ImageList.from_tensors(
        [image], square.size_divisibility, padding_constraints=square.padding_constraints
    )
    assert images.tensor.shape == (1, 3, 320, 320)


def test_layers_of_parameters_for_lr_decay():
    levels = pyramid()
    assert levels.num_layers == 2
    assert levels.layer_id("net.blocks.1.norm1.weight") == 2
    assert levels.layer_id("simfp_2.0.weight") == 3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"scale_factors": [3.0]},
            r"scale factor: expected one of \(4.0, 2.0, 1.0, 0.5\), got 3.0",
        ),
        ({"norm": "BN"}, r"pyramid norm: expected one of \['LN', ''\], got 'BN'"),
    ],
)
def test_wrong_choices(changes, text):
    with pytest.raises(InputError, match=text):
        pyramid(**changes)


def test_rpn_head_with_and_without_norm():
    plain = rpn_head(in_channels=8, num_anchors=3)
    assert "conv.conv0.bias" in plain.state_dict()
    assert not any("norm" in name for name in plain.state_dict())
    normed = rpn_head(in_channels=8, num_anchors=3, norm=channel_layer_norm(eps=1e-5))
    assert isinstance(normed.conv.conv1.norm, ChannelLayerNorm)
    assert normed.conv.conv1.norm.eps == 1e-5
    assert "conv.conv0.bias" not in normed.state_dict()
    x = torch.randn(1, 8, 4, 4)
    by_hand = torch.relu(
        ChannelLayerNorm(8, 1e-5)(torch.conv2d(x, normed.conv.conv0.weight, padding=1))
    )
    torch.testing.assert_close(normed.conv.conv0(x), by_hand)
