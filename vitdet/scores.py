"""Average precision by the rules of COCO and LVIS, computed by faster-coco-eval."""

from __future__ import annotations

import gc
import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Container, Iterator
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import covers, encode_segmentation, mask_util

logger = logging.getLogger(__name__)

Style = Literal["coco", "lvis"]
Json = dict[str, Any]
_KEPT = ("image_id", "category_id", "score", "bbox", "segmentation")  # of a result
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
    encoded_here: bool = False,
) -> Json:
    """Score results in COCO's result format against an annotation file.

    A result's area is that of its mask for "segm" and of its box for "bbox", so the size classes
    are those of what is compared (as facebookresearch/detectron2 evaluation/coco_evaluation.py).

    Annotations that cannot be compared (unknown image or category, no box or mask) do not count,
    and an area that cannot be an object's is taken from its mask or box; a warning says how many.

    Args:
        dataset_json: the annotation file, or its content.
        results: list of {image_id, category_id, score, bbox XYWH and / or segmentation}, or a file.
        iou_type: "bbox" or "segm".
        max_dets: detections that count, see `CocoEvaluator`.
        style: "lvis" for the rules of lvis-api: federated evaluation, nothing of area 0 counts,
            "ignore" counts and "iscrowd" does not; and APr, APc, APf.
        image_ids: the images that count; None for all in the file.
        encoded_here: the results were made by this program, and need not be looked at.

    Returns:
        Fractions: AP, AP50, AP75, APs, APm, APl; AR1, AR10, AR<max_dets> (LVIS the last only); ARs,
        ARm, ARl; LVIS APr, APc, APf; `per_category_AP` {id: AP}; nan where nothing counts.

    Raises:
        InputError: unreadable file, unknown image or category in the results, or a result with
            missing or impossible values.
    """
    truth = dataset_json if isinstance(dataset_json, dict) else read_truth(Path(dataset_json))
    made = evaluated(truth, results, iou_type, max_dets, style, image_ids, encoded_here)
    return _metrics(made, truth["categories"], style)


def evaluated(
    truth: Json,
    results: str | Path | list[Json],
    iou_type: str,
    max_dets: int = 100,
    style: Style = "coco",
    image_ids: Collection[int] | None = None,
    encoded_here: bool = False,
) -> COCOeval_faster:
    """Return faster-coco-eval's evaluator, with its arrays in `eval`.

    Arguments and errors are those of `evaluate_results`. Its `cocoGt` and `cocoDt` have the
    annotations and results that count.
    """
    known = iou_type in ("bbox", "segm") and style in ("coco", "lvis")
    if not known or not isinstance(max_dets, int) or max_dets < 1:
        got = f"iou_type={iou_type!r}, style={style!r} and max_dets={max_dets!r}"
        raise InputError(f"evaluation: expected bbox or segm, coco or lvis, at least 1, got {got}")
    _check_truth(truth, style)
    chosen = None if image_ids is None else set(image_ids)
    images = {
        each["id"]: each for each in truth["images"] if chosen is None or each["id"] in chosen
    }
    objects = ground_truth(truth, images, iou_type, style)
    if (most := _most(objects, style)) > max_dets:
        text = (
            "%s evaluation: up to %d objects of an image%s, of which no more than %d can be found"
        )
        of = "" if style == "lvis" else " and category"
        logger.warning(text, iou_type, most, of, max_dets)
    detections = _detections(results, images, truth["categories"], iou_type, encoded_here)
    if style == "lvis":
        detections = _federated(detections, objects, images, max_dets)
    evaluator = _Evaluator(
        _index(images, truth["categories"], objects),
        _index(images, truth["categories"], detections),
        iou_type,
        lvis_style=style == "lvis",
        print_function=logger.debug,
    )
    limits = {max_dets} if style == "lvis" else {n for n in (1, 10) if n < max_dets} | {max_dets}
    evaluator.params.maxDets = sorted(limits)
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator


