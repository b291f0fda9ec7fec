"""Average precision by the rules of COCO and LVIS, computed by faster-coco-eval."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from vitdet.utils.checks import fail
from vitdet.utils.run_lengths import encode_segmentation, mask_util

logger = logging.getLogger(__name__)

Style = Literal["coco", "lvis"]
Json = dict[str, Any]
_SIZES = {"s": "small", "m": "medium", "l": "large"}


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for cycles again and again among what soon are millions of dicts."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def evaluate_results(
    dataset_json: str | Path | Json,
    results: str | Path | list[Json],
    iou_type: str,
    max_dets: int = 100,
    *,
    style: Style = "coco",
    image_ids: Collection[int] | None = None,
    dropped: Collection[int] = (),
) -> Json:
    """Score results in COCO's result format against an annotation file.

    A result's area is that of its mask for "segm" and of its box for "bbox", so the size classes
    are those of what is compared (as facebookresearch/detectron2 evaluation/coco_evaluation.py).

    Args:
        dataset_json: the annotation file, or its content.
        results: list of {image_id, category_id, score, bbox XYWH and / or segmentation}, or a file.
        iou_type: "bbox" or "segm".
        max_dets: detections that count, see `CocoEvaluator`.
        style: "lvis" for federated rules, and APr, APc, APf.
        image_ids: the images that count; None for all in the file.
        dropped: places in the file's "annotations" list that do not count.

    Returns:
        Fractions: AP, AP50, AP75, APs, APm, APl; AR1, AR10, AR<max_dets> (LVIS the last only); ARs,
        ARm, ARl; LVIS APr, APc, APf; `per_category_AP` {id: AP}; nan where nothing counts.

    Raises:
        InputError: unreadable file, unknown image or category, missing or non-finite values.
    """
    truth = dataset_json if isinstance(dataset_json, dict) else read_truth(Path(dataset_json))
    if iou_type not in ("bbox", "segm") or max_dets < 1:
        got = f"iou_type={iou_type!r} and max_dets={max_dets}"
        fail("evaluation", expected="bbox or segm, and at least 1", got=got, remedy="Correct it.")
    chosen = None if image_ids is None else set(image_ids)
    images = [image for image in truth["images"] if chosen is None or image["id"] in chosen]
    annotations = _ground_truth(truth, images, set(dropped), iou_type)
    detections = _detections(results, images, truth["categories"], iou_type)
    if style == "lvis":
        if not all("frequency" in category for category in truth["categories"]):
            remedy = 'Add it, or use style="coco".'
            fail("LVIS categories", expected="a frequency each", got="none", remedy=remedy)
        detections = _federated(detections, annotations, images, max_dets)
    evaluator = _Evaluator(
        _index(images, truth["categories"], annotations),
        _index(images, truth["categories"], detections),
        iou_type,
        lvis_style=style == "lvis",
        print_function=logger.debug,
    )
    limits = {max_dets} if style == "lvis" else {n for n in (1, 10) if n < max_dets} | {max_dets}
    evaluator.params.maxDets = sorted(limits)
    evaluator.evaluate()
    evaluator.accumulate()
    return _metrics(evaluator, truth["categories"], style)


def _read_json(path: Path, what: str, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        content = error
    if not isinstance(content, kind):
        expected = "a list of results" if kind is list else "an object in COCO's format"
        got = f"{type(content).__name__} {str(content)[:100]}"
        remedy = "Check the path, and that the file was written completely."
        fail(f"{what} {path}", expected=f"a json file with {expected}", got=got, remedy=remedy)
    return content


def read_truth(path: Path) -> Json:
    """Read an annotation file in COCO's format.

    Raises:
        InputError: unreadable file, or one without images or categories.
    """
    content = _read_json(path, "annotation file", dict)
    if not {"images", "categories"} <= set(content):
        expected = 'the lists "images", "annotations" and "categories"'
        got = f"the keys {sorted(content)}"
        remedy = "Give a file in COCO's format."
        fail(f"annotation file {path}", expected=expected, got=got, remedy=remedy)
    return content


class _Evaluator(COCOeval_faster):
    """faster-coco-eval, but overlaps of masks are pycocotools' and taken only where they count.

    Its own way writes every mask anew, also those in images without an object of their category,
    and takes half of the whole time.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params.compute_rle = False

    def computeIoU(self, imgId: int, catId: int) -> list[float] | np.ndarray:  # noqa: N802
        """Overlaps (detections, objects) in an image that has some of both of a category."""
        if self.params.iouType == "bbox":
            return super().computeIoU(imgId, catId)
        ((objects,),) = self.gt_dataset.get_instances([imgId], [catId], True)
        ((found,),) = self.dt_dataset.get_instances([imgId], [catId], True)
        best = sorted(found, key=lambda each: each["score"], reverse=True)
        masks = [each["segmentation"] for each in best[: self.params.maxDets[-1]]]
        size = _size(self.cocoGt.imgs[imgId])
        true = [encode_segmentation(each["segmentation"], size) for each in objects]
        return mask_util.iou(masks, true, [int(each["iscrowd"]) for each in objects])


def _index(images: list[Json], categories: list[Json], annotations: list[Json]) -> COCO:
    """Number the annotations from 1 (0 means "no match" to the evaluator) and index them."""
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    indexed = COCO({"images": images, "categories": categories, "annotations": annotations})
    for annotation in annotations:
        if "area" not in annotation:  # the file had none
            shape, box = annotation.get("segmentation"), annotation["bbox"]
            size = _size(indexed.imgs[annotation["image_id"]])
            area = mask_util.area(encode_segmentation(shape, size)) if shape else box[2] * box[3]
            annotation["area"] = float(area)
    return indexed


def _size(image: Json) -> tuple[int, int]:
    return image["height"], image["width"]


