"""What the golden cases do not show of the pyramid; those of the paper's Fig. 2 and Table 1."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.structures import ImageList
from torch import nn

from vitdet.backbones.vit import ViT
from vitdet.layers.norms import ChannelLayerNorm, channel_layer_norm
from vitdet.pyramid import SimpleFeaturePyramid
from vitdet.utils.checks import InputError

STAGES = ["block0", "block1", "block2", "last_feat"]
FIVE = (4.0, 2.0, 1.0, 0.5, 0.25)


class Maps(Backbone):
    """Gives maps of stride 16 that it was made with."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def output_shape(self):
        return {k: ShapeSpec(channels=v.shape[1], stride=16) for k, v in self.maps.items()}

    def forward(self, x):
        return self.maps


class Resampled(Backbone):
    """The maps of a pyramid's levels before their convolutions, as detectron2's FPN wants them."""

    def __init__(self, pyramid):
        super().__init__()
        self.pyramid = pyramid

    def output_shape(self):
        channels = {f"p{i}": 8 >> max(4 - i, 0) for i in range(2, 6)}
        return {k: ShapeSpec(channels=v, stride=2 ** int(k[1:])) for k, v in channels.items()}

    def forward(self, x):
        maps, found = self.pyramid.net(x), {}
        for level in self.pyramid._levels:
            layers = self.pyramid.get_submodule(level.module)
            found[level.name] = layers[:-2](maps[level.source])
        return found


def pyramid(**changes):
    net = ViT(img_size=64, embed_dim=16, depth=2, num_heads=2, pretrain_img_size=64)
    return SimpleFeaturePyramid(net, **{"out_channels": 8, **changes})


def filled(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scale_factors": [3.0]}, r"scale factor: expected one of 4.0, 2.0, .*, got 3.0"),
        ({"norm": "BN"}, "pyramid norm: expected one of LN, GN1, , got 'BN'"),
        ({"downsample": "avg"}, "pyramid downsample: expected one of max_pool, conv, got 'avg'"),
        ({"in_feature": ["last_feat"]}, "pyramid in_feature: expected 4 names, got 1"),
        ({"in_feature": "last"}, "pyramid in_feature: expected one of last_feat, got 'last'"),
        (
            {"top_block": LastLevelMaxPool(), "scale_factors": [2.0, 1.0]},
            r"in_feature of top_block: expected one of p4, last_feat, got 'p5'",
        ),
        ({"scale_factors": [4.0, 1.0]}, r"scale_factors: .* got strides of 4, 16 pixels\. Leave"),
    ],
)
def test_wrong_choices(changes, text):
    with pytest.raises(InputError, match=text):
        pyramid(**changes)


def test_strides_are_powers_of_two():
    net = ViT(img_size=56, patch_size=14, embed_dim=16, depth=1, num_heads=2)
    with pytest.raises(InputError, match=r"powers of two, .* got strides of 3.5, 7, 14, 28 pixel"):
        SimpleFeaturePyramid(net)  # no names: 3.5 would be called p1


@pytest.mark.parametrize("downsample", ["max_pool", "conv"])
def test_levels_and_strides(downsample):
    levels = pyramid(scale_factors=FIVE, downsample=downsample)
    assert levels.size_divisibility == 64
    strides = {name: shape.stride for name, shape in levels.output_shape().items()}
    assert strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    images = torch.randn(1, 3, 80, 128)
    shapes = {name: tuple(x.shape[1:]) for name, x in levels(images).items()}
    assert shapes == {f"p{k}": (8, 80 // 2**k, 128 // 2**k) for k in range(2, 7)}
    last = levels.net(images)["last_feat"]
    for factor, module in ((2, levels.simfp_5), (4, levels.simfp_6)):
        if downsample == "max_pool":  # StreamPETR's author advises two for the fifth level
            expected = last
            for _ in range(factor // 2):
                expected = torch.max_pool2d(expected, 2)
        else:
            weight, bias = module[0].weight, module[0].bias
            assert weight.shape == (16, 16, factor, factor)
            expected = torch.conv2d(last, weight, bias, stride=factor)
        torch.testing.assert_close(module[0](last), expected)
    assert levels.layer_id("net.blocks.1.norm1.weight") == levels.num_layers == 2
    assert levels.layer_id("simfp_2.0.weight") == 3


def test_images_are_padded_so_that_no_pixel_is_lost():
    image = torch.ones(3, 250, 187)
    for side, shape in ((0, (1, 3, 256, 192)), (320, (1, 3, 320, 320))):
        levels = pyramid(square_pad=side)
        constraints = levels.padding_constraints
        images = ImageList.from_tensors(
            [image], levels.size_divisibility, padding_constraints=constraints
        )
        assert images.tensor.shape == shape
        assert images.tensor.sum() == image.sum()


def test_norms_are_over_the_channels_or_the_whole_map():
    levels = pyramid(norm="GN1", norm_eps=1e-3, upsample_norm="LN", upsample_norm_eps=1e-6)
    assert isinstance(levels.simfp_2[1], ChannelLayerNorm)
    assert levels.simfp_2[1].eps == 1e-6
    norms = [each for each in levels.modules() if isinstance(each, nn.GroupNorm)]
    assert [(each.eps, each.num_groups) for each in norms] == [(1e-3, 1)] * 8  # two a level
    norm, x = levels.simfp_2[5].norm, torch.randn(2, 8, 4, 6)
    mean, variance = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(norm(x), (x - mean) / (variance + 1e-3).sqrt())
    same = pyramid(norm="GN1")  # the same names mean something else
    assert isinstance(same.simfp_2[1], nn.GroupNorm)
    assert same.state_dict().keys() == pyramid().state_dict().keys()
    names = set(pyramid(norm="").state_dict())
    assert {"simfp_2.4.bias", "simfp_2.5.bias", "simfp_5.1.bias"} <= names
    assert not any("norm" in name or "simfp_2.1." in name for name in names if "simfp" in name)


# --- what the paper compares with --------------------------------------------------------------


@pytest.mark.parametrize("in_feature", ["last_feat", STAGES], ids=["last map", "four stages"])
def test_top_down_is_a_feature_pyramid_network(in_feature):
    """Against detectron2's FPN over the same resampled maps, with the same weights."""
    torch.manual_seed(1)
    maps = {name: torch.randn(2, 8, 4, 6) for name in STAGES}
    arguments = {"in_feature": in_feature, "out_channels": 12, "top_down": True}
    ours = filled(SimpleFeaturePyramid(Maps(maps), **arguments))
    fpn = FPN(Resampled(ours), ["p2", "p3", "p4", "p5"], 12, norm=channel_layer_norm(1e-6))
    for i in range(2, 6):
        *_, lateral, output = ours.get_submodule(f"simfp_{i}").children()
        fpn.get_submodule(f"fpn_lateral{i}").load_state_dict(lateral.state_dict())
        fpn.get_submodule(f"fpn_output{i}").load_state_dict(output.state_dict())
    expected, levels = fpn(torch.zeros(2, 3, 64, 96)), ours(torch.zeros(2, 3, 64, 96))
    assert list(levels) == ["p2", "p3", "p4", "p5"]
    for name, level in levels.items():
        torch.testing.assert_close(level, expected[name], rtol=0, atol=1e-5)
    odd = SimpleFeaturePyramid(Maps({k: v[..., :3, :5] for k, v in maps.items()}), **arguments)
    levels = odd(torch.zeros(2, 3, 48, 80))  # detectron2 doubles each level, and stops here
    assert [tuple(levels[f"p{i}"].shape[2:]) for i in (4, 5)] == [(3, 5), (1, 2)]
