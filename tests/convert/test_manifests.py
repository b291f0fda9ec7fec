"""Every published file: converted with every key accounted for, or refused in one line."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch

from vitdet.backbones.vit import ViT
from vitdet.convert import FORMATS, Report, convert, detect
from vitdet.utils.checks import InputError

from .manifests import CHECKPOINTS, Published, find, published

pytestmark = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason=f"no manifests: VITDET_CHECKPOINTS is {CHECKPOINTS}"
)
Shapes = dict[str, tuple[int, ...]]
ZOO = list(published("detectron2_vitdet_coco", "detectron2_vitdet_lvis"))
PLAIN = ("mae", "timm_vit", "sam", "hf_vitdet")
FORMAT_OF = {"timm_vit": "timm", "mae": "mae", "sam": "sam", "hf_vitdet": "hf_vitdet"}
# Under timm's names too; they need LayerScale in the model.
LAYER_SCALE = [
    item
    for item in published("dinov2", "deit3")
    if "blocks.0.ls1.gamma" in item.tensors and "mask_token" not in item.tensors
]
CONVERTED = {item.name for item in (*ZOO, *published(*PLAIN), *LAYER_SCALE)}
REFUSED = [item for item in published() if item.name not in CONVERTED]
CLASS_TOKEN = "class token: a detector's backbone has none"
FINAL_NORM = "norm after the last block: a ViTDet backbone has none"


def ids(items: list[Published]) -> list[str]:
    return [f"{item.family}/{item.name}" for item in items]


def detector(letter: str) -> Shapes:
    return find(f"mask_rcnn_vitdet_{letter}.coco").shapes()


def letter_of(item: Published) -> str:
    widths = {768: "b", 1024: "l", 1280: "h"}
    names = ("patch_embed.proj.weight", "embeddings.projection.weight")
    return next(
        widths.get(tensor.shape[0], "b")
        for name, tensor in item.tensors.items()
        if name.endswith(names)
    )


def check_account(item: Published, target: Shapes, output: dict[str, Any], report: Report) -> None:
    """Every key is used or dropped, every name of the model filled or left to initialisation."""
    assert set(report.used) | set(report.dropped) == set(item.tensors)
    assert not set(report.used) & set(report.dropped)
    assert len(set(report.used.values())) == len(report.used)
    assert set(output) == set(report.used.values())
    assert set(output) | set(report.initialised) == set(target)
    assert not set(output) & set(report.initialised)
    assert {name: tuple(tensor.shape) for name, tensor in output.items()} == {
        name: target[name] for name in output
    }
    assert report.unaccounted == report.missing == []


@pytest.mark.parametrize("item", ZOO, ids=ids(ZOO))
def test_zoo_files_are_used_whole(item: Published) -> None:
    output, report = convert(item.content(), item.shapes())
    check_account(item, item.shapes(), output, report)
    assert report.source_format == "detectron2"
    assert report.used == {name: name for name in item.tensors}
    assert not report.dropped
    assert not report.resized
    assert not report.initialised


BACKBONES = list(published("mae", "timm_vit", "hf_vitdet", "sam"))


@pytest.mark.parametrize("item", BACKBONES, ids=ids(BACKBONES))
def test_backbone_files_leave_the_heads(item: Published) -> None:
    target = detector(letter_of(item))
    if item.name.endswith(".residual"):
        target |= {
            re.sub(r"encoder\.layer", "backbone.net.blocks", name): tuple(tensor.shape)
            for name, tensor in item.tensors.items()
            if ".residual." in name
        }
    patch_14 = "huge" in item.name and item.family == "mae"
    output, report = convert(item.content(), target, resize_patch_embed=patch_14)
    check_account(item, target, output, report)
    assert report.source_format == FORMAT_OF[item.family]
    assert report.nested_under == item.nested_under
    has_rel_pos = item.family in ("sam", "hf_vitdet")
    for name in report.initialised:
        assert not name.startswith("backbone.net.") or (not has_rel_pos and ".rel_pos_" in name)
    outside = [name for name in target if not name.startswith("backbone.net.")]
    rel_pos = [name for name in target if ".rel_pos_" in name]
    assert len(report.initialised) == len(outside) + (0 if has_rel_pos else len(rel_pos))
    changed = {"backbone.net.patch_embed.proj.weight"} if patch_14 else set()
    if patch_14 or item.family == "sam" or "384" in item.name:
        changed.add("backbone.net.pos_embed")
    assert set(report.resized) == changed


DROPPED = {
    "mae_pretrain_vit_base": {CLASS_TOKEN: 1, FINAL_NORM: 2},
    "mae_pretrain_vit_base.with_decoder": {
        CLASS_TOKEN: 1,
        FINAL_NORM: 2,
        "decoder of the pretraining": 104,
    },
    "vit_base_patch16_224.augreg_in21k": {CLASS_TOKEN: 1, FINAL_NORM: 2, "classifier": 2},
    "sam_vit_b": {
        "SAM's neck: the pyramid takes its place": 6,
        "prompt encoder and mask decoder": 137,
    },
    "hf_vitdet_base.backbone": {},
}


@pytest.mark.parametrize("name", DROPPED)
def test_rules_that_drop(name: str) -> None:
    item = find(name)
    _, report = convert(item.content(), detector("b"))
    assert Counter(report.dropped.values()) == DROPPED[name]


def test_what_stands_beside_the_weights_is_noted() -> None:
    item = find("mae_pretrain_vit_base.with_decoder")
    _, report = convert(item.content(), detector("b"))
    assert report.notes == ["left out beside the weights: args, epoch, optimizer, ..."]


def vit_for(item: Published, **changes: Any) -> Shapes:
    """Return the shapes of our ViT of the file's size, grid and patch, with LayerScale."""
    kernel = item.tensors["patch_embed.proj.weight"]
    depth = len([name for name in item.tensors if name.endswith(".norm1.weight")])
    rows, patch = item.tensors["pos_embed"].shape[1], kernel.shape[2]
    options: dict[str, Any] = {"embed_dim": kernel.shape[0], "depth": depth, "patch_size": patch}
    options |= {"num_heads": kernel.shape[0] // 64, "pretrain_img_size": int(rows**0.5) * patch}
    options |= {"pretrain_use_cls_token": False, "layer_scale": True}
    with torch.device("meta"):
        model = ViT(**options | changes)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("item", LAYER_SCALE, ids=ids(LAYER_SCALE))
def test_files_with_layer_scale(item: Published) -> None:
    if "giant" in item.name:
        with pytest.raises(InputError, match=r"shape of blocks\.0\.mlp\.fc2\.weight"):
            convert(item.content(), vit_for(item, mlp_ratio=8192 / 1536))
        return
    target = vit_for(item)
    output, report = convert(item.content(), target)
    check_account(item, target, output, report)
    assert report.initialised == []
    had_class_row = item.tensors["pos_embed"].shape[1] % 2 == 0 and "reg4" not in item.name
    had_class_row = had_class_row and item.family == "dinov2"
    assert ("pos_embed: class row dropped, the model has none" in report.notes) == had_class_row
    with pytest.raises(InputError, match="Set layer_scale of the recipe's backbone"):
        convert(item.content(), vit_for(item, layer_scale=False))


@pytest.mark.parametrize("item", REFUSED, ids=ids(REFUSED))
def test_other_files_are_refused(item: Published) -> None:
    target = detector(letter_of(item)) if _has_patch_embed(item) else detector("b")
    for name in (None, *FORMATS):
        with pytest.raises(InputError, match=r"^FILE") as error:
            convert(item.content(), target, source_format=name, source="FILE")
        assert "\n" not in str(error.value)


def _has_patch_embed(item: Published) -> bool:
    return any(name.endswith("patch_embed.proj.weight") for name in item.tensors)


REASONS = {
    "eva02_B_coco_bsl": "rotary positions of an EVA-02 detector",
    "eva_coco_det": "separate q and v biases of an EVA-01 detector",
    "timm.vit_base_patch16_clip_224.laion2b": "CLIP normalises the tokens before the first block",
    "beit_base_patch16_224.in22k_ft_in22k": "LayerScale under the names of BEiT",
    "mmdet3_vitdet_mask_rcnn_vit_b": "format: expected one of vitdet, detectron2, sam",
    "easycv_vitdet_mask_rcnn": "format: expected one of vitdet, detectron2, sam",
    "vitae_vitdet_vit_b": "format: expected one of vitdet, detectron2, sam",
    "openai.ViT-B-16": "format: expected one of vitdet, detectron2, sam",
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_of_refusal(name: str) -> None:
    with pytest.raises(InputError, match=REASONS[name]):
        convert(find(name).content(), detector("b"))


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


def test_every_file_is_of_one_format_at_most() -> None:
    for item in published():
        try:
            found = detect(item.content())
        except InputError as error:
            assert " and " not in str(error).split("got")[1], item.name  # noqa: PT017
        else:
            assert found in FORMATS
