"""The report's numbers: matches give the AP of `vitdet.scores`; errors and confusion by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from test_evaluation_fuzz import made

from vitdet.app.report.confusion import confusion_matrix
from vitdet.app.report.errors import KINDS, error_table, judge
from vitdet.app.report.matching import Scene, matches, scenes
from vitdet.scores import evaluate_results

SIDE = 256


def box_mask(box: list[float]) -> dict:
    """The run lengths of a box, of whole pixels."""
    x, y, width, height = (round(value) for value in box)
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    encoded = pycocotools.mask.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


def random_data(seed: int, lvis: bool) -> tuple[dict, list[dict]]:
    """Twelve images with objects of all sizes, crowds, and detections near and far."""
    draw = np.random.default_rng(seed)
    categories = [{"id": i, "name": f"c{i}", "frequency": "f"} for i in (1, 2, 5, 7)]
    images, annotations, results = [], [], []
    for image in range(1, 13):
        entry = {"id": image, "height": SIDE, "width": SIDE}
        if lvis:
            entry |= {"neg_category_ids": [1], "not_exhaustive_category_ids": [2]}
        images.append(entry)
        for _ in range(draw.integers(0, 7)):
            size = draw.choice([12, 50, 120])
            x, y = draw.integers(0, 100, 2).tolist()
            box = [x, y, int(size), int(size * draw.uniform(0.7, 1.1))]
            category = int(draw.choice([1, 2, 5]))
            crowd = int(not lvis and draw.random() < 0.15)
            annotation = {"image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd}
            annotation |= {"area": box[2] * box[3], "segmentation": box_mask(box)}
            annotations.append(annotation | {"id": len(annotations) + 1})
            for _ in range(draw.integers(0, 4)):
                moved = [*(np.array(box[:2]) + draw.integers(0, 10, 2)).tolist(), *box[2:]]
                said = int(draw.choice([category, category, category, 5, 7]))
                score = round(float(draw.random()), 2)  # some scores are equal
                results.append({"image_id": image, "category_id": said, "score": score})
                results[-1] |= {"bbox": moved, "segmentation": box_mask(moved)}
    return {"images": images, "categories": categories, "annotations": annotations}, results


def mean(values: list[np.ndarray]) -> float:
    known = [value for value in values if not np.isnan(value).any()]
    return float(np.mean(known)) if known else float("nan")


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("style", ["coco", "lvis"])
@pytest.mark.parametrize("seed", range(3))
def test_ap_is_that_of_the_evaluation(iou_type: str, style: str, seed: int) -> None:
    truth, results = random_data(seed, style == "lvis")
    max_dets = 300 if style == "lvis" else 3
    expected = evaluate_results(truth, results, iou_type, max_dets, style=style)
    found = scenes(truth, results, iou_type, max_dets, style=style)
    ids = [category["id"] for category in truth["categories"]]
    assert expected["AP"] > 0.1
    for name, size in {"AP": "all", "APs": "small", "APm": "medium", "APl": "large"}.items():
        curves = [matches(found, each, size=size).precision() for each in ids]
        assert mean(curves) == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name
        if size == "all":
            for category, curve in zip(ids, curves, strict=True):
                ap = expected["per_category_AP"][category]
                assert curve.mean() == pytest.approx(ap, abs=1e-12, nan_ok=True)
            at_50 = mean([curve[0] for curve in curves])
            assert at_50 == pytest.approx(expected["AP50"], abs=1e-12)
    assert error_table(found).ap50 == pytest.approx(expected["AP50"], abs=1e-12)


@pytest.mark.parametrize("style", ["coco", "lvis"])
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_what_does_not_count_for_the_evaluation_does_not_here(style: Any, seed: int) -> None:
    """Empty masks, truth of area 0 and impossible areas, `ignore`."""
    truth, results = made(seed, style == "lvis")
    for number, annotation in enumerate(truth["annotations"]):
        annotation["area"] = (annotation["area"], -1, "x")[number % 3]
    expected = evaluate_results(truth, results, "segm", 300, style=style)
    found = scenes(truth, results, "segm", 300, style=style)
    for name, size in {"AP": "all", "APs": "small", "APm": "medium"}.items():
        curves = [matches(found, c["id"], size=size).precision() for c in truth["categories"]]
        assert mean(curves) == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name


def test_only_the_images_that_count() -> None:
    truth, results = random_data(4, lvis=False)
    mine = [each for each in results if each["image_id"] <= 4]
    expected = evaluate_results(truth, mine, "bbox", image_ids=[1, 2, 3, 4])
    found = scenes(truth, results, "bbox", image_ids=[1, 2, 3, 4])
    ids = [category["id"] for category in truth["categories"]]
    curves = [matches(found, each).precision() for each in ids]
    assert mean(curves) == pytest.approx(expected["AP"], abs=1e-12)


def one_image(truth: list[tuple[int, list[int]]], found: list[tuple[int, list[int], float]]):
    """A scene of (category, box) objects and (category, box, score) detections."""
    content = {
        "images": [{"id": 1, "height": SIDE, "width": SIDE}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": c, "bbox": box, "area": box[2] * box[3]}
            for i, (c, box) in enumerate(truth, 1)
        ],
    }
    results = [
        {"image_id": 1, "category_id": c, "bbox": box, "score": score} for c, box, score in found
    ]
    return scenes(content, results, "bbox")


A, B, FAR = [0, 0, 100, 100], [120, 120, 100, 100], [0, 130, 60, 60]
HALF = [0, 0, 100, 40]  # an IoU of 0.4 with A


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(1, A, 0.9)], {"missed": 1}),
        ([(1, HALF, 0.9)], {"localisation": 1, "missed": 1}),
        ([(2, A, 0.9)], {"classification": 1, "missed": 1}),
        ([(1, A, 0.9), (1, A, 0.8)], {"duplicate": 1, "missed": 1}),
        ([(1, FAR, 0.9)], {"background": 1, "missed": 2}),
        ([(2, HALF, 0.9)], {"both": 1, "missed": 2}),
        ([(1, A, 0.9), (2, B, 0.8)], {}),
        # a box of its class that it nearly has comes before one of another class that it has
        ([(2, [120, 120, 100, 40], 0.9), (1, A, 0.8)], {"localisation": 1}),
        ([(2, A, 0.9), (2, A, 0.8), (2, B, 0.7)], {"classification": 2}),
    ],
)
def test_kinds_of_errors(found: list, expected: dict[str, int]) -> None:
    scene = one_image([(1, A), (2, B)], found)
    assert error_table(scene).counts == dict.fromkeys(KINDS, 0) | expected


def test_what_ap50_gains_without_a_kind() -> None:
    """By hand: class a has one object, b one; detections below are b's."""
    # a: right at 0.9. b: background at 0.8, then right at 0.7: precision 1/2 at all recalls.
    table = error_table(one_image([(1, A), (2, B)], [(1, A, 0.9), (2, FAR, 0.8), (2, B, 0.7)]))
    assert table.ap50 == pytest.approx((1 + 0.5) / 2)
    assert table.gains == pytest.approx(dict.fromkeys(KINDS, 0.0) | {"background": 0.25})
    # the object of a is called b: a has AP 0, b precision 1/2 at all recalls
    table = error_table(one_image([(1, A), (2, B)], [(2, A, 0.9), (2, B, 0.8)]))
    assert table.ap50 == pytest.approx(0.25)
    # its class corrected: both right. Missed objects are not: a classification error is about it
    assert table.gains == pytest.approx(dict.fromkeys(KINDS, 0.0) | {"classification": 0.75})
    # two boxes that nearly have A: the better becomes right, the other goes
    table = error_table(one_image([(1, A)], [(1, HALF, 0.9), (1, HALF, 0.8)]))
    assert (table.ap50, table.gains["localisation"]) == (0.0, pytest.approx(1.0))
    # no longer asked for: of two objects one was found
    table = error_table(one_image([(1, A), (1, B)], [(1, A, 0.9)]))
    assert table.ap50 == pytest.approx(51 / 101)
    assert table.gains["missed"] == pytest.approx(50 / 101)


