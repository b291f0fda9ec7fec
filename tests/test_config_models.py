"""The models of recipes: what no value of a recipe tells, and what a README counted."""

from copy import deepcopy

import pytest
from torch import nn

from tests.recipes import count, model_of, recipe
from vitdet.config import build_model
from vitdet.layers.norms import ChannelLayerNorm


@pytest.mark.parametrize(
    ("name", "kind", "eps", "in_rpn", "between"),
    [
        ("vitae/mask_rcnn_vit_b_100ep", ChannelLayerNorm, 1e-5, True, 1e-6),
        ("vitae/mask_rcnn_vitae_b_vitdet_100ep", ChannelLayerNorm, 1e-6, False, 1e-6),
        ("easycv/mask_rcnn_vitdet_b_100ep", nn.GroupNorm, 1e-6, False, None),
        ("easycv/mask_rcnn_vit_b_v06_conv_100ep", nn.GroupNorm, 1e-5, True, 1e-6),
        ("mmdetection/mask_rcnn_vitdet_b_100ep", ChannelLayerNorm, 1e-5, False, 1e-5),
    ],
)
def test_norms_of_pyramid_and_heads(name, kind, eps, in_rpn, between):
    """LN or GN(1), and their epsilon: nothing that a shape tells."""
    model = model_of(name)
    found = {
        key: (type(module), module.eps)
        for key, module in model.named_modules()
        if isinstance(module, nn.GroupNorm | ChannelLayerNorm) and "residual" not in key
    }
    first = found.pop("backbone.simfp_2.1")  # between the deconvolutions
    assert first == ((kind, eps) if between is None else (ChannelLayerNorm, between))
    assert set(found.values()) == {(kind, eps)}
    assert any(".rpn_head." in key for key in found) is in_rpn


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_retinanet_has_five_levels(size):
    model = model_of(f"paper/fig5_retinanet_{size}")
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}
    assert strides == {f"p{i}": 2**i for i in range(3, 8)}
    assert model.head_in_features == list(strides)


# --- Vision Longformer: what its README counted --------------------------------------------------

# counted in the published class, million parameters of the README
VIL = {
    "mask_rcnn_vil_tiny_1x": (26_812_642, "26.9"),
    "mask_rcnn_vil_base_d_1x": (76_082_008, "76.1"),
    "retinanet_vil_small_1x": (35_602_148, "35.68"),
    "mask_rcnn_srformer64_small_1x": (73_328_728, "73.3"),
    "mask_rcnn_srformer32_partial_small_1x": (46_786_648, "46.8"),
    "mask_rcnn_global_small_1x": (45_237_016, "45.2"),
    "mask_rcnn_performer_partial_small_1x": (45_017_176, "45.0"),
    "mask_rcnn_vil_ape_partial_small_1x": (45_017_176, "45.0"),
}


@pytest.mark.parametrize("name", VIL)
def test_parameters_of_vil_with_the_published_classifier(name):
    """The README counted all rows with absolute positions, those with relative ones too."""
    published, millions = VIL[name]
    node = deepcopy(recipe(f"vil/{name}").model)
    node.backbone.in_features = list(node.backbone.bottom_up.out_features)
    node.backbone.bottom_up.out_features = [*node.backbone.in_features, "head"]
    node.backbone.bottom_up.num_classes = 1000
    assert count(build_model(node, "meta")) == published
    node.backbone.bottom_up.use_abs_pos = [True] * 4
    assert f"{count(build_model(node, 'meta')) / 1e6:.{len(millions) - 3}f}" == millions
