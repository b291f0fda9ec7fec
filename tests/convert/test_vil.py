"""Vision Longformer files: every published one, values of splits, copies and stretched tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitdet.backbones.msvit import MsViT
from vitdet.config import build_model, load_config
from vitdet.convert import convert, detect
from vitdet.utils.checks import InputError

from .manifests import CHECKPOINTS, Published, find, published

RECIPES = Path(__file__).parents[2] / "configs/vil"
Shapes = dict[str, tuple[int, ...]]
manifests = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason=f"no manifests: VITDET_CHECKPOINTS is {CHECKPOINTS}"
)

# a published detector: our recipe
DETECTORS = {
    **{
        f"vil_{size}_{head}": f"{head}_vil_{size}{deep}_1x"
        for head in ("mask_rcnn", "retinanet")
        for size, deep in (("tiny", ""), ("small", ""), ("medium", "_d"), ("base", "_d"))
    },
    "srformer64_small_mask_rcnn": "mask_rcnn_srformer64_small_1x",
    "srformer32_small_mask_rcnn": "mask_rcnn_srformer32_small_1x",
    "srformer32_partial_small_mask_rcnn": "mask_rcnn_srformer32_partial_small_1x",
    "performer_small_mask_rcnn": "mask_rcnn_performer_small_1x",
    "performer_partial_small_mask_rcnn": "mask_rcnn_performer_partial_small_1x",
    "global_small_mask_rcnn": "mask_rcnn_global_small_1x",
    "global_partial_small_d768_mask_rcnn": "mask_rcnn_global_partial_small_1x",
    "vil_partial_small_ape_mask_rcnn": "mask_rcnn_vil_ape_partial_small_1x",
}
# a published classifier: recipes that can start from it
CLASSIFIERS = {
    "vil_tiny_rpe": ["mask_rcnn_vil_tiny_1x", "retinanet_vil_tiny_1x"],
    "vil_small_rpe": ["mask_rcnn_vil_small_3x"],
    "vil_medium_deep_rpe": ["mask_rcnn_vil_medium_d_1x"],
    "vil_base_deep_rpe": ["mask_rcnn_vil_base_d_1x"],
    "vil_small_ape": ["mask_rcnn_vil_ape_small_1x", "mask_rcnn_vil_ape_partial_small_1x"],
    "srformer64_small": ["mask_rcnn_srformer64_small_1x"],
    "srformer32_small": ["mask_rcnn_srformer32_small_1x"],
    "performer_small": ["mask_rcnn_performer_small_1x"],
    "global_small": ["mask_rcnn_global_small_1x"],
}


def shapes_of(recipe: str) -> Shapes:
    model = build_model(load_config(RECIPES / f"{recipe}.py").model, "meta")
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def check_account(item: Published, target: Shapes, output: dict[str, Any], report: Any) -> None:
    assert set(report.used) | set(report.dropped) == {
        name.removeprefix("module.") for name in item.tensors
    }
    assert not set(report.used) & set(report.dropped)
    assert not report.unaccounted
    assert not report.missing
    assert set(output) | set(report.initialised) == set(target)
    assert {name: tuple(value.shape) for name, value in output.items()} == {
        name: target[name] for name in output
    }


@manifests
def test_every_published_file_is_tested_here():
    named = {*DETECTORS, *CLASSIFIERS, "linformer_small", "global_partial_small_mask_rcnn"}
    assert {item.name for item in published("vil_detection", "vil_classification")} == named


@manifests
@pytest.mark.parametrize("name", DETECTORS)
def test_published_detectors(name):
    item, target = find(name), shapes_of(DETECTORS[name])
    output, report = convert(item.content(), target)
    check_account(item, target, output, report)
    assert report.source_format == "vil_det"
    assert not report.resized
    assert set(report.initialised) <= {"backbone.bottom_up.num_redraws"}
    endings = ("_global.weight", "_global.bias", "relative_position_index", "cls_pos_embed")
    classifier = {f"backbone.bottom_up.{n}" for n in ("norm.weight", "norm.bias")}
    classifier |= {f"backbone.bottom_up.{n}" for n in ("head.weight", "head.bias")}
    for key, why in report.dropped.items():
        assert key in classifier or key.endswith(endings), (key, why)
        if key.endswith("cls_pos_embed"):
            assert item.tensors[key].numel() == 0


@manifests
def test_the_committed_config_of_partial_global_is_another_model():
    """Fault c: 384 channels in stage 4 of the file, 768 in the published row."""
    with pytest.raises(InputError, match=r"fpn_lateral5.*768, 1, 1.*384, 1, 1"):
        convert(
            find("global_partial_small_mask_rcnn").content(),
            shapes_of("mask_rcnn_global_partial_small_1x"),
        )


@manifests
@pytest.mark.parametrize(
    ("name", "recipe"), [(name, recipe) for name, found in CLASSIFIERS.items() for recipe in found]
)
def test_published_classifiers(name, recipe):
    item, target = find(name), shapes_of(recipe)
    output, report = convert(item.content(), target)
    check_account(item, target, output, report)
    assert (report.source_format, report.nested_under) == ("vil", "net")
    prefix = "backbone.bottom_up."
    inside = {name for name in report.initialised if name.startswith(prefix)}
    assert inside <= {prefix + "num_redraws"}
    outside = {name for name in target if not name.startswith(prefix)}
    assert set(report.initialised) - inside == outside  # pyramid and heads
    resized = {name.removeprefix(prefix).split(".", 2)[2] for name in report.resized}
    if "rpe" in name:  # with windows of 7 a table fits in stage 3, and not in stage 4
        assert resized == {"attn.local_relative_position_bias_table"}
        assert {name.split(".")[2] for name in report.resized} == {"layer4"}
    else:
        assert resized == {"x_pos_embed", "y_pos_embed"}


@manifests
def test_published_linformer():
    item = find("linformer_small")
    with torch.device("meta"):
        net = MsViT(
            arch="l1,h3,d96,n1,f256,p4_l2,h3,d192,n2,f256_l3,h6,d384,n8,f256_"
            "l4,h12,d768,n1,g0,f256",
            attention="linformer",
            img_size=1344,
        )
    target = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    output, report = convert(item.content(), target)
    check_account(item, target, output, report)
    assert report.resized["layer1.1.attn.proj_k"] == ((3137, 256), (1 + 336**2, 256))
    why = "projection of the values: the model's share that of the keys"
    assert report.dropped["layer1.1.attn.proj_v"] == why


# --- values ------------------------------------------------------------------------------------

TOY = dict(
    embed_dim=[8, 8, 16],
    depth=[1, 1, 1],
    num_heads=[2, 2, 4],
    patch_size=[4, 2, 2],
    num_global_tokens=[1, 1, 0],
    attention_size=[3, 2, 2],
    use_abs_pos=[True, False, False],
    img_size=64,
    out_features=["layer3"],
)


def toy(**changes) -> MsViT:
    torch.manual_seed(0)
    net = MsViT(**TOY | changes)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    return net


def from_to(source: MsViT, target: MsViT, **changes):
    """Convert, as a classifier's file."""
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    state |= {f"module.{name}": value for name, value in changes.pop("extra", {}).items()}
    shapes = {name: tuple(value.shape) for name, value in target.state_dict().items()}
    return convert({"net": state}, shapes, **changes)


