"""What is right and what is wrong in predictions, by the matches of faster-coco-eval.

The kinds of errors are those of "TIDE: A General Toolbox for Identifying Object Detection Errors"
(Bolya et al. 2020), Sec. 2.2; of several that fit, the first in the order of dbolya/tide
tidecv/quantify.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vitdet.scores import evaluated
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
    right: list[tuple[Json, Json]]  # result and annotation
    mistakes: list[Mistake]  # of the other results, then the missed objects
    overlaps: np.ndarray  # IoU of the wrong results with the objects


def judge(
    truth: Json, results: list[Json], iou_type: str, threshold: float = 0.0, **rules: Any
) -> tuple[dict[int, np.ndarray], list[Judged]]:
    """Return the precision of every class, and every image in the order of the ids.

    COCO lets the detection with the highest score choose its object first, so the matches of all
    are also those of the detections with at least the score `threshold`, which alone are judged.

    Args:
        truth: content of an annotation file.
        results: in COCO's format.
        iou_type: "bbox" or "segm".
        threshold: a score.
        rules: max_dets, style, image_ids, as of `vitdet.scores.evaluate_results`.

    Returns:
        {category id: (IoU 0.50 to 0.95, 101 recalls, all / small / medium / large)}, nan without
        such an object; and the images.
    """
    evaluator = evaluated(truth, results, iou_type, **rules)
    values = evaluator.eval["precision"][..., -1]  # IoU, recall, category, size
    values = np.where(values < 0, np.nan, values)
    precision = {int(c): values[:, :, k] for k, c in enumerate(evaluator.params.catIds)}
    # once more for the matches, which then are of one IoU and of all sizes
    evaluator.params.iouThrs = np.array([FOREGROUND])
    evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.math_matches()
    judged = []
    for number, image in sorted(evaluator.cocoGt.imgs.items()):
        found = [e for e in evaluator.cocoDt.imgToAnns[number] if e["score"] >= threshold]
        judged.append(_judge(image, evaluator.cocoGt.imgToAnns[number], found, iou_type))
    return precision, judged


def _judge(image: Json, annotations: list[Json], found: list[Json], iou_type: str) -> Judged:
    found = sorted(found, key=lambda each: -each["score"])
    objects = {each["id"]: each for each in annotations if not each["ignore"]}
    right = [(each, objects[each["gt_id"]]) for each in found if each.get("gt_id") in objects]
    # of what has `lvis_mark` nobody knows whether it is right
    wrong = [each for each in found if "gt_id" not in each and not each.get("lvis_mark")]
    true = list(objects.values())
    overlaps = _overlaps(wrong, true, image, iou_type)
    mistakes = [_mistake(each, row, true) for each, row in zip(wrong, overlaps, strict=True)]
    done = {object_["id"] for _, object_ in right}
    kinds = ("localisation", "classification")
    done |= {mistake.truth["id"] for mistake in mistakes if mistake.truth and mistake.kind in kinds}
    mistakes += [Mistake("missed", None, each) for each in true if each["id"] not in done]
    return Judged(image, true, found, right, mistakes, overlaps)


def _overlaps(found: list[Json], objects: list[Json], image: Json, iou_type: str) -> np.ndarray:
    if not found or not objects:
        return np.zeros((len(found), len(objects)))
    if iou_type == "bbox":
        sides = [[each["bbox"] for each in side] for side in (found, objects)]
    else:
        size = (image["height"], image["width"])
        true = [encode_segmentation(each["segmentation"], size) for each in objects]
        sides = [[each["segmentation"] for each in found], true]
    return mask_util.iou(*sides, [0] * len(objects))


def _mistake(found: Json, overlaps: np.ndarray, objects: list[Json]) -> Mistake:
    """Say what is wrong with a detection that is not right."""
    same = np.array([each["category_id"] == found["category_id"] for each in objects], dtype=bool)
    (mine, at), (other, beside) = largest(overlaps * same), largest(overlaps * ~same)
    if BACKGROUND <= mine < FOREGROUND:
        return Mistake("localisation", found, objects[at], mine)
    if other >= FOREGROUND:
        return Mistake("classification", found, objects[beside], other)
    if mine >= FOREGROUND:
        return Mistake("duplicate", found, objects[at], mine)
    if other < BACKGROUND:
        return Mistake("background", found, None)
    return Mistake("both", found, objects[beside], other)


def largest(overlaps: np.ndarray) -> tuple[float, int]:
    """Return the largest of some overlaps and its place, 0 without any."""
    return (float(overlaps.max()), int(overlaps.argmax())) if len(overlaps) else (0.0, -1)


def confusion(judged: Sequence[Judged], class_ids: Sequence[int]) -> np.ndarray:
    """Count objects by what they are and what they are taken for.

    Objects and detections that COCO's matches leave over are matched at an IoU of 0.5 whatever
    their class, the best detection first.

    Returns:
        (classes + 1, classes + 1) int, classes in the order of `class_ids`: rows what it is,
        columns what was found. The last row is background that was taken for an object, the last
        column objects that were not found.
    """
    place = {category: number for number, category in enumerate(class_ids)}
    nothing = len(class_ids)
    counts = np.zeros((nothing + 1, nothing + 1), dtype=int)
    for each in judged:
        taken = {object_["id"] for _, object_ in each.right}
        pairs: list[tuple[Json | None, Json | None]] = [*each.right]
        free = np.array([object_["id"] not in taken for object_ in each.objects], dtype=bool)
        wrong = [mistake.found for mistake in each.mistakes if mistake.found]
        for found, overlaps in zip(wrong, each.overlaps, strict=True):
            overlap, at = largest(overlaps * free)
            near = overlap >= FOREGROUND
            pairs.append((found, each.objects[at] if near else None))
            free[at : at + 1] &= not near
        pairs += [(None, each.objects[at]) for at in np.flatnonzero(free)]
        for found, object_ in pairs:
            row = place[object_["category_id"]] if object_ else nothing
            counts[row, place[found["category_id"]] if found else nothing] += 1
    return counts
