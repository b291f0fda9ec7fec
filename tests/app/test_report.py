"""`vitdet report`: the page of a run, against the run's own numbers."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitdet.app import cli
from vitdet.app.report import figures
from vitdet.config import load_config, save_config
from vitdet.data.shapes import CLASSES, shapes_dataset
from vitdet.engine.run import train
from vitdet.scores import evaluate_results

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "mini" / "mask_rcnn_eva02_shapes.py"
KEPT = "coco_instances_results.json"


def recipe(folder: Path, data: Path):
    places = [f"dataloader.{part}.dataset.root={data}" for part in ("train", "test")]
    sizes = ["dataloader.train.dataset.num_images=4", "dataloader.test.dataset.num_images=6"]
    head = "model.roi_heads.box_predictor"
    found = [f"{head}.test_score_thresh=0.0", f"{head}.test_topk_per_image=20"]
    other = [f"train.output_dir={folder}", "train.device=cpu", "train.num_images=4"]
    other += ["schedule.warmup=0", "dataloader.test.num_workers=0"]
    return load_config(RECIPE, [*places, *sizes, *found, *other])


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
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
    content = {"checkpoint": "model_final.pth", "results": {"bbox": results}}
    (folder / "results.json").write_text(json.dumps(content))
    lines = [{"images_seen": n, "total_loss": 1 / n, "lr": 0.1, "bbox/AP": n} for n in (4, 8)]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"images_se'
    (folder / "metrics.json").write_text(text)
    (folder / KEPT).write_text(json.dumps(found))
    return folder


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "copy")


class Page(HTMLParser):
    """Texts of table cells and of all else, pictures, and everything that is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.images.append(dict(attrs))
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        """The first row that begins with a text."""
        rows = ([cell.strip() for cell in row] for row in self.rows)
        return next(row for row in rows if row and row[0] == first)

    def pictures(self, kind: str) -> list[bytes]:
        found = [image["src"] or "" for image in self.images]
        return [base64.b64decode(s.partition(",")[2]) for s in found if f"image/{kind}" in s]


def write(folder: Path, *options: str) -> Page:
    assert cli.main(["report", str(folder), *options]) == 0
    return Page((folder / "report.html").read_text())


def test_the_page_has_the_numbers_of_the_run_and_needs_nothing_from_outside(good, capsys) -> None:
    page = write(good, "--images", "3")
    assert f"report: {good / 'report.html'}" in capsys.readouterr().out
    results = json.loads((good / "results.json").read_text())["results"]["bbox"]
    assert 20 < results["AP"] < 90
    shown = dict(zip(page.rows[0], page.row("bbox"), strict=True))
    for key in ("AP", "AP50", "AP75", "APs", "APm", "AR100"):
        assert shown[key] == f"{results[key]:.1f}", key
    assert shown["APl"] == "-"  # no such object
    rows = {name: page.row(name) for name in CLASSES}
    for name, row in rows.items():
        assert row[2] == f"{results['per_class'][name]:.1f}"
    ap50 = np.mean([float(row[4]) for row in rows.values()])
    assert ap50 == pytest.approx(results["AP50"], abs=0.05)
    assert page.row("images")[1] == "6"
    objects = sum(int(row[1]) for row in rows.values())
    assert page.row("objects")[1].startswith(f"{objects}, ")
    assert "results.json says" not in page.text  # nothing disagrees
    # mistakes are counted, and stand beside the worst images
    kinds = {kind: int(page.row(kind)[1]) for kind in ("classification", "missed", "duplicate")}
    assert kinds["classification"] >= 1
    assert kinds["duplicate"] == 0
    assert any(re.fullmatch(rf"missed: ({'|'.join(CLASSES)})", text) for text in page.texts)
    assert any(re.fullmatch(r"classification: \w+ \d+%, is a \w+", text) for text in page.texts)
    # names cannot become markup, and nothing is fetched
    assert "r&lt;un&gt;" in page.text
    assert "r<un>" not in page.text
    assert "<script" not in page.text
    assert all(each.startswith(("data:", "#")) for each in page.references)
    anchors = [each for each in page.references if each.startswith("#")]
    assert len(anchors) == 9
    assert all(f'id="{each[1:]}"' in page.text for each in anchors)
    # every picture has a text and can be decoded; three images, each twice
    assert all(image["alt"] for image in page.images)
    pictures = page.pictures("jpeg")
    assert len(pictures) == 6
    assert all(min(Image.open(io.BytesIO(each)).size) == 420 for each in pictures)
    plots = page.pictures("svg")
    assert len(plots) == 5  # two of recall, losses, lr, AP
    assert all(b"<svg" in each for each in plots)


