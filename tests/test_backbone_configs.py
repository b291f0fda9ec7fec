"""The files under configs/backbones: image features for other projects."""

import ast
import re
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import nn

import vitdet
from tests.convert.manifests import find, needs_manifests
from vitdet import build_model, load_config
from vitdet.config import instantiate, save_config
from vitdet.convert import convert

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "backbones"
SIZES = {  # (height, width) of the images, side of a global window in tokens
    "streampetr_eva02_l_800x320": ((320, 800), 20),
    "streampetr_eva02_l_1600x800": ((800, 1600), 50),
}


@cache
def model_of(name):
    return build_model(load_config(FOLDER / f"{name}.py").model, device="meta")


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", SIZES)
def test_features_windows_parameters_and_a_saved_file(name, tmp_path):
    (height, width), window = SIZES[name]
    model = model_of(name)
    levels = model(torch.zeros(2, 3, height, width, device="meta"))
    sizes = {"p2": 4, "p3": 2, "p4": 1, "p5": 1 / 2, "p6": 1 / 4}
    assert {level: tuple(x.shape) for level, x in levels.items()} == {
        level: (2, 256, int(height // 16 * f), int(width // 16 * f)) for level, f in sizes.items()
    }
    assert [block.window_size for block in model.net.blocks] == [16, 16, window] * 8
    spans = [block.rope.places for block in model.net.blocks]
    assert spans == [None, None, (window, window)] * 8  # the short side
    header = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text())) or ""
    assert sum(value.numel() for value in model.parameters()) == 333_020_352
    assert "Parameters  333.02 M" in header
    save_config(load_config(FOLDER / f"{name}.py"), tmp_path / "backbone.yaml")
    again = load_config(tmp_path / "backbone.yaml")
    assert sorted(again) == ["model", "optimizer"]
    assert shapes(build_model(again.model, device="meta")) == shapes(model)


def test_the_three_lines_of_the_readme_do_what_they_say(monkeypatch):
    root = FOLDER.parents[1]
    text = (root / "README.md").read_text()
    (code,) = re.findall(r"```python\n(from vitdet import build_model.*?)```", text, re.DOTALL)
    lines = [line for line in code.splitlines() if line]
    assert len(lines) == 3
    monkeypatch.chdir(root)
    monkeypatch.setattr(vitdet, "build_model", partial(build_model, device="meta"))
    names = {"images": torch.zeros(1, 3, 320, 800, device="meta")}
    exec("\n".join(lines), names)
    said = re.findall(r'"(p\d)": \(B, (\d+), (\d+), (\d+)\)', lines[-1])
    assert {level for level, *_ in said} == {"p2", "p6"}
    for level, *shape in said:
        assert tuple(names["features"][level].shape) == (1, *map(int, shape))


def rates(name, overrides):
    """(lr, weight decay) of the parameters of a detector round the backbone."""
    detector = nn.Module()
    detector.img_backbone, detector.head = model_of(name), nn.Linear(2, 2, device="meta")
    node = load_config(FOLDER / f"{name}.py", overrides).optimizer
    optimizer = instantiate({**node, "model": detector, "backbone": "img_backbone"})
    of = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    return {name: of[id(parameter)] for name, parameter in detector.named_parameters()}


def test_rates_fall_by_the_layer_or_are_a_tenth():
    net = "img_backbone.net"
    expected = {f"{net}.pos_embed": (1e-4 * 0.9**25, 1e-7), "head.weight": (4e-4, 1e-7)}
    expected |= {f"{net}.blocks.23.norm2.weight": (1e-4 * 0.9, 0), "head.bias": (4e-4, 0)}
    found = rates("streampetr_eva02_l_1600x800", [])
    assert {name: found[name] for name in expected} == {
        name: pytest.approx(setting) for name, setting in expected.items()
    }
    path = FOLDER / "streampetr_eva02_l_800x320.py"
    header = ast.get_docstring(ast.parse(path.read_text())) or ""
    overrides = [word for word in header.split() if word.startswith("optimizer.")]
    assert len(overrides) == 7
    for parameter, setting in rates(path.stem, overrides).items():
        rate = 4e-4 if parameter.startswith("head.") else 4e-5
        assert setting == pytest.approx((rate, 0.01)), parameter


@needs_manifests
@pytest.mark.parametrize(
    ("file", "fresh"),
    [
        ("streampetr_img_backbone_vit_l", ()),
        ("eva02_L_coco_det_sys_o365", ("simfp_5.0.", "simfp_6.")),  # its levels are others
    ],
)
def test_published_files_fit(file, fresh):
    target = shapes(model_of("streampetr_eva02_l_800x320"))
    output, report = convert(find(file).content(), target)
    assert report.source_format == ("eva02" if fresh else "streampetr")
    left = {name for name in target if fresh and name.startswith(fresh)}
    assert set(report.initialised) == left
    assert {key: tuple(value.shape) for key, value in output.items()} == {
        key: shape for key, shape in target.items() if key not in left
    }
