"""MODEL_CARD.md of a run."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from tiny_recipe import recipe

from vitdet.engine.model_card import card
from vitdet.engine.run import train

NOTE = {
    "class_names": ["dark", "light"],
    "data": {
        "train": {"name": "a", "images": 5, "objects": 9, "hash": "abc"},
        "test": {"name": "b", "images": 2, "objects": 3, "hash": "def"},
    },
    "environment": {
        **dict.fromkeys(("python", "torch", "torchvision"), "1"),
        "device": "cpu",
        "git": "0123 with local changes",
    },
}
FINAL = {24: {"bbox/AP": 50.0, "bbox/AP50": 70.123, "segm/AP": 40.0}}


def section(text: str, name: str) -> list[str]:
    found = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, name
    return found[1].strip().splitlines()


def test_its_parts(tmp_path, monkeypatch):
    command = ["train_net.py", "--config-file", "a b.py"]
    monkeypatch.setattr("sys.argv", command)
    text = card(tmp_path / "run", recipe(tmp_path), NOTE, FINAL, finished=True)
    assert text.startswith("# run\n\nA detector (GeneralizedRCNN) of 2 classes: dark, light.\n")
    assert section(text, "Results") == [
        "AP in percent, on the test data.",
        "",
        "| weights | bbox/AP | bbox/AP50 | segm/AP |",
        "| --- | --- | --- | --- |",
        "| model_final.pth | 50.00 | 70.12 | 40.00 |",
    ]
    assert section(text, "Data") == [
        "- train: a, 5 images, 9 objects, fingerprint abc",
        "- test: b, 2 images, 3 objects, fingerprint def",
    ]
    assert section(text, "Training") == [
        "- 24 images, 4 a step, from random weights; seed 3",
        f"- command: `{shlex.join(command)}`",
        "- recipe: config.yaml, in the folder and in every checkpoint",
        "- python 1, torch 1, torchvision 1, device cpu, git 0123 with local changes",
    ]
    assert "vitdet predict IMAGES --weights model_final.pth" in section(text, "Use")
    assert section(text, "License and limits")[0].startswith("To be filled in by whoever")


def test_the_best_weights_have_a_row(tmp_path):
    evaluations = {8: {"bbox/AP": 55.0}, 16: {"bbox/AP": 60.0}, 20: {"bbox/AP": 60.0}, **FINAL}
    cfg = recipe(tmp_path, best_metric="bbox/AP")
    text = card(tmp_path, cfg, NOTE, evaluations, finished=True)
    rows = section(text, "Results")[4:]
    assert rows == [
        "| model_best.pth (bbox/AP best, after 16 images) | 60.00 | - | - |",
        "| model_final.pth | 50.00 | 70.12 | 40.00 |",
    ]
    assert "vitdet predict IMAGES --weights model_best.pth" in section(text, "Use")


def test_a_run_that_is_not_finished(tmp_path):
    text = card(tmp_path, recipe(tmp_path), NOTE, {8: {"bbox/AP": 55.0}}, finished=False)
    assert section(text, "Results")[4:] == ["| after 8 images | 55.00 |"]
    assert section(text, "Training")[0].startswith("- 8 of 24 images so far, 4 a step,")
    assert "vitdet predict IMAGES --weights CHECKPOINT" in section(text, "Use")


def test_many_classes_are_not_all_listed(tmp_path):
    note = {**NOTE, "class_names": [f"class {i}" for i in range(1203)]}
    text = card(tmp_path, recipe(tmp_path), note, FINAL, finished=True)
    assert "of 1203 classes: class 0, " in text
    assert "class 99, ...." in text
    assert "class 100" not in text


def test_a_run_writes_it(tmp_path):
    train(recipe(tmp_path, num_images=8, eval_every=4, best_metric="bbox/AP"))
    text = (tmp_path / "MODEL_CARD.md").read_text()
    data = json.loads((tmp_path / "run.json").read_text())["data"]
    assert data["train"]["hash"] in text
    assert "| model_best.pth (bbox/AP best, after 4 images) | 6.00 |" in text
    results = json.loads((tmp_path / "results.json").read_text())["results"]["bbox"]
    ap50 = results["AP50"]
    assert f"| model_final.pth | 6.00 | {ap50:.2f} |" in text


def test_a_run_that_stopped_early_is_finished(tmp_path):
    stopping = {"metric": "bbox/AP", "patience": 1, "min_delta": 0.0}
    train(recipe(tmp_path, eval_every=4, early_stopping=stopping))
    text = (tmp_path / "MODEL_CARD.md").read_text()
    assert section(text, "Results")[4].startswith("| model_final.pth | 6.00 |")
    assert section(text, "Training")[0].startswith("- 8 images, 4 a step")


@pytest.mark.parametrize("name", ["Results", "Data", "Training", "Use"])
def test_every_part_says_something(tmp_path, name):
    assert section(card(tmp_path, recipe(tmp_path), NOTE, FINAL, finished=True), name)
