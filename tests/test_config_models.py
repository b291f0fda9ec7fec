"""The models of recipes: what no value of a recipe tells, and what a README counted."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.recipes import count, model_of, recipe
from vitdet.backbones.msvit import attention as attention_module
from vitdet.backbones.msvit.attention import OnlyGlobalAttention
from vitdet.config import build_model
from vitdet.layers.norms import ChannelLayerNorm
from vitdet.optim import parameter_table


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


def test_weight_decay_and_rate_of_single_parameters():
    for name, parameter, rate, decay in (
        ("COCO/mask_rcnn_vitdet_b_100ep", "net.patch_embed.proj.weight", 0.7**13, 0.1),
        ("COCO/mask_rcnn_vitdet_b_100ep", "net.blocks.11.attn.qkv.weight", 0.7, 0.1),
        ("COCO/mask_rcnn_vitdet_b_100ep", "net.blocks.11.norm1.bias", 0.7, 0.0),
        ("COCO/mask_rcnn_vitdet_b_100ep", "net.pos_embed", 0.7**13, 0.0),
        ("COCO/mask_rcnn_vitdet_b_100ep", "simfp_2.1.weight", 1.0, 0.1),
        ("COCO/mask_rcnn_vitdet_h_75ep", "net.blocks.31.norm1.bias", 0.9, 0.1),
        ("COCO/cascade_mask_rcnn_eva02_b_bsl", "net.pos_embed", 0.7**13, 0.1),
        ("vitae/mask_rcnn_vit_b_100ep", "simfp_2.1.weight", 1.0, 0.0),
        ("easycv/mask_rcnn_vitdet_b_100ep", "net.blocks.0.norm1.weight", 0.7**12, 0.0),
        ("easycv/mask_rcnn_vitdet_b_100ep", "simfp_2.1.weight", 1.0, 0.1),
        ("vil/mask_rcnn_vil_tiny_1x", "fpn_lateral2.bias", 1.0, 0.05),
    ):
        optimizer = recipe(name).optimizer
        skipped = ("_target_", "lr", "betas")
        rules = {key: optimizer[key] for key in optimizer if key not in skipped}
        setting = parameter_table(model_of(name), **rules)[f"backbone.{parameter}"]
        assert setting == pytest.approx((rate, decay)), (name, parameter)


# --- Vision Longformer: what its README counted --------------------------------------------------

# counted in the published class, million parameters and GFLOPs of the README
VIL = {
    "mask_rcnn_vil_tiny_1x": (26_812_642, "26.9", 145.6),
    "mask_rcnn_vil_base_d_1x": (76_082_008, "76.1", 384.4),
    "retinanet_vil_small_1x": (35_602_148, "35.68", 254.8),
    "mask_rcnn_srformer64_small_1x": (73_328_728, "73.3", 224.1),
    "mask_rcnn_srformer32_partial_small_1x": (46_786_648, "46.8", 352.1),
    "mask_rcnn_global_small_1x": (45_237_016, "45.2", 226.4),
    "mask_rcnn_performer_partial_small_1x": (45_017_176, "45.0", 343.7),
    "mask_rcnn_vil_ape_partial_small_1x": (45_017_176, "45.0", 326.8),
}


@pytest.mark.parametrize("name", VIL)
def test_parameters_of_vil_with_the_published_classifier(name):
    """The README counted all rows with absolute positions, those with relative ones too."""
    published, millions, _ = VIL[name]
    node = deepcopy(recipe(f"vil/{name}").model)
    node.backbone.in_features = list(node.backbone.bottom_up.out_features)
    node.backbone.bottom_up.out_features = [*node.backbone.in_features, "head"]
    node.backbone.bottom_up.num_classes = 1000
    assert count(build_model(node, "meta")) == published
    node.backbone.bottom_up.use_abs_pos = [True] * 4
    assert f"{count(build_model(node, 'meta')) / 1e6:.{len(millions) - 3}f}" == millions


def multiply_adds(model, modules):
    """Return 10^9 multiply-adds of convolutions and matrix products, 5 a number for LayerNorms."""
    numbers = []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _, __, output: numbers.append(output.numel()))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for module, inputs in modules:
            module(inputs)
    return counter.get_total_flops() / 2e9 + 5e-9 * sum(numbers)


@pytest.mark.parametrize("name", VIL)
def test_multiply_adds_of_vil(name, monkeypatch):
    """Within 3 % of the README's.

    Their definition, as it comes out of their numbers: multiply-adds for 800 x 1344 pixels of
    backbone, pyramid, RPN, box head on 1000 proposals, or RetinaNet head. No mask head. Products of
    queries of the map in the attentions of the Longformer kind (sliding chunks, only global) are
    not among them: a counter does not look into their operator.
    """
    node = deepcopy(recipe(f"vil/{name}").model)
    node.backbone.bottom_up.attention_backend = "eager"
    model = build_model(node, "meta").eval()
    monkeypatch.setattr(
        attention_module, "sliding_chunk_attention", lambda q, k, v, *_, **__: torch.zeros_like(q)
    )
    monkeypatch.setattr(
        OnlyGlobalAttention, "attend_locally", lambda self, q, k, v, size: torch.zeros_like(q)
    )
    image = torch.zeros(1, 3, 800, 1344, device="meta")
    with torch.no_grad():
        levels = list(model.backbone(image).values())
    modules = [(model.backbone, image)]
    if name.startswith("retinanet"):
        modules.append((model.head, levels))
    else:
        boxes = nn.Sequential(model.roi_heads.box_head, model.roi_heads.box_predictor)
        modules.append((model.proposal_generator.rpn_head, levels))
        modules.append((boxes, torch.zeros(1000, 256, 7, 7, device="meta")))
    assert multiply_adds(model, modules) == pytest.approx(VIL[name][2], rel=0.03)
