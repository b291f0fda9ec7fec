"""`vitdet report`: the page of a run, against the run's own numbers."""

import base64
import html
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdet import checkpoint
from vitdet.app import cli
from vitdet.app.report.page import lines
from vitdet.config import load_config, save_config
from vitdet.data.shapes import CLASSES, shapes_dataset
from vitdet.engine.run import train
from vitdet.scores import evaluate_results

RECIPE = Path(__file__).resolve().parents[2] / "configs/mini/mask_rcnn_eva02_shapes.py"
KEPT = "coco_instances_results.json"


def recipe(folder, data):
    changes = [f"dataloader.{part}.dataset.root={data}" for part in ("train", "test")]
    changes += ["dataloader.train.dataset.num_images=4", "dataloader.test.dataset.num_images=6"]
    head = "model.roi_heads.box_predictor"
    changes += [f"{head}.test_score_thresh=0.0", f"{head}.test_topk_per_image=20"]
    changes += [f"train.output_dir={folder}", "train.device=cpu", "train.num_images=4"]
    return load_config(RECIPE, [*changes, "schedule.warmup=0", "dataloader.test.num_workers=0"])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The folder of a run with predictions: the truth, some of it shifted or renamed."""
    place = tmp_path_factory.mktemp("good")
    folder = place / "r<un>"
    folder.mkdir()
    save_config(recipe(folder, place / "data"), folder / "config.yaml")
    data = shapes_dataset(place / "data", "val", num_images=6)
    truth = json.loads(data.json_file.read_text())
    draw = np.random.default_rng(0)
    found = []
    for each in truth["annotations"]:
        if each["iscrowd"] or draw.random() < 0.15:
            continue
        x, y, width, height = each["bbox"]
        category = each["category_id"] if draw.random() < 0.8 else each["category_id"] % 6 + 1
        box = [x + int(draw.integers(-3, 4)), y + int(draw.integers(-3, 4)), width, height]
        result = {"image_id": each["image_id"], "category_id": category, "bbox": box}
        found.append(result | {"score": float(draw.uniform(0.4, 1.0))})
    scores = evaluate_results(truth, found, "bbox")
    by_id = scores.pop("per_category_AP")
    results = {name: None if np.isnan(v) else 100 * v for name, v in scores.items()}
    results["per_class"] = {name: 100 * by_id[i] for i, name in enumerate(CLASSES, 1)}
    results["thresholds"] = {"over_all": 0.6, "by_class": {CLASSES[0]: 0.7}}
    content = {"checkpoint": "model_final.pth", "results": {"bbox": results}}
    (folder / "results.json").write_text(json.dumps(content))
    seen = [{"images_seen": n, "total_loss": 1 / n, "lr": 0.1, "bbox/AP": n} for n in (4, 8)]
    text = "\n".join(json.dumps(line) for line in seen) + '\n{"images_se'
    (folder / "metrics.json").write_text(text)
    (folder / KEPT).write_text(json.dumps(found))
    return folder


class Page:
    """A page that was written, and the cells of its tables."""

    def __init__(self, folder, *options):
        assert cli.main(["report", str(folder), *options]) == 0
        self.text = (folder / "report.html").read_text()
        rows = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in self.text.split("<tr>")]
        self.rows = [[html.unescape(cell) for cell in row] for row in rows if row]

    def row(self, first):
        """The first row that begins with a text."""
        return next(row for row in self.rows if row[0] == first)

    def pictures(self, kind):
        return list(
            map(base64.b64decode, re.findall(rf'"data:image/{kind};base64,(.*?)"', self.text))
        )


def test_the_page_has_the_numbers_of_the_run_and_needs_nothing_from_outside(good):
    page = Page(good, "--images", "3")
    results = json.loads((good / "results.json").read_text())["results"]["bbox"]
    assert 20 < results["AP"] < 90
    shown = dict(zip(page.rows[0], page.row("bbox"), strict=True))
    for key in ("AP", "AP50", "AP75", "APs", "APm", "AR100"):
        assert shown[key] == f"{results[key]:.1f}", key
    assert shown["APl"] == "-"  # no such object
    rows = {name: page.row(name) for name in CLASSES}
    assert all(row[2] == f"{results['per_class'][name]:.1f}" for name, row in rows.items())
    counts = [int(row[1]) for row in page.rows if row[0] in CLASSES and len(row) == 9]
    assert counts == sorted(counts, reverse=True)
    ap50 = np.mean([float(row[4]) for row in rows.values()])
    assert ap50 == pytest.approx(results["AP50"], abs=0.05)
    verdict = rf"\d+ of {sum(counts)} objects are found, and \d+ detections are wrong; what costs"
    assert re.search(verdict, page.text)
    assert f"threshold 0.60 ({CLASSES[0]} 0.70)" in page.text  # the run's own, by class
    assert [row[-1] for row in rows.values()] == ["0.70", *["0.60"] * 5]
    assert "results.json says" not in page.text  # nothing disagrees
    # mistakes are counted, and stand beside the worst images
    assert int(page.row("classification")[1]) >= 1
    assert page.row("duplicate")[1] == "0"
    assert re.search(rf"</i>missed: ({'|'.join(CLASSES)})</li>", page.text)
    assert re.search(r"</i>classification: \w+ \d+%, is a \w+</li>", page.text)
    # names cannot become markup, and nothing is fetched
    assert "r&lt;un&gt;" in page.text
    assert not re.search(r"r<un>|<script", page.text)
    references = re.findall(r'\b(?:src|href|action|data)="(.*?)"', page.text)
    anchors = [each[1:] for each in references if not each.startswith("data:")]
    assert len(anchors) == 8
    assert all(f'id="{each}"' in page.text for each in anchors)
    # three images; two plots of recall, losses, lr, AP
    pictures = page.pictures("jpeg")
    assert [min(Image.open(io.BytesIO(each)).size) for each in pictures] == [420] * 3
    assert ["<svg" in each.decode() for each in page.pictures(r"svg\+xml")] == [True] * 5


def test_other_predictions_are_remarked(good, tmp_path):
    found = json.loads((good / KEPT).read_text())
    half = tmp_path / "half.json"
    half.write_text(json.dumps(found[: len(found) // 2]))
    assert "results.json says" in Page(good, "--predictions", str(half)).text


@pytest.mark.slow
def test_a_run_keeps_its_predictions_and_thresholds(tmp_path):
    run = tmp_path / "run"
    train(recipe(run, tmp_path / "data"))
    kept = json.loads((run / KEPT).read_text())
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == set(kept[0])
    options = ("--iou-type", "segm", "--threshold", "0.01")
    page = Page(run, *options)
    results = json.loads((run / "results.json").read_text())["results"]
    assert page.row("segm")[1] == f"{results['segm']['AP']:.1f}"
    assert "AP of masks" in page.row("class")
    assert sum(int(page.row(kind)[1]) for kind in ("background", "both", "classification")) > 10
    assert "vitdet.backbones.eva02.EVA02ViT" in page.text
    assert page.row("torch")[1]
    kept = checkpoint.read(run / "model_final.pth")["vitdet"].get("thresholds", {})
    said = results["bbox"]["thresholds"]["over_all"]
    assert kept == ({} if said is None else {"model": results["bbox"]["thresholds"]})


@pytest.mark.parametrize(
    ("name", "contents", "text"),
    [
        ("results.json", [None], "it has no results.json"),
        ("config.yaml", [None], "it has no config.yaml"),
        (KEPT, [None], f"it has no {KEPT}"),
        ("results.json", ["{", "\udcff", "[" * 100_000], "results.json: it cannot be read"),
        ("results.json", ["[]"], "expected a dict, got a list"),
        (
            "results.json",
            [
                *("{}", '{"results": [1]}', '{"checkpoint": "x", "results": {"b": {}}}'),
                '{"checkpoint": 1, "results": {"bbox": {"AP": 1}}}',
                '{"checkpoint": "x", "results": {"bbox": {"AP": "high"}}}',
                '{"checkpoint": "x", "results": {"bbox": {"AP": 1, "per_class": {"a": []}}}}',
            ],
            'no AP under "results"',
        ),
        ("metrics.json", ["x\n{}\n", "[1]\n{}\n", '{"lr": 1}\n{}\n'], "line 1: no numbers of a"),
        ("environment.json", ["[1]"], "environment.json: expected a dict, got a list"),
        (KEPT, ["{}"], "expected a list, got a dict"),
        (KEPT, ["[3]", '[{"image_id": 1}]'], "result 0"),
    ],
)
def test_a_damaged_run_is_one_line(good, tmp_path, name, contents, text, capsys):
    copy = shutil.copytree(good, tmp_path / "copy")
    for content in contents:
        (copy / name).unlink(missing_ok=True)
        if content is not None:
            (copy / name).write_bytes(content.encode(errors="surrogateescape"))
        assert cli.main(["report", str(copy)]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert error.count("\n") == 1


def test_a_run_that_missed_everything_and_numbers_that_are_none(good, tmp_path):
    """No detection, losses that cannot be drawn, an image that is damaged: there is a page."""
    copy = shutil.copytree(good, tmp_path / "copy")
    (copy / KEPT).write_text("[]")
    results = '{"checkpoint": "x", "results": {"bbox": {"AP": 0.0, "AP50": null}}}'
    (copy / "results.json").write_text(results)
    numbers = ('NaN, "lr": 1e999', '1e308, "lr": 2, "note": "x"', '3.0, "lr": 1')
    seen = [f'{{"images_seen": {n}, "total_loss": {loss}}}' for n, loss in enumerate(numbers)]
    (copy / "metrics.json").write_text("\n".join(seen))
    image = sorted((good.parent / "data").rglob("*.jpg"))[0]
    before = image.read_bytes()
    image.write_bytes(before[:500])
    page = Page(copy)
    image.write_bytes(before)
    assert f"Not shown: image {image}" in page.text
    assert len(page.pictures("jpeg")) == 5
    assert page.row("background")[1] == "0"
    assert page.row("bbox")[1:] == ["0.0", "-"]
    assert [page.row("circle")[place] for place in (2, 4)] == ["-", "0.0"]
    plots = page.pictures(r"svg\+xml")
    assert plots
    assert not [plot for plot in plots if b"mathdefault" in plot]


def test_a_wrong_option_is_one_line(good, capsys):
    wrong = {
        ("--threshold", "2"): "threshold: expected a score of 0 to 1, got 2",
        ("--images", "-1"): "--images -1: expected 0 or more",
        ("--out", "/nowhere/x.html"): "there is no folder /nowhere",
        ("--predictions", "no.json"): "no.json: No such file",
    }
    for options, text in wrong.items():  # a file of the run stands for its folder
        assert cli.main(["report", str(good / "results.json"), *options]) == 2
        assert text in capsys.readouterr().err


def test_names_of_classes_are_no_formulas():
    x = [0.0, 1.0]
    plots = [base64.b64decode(lines({n: (x, x)})[26:]) for n in (r"$\frac$", "x")]
    assert plots[0].count(b"<use") > plots[1].count(b"<use") + 4
