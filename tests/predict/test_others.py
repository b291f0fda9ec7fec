"""Detectors of other projects straight from their file, and the lines of docs/detector.md."""

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import RECIPE
from tests.convert.manifests import find, needs_manifests
from vitdet import Predictor, config
from vitdet.app import cli
from vitdet.config import build_model, load_config
from vitdet.convert.recipes import Command
from vitdet.data.images import open_image
from vitdet.predict import loading, others
from vitdet.utils.checks import InputError
from vitdet.utils.env import random_state

PAGE = Path(__file__).resolve().parents[2] / "docs/detector.md"
TINY = f"""
from vitdet.config import load_config
cfg = load_config({str(RECIPE)!r}, ["model.roi_heads.num_classes=80"])
model, dataloader, train = cfg.model, cfg.dataloader, cfg.train
dataloader.test.dataset = {{
    "_target_": "vitdet.data.datasets.named_dataset", "name": "coco_2017_val"
}}
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A file as detectron2's model zoo has them, which sees people, and the table that knows it."""
    (tmp_path / "tiny.py").write_text(TINY)
    with random_state(0):
        state = build_model(load_config(tmp_path / "tiny.py").model).state_dict()
    state["roi_heads.box_predictor.cls_score.bias"][0] += 6.0
    state = {name: tensor.numpy() for name, tensor in state.items()}
    path = tmp_path / "model_final_f05665.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "somebody"}))
    for module in (config, loading):
        monkeypatch.setattr(module, "CONFIGS", tmp_path)
    monkeypatch.setattr(others, "COMMANDS", (row("tiny"), row("absent", "mae")))
    return path


def row(recipe, fmt="eva02"):
    return Command(fmt, ("file",), 64, recipe)


def of_detector(predictor, image):
    """What detectron2's model gives for an image, masks and all."""
    with torch.inference_mode():
        return predictor.detector([predictor.model_input(image)])[0]["instances"]


def test_the_lines_of_the_page(theirs, drawn_run, monkeypatch):
    monkeypatch.chdir(theirs.parent)
    block = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    scope = {"image": open_image(str(drawn_run.images[0]))}
    exec(block, scope)
    predictor, boxes = scope["detector"], scope["boxes"]
    predictor.precision = "fp32"
    exact = predictor(scope["image"], classes=["person"]).boxes
    found = of_detector(predictor, np.asarray(scope["image"]))
    assert found.has("pred_masks")
    wanted = found.pred_boxes.tensor[(found.pred_classes == 0) & (found.scores >= 0.5)]
    assert np.array_equal(exact, wanted.numpy())
    assert boxes.dtype == np.float32
    assert boxes.shape[1] == 4
    assert len(boxes) > 0
    assert sorted(path.name for path in theirs.parent.iterdir() if path.is_file()) == [
        "model_final_f05665.pkl",
        "tiny.py",
    ]
    words = next(line.split() for line in PAGE.read_text().splitlines() if "vitdet predict" in line)
    words = [str(drawn_run.images[0]) if word == "photo.jpg" else word for word in words[1:]]
    assert cli.main([*words, "--device", "cpu", "--out", "out"]) == 0
    words = ["strip", "model_final_f05665.pkl", "people.safetensors"]
    assert cli.main(words) == 0
    monkeypatch.setattr(others, "COMMANDS", ())
    slim = Predictor.from_checkpoint(words[-1], device="cpu", precision="fp32", boxes_only=True)
    assert np.array_equal(slim(scope["image"], classes=["person"]).boxes, exact)
    assert '"class": "person"' in (theirs.parent / "out" / "000000.json").read_text()


