"""What conversion does to the numbers, at a size where they can be looked at."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitdet.backbones.vit import ViT
from vitdet.convert import convert, detect, tensors
from vitdet.pyramid import SimpleFeaturePyramid
from vitdet.utils.checks import InputError

from .manifests import GOLDEN

Weights = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
needs_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason=f"no golden cases: VITDET_GOLDEN is {GOLDEN}"
)


def golden(case: str) -> Weights:
    """Return the published implementation's weights of a golden case, under its names."""
    spec = importlib.util.spec_from_file_location("golden", GOLDEN / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shapes = json.loads((GOLDEN / f"{case}.json").read_text())["tensors"]
    return {name: torch.from_numpy(value) for name, value in module.fill(shapes).items()}


def vit(**changes: Any) -> ViT:
    options: dict[str, Any] = {"img_size": 128, "embed_dim": 48, "depth": 4, "num_heads": 3}
    options |= {"pretrain_img_size": 128}
    torch.manual_seed(0)
    return ViT(**options | changes)


def shapes(model: torch.nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def mae(class_row: bool = True, side: int = 8, **changes: Any) -> Weights:
    """Return random weights as MAE saves them."""
    torch.manual_seed(1)
    model = vit(pretrain_img_size=16 * side, pretrain_use_cls_token=class_row, **changes)
    weights = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    return weights | {
        "cls_token": torch.randn(1, 1, 48),
        "norm.weight": torch.randn(48),
        "norm.bias": torch.randn(48),
    }


# --- names: each tensor lands where its own numbers say ------------------------------------------

NAMES = [
    ("hf_vitdet/backbone", "encoder.layer.2.attention.rel_pos_h", "blocks.2.attn.rel_pos_h"),
    ("hf_vitdet/backbone", "encoder.layer.3.norm2.bias", "blocks.3.norm2.bias"),
    ("hf_vitdet/backbone", "embeddings.projection.bias", "patch_embed.proj.bias"),
    ("hf_vitdet/backbone", "embeddings.position_embeddings", "pos_embed"),
    (
        "hf_vitdet/backbone_resized",
        "encoder.layer.1.residual.norm3.weight",
        "blocks.1.residual.norm3.weight",
    ),
    ("sam/image_encoder_small", "blocks.0.mlp.lin1.weight", "blocks.0.mlp.fc1.weight"),
    ("sam/image_encoder_small", "blocks.3.mlp.lin2.bias", "blocks.3.mlp.fc2.bias"),
    ("sam/image_encoder_small", "blocks.1.attn.rel_pos_w", "blocks.1.attn.rel_pos_w"),
    ("timm/vit_map", "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.weight"),
    ("detectron2/vit_rel_pos", "pos_embed", "pos_embed"),
]
MODELS: dict[str, dict[str, Any]] = {
    "hf_vitdet/backbone": {
        "use_rel_pos": True,
        "window_size": 4,
        "global_block_indexes": [2],
        "pretrain_img_size": 224,
    },
    "hf_vitdet/backbone_resized": {
        "use_rel_pos": True,
        "window_size": 3,
        "global_block_indexes": [2, 3],
        "residual_block_indexes": [1, 3],
        "pretrain_img_size": 224,
    },
    "sam/image_encoder_small": {
        "use_rel_pos": True,
        "window_size": 3,
        "global_block_indexes": [2],
        "pretrain_use_cls_token": False,
    },
    "timm/vit_map": {"pretrain_use_cls_token": False},
    "detectron2/vit_rel_pos": {
        "use_rel_pos": True,
        "window_size": 3,
        "global_block_indexes": [2],
        "pretrain_img_size": 224,
    },
}
FORMATS_OF_CASES = {
    "hf_vitdet": "hf_vitdet",
    "sam": "sam",
    "timm": "timm",
    "detectron2": "detectron2",
}


@needs_golden
@pytest.mark.parametrize(("case", "name", "place"), NAMES)
def test_published_names(case: str, name: str, place: str) -> None:
    source = golden(case)
    assert detect(source) == FORMATS_OF_CASES[case.split("/", maxsplit=1)[0]]
    output, report = convert(source, shapes(vit(**MODELS[case])))
    assert report.used[name] == place
    assert torch.equal(output[place], source[name])
    assert not report.initialised
    assert not report.resized
    assert not report.notes


@needs_golden
def test_sam_position_embedding_keeps_its_order() -> None:
    source = golden("sam/image_encoder_small")
    grid = source["pos_embed"]  # (1, 8, 8, 48)
    target = shapes(vit(**MODELS["sam/image_encoder_small"]))
    output, report = convert({f"image_encoder.{n}": value for n, value in source.items()}, target)
    assert torch.equal(output["pos_embed"][0, 8 * 3 + 5], grid[0, 3, 5])
    assert set(report.dropped.values()) == {"SAM's neck: the pyramid takes its place"}


# --- roots: the backbone alone, in a pyramid, in a detector --------------------------------------


def test_backbone_weights_go_to_any_root_and_back() -> None:
    weights = mae()
    bare = shapes(vit())
    pyramid = shapes(SimpleFeaturePyramid(vit(), out_channels=8, scale_factors=(1.0,)))
    detector = {f"backbone.{name}": shape for name, shape in pyramid.items()}
    detector["roi_heads.box_predictor.cls_score.weight"] = (6, 8)
    for target, root in ((bare, ""), (pyramid, "net."), (detector, "backbone.net.")):
        output, report = convert({"model": weights}, target)
        assert report.used == {n: root + n for n in bare}
        assert all(torch.equal(output[root + name], weights[name]) for name in bare)
        assert set(report.initialised) == {n for n in target if not n.startswith(root)}


def test_detector_weights_go_to_smaller_roots() -> None:
    net = SimpleFeaturePyramid(vit(), out_channels=8, scale_factors=(1.0,))
    detector = {f"backbone.{name}": value for name, value in net.state_dict().items()}
    detector["roi_heads.box_predictor.cls_score.weight"] = torch.ones(6, 8)
    output, report = convert({"model": detector}, shapes(net))
    assert all(torch.equal(output[name], value) for name, value in net.state_dict().items())
    assert list(report.dropped) == ["roi_heads.box_predictor.cls_score.weight"]
    output, report = convert({"model": detector}, shapes(vit()))
    assert set(output) == set(shapes(vit()))
    assert set(report.dropped.values()) == {"pyramid or head: the model has no place for it"}


def test_data_parallel_prefix_is_taken_off() -> None:
    weights = {f"module.{name}": value for name, value in mae().items()}
    output, report = convert({"model": weights}, shapes(vit()))
    assert torch.equal(output["pos_embed"], weights["module.pos_embed"])
    assert report.source_format == "mae"


def test_own_files_convert_again() -> None:
    model = SimpleFeaturePyramid(vit(), out_channels=8, scale_factors=(1.0,))
    target = {f"backbone.{name}": shape for name, shape in shapes(model).items()}
    first, report = convert({"model": mae()}, target)
    content = {"model": first, "vitdet": {"format": 1, "initialised": report.initialised}}
    assert detect(content) == "vitdet"
    second, again = convert(content, target)
    assert again.initialised == report.initialised
    assert all(torch.equal(second[name], first[name]) for name in first)


# --- numbers -----------------------------------------------------------------------------------


def test_position_embedding_grows_with_its_class_row() -> None:
    weights = mae()
    target = shapes(vit(pretrain_img_size=160))
    output, report = convert({"model": weights}, target)
    grid = weights["pos_embed"][:, 1:].reshape(1, 8, 8, 48).permute(0, 3, 1, 2)
    grown = F.interpolate(grid, size=(10, 10), mode="bicubic", align_corners=False)
    expected = grown.permute(0, 2, 3, 1).reshape(1, 100, 48)
    torch.testing.assert_close(output["pos_embed"][:, 1:], expected, rtol=0, atol=1e-6)
    assert torch.equal(output["pos_embed"][:, :1], weights["pos_embed"][:, :1])
    assert report.resized == {"pos_embed": ((1, 65, 48), (1, 101, 48))}


def test_class_row_dropped_or_filled_with_zeros() -> None:
    weights = mae()
    output, report = convert({"model": weights}, shapes(vit(pretrain_use_cls_token=False)))
    assert torch.equal(output["pos_embed"], weights["pos_embed"][:, 1:])
    assert report.notes == ["pos_embed: class row dropped, the model has none"]
    weights = mae(class_row=False)
    output, report = convert({"model": weights}, shapes(vit()))
    assert torch.equal(output["pos_embed"][:, 1:], weights["pos_embed"])
    assert not output["pos_embed"][:, 0].any()
    assert report.notes == ["pos_embed: class row filled with zeros, the file has none"]


def test_shrinking_positions_says_how_to_keep_them() -> None:
    _, report = convert({"model": mae(side=10)}, shapes(vit()))
    assert report.notes == [
        "pos_embed shrinks from 10x10 to 8x8 places: to keep all, set the backbone's "
        "pretrain_img_size to 10 times its patch size"
    ]


def test_position_embedding_with_two_tokens_is_refused() -> None:
    weights = mae()
    weights["pos_embed"] = torch.zeros(1, 66, 48)
    with pytest.raises(InputError, match=r"x: pos_embed of the file: expected a square .* 66 rows"):
        convert({"model": weights}, shapes(vit()), source="x")


def test_relative_positions_are_resized_linearly() -> None:
    options: dict[str, Any] = {"use_rel_pos": True, "window_size": 4}
    source = {n: torch.randn_like(v) for n, v in vit(**options).state_dict().items()}
    name = "blocks.1.attn.rel_pos_w"
    target = shapes(vit(use_rel_pos=True, window_size=6))
    output, report = convert({"model": source}, target, source_format="detectron2")
    expected = F.interpolate(source[name].T[None], size=11, mode="linear")[0].T
    torch.testing.assert_close(output[name], expected, rtol=0, atol=1e-6)
    assert report.resized[name] == ((7, 16), (11, 16))
    assert len(report.resized) == 8


def test_patch_kernel_is_resampled_on_demand() -> None:
    weights = mae(patch_size=14, side=8 * 16 // 14)
    grid = weights["pos_embed"].shape
    target = shapes(vit())
    output, report = convert({"model": weights}, target, resize_patch_embed=True)
    kernel = weights["patch_embed.proj.weight"]
    expected = F.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(output["patch_embed.proj.weight"], expected)
    assert report.resized["patch_embed.proj.weight"] == ((48, 3, 14, 14), (48, 3, 16, 16))
    assert report.resized["pos_embed"] == (tuple(grid), (1, 65, 48))
    assert "patch_embed resampled from 14 to 16 pixels" in report.notes


def test_half_precision_stays() -> None:
    weights = {name: value.half() for name, value in mae().items()}
    output, _ = convert({"model": weights}, shapes(vit(pretrain_img_size=160)))
    assert {value.dtype for value in output.values()} == {torch.float16}


def test_folded_layer_scale_is_the_same_network() -> None:
    torch.manual_seed(1)
    source = vit(layer_scale=True)
    for value in source.parameters():
        torch.nn.init.normal_(value, std=0.3)
    model = vit()
    output, report = convert(
        {"state_dict": source.state_dict()},
        shapes(model),
        source_format="detectron2",
        fold_layer_scale=True,
    )
    model.load_state_dict(output)
    image = torch.randn(1, 3, 128, 128)
    expected = source(image)["last_feat"]
    torch.testing.assert_close(model(image)["last_feat"], expected, rtol=0, atol=1e-4)
    assert report.made["blocks.2.mlp.fc2.bias"] == ["blocks.2.mlp.fc2.bias", "blocks.2.ls2.gamma"]
    assert report.notes == ["LayerScale of 8 branches folded into the layers before it"]
    half = {name: value.bfloat16() for name, value in source.state_dict().items()}
    output, _ = convert(half, shapes(model), source_format="detectron2", fold_layer_scale=True)
    assert {value.dtype for value in output.values()} == {torch.bfloat16}
    name, gamma = "blocks.0.attn.proj.weight", half["blocks.0.ls1.gamma"].float()
    assert torch.equal(output[name], (half[name].float() * gamma[:, None]).bfloat16())


def test_folding_what_is_not_there() -> None:
    with pytest.raises(InputError, match=r"x: --fold-layer-scale: expected LayerScale in the file"):
        convert({"model": mae()}, shapes(vit()), fold_layer_scale=True, source="x")


def test_weights_are_chosen_among_the_nests_of_a_file() -> None:
    average = {name: value + 1 for name, value in mae().items()}
    target = shapes(vit())
    content = {"model": mae(), "ema_state": average, "iteration": 3}
    output, report = convert(content, target, source_format="mae")
    assert torch.equal(output["pos_embed"], content["model"]["pos_embed"])
    assert report.nested_under == "model"
    assert "weights taken from 'model'; --weights takes another: ema_state" in report.notes
    output, report = convert(content, target, source_format="mae", weights="ema_state")
    assert torch.equal(output["pos_embed"], average["pos_embed"])
    assert report.nested_under == "ema_state"
    content = {"state_dict": mae(), "state_dict_ema": average}
    output, report = convert(content, target, source_format="mae")
    assert torch.equal(output["pos_embed"], average["pos_embed"])
    with pytest.raises(
        InputError, match=r"x: --weights: .* got 'ema', the file has state_dict, st"
    ):
        convert(content, target, weights="ema", source="x")
    with pytest.raises(InputError, match="expected tensors, got other things: a"):
        convert({"mine": {"a": 1}, "model": mae()}, target, weights="mine")


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "model._orig_mod.",
        "student.module.",
    ],
)
@pytest.mark.parametrize(
    "nest", ["", "state_dict", "model_state_dict", "weights", "params", "student"]
)
def test_wrappers_are_taken_off(prefix: str, nest: str) -> None:
    weights = {f"{prefix}{name}": value for name, value in mae().items()}
    content = {nest: weights, "epoch": 3} if nest else weights
    output, report = convert(content, shapes(vit()), source_format="mae")
    assert torch.equal(output["pos_embed"], weights[f"{prefix}pos_embed"])
    assert report.nested_under == nest


def test_class_token_and_the_row_for_it() -> None:
    weights = mae()
    tokens = {"use_cls_token": True, "final_norm": True}
    output, report = convert({"model": weights}, shapes(vit(**tokens)))
    assert torch.equal(output["cls_token"], weights["cls_token"])
    assert report.dropped == {}
    output, report = convert(
        {"model": weights}, shapes(vit(**tokens, pretrain_use_cls_token=False))
    )
    row = weights["pos_embed"][:, :1]
    assert torch.equal(output["cls_token"], weights["cls_token"] + row)
    assert torch.equal(output["pos_embed"], weights["pos_embed"][:, 1:])
    assert report.made["cls_token"] == ["cls_token", "pos_embed"]


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"num_register_tokens": 2}, "Set num_register_tokens"),
        ({"pre_norm": True}, "Set pre_norm"),
        ({"ffn_layer": "swiglu"}, "Set ffn_layer"),
    ],
)
def test_parts_that_the_file_lacks(changes: dict[str, Any], advice: str) -> None:
    with pytest.raises(InputError, match=rf"of its weights are not in the file .* {advice}"):
        convert({"model": mae()}, shapes(vit(**changes)))


