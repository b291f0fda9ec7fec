"""AP of files with known AP, of what a model found, and of results and truths that are odd."""

from __future__ import annotations

import copy
import json
import math
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import Boxes, Instances

from vitdet import evaluation
from vitdet.evaluation import CocoEvaluator
from vitdet.scores import evaluate_results
from vitdet.utils import distributed
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import encode

SHARED = Path(
    os.environ.get("VITDET_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)
HEIGHT, WIDTH = 60, 80


def _expected(folder):
    path = SHARED / folder / "expected.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there; set VITDET_SHARED_DATA to the folder of {folder}")
    return path.parent, json.loads(path.read_text())


def _worst(got, expected):
    """Largest difference; the stored numbers say -1 where ours say nan."""
    values = {str(key): -1 if math.isnan(value) else value for key, value in got.items()}
    return max(abs(values[key] - value) for key, value in expected.items())


@pytest.mark.parametrize(
    ("name", "iou_type"),
    [
        ("val2014_fakebbox100", "bbox"),
        ("val2014_fakesegm100", "segm"),
        ("coco_mini_val_made", "bbox"),
        ("coco_mini_val_made", "segm"),
    ],
)
def test_coco_results(name, iou_type):
    folder, stored = _expected("coco-eval")
    case = stored[name]
    truth = folder / case["ground_truth"]
    if not truth.is_file():
        pytest.skip(f"{truth} is not there")
    got = evaluate_results(truth, folder / case["results"], iou_type)
    made = "stats" not in case
    by_category, stats = got.pop("per_category_AP"), case[iou_type if made else "stats"]
    assert sorted(got) == sorted(stats)
    assert _worst(got, stats) < 1e-12
    expected = case[f"per_category_AP_{iou_type}" if made else "per_category_AP"]
    assert made or len(expected) >= 70
    assert _worst(by_category, expected) < 1e-12


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize(("suffix", "limit"), [("", 300), ("_all_detections_kept", 10_000)])
def test_lvis_results(iou_type, suffix, limit):
    folder, stored = _expected("lvis-mini")
    case = stored["lvis_val_100_made"]
    got = evaluate_results(
        folder / case["ground_truth"], folder / case["results"], iou_type, limit, style="lvis"
    )
    del got["per_category_AP"]
    renamed = {
        f"{key}@300": got.pop(name)
        for key, name in (("AR", f"AR{limit}"), ("ARs", "ARs"), ("ARm", "ARm"), ("ARl", "ARl"))
    }
    expected = case[iou_type + suffix]
    assert sorted(got | renamed) == sorted(expected)
    assert _worst(got | renamed, expected) < 1e-12


@dataclass
class Data:
    """Two images with three objects and a crowd region; class ids 3 and 7."""

    json_file: Path
    records: list[dict[str, Any]]
    name: str = "tiny"
    class_names: tuple[str, ...] = ("cat", "dog")
    class_ids: tuple[int, ...] = (3, 7)
    style: Any = "coco"
    truth: dict[str, Any] | None = None
    content: dict[str, Any] = field(default_factory=dict)

    def write(self):
        self.json_file.write_text(json.dumps(self.content))


OBJECTS = [  # image, class id, box XYWH, crowd
    (1, 3, [5, 5, 20, 10], 0),
    (1, 7, [40, 20, 30, 30], 0),
    (2, 3, [0, 0, 50, 40], 0),
    (2, 7, [55, 10, 20, 40], 1),
]


@pytest.fixture
def data(tmp_path):
    content = {
        "images": [{"id": n, "height": HEIGHT, "width": WIDTH} for n in (1, 2)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [],
    }
    for number, (image, category, box, crowd) in enumerate(OBJECTS):  # an id 0, as some files have
        x, y, w, h = box
        mask = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if crowd:
            mask = mask_util.merge(mask_util.frPyObjects(mask, HEIGHT, WIDTH))
            mask["counts"] = mask["counts"].decode("ascii")
        about = {"id": number, "image_id": image, "category_id": category, "bbox": box}
        about |= {"iscrowd": crowd, "area": w * h, "segmentation": mask}
        content["annotations"].append(about)
    data = Data(tmp_path / "tiny.json", [{"image_id": 1}, {"image_id": 2}], content=content)
    data.write()
    return data


def _instances(boxes, classes, masks=True):
    """Predictions XYWH with falling scores; masks fill the boxes."""
    instances = Instances((HEIGHT, WIDTH))
    tensor = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    tensor[:, 2:] += tensor[:, :2]
    instances.pred_boxes = Boxes(tensor)
    instances.scores = torch.linspace(0.9, 0.5, len(boxes))
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    if masks:
        filled = torch.zeros((len(boxes), HEIGHT, WIDTH), dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(filled, tensor.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances.pred_masks = filled
    return instances


PERFECT = {
    1: _instances([[5, 5, 20, 10], [40, 20, 30, 30]], [0, 1]),
    2: _instances([[0, 0, 50, 40]], [0]),
}


def _evaluate(data, predictions, path=None, **options):
    """Score, and write the predictions into a file."""
    evaluator = CocoEvaluator(data, **options)
    evaluator.reset()
    for image, instances in predictions.items():
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    results = evaluator.evaluate()
    if path:
        path.write_text(json.dumps(evaluator.predictions))
    return results


def test_perfect_predictions_score_100(data, tmp_path):
    path = tmp_path / "found.json"
    results = _evaluate(data, PERFECT, path)
    assert list(results) == ["bbox", "segm"]
    for metrics in results.values():
        assert metrics["AP"] == metrics["AP50"] == pytest.approx(100)
        assert metrics["per_class"] == {"cat": pytest.approx(100), "dog": pytest.approx(100)}
        assert math.isnan(metrics["APl"])  # no large object
        assert {"AR1", "AR10", "AR100", "ARs", "ARm", "ARl"} <= set(metrics)
    stored = json.loads(path.read_text())
    assert (stored[1]["category_id"], stored[1]["bbox"]) == (7, [40, 20, 30, 30])
    mask = mask_util.decode(stored[1]["segmentation"])
    assert np.array_equal(mask, PERFECT[1].pred_masks[1].numpy())
    assert evaluate_results(data.json_file, path, "segm")["AP"] == pytest.approx(1)
    assert stored == json.loads(path.read_text())  # scoring changed nothing


def test_missed_mislabelled_and_no_objects(data):
    found = {1: _instances([[5, 5, 20, 10], [40, 20, 30, 30]], [0, 0]), 2: _instances([], [])}
    results = _evaluate(data, found)
    # cat: one of two found, first in line; recall up to 0.5 at precision 1 is 51 of 101 points
    assert results["bbox"]["per_class"] == {"cat": pytest.approx(100 * 51 / 101), "dog": 0.0}
    assert results["bbox"]["AR100"] == pytest.approx(25)
    for masks in (True, False):
        results = _evaluate(data, {n: _instances([], [], masks) for n in (1, 2)})
        assert list(results) == (["bbox", "segm"] if masks else ["bbox"])
        assert [each["per_class"] for each in results.values()] == [{"cat": 0, "dog": 0}] * (
            1 + masks
        )


def test_what_counts_is_what_the_data_set_says(data, tmp_path, caplog):
    """The images of its records, and the annotations that it did not leave out."""
    annotations = data.content["annotations"]
    data.truth = {**data.content, "annotations": [annotations[0], *annotations[2:]]}
    results = _evaluate(data, PERFECT | {1: _instances([[5, 5, 20, 10]], [0])})
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert math.isnan(results["bbox"]["per_class"]["dog"])
    data.truth, data.records = None, data.records[:1]
    assert _evaluate(data, {1: PERFECT[1]})["bbox"]["AP"] == pytest.approx(100)
    data.content["annotations"] = []
    data.write()
    assert math.isnan(_evaluate(data, {1: PERFECT[1]})["segm"]["per_class"]["dog"])
    del data.content["annotations"]
    data.write()
    assert _evaluate(data, {1: PERFECT[1]}, tmp_path / "found.json") == {}
    assert "has no annotations" in caplog.text
    assert len(json.loads((tmp_path / "found.json").read_text())) == 2


def test_processes_bring_their_parts_together(data, monkeypatch):
    first, second = CocoEvaluator(data), CocoEvaluator(data)
    first.process([{"image_id": 1}], [{"instances": PERFECT[1]}])
    second.process([{"image_id": 2}], [{"instances": PERFECT[2]}])
    parts = []
    for name in ("all_gather_object", "gather_object"):
        monkeypatch.setattr(distributed, name, lambda part: [part])
    with pytest.raises(InputError, match="got 0 for image 2"):
        first.evaluate()
    monkeypatch.setattr(distributed, "all_gather_object", lambda part: [([1, 2], True)])
    monkeypatch.setattr(distributed, "gather_object", lambda part: parts.append(part) or [])
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert second.evaluate() == {}
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    monkeypatch.setattr(distributed, "gather_object", lambda part: [part, *parts])
    assert first.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_what_an_evaluation_refuses(data):
    """Not every image once, a model of more classes, data that do not say what is needed."""
    evaluator = CocoEvaluator(data)
    for images, got in (([1], "got 0 for image 2"), ([1, 2, 2], "got 2"), ([1, 2, 9], "got 1")):
        evaluator.reset()
        for image in images:
            evaluator.process([{"image_id": image}], [{"instances": _instances([], [])}])
        with pytest.raises(InputError, match=rf"on tiny: expected .* its 2 images once, {got}"):
            evaluator.evaluate()
    with pytest.raises(InputError, match="image 1: class 2, but tiny has 2 classes"):
        _evaluate(data, {1: _instances([[0, 0, 5, 5]], [2])})
    with pytest.raises(InputError, match=r"a list, has no .*json_file.*Use .*coco_dataset\(json"):
        CocoEvaluator(data.records)
    data.json_file = Path("nowhere.json")
    with pytest.raises(InputError, match=r"tiny: no annotation file nowhere\.json to evaluate by"):
        CocoEvaluator(data)


def test_masks_are_encoded_by_another_thread_in_order(data, monkeypatch):
    """What goes wrong there is raised; then all begins anew."""
    threads = []

    def seen(masks):
        threads.append(threading.current_thread())
        if len(threads) == 1:
            raise RuntimeError("no memory")
        return encode(masks)

    monkeypatch.setattr(evaluation, "encode", seen)
    data.records = [{"image_id": number} for number in range(6)]
    data.content["images"] = [{"id": n, "height": HEIGHT, "width": WIDTH} for n in range(6)]
    data.write()
    evaluator = CocoEvaluator(data)
    evaluator.process([{"image_id": 1}], [{"instances": PERFECT[1]}])
    with pytest.raises(RuntimeError, match="no memory"):
        evaluator.evaluate()
    evaluator.reset()
    for image in range(6):  # image n has n boxes, n pixels wide
        instances = _instances([[3.0, 4.0, image, 5.0]] * image, [0] * image)
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    evaluator.evaluate()
    assert len(threads) == 7
    assert len(set(threads[1:])) == 1
    assert threads[1] is not threading.current_thread()
    assert not threads[1].is_alive()
    stored = evaluator.predictions
    assert [each["image_id"] for each in stored] == [n for n in range(6) for _ in range(n)]
    for each in stored:
        assert mask_util.area(each["segmentation"]) == 5 * each["image_id"]


# --- odd results, odd truths ---------------------------------------------------------------------

GOOD = {"image_id": 1, "category_id": 3, "score": 0.5, "bbox": [1, 1, 5, 5]}
WHOLE = encode(np.ones((1, HEIGHT, WIDTH), bool))[0]
NOT_COVERING = [
    *(None, [[1, 1, 5, 1, 5, 5]], {"size": [60, 80]}),
    {"size": [60, 80], "counts": [4, 10, 4786]},
    {"size": [80, 60], "counts": WHOLE["counts"]},
    *(WHOLE | {"counts": counts} for counts in ("", "zz", "PPPPPP", "é", 3 * WHOLE["counts"])),
]


@pytest.mark.parametrize(
    ("results", "text"),
    [
        ([GOOD, GOOD | {"image_id": 5}], "result 1: expected a known image_id, .* got 5"),
        ([GOOD | {"category_id": 0}], "result 0: expected a known category_id, .*, got 0"),
        ([GOOD | {"score": math.nan}], "result 0: expected a finite score, got nan. The model"),
        ([GOOD | {"image_id": [1]}], r"expected a known image_id, .*, got \[1\]"),
        ([GOOD | {"bbox": [1, 1, math.inf, 2]}], "no side negative, got list .1, 1, inf, 2.$"),
        ([GOOD | {"bbox": [9, 9, -3, 4]}], "no side negative, got list .9, 9, -3, 4.$"),
        ([GOOD | {"bbox": None}], "expected a bbox XYWH of four finite.*got NoneType None"),
        ([{"image_id": 1}], "expected the keys image_id, category_id, score, bbox, got"),
    ],
)
def test_bad_results(data, results, text):
    with pytest.raises(InputError, match=text):
        evaluate_results(data.json_file, results, "bbox")


@pytest.mark.parametrize("mask", NOT_COVERING)
def test_masks_that_do_not_cover_their_image(data, mask):
    """pycocotools would compute with some of them for hours."""
    text = r"result 0: expected a mask .* that covers the image's size \(60, 80\), got"
    with pytest.raises(InputError, match=text):
        evaluate_results(data.json_file, [GOOD | {"segmentation": mask}], "segm")


FOUND = [
    {"image_id": image, "category_id": category, "score": 0.9, "bbox": box}
    for image, category, box, _ in OBJECTS
]


@pytest.mark.parametrize(
    "change",
    [
        lambda each: {"bbox": tuple(each["bbox"])},
        lambda each: {"bbox": np.array(each["bbox"], np.float32)},
        lambda each: {"image_id": float(each["image_id"])},
        lambda each: {"image_id": np.int64(each["image_id"])},
    ],
)
def test_results_in_other_types(data, change):
    found = [each | change(each) for each in FOUND]
    assert evaluate_results(data.json_file, found, "bbox")["AP"] == pytest.approx(1)


WITHOUT_BOX = "left out, without a bbox of four numbers XYWH"


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"category_id": 999}, "left out, of an unknown image or category"),
        ({"image_id": None}, "left out, of an unknown image or category"),
        *(({"bbox": box}, WITHOUT_BOX) for box in ([9, 9, -3, 4], "none", [1, 2, math.nan, 4])),
        ({"bbox": ["5", "5", "20", "10"]}, ""),
    ],
)
def test_objects_that_cannot_count_are_left_out_and_said(data, caplog, values, why):
    content = copy.deepcopy(data.content)
    content["annotations"][0].update(values)
    got = evaluate_results(content, FOUND, "bbox")
    assert caplog.messages == ([f"bbox evaluation: 1 objects {why}"] if why else [])
    # cat: the one that is left is found, and what is found where there is none comes second
    assert got["per_category_AP"] == {3: pytest.approx(0.5 if why else 1), 7: pytest.approx(1)}


