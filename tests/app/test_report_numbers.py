"""The report's numbers: curves give the AP of the evaluation; errors and confusion by hand."""

import numpy as np
import pytest

from vitdet.app.report.numbers import confusion, costs, judge
from vitdet.scores import evaluate_results
from vitdet.utils.run_lengths import encode

SIDE = 256
LEAST = dict.fromkeys((1, 2, 5, 7), 0.0)
A, B, FAR = [0, 0, 100, 100], [120, 120, 100, 100], [0, 130, 60, 60]
HALF = [0, 0, 100, 40]  # an IoU of 0.4 with A


def box_mask(box):
    x, y, width, height = box
    mask = np.zeros((1, SIDE, SIDE), dtype=bool)
    mask[0, y : y + height, x : x + width] = True
    return encode(mask)[0]


def random_data(lvis):
    """Twelve images with objects of all sizes, crowds, and detections near and far."""
    draw = np.random.default_rng(1)
    categories = [{"id": i, "name": f"c{i}", "frequency": "f"} for i in (1, 2, 5, 7)]
    federated = {"neg_category_ids": [1], "not_exhaustive_category_ids": [2]} if lvis else {}
    images = [{"id": n, "height": SIDE, "width": SIDE, **federated} for n in range(1, 13)]
    annotations, results = [], []
    for image in range(1, 13):
        for _ in range(draw.integers(0, 7)):
            size = int(draw.choice([12, 50, 120]))
            box = [*draw.integers(0, 100, 2).tolist(), size, int(size * draw.uniform(0.7, 1.1))]
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


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("style", ["coco", "lvis"])
def test_curves_are_those_of_the_evaluation(iou_type, style):
    """And the matches, of which nobody counts twice, are those behind its recall."""
    truth, results = random_data(style == "lvis")
    rules = {"max_dets": 300 if style == "lvis" else 3, "style": style}
    expected = evaluate_results(truth, results, iou_type, **rules)
    precision, judged = judge(truth, results, iou_type, LEAST, **rules)
    assert expected["AP"] > 0.1
    for place, name in enumerate(("AP", "APs", "APm", "APl")):
        known = [each[..., place] for each in precision.values()]
        known = [curve.mean() for curve in known if not np.isnan(curve).any()]
        assert np.mean(known) == pytest.approx(expected[name], abs=1e-12), name
    for category, each in precision.items():
        ap = expected["per_category_AP"][category]
        assert each[..., 0].mean() == pytest.approx(ap, abs=1e-12, nan_ok=True)
    mine = [each for each in results if each["image_id"] == 3]
    alone = judge(truth, mine, iou_type, LEAST, image_ids=[3], style=style)[1]
    assert [each.image["id"] for each in alone] == [3]
    for each in judged:
        for side in (0, 1):
            shown = [id(pair[side]) for pair in each.pairs if pair[side]]
            assert len(set(shown)) == len(shown)
        right = each.pairs[: each.right]
        assert all(a and b and a["category_id"] == b["category_id"] for a, b in right)
    assert confusion(judged, [1, 2, 5, 7])[:4].sum() == sum(len(each.objects) for each in judged)


def one_image(truth, found, threshold=0.0, crowd=0):
    """Judge (category, box) objects and (category, box, score) detections; the first are crowds."""
    content = {
        "images": [{"id": 1, "height": SIDE, "width": SIDE}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": c, "bbox": box, "area": box[2] * box[3]}
            | {"iscrowd": int(i <= crowd)}
            for i, (c, box) in enumerate(truth, 1)
        ],
    }
    results = [{"image_id": 1, "category_id": c, "bbox": b, "score": s} for c, b, s in found]
    return judge(content, results, "bbox", dict.fromkeys((1, 2), threshold))[1][0]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(1, A, 0.9)], ["missed"]),
        ([(1, HALF, 0.9)], ["localisation", "missed"]),
        ([(2, A, 0.9)], ["classification", "missed"]),
        ([(1, A, 0.9), (1, A, 0.8)], ["duplicate", "missed"]),
        ([(1, FAR, 0.9)], ["background", "missed", "missed"]),
        ([(2, HALF, 0.9)], ["both", "missed", "missed"]),
        ([(1, A, 0.9), (2, B, 0.8)], []),
        # a box of its class that it nearly has comes before one of another class that it has
        ([(2, [120, 120, 100, 40], 0.9), (1, A, 0.8)], ["localisation"]),
        ([(2, A, 0.9), (2, A, 0.8), (2, B, 0.7)], ["classification", "classification"]),
    ],
)
def test_kinds_of_errors(found, expected):
    assert [each.kind for each in one_image([(1, A), (2, B)], found).mistakes] == expected


def test_what_an_error_costs():
    """One of two objects found and two wrong: F1 is 2 / 5, and without each kind by hand."""
    image = one_image([(1, A), (2, B)], [(1, A, 0.9), (1, FAR, 0.8), (1, B, 0.7)])
    found = {kind: each for kind, each in costs([image]).items() if each[0]}
    assert found == {
        "background": (1, pytest.approx(200 / 4 - 200 / 5)),
        "classification": (1, pytest.approx(400 / 5 - 200 / 5)),  # it would find the other object
    }
    assert costs([one_image([(1, A)], [])])["missed"] == (1, pytest.approx(100.0))


def test_crowds_and_low_scores_are_no_mistakes():
    found = [(1, [10, 10, 20, 20], 0.9), (1, [20, 20, 9, 9], 0.8)]
    crowded = one_image([(1, A), (1, B)], found, crowd=1)
    assert crowded.right == 0
    assert [(m.kind, m.truth and m.truth["id"]) for m in crowded.mistakes] == [("missed", 2)]
    found = [(1, A, 0.9), (1, FAR, 0.4)]
    assert one_image([(1, A)], found, 0.5).mistakes == []
    assert [each.kind for each in one_image([(1, A)], found, 0.4).mistakes] == ["background"]


def test_confusion_by_hand():
    found = [(1, A, 0.9), (1, B, 0.8), (1, FAR, 0.7), (2, FAR, 0.2)]
    truth = [(1, A), (2, B), (2, [200, 0, 40, 40])]
    expected = [[1, 0, 0], [1, 0, 1], [1, 0, 0]]
    assert confusion([one_image(truth, found, 0.5)], [1, 2]).tolist() == expected
    assert confusion([one_image(truth, found, 0.1)], [1, 2])[2].tolist() == [1, 1, 0]
