"""What conversion does to the numbers, at a size where they can be looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vitdet.backbones.vit import ViT
from vitdet.backbones.vitae import ViTAE
from vitdet.convert import convert, detect, tensors
from vitdet.convert.names import shapes_of
from vitdet.pyramid import SimpleFeaturePyramid
from vitdet.utils.checks import InputError

Weights = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]


def vit(**changes: Any) -> ViT:
    options: dict[str, Any] = {"img_size": 128, "embed_dim": 48, "depth": 4, "num_heads": 3}
    torch.manual_seed(0)
    return ViT(**options | {"pretrain_img_size": 128} | changes)


def shapes(model: torch.nn.Module) -> Shapes:
    return shapes_of(model.state_dict())


def mae(class_row: bool = True, side: int = 8, **changes: Any) -> Weights:
    """Return random weights as MAE saves them."""
    torch.manual_seed(1)
    model = vit(pretrain_img_size=16 * side, pretrain_use_cls_token=class_row, **changes)
    weights = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    tokens = {"cls_token": torch.randn(1, 1, 48), "norm.weight": torch.randn(48)}
    return weights | tokens | {"norm.bias": torch.randn(48)}


def pyramid() -> SimpleFeaturePyramid:
    return SimpleFeaturePyramid(vit(), out_channels=8, scale_factors=(1.0,))


# --- roots: the backbone alone, in a pyramid, in a detector --------------------------------------


def test_backbone_weights_go_to_any_root_and_back() -> None:
    weights, bare = mae(), shapes(vit())
    in_pyramid = shapes(pyramid())
    detector = {f"backbone.{name}": shape for name, shape in in_pyramid.items()}
    detector["roi_heads.box_predictor.cls_score.weight"] = (6, 8)
    for target, root in ((bare, ""), (in_pyramid, "net."), (detector, "backbone.net.")):
        output, report = convert({"model": weights}, target)
        assert report.used == {n: root + n for n in bare}
        assert all(torch.equal(output[root + name], weights[name]) for name in bare)
        assert set(report.initialised) == {n for n in target if not n.startswith(root)}


def test_detector_weights_go_to_smaller_roots() -> None:
    net = pyramid()
    detector = {f"backbone.{name}": value for name, value in net.state_dict().items()}
    detector["roi_heads.box_predictor.cls_score.weight"] = torch.ones(6, 8)
    output, report = convert({"model": detector}, shapes(net))
    assert all(torch.equal(output[name], value) for name, value in net.state_dict().items())
    why = "pyramid or head: the model has no place for it"
    assert report.dropped == {"roi_heads.box_predictor.cls_score.weight": why}


def test_own_files_convert_again() -> None:
    target = {f"backbone.{name}": shape for name, shape in shapes(pyramid()).items()}
    first, report = convert({"model": mae()}, target)
    content = {"model": first, "vitdet": {"format": 1, "initialised": report.initialised}}
    assert detect(content) == "vitdet"
    second, again = convert(content, target)
    assert again.initialised == report.initialised
    assert all(torch.equal(second[name], first[name]) for name in first)


PREFIXES = ("module.", "_orig_mod.", "model._orig_mod.", "_orig_mod.module.", "student.module.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("nest", ["", "state_dict", "model_state_dict", "params", "student"])
def test_wrappers_are_taken_off(prefix: str, nest: str) -> None:
    weights = {f"{prefix}{name}": value for name, value in mae().items()}
    content = {nest: weights, "epoch": 3} if nest else weights
    output, report = convert(content, shapes(vit()), source_format="mae")
    assert torch.equal(output["pos_embed"], weights[f"{prefix}pos_embed"])
    assert report.nested_under == nest


def test_weights_are_chosen_among_the_nests_of_a_file() -> None:
    average = {name: value + 1 for name, value in mae().items()}
    target = shapes(vit())
    content = {"model": mae(), "ema_state": average, "iteration": 3}
    _, report = convert(content, target, source_format="mae")
    assert report.nested_under == "model"
    note = "weights taken from 'model'; --weights takes another: ema_state"
    assert report.notes == [note, "left out beside the weights: iteration"]
    output, report = convert(content, target, source_format="mae", weights="ema_state")
    assert torch.equal(output["pos_embed"], average["pos_embed"])
    content = {"state_dict": mae(), "state_dict_ema": average}
    output, report = convert(content, target, source_format="mae")
    assert torch.equal(output["pos_embed"], average["pos_embed"])
    with pytest.raises(InputError, match=r"x: --weights: .* got 'ema', the file has state_dict, s"):
        convert(content, target, weights="ema", source="x")
    with pytest.raises(InputError, match="expected tensors, got other things: a"):
        convert({"mine": {"a": 1}, "model": mae()}, target, weights="mine")


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(10, 10), (12, 9)])
def test_position_embedding_grows_with_its_class_row(grid: tuple[int, int]) -> None:
    weights, size = mae(), [16 * side for side in grid]
    square = grid[0] == grid[1]
    options: dict[str, Any] = {"pretrain_img_size": size[0] if square else size}
    settings = None if square else options | {"patch_size": 16}
    output, report = convert({"model": weights}, shapes(vit(**options)), settings=settings)
    table = weights["pos_embed"][:, 1:].reshape(1, 8, 8, 48).permute(0, 3, 1, 2)
    grown = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
    expected = grown.flatten(2).mT
    torch.testing.assert_close(output["pos_embed"][:, 1:], expected, rtol=0, atol=1e-6)
    assert torch.equal(output["pos_embed"][:, :1], weights["pos_embed"][:, :1])
    assert report.resized == {"pos_embed": ((1, 65, 48), (1, 1 + grid[0] * grid[1], 48))}


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
    _, report = convert({"model": mae(side=10)}, shapes(vit()))
    assert report.notes == [
        "pos_embed shrinks from 10x10 to 8x8 places: to keep all, set the backbone's "
        "pretrain_img_size to 10 times its patch size"
    ]


def test_class_token_and_the_row_for_it() -> None:
    weights = mae()
    tokens = {"use_cls_token": True, "final_norm": True}
    output, report = convert({"model": weights}, shapes(vit(**tokens)))
    assert torch.equal(output["cls_token"], weights["cls_token"])
    assert report.dropped == {}
    no_row = shapes(vit(**tokens, pretrain_use_cls_token=False))
    output, report = convert({"model": weights}, no_row)
    assert torch.equal(output["cls_token"], weights["cls_token"] + weights["pos_embed"][:, :1])
    assert torch.equal(output["pos_embed"], weights["pos_embed"][:, 1:])
    assert report.made["cls_token"] == ["cls_token", "pos_embed"]


def test_relative_positions_are_resized_linearly() -> None:
    model = vit(use_rel_pos=True, window_size=4)
    source = {n: torch.randn_like(v) for n, v in model.state_dict().items()}
    name = "blocks.1.attn.rel_pos_w"
    target = shapes(vit(use_rel_pos=True, window_size=6))
    output, report = convert({"model": source}, target, source_format="detectron2")
    expected = F.interpolate(source[name].T[None], size=11, mode="linear")[0].T
    torch.testing.assert_close(output[name], expected, rtol=0, atol=1e-6)
    assert report.resized[name] == ((7, 16), (11, 16))
    assert len(report.resized) == 8


def test_patch_kernel_is_resampled_on_demand() -> None:
    weights = mae(patch_size=14, side=8 * 16 // 14)
    output, report = convert({"model": weights}, shapes(vit()), resize_patch_embed=True)
    kernel = weights["patch_embed.proj.weight"]
    expected = F.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(output["patch_embed.proj.weight"], expected)
    assert report.resized["patch_embed.proj.weight"] == ((48, 3, 14, 14), (48, 3, 16, 16))
    assert "patch_embed resampled from 14 to 16 pixels" in report.notes


def test_half_precision_and_gradients_stay() -> None:
    weights = {name: value.half() for name, value in mae().items()}
    target = shapes(vit(pretrain_img_size=160))
    output, _ = convert({"model": weights}, target)
    assert {value.dtype for value in output.values()} == {torch.float16}
    weights = {name: value.requires_grad_() for name, value in mae().items()}
    output, _ = convert(weights, target, source_format="mae")
    sum(value.sum() for value in output.values()).backward()
    assert torch.equal(weights["blocks.1.norm1.weight"].grad, torch.ones(48))
    assert weights["pos_embed"].grad.abs().sum() > 0


def test_folded_layer_scale_is_the_same_network() -> None:
    torch.manual_seed(1)
    source, model = vit(layer_scale=True), vit()
    for value in source.parameters():
        torch.nn.init.normal_(value, std=0.3)
    options: dict[str, Any] = {"source_format": "detectron2", "fold_layer_scale": True}
    output, report = convert({"state_dict": source.state_dict()}, shapes(model), **options)
    model.load_state_dict(output)
    image = torch.randn(1, 3, 128, 128)
    expected = source(image)["last_feat"]
    torch.testing.assert_close(model(image)["last_feat"], expected, rtol=0, atol=1e-4)
    assert report.made["blocks.2.mlp.fc2.bias"] == ["blocks.2.mlp.fc2.bias", "blocks.2.ls2.gamma"]
    assert report.notes == ["LayerScale of 8 branches folded into the layers before it"]
    half = {name: value.bfloat16() for name, value in source.state_dict().items()}
    output, _ = convert(half, shapes(model), **options)
    assert {value.dtype for value in output.values()} == {torch.bfloat16}
    name, gamma = "blocks.0.attn.proj.weight", half["blocks.0.ls1.gamma"].float()
    assert torch.equal(output[name], (half[name].float() * gamma[:, None]).bfloat16())
    for state, target in ((mae(), vit()), (source.state_dict(), source)):
        with pytest.raises(InputError, match=r"--fold-layer-scale: expected LayerScale in the fil"):
            convert(state, shapes(target), fold_layer_scale=True, source_format="detectron2")


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


# --- ViTAE: scaled tables, split biases, kernels of another size, names of stages ----------------


def vitae() -> ViTAE:
    options: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 8, "depth": 2}
    torch.manual_seed(0)
    return ViTAE(**options, num_heads=2, window_size=2, global_block_indexes=[1])


def vitae_file(**names: tuple[int, ...] | None) -> Weights:
    """Return a file without tables; a keyword is a name with "__" for ".", None takes it away."""
    found = {name: shape for name, shape in shapes(vitae()).items() if "rel_pos" not in name}
    for word, shape in names.items():
        name = word.replace("__", ".")
        found.pop(name, None)
        found |= {name: shape} if shape is not None else {}
    torch.manual_seed(1)
    return {
        name: torch.zeros((), dtype=torch.int64) if not shape else torch.randn(shape)
        for name, shape in found.items()
    }


def test_tables_for_scaled_queries_are_scaled() -> None:
    tables = {f"blocks__{i}__attn__rel_pos_{x}": (s, 4) for i, s in ((0, 3), (1, 7)) for x in "hw"}
    file = vitae_file(fpn1__1__ln__weight=(8,), **tables)
    source = {f"backbone.{name}": value for name, value in file.items()}
    assert detect({"state_dict": source}) == "vitae"
    output, report = convert({"state_dict": source}, shapes(vitae()), backbone_only=True)
    assert list(report.dropped) == ["backbone.fpn1.1.ln.weight"]
    for name in (f"blocks.{i}.attn.rel_pos_h" for i in (0, 1)):
        assert torch.equal(output[name], source[f"backbone.{name}"] * 4**-0.5)
    assert torch.equal(output["norm.bias"], source["backbone.norm.bias"])


def test_biases_of_q_and_v_become_one_with_nothing_for_k_and_back() -> None:
    split = {f"blocks__0__attn__{x}_bias": (8,) for x in "qv"}
    fused = dict.fromkeys((f"blocks__1__attn__{x}_bias" for x in "qv"), None)
    file = vitae_file(
        blocks__0__attn__qkv__bias=None, blocks__1__attn__qkv__bias=(24,), **split, **fused
    )
    output, report = convert({"model": file}, shapes(vitae()))
    assert report.source_format == "vitae_pretrain"
    q, v = file["blocks.0.attn.q_bias"], file["blocks.0.attn.v_bias"]
    assert torch.equal(output["blocks.0.attn.qkv.bias"], torch.cat([q, torch.zeros(8), v]))
    bias = file["blocks.1.attn.qkv.bias"]
    assert torch.equal(output["blocks.1.attn.q_bias"], bias[:8])
    assert torch.equal(output["blocks.1.attn.v_bias"], bias[16:])


def test_small_kernels_become_the_middle_of_larger_ones() -> None:
    small = {f"blocks__{i}__PCM__0__weight": (32, 4, 1, 1) for i in (0, 1)}
    small |= {f"blocks__{i}__PCM__3__weight": (8, 16, 1, 1) for i in (0, 1)}
    source = vitae_file(**small)
    output, _ = convert({"model": source}, shapes(vitae()))
    name = "blocks.1.PCM.3.weight"
    assert torch.equal(output[name][..., 1, 1], source[name][..., 0, 0])
    assert output[name].sum() == pytest.approx(float(source[name].sum()), abs=1e-5)
    x = torch.randn(1, 8, 5, 5)
    bias = output["blocks.0.PCM.0.bias"]
    large = F.conv2d(x, output["blocks.0.PCM.0.weight"], bias, padding=1, groups=2)
    expected = F.conv2d(x, source["blocks.0.PCM.0.weight"], bias, groups=2)
    torch.testing.assert_close(large, expected, rtol=0, atol=1e-6)


# --- what is not let through ---------------------------------------------------------------------


def test_propagation_blocks_and_tables_may_start_fresh() -> None:
    target = shapes(vit(residual_block_indexes=[1], use_rel_pos=True))
    _, report = convert({"model": mae()}, target)
    assert len(report.initialised) == 9 + 8
    assert all(".residual." in n or ".rel_pos_" in n for n in report.initialised)
    source = vit(use_rel_pos=True).state_dict()
    del source["blocks.1.attn.rel_pos_h"]  # one among others is missing
    with pytest.raises(InputError, match=r"not in the file \(blocks\.1\.attn\.rel_pos_h\)"):
        convert({"model": source}, shapes(vit(use_rel_pos=True)), source_format="detectron2")


def _broken(changes: dict[str, torch.Tensor | None]) -> Weights:
    weights: dict[str, Any] = mae() | changes
    return {name: value for name, value in weights.items() if value is not None}


NAN = torch.full((192,), float("nan"))
# (what the file has otherwise, options of the model, of the conversion, the message)
WRONG: list[tuple[dict[str, torch.Tensor | None], dict[str, Any], dict[str, Any], str]] = [
    ({"blocks.2.attn.qkv.weight": None}, {}, {}, "1 of its weights are not in the file (blocks.2."),
    (
        {"pos_embed": None},
        {},
        {"source_format": "mae"},
        "1 of its weights are not in the file (pos",
    ),
    ({}, {"num_register_tokens": 2}, {}, "set its num_register_tokens."),
    ({}, {"pre_norm": True}, {}, "set its pre_norm."),
    ({}, {"ffn_layer": "swiglu"}, {}, "set its ffn_layer."),
    ({"blocks.0.ls1.gamma": torch.ones(48)}, {}, {"source_format": "mae"}, "set its layer_scale"),
    (
        {"blocks.0.extra": torch.ones(1)},
        {},
        {},
        "1 keys have no place in the model (blocks.0.extra",
    ),
    (
        {"patch_embed.norm.weight": torch.ones(48)},
        {},
        {},
        "Check --config-file and --source-format",
    ),
    (
        {"blocks.0.attn.rel_pos_h": torch.ones(15, 16)},
        {"use_rel_pos": True},
        {},
        "relative positio",
    ),
    (
        {"pos_embed": torch.zeros(1, 66, 48)},
        {},
        {},
        "x: pos_embed of the file: expected a square gr",
    ),
    ({"blocks.1.mlp.fc1.bias": NAN}, {}, {}, "x: blocks.1.mlp.fc1.bias: expected finite numbers"),
    ({"blocks.1.mlp.fc1.bias": NAN / 0}, {}, {}, "expected finite numbers, got inf or nan"),
    (
        {"blocks.1.norm1.bias": torch.ones(48).cfloat()},
        {},
        {},
        "bfloat16 or float16, got complex64",
    ),
    ({}, {}, {"source_format": "timmm"}, "got timmm. Did you mean timm?"),
    ({}, {}, {"source_format": "clip"}, "x as clip: expected a key that ends in conv1.weight"),
]


@pytest.mark.parametrize(("changes", "options", "how", "text"), WRONG, ids=[w[3] for w in WRONG])
def test_wrong_files_and_models(
    changes: dict[str, Any], options: dict[str, Any], how: dict[str, Any], text: str
) -> None:
    # ViTAE's tables belong to scaled queries: they must not pass as detectron2's
    with pytest.raises(InputError) as error:
        convert({"model": _broken(changes)}, shapes(vit(**options)), source="x", **how)
    assert text in str(error.value)


def test_wrong_content() -> None:
    target = shapes(vit())
    with pytest.raises(InputError, match=r"state dict: expected tensors, got other things: epoch"):
        convert({"epoch": 3}, target)
    with pytest.raises(InputError, match="expected tensors, got nothing"):
        convert({}, target)
    with pytest.raises(InputError, match=r"backbone of the model: .* got names like backbone\.b"):
        convert({"model": mae()}, {"backbone.bottom_up.stem.conv1.weight": (64, 3, 7, 7)})
    source = {f"image_encoder.{n.replace('fc', 'lin')}": v for n, v in mae().items()}
    source["image_encoder.blocks.0.mlp.fc1.bias"] = torch.ones(192)
    with pytest.raises(InputError, match=r"blocks\.0\.mlp\.fc1\.bias: expected one key, got"):
        convert(source, target, source_format="sam")
    with pytest.raises(InputError, match=r"expected a multiple of 3 rows, got 4"):
        tensors.part(2)([torch.ones(4)], (1,))


def test_the_summary_shows_counts_and_rules() -> None:
    target = shapes(vit(pretrain_img_size=160, use_rel_pos=True))
    _, report = convert({"model": mae()}, target)
    lines = report.summary().splitlines()
    assert lines[:3] == [
        "format       mae (under 'model')",
        "used         51 keys",
        "resized      pos_embed: 1x65x48 to 1x101x48",
    ]
    assert lines[3].startswith("dropped      1: class token")
    assert lines[4].startswith("dropped      2: norm after the last block")
    assert lines[5].startswith("initialised  8 names (blocks.0.attn.rel_pos_h")