@pytest.mark.parametrize("mask", [[[1, 1, 5]], [[1e9, 1, 5, 5, 3, 2]], WHOLE | {"counts": "zz"}])
def test_objects_without_mask_do_not_count_for_masks(data, caplog, mask):
    for annotation, given in zip(data.content["annotations"], (mask, []), strict=False):
        annotation["segmentation"] = given
    assert math.isnan(evaluate_results(data.content, [], "segm")["per_category_AP"][7])
    text = "segm evaluation: 2 objects left out, without a segmentation that is a mask of their im"
    assert [line[: len(text)] for line in caplog.messages] == [text]


@pytest.mark.parametrize("area", [-5, 60 * 80 + 1, 0, math.nan, "much", [3]])
@pytest.mark.parametrize("mask", [True, False])
def test_an_impossible_area_is_that_of_the_object(data, caplog, area, mask):
    content = copy.deepcopy(data.content)
    for annotation in content["annotations"]:
        annotation.update({"area": area} if mask else {"area": area, "segmentation": None})
    got = evaluate_results(content, FOUND, "bbox")
    text = "bbox evaluation: 4 objects with an impossible area: that of the mask or box is taken"
    assert caplog.messages == [text]
    before = evaluate_results(data.json_file, FOUND, "bbox")
    assert got.pop("per_category_AP") == before.pop("per_category_AP")
    assert got == pytest.approx(before, nan_ok=True)
    assert got["APs"] == got["APm"] == pytest.approx(1)


