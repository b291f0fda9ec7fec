"""The files under configs/backbones: image features for other projects."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vitdet
from tests.convert.manifests import CHECKPOINTS, find
from vitdet import build_model, load_config
from vitdet.config import instantiate, save_config
from vitdet.convert import convert
from vitdet.engine.parameters import group_lines

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


def test_the_three_lines_of_the_readme_do_what_they_say(monkeypatch):
    root = FOLDER.parents[1]
    section = (root / "README.md").read_text().split("## A backbone for another project")[1]
    lines = re.findall(r"^    (.+)$", section.split("\n## ")[0], re.MULTILINE)
    assert len(lines) == 3
    monkeypatch.chdir(root)
    monkeypatch.setattr(vitdet, "build_model", partial(build_model, device="meta"))
    names: dict[str, Any] = {"images": torch.zeros(1, 3, 320, 800, device="meta")}
    exec("\n".join(lines), names)
    said = re.findall(r'"(p\d)": \(B, (\d+), (\d+), (\d+)\)', lines[-1])
    assert {level for level, *_ in said} == {"p2", "p6"}
    for level, *shape in said:
        assert tuple(names["features"][level].shape) == (1, *map(int, shape))


@pytest.mark.parametrize("name", SIZES)
def test_global_windows_are_the_short_side(name):
    (height, _), window = SIZES[name]
    net = model_of(name).net
    assert height // 16 == window
    sides = [block.window_size for block in net.blocks]
    assert sides == [16, 16, window] * 8
    spans = [block.rope.places for block in net.blocks]
    assert spans == [None, None, (window, window)] * 8
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
    assert sorted(config) == ["model", "optimizer"]
    net = config.model.net
    inspect.signature(net._target_).bind(**{k: net[k] for k in net if k != "_target_"})
    save_config(config, tmp_path / "backbone.yaml")
    again = load_config(tmp_path / "backbone.yaml")
    assert again.model.net.global_window_size == 0
    assert shapes(build_model(again.model, device="meta")) == shapes(model_of(name))


def rate_and_decay(optimizer: torch.optim.Optimizer, detector: nn.Module) -> dict[str, Any]:
    of = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: of[id(parameter)] for name, parameter in detector.named_parameters()}


@pytest.mark.parametrize("name", SIZES)
def test_layer_wise_rates_and_a_faster_head(name):
    """Source: docs/ViT_Large.md; tests/golden compares the rule with the published constructor."""
    detector = nn.Module()
    detector.img_backbone, detector.head = model_of(name), nn.Linear(2, 2, device="meta")
    node = load_config(FOLDER / f"{name}.py").optimizer
    optimizer = instantiate({**node, "model": detector, "backbone": "img_backbone"})
    assert isinstance(optimizer, torch.optim.AdamW)
    table = rate_and_decay(optimizer, detector)
    net = "img_backbone.net"
    for parameter, rate, decay in (
        (f"{net}.pos_embed", 1e-4 * 0.9**25, 1e-7),
        (f"{net}.patch_embed.proj.bias", 1e-4 * 0.9**25, 0.0),
        (f"{net}.blocks.0.attn.q_proj.weight", 1e-4 * 0.9**24, 1e-7),
        (f"{net}.blocks.0.attn.q_bias", 1e-4 * 0.9**24, 0.0),
        (f"{net}.blocks.23.norm2.weight", 1e-4 * 0.9, 0.0),
        ("img_backbone.simfp_6.0.weight", 4e-4, 1e-7),
        ("img_backbone.simfp_2.1.weight", 4e-4, 0.0),
        ("head.weight", 4e-4, 1e-7),
        ("head.bias", 4e-4, 0.0),
    ):
        assert table[parameter] == pytest.approx((rate, decay)), parameter


def test_a_tenth_of_the_rate_for_the_backbone():
    path = FOLDER / "streampetr_eva02_l_800x320.py"
    header = ast.get_docstring(ast.parse(path.read_text())) or ""
    overrides = [word for word in header.split() if word.startswith("optimizer.")]
    assert len(overrides) == 7
    detector = nn.Module()
    detector.img_backbone, detector.head = model_of(path.stem), nn.Linear(2, 2, device="meta")
    node = load_config(path, overrides).optimizer
    optimizer = instantiate({**node, "model": detector, "backbone": "img_backbone"})
    for parameter, setting in rate_and_decay(optimizer, detector).items():
        rate = 4e-4 if parameter.startswith("head.") else 4e-5
        assert setting == pytest.approx((rate, 0.01)), parameter


@pytest.mark.parametrize("name", SIZES)
def test_groups_are_printed_of_a_backbone_alone(name):
    lines = list(group_lines(load_config(FOLDER / f"{name}.py")))
    found = {line.split()[0]: line.split()[-2:] for line in lines}
    assert found["net.blocks.0.norm1.weight"] == [f"{1e-4 * 0.9**24:.6g}", "0"]
    assert found["net.pos_embed"] == [f"{1e-4 * 0.9**25:.6g}", "1e-07"]
    assert found["simfp_5.0.weight"] == ["0.0004", "1e-07"]
    assert "333020352 are trained" in lines[-1]


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