def _ground_truth(
    truth: Json, images: list[Json], dropped: Collection[int], iou_type: str
) -> list[Json]:
    """Copies of the annotations that count; a box without mask is no ground truth for masks."""
    chosen = {image["id"] for image in images}
    return [
        {"iscrowd": 0} | annotation
        for place, annotation in enumerate(truth["annotations"])
        if place not in dropped
        and annotation["image_id"] in chosen
        and (iou_type == "bbox" or annotation.get("segmentation"))
    ]


def _detections(
    results: str | Path | list[Json], images: list[Json], categories: list[Json], iou_type: str
) -> list[Json]:
    """Checked copies of the results with the area of what is compared."""
    source = "results" if isinstance(results, list) else f"results file {results}"
    found = (
        results if isinstance(results, list) else _read_json(Path(results), "results file", list)
    )
    known = _Known(
        {image["id"]: [image.get("height"), image.get("width")] for image in images},
        {category["id"] for category in categories},
    )
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    detections = []
    for place, result in enumerate(found):
        if not _is_good(result, known, shape):
            _refuse(f"{source}, result {place}", result, known, shape)
        drawn = result[shape]
        area = drawn[2] * drawn[3] if shape == "bbox" else float(mask_util.area(drawn))
        detections.append(
            {
                "image_id": result["image_id"],
                "category_id": result["category_id"],
                "score": result["score"],
                "area": area,
                shape: drawn,
            }
        )
    return detections


class _Known(NamedTuple):
    """What results may be about: images with their [height, width], and categories."""

    images: dict[int, list[int | None]]
    categories: set[int]


def _is_good(result: Any, known: _Known, shape: str) -> bool:
    try:
        drawn, image = result[shape], result["image_id"]
        if image not in known.images or result["category_id"] not in known.categories:
            return False
        if shape == "bbox":
            return len(drawn) == 4 and all(map(math.isfinite, (result["score"], *drawn)))
        right = list(drawn["size"]) == known.images[image]
        return right and isinstance(drawn["counts"], str | bytes) and math.isfinite(result["score"])
    except (KeyError, TypeError):  # a part is missing or is something else
        return False


def _refuse(where: str, result: Any, known: _Known, shape: str) -> NoReturn:
    """Say what is wrong with a result that is not good."""
    needed = {"image_id", "category_id", "score", shape}
    if not isinstance(result, dict) or not needed <= set(result):
        got = sorted(result) if isinstance(result, dict) else type(result).__name__
        fail(where, expected=f"the keys {sorted(needed)}", got=got, remedy="Write all of them.")
    remedy = "Results have the ids of the annotation file, and their images are those evaluated."
    for key, ids in (("image_id", known.images), ("category_id", known.categories)):
        if result[key] not in ids:
            fail(where, expected=f"a known {key}", got=repr(result[key]), remedy=remedy)
    score, drawn = result["score"], result[shape]
    if not isinstance(score, int | float) or not math.isfinite(score):
        remedy = "The model may have diverged."
        fail(where, expected="a finite score", got=score, remedy=remedy)
    got = f"{type(drawn).__name__} {str(drawn)[:80]}"
    if shape == "bbox":
        expected, remedy = "a bbox of four finite numbers", "The model may have diverged."
    else:
        expected = f"a run-length encoded mask of size {known.images[result['image_id']]}"
        remedy = "Encode it with pycocotools.mask.encode."
    fail(where, expected=expected, got=got, remedy=remedy)


def _federated(
    detections: list[Json], truth: list[Json], images: list[Json], max_dets: int
) -> list[Json]:
    """LVIS: the best `max_dets` of each image, of these those whose category it was checked for.

    "LVIS" (Gupta et al. 2019), Sec. 3: categories that an image has, and that it is known not to
    have, count; about the others nothing is known.
    """
    checked = {image["id"]: set(image.get("neg_category_ids", ())) for image in images}
    for annotation in truth:
        checked[annotation["image_id"]].add(annotation["category_id"])
    taken = Counter()
    kept = []
    for detection in sorted(detections, key=lambda item: item["score"], reverse=True):
        image_id = detection["image_id"]
        taken[image_id] += 1
        if taken[image_id] <= max_dets and detection["category_id"] in checked[image_id]:
            kept.append(detection)
    return kept


def _metrics(evaluator: COCOeval_faster, categories: list[Json], style: Style) -> Json:
    """Means over precision (IoU, recall, category, size, limit) and recall (the same less one)."""
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    parameters = evaluator.params
    metrics: Json = {
        "AP": _mean(precision[..., 0, -1]),
        "AP50": _mean(precision[0, ..., 0, -1]),
        "AP75": _mean(precision[5, ..., 0, -1]),
    }
    places = {key: parameters.areaRngLbl.index(label) for key, label in _SIZES.items()}
    metrics |= {f"AP{key}": _mean(precision[..., place, -1]) for key, place in places.items()}
    for place, limit in enumerate(parameters.maxDets):
        metrics[f"AR{limit}"] = _mean(recall[..., 0, place])
    metrics |= {f"AR{key}": _mean(recall[..., place, -1]) for key, place in places.items()}
    order = [int(category) for category in parameters.catIds]
    if style == "lvis":
        frequency = {category["id"]: category["frequency"] for category in categories}
        for key in "rcf":  # rare, common, frequent
            chosen = [k for k, category in enumerate(order) if frequency[category] == key]
            metrics[f"AP{key}"] = _mean(precision[:, :, chosen, 0, -1])
    by_category = {c: _mean(precision[:, :, k, 0, -1]) for k, c in enumerate(order)}
    return metrics | {"per_category_AP": by_category}


def _mean(values: np.ndarray) -> float:
    """Mean of what counts; the evaluator marks the rest by -1."""
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else math.nan