def test_crowds_and_low_scores_are_no_mistakes() -> None:
    (scene,) = one_image([(1, A), (1, B)], [(1, [10, 10, 20, 20], 0.9), (1, [20, 20, 9, 9], 0.8)])
    scene.truth[0]["iscrowd"] = 1
    crowded = Scene(scene.image, scene.truth, scene.found, np.array([[1.0, 0.0], [1.0, 0.0]]))
    judged = judge(crowded)
    assert judged.aside == {0, 1}
    assert [(each.kind, each.truth) for each in judged.mistakes] == [("missed", 1)]
    (scene,) = one_image([(1, A)], [(1, A, 0.9), (1, FAR, 0.4)])
    assert [each.kind for each in judge(scene, 0.5).mistakes] == []
    assert [each.kind for each in judge(scene, 0.4).mistakes] == ["background"]


def brute_confusion(scene: Scene, threshold: float) -> np.ndarray:
    """The definition, step by step, without the code that is tested."""
    counts = np.zeros((3, 3), dtype=int)
    seen = [i for i, each in enumerate(scene.found) if each["score"] >= threshold]
    taken: dict[int, int] = {}
    for same in (True, False):
        for i in seen:
            if i in taken:
                continue
            best, place = 0.5, None
            for j, each in enumerate(scene.truth):
                mine = each["category_id"] == scene.found[i]["category_id"]
                if j not in taken.values() and (mine or not same) and scene.overlaps[i, j] >= best:
                    best, place = scene.overlaps[i, j], j
            if place is not None:
                taken[i] = place
    for i in seen:
        row = scene.truth[taken[i]]["category_id"] - 1 if i in taken else 2
        counts[row, scene.found[i]["category_id"] - 1] += 1
    for j, each in enumerate(scene.truth):
        counts[each["category_id"] - 1, 2] += j not in taken.values()
    return counts


def test_confusion_by_hand() -> None:
    found = [(1, A, 0.9), (1, B, 0.8), (1, FAR, 0.7), (2, FAR, 0.2)]
    (scene,) = one_image([(1, A), (2, B), (2, [200, 0, 40, 40])], found)
    expected = [[1, 0, 0], [1, 0, 1], [1, 0, 0]]
    assert confusion_matrix([scene], [1, 2], 0.5).tolist() == expected
    assert confusion_matrix([scene], [1, 2], 0.1)[2].tolist() == [1, 1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_confusion_is_the_definition(seed: int) -> None:
    draw = np.random.default_rng(seed)

    def box() -> list[int]:
        return [*(8 * draw.integers(0, 6, 2)).tolist(), *(24 + 4 * draw.integers(0, 6, 2)).tolist()]

    truth = [(int(draw.integers(1, 3)), box()) for _ in range(draw.integers(0, 6))]
    found = [(int(draw.integers(1, 3)), box(), float(draw.random())) for _ in range(8)]
    found += [(c, b, float(draw.random())) for c, b in truth if draw.random() < 0.7]
    (scene,) = one_image(truth, found)
    for threshold in (0.0, 0.5):
        counts = confusion_matrix([scene], [1, 2], threshold)
        assert counts.tolist() == brute_confusion(scene, threshold).tolist()
        assert counts[:2].sum() == len(truth)  # every object once
        assert counts[:, :2].sum() == sum(each[2] >= threshold for each in found)
