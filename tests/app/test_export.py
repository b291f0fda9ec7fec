"""`vitdet export`: from a checkpoint to a file, its report and the exit status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf
from PIL import Image

from tests.engine.tiny_recipe import draw
from tests.export.tiny_models import node, with_objects
from vitdet import checkpoint
from vitdet.app.cli import main
from vitdet.app.export import comparison_images
from vitdet.config import build_model, config_text
from vitdet.data.augment import resize_shortest_edge
from vitdet.data.mapper import Mapper
from vitdet.data.shapes import shapes_dataset
from vitdet.export import onnx_file
from vitdet.predict.predictor import Predictor


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny detector, as a run writes it."""
    resize = L(resize_shortest_edge)(size=64, max_size=64)
    mapper = L(Mapper)(augmentations=resize, is_train=False, image_format="RGB")
    dataset = L(shapes_dataset)(root="shapes", split="val", num_images=2)
    cfg = OmegaConf.create(
        {"model": node("mask"), "dataloader": {"test": {"dataset": dataset, "mapper": mapper}}},
        flags={"allow_objects": True},
    )
    about = {"class_names": ["dark", "light"], "class_ids": [1, 7], "config": config_text(cfg)}
    path = tmp_path_factory.mktemp("run") / "model_final.pth"
    state = with_objects(build_model(cfg.model)).state_dict()
    checkpoint.write(path, {"model": state, "vitdet": about})
    return path


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(3):
        pixels = draw(number)["image"].permute(1, 2, 0).numpy()
        Image.fromarray(pixels[: 64 - 8 * number]).save(folder / f"{number}.png")
    return folder


def arguments(weights: Path, out: Path, *more: object) -> list[str]:
    # --trust: the tiny model has parts that no recipe of configs/ has
    return ["export", "--weights", *map(str, (weights, "--trust", "--out", out, *more))]


def test_onnx_from_a_checkpoint(weights: Path, photographs: Path, tmp_path: Path, capsys) -> None:
    """A file that another program can use with what it says of itself."""
    out = tmp_path / "detector.onnx"
    assert main(arguments(weights, out, "--images", photographs, "--masks", "boxes")) == 0
    printed = capsys.readouterr().out
    assert "3 (64x64, 56x64, 48x64)" in printed
    assert "box difference" in printed
    assert f"written              {out}" in printed
    session = onnxruntime.InferenceSession(str(out))
    note = session.get_modelmeta().custom_metadata_map
    assert json.loads(note["class_names"]) == ["dark", "light"]
    assert json.loads(note["category_ids"]) == [1, 7]
    assert "resize_shortest_edge" in note["preprocessing"]
    assert "_target_: vitdet.backbones.vit.ViT" in note["recipe"]
    found: Any = session.run(None, {"image": np.asarray(draw(0)["image"])})
    assert len(found[0]) > 0
    assert json.loads((tmp_path / "detector.onnx.parity.json").read_text())["faults"] == []


def test_drawn_images_and_one_size(weights: Path, tmp_path: Path, capsys) -> None:
    more = ("--part", "backbone", "--size", "48", "64", "--num-images", "2", "--format", "onnx")
    assert main(arguments(weights, tmp_path / "backbone.onnx", *more)) == 0
    printed = capsys.readouterr().out
    assert "images               2 (48x64)" in printed
    assert "feature difference" in printed
    assert (tmp_path / "backbone.onnx").is_file()


def test_a_file_that_differs(
    weights: Path, photographs: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status 1, nothing at the place of the file, and the reason in words."""
    load = onnx_file.load
    wrong = lambda path: lambda image: [each * 1.01 for each in load(path)(image)]  # noqa: E731
    monkeypatch.setattr(onnx_file, "load", wrong)
    out = tmp_path / "backbone.onnx"
    assert main(arguments(weights, out, "--part", "backbone", "--images", photographs)) == 1
    printed = capsys.readouterr().out
    assert "does not hold        largest feature difference" in printed
    assert f"not written          {out}; see {out}.failed.parity.json" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["backbone.onnx.failed.parity.json"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--format torchscript --out a.pt", "ONNX is what can be written. Use --format"),
        ("--weights no.pth", "checkpoint no.pth"),
        ("--num-images 0", "--num-images 0: 1 or more"),
        ("--images nowhere", "input nowhere: nothing is at this path"),
        ("--size 65 64", "--size 65 64: at most 64 x 64"),
        ("--opset 9", "--opset 9: 17 to 20"),
        ("model.roi_heads.box_predictor.test_score_thresh=1.0", "no object is found on the 5"),
    ],
)
def test_wrong_input(weights: Path, tmp_path: Path, capsys, monkeypatch, words, text) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(weights, tmp_path / "a.onnx"), *words.split()]) == 2
    printed = capsys.readouterr()
    assert text in printed.err
    assert len(printed.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_images_are_fitted(weights: Path, photographs: Path) -> None:
    """Into one size without distortion, the rest black; else by the recipe's rule."""
    predictor = Predictor.from_checkpoint(weights, device="cpu", trust=True)
    first, second, _ = comparison_images(predictor, photographs, 5, (32, 64))
    assert first.shape == second.shape == (3, 32, 64)
    assert first[:, :, 32:].max() == 0
    assert first[:, :, :32].min() > 0
    drawn = comparison_images(predictor, None, 4, None)
    assert len({tuple(image.shape) for image in drawn}) == 4
    assert all(max(image.shape) == 64 and image.dtype == torch.uint8 for image in drawn)