# --- computed weights ----------------------------------------------------------------------------


def test_functions_of_computed_weights() -> None:
    q, v = torch.arange(4.0), torch.arange(4.0) + 10
    joined = tensors.join([q, None, v], (12,))
    assert torch.equal(joined, torch.cat([q, torch.zeros(4), v]))
    assert torch.equal(tensors.part(2)([joined], (4,)), v)
    assert torch.equal(tensors.part(1, 2)([v], (2,)), v[2:])
    table = torch.ones(5, 16)
    assert torch.equal(tensors.scaled_by_head([table], (5, 16)), table / 4)
    assert torch.equal(tensors.scaled(3)([v], (4,)), 3 * v)
    assert tensors.batched([torch.ones(5, 3)], (1, 5, 3)).shape == (1, 5, 3)
    assert tensors.reshaped([torch.ones(4, 3)], (12,)).shape == (12,)
    assert tensors.reshaped([torch.ones(4, 3)], (13,)).shape == (4, 3)
    assert torch.equal(tensors.zeros([table.half()], (2,)), torch.zeros(2, dtype=torch.half))
    with pytest.raises(ValueError, match="no tensor"):
        tensors.copy([None], (4,))


def test_a_rule_does_not_replace_a_tensor_of_the_same_name_unread() -> None:
    weights = mae()
    bias = weights["patch_embed.proj.bias"]
    output, report = convert(weights, shapes(vit()), source_format="timm")
    assert torch.equal(output["patch_embed.proj.bias"], bias)
    del weights["patch_embed.proj.bias"]
    output, report = convert(weights, shapes(vit()), source_format="timm")
    assert torch.equal(output["patch_embed.proj.bias"], torch.zeros(48))
    assert "patch_embed.proj.bias is zero: the file has none" in report.notes
    assert report.made == {"patch_embed.proj.bias": ["patch_embed.proj.weight"]}
    assert report.used["patch_embed.proj.weight"] == "patch_embed.proj.weight"


