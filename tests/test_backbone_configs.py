"""The files under configs/backbones: image features for other projects."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.convert.manifests import CHECKPOINTS, find
from vitdet import build_model, load_config
from vitdet.config import save_config
from vitdet.convert import convert

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "backbones"
SIZES = {  # (height, width) of the images, side of a global window in tokens
    "streampetr_eva02_l_800x320": ((320, 800), 20),
    "streampetr_eva02_l_1600x800": ((800, 1600), 50),
}
needs_manifests = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason=f"no manifests: VITDET_CHECKPOINTS is {CHECKPOINTS}"
)


@cache
def model_of(name: str) -> nn.Module:
    return build_model(load_config(FOLDER / f"{name}.py").model, device="meta")


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_every_file_is_listed():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_features_of_five_levels(name):
    (height, width), _ = SIZES[name]
    levels = model_of(name)(torch.zeros(2, 3, height, width, device="meta"))
    tokens = height // 16, width // 16
    sizes = {"p2": 4, "p3": 2, "p4": 1, "p5": 1 / 2, "p6": 1 / 4}
    assert {level: tuple(x.shape) for level, x in levels.items()} == {
        level: (2, 256, *(int(side * factor) for side in tokens)) for level, factor in sizes.items()
    }


@pytest.mark.parametrize("name", SIZES)
def test_global_windows_are_the_short_side(name):
    (height, _), window = SIZES[name]
    net = model_of(name).net
    assert height // 16 == window == net.global_window_size == net.train_grid
    sides = [block.window_size for block in net.blocks]
    assert sides == [16, 16, window] * 8
    assert net.checkpoint_blocks == set(range(24))


@pytest.mark.parametrize("name", SIZES)
def test_header_records_the_parameters(name):
    header = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    count = sum(value.numel() for value in model_of(name).parameters())
    assert count == 333_020_352
    assert f"Parameters  {count / 1e6:.2f} M" in header


@pytest.mark.parametrize("name", SIZES)
def test_saved_file_loads_again(name, tmp_path):
    config = load_config(FOLDER / f"{name}.py", ["model.net.global_window_size=0"])
    assert sorted(config) == ["model"]
    net = config.model.net
    inspect.signature(net._target_).bind(**{k: net[k] for k in net if k != "_target_"})
    save_config(config, tmp_path / "backbone.yaml")
    again = load_config(tmp_path / "backbone.yaml")
    assert again.model.net.global_window_size == 0
    assert shapes(build_model(again.model, device="meta")) == shapes(model_of(name))


@needs_manifests
@pytest.mark.parametrize("name", SIZES)
def test_published_names_of_streampetr_fit(name):
    item = find("streampetr_img_backbone_vit_l")
    output, report = convert(item.content(), shapes(model_of(name)))
    assert report.source_format == "streampetr"
    assert {key: tuple(value.shape) for key, value in output.items()} == shapes(model_of(name))
    assert not report.initialised
    assert not report.resized
    assert all(".freqs_" in key for key in report.dropped)


@needs_manifests
def test_a_detector_of_eva02_leaves_open_what_it_has_not():
    item = find("eva02_L_coco_det_sys_o365")
    target = shapes(model_of("streampetr_eva02_l_800x320"))
    output, report = convert(item.content(), target)
    assert report.source_format == "eva02"
    fresh = {name for name in target if name.startswith(("simfp_5.0.", "simfp_6."))}
    assert len(fresh) == 10
    assert set(report.initialised) == fresh
    assert set(output) == set(target) - fresh
