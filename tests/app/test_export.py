"""`vitdet export`: from a checkpoint to a file, its report and the exit status."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf
from PIL import Image

import vitdet.export as exporting
from tests.engine.tiny_recipe import draw
from tests.export.tiny_models import node, with_objects
from vitdet import checkpoint
from vitdet.app.cli import main
from vitdet.app.export import comparison_images
from vitdet.config import build_model, config_text
from vitdet.data.augment import resize_shortest_edge
from vitdet.data.mapper import Mapper
from vitdet.data.shapes import shapes_dataset
from vitdet.predict.predictor import Predictor


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint of a tiny detector, as a run writes it, and a folder of photographs."""
    resize = L(resize_shortest_edge)(size=64, max_size=64)
    mapper = L(Mapper)(augmentations=resize, is_train=False, image_format="RGB")
    dataset = L(shapes_dataset)(root="shapes", split="val", num_images=2)
    cfg = OmegaConf.create(
        {"model": node("mask"), "dataloader": {"test": {"dataset": dataset, "mapper": mapper}}},
        flags={"allow_objects": True},
    )
    about = {"class_names": ["dark", "light"], "class_ids": [1, 7], "config": config_text(cfg)}
    about["thresholds"] = {"model": {"over_all": 0.4, "by_class": {"dark": 0.3}}}
    folder = tmp_path_factory.mktemp("run")
    state = with_objects(build_model(cfg.model)).state_dict()
    checkpoint.write(folder / "model_final.pth", {"model": state, "vitdet": about})
    (folder / "photographs").mkdir()
    for number in range(3):
        pixels = draw(number)["image"].permute(1, 2, 0).numpy()
        Image.fromarray(pixels[: 64 - 8 * number]).save(folder / f"photographs/{number}.png")
    return folder / "model_final.pth"


def arguments(weights, out, *more):
    # --trust: the tiny model has parts that no recipe of configs/ has
    return ["export", "--weights", *map(str, (weights, "--trust", "--out", out, *more))]


def test_onnx_from_a_checkpoint(weights, tmp_path, capsys):
    """A file that another program can use with what it says of itself."""
    out, photographs = tmp_path / "detector.onnx", weights.parent / "photographs"
    assert main(arguments(weights, out, "--images", photographs, "--masks", "boxes")) == 0
    printed = capsys.readouterr().out
    assert "3 (64x64, 56x64, 48x64)" in printed
    assert "box difference" in printed
    assert f"written              {out}" in printed
    session = onnxruntime.InferenceSession(str(out))
    note = session.get_modelmeta().custom_metadata_map
    assert json.loads(note["class_names"]) == ["dark", "light"]
    assert json.loads(note["thresholds"]) == [0.3, 0.4]
    assert json.loads(note["category_ids"]) == [1, 7]
    assert "resize_shortest_edge" in note["preprocessing"]
    assert "_target_: vitdet.backbones.vit.ViT" in note["recipe"]
    found = session.run(None, {"image": np.asarray(draw(0)["image"])})
    assert len(found[0]) > 0


def test_drawn_images_one_size_and_a_file_that_differs(weights, tmp_path, capsys, monkeypatch):
    """Exit status 1, what was there stays, and the reason in words."""
    out = tmp_path / "backbone.onnx"
    out.write_text("of before")
    words = ("--part", "backbone", "--size", "48", "64", "--num-images", "2", "--format", "onnx")
    load = exporting.load
    with monkeypatch.context() as patch:
        wrong = lambda path: lambda image: [each * 1.01 for each in load(path)(image)]  # noqa: E731
        patch.setattr(exporting, "load", wrong)
        assert main(arguments(weights, out, *words)) == 1
    printed = capsys.readouterr().out
    assert "does not hold        largest level difference" in printed
    assert f"not written          {out}" in printed
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == "of before"
    assert main(arguments(weights, out, *words)) == 0
    printed = capsys.readouterr().out
    assert "images               2 (48x64)" in printed
    assert "level difference" in printed
    assert out.read_bytes() != b"of before"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--out a.pt", "the name must end in .onnx"),
        ("--weights no.pth", "checkpoint no.pth"),
        ("--num-images 0", "--num-images 0: 1 or more"),
        ("--images nowhere", "input nowhere: nothing is at this path"),
        ("--size 65 64", "--size 65 64: HEIGHT and WIDTH are pixels, 1 to 64"),
        ("model.roi_heads.box_predictor.test_score_thresh=1.0", "no object is found on the 5"),
    ],
)
def test_wrong_input(weights, tmp_path, capsys, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    assert main([*arguments(weights, tmp_path / "a.onnx"), *words.split()]) == 2
    printed = capsys.readouterr()
    assert text in printed.err
    assert len(printed.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_images_are_fitted(weights):
    """Into one size without distortion, the rest black; else by the recipe's rule."""
    predictor = Predictor.from_checkpoint(weights, device="cpu", trust=True)
    folder = weights.parent / "photographs"
    first, second, _ = comparison_images(predictor, folder, 5, (32, 64))
    assert first.shape == second.shape == (3, 32, 64)
    assert first[:, :, 32:].max() == 0
    assert first[:, :, :32].min() > 0
    drawn = comparison_images(predictor, None, 4, None)
    assert len({tuple(image.shape) for image in drawn}) == 4
    assert all(max(image.shape) == 64 and image.dtype == torch.uint8 for image in drawn)
