"""Average precision by the rules of COCO and LVIS, computed by faster-coco-eval."""

from __future__ import annotations

import gc
import logging
import math
from collections import Counter
from collections.abc import Collection, Container
from numbers import Number
from pathlib import Path
from typing import Any, Literal

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from vitdet.utils import thresholds
from vitdet.utils.checks import InputError
from vitdet.utils.files import read_json
from vitdet.utils.run_lengths import covers, encode_segmentation, mask_util

logger = logging.getLogger(__name__)

Style = Literal["coco", "lvis"]
Json = dict[str, Any]
_KEPT = ("image_id", "category_id", "score", "bbox", "segmentation")  # of a result


def evaluate_results(
    dataset_json: str | Path | Json,
    results: str | Path | list[Json],
    iou_type: str,
    max_dets: int = 100,
    *,
    style: Style = "coco",
    image_ids: Collection[int] | None = None,
) -> Json:
    """Score results in COCO's result format against an annotation file.

    Annotations that cannot be compared (unknown image or category, no box or mask) do not count,
    and an area that cannot be an object's is taken from its mask or box; a warning says how many.

    Args:
        dataset_json: the annotation file, or its content.
        results: list of {image_id, category_id, score, bbox XYWH and / or segmentation}, or a file.
        iou_type: "bbox" or "segm". It is also what the area of a result is taken from.
        max_dets: detections that count, see `CocoEvaluator`.
        style: "lvis" for the rules of lvis-api: federated evaluation, nothing of area 0 counts,
            "ignore" counts and "iscrowd" does not; and APr, APc, APf.
        image_ids: the images that count; None for all in the file.

    Returns:
        Fractions: AP, AP50, AP75, APs, APm, APl; AR1, AR10, AR<max_dets> (LVIS the last only); ARs,
        ARm, ARl; LVIS APr, APc, APf; `per_category_AP` {id: AP}; nan where nothing counts.

    Raises:
        InputError: unreadable file, or a result with unknown, missing or impossible values.
    """
    truth = (
        read_json(Path(dataset_json), dict) if not isinstance(dataset_json, dict) else dataset_json
    )
    found = read_json(Path(results), list) if isinstance(results, str | Path) else results
    return metrics(evaluated(truth, found, iou_type, max_dets, style, image_ids), truth, style)


def evaluated(
    truth: Json,
    results: list[Json],
    iou_type: str,
    max_dets: int = 100,
    style: Style = "coco",
    image_ids: Collection[int] | None = None,
    encoded_here: bool = False,
) -> COCOeval_faster:
    """Return faster-coco-eval's evaluator, with its arrays in `eval`.

    Arguments and errors are those of `evaluate_results`; results that were `encoded_here` are not
    checked. Its `cocoGt` and `cocoDt` have the annotations and results that count.
    """
    if iou_type not in ("bbox", "segm") or style not in ("coco", "lvis") or max_dets < 1:
        got = f"iou_type={iou_type!r}, style={style!r} and max_dets={max_dets!r}"
        raise InputError(f"evaluation: expected bbox or segm, coco or lvis, at least 1, got {got}")
    _check_truth(truth, style)
    # Many small objects are made, none in a circle; looking for circles takes a quarter more.
    collecting = gc.isenabled()
    gc.disable()
    try:
        images = {i["id"]: i for i in truth["images"] if image_ids is None or i["id"] in image_ids}
        objects = _objects(truth, images, iou_type, style)
        _warn_of_many(objects, iou_type, max_dets, style)
        categories = {category["id"] for category in truth["categories"]}
        for place, result in enumerate([] if encoded_here else results):
            if fault := _fault(result, images, categories, iou_type):
                raise InputError(f"result {place}: expected {fault}")
        detections = [_detection(result, iou_type) for result in results]
        if style == "lvis":
            detections = _federated(detections, objects, images, max_dets)
        parts = {"images": list(images.values()), "categories": truth["categories"]}
        for side in (objects, detections):
            for number, annotation in enumerate(side, 1):  # 0 means "no match"
                annotation["id"] = number
        made = _Evaluator(
            COCO({**parts, "annotations": objects}),
            COCO({**parts, "annotations": detections}),
            iou_type,
            lvis_style=style == "lvis",
            print_function=logger.debug,
        )
        fewer = () if style == "lvis" else (n for n in (1, 10) if n < max_dets)
        made.params.compute_rle, made.params.maxDets = False, [*fewer, max_dets]
        made.evaluate()
        made.accumulate()
        return made
    finally:
        if collecting:
            gc.enable()


