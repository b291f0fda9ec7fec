"""Which detection is right: COCO's matching of detections and objects, image by image.

`vitdet.scores` gives AP and nothing else; precision-recall curves, AP of a class and size, kinds of
errors and a confusion matrix need the matches themselves. AP made of these is that of
`vitdet.scores` to the last bits, as a test holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitdet.scores import Style, ground_truth
from vitdet.utils.run_lengths import encode_segmentation, mask_util

Json = dict[str, Any]

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # IoU
RECALLS = np.linspace(0.0, 1.0, 101)
SIZES = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}  # areas in square pixels, both ends included


@dataclass(frozen=True)
class Scene:
    """One image: its objects, what was found, and how they overlap.

    Attributes:
        image: its entry in the annotation file.
        truth: annotations, as of `vitdet.scores.ground_truth`.
        found: results in COCO's format with "area", the best first.
        overlaps: (found, truth) IoU; with a crowd region the share of the detection in it.
        open_categories: of which not every object is annotated (LVIS): what is found of them and
            matches nothing does not count.
    """

    image: Json
    truth: list[Json]
    found: list[Json]
    overlaps: np.ndarray
    open_categories: frozenset[int] = frozenset()

    def of(self, category: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of a category's detections and objects."""
        found = [i for i, each in enumerate(self.found) if each["category_id"] == category]
        truth = [i for i, each in enumerate(self.truth) if each["category_id"] == category]
        return np.array(found, dtype=int), np.array(truth, dtype=int)

    def categories(self) -> set[int]:
        """Return the categories of its detections and objects."""
        return {each["category_id"] for each in (*self.found, *self.truth)}

    def crowd(self) -> np.ndarray:
        """Return which objects are crowd regions, bool (truth,)."""
        return np.array([bool(each["iscrowd"]) for each in self.truth], dtype=bool)


@dataclass(frozen=True)
class Matches:
    """A category's detections in all images.

    Attributes:
        scores: (detections,).
        right: (thresholds, detections) whether it is an object at that IoU.
        counted: (thresholds, detections) whether it counts: crowds and other sizes do not.
        objects: how many there are to find.
    """

    scores: np.ndarray
    right: np.ndarray
    counted: np.ndarray
    objects: int

    def precision(self) -> np.ndarray:
        """Return the precision (thresholds, 101) at `RECALLS`; nan without an object."""
        if not self.objects:
            return np.full((len(self.right), len(RECALLS)), np.nan)
        order = np.argsort(-self.scores, kind="stable")
        true = np.cumsum((self.right & self.counted)[:, order], axis=1, dtype=float)
        false = np.cumsum((~self.right & self.counted)[:, order], axis=1, dtype=float)
        found = np.zeros((len(true), len(RECALLS)))
        for row, (right, wrong) in enumerate(zip(true, false, strict=True)):
            ratio = right / np.maximum(right + wrong, 1)
            ratio = np.maximum.accumulate(ratio[::-1])[::-1]  # best at this recall or a higher one
            places = np.searchsorted(right / self.objects, RECALLS, side="left")
            inside = places < len(ratio)
            found[row, inside] = ratio[places[inside]]
        return found


def scenes(
    truth: Json,
    results: Sequence[Json],
    iou_type: str,
    max_dets: int = 100,
    *,
    style: Style = "coco",
    image_ids: Collection[int] | None = None,
) -> list[Scene]:
    """Put annotations and results together, image by image, in the order of the image ids.

    Args:
        truth: content of an annotation file.
        results: in COCO's format; other images' are left out.
        iou_type, max_dets, style, image_ids: as in `vitdet.scores.evaluate_results`.
    """
    chosen = None if image_ids is None else set(image_ids)
    images = {
        each["id"]: each for each in truth["images"] if chosen is None or each["id"] in chosen
    }
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    objects: dict[int, list[Json]] = defaultdict(list)
    for each in ground_truth(truth, images, iou_type, style):
        if iou_type == "segm":
            size = (images[each["image_id"]]["height"], images[each["image_id"]]["width"])
            each["encoded"] = encode_segmentation(each["segmentation"], size)
        objects[each["image_id"]].append(each)
    found: dict[int, list[Json]] = defaultdict(list)
    for each in results:
        if each["image_id"] in images:
            found[each["image_id"]].append({**each, "area": _area(each, shape)})
    made = []
    for number, image in sorted(images.items()):
        best = sorted(found[number], key=lambda each: -each["score"])
        best = _limited(best, objects[number], image, max_dets, style)
        overlaps = _overlaps(best, objects[number], shape)
        lasting = frozenset(image.get("not_exhaustive_category_ids", ()) if style == "lvis" else ())
        made.append(Scene(image, objects[number], best, overlaps, lasting))
    return made


