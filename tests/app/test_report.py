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
from vitdet.app.report.matching import matches
from vitdet.app.report.run_folder import read_run
from vitdet.config import load_config, save_config
from vitdet.data.shapes import CLASSES, shapes_dataset
from vitdet.engine.run import train
from vitdet.scores import evaluate_results

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "mini" / "mask_rcnn_eva02_shapes.py"


def recipe(folder: Path, data: Path):
    places = [f"dataloader.{part}.dataset.root={data}" for part in ("train", "test")]
    sizes = ["dataloader.train.dataset.num_images=4", "dataloader.test.dataset.num_images=6"]
    return load_config(
        RECIPE,
        [
            *places,
            *sizes,
            f"train.output_dir={folder}",
            "train.device=cpu",
            "train.num_images=4",
            "schedule.warmup=0",
            "dataloader.test.num_workers=0",
            "model.roi_heads.box_predictor.test_score_thresh=0.0",
            "model.roi_heads.box_predictor.test_topk_per_image=20",
        ],
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of one step, which found next to nothing."""
    place = tmp_path_factory.mktemp("report")
    train(recipe(place / "run", place / "data"))
    return place / "run"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of a run and its predictions: the truth, some of it shifted or renamed."""
    place = tmp_path_factory.mktemp("good")
    folder = place / "r<un>"
    folder.mkdir()
    cfg = recipe(folder, place / "data")
    save_config(cfg, folder / "config.yaml")
    data = shapes_dataset(place / "data", "val", num_images=6)
    truth = json.loads(data.json_file.read_text())
    draw = np.random.default_rng(0)
    found = []
    for each in truth["annotations"]:
        if each["iscrowd"] or draw.random() < 0.15:
            continue
        x, y, width, height = each["bbox"]
        category = each["category_id"] if draw.random() < 0.8 else each["category_id"] % 6 + 1
        box = [x + draw.integers(-3, 4), y + draw.integers(-3, 4), width, height]
        result = {"image_id": each["image_id"], "category_id": category, "bbox": box}
        found.append(result | {"score": float(draw.uniform(0.4, 1.0))})
    scores = evaluate_results(truth, found, "bbox")
    by_id = scores.pop("per_category_AP")
    results = {name: None if np.isnan(v) else 100 * v for name, v in scores.items()}
    results["per_class"] = {
        name: None if np.isnan(by_id[i]) else 100 * by_id[i] for i, name in enumerate(CLASSES, 1)
    }
    content = {"dataset": data.name, "checkpoint": "model_final.pth", "results": {"bbox": results}}
    (folder / "results.json").write_text(json.dumps(content))
    lines = [{"images_seen": n, "total_loss": 1 / n, "lr": 0.1, "bbox/AP": n} for n in (4, 8)]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"images_se'
    (folder / "metrics.json").write_text(text)
    (place / "predictions.json").write_text(json.dumps(found, default=int))
    return folder, place / "predictions.json"


class Page(HTMLParser):
    """Texts of table cells, of list items and headings, and everything that is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
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
        return next(row for row in self.rows if row and row[0] == first)


def write(folder: Path, *options: str) -> tuple[Page, str]:
    assert cli.main(["report", str(folder), *options]) == 0
    text = (folder / "report.html").read_text()
    return Page(text), text


def test_numbers_of_the_page_are_those_of_the_run(good, capsys) -> None:
    folder, predictions = good
    page, text = write(folder, "--predictions", str(predictions))
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())["results"]["bbox"]
    assert 20 < results["AP"] < 90
    told = dict(zip(page.rows[0], page.row("bbox"), strict=True))
    for key in ("AP", "AP50", "AP75", "APs", "APm", "AR100"):
        assert told[key] == f"{results[key]:.1f}", key
    assert told["APl"] == "-"  # no such object
    run = read_run(folder, predictions)
    scenes = run.scenes("bbox")
    for place, name in enumerate(CLASSES, 1):
        row = page.row(name)
        ap = results["per_class"][name]
        assert row[2] == f"{ap:.1f}"
        mine = matches(scenes, place).precision()
        assert 100 * mine.mean() == pytest.approx(ap, abs=1e-9)
        assert row[4] == f"{100 * mine[0].mean():.1f}"
    assert "note'" not in text  # nothing disagrees
    assert page.row("images")[1] == "6"
    objects = sum(int(page.row(name)[1]) for name in CLASSES)
    assert page.row("objects")[1].startswith(f"{objects}, ")


def test_the_page_needs_nothing_from_outside(good) -> None:
    folder, predictions = good
    page, text = write(folder, "--predictions", str(predictions), "--images", "3")
    assert len(text) < 5e6
    assert all(each.startswith(("data:", "#")) for each in page.references)
    assert "<script" not in text
    assert "r&lt;un&gt;" in text
    assert "r<un>" not in text  # names cannot become markup
    assert all(image["alt"] for image in page.images)
    anchors = [each for each in page.references if each.startswith("#")]
    assert all(f'id="{each[1:]}"' in text for each in anchors)
    assert len(anchors) == 9
    # every picture can be decoded; three images, each twice
    pictures = [image["src"] or "" for image in page.images if "jpeg" in (image["src"] or "")]
    assert len(pictures) == 6
    for source in pictures:
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as picture:
            assert min(picture.size) == 420
    plots = [image["src"] or "" for image in page.images if "svg" in (image["src"] or "")]
    assert len(plots) == 7  # two of recall, errors, confusion, losses, lr, AP
    assert b"<svg" in base64.b64decode(plots[0].partition(",")[2])


def test_mistakes_stand_beside_the_worst_images(good) -> None:
    folder, predictions = good
    page, _ = write(folder, "--predictions", str(predictions))
    notes = [text for text in page.texts if re.match(r"(missed|classification): ", text)]
    assert any(re.fullmatch(rf"missed: ({'|'.join(CLASSES)})", note) for note in notes)
    assert any(re.fullmatch(r"classification: \w+ \d+%, is a \w+", note) for note in notes)
    total = {kind: int(page.row(kind)[1]) for kind in ("classification", "missed", "duplicate")}
    assert total["classification"] >= 1
    assert total["duplicate"] == 0


def test_predictions_of_something_else_are_remarked(good, tmp_path: Path) -> None:
    folder, predictions = good
    found = json.loads(predictions.read_text())
    half = tmp_path / "half.json"
    half.write_text(json.dumps(found[: len(found) // 2]))
    _, text = write(folder, "--predictions", str(half))
    assert "results.json says" in text


def test_weights_run_over_the_test_data(trained: Path) -> None:
    before = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    page, text = write(trained, "--iou-type", "segm", "--threshold", "0.01")
    results = json.loads((trained / "results.json").read_text())["results"]
    assert page.row("segm")[1] == f"{results['segm']['AP']:.1f}"
    assert "note'" not in text  # the same AP once more
    assert "AP of masks" in page.row("class")
    assert sum(int(page.row(kind)[1]) for kind in ("background", "both", "classification")) > 10
    assert "vitdet.backbones.eva02.EVA02ViT" in text
    assert page.row("torch")[1]
    after = {path.name: path.read_bytes() for path in trained.iterdir() if path.is_file()}
    assert {name: after[name] for name in before} == before  # the run is as it was
    assert set(after) - set(before) == {"report.html"}


def replaced(name: str, content: str | bytes):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


AP_IS_TEXT = '{"checkpoint": "x", "results": {"bbox": {"AP": "high"}}}'
CLASS_IS_LIST = '{"checkpoint": "x", "results": {"bbox": {"AP": 1, "per_class": {"a": []}}}}'


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda f: (f / "results.json").unlink(), "expected a folder with results.json, got none"),
        (lambda f: (f / "config.yaml").unlink(), "expected a folder with config.yaml, got none"),
        (replaced("results.json", "{"), "results.json: expected a json file"),
        (replaced("results.json", b"\xff\xfe"), "results.json: expected a json file"),
        (replaced("results.json", "[" * 100_000), "results.json: expected a json file"),
        *(
            (replaced("results.json", content), 'expected AP under "results"')
            for content in (
                *("{}", "[]", "3", '{"results": {"bbox": {}}}', '{"results": [1]}'),
                *('{"checkpoint": 1, "results": {"bbox": {}}}', AP_IS_TEXT, CLASS_IS_LIST),
                '{"checkpoint": "x", "results": {"bbox": [1]}}',
            )
        ),
        (replaced("metrics.json", "x\n{}\n"), "got line 1: Expecting value"),
        (replaced("metrics.json", "[1]\n{}\n"), "got line 1: no numbers of a training"),
        (replaced("metrics.json", '{"images_seen": "4"}\n{}\n'), "got line 1: no numbers of"),
        (replaced("environment.json", "[1]"), "environment.json: expected names and versions"),
        (replaced("../predictions.json", "{}"), "expected a list of results, got dict"),
        (replaced("../predictions.json", "[3]"), "result 0"),
        (replaced("../predictions.json", '[{"image_id": 1}]'), "result 0"),
    ],
)
def test_a_damaged_run_is_one_line(good, tmp_path: Path, damage, text: str, capsys) -> None:
    folder, predictions = good
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.copy(predictions, tmp_path)
    damage(copy)
    words = ["report", str(copy), "--predictions", str(tmp_path / "predictions.json")]
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_a_run_that_missed_everything_and_numbers_that_are_none(good, tmp_path: Path) -> None:
    """No detection, an image that is damaged, losses that cannot be drawn: there is a page."""
    folder, _ = good
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (tmp_path / "none.json").write_text("[]")
    results = '{"checkpoint": "x", "results": {"bbox": {"AP": 0.0, "AP50": null}}}'
    (copy / "results.json").write_text(results)
    numbers = ('NaN, "lr": 1e999', '1e308, "lr": 2, "note": "x"', '3.0, "lr": 1')
    lines = [f'{{"images_seen": {n}, "total_loss": {loss}}}' for n, loss in enumerate(numbers)]
    (copy / "metrics.json").write_text("\n".join(lines))
    # a file of the run stands for its folder
    given = ["report", str(copy / "results.json"), "--predictions", str(tmp_path / "none.json")]
    assert cli.main(given) == 0
    text = (copy / "report.html").read_text()
    page = Page(text)
    assert page.row("missed")[2] == "-"  # without them there would be no object
    assert page.row("background")[1:3] == ["0", "+0.0"]
    assert page.row("circle")[2:] == ["-", "", "0.0", *page.row("circle")[5:]]
    plots = [image["src"] or "" for image in page.images if "svg" in (image["src"] or "")]
    assert plots
    assert not [p for p in plots if b"mathdefault" in base64.b64decode(p.partition(",")[2])]


def test_an_image_that_is_damaged_costs_its_pictures_alone(good, tmp_path: Path) -> None:
    folder, predictions = good
    images = sorted((folder.parent / "data").rglob("*.jpg"))
    before = images[0].read_bytes()
    images[0].write_bytes(before[:500])
    page, text = write(folder, "--predictions", str(predictions))
    images[0].write_bytes(before)
    assert f"Not shown: image {images[0]}" in text
    assert sum("jpeg" in (image["src"] or "") for image in page.images) == 10


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--threshold", "2"], "--threshold: expected a score from 0 to 1, got 2.0"),
        (["--images", "-1"], "--images: expected 0 or more"),
        (["--out", "/nowhere/x.html"], "got no folder /nowhere"),
        (["--predictions", "no.json"], "no.json: No such file"),
    ],
)
def test_a_wrong_option_is_one_line(good, options: list[str], text: str, capsys) -> None:
    assert cli.main(["report", str(good[0]), *options]) == 2
    assert text in capsys.readouterr().err


def test_names_of_classes_are_no_formulas():
    curve = np.linspace(1, 0, 101)
    shown = figures.precision_recall({r"$\frac$": curve})
    assert shown.count("<use") > figures.precision_recall({"x": curve}).count("<use") + 4
    assert "<svg" in figures.confusion(np.eye(2), [r"$\frac$", "cup"])