def metrics(evaluator: COCOeval_faster, truth: Json, style: Style) -> Json:
    """Means over precision (IoU, recall, category, size, limit) and recall (the same less one)."""
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    parts: Json = {"AP": precision[..., 0, -1]}
    parts |= {"AP50": precision[0, ..., 0, -1], "AP75": precision[5, ..., 0, -1]}
    parts |= {f"AP{size}": precision[..., place, -1] for place, size in enumerate("sml", 1)}
    limits = enumerate(evaluator.params.maxDets)
    parts |= {f"AR{limit}": recall[..., 0, place] for place, limit in limits}
    parts |= {f"AR{size}": recall[..., place, -1] for place, size in enumerate("sml", 1)}
    order = [int(category) for category in evaluator.params.catIds]
    if style == "lvis":
        frequency = {category["id"]: category["frequency"] for category in truth["categories"]}
        for key in "rcf":  # rare, common, frequent
            chosen = [k for k, category in enumerate(order) if frequency[category] == key]
            parts[f"AP{key}"] = precision[:, :, chosen, 0, -1]
    by_category = {c: _mean(precision[:, :, k, 0, -1]) for k, c in enumerate(order)}
    return {name: _mean(part) for name, part in parts.items()} | {"per_category_AP": by_category}


def match(evaluator: COCOeval_faster, iou: float = 0.5) -> None:
    """Match once more, at one IoU and for all sizes: `cocoDt`'s entries get the `gt_id` they found.

    COCO lets the detection with the highest score choose its object first, so the matches of all
    are also those of the detections with at least some score.
    """
    evaluator.params.iouThrs = np.array([iou])
    evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.math_matches()


def best_thresholds(evaluator: COCOeval_faster) -> tuple[float, dict[int, float]]:
    """Return the score with the largest F1 over all (`vitdet.utils.thresholds`), of each category.

    That over all holds for a category with few objects, or of which none was found. What is neither
    right nor wrong does not count. The evaluator's matches change.
    """
    match(evaluator)
    objects = {n: each for n, each in evaluator.cocoGt.anns.items() if not each["ignore"]}
    counts = Counter(each["category_id"] for each in objects.values())
    found: dict[int, list[tuple[float, bool]]] = {int(c): [] for c in evaluator.params.catIds}
    for each in evaluator.cocoDt.anns.values():
        right = each.get("gt_id") in objects
        if right or ("gt_id" not in each and not each.get("lvis_mark")):
            found[each["category_id"]].append((each["score"], right))

    def best(pairs: list[tuple[float, bool]], total: int) -> float:
        scores, right = np.array(pairs).reshape(-1, 2).T
        return thresholds.best(scores, right > 0, total)

    over_all = best([pair for pairs in found.values() for pair in pairs], len(objects))
    own = {c: best(p, counts[c]) for c, p in found.items() if counts[c] >= thresholds.FEWEST}
    return over_all, {c: over_all if math.isnan(own.get(c, math.nan)) else own[c] for c in found}


def _mean(values: np.ndarray) -> float:
    """Mean of what counts; the evaluator marks the rest by -1."""
    counted = values[values > -1]
    return float(counted.mean()) if counted.size else math.nan


class _Evaluator(COCOeval_faster):
    """faster-coco-eval, but overlaps of masks are pycocotools' and taken only where they count.

    Its own way writes every mask anew, also those in images without an object of their category,
    and takes half of the whole time. And what does not count is what `_objects` says.
    """

    def _prepare(self) -> None:
        pairs = []
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
        size = (self.cocoGt.imgs[imgId]["height"], self.cocoGt.imgs[imgId]["width"])
        true = [encode_segmentation(each["segmentation"], size) for each in objects]
        return mask_util.iou(masks, true, [int(each["iscrowd"]) for each in objects])


def _check_truth(truth: Json, style: Style) -> None:
    for part in ("images", "annotations", "categories"):
        entries = truth.get(part)
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise InputError(f'annotations: expected a list "{part}" (COCO\'s format), got none')
        if part != "annotations" and not all(isinstance(i.get("id"), int) for i in entries):
            raise InputError(f'annotations: expected whole numbers as ids of "{part}"')
    if style == "lvis" and not all(c.get("frequency") in ("r", "c", "f") for c in entries):
        raise InputError('LVIS categories: expected a frequency r, c or f each, or style="coco"')


def _objects(truth: Json, images: dict[int, Json], iou_type: str, style: Style) -> list[Json]:
    """Return copies of the annotations that count; a warning says how many do not, and why.

    In a copy `iscrowd` (a detection in it is none) and `ignore` (it need not be found) are 0 or 1.
    """
    categories = {category["id"] for category in truth["categories"]}
    known = {image["id"] for image in truth["images"]}
    objects, said = [], Counter[str]()
    for each in truth["annotations"]:
        made: Json | str = "left out, of an unknown image or category"
        if _is_in(each.get("image_id"), known) and _is_in(each.get("category_id"), categories):
            if each["image_id"] not in images:
                continue
            made = _object(each, images[each["image_id"]], iou_type, style)
        if isinstance(made, str):
            said[made] += 1
            continue
        objects.append(made)
        if each.get("area") is not None and _number(each["area"]) != made["area"]:
            said["with an impossible area: that of the mask or box is taken"] += 1
    for what, count in said.items():
        logger.warning("%s evaluation: %d objects %s", iou_type, count, what)
    return objects


