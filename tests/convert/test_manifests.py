"""Every published file: converted with every key accounted for, or refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vitdet.backbones.vit import ViT
from vitdet.config import build_model, load_config, model_settings
from vitdet.convert import Report, UnaccountedError, convert, detect
from vitdet.convert.nesting import unnest
from vitdet.utils.checks import InputError

from .manifests import CHECKPOINTS, Published, find, published

pytestmark = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason=f"no manifests: VITDET_CHECKPOINTS is {CHECKPOINTS}"
)
CONFIGS = Path(__file__).parents[2] / "configs"
Shapes = dict[str, tuple[int, ...]]
CLASS_TOKEN = "class token: a detector's backbone has none"


def ids(items: list[Published]) -> list[str]:
    return [f"{item.family}/{item.name}" for item in items]


def detector(letter: str) -> Shapes:
    return find(f"mask_rcnn_vitdet_{letter}.coco").shapes()


def check_account(item: Published, target: Shapes, output: dict[str, Any], report: Report) -> None:
    """Every key is used or dropped, every name of the model filled or left to initialisation."""
    names, _ = unnest(item.content(), "source")
    assert set(report.used) | set(report.dropped) | set(report.inexact) == set(names)
    assert len(report.used) + len(report.dropped) + len(report.inexact) == len(names)
    direct = [name for name in report.used.values() if name not in report.made]
    assert len(set(direct)) == len(direct)
    assert set(output) == {*direct, *report.made}
    assert set(output) | set(report.initialised) == set(target)
    assert not set(output) & set(report.initialised)
    assert {name: tuple(tensor.shape) for name, tensor in output.items()} == {
        name: target[name] for name in output
    }
    assert report.unaccounted == report.missing == []


def test_what_stands_beside_the_weights_is_noted() -> None:
    item = find("mae_pretrain_vit_base.with_decoder")
    _, report = convert(item.content(), detector("b"))
    assert report.notes == ["left out beside the weights: args, epoch, optimizer, ..."]


# Image backbones that our ViT can be: with all their parts, nothing is left out but classifiers.
WHOLE = list(published("timm_vit", "deit3", "dinov2", "dinov3", "clip", "mae"))
_ANCHORS = ("patch_embed.proj.weight", "visual.conv1.weight", "embeddings.projection.weight")


def vit_for(item: Published, **changes: Any) -> Shapes:
    """Return the shapes of our ViT that has every part of the file."""
    tensors = item.tensors
    names = " ".join(tensors)
    kernel = next(value for name, value in tensors.items() if name.endswith(_ANCHORS))
    depth = len(set(re.findall(r"\b(?:blocks|resblocks)\.(\d+)\.(?:norm1|ln_1)\.", names)))
    positions = tensors.get("pos_embed", tensors.get("visual.positional_embedding"))
    rows = 0 if positions is None else positions.shape[-2]
    patch, gated = kernel.shape[2], "mlp.w3" in names or "giant" in item.name
    hidden = next(
        v.shape[-1] for n, v in tensors.items() if re.search(r"0\.mlp\.(fc2|w3|c_proj)\.w", n)
    )
    options: dict[str, Any] = {
        "embed_dim": kernel.shape[0],
        "depth": depth,
        "patch_size": patch,
        "num_heads": kernel.shape[0] // 64,
        "mlp_ratio": hidden / kernel.shape[0],
        "qkv_bias": "qkv.bias" in names or "in_proj_bias" in names or "q_bias" in names,
        "use_abs_pos": rows > 0,
        "pretrain_img_size": int(rows**0.5) * patch,
        "pretrain_use_cls_token": int(rows**0.5) ** 2 != rows,
        "use_cls_token": True,
        "num_register_tokens": 4
        if re.search(r"reg_token|register_tokens|storage_tok", names)
        else 0,
        "pre_norm": "norm_pre" in names or "ln_pre" in names,
        "final_norm": True,
        "layer_scale": bool(re.search(r"gamma", names)),
        "ffn_layer": "swiglu" if gated or "fc1_g" in names else "mlp",
    }
    with torch.device("meta"):
        model = ViT(**options | changes)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


_LEFT_OUT = r"head\.|fc_norm\.|mask_token$|decoder_|rope_embed\.periods$|visual\.proj$|.*bias_mask$"


@pytest.mark.parametrize("item", WHOLE, ids=ids(WHOLE))
def test_every_part_has_a_place_in_our_vit(item: Published) -> None:
    target = vit_for(item)
    output, report = convert(item.content(), target)
    check_account(item, target, output, report)
    assert report.initialised == []
    assert report.resized == {}
    for key in report.dropped:
        assert re.match(_LEFT_OUT, key), key


@pytest.mark.parametrize("item", WHOLE, ids=ids(WHOLE))
def test_a_detectors_backbone_needs_less(item: Published) -> None:
    bare = {"use_cls_token": False, "num_register_tokens": 0, "final_norm": False}
    target = vit_for(item, **bare)
    output, report = convert(item.content(), target)
    check_account(item, target, output, report)
    assert report.initialised == []
    tokens = r"(visual\.)?(cls_token|class_embedding|reg_token|register_tokens|storage_tokens)$"
    norms = r"(visual\.ln_post|norm)\."
    for key in report.dropped:
        assert re.match(f"{_LEFT_OUT}|{tokens}|{norms}", key), key
    assert CLASS_TOKEN in report.dropped.values()


SCALED = [item for item in WHOLE if any("gamma" in name for name in item.tensors)]


@pytest.mark.parametrize("item", SCALED, ids=ids(SCALED))
def test_layer_scale_is_kept_or_folded_by_name(item: Published) -> None:
    without = vit_for(item, layer_scale=False)
    with pytest.raises(InputError, match="Set layer_scale of the recipe's backbone"):
        convert(item.content(), without)
    output, report = convert(item.content(), without, fold_layer_scale=True)
    check_account(item, without, output, report)
    scales = {key for key in item.tensors if "gamma" in key}
    assert scales <= set(report.used)
    assert "blocks.0.attn.proj.weight" in report.made
    with pytest.raises(
        InputError, match=r"--fold-layer-scale: .* got blocks\.0\.ls1\.gamma in the"
    ):
        convert(item.content(), vit_for(item), fold_layer_scale=True)


CLIP = list(published("clip"))


@pytest.mark.parametrize("item", CLIP, ids=ids(CLIP))
def test_clip_without_its_first_norm_is_inexact(item: Published) -> None:
    target = vit_for(item, pre_norm=False)
    with pytest.raises(InputError, match=r"norm before the first block \(set pre_norm\).*inexact"):
        convert(item.content(), target)
    output, report = convert(item.content(), target, allow_inexact=True)
    check_account(item, target, output, report)
    assert len(report.inexact) == 2
    assert "inexact      2: norm before the first block" in report.summary()


BEIT = list(published("beit"))


@pytest.mark.parametrize("item", BEIT, ids=ids(BEIT))
def test_beit_without_its_bias_table_is_inexact(item: Published) -> None:
    target = vit_for(item, use_abs_pos=False, final_norm=False)
    with pytest.raises(InputError, match="full bias table of relative positions, which no"):
        convert(item.content(), target)
    output, report = convert(item.content(), target, allow_inexact=True)
    assert set(report.inexact) == {name for name in item.tensors if "bias_table" in name}
    check_account(item, target, output, report)
    assert report.made["blocks.0.attn.qkv.bias"] == [
        "blocks.0.attn.q_bias",
        "blocks.0.attn.v_bias",
    ]


def test_settings_that_no_shape_tells() -> None:
    item = find("dinov3_vitb16")
    target = vit_for(item)
    wrong = {"rope": "none", "norm_eps": 1e-5}
    with pytest.raises(InputError, match=r"rope='dinov3', not 'none'\. Set that in the recipe"):
        convert(item.content(), target, settings=wrong)
    _, report = convert(item.content(), target, settings=wrong, allow_inexact=True)
    assert report.settings == {"rope": ("dinov3", "none")}
    assert "inexact      rope is 'none', the weights were made with 'dinov3'" in report.summary()
    _, report = convert(item.content(), target, settings={"rope": "dinov3", "norm_eps": 1e-5})
    assert report.settings == {}


# published detector: the recipe that it is for
RECIPES = {
    "mask_rcnn_vitdet_b.coco": "COCO/mask_rcnn_vitdet_b_100ep",
    "eva02_B_coco_bsl": "COCO/cascade_mask_rcnn_eva02_b_bsl",
    "mmdet3_vitdet_mask_rcnn_vit_b": "mmdetection/mask_rcnn_vitdet_b_100ep",
    "easycv_vitdet_mask_rcnn": "easycv/mask_rcnn_vitdet_b_100ep",
    "easycv_vitdet_mask_rcnn_old_bottleneck": "easycv/mask_rcnn_vit_b_v06_bottleneck_100ep",
    "vitae_vitdet_vit_b": "vitae/mask_rcnn_vit_b_100ep",
}
NORMS = {
    "mask_rcnn_vitdet_b.coco": ("LN", "LN", "LN"),
    "eva02_B_coco_bsl": ("LN", "LN", "LN"),
    "mmdet3_vitdet_mask_rcnn_vit_b": ("LN", "LN", "LN"),
    "easycv_vitdet_mask_rcnn": ("GN1", "GN1", "GN1"),
    "easycv_vitdet_mask_rcnn_old_bottleneck": ("GN1+LN", "GN1", "GN1"),
    "vitae_vitdet_vit_b": ("LN", "LN", "LN"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_group_norm_is_no_layer_norm(name: str) -> None:
    # their weights have the same names and shapes: only the recipe tells
    cfg = load_config(CONFIGS / f"{RECIPES[name]}.py")
    model = build_model(cfg.model, device="meta")
    target = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    settings = model_settings(cfg.model, model)
    parts = ("pyramid.norm", "box_head.norm", "mask_head.norm")
    assert tuple(settings[part] for part in parts) == NORMS[name]
    content = find(name).content()
    _, report = convert(content, target, settings=settings)
    assert report.settings == {}

    wrong = settings | dict.fromkeys(parts, "LN" if "GN1" in NORMS[name] else "GN1")
    with pytest.raises(
        UnaccountedError, match=r"pyramid\.norm=.*, not '\w+'; box_head\.norm=.*Set"
    ):
        convert(content, target, settings=wrong)
    _, report = convert(content, target, settings=wrong, allow_inexact=True)
    assert set(report.settings) == set(parts)
    convert(content, target, settings=wrong, backbone_only=True)


def test_mae_huge_needs_leave_to_resample_its_kernel() -> None:
    with pytest.raises(InputError, match=r"patch size 16 \(model\), got patch size 14 \(file\)"):
        convert(find("mae_pretrain_vit_huge").content(), detector("h"))


def test_size_mismatches_name_both_sizes() -> None:
    item = find("mae_pretrain_vit_base")
    with pytest.raises(InputError, match=r"file has 768 channels \(embed_dim\), model 1024\."):
        convert(item.content(), detector("l"))
    deeper = {**detector("b"), "backbone.net.blocks.12.norm1.weight": (768,)}
    with pytest.raises(InputError, match=r"file has 12 blocks, model 13\."):
        convert(item.content(), deeper)


def test_class_count_mismatch_names_both_counts() -> None:
    lvis, coco = find("mask_rcnn_vitdet_b.lvis"), find("mask_rcnn_vitdet_b.coco")
    with pytest.raises(InputError, match=r"zoo\.pkl: file has 1203 classes, model 80\."):
        convert(lvis.content(), coco.shapes(), source="zoo.pkl")
    output, report = convert(lvis.content(), coco.shapes(), backbone_only=True)
    check_account(lvis, coco.shapes(), output, report)
    assert set(report.dropped.values()) == {"outside the backbone (--backbone-only)"}


def test_buffer_of_the_federated_loss() -> None:
    name = "roi_heads.box_predictor.fed_loss_cls_weights"
    lvis = find("mask_rcnn_vitdet_b.lvis")
    plain = {key: shape for key, shape in lvis.shapes().items() if key != name}
    output, report = convert(lvis.content(), plain)
    check_account(lvis, plain, output, report)
    assert report.dropped == {name: "buffer of the federated loss: the model has no such loss"}
    without = {key: value for key, value in lvis.tensors.items() if key != name}
    _, report = convert({"model": without}, lvis.shapes())
    assert report.initialised == [name]


def test_other_heads_are_unaccounted_for() -> None:
    cascade, mask = find("cascade_mask_rcnn_vitdet_b.coco"), detector("b")
    with pytest.raises(InputError, match=r"54 keys have no place.* 18 of its weights are not in"):
        convert(cascade.content(), mask)


NESTS = ("model", "module", "state_dict", "model_ema", "state_dict_ema", "net", "teacher")


@pytest.mark.parametrize("item", [*WHOLE, *BEIT], ids=ids([*WHOLE, *BEIT]))
def test_where_in_the_file_the_weights_lie_makes_no_difference(item: Published) -> None:
    # MAE's encoders alone have timm's names: that they lie under "model" is what tells them
    formats = {detect({nest: item.tensors, "epoch": 0}) for nest in NESTS}
    formats |= {detect(item.tensors)}
    formats |= {detect({f"module.{name}": value for name, value in item.tensors.items()})}
    timm = detect(item.content()) in ("timm", "mae")
    assert formats <= ({"timm", "mae"} if timm else {detect(item.content())})
