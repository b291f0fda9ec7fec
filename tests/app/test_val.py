"""`vitdet val`: the numbers of `train_net.py --eval-only`, also through augmentation and slices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vitdet.app import cli
from vitdet.engine.run import evaluate


def val(drawn_run, out: Path, *words: object) -> dict[str, Any]:
    """Run the command and return what it wrote."""
    given = ["--weights", drawn_run.weights, "--device", "cpu", "--out", out, *words]
    assert cli.main(["val", *map(str, given)]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def wanted(drawn_run, tmp_path_factory) -> dict[str, Any]:
    """What the engine writes."""
    cfg, out = drawn_run.cfg.copy(), tmp_path_factory.mktemp("wanted")
    cfg.train.output_dir, cfg.train.init_checkpoint = str(out), str(drawn_run.weights)
    evaluate(cfg)
    return json.loads((out / "results.json").read_text())


def test_it_is_the_evaluation_of_the_engine(drawn_run, wanted, tmp_path, capsys):
    assert val(drawn_run, tmp_path / "val") == wanted
    assert wanted["results"]["bbox"]["AR100"] > 0
    said = capsys.readouterr().out
    assert f"{wanted['results']['bbox']['AP']:.2f}" in said
    assert f"results in {tmp_path / 'val' / 'results.json'}" in said
    assert "AP50" in (tmp_path / "val" / "log.txt").read_text()


def test_the_average_goes_by_its_own_name(drawn_run, wanted, tmp_path):
    found = val(drawn_run, tmp_path, "--use", "ema")["results"]
    assert set(found) == {"ema/bbox", "ema/segm"}
    assert found["ema/bbox"]["AR100"] != wanted["results"]["bbox"]["AR100"]


def test_other_data(drawn_run, wanted, tmp_path):
    images = drawn_run.images[0].parent
    given = val(drawn_run, tmp_path / "a", "--data", drawn_run.annotations, "--images", images)
    assert given["results"] == wanted["results"]
    data = tmp_path / "data"  # as `vitdet train` finds data: a folder with parts
    for part in ("train", "valid"):
        shutil.copytree(images, data / part)
        shutil.copy(drawn_run.annotations, data / part / "_annotations.coco.json")
    given = val(drawn_run, tmp_path / "b", "--data", data)
    assert given["results"] == wanted["results"]


def test_slices_that_hold_an_image_change_nothing(drawn_run, wanted, tmp_path):
    """Through the predictor and its own reading of the files, with the same numbers."""
    found = val(drawn_run, tmp_path, "--slices", "128", "--batch-size", "2")
    assert found["results"] == wanted["results"]


def test_augmentation_and_overrides_change_the_numbers(drawn_run, wanted, tmp_path):
    plain = wanted["results"]["bbox"]["AR100"]
    assert val(drawn_run, tmp_path / "a", "--tta")["results"]["bbox"]["AR100"] != plain
    fewer = "model.roi_heads.box_predictor.test_topk_per_image=1"
    assert val(drawn_run, tmp_path / "b", fewer)["results"]["bbox"]["AR100"] < plain


def test_wrong_data_is_one_line(drawn_run, tmp_path, capsys):
    content = json.loads(drawn_run.annotations.read_text())
    content["categories"][0]["name"] = "disc"
    (tmp_path / "other.json").write_text(json.dumps(content))
    words = ["--data", tmp_path / "other.json", "--images", drawn_run.images[0].parent]
    given = ["val", "--weights", drawn_run.weights, "--out", tmp_path / "out", *words]
    assert cli.main(list(map(str, given))) == 2
    error = capsys.readouterr().err
    assert "classes of the test data other: expected those of the training data" in error
    assert error.count("\n") == 1
    words = ["--data", tmp_path / "no.json"]
    given = ["val", "--weights", drawn_run.weights, "--out", tmp_path / "out", *words]
    assert cli.main(list(map(str, given))) == 2
    assert "no.json" in capsys.readouterr().err
