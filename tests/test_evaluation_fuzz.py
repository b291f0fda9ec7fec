"""AP of random small sets against the originals: pycocotools' COCOeval and lvis-api's LVISEval."""

import copy
import json
import math
from collections import Counter

import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from vitdet.scores import evaluate_results

SETS = 40


def _mask(box, image, rng):
    """A rectangle, half of the time with holes; empty where the box has no pixel."""
    pixels = np.zeros((image["height"], image["width"]), np.uint8, order="F")
    x, y, w, h = box
    part = pixels[max(0, int(y)) : max(0, int(y + h)), max(0, int(x)) : max(0, int(x + w))]
    part[...] = rng.random(part.shape) < (0.9 if rng.random() < 0.5 else 1)
    encoded = mask_util.encode(pixels)
    return {"size": list(pixels.shape), "counts": encoded["counts"].decode("ascii")}


def _as_numbers(mask):
    pixels = mask_util.decode(mask).ravel(order="F")
    ends = np.flatnonzero(np.diff(pixels, prepend=0))
    return {"size": mask["size"], "counts": np.diff([0, *ends, pixels.size]).tolist()}


def _objects(image, cats, rng, lvis):
    found = []
    for _ in range(int(rng.integers(0, 9)) if rng.random() > 0.2 else 0):
        w, h = (float(rng.choice([32, 96, round(rng.uniform(1, 100), 1)])) for _ in range(2))
        x, y = (round(rng.uniform(0, image[side] - 5), 1) for side in ("width", "height"))
        mask = _mask([x, y, w, h], image, rng)
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        crowd = int(rng.random() < 0.15)
        drawn = _as_numbers(mask) if crowd else [polygon, mask][rng.random() < 0.4]
        areas = [w * h, float(mask_util.area(mask)) or 1.0, 1024.0, 9216.0, 1023.999999, 9216.00001]
        area = float(rng.choice(areas)) if not lvis or rng.random() < 0.8 else 0.0
        found.append(
            {"image_id": image["id"], "category_id": int(rng.choice(cats)), "bbox": [x, y, w, h]}
            | {"area": area, "segmentation": drawn, "iscrowd": crowd}
            | ({"ignore": int(rng.random() < 0.5)} if rng.random() < 0.3 else {})
        )
    return found


def _results(image, objects, cats, rng, many):
    found = []
    for _ in range(int(rng.integers(*((100, 400) if many else (0, 30))))):
        w, h = rng.uniform(0, 100, 2)
        x, y, category = rng.uniform(0, image["width"]), rng.uniform(0, image["height"]), None
        if objects and rng.random() < 0.7:
            near = objects[int(rng.integers(len(objects)))]
            scale = rng.choice([0, 0.5, 3, 12])
            x, y, w, h = np.array(near["bbox"]) + rng.normal(0, 1, 4) * scale
            category = near["category_id"] if rng.random() < 0.8 else None
        elif rng.random() < 0.2:
            w = h = rng.choice([0, 32, 96])
        box = [float(np.float32(v)) for v in (x, y, max(0, w), max(0, h))]
        found.append(
            {"image_id": image["id"], "category_id": category or int(rng.choice(cats)), "bbox": box}
            | {"score": round(rng.random(), 2), "segmentation": _mask(box, image, rng)}
        )
    return found


def made(seed, lvis):
    """Truth with gaps in ids, crowds, areas on the edges of the sizes; results with ties."""
    rng = np.random.default_rng(seed)
    cats = rng.choice(np.arange(1, 400), int(rng.integers(1, 6)), replace=False).tolist()
    ids = rng.choice(np.arange(1, 10**6), int(rng.integers(1, 6)), replace=False).tolist()
    truth = {"images": [], "annotations": [], "info": {}}
    results = []
    for number in ids:
        sides = rng.integers(110, 200, 2).tolist()
        image = {"id": number, "height": sides[0], "width": sides[1], "file_name": "x"}
        image["neg_category_ids"] = [c for c in cats if rng.random() < 0.3]
        image["not_exhaustive_category_ids"] = [c for c in cats if rng.random() < 0.2]
        truth["images"].append(image)
        objects = _objects(image, cats, rng, lvis)
        truth["annotations"] += objects
        results += _results(image, objects, cats, rng, many=seed % 8 == 0)
    rng.shuffle(truth["annotations"])
    for number, annotation in enumerate(truth["annotations"], 1):
        annotation["id"] = number
    truth["categories"] = [
        {"id": c, "name": str(c), "frequency": "rcf"[c % 3], "image_count": 1, "instance_count": 1}
        for c in cats
    ]
    rng.shuffle(results)
    return truth, results