def _read_json(path: Path, what: str, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        content = error
    if not isinstance(content, kind):
        expected = "a list of results" if kind is list else "an object in COCO's format"
        got = f"{type(content).__name__} {str(content)[:100]}"
        raise InputError(f"{what} {path}: expected a json file with {expected}, got {got}")
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
        raise InputError(f"annotation file {path}: expected {expected} (COCO's format), got {got}")
    return content


def _check_truth(truth: Json, style: Style) -> None:
    for part in ("images", "annotations", "categories"):
        entries = truth.get(part)
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise InputError(
                f'annotations: expected a list "{part}" as in COCO\'s format, got none'
            )
        for each in entries if part != "annotations" else ():
            if not isinstance(each.get("id"), Integral):
                got = repr(each.get("id"))
                raise InputError(
                    f'annotations: expected whole numbers as ids of "{part}", got {got}'
                )
    if style == "lvis" and any(
        each.get("frequency") not in set("rcf") for each in truth["categories"]
    ):
        remedy = 'Add it, or use style="coco".'
        raise InputError(
            f"LVIS categories: expected a frequency r, c or f each, got none. {remedy}"
        )


class _Evaluator(COCOeval_faster):
    """faster-coco-eval, but overlaps of masks are pycocotools' and taken only where they count.

    Its own way writes every mask anew, also those in images without an object of their category,
    and takes half of the whole time. And what does not count is what `ground_truth` says.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params.compute_rle = False

    def _prepare(self) -> None:
        """Put annotations and results where the evaluation looks for them."""
        pairs: list[set[tuple[int, int]]] = []
        sides = ((self.cocoGt, self.gt_dataset), (self.cocoDt, self.dt_dataset))
        for source, target in sides:
            target.clean()
            for each in source.dataset["annotations"]:
                target.append_ref(each["image_id"], each["category_id"], each)
            pairs.append({(a["image_id"], a["category_id"]) for a in source.dataset["annotations"]})
        self._nonempty_iou_pairs = pairs[0] & pairs[1]

    def computeIoU(self, imgId: int, catId: int) -> list[float] | np.ndarray:  # noqa: N802
        """Overlaps (detections, objects) in an image that has some of both of a category."""
        if self.params.iouType == "bbox":
            return super().computeIoU(imgId, catId)
        ((objects,),) = self.gt_dataset.get_instances([imgId], [catId], True)
        ((found,),) = self.dt_dataset.get_instances([imgId], [catId], True)
        best = sorted(found, key=lambda each: each["score"], reverse=True)
        masks = [each["segmentation"] for each in best[: self.params.maxDets[-1]]]
        image = self.cocoGt.imgs[imgId]
        size = (image["height"], image["width"])
        true = [encode_segmentation(each["segmentation"], size) for each in objects]
        return mask_util.iou(masks, true, [int(each["iscrowd"]) for each in objects])


def _index(images: dict[int, Json], categories: list[Json], annotations: list[Json]) -> COCO:
    """Number the annotations from 1 (0 means "no match" to the evaluator) and index them."""
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    parts = {"images": list(images.values()), "categories": categories}
    return COCO({**parts, "annotations": annotations})


def _size(image: Json) -> tuple[int, int] | None:
    """Return (height, width), None where the file does not say it."""
    height, width = image.get("height"), image.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _is_in(value: Any, known: Container[Any]) -> bool:
    return not isinstance(value, list | dict | set) and value in known


def ground_truth(truth: Json, images: dict[int, Json], iou_type: str, style: Style) -> list[Json]:
    """Return copies of the annotations that count; a warning says how many do not, and why.

    Args:
        truth: content of an annotation file.
        images: {id: image}, those that count.
        iou_type, style: as in `evaluate_results`.

    Returns:
        Each with image_id, category_id, bbox XYWH, segmentation (or None), area, and 0 or 1:
        iscrowd (a detection in it is none), ignore (it need not be found).
    """
    categories = {category["id"] for category in truth["categories"]}
    known = {image["id"] for image in truth["images"]}
    objects, said = [], Counter[str]()
    for annotation in truth["annotations"]:
        number = annotation.get("image_id")
        image = images[number] if _is_in(number, images) else None
        if image is None and _is_in(number, known):
            continue
        if image is None or not _is_in(annotation.get("category_id"), categories):
            said[f"left out, of an unknown {'image' if image is None else 'category'}"] += 1
            continue
        made = _object(annotation, image, iou_type, style)
        if isinstance(made, str):
            said[f"left out, {made}"] += 1
            continue
        if made["area"] is None:
            made["area"] = _own_area(made, image)
            if annotation.get("area") is not None and annotation["area"] != made["area"]:
                said["with an impossible area: that of the mask or box is taken"] += 1
        objects.append(made)
    for what, count in said.items():
        logger.warning("%s evaluation: %d objects %s", iou_type, count, what)
    return objects


def _object(annotation: Json, image: Json, iou_type: str, style: Style) -> Json | str:
    """Return an annotation as the evaluator takes it (area None: unknown), or why it cannot."""
    box, mask = _box(annotation.get("bbox")), annotation.get("segmentation") or None
    if iou_type == "bbox" and box is None:
        return "without a bbox of four numbers XYWH"
    size = _size(image)
    if mask is not None and (size is None or not _is_mask(mask, size)):
        if iou_type == "segm":
            return "with a segmentation that is no mask of their image"
        mask = None
    if iou_type == "segm" and mask is None:
        return "without a mask"
    crowd = str(annotation.get("iscrowd")).lower() in ("1", "1.0", "true")
    ignored = bool(annotation.get("ignore")) if style == "lvis" else crowd
    area = _number(annotation.get("area"))
    if style == "lvis" and area == 0:  # lvis-api, lvis/lvis.py, `get_ann_ids`
        return "of area 0 (LVIS)"
    largest = 1e10 if size is None else math.prod(size)
    return {
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": box,
        "segmentation": mask,
        "area": area if area is not None and 0 < area <= largest else None,
        "iscrowd": int(crowd and style == "coco"),
        "ignore": int(ignored),
    }


def _own_area(made: Json, image: Json) -> float:
    if made["segmentation"] is not None:
        size = (image["height"], image["width"])
        return float(mask_util.area(encode_segmentation(made["segmentation"], size)))
    return made["bbox"][2] * made["bbox"][3]


def _number(value: Any) -> float | None:
    """Return a finite number, also one that is written as text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _box(value: Any) -> list[float] | None:
    """Return a box XYWH, None for what is none."""
    if not isinstance(value, list | tuple | np.ndarray) or len(value) != 4:
        return None
    box = [number for each in value if (number := _number(each)) is not None]
    return box if len(box) == 4 and min(box[2:]) >= 0 else None


def _is_mask(mask: Any, size: tuple[int, int]) -> bool:
    """Whether pycocotools can draw a segmentation: it walks along an edge however far it goes."""
    if isinstance(mask, dict):
        return covers(mask, size)
    far = 10 * max(size)
    return isinstance(mask, list) and all(
        isinstance(part, list)
        and len(part) >= 6
        and len(part) % 2 == 0
        and all(isinstance(x, int | float) and abs(x) <= far for x in part)
        for part in mask
    )


def _most(objects: list[Json], style: Style) -> int:
    """Most objects to be found where `max_dets` detections count: in an image (of a category)."""
    keys = ("image_id",) if style == "lvis" else ("image_id", "category_id")
    counts = Counter(tuple(each[key] for key in keys) for each in objects if not each["ignore"])
    return max(counts.values(), default=0)


def _detections(
    results: str | Path | list[Json],
    images: dict[int, Json],
    categories: list[Json],
    iou_type: str,
    encoded_here: bool,
) -> list[Json]:
    """Checked copies of the results with the area of what is compared."""
    source, found = "results", results
    if isinstance(results, str | Path):
        source = f"results file {results}"
        found = _read_json(Path(results), "results file", list)
    if not isinstance(found, list):
        raise InputError(f"results: expected a list or a file, got a {type(results).__name__}")
    known = {"image_id": images, "category_id": {category["id"] for category in categories}}
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    detections = []
    for place, result in enumerate(found):
        fault = None if encoded_here else _fault(result, known, shape)
        if fault is not None:
            raise InputError(f"{source}, result {place}: expected {fault}")
        drawn = result[shape]
        if shape == "bbox":
            drawn = [float(value) for value in drawn]
        detections.append(
            {
                **{key: result[key] for key in _KEPT if key in result},
                "area": drawn[2] * drawn[3] if shape == "bbox" else float(mask_util.area(drawn)),
                shape: drawn,
            }
        )
    return detections


def _fault(result: Any, known: dict[str, Any], shape: str) -> str | None:
    """Return what a result should have and what it has, None for a good one."""
    needed = {*known, "score", shape}
    if not isinstance(result, dict) or not needed <= result.keys():
        got = sorted(map(str, result)) if isinstance(result, dict) else type(result).__name__
        return f"the keys {sorted(needed)}, got {got}"
    for key, ids in known.items():
        if not _is_in(result[key], ids):
            remedy = "Results have the ids of the annotation file, and its images."
            return f"a known {key}, got {result[key]!r}. {remedy}"
    score, drawn = result["score"], result[shape]
    expected = None
    if isinstance(score, str) or _number(score) is None:
        return f"a finite score, got {score}. The model may have diverged."
    if shape == "bbox":
        if _box(drawn) is None or any(isinstance(value, str) for value in drawn):
            expected = "a bbox XYWH of four finite numbers, no side negative"
    elif not isinstance(drawn, dict) or not isinstance(drawn.get("counts"), str | bytes):
        expected = "a run-length encoded mask, as of pycocotools.mask.encode"
    else:
        size = _size(known["image_id"][result["image_id"]])
        if size is None or not covers(drawn, size):
            expected = f"run lengths that cover the image's size {size} (height, width)"
    return expected and f"{expected}, got {type(drawn).__name__} {str(drawn)[:80]}"


def _federated(
    detections: list[Json], objects: list[Json], images: dict[int, Json], max_dets: int
) -> list[Json]:
    """LVIS: the best `max_dets` of each image, of these those whose category it was checked for.

    "LVIS" (Gupta et al. 2019), Sec. 3: categories that an image has, and that it is known not to
    have, count; about the others nothing is known. Empty ones are left out after the limit, as
    lvis-dataset/lvis-api, lvis/lvis.py, `get_ann_ids` does.
    """
    checked = {number: set(image.get("neg_category_ids") or ()) for number, image in images.items()}
    for each in objects:
        checked[each["image_id"]].add(each["category_id"])
    taken = Counter()
    kept = []
    for detection in sorted(detections, key=lambda item: item["score"], reverse=True):
        image = detection["image_id"]
        taken[image] += 1
        of_it = detection["category_id"] in checked[image] and detection["area"] > 0
        if taken[image] <= max_dets and of_it:
            open_ = images[image].get("not_exhaustive_category_ids") or ()
            kept.append(detection | {"lvis_mark": detection["category_id"] in open_})
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
