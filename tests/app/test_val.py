"""`vitdet val`: the numbers of `train_net.py --eval-only`, also through augmentation and slices."""

import json
import shutil

import pytest

from vitdet.app import cli
from vitdet.engine.run import evaluate


def val(drawn_run, out, *words):
    """Run the command and return what it wrote."""
    given = ["--weights", drawn_run.weights, "--device", "cpu", "--out", out, *words]
    assert cli.main(["val", *map(str, given)]) == 0
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def wanted(drawn_run, tmp_path_factory):
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


def test_other_data(drawn_run, wanted, tmp_path):
    data, images = tmp_path / "data", drawn_run.images[0].parent
    for part in ("train", "valid"):  # as `vitdet train` finds data: a folder with parts
        shutil.copytree(images, data / part)
        shutil.copy(drawn_run.annotations, data / part / "_annotations.coco.json")
    for words in (("--data", drawn_run.annotations, "--images", images), ("--data", data)):
        assert val(drawn_run, tmp_path / "out", *words)["results"] == wanted["results"]


def test_options(drawn_run, wanted, tmp_path):
    """Slices that hold an image change nothing: through the predictor's own reading of files."""
    found = val(drawn_run, tmp_path / "a", "--slices", "128", "--batch-size", "2")
    assert found["results"] == wanted["results"]
    plain = wanted["results"]["bbox"]["AR100"]
    assert val(drawn_run, tmp_path / "b", "--tta")["results"]["bbox"]["AR100"] != plain
    fewer = "model.roi_heads.box_predictor.test_topk_per_image=1"
    assert val(drawn_run, tmp_path / "c", fewer)["results"]["bbox"]["AR100"] < plain
    found = val(drawn_run, tmp_path, "--use", "ema")["results"]
    assert set(found) == {"ema/bbox", "ema/segm"}  # the average goes by its own name
    assert found["ema/bbox"]["AR100"] != plain


def test_wrong_data_is_one_line(drawn_run, tmp_path, capsys):
    content = json.loads(drawn_run.annotations.read_text())
    content["categories"][0]["name"] = "disc"
    (tmp_path / "other.json").write_text(json.dumps(content))
    images = ["--images", drawn_run.images[0].parent]
    for name, text in (
        ("other.json", "classes of the test data other: expected"),
        ("no.json",) * 2,
    ):
        given = ["val", "--weights", drawn_run.weights, "--data", tmp_path / name, *images]
        assert cli.main([*map(str, given), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1
    assert cli.main(["val", "--weights", str(drawn_run.weights), "--part", "test"]) == 2
    assert "--part test: it is a part of --data, which is not given" in capsys.readouterr().err