def _mean(values):
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else math.nan


def _pycocotools(truth, results, iou_type, limit):
    indexed = COCO()
    indexed.dataset = copy.deepcopy(truth)
    indexed.createIndex()
    evaluator = COCOeval(indexed, indexed.loadRes(results), iou_type)
    evaluator.params.maxDets = [1, 10, limit]
    evaluator.evaluate()
    evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    found = {"AP": precision[..., 0, -1], "AP50": precision[0, ..., 0, -1]}
    found["AP75"] = precision[5, ..., 0, -1]
    for place, size in enumerate("sml", 1):
        found[f"AP{size}"], found[f"AR{size}"] = precision[..., place, -1], recall[..., place, -1]
    found |= {f"AR{n}": recall[..., 0, place] for place, n in enumerate((1, 10, limit))}
    found |= {c: precision[:, :, k, 0, -1] for k, c in enumerate(evaluator.params.catIds)}
    return {name: _mean(values) for name, values in found.items()}


def _lvis_api(truth, results, iou_type, limit, monkeypatch, tmp_path):
    lvis = pytest.importorskip("lvis")
    monkeypatch.setattr(np, "float", float, raising=False)  # it was written for NumPy 1.19
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    indexed = lvis.LVIS(str(tmp_path / "truth.json"))
    evaluator = lvis.LVISEval(indexed, lvis.LVISResults(indexed, results, limit), iou_type)
    evaluator.run()
    precision = evaluator.eval["precision"]
    found = {k.split("@")[0]: math.nan if v == -1 else v for k, v in evaluator.results.items()}
    found[f"AR{limit}"] = found.pop("AR")
    categories = enumerate(evaluator.params.cat_ids)
    return found | {c: _mean(precision[:, :, k, 0]) for k, c in categories}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning")  # lvis-api
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("style", ["coco", "lvis"])
def test_same_as_the_original(style, iou_type, monkeypatch, tmp_path):
    seen, worst = Counter(), 0.0
    for seed in range(SETS):
        truth, results = made(seed, style == "lvis")
        if not results or not truth["annotations"]:
            continue
        limit = {"coco": (100, 300)[seed % 16 == 0], "lvis": (300, 20)[seed % 4 == 1]}[style]
        # else both take the areas from the boxes
        hidden = "bbox" if iou_type == "segm" else "segmentation"
        shown = [{key: each[key] for key in each if key != hidden} for each in results]
        before = copy.deepcopy((truth, shown))
        got = evaluate_results(truth, shown, iou_type, limit, style=style)
        assert (truth, shown) == before
        by_category = got.pop("per_category_AP")
        arguments = (truth, copy.deepcopy(shown), iou_type, limit)
        if style == "coco":
            expected = _pycocotools(*arguments)
        else:
            expected = _lvis_api(*arguments, monkeypatch, tmp_path)
        assert (got | by_category).keys() == expected.keys()
        for name, value in (got | by_category).items():
            assert math.isnan(value) == math.isnan(expected[name]), (seed, name)
            worst = max(worst, 0 if math.isnan(value) else abs(value - expected[name]))
        in_one = Counter((each["image_id"], each["category_id"]) for each in results)
        seen["sets"] += 1
        seen["many"] += max(in_one.values()) > 100
        seen["crowd"] += any(each["iscrowd"] for each in truth["annotations"])
        seen["ignore"] += any(each.get("ignore") for each in truth["annotations"])
        seen["empty"] += any(mask_util.area(each["segmentation"]) == 0 for each in results)
        seen["APs"] += got["APs"] > 0.01
    assert worst < 1e-12
    assert seen["sets"] >= 35
    assert min(seen.values()) >= 3