def test_fused_weights_are_split_and_copied_for_global_tokens():
    full, sparse = toy(attention="full"), toy(share_global_weights=False)
    fused = full.get_submodule("layer1.1.attn.qkv")
    state, report = from_to(full, sparse)
    for ending, parameter in fused.named_parameters():
        for suffix in ("", "_global"):
            query = state[f"layer1.1.attn.query{suffix}.{ending}"]
            assert torch.equal(query, parameter[:8])
            assert torch.equal(state[f"layer1.1.attn.kv{suffix}.{ending}"], parameter[8:])
    proj = full.get_submodule("layer1.1.attn.proj").weight
    assert torch.equal(state["layer1.1.attn.proj_global.weight"], proj)
    assert report.made["layer1.1.attn.kv_global.bias"] == ["layer1.1.attn.qkv.bias"]
    assert "layer3.1.attn.query_global.weight" not in state  # that stage has no global tokens
    back, _ = from_to(sparse_with(sparse, state), toy(attention="full"), allow_inexact=True)
    assert torch.equal(back["layer1.1.attn.qkv.weight"], fused.weight)


def sparse_with(net: MsViT, state: dict[str, torch.Tensor]) -> MsViT:
    net.load_state_dict(state)
    return net


def test_sparse_weights_without_copies_are_copied():
    state, _ = from_to(toy(), toy(share_global_weights=False))
    for name in ("query", "kv", "proj"):
        own = state[f"layer2.1.attn.{name}.weight"]
        assert torch.equal(state[f"layer2.1.attn.{name}_global.weight"], own)