def test_more_objects_than_detections_that_count(data, caplog):
    first = data.content["annotations"][0]
    data.content["annotations"] += [first | {"bbox": [n % 60, n % 40, 3, 3]} for n in range(150)]
    evaluate_results(data.content, FOUND, "bbox")
    text = "up to 151 objects of an image and category, of which no more than 100 can be found"
    assert [line for line in caplog.messages if "can be" in line] == [f"bbox evaluation: {text}"]


def test_bad_files_and_arguments(data, tmp_path):
    def refused(text, truth, *given, **options):
        with pytest.raises(InputError, match=text):
            evaluate_results(truth, *given, **options)

    broken, good = tmp_path / "broken.json", data.json_file
    broken.write_text('[{"image_id": 1,')
    refused(r"broken.json: it cannot be read", good, broken, "bbox")
    broken.write_text("{}")
    refused(r"broken.json: expected a list, got a dict: \{\}", good, broken, "bbox")
    refused('annotations: expected a list "images"', broken, [], "bbox")
    broken.write_text(json.dumps(FOUND), encoding="utf-8-sig")
    assert evaluate_results(good, broken, "bbox")["AP"] == pytest.approx(1)
    refused(r"none.json: No such file", tmp_path / "none.json", [], "bbox")
    images = [{**data.content["images"][0], "id": "x"}]
    refused('whole numbers as ids of "images"', {**data.content, "images": images}, [], "bbox")
    refused("got iou_type='keypoints', style='coco' and", good, [], "keypoints")
    refused(r"got iou_type='bbox', .* max_dets=0", good, [], "bbox", 0)
    refused("LVIS categories: expected a frequency", good, [], "bbox", style="lvis")
