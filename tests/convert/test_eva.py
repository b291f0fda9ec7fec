"""Every published EVA file: each key used or dropped by rule, each weight of ours filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig
from torch import nn

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.backbones.vit import ViT
from vitdet.config import build_model
from vitdet.convert import convert
from vitdet.pyramid import SimpleFeaturePyramid
from vitdet.utils.checks import InputError

from .manifests import CHECKPOINTS, Published, find, published

pytestmark = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason=f"no manifests: VITDET_CHECKPOINTS is {CHECKPOINTS}"
)
MODELS = Path(__file__).parents[2] / "configs" / "common" / "models"
CLASS_TOKEN = "class token: a detector's backbone has none"
GLOBAL = {  # blocks of the published detectors that see the whole map
    "B_coco_bsl": [2, 5, 8, 11],
    "B_lvis_bsl": [2, 5, 8, 11],
    "B_coco_sys": [1, 3, 5, 7, 9, 11],
    "L_coco_bsl": [5, 11, 17, 23],
    "L_lvis_bsl": [5, 11, 17, 23],
}
B: dict[str, Any] = {"embed_dim": 768, "depth": 12, "num_heads": 12}
L: dict[str, Any] = {"embed_dim": 1024, "depth": 24, "num_heads": 16}


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def ids(items: list[Published]) -> list[str]:
    return [item.name for item in items]


def width(item: Published) -> int:
    return next(v.shape[0] for k, v in item.tensors.items() if k.endswith("patch_embed.proj.bias"))


def eva02(item: Published, **changes: Any) -> EVA02ViT:
    with torch.device("meta"):
        return EVA02ViT(**{**(B if width(item) == 768 else L), **changes})


def in_detector(net: nn.Module, item: Published) -> dict[str, tuple[int, ...]]:
    """The names of ours in a detector, with the heads that the file has."""
    with torch.device("meta"):
        levels = SimpleFeaturePyramid(net)
    outside = ("roi_heads.", "proposal_generator.rpn_head.")
    heads = {name: shape for name, shape in item.shapes().items() if name.startswith(outside)}
    return {f"backbone.{name}": shape for name, shape in shapes(levels).items()} | heads


DETECTORS = list(published("eva02_det"))


@pytest.mark.parametrize("item", DETECTORS, ids=ids(DETECTORS))
def test_detectors_of_eva02(item: Published) -> None:
    name = item.name.removeprefix("eva02_")
    whole = GLOBAL.get(name, list(range(2, 24, 3)))
    tables = {"64" if "bsl" in name else "96"}
    net = eva02(item, img_size=16 * int(*tables), global_block_indexes=whole, window_size=16)
    target = in_detector(net, item)
    output, report = convert(item.content(), target)
    assert report.source_format == "eva02"
    assert {key: tuple(value.shape) for key, value in output.items()} == target
    assert not report.initialised
    assert not report.resized
    dropped = {key for key in item.tensors if ".freqs_" in key or key.startswith("pixel_")}
    dropped |= {key for key in item.tensors if "cell_anchors" in key}
    assert set(report.dropped) == dropped
    assert set(report.used) == set(item.tensors) - dropped
    rows = {
        index: len(item.tensors[f"backbone.net.blocks.{index}.attn.rope.freqs_cos"])
        for index in range(net.num_layers)
        if f"backbone.net.blocks.{index}.attn.rope.freqs_cos" in item.tensors
    }  # which blocks are global is told by their tables; an average of weights has none
    found = [i for i, count in rows.items() if count == max(rows.values())]
    assert found == (whole if rows else [])


@pytest.mark.parametrize("name", ["eva02_B_coco_bsl", "eva02_B_lvis_bsl", "eva_coco_det"])
def test_the_projects_models_have_the_published_names(name: str) -> None:
    item = find(name)
    part = "cascade_mask_rcnn_eva01.py" if name == "eva_coco_det" else "cascade_mask_rcnn_eva02.py"
    model: Any = LazyConfig.load(str(MODELS / part), "model")
    if "lvis" in name:
        lvis_heads: Any = LazyConfig.load(str(MODELS / "lvis.py"), "lvis_heads")
        model.roi_heads = lvis_heads(model.roi_heads)
    net = build_model(model, device="meta")
    weights = {key: value for key, value in item.shapes().items() if ".freqs_" not in key}
    assert shapes(net) == weights
    output, report = convert(item.content(), shapes(net))
    assert set(output) == set(weights)
    assert report.used == {key: key for key in weights}


TIMM = [item for item in published("eva02") if item.name.startswith("timm.")]


@pytest.mark.parametrize("item", TIMM, ids=ids(TIMM))
def test_timms_files_of_eva02(item: Published) -> None:
    side = int(item.tensors["pos_embed"].shape[1] ** 0.5)
    net = eva02(item, patch_size=14, pretrain_img_size=14 * side)
    output, report = convert(item.content(), shapes(net))
    assert report.source_format == "timm_eva"
    assert set(output) == set(shapes(net))
    assert not report.resized
    assert report.used["blocks.3.attn.v_proj.bias"] == "blocks.3.attn.v_bias"
    assert report.used["blocks.3.mlp.fc1_g.weight"] == "blocks.3.mlp.w1.weight"
    assert report.used["blocks.3.mlp.norm.weight"] == "blocks.3.mlp.ffn_ln.weight"
    assert set(report.dropped.values()) <= {CLASS_TOKEN, "classifier"}


DETECTORS_01 = list(published("eva01_det"))


@pytest.mark.parametrize("item", DETECTORS_01, ids=ids(DETECTORS_01))
@pytest.mark.parametrize("bias", ["qv", True])
def test_detectors_of_eva01(item: Published, bias: bool | str) -> None:
    size = {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 6144 / 1408}
    windows = {"window_size": 16, "global_block_indexes": list(range(3, 40, 4))}
    with torch.device("meta"):
        net = ViT(img_size=1280, qkv_bias=bias, use_rel_pos=True, **size, **windows)
    target = in_detector(net, item)
    output, report = convert(item.content(), target)
    assert report.source_format == "eva01"
    assert {key: tuple(value.shape) for key, value in output.items()} == target
    assert not report.initialised
    assert not report.resized
    assert set(report.used) == set(item.tensors)
    made = {f"backbone.net.blocks.{i}.attn.qkv.bias" for i in range(40)}
    assert set(report.made) == (made if bias is True else set())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("eva02_B_coco_bsl", r"backbone of the model: expected an EVA-02, got a plain ViT"),
        ("timm.eva02_base_patch14_224.mim_in22k", r"keys have no place .*mlp\.fc1\.weight"),
    ],
)
def test_eva02_is_no_plain_vit(name: str, text: str) -> None:
    with torch.device("meta"):
        net = ViT(patch_size=14, pretrain_img_size=224)
    with pytest.raises(InputError, match=text):
        convert(find(name).content(), shapes(net))


def test_eva01_is_no_eva02() -> None:
    item = find("eva_coco_det")
    with pytest.raises(InputError, match=r"expected a plain ViT, got an EVA-02"):
        convert(item.content(), shapes(eva02(item)))
