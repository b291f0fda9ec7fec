"""ViTAE, EasyCV and mmdetection 3.x: every published file into the recipe that it belongs to."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from vitdet.backbones.vitae import ViTAE
from vitdet.backbones.vitae_s import ViTAES
from vitdet.config import build_model, load_config, model_settings
from vitdet.convert import convert, detect
from vitdet.utils.checks import InputError

from .manifests import CHECKPOINTS, find

ROOT = Path(__file__).parents[2]
needs_manifests = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason=f"no manifests: VITDET_CHECKPOINTS is {CHECKPOINTS}"
)
Shapes = dict[str, tuple[int, ...]]


@cache
def recipe_shapes(name: str) -> Shapes:
    model = build_model(load_config(ROOT / "configs" / f"{name}.py").model, device="meta")
    return shapes(model)


@cache
def settings_of(name: str) -> dict[str, Any]:
    node = load_config(ROOT / "configs" / f"{name}.py").model
    return model_settings(node, build_model(node, device="meta"))


def shapes(model: torch.nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@needs_manifests
@pytest.mark.parametrize(
    ("name", "recipe", "text"),
    [
        (
            "easycv_vitdet_mask_rcnn",
            "COCO/mask_rcnn_vitdet_b_100ep",
            "pyramid.norm='GN1', not 'LN'; box_head.norm='GN1', not 'LN'",
        ),
        (
            "mmdet3_vitdet_mask_rcnn_vit_b",
            "COCO/mask_rcnn_vitdet_b_100ep",
            "norm_eps=1e-05, not 1e-06",
        ),
        (
            "easycv_vitdet_mask_rcnn_old_attn",
            "vitae/mask_rcnn_vit_b_100ep",
            r"pyramid.norm='GN1\+LN', not 'LN'",
        ),
    ],
)
def test_other_norms_of_the_same_shapes_are_refused(name: str, recipe: str, text: str) -> None:
    settings = settings_of(recipe)
    with pytest.raises(InputError, match=text):
        convert(find(name).content(), recipe_shapes(recipe), settings=settings)


@needs_manifests
def test_averaged_weights_go_first() -> None:
    item = find("vitae_s_classification")
    content = {"state_dict": item.tensors, "state_dict_ema": item.tensors, "epoch": 0}
    _, report = convert(content, recipe_shapes("vitae/mask_rcnn_vitae_s_100ep"))
    assert report.nested_under == "state_dict_ema"


# --- numbers -------------------------------------------------------------------------------------


def vitae(**changes: Any) -> ViTAE:
    options: dict[str, Any] = {"img_size": 64, "patch_size": 16, "embed_dim": 8, "depth": 2}
    options |= {"num_heads": 2, "window_size": 2, "global_block_indexes": [1]}
    torch.manual_seed(0)
    return ViTAE(**options | changes)


def random_file(names: Shapes) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.zeros((), dtype=torch.int64) if not shape else torch.randn(shape)
        for name, shape in names.items()
    }


def test_tables_for_scaled_queries_are_scaled() -> None:
    target = shapes(vitae())
    names = target | {"fpn1.1.ln.weight": (8,)}
    source = {f"backbone.{name}": value for name, value in random_file(names).items()}
    assert detect({"state_dict": source}) == "vitae"
    output, report = convert({"state_dict": source}, target, backbone_only=True)
    assert list(report.dropped) == ["backbone.fpn1.1.ln.weight"]
    for i in (0, 1):
        name = f"blocks.{i}.attn.rel_pos_h"
        assert torch.equal(output[name], source[f"backbone.{name}"] * 4**-0.5)
    assert torch.equal(output["norm.bias"], source["backbone.norm.bias"])


def test_biases_of_q_and_v_become_one_with_nothing_for_k() -> None:
    target = shapes(vitae())
    names = {name: shape for name, shape in target.items() if "rel_pos" not in name}
    del names["blocks.0.attn.qkv.bias"]
    names |= {"blocks.0.attn.q_bias": (8,), "blocks.0.attn.v_bias": (8,), "cls_token": (1, 1, 8)}
    source = random_file(names)
    output, report = convert({"model": source}, target)
    assert report.source_format == "vitae_pretrain"
    q, v = source["blocks.0.attn.q_bias"], source["blocks.0.attn.v_bias"]
    expected = torch.cat([q, torch.zeros(8), v])
    assert torch.equal(output["blocks.0.attn.qkv.bias"], expected)
    assert torch.equal(output["blocks.1.attn.q_bias"], source["blocks.1.attn.q_bias"])


def test_a_bias_of_k_is_left_out_where_the_model_has_none() -> None:
    target = shapes(vitae())
    names = {name: shape for name, shape in target.items() if "rel_pos" not in name}
    for last in ("q_bias", "v_bias"):
        del names[f"blocks.1.attn.{last}"]
    names["blocks.1.attn.qkv.bias"] = (24,)
    source = random_file(names)
    output, _ = convert({"model": source}, target)
    bias = source["blocks.1.attn.qkv.bias"]
    assert torch.equal(output["blocks.1.attn.q_bias"], bias[:8])
    assert torch.equal(output["blocks.1.attn.v_bias"], bias[16:])


def test_small_kernels_become_the_middle_of_larger_ones() -> None:
    target = shapes(vitae())
    names = {name: shape for name, shape in target.items() if "rel_pos" not in name}
    for i in (0, 1):
        names[f"blocks.{i}.PCM.0.weight"] = (32, 4, 1, 1)
        names[f"blocks.{i}.PCM.3.weight"] = (8, 16, 1, 1)
    source = random_file(names)
    output, _ = convert({"model": source}, target)
    name = "blocks.1.PCM.3.weight"
    assert torch.equal(output[name][..., 1, 1], source[name][..., 0, 0])
    assert output[name].sum() == pytest.approx(float(source[name].sum()), abs=1e-5)
    x = torch.randn(1, 8, 5, 5)
    branch = vitae().blocks[0].PCM.eval()
    branch.load_state_dict(
        {n.removeprefix("blocks.0.PCM."): v for n, v in output.items() if "blocks.0.PCM" in n}
    )
    small = torch.nn.functional.conv2d(
        x, source["blocks.0.PCM.0.weight"], source["blocks.0.PCM.0.bias"], groups=2
    )
    torch.testing.assert_close(branch[0](x), small, rtol=0, atol=1e-6)


def test_a_classifier_of_stages_fits_the_detector() -> None:
    target = shapes(vitae())
    source: dict[str, torch.Tensor] = {}
    for name, value in random_file(target).items():
        if "rel_pos" in name or name.startswith("norm."):
            continue
        renamed = name.replace("blocks.", "layers.2.NC.").replace(
            "pos_embed", "layers.0.RC.pos_embed"
        )
        source[renamed.replace("patch_embed.", "layers.0.RC.PRM.")] = value
    bias = torch.randn(24)
    for last in ("q_bias", "v_bias"):
        del source[f"layers.2.NC.1.attn.{last}"]
    source |= {"layers.2.NC.1.attn.qkv.bias": bias, "layers.0.RC.cls_token": torch.ones(1, 1, 8)}
    source |= {"head.weight": torch.ones(10, 8), "fc_norm.bias": torch.ones(8)}
    output, report = convert({"state_dict": source}, target)
    assert report.source_format == "vitae_classifier"
    key = "layers.2.NC.0.mlp.fc1.weight"
    assert report.used[key] == "blocks.0.mlp.fc1.weight"
    assert torch.equal(output["blocks.0.mlp.fc1.weight"], source[key])
    assert set(report.dropped) == {"layers.0.RC.cls_token", "head.weight", "fc_norm.bias"}


def test_a_model_of_another_family_is_refused() -> None:
    options: dict[str, Any] = {"img_size": 64, "embed_dims": [4, 4], "token_dims": [8, 8]}
    options |= {"downsample_ratios": [4, 2], "kernel_sizes": [3, 3], "dilations": [[1], [1, 2]]}
    options |= {"reduction_kinds": ["performer", "performer_less"], "reduction_groups": [1, 1]}
    options |= {"depths": [0, 1], "num_heads": [1, 2], "groups": [1, 2]}
    source = random_file(shapes(vitae())) | {"fpn1.1.ln.weight": torch.ones(8)}
    with pytest.raises(InputError, match=r"vitae: expected a key that ends in layers\.0\.RC\.PCM"):
        convert({"state_dict": source}, shapes(ViTAES(**options)))
