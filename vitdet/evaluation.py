"""Box and mask AP by the rules of COCO and LVIS, computed by faster-coco-eval."""

from __future__ import annotations

import json
import logging
import math
import os
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pycocotools.mask
import torch
from detectron2.evaluation import DatasetEvaluator
from faster_coco_eval import COCO, COCOeval_faster

from vitdet.utils import distributed
from vitdet.utils.checks import fail

logger = logging.getLogger(__name__)
mask_util: Any = pycocotools.mask  # its type stubs know only one of each function's call forms

Style = Literal["coco", "lvis"]
Json = dict[str, Any]
_SIZES = {"s": "small", "m": "medium", "l": "large"}


class EvaluationData(Protocol):
    """What the evaluator needs to know of a data set; `vitdet.data.datasets.Dataset` has it."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def class_names(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def class_ids(self) -> Sequence[int]: ...  # noqa: D102
    @property
    def records(self) -> Sequence[Json]: ...  # noqa: D102
    @property
    def json_file(self) -> Path: ...  # noqa: D102
    @property
    def style(self) -> Style: ...  # noqa: D102
    @property
    def dropped(self) -> Collection[int]: ...  # noqa: D102


class CocoEvaluator(DatasetEvaluator):
    """Collects predictions and scores them, with detectron2's evaluator interface.

    Ground truth is the data set's annotation file, restricted to the images of its records and
    without the annotations that the data set left out.

    Args:
        dataset: what the predictions are about.
        max_dets: detections that count, the best by score: of an image and category by COCO's
            rules (usual value 100), of an image by LVIS's (300).
        iou_types: of "bbox" and "segm"; None for bbox, and segm when the model predicts masks.
        output_dir: folder for `coco_instances_results.json`, or None.
    """

    def __init__(
        self,
        dataset: EvaluationData,
        *,
        max_dets: int = 100,
        iou_types: Sequence[str] | None = None,
        output_dir: str | Path | None = None,
    ) -> None:
        self._dataset = dataset
        self._max_dets = max_dets
        self._iou_types = iou_types
        self._output_dir = None if output_dir is None else Path(output_dir)
        self.reset()

    def reset(self) -> None:
        """Forget all predictions."""
        self._results: list[Json] = []
        self._seen: list[int] = []
        self._masks = False

    def process(self, inputs: Iterable[Json], outputs: Iterable[Json]) -> None:
        """Take the predictions for some images.

        Args:
            inputs: model inputs; their `image_id` counts.
            outputs: one an input, with `instances`: pred_boxes XYXY in pixels of the image file,
                scores, pred_classes (class indexes), and pred_masks bool (N, height, width) if any.
        """
        for record, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            self._seen.append(record["image_id"])
            self._masks |= instances.has("pred_masks")
            self._results += _to_results(instances, record["image_id"], self._dataset)

    # detectron2 annotates this method as if it returned nothing
    def evaluate(self) -> OrderedDict[str, Json]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Score what all processes collected.

        Returns:
            {"bbox": metrics, "segm": metrics}, metrics in percent: AP, AP50, AP75, APs, APm, APl,
            AR..., for LVIS APr, APc, APf, and `per_class` {name: AP}; nan where nothing counts.
            Empty in processes other than the main one, and for files without annotations.

        Raises:
            InputError: not every image of the data set, and only these, once; in every process.
        """
        gathered = distributed.all_gather_object((self._seen, self._masks, self._results))
        self._check_seen([image for seen, _, _ in gathered for image in seen])
        if not distributed.is_main():
            return OrderedDict()
        results = [result for _, _, part in gathered for result in part]
        if self._output_dir is not None:
            _write_json(self._output_dir / "coco_instances_results.json", results)
        truth = _read_truth(self._dataset.json_file)
        if "annotations" not in truth:
            logger.warning("%s has no annotations: nothing to score", self._dataset.json_file)
            return OrderedDict()
        masks = any(flag for _, flag, _ in gathered)
        iou_types = self._iou_types or (("bbox", "segm") if masks else ("bbox",))
        return OrderedDict((kind, self._score(truth, results, kind)) for kind in iou_types)

    def _score(self, truth: Json, results: list[Json], iou_type: str) -> Json:
        data = self._dataset
        images = [record["image_id"] for record in data.records]
        counted: Json = {"style": data.style, "image_ids": images, "dropped": data.dropped}
        scores = evaluate_results(truth, results, iou_type, self._max_dets, **counted)
        by_id = scores.pop("per_category_AP")
        classes = zip(data.class_names, data.class_ids, strict=True)
        per_class = {name: 100 * by_id[category] for name, category in classes}
        return {name: 100 * value for name, value in scores.items()} | {"per_class": per_class}

    def _check_seen(self, seen: list[int]) -> None:
        wanted = {record["image_id"] for record in self._dataset.records}
        counts = Counter(seen)
        problems = {
            "not processed": [image for image in wanted if image not in counts],
            "processed more than once": [image for image, count in counts.items() if count > 1],
            "not of this data set": [image for image in counts if image not in wanted],
        }
        where = f"evaluation on {self._dataset.name}"
        expected = f"predictions for each of its {len(wanted)} images once"
        remedy = "Evaluate with the loader of the same data set, from reset() on."
        for what, images in problems.items():
            if images:
                got = f"{len(images)} images {what}, such as image {min(images)}"
                fail(where, expected=expected, got=got, remedy=remedy)


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
    truth = dataset_json if isinstance(dataset_json, dict) else _read_truth(Path(dataset_json))
    if iou_type not in ("bbox", "segm") or max_dets < 1:
        got = f"iou_type={iou_type!r} and max_dets={max_dets}"
        fail("evaluation", expected="bbox or segm, and at least 1", got=got, remedy="Correct it.")
    chosen = None if image_ids is None else set(image_ids)
    images = [image for image in truth["images"] if chosen is None or image["id"] in chosen]
    annotations = _ground_truth(truth, images, set(dropped), iou_type)
    detections = _detections(results, {i["id"] for i in images}, truth["categories"], iou_type)
    if style == "lvis":
        if not all("frequency" in category for category in truth["categories"]):
            remedy = 'Add it, or use style="coco".'
            fail("LVIS categories", expected="a frequency each", got="none", remedy=remedy)
        detections = _federated(detections, annotations, images, max_dets)
    evaluator = COCOeval_faster(
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


def _to_results(instances: Any, image_id: int, dataset: EvaluationData) -> list[Json]:
    """Turn detectron2 Instances into COCO results: boxes XYWH, masks run-length encoded."""
    boxes = instances.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    classes = instances.pred_classes.tolist()
    if classes and max(classes) >= len(dataset.class_ids):
        expected = f"a class index below {len(dataset.class_ids)}, as {dataset.name} has classes"
        remedy = "Set the model's number of classes to the data set's."
        fail(f"prediction for image {image_id}", expected=expected, got=max(classes), remedy=remedy)
    results: list[Json] = [
        {"image_id": image_id, "category_id": dataset.class_ids[c], "bbox": box, "score": score}
        for box, c, score in zip(boxes.tolist(), classes, instances.scores.tolist(), strict=True)
    ]
    if instances.has("pred_masks"):
        for result, encoded in zip(results, _encode(instances.pred_masks), strict=True):
            result["segmentation"] = encoded
    return results


def _encode(masks: torch.Tensor) -> list[Json]:
    """Run-length encode bool masks (N, height, width)."""
    # pycocotools wants (height, width, N) in Fortran order: columns of one mask lie together
    columns = np.ascontiguousarray(masks.numpy().view(np.uint8).transpose(0, 2, 1))
    encoded = mask_util.encode(columns.transpose(2, 1, 0))
    return [{"size": rle["size"], "counts": rle["counts"].decode("ascii")} for rle in encoded]


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


def _read_truth(path: Path) -> Json:
    content = _read_json(path, "annotation file", dict)
    if not {"images", "categories"} <= set(content):
        expected = 'the lists "images", "annotations" and "categories"'
        got = f"the keys {sorted(content)}"
        remedy = "Give a file in COCO's format."
        fail(f"annotation file {path}", expected=expected, got=got, remedy=remedy)
    return content


def _write_json(path: Path, content: Any) -> None:
    """Write under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    temporary.replace(path)


def _index(images: list[Json], categories: list[Json], annotations: list[Json]) -> COCO:
    """Number the annotations from 1 (0 means "no match" to the evaluator) and index them."""
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    indexed = COCO({"images": images, "categories": categories, "annotations": annotations})
    for annotation in annotations:
        if "area" not in annotation:  # the file had none
            mask = annotation.get("segmentation") and indexed.annToRLE(annotation)
            box = annotation["bbox"]
            annotation["area"] = float(mask_util.area(mask)) if mask else float(box[2] * box[3])
    return indexed


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
    results: str | Path | list[Json], image_ids: set[int], categories: list[Json], iou_type: str
) -> list[Json]:
    """Checked copies of the results with the area of what is compared."""
    source = "results" if isinstance(results, list) else f"results file {results}"
    found = (
        results if isinstance(results, list) else _read_json(Path(results), "results file", list)
    )
    category_ids = {category["id"] for category in categories}
    detections = []
    for place, result in enumerate(found):
        _check_result(f"{source}, result {place}", result, image_ids, category_ids, iou_type)
        copy = {key: result[key] for key in ("image_id", "category_id", "score")} | {"iscrowd": 0}
        if iou_type == "bbox":
            box = result["bbox"]
            detections.append(copy | {"bbox": box, "area": box[2] * box[3]})
        else:
            encoded = result["segmentation"]
            area, box = float(mask_util.area(encoded)), mask_util.toBbox(encoded).tolist()
            detections.append(copy | {"segmentation": encoded, "bbox": box, "area": area})
    return detections


def _check_result(
    where: str, result: Any, image_ids: set[int], category_ids: set[int], iou_type: str
) -> None:
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    needed = {"image_id", "category_id", "score", shape}
    if not isinstance(result, dict) or not needed <= set(result):
        got = sorted(result) if isinstance(result, dict) else type(result).__name__
        fail(where, expected=f"the keys {sorted(needed)}", got=got, remedy="Write all of them.")
    remedy = "Results have the ids of the annotation file, and their images are those evaluated."
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        if result[key] not in known:
            fail(where, expected=f"a known {key}", got=repr(result[key]), remedy=remedy)
    numbers = [result["score"], *(result["bbox"] if iou_type == "bbox" else ())]
    if not all(map(math.isfinite, numbers)):
        fail(where, expected="finite numbers", got=numbers, remedy="The model may have diverged.")


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