def _area(result: Json, shape: str) -> float:
    drawn = result[shape]
    return float(drawn[2] * drawn[3] if shape == "bbox" else mask_util.area(drawn))


def _limited(
    found: list[Json], truth: list[Json], image: Json, max_dets: int, style: str
) -> list[Json]:
    """COCO: the best of each category. LVIS: the best of the image, of the categories it has."""
    if style == "lvis":
        checked = {each["category_id"] for each in truth} | set(image.get("neg_category_ids", ()))
        best = [each for each in found[:max_dets] if each["area"] > 0]
        return [each for each in best if each["category_id"] in checked]
    taken: dict[int, int] = defaultdict(int)
    kept = []
    for each in found:
        taken[each["category_id"]] += 1
        if taken[each["category_id"]] <= max_dets:
            kept.append(each)
    return kept


def _overlaps(found: list[Json], truth: list[Json], shape: str) -> np.ndarray:
    if not found or not truth:
        return np.zeros((len(found), len(truth)))
    true = [each["encoded"] if shape == "segmentation" else each["bbox"] for each in truth]
    crowd = [int(each["iscrowd"]) for each in truth]
    return np.asarray(mask_util.iou([each[shape] for each in found], true, crowd))


def match(
    overlaps: np.ndarray, ignored: np.ndarray, crowd: np.ndarray, thresholds: np.ndarray
) -> np.ndarray:
    """Give each detection an object, by the rules of pycocotools' COCOeval.evaluateImg.

    The best detection chooses first: the object with the largest overlap that is not taken, one
    that counts before one that does not; of equals the last. A crowd region is never used up.

    Args:
        overlaps: (detections, objects), the best detection first, all of one category.
        ignored: (objects,) bool, those that do not count.
        crowd: (objects,) bool.
        thresholds: (thresholds,) IoU.

    Returns:
        (thresholds, detections) place of the object, -1 for none.
    """
    objects = overlaps.shape[1]
    chosen = np.full((len(thresholds), len(overlaps)), -1)
    if not objects:
        return chosen
    free = np.ones((len(thresholds), objects), dtype=bool)
    rows = np.arange(len(thresholds))
    least = np.minimum(thresholds, 1 - 1e-10)[:, None]
    for place, row in enumerate(overlaps):
        worth = np.where((free | crowd) & (row >= least), row + 2.0 * ~ignored, -1.0)
        best = objects - 1 - np.argmax(worth[:, ::-1], axis=1)
        hit = worth[rows, best] >= 0
        chosen[hit, place] = best[hit]
        free[rows[hit], best[hit]] = False
    return chosen


def matches(
    scenes: Sequence[Scene],
    category: int,
    thresholds: np.ndarray = THRESHOLDS,
    size: str = "all",
) -> Matches:
    """Match a category's detections in all images; only objects of a size count."""
    low, high = SIZES[size]
    scores, right, counted, objects = [], [], [], 0
    for scene in scenes:
        found, truth = scene.of(category)
        crowd = scene.crowd()[truth]
        areas = np.array([scene.truth[place]["area"] for place in truth])
        ignored = np.array([bool(scene.truth[place]["ignore"]) for place in truth], dtype=bool)
        ignored |= (areas < low) | (areas > high)
        objects += int((~ignored).sum())
        if not len(found):
            continue
        chosen = match(scene.overlaps[np.ix_(found, truth)], ignored, crowd, thresholds)
        sizes = np.array([scene.found[place]["area"] for place in found])
        outside = (sizes < low) | (sizes > high) | (category in scene.open_categories)
        hit = chosen >= 0
        aside = np.where(hit, np.append(ignored, False)[chosen], outside)
        scores.append([scene.found[place]["score"] for place in found])
        right.append(hit & ~aside)
        counted.append(~aside)
    if not scores:
        nothing = np.zeros((len(thresholds), 0), dtype=bool)
        return Matches(np.zeros(0), nothing, nothing, objects)
    return Matches(
        np.concatenate(scores),
        np.concatenate(right, axis=1),
        np.concatenate(counted, axis=1),
        objects,
    )
