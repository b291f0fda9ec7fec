import math
import random

import pytest
import torch

from vitdet import postprocess
from vitdet.postprocess import maskness, soft_nms
from vitdet.utils.checks import InputError

METHODS = ("linear", "gaussian", "hard")


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def by_definition(boxes, scores, classes, method, threshold, sigma, min_score):
    """Bodla et al., Fig. 2, in Python's floats: [(place, new score)]."""
    boxes, scores = boxes.double().tolist(), scores.double().tolist()
    classes = [0] * len(boxes) if classes is None else classes.tolist()
    left, kept = list(range(len(boxes))), []
    while left:
        best = max(left, key=lambda i: (scores[i], -i))
        left.remove(best)
        kept.append((best, scores[best]))
        for i in left:
            overlap = iou(boxes[best], boxes[i]) if classes[best] == classes[i] else 0.0
            if method == "gaussian":
                scores[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                scores[i] *= 1 - overlap if method == "linear" else 0.0
    return [(place, score) for place, score in kept if score >= min_score]


def random_set(seed):
    """Boxes of one random set: far apart or crowded, some equal, some without area, ties."""
    dice = random.Random(seed)
    count, size = dice.choice([0, 1, 2, 5, 12, 25]), dice.choice([15, 60, 400])
    boxes, scores, classes = [], [], []
    for _ in range(count):
        x, y = dice.uniform(-5, size), dice.uniform(-5, size)
        w, h = dice.choice([0.0, dice.uniform(1, 60)]), dice.uniform(1, 60)
        boxes.append(dice.choice([[x, y, x + w, y + h], boxes[-1] if boxes else [0, 0, 9, 9]]))
        scores.append(dice.choice([0.5, 0.0005, dice.random()]))
        classes.append(dice.randrange(3))
    options = {
        "method": dice.choice(METHODS),
        "iou_threshold": dice.choice([0.1, 0.3, 0.6, 1.0]),
        "sigma": dice.choice([0.1, 0.5]),
        "min_score": dice.choice([1e-3, 0.2]),
    }
    boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return boxes, torch.tensor(scores), torch.tensor(classes, dtype=torch.int64), options


def assert_by_definition(boxes, scores, classes, options):
    expected = by_definition(boxes, scores, classes, *options.values())
    kept, new = soft_nms(boxes, scores.double(), classes, **options)
    assert new.dtype == torch.float64
    assert kept.tolist() == [place for place, _ in expected]
    assert new.tolist() == pytest.approx([score for _, score in expected], rel=0, abs=1e-12)
    return len(kept)


def test_equals_the_definition_on_random_sets(monkeypatch):
    kept = 0
    for seed in range(400):
        monkeypatch.setattr(postprocess, "_PAIRS", 7 if seed % 2 else 2_000_000)
        boxes, scores, classes, options = random_set(seed)
        kept += assert_by_definition(boxes, scores, classes if seed % 3 else None, options)
    assert kept > 1400


def test_many_classes_keep_their_boxes_apart():
    """The published code shifts boxes by class in float32, which moves overlaps near a threshold.

    Two boxes of the last of 1203 classes overlap by exactly the threshold.
    """
    boxes = torch.tensor([[0.1, 0.1, 0.9, 0.9], [0.1, 0.1, 0.9, 0.5], [1400.0, 0, 1500, 9]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    exact = iou(boxes[0].double().tolist(), boxes[1].double().tolist())
    classes = torch.full((3,), 1202)
    for threshold, expected in ((exact, 0.8 * (1 - exact)), (exact + 1e-9, 0.8)):
        kept, new = soft_nms(boxes, scores, classes, iou_threshold=threshold)
        assert dict(zip(kept.tolist(), new.tolist(), strict=True))[1] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ({"method": "soft"}, "method: expected one of linear, gaussian, hard, got 'soft'"),
        ({"iou_threshold": 1.5}, "iou_threshold: expected 0 < t <= 1, got 1.5"),
        ({"min_score": 0.0}, "min_score: expected more than 0, got 0.0"),
    ],
)
def test_wrong_arguments(argument, text):
    with pytest.raises(InputError, match=text):
        soft_nms(torch.empty(0, 4), torch.empty(0), **argument)


def test_maskness_is_the_mean_inside_the_mask():
    masks = torch.zeros(4, 1, 2, 3)
    masks[0, 0] = torch.tensor([[0.9, 0.7, 0.5], [0.4, 0.0, 0.6]])  # 0.5 is not above 0.5
    masks[1] = 0.5
    masks[2] = 1.0
    assert maskness(masks).tolist() == pytest.approx([(0.9 + 0.7 + 0.6) / 3, 0.0, 1.0, 0.0])
    assert maskness(masks[:1], 0.45).tolist() == pytest.approx([2.7 / 4])
    assert maskness(masks[:0]).shape == (0,)