def test_copies_must_be_equal_where_the_model_shares_them():
    own = toy(share_global_weights=False)
    with pytest.raises(InputError, match=r"share those of the others; these differ \(layer"):
        from_to(own, toy())
    _, report = from_to(own, toy(), allow_inexact=True)
    assert len(report.inexact) == 12
    for part in ("query", "kv", "proj"):
        for i in (1, 2):
            twin = own.get_submodule(f"layer{i}.1.attn.{part}").state_dict()
            own.get_submodule(f"layer{i}.1.attn.{part}_global").load_state_dict(twin)
    _, report = from_to(own, toy())
    assert not report.inexact
    assert len(report.dropped) == 12


def test_what_one_global_token_has_is_repeated():
    one, three = toy(), toy(num_global_tokens=[3, 2, 0])
    state, report = from_to(one, three)
    source = one.state_dict()
    # The published converter repeats the token and leaves its positions and biases out.
    for name in ("layer1.0.cls_token", "layer1.0.cls_pos_embed"):
        assert torch.equal(state[name], source[name].expand(1, 3, 8))
    for name in ("g2l_relative_position_bias", "g2g_relative_position_bias"):
        full = state[f"layer2.1.attn.{name}"]
        assert torch.equal(full, source[f"layer2.1.attn.{name}"].expand(full.shape))
    assert report.resized["layer1.0.cls_pos_embed"] == ((1, 1, 8), (1, 3, 8))
    with pytest.raises(InputError, match=r"shape of .*cls_token"):
        from_to(three, toy(num_global_tokens=[2, 2, 0]))


def test_positions_are_stretched():
    small, large = toy(), toy(img_size=96, attention_size=[3, 3, 2])
    state, report = from_to(small, large)
    source = small.state_dict()
    line = source["layer1.0.x_pos_embed"]
    expected = F.interpolate(line.mT[..., None], size=(24, 1), mode="bilinear")[..., 0].mT
    torch.testing.assert_close(state["layer1.0.x_pos_embed"], expected)
    name = "layer2.1.attn.local_relative_position_bias_table"
    square = source[name].view(1, 7, 7, 2).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(11, 11), mode="bilinear")
    torch.testing.assert_close(state[name], expected.permute(0, 2, 3, 1).reshape(121, 2))
    assert set(report.resized) == {"layer1.0.x_pos_embed", "layer1.0.y_pos_embed", name}


def test_linformer_projections_are_stretched_over_the_map():
    changes = dict(attention="linformer", attention_size=4)
    state, _ = from_to(toy(**changes), toy(**changes, img_size=96, share_kv=False))
    source = toy(**changes).state_dict()["layer1.1.attn.proj_k"]
    square = source[1:].view(1, 16, 16, 4).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=(24, 24), mode="bilinear").permute(0, 2, 3, 1)
    for name in ("proj_k", "proj_v"):
        made = state[f"layer1.1.attn.{name}"]
        assert torch.equal(made[0], source[0])  # of the global token
        torch.testing.assert_close(made[1:], expected.reshape(576, 4))


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        ({"use_abs_pos": True}, {"use_abs_pos": False}, r"2 of its weights|its weights are not"),
        ({}, {"num_global_tokens": 0}, r"a place for global tokens .*cls_token"),
        ({"attention": "srformer"}, {"attention": "vil"}, r"keys have no place .*proj_sr"),
        ({}, {"attention": "performer"}, r"its weights are not in the file .*projection_matrix"),
    ],
)
def test_other_models_are_refused(source, target, text):
    with pytest.raises(InputError, match=text):
        from_to(toy(**source), toy(**target))


def test_a_table_that_is_no_square_is_refused():
    table = torch.zeros(48, 2)
    with pytest.raises(InputError, match="position table: expected a square, got 48 rows"):
        from_to(toy(), toy(), extra={"layer2.1.attn.local_relative_position_bias_table": table})


def test_the_output_of_the_published_converter_is_recognised():
    state = {f"backbone.bottom_up.{name}": value for name, value in toy().state_dict().items()}
    assert detect({"model": state}) == "vil_det"
    assert detect(dict(toy().state_dict())) == "vil"
