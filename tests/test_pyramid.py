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
    assert list(pyramid(scale_factors=[2.0, 1.0]).output_shape()) == ["p3", "p4"]


@pytest.mark.parametrize(
    ("patch_size", "scale_factors", "strides"),
    [
        (14, [4.0, 2.0, 1.0, 0.5], "3.5, 7, 14, 28"),  # no names: 3.5 would be called p1
        (16, [4.0, 1.0], "4, 16"),  # no p3
        (16, [2.0, 2.0], "8, 8"),  # one p3 for two
        (16, [0.5, 1.0], "32, 16"),
        (2, [4.0], "0.5"),
    ],
)
def test_strides_are_powers_of_two_in_a_row(patch_size, scale_factors, strides):
    net = ViT(img_size=56, patch_size=patch_size, embed_dim=16, depth=1, num_heads=2)
    text = rf"scale_factors: expected levels whose strides .* got strides of {strides} pixels\. Set"
    with pytest.raises(InputError, match=text):
        SimpleFeaturePyramid(net, out_channels=8, scale_factors=scale_factors)


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
            r"scale factor: expected one of \(4.0, 2.0, 1.0, 0.5, 0.25\), got 3.0",
        ),
        ({"norm": "BN"}, r"pyramid norm: expected one of \['LN', 'GN1', ''\], got 'BN'"),
        (
            {"downsample": "avg_pool"},
            r"pyramid downsample: expected one of \['max_pool', 'conv'\], got 'avg_pool'",
        ),
        (
            {"top_block": LastLevelMaxPool(), "scale_factors": [1.0, 0.5, 0.25]},
            r"of the pyramid's top block: expected the coarsest level, 'p6', .* got 'p5'",
        ),
        (
            {"top_block": LastLevelMaxPool(), "scale_factors": [2.0, 1.0]},
            r"top block: expected the coarsest level, 'p4', or a map of the backbone, got 'p5'",
        ),
    ],
)
def test_wrong_choices(changes, text):
    with pytest.raises(InputError, match=text):
        pyramid(**changes)


FIVE = (4.0, 2.0, 1.0, 0.5, 0.25)


@pytest.mark.parametrize("downsample", ["max_pool", "conv"])
def test_five_levels(downsample):
    levels = pyramid(scale_factors=FIVE, downsample=downsample)
    assert levels.size_divisibility == 64
    strides = {name: shape.stride for name, shape in levels.output_shape().items()}
    assert strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    images = torch.randn(1, 3, 80, 128)
    out = levels(images)
    shapes = {name: tuple(x.shape[2:]) for name, x in out.items()}
    assert shapes == {f"p{k}": (80 // 2**k, 128 // 2**k) for k in range(2, 7)}
    last = levels.net(images)["last_feat"]
    for factor, module in ((2, levels.simfp_5), (4, levels.simfp_6)):
        if downsample == "max_pool":
            rows, columns = 5 // factor * factor, 8 // factor * factor
            cut = last[..., :rows, :columns].unflatten(-1, (-1, factor))
            expected = cut.unflatten(-3, (-1, factor)).amax(dim=(-3, -1))
        else:
            conv = module[0]
            assert (conv.kernel_size, conv.stride) == ((factor, factor), (factor, factor))
            assert conv.weight.shape == (16, 16, factor, factor)
            expected = torch.conv2d(last, conv.weight, conv.bias, stride=factor)
        torch.testing.assert_close(module[0](last), expected)
    names = {name.split(".")[1] for name in levels.state_dict() if name.startswith("simfp_6")}
    assert names == ({"1", "2"} if downsample == "max_pool" else {"0", "1", "2"})


def test_two_max_pools_are_the_one_of_a_quarter():
    """StreamPETR's author advises two max-pools for the fifth level."""
    levels = pyramid(scale_factors=FIVE)
    x = torch.randn(1, 16, 11, 18)
    twice = torch.max_pool2d(torch.max_pool2d(x, 2), 2)
    assert torch.equal(levels.simfp_6[0](x), twice)


def test_group_norm_of_one_group_is_over_the_whole_map():
    levels = pyramid(norm="GN1", norm_eps=1e-3, scale_factors=[4.0])
    norm = levels.simfp_2[5].norm
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 8, 4, 6)
    mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
    expected = (x - mean) / (variance + 1e-3).sqrt()
    expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)
    of_positions = ChannelLayerNorm(8, 1e-3)
    of_positions.load_state_dict(norm.state_dict())  # the same names mean something else
    assert (of_positions(x) - expected).abs().max() > 0.1
    assert levels.state_dict().keys() == pyramid(scale_factors=[4.0]).state_dict().keys()


def test_epsilon_reaches_every_norm():
    for norm, kind in (("LN", ChannelLayerNorm), ("GN1", torch.nn.GroupNorm)):
        for eps in (1e-6, 1e-5):
            levels = pyramid(norm=norm, norm_eps=eps)
            found = [module.eps for module in levels.modules() if isinstance(module, kind)]
            assert found == [eps] * 9  # one between the deconvolutions, two a level
    assert pyramid().simfp_2[1].eps == 1e-6


@pytest.mark.parametrize(("halve", "middle", "last"), [(True, 8, 4), (False, 16, 16)])
def test_deconvolutions_halve_the_channels_or_keep_them(halve, middle, last):
    levels = pyramid(halve_channels=halve)
    assert levels.simfp_2[0].weight.shape == (16, middle, 2, 2)
    assert levels.simfp_2[1].weight.shape == (middle,)
    assert levels.simfp_2[3].weight.shape == (middle, last, 2, 2)
    assert levels.simfp_2[4].weight.shape == (8, last, 1, 1)
    assert levels.simfp_3[1].weight.shape == (8, middle, 1, 1)
    assert levels.simfp_5[1].weight.shape == (8, 16, 1, 1)
    assert levels(torch.zeros(1, 3, 32, 32))["p2"].shape == (1, 8, 8, 8)


def test_without_norm_convolutions_have_a_bias():
    names = set(pyramid(norm="").state_dict())
    assert {"simfp_2.4.bias", "simfp_2.5.bias", "simfp_5.1.bias"} <= names
    assert not any("norm" in name or "simfp_2.1." in name for name in names if "simfp" in name)


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