def test_a_recipe_that_is_given_and_other_names(theirs, drawn_run, tmp_path, monkeypatch):
    monkeypatch.setattr(others, "COMMANDS", ())
    with pytest.raises(InputError, match=r"f05665\.pkl: no recipe is in the file\. Name the one"):
        Predictor.from_checkpoint(theirs)
    config = {"config": tmp_path / "tiny.py", "device": "cpu"}
    predictor = Predictor.from_checkpoint(theirs, **config)
    assert predictor.class_names[0] == "person"
    assert predictor.class_ids[79] == 90
    with pytest.raises(InputError, match="80 classes, model 2"):
        Predictor.from_checkpoint(theirs, **config, class_names=["a", "b"])
    wanted = predictor.detector.state_dict()
    # as training wrappers name them, beside an average
    prefixed = {f"module.{name}": each.numpy() for name, each in wanted.items()}
    theirs.write_bytes(pickle.dumps({"model": {}, "ema_state": prefixed}))
    found = Predictor.from_checkpoint(theirs, weights="ema", **config).detector.state_dict()
    assert all(torch.equal(found[name], each) for name, each in wanted.items())
    bare = {name: each.numpy() for name, each in wanted.items() if "backbone.net" in name}
    theirs.write_bytes(pickle.dumps({"model": bare}))
    with pytest.raises(InputError, match="expected a trained detector, got a start of training"):
        Predictor.from_checkpoint(theirs, **config)


def test_where_several_recipes_take_it_they_are_named(theirs, tmp_path, monkeypatch):
    (tmp_path / "same.py").write_text(TINY)
    monkeypatch.setattr(others, "COMMANDS", (row("tiny"), row("same"), row("tiny")))
    text = r"2 recipes take it\. Name .* --config-file: configs/tiny\.py, configs/same\.py\.$"
    with pytest.raises(InputError, match=text):
        Predictor.from_checkpoint(theirs)


@needs_manifests
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("cascade_mask_rcnn_vitdet_h.coco", "COCO/cascade_mask_rcnn_vitdet_h_75ep"),
        ("eva02_B_lvis_bsl", "LVIS/cascade_mask_rcnn_eva02_b_bsl"),
        # the same shapes, but for the tables of windows and image
        ("eva02_B_coco_bsl", "COCO/cascade_mask_rcnn_eva02_b_bsl"),
        ("eva02_B_coco_sys", "COCO/cascade_mask_rcnn_eva02_b_sys"),
        ("mae_pretrain_vit_base", None),
    ],
)
def test_the_recipe_of_a_published_file(name, recipe):
    found = others.find_recipe(find(name).content(), name)
    assert (found and found.recipe) == recipe


@needs_manifests
@pytest.mark.slow
def test_published_files_that_two_recipes_take():
    text = "2 recipes .*/cascade_mask_rcnn_eva02_b_bsl.py, .*/cascade_mask_rcnn_eva02_b_sys.py"
    tensors = find("eva02_B_coco_sys").tensors  # without the tables that tell them apart
    bare = {"model": {name: value for name, value in tensors.items() if "freqs_" not in name}}
    with pytest.raises(InputError, match=text):
        others.find_recipe(bare, "eva02_B_coco_sys")


@needs_manifests
@pytest.mark.parametrize("name", ["dinov2_vitb14", "eva02_B_pt_in21k_p14", "hf_vitdet_base.model"])
def test_a_backbone_alone_is_said_to_be_one(name):
    text = r"got a backbone alone \(.*, an? .*\)\. Train .*: vitdet train --data FOLDER --weights w"
    with pytest.raises(InputError, match=text):
        others.check_detector(find(name).content(), "w")
    others.check_detector(find("mask_rcnn_vitdet_b.coco").content(), "w")


def test_a_bare_file_in_our_names_stays_as_it_is():
    """Also one whose format another project's file would have, as that of a ViTAE."""
    model = load_config(config.CONFIGS / "vitae/mask_rcnn_vitae_s_100ep.py").model
    state = build_model(model, device="meta").state_dict()
    for content in (dict(state), {"model": state}):
        assert others.as_ours(content, model) == content
    with pytest.raises(InputError, match=r"format: expected one of"):
        others.as_ours({f"own_{name}": each for name, each in state.items()}, model)