def test_gradients_flow_through_a_conversion() -> None:
    weights = {name: value.requires_grad_() for name, value in mae().items()}
    output, _ = convert(weights, shapes(vit(pretrain_img_size=160)), source_format="mae")
    sum(value.sum() for value in output.values()).backward()
    assert torch.equal(weights["blocks.1.norm1.weight"].grad, torch.ones(48))
    assert weights["pos_embed"].grad.abs().sum() > 0


# --- what is not let through ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blocks.2.attn.qkv.weight", "blocks.0.norm1.bias", "pos_embed"])
def test_a_missing_weight_is_never_left_to_initialisation(name: str) -> None:
    weights = mae()
    del weights[name]
    with pytest.raises(InputError, match=rf"1 of its weights are not in the file \({name}\)"):
        convert({"model": weights}, shapes(vit()))


def test_propagation_blocks_and_tables_may_start_fresh() -> None:
    target = shapes(vit(residual_block_indexes=[1], use_rel_pos=True))
    _, report = convert({"model": mae()}, target)
    assert len(report.initialised) == 9 + 8
    assert all(".residual." in n or ".rel_pos_" in n for n in report.initialised)


def test_a_table_missing_among_others_is_an_error() -> None:
    source = vit(use_rel_pos=True).state_dict()
    del source["blocks.1.attn.rel_pos_h"]
    with pytest.raises(InputError, match=r"not in the file \(blocks\.1\.attn\.rel_pos_h\)"):
        convert({"model": source}, shapes(vit(use_rel_pos=True)), source_format="detectron2")


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("blocks.0.ls1.gamma", "Set layer_scale"),
        ("blocks.0.extra.weight", "Check --config-file"),
        ("patch_embed.norm.weight", "Check --config-file"),
    ],
)
def test_an_unknown_key_is_an_error(key: str, advice: str) -> None:
    weights = mae() | {key: torch.ones(48)}
    with pytest.raises(InputError, match=rf"1 keys have no place in the model \({key}\).*{advice}"):
        convert({"model": weights}, shapes(vit()), source_format="mae")


