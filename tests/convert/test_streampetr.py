"""StreamPETR's image backbone: the plain form and that with `adapter.`, in and out."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

from vitdet.backbones.eva02 import EVA02ViT
from vitdet.config import build_model, load_config
from vitdet.convert import convert, export
from vitdet.pyramid import SimpleFeaturePyramid

from .manifests import CHECKPOINTS, find

needs_manifests = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason=f"no manifests: VITDET_CHECKPOINTS is {CHECKPOINTS}"
)
RECIPE = Path(__file__).parents[2] / "configs/backbones/streampetr_eva02_l_800x320.py"
DOCUMENT = "eva02_L_coco_det_sys_o365_remapped"  # what docs/ViT_Large.md makes
TRAINED = "streampetr_img_backbone_vit_l"
ADAPTER = "img_backbone.adapter."
Shapes = dict[str, tuple[int, ...]]


@cache
def target() -> Shapes:
    model = build_model(load_config(RECIPE).model, device="meta")
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def on_meta(shapes: Shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def new_levels() -> set[str]:
    """What StreamPETR's pyramid has and an EVA-02 detector's has not."""
    found = {name for name in target() if name.startswith(("simfp_6.", "simfp_5.0."))}
    assert len(found) == 10
    return found


@needs_manifests
@pytest.mark.parametrize("name", [DOCUMENT, TRAINED, "eva02_L_coco_det_sys_o365"])
def test_files_go_into_the_recipe(name: str) -> None:
    output, report = convert(find(name).content(), target())
    open_ = set() if name == TRAINED else new_levels()
    assert set(report.initialised) == open_
    assert set(output) == set(target()) - open_
    assert not report.resized
    kept = {name for name in report.dropped if "simfp" in name or ".blocks." in name}
    assert all(".freqs_" in name for name in kept)


@needs_manifests
@pytest.mark.parametrize("name", [DOCUMENT, TRAINED])
def test_the_plain_form_fills_the_backbone_alone(name: str) -> None:
    plain = {key: value for key, value in find(name).tensors.items() if ADAPTER not in key}
    output, report = convert(plain, target())
    assert report.source_format == "streampetr"
    assert set(report.initialised) == {key for key in target() if key.startswith("simfp_")}
    assert set(output) == {key for key in target() if key.startswith("net.")}


@needs_manifests
def test_the_recipes_model_gets_the_published_names() -> None:
    theirs = {key: s for key, s in find(TRAINED).shapes().items() if ".freqs_" not in key}
    written, _ = export(on_meta(target()), "streampetr")
    assert {name: tuple(value.shape) for name, value in written.items()} == theirs
    plain, report = export(on_meta(target()), "streampetr", backbone_only=True)
    assert set(plain) == {name for name in theirs if not name.startswith(ADAPTER)}
    assert set(report.dropped) == {name for name in target() if name.startswith("simfp_")}


@pytest.mark.parametrize("levels", [4, 5])
@pytest.mark.parametrize("backbone_only", [False, True])
def test_out_and_in_again_is_the_identity(levels: int, backbone_only: bool) -> None:
    torch.manual_seed(0)
    net = EVA02ViT(embed_dim=16, depth=2, num_heads=2, img_size=64, pretrain_img_size=64)
    scales = [4.0, 2.0, 1.0, 0.5, 0.25][:levels]
    model = SimpleFeaturePyramid(
        net, out_channels=8, scale_factors=scales, downsample="conv", square_pad=0
    )
    weights = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    written, _ = export(weights, "streampetr", backbone_only=backbone_only)
    assert any(name.startswith(ADAPTER) for name in written) != backbone_only
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    back, report = convert(written, shapes)
    assert report.source_format == "streampetr"
    outside = {name for name in weights if name.startswith("simfp_")}
    assert set(report.initialised) == (outside if backbone_only else set())
    assert set(back) == set(weights) - set(report.initialised)
    assert all(torch.equal(value, weights[name]) for name, value in back.items())
