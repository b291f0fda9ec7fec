"""The pyramids that the paper compares the simple one with (ViTDet, Fig. 2, Table 1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import nn

from vitdet.layers.norms import channel_layer_norm
from vitdet.pyramid import SimpleFeaturePyramid
from vitdet.utils.checks import InputError

STAGES = ["block0", "block1", "block2", "last_feat"]


class Maps(Backbone):
    """Gives maps of stride 16 that it was made with."""

    def __init__(self, maps: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.maps = maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {k: ShapeSpec(channels=v.shape[1], stride=16) for k, v in self.maps.items()}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.maps


class Resampled(Backbone):
    """The maps of a pyramid's levels before their convolutions, as detectron2's FPN wants them."""

    def __init__(self, pyramid: SimpleFeaturePyramid, counts: list[int]) -> None:
        super().__init__()
        self.pyramid, self.counts = pyramid, counts

    def _parts(self) -> list[tuple[str, nn.Sequential, str]]:
        found = []
        for level, count in zip(self.pyramid._levels, self.counts, strict=True):
            module = self.pyramid.get_submodule(level.module)
            assert isinstance(module, nn.Sequential)
            found.append((level.name, module[:count], level.source))
        return found

    def output_shape(self) -> dict[str, ShapeSpec]:
        shapes = {}
        for level, count in zip(self.pyramid._levels, self.counts, strict=True):
            first = self.pyramid.get_submodule(level.module)[count]  # pyright: ignore
            stride = 2 ** int(level.name[1:])
            shapes[level.name] = ShapeSpec(channels=first.in_channels, stride=stride)
        return shapes

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.pyramid.net(x)
        return {name: layers(maps[source]) for name, layers, source in self._parts()}


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


@pytest.mark.parametrize("in_feature", ["last_feat", STAGES], ids=["last map", "four stages"])
@pytest.mark.parametrize("size", [(4, 6), (3, 5)], ids=str)
def test_top_down_is_a_feature_pyramid_network(in_feature: Any, size: tuple[int, int]) -> None:
    """Against detectron2's FPN over the same resampled maps, with the same weights."""
    torch.manual_seed(1)
    maps = {name: torch.randn(2, 8, *size) for name in STAGES}
    pyramid = SimpleFeaturePyramid(
        Maps(maps), in_feature=in_feature, out_channels=12, top_down=True
    )
    randomised(pyramid)
    resampled = Resampled(pyramid, [4, 1, 0, 1])
    fpn = FPN(resampled, ["p2", "p3", "p4", "p5"], 12, norm=channel_layer_norm(1e-6))
    for i in range(2, 6):
        *_, lateral, output = pyramid.get_submodule(f"simfp_{i}").children()
        fpn.get_submodule(f"fpn_lateral{i}").load_state_dict(lateral.state_dict())
        fpn.get_submodule(f"fpn_output{i}").load_state_dict(output.state_dict())
    image = torch.zeros(2, 3, 16 * size[0], 16 * size[1])
    if size[0] % 2:
        # detectron2 doubles each level, and a map of odd size has no level of half of it.
        with pytest.raises(RuntimeError):
            fpn(image)
        levels = pyramid(image)
        assert [tuple(levels[f"p{i}"].shape[2:]) for i in (4, 5)] == [(3, 5), (1, 2)]
        return
    expected, levels = fpn(image), pyramid(image)
    assert list(levels) == ["p2", "p3", "p4", "p5"]
    for name, level in levels.items():
        torch.testing.assert_close(level, expected[name], rtol=0, atol=1e-5)


def test_each_level_can_have_a_map_of_its_own() -> None:
    maps = {name: torch.full((1, 8, 4, 4), float(i)) for i, name in enumerate(STAGES)}
    arguments: dict[str, Any] = {"out_channels": 4, "norm": ""}
    split = randomised(SimpleFeaturePyramid(Maps(maps), in_feature=STAGES, **arguments))
    image = torch.zeros(1, 3, 64, 64)
    got = split(image)
    for source, name in zip(STAGES, got, strict=True):
        alone = randomised(SimpleFeaturePyramid(Maps(maps), in_feature=source, **arguments))
        assert torch.equal(alone(image)[name], got[name])


def test_one_level_and_five_levels() -> None:
    maps = {"last_feat": torch.randn(1, 8, 4, 4)}
    image = torch.zeros(1, 3, 64, 64)
    none = SimpleFeaturePyramid(Maps(maps), out_channels=4, scale_factors=[1.0])
    assert {k: tuple(v.shape) for k, v in none(image).items()} == {"p4": (1, 4, 4, 4)}
    retina = SimpleFeaturePyramid(
        Maps(maps),
        out_channels=4,
        scale_factors=[2.0, 1.0, 0.5],
        top_block=LastLevelP6P7(4, 4, "p5"),
    )
    assert list(retina(image)) == ["p3", "p4", "p5", "p6", "p7"]
    assert retina.output_shape()["p7"].stride == 128
    five = SimpleFeaturePyramid(Maps(maps), out_channels=4, top_block=LastLevelMaxPool())
    assert torch.equal(five(image)["p6"], five(image)["p5"][..., ::2, ::2])


def test_the_norm_between_deconvolutions_is_set_apart() -> None:
    maps = {"last_feat": torch.randn(1, 8, 4, 4)}
    pyramid = SimpleFeaturePyramid(
        Maps(maps), norm="GN1", norm_eps=1e-5, upsample_norm="LN", upsample_norm_eps=1e-6
    )
    level = pyramid.get_submodule("simfp_2")
    assert type(level[1]).__name__ == "ChannelLayerNorm"  # pyright: ignore
    assert level[1].eps == 1e-6  # pyright: ignore
    norm = level[4].norm  # pyright: ignore
    assert isinstance(norm, nn.GroupNorm)
    assert (norm.num_groups, norm.eps) == (1, 1e-5)
    same = SimpleFeaturePyramid(Maps(maps), norm="GN1", norm_eps=1e-5)
    assert isinstance(same.get_submodule("simfp_2")[1], nn.GroupNorm)  # pyright: ignore


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"in_feature": ["last_feat"]}, "pyramid in_feature: expected 4 names, got 1"),
        ({"in_feature": "last"}, r"pyramid in_feature: expected one of \['last_feat'\], got last"),
        ({"upsample_norm": "BN"}, "pyramid upsample_norm: expected one of .* got 'BN'"),
    ],
)
def test_wrong_choices(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        SimpleFeaturePyramid(Maps({"last_feat": torch.zeros(1, 8, 4, 4)}), **changes)
