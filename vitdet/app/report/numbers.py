"""What is right and what is wrong in predictions, by the matches of faster-coco-eval.

The kinds of errors are those of "TIDE: A General Toolbox for Identifying Object Detection Errors"
(Bolya et al. 2020), Sec. 2.2; of several that fit, the first in the order of dbolya/tide
tidecv/quantify.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vitdet.scores import evaluated, match
from vitdet.utils.run_lengths import encode_segmentation, mask_util

Json = dict[str, Any]
FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU: of a right detection, and of one that touches nothing

# Kind -> what it means.
KINDS = {
    "localisation": "right class, but overlaps the object by an IoU of 0.1 to 0.5 only",
    "classification": "overlaps an object by at least 0.5, but says another class",
    "duplicate": "right, but a detection with a higher score has the object already",
    "background": "overlaps no object by 0.1",
    "both": "overlaps an object of another class by 0.1 to 0.5",
    "missed": "an object that none of the above is about",
}


class Mistake(NamedTuple):
    """A wrong result, or a missed object: its kind, and both with their IoU where it has both."""

    kind: str
    found: Json | None
    truth: Json | None
    overlap: float = 0.0


class Judged(NamedTuple):
    """One image; results in a crowd region are neither right nor wrong."""

    image: Json  # its entry in the annotation file
    objects: list[Json]  # its annotations without crowd regions
    found: list[Json]  # results, the best first
    right: int  # how many of them are right
    mistakes: list[Mistake]  # of the other results, then the missed objects
    pairs: list[tuple[Json | None, Json | None]]  # of the confusion matrix: object, result


def judge(
    truth: Json, results: list[Json], iou_type: str, least: Mapping[int, float], **rules: Any
) -> tuple[dict[int, np.ndarray], list[Judged]]:
    """Return the precision of every class, and every image in the order of the ids.

    Detections with at least the score that `least` has for their category are judged. The other
    arguments are those of `vitdet.scores.evaluated`.

    Returns:
        {category id: (IoU 0.50 to 0.95, 101 recalls, all / small / medium / large)}, nan without
        such an object; and the images.
    """
    evaluator = evaluated(truth, results, iou_type, **rules)
    values = evaluator.eval["precision"][..., -1]  # IoU, recall, category, size
    values = np.where(values < 0, np.nan, values)
    precision = {int(c): values[:, :, k] for k, c in enumerate(evaluator.params.catIds)}
    match(evaluator, FOREGROUND)
    judged = []
    for number, image in sorted(evaluator.cocoGt.imgs.items()):
        found = evaluator.cocoDt.imgToAnns[number]
        found = [each for each in found if each["score"] >= least[each["category_id"]]]
        found.sort(key=lambda each: -each["score"])
        judged.append(_judge(image, evaluator.cocoGt.imgToAnns[number], found, iou_type))
    return precision, judged


def _judge(image: Json, annotations: list[Json], found: list[Json], iou_type: str) -> Judged:
    objects = [each for each in annotations if not each["ignore"]]
    places = {each["id"]: place for place, each in enumerate(objects)}
    matched = [each for each in found if each.get("gt_id") in places]
    pairs: list[Any] = [(objects[places[each["gt_id"]]], each) for each in matched]
    free = np.ones(len(objects) + 1, dtype=bool)  # not found; the last is no object
    free[[places[each["gt_id"]] for each in matched]] = False
    missed = free[:-1].copy()  # and no mistake is about it
    mistakes = []
    # of what has `lvis_mark` nobody knows whether it is right
    wrong = [each for each in found if "gt_id" not in each and not each.get("lvis_mark")]
    for each, overlaps in zip(wrong, _overlaps(wrong, objects, image, iou_type), strict=True):
        mistakes.append(_mistake(each, overlaps, objects))
        if mistakes[-1].kind in ("localisation", "classification"):
            missed[places[mistakes[-1].truth["id"]]] = False
        # what is left over is matched whatever its class
        near = int((overlaps * free).argmax())
        is_near = overlaps[near] * free[near] >= FOREGROUND
        pairs.append((objects[near] if is_near else None, each))
        free[near] &= not is_near
    mistakes += [Mistake("missed", None, objects[place]) for place in np.flatnonzero(missed)]
    pairs += [(objects[place], None) for place in np.flatnonzero(free[:-1])]
    return Judged(image, objects, found, len(matched), mistakes, pairs)


def _overlaps(found: list[Json], objects: list[Json], image: Json, iou_type: str) -> np.ndarray:
    """Return the IoU (found, objects + 1); the last column is 0, of no object."""
    overlaps = np.zeros((len(found), len(objects) + 1))
    if found and objects:
        shape = "bbox" if iou_type == "bbox" else "segmentation"
        true = [each[shape] for each in objects]
        if iou_type == "segm":
            true = [encode_segmentation(each, (image["height"], image["width"])) for each in true]
        crowd = [0] * len(objects)
        overlaps[:, :-1] = mask_util.iou([each[shape] for each in found], true, crowd)
    return overlaps


def _mistake(found: Json, overlaps: np.ndarray, objects: list[Json]) -> Mistake:
    """Say what is wrong with a detection that is not right."""
    same = np.array([*(e["category_id"] == found["category_id"] for e in objects), True])
    mine, others = overlaps * same, overlaps * ~same
    at, beside = int(mine.argmax()), int(others.argmax())
    if BACKGROUND <= mine[at] < FOREGROUND:
        return Mistake("localisation", found, objects[at], mine[at])
    if others[beside] >= FOREGROUND:
        return Mistake("classification", found, objects[beside], others[beside])
    if mine[at] >= FOREGROUND:
        return Mistake("duplicate", found, objects[at], mine[at])
    if others[beside] < BACKGROUND:
        return Mistake("background", found, None)
    return Mistake("both", found, objects[beside], others[beside])


def costs(judged: Sequence[Judged]) -> dict[str, tuple[int, float]]:
    """Return how many mistakes there are of each kind, and what F1 (percent) gains without them.

    What is only badly placed, or of another class, would find its object.
    """
    objects, right = sum(len(each.objects) for each in judged), sum(each.right for each in judged)
    mistakes = [each for image in judged for each in image.mistakes]
    wrong = sum(each.kind != "missed" for each in mistakes)
    had = {a["id"] for each in judged for a, _ in each.pairs[: each.right] if a}

    def f1(right: int, wrong: int) -> float:
        return 200 * right / max(1, right + wrong + objects)

    found = {}
    for kind in KINDS:
        mine = [each for each in mistakes if each.kind == kind]
        ids = {each.truth["id"] for each in mine if each.truth} - had
        more = len(ids) if kind in ("localisation", "classification", "missed") else 0
        less = wrong if kind == "missed" else wrong - len(mine)
        found[kind] = (len(mine), f1(right + more, less) - f1(right, wrong))
    return found


def confusion(judged: Sequence[Judged], class_ids: Sequence[int]) -> np.ndarray:
    """Count objects by what they are and what they are taken for.

    Returns:
        (classes + 1, classes + 1) int, classes in the order of `class_ids`: rows what it is,
        columns what was found. The last row is background that was taken for an object, the last
        column objects that were not found.
    """
    place = {category: number for number, category in enumerate(class_ids)}
    counts = np.zeros((len(place) + 1, len(place) + 1), dtype=int)
    for pair in (pair for each in judged for pair in each.pairs):
        counts[tuple(place[side["category_id"]] if side else -1 for side in pair)] += 1
    return counts