def test_other_predictions_are_remarked(good: Path, tmp_path: Path) -> None:
    found = json.loads((good / KEPT).read_text())
    half = tmp_path / "half.json"
    half.write_text(json.dumps(found[: len(found) // 2]))
    assert "results.json says" in write(good, "--predictions", str(half)).text


def test_a_run_keeps_its_predictions_and_without_them_is_evaluated(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(recipe(run, tmp_path / "data"))
    kept = json.loads((run / KEPT).read_text())
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == set(kept[0])
    options = ("--iou-type", "segm", "--threshold", "0.01")
    page = write(run, *options)
    results = json.loads((run / "results.json").read_text())["results"]
    assert page.row("segm")[1] == f"{results['segm']['AP']:.1f}"
    assert "AP of masks" in page.row("class")
    assert sum(int(page.row(kind)[1]) for kind in ("background", "both", "classification")) > 10
    assert "vitdet.backbones.eva02.EVA02ViT" in page.text
    assert page.row("torch")[1]
    (run / KEPT).unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    again = write(run, *options)
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert after == before  # the run is as it was, and so is its page
    assert again.text == page.text


NO_AP = (
    *("{}", "[]", "3", '{"results": {"bbox": {}}}', '{"results": [1]}'),
    '{"checkpoint": 1, "results": {"bbox": {"AP": 1}}}',
    '{"checkpoint": "x", "results": {"bbox": [1]}}',
    '{"checkpoint": "x", "results": {"bbox": {"AP": "high"}}}',
    '{"checkpoint": "x", "results": {"bbox": {"AP": 1, "per_class": {"a": []}}}}',
)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("results.json", None, "it has no results.json"),
        ("config.yaml", None, "it has no config.yaml"),
        ("results.json", "{", "results.json: it is no json file"),
        ("results.json", "\udcff", "results.json: it is no json file"),
        ("results.json", "[" * 100_000, "results.json: it is no json file"),
        *(("results.json", content, 'no AP under "results"') for content in NO_AP),
        ("metrics.json", "x\n{}\n", "line 1: Expecting value"),
        ("metrics.json", "[1]\n{}\n", "line 1: no numbers of a training"),
        ("metrics.json", '{"images_seen": "4"}\n{}\n', "line 1: no numbers of"),
        ("environment.json", "[1]", "environment.json: no names and versions"),
        (KEPT, "{}", "expected a list, got a dict"),
        (KEPT, "[3]", "result 0"),
        (KEPT, '[{"image_id": 1}]', "result 0"),
    ],
)
def test_a_damaged_run_is_one_line(copy: Path, name: str, content, text: str, capsys) -> None:
    (copy / name).unlink(missing_ok=True)
    if content is not None:
        (copy / name).write_bytes(content.encode(errors="surrogateescape"))
    assert cli.main(["report", str(copy)]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_a_run_that_missed_everything_and_numbers_that_are_none(copy: Path) -> None:
    """No detection, losses that cannot be drawn: there is a page."""
    (copy / KEPT).write_text("[]")
    results = '{"checkpoint": "x", "results": {"bbox": {"AP": 0.0, "AP50": null}}}'
    (copy / "results.json").write_text(results)
    numbers = ('NaN, "lr": 1e999', '1e308, "lr": 2, "note": "x"', '3.0, "lr": 1')
    lines = [f'{{"images_seen": {n}, "total_loss": {loss}}}' for n, loss in enumerate(numbers)]
    (copy / "metrics.json").write_text("\n".join(lines))
    # a file of the run stands for its folder
    assert cli.main(["report", str(copy / "results.json")]) == 0
    page = Page((copy / "report.html").read_text())
    assert page.row("background")[1] == "0"
    assert page.row("circle")[2:4] == ["-", ""]
    assert page.row("circle")[4] == "0.0"
    assert page.pictures("svg")
    assert not [plot for plot in page.pictures("svg") if b"mathdefault" in plot]


def test_an_image_that_is_damaged_costs_its_pictures_alone(good: Path) -> None:
    image = sorted((good.parent / "data").rglob("*.jpg"))[0]
    before = image.read_bytes()
    image.write_bytes(before[:500])
    page = write(good)
    image.write_bytes(before)
    assert f"Not shown: image {image}" in page.text
    assert len(page.pictures("jpeg")) == 10


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--threshold", "2"], "--threshold: expected a score from 0 to 1, got 2.0"),
        (["--images", "-1"], "--images: expected 0 or more"),
        (["--out", "/nowhere/x.html"], "there is no folder /nowhere"),
        (["--predictions", "no.json"], "no.json: No such file"),
    ],
)
def test_a_wrong_option_is_one_line(good, options: list[str], text: str, capsys) -> None:
    assert cli.main(["report", str(good), *options]) == 2
    assert text in capsys.readouterr().err


def test_names_of_classes_are_no_formulas() -> None:
    x = [0.0, 1.0]
    plots = [base64.b64decode(figures.lines({n: (x, x)})[26:]) for n in (r"$\frac$", "x")]
    assert plots[0].count(b"<use") > plots[1].count(b"<use") + 4