def _object(annotation: Json, image: Json, iou_type: str, style: Style) -> Json | str:
    """Return an annotation as the evaluator takes it, or why it cannot."""
    size, mask = _size(image), annotation.get("segmentation") or None
    box = _box(annotation.get("bbox"))
    mask = mask if size is not None and _is_mask(mask, size) else None
    if iou_type == "bbox" and box is None:
        return "left out, without a bbox of four numbers XYWH"
    if iou_type == "segm" and mask is None:
        return "left out, without a segmentation that is a mask of their image"
    area = _number(annotation.get("area"))
    if style == "lvis" and area == 0:  # lvis-api, lvis/lvis.py, `get_ann_ids`
        return "left out, of area 0 (LVIS)"
    if area is None or not 0 < area <= (math.prod(size) if size else 1e10):
        area = box[2] * box[3] if box else 0.0
        if mask is not None and size is not None:
            area = float(mask_util.area(encode_segmentation(mask, size)))
    crowd = str(annotation.get("iscrowd")).lower() in ("1", "1.0", "true")
    return {
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "bbox": box,
        "segmentation": mask,
        "area": area,
        "iscrowd": int(crowd and style == "coco"),
        "ignore": int(bool(annotation.get("ignore")) if style == "lvis" else crowd),
    }


def _size(image: Json) -> tuple[int, int] | None:
    """Return (height, width), None where the file does not say it."""
    height, width = image.get("height"), image.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _is_in(value: Any, known: Container[Any]) -> bool:
    return isinstance(value, Number) and value in known


def _number(value: Any) -> float | None:
    """Return a finite number, also one that is written as text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _box(value: Any) -> list[float] | None:
    """Return a box XYWH, None for what is none."""
    values = value if isinstance(value, list | tuple | np.ndarray) else ()
    box = [number for each in values if (number := _number(each)) is not None]
    return box if len(values) == len(box) == 4 and min(box[2:]) >= 0 else None


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


def _warn_of_many(objects: list[Json], iou_type: str, max_dets: int, style: Style) -> None:
    """Say where there are more objects than detections that count."""
    keys = ("image_id",) if style == "lvis" else ("image_id", "category_id")
    counts = Counter(tuple(each[key] for key in keys) for each in objects if not each["ignore"])
    if (most := max(counts.values(), default=0)) > max_dets:
        of = "an image" if style == "lvis" else "an image and category"
        text = "%s evaluation: up to %d objects of %s, of which no more than %d can be found"
        logger.warning(text, iou_type, most, of, max_dets)


def _detection(result: Json, iou_type: str) -> Json:
    """Return a copy with what is compared and its area."""
    plain = {key: result[key] for key in _KEPT if key in result}
    if iou_type == "bbox":
        box = [float(value) for value in result["bbox"]]
        return plain | {"bbox": box, "area": box[2] * box[3]}
    mask = result["segmentation"]
    return plain | {"segmentation": mask, "area": float(mask_util.area(mask))}


def _fault(result: Any, images: dict[int, Json], categories: set[int], kind: str) -> str | None:
    """Return what a result should have and what it has, None for a good one."""
    keys = ("image_id", "category_id", "score", "segmentation" if kind == "segm" else "bbox")
    if not isinstance(result, dict) or not set(keys) <= result.keys():
        return f"the keys {', '.join(keys)}, got {str(result)[:100]}"
    image, category, score, drawn = (result[key] for key in keys)
    if not _is_in(image, images):
        return f"a known image_id, one of the annotation file, got {image!r}"
    if not _is_in(category, categories):
        return f"a known category_id, one of the annotation file, got {category!r}"
    if not isinstance(score, Number) or _number(score) is None:
        return f"a finite score, got {score}. The model may have diverged."
    if kind != "segm":
        good, what = _box(drawn) is not None, "a bbox XYWH of four finite numbers, no side negative"
    else:
        size = _size(images[image])
        text = isinstance(drawn, dict) and isinstance(drawn.get("counts"), str | bytes)
        good = text and size is not None and covers(drawn, size)
        what = f"a mask as of pycocotools.mask.encode that covers the image's size {size}"
    return None if good else f"{what}, got {type(drawn).__name__} {str(drawn)[:80]}"


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
        image, category = detection["image_id"], detection["category_id"]
        taken[image] += 1
        if taken[image] <= max_dets and category in checked[image] and detection["area"] > 0:
            open_ = images[image].get("not_exhaustive_category_ids") or ()
            kept.append(detection | {"lvis_mark": category in open_})
    return kept