def test_relative_positions_in_a_format_without_them_are_refused() -> None:
    # ViTAE's tables belong to scaled queries: they must not pass as detectron2's
    weights = mae() | {"blocks.0.attn.rel_pos_h": torch.ones(15, 16)}
    for name in ("mae", "timm"):
        with pytest.raises(InputError, match="relative positions, which this format does not"):
            convert({"model": weights}, shapes(vit(use_rel_pos=True)), source_format=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    weights = mae()
    weights["blocks.1.mlp.fc1.bias"][3] = value
    with pytest.raises(InputError, match=r"x: blocks\.1\.mlp\.fc1\.bias: expected finite numbers"):
        convert({"model": weights}, shapes(vit()), source="x")


def test_two_keys_for_one_weight() -> None:
    source = {f"image_encoder.{n.replace('fc', 'lin')}": v for n, v in mae().items()}
    source["image_encoder.blocks.0.mlp.fc1.bias"] = torch.ones(192)
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.fc1\.bias: expected one key, got"):
        convert(source, shapes(vit()), source_format="sam")


def test_wrong_content_and_formats() -> None:
    target = shapes(vit())
    with pytest.raises(InputError, match=r"state dict: expected tensors, got other things: epoch"):
        convert({"epoch": 3}, target)
    with pytest.raises(InputError, match="expected tensors, got nothing"):
        convert({}, target)
    with pytest.raises(InputError, match=r"got timmm\. Did you mean timm\?"):
        convert(mae(), target, source_format="timmm")
    with pytest.raises(InputError, match=r"expected a key that ends in patch_embed\.proj\.weight"):
        convert({"w": torch.ones(1)}, target, source_format="mae")
    with pytest.raises(
        InputError, match=r"backbone of the model: .* a plain ViT, got names like back"
    ):
        convert({"model": mae()}, {"backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7)})


def test_the_summary_shows_counts_and_rules() -> None:
    target = shapes(vit(pretrain_img_size=160, use_rel_pos=True))
    _, report = convert({"model": mae()}, target)
    lines = report.summary().splitlines()
    assert lines[0] == "format       mae (under 'model')"
    assert lines[1] == "used         51 keys"
    assert lines[2] == "resized      pos_embed: 1x65x48 to 1x101x48"
    assert lines[3].startswith("dropped      1: class token")
    assert lines[4].startswith("dropped      2: norm after the last block")
    assert lines[5].startswith("initialised  8 names (blocks.0.attn.rel_pos_h")
