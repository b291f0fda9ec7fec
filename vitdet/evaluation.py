"""Collects a detector's predictions and scores them by the rules of COCO and LVIS."""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from vitdet.scores import Json, best_thresholds, evaluated, metrics
from vitdet.utils import distributed
from vitdet.utils.checks import InputError
from vitdet.utils.files import read_json
from vitdet.utils.run_lengths import RunLengths, encode

logger = logging.getLogger(__name__)

_WAITING = 2  # images whose masks may be in memory, a bool a pixel, until they are encoded
_OF_DATA = ("name", "class_names", "class_ids", "records", "json_file", "style", "truth")


class CocoEvaluator:
    """Collects predictions and scores them, with detectron2's evaluator interface.

    Ground truth is the data set's annotation file, as the data set reads it, restricted to the
    images of its records. A thread encodes masks while the next images are processed.

    Attributes:
        predictions: of the last evaluation, in COCO's format; [] before it.

    Args:
        dataset: what the predictions are about: a `vitdet.data.datasets.Dataset`, or one with its
            `name`, `class_names`, `class_ids`, `records`, `json_file`, `style` and `truth`.
        max_dets: detections that count, the best by score: of an image and category by COCO's
            rules (usual value 100), of an image by LVIS's (300).

    Raises:
        InputError: the data set does not say what evaluation needs, or has no annotation file.
    """

    def __init__(self, dataset: Any, *, max_dets: int = 100) -> None:
        if missing := [name for name in _OF_DATA if not hasattr(dataset, name)]:
            text = f"the data set, a {type(dataset).__name__}, has no {', '.join(missing)}"
            remedy = "Use vitdet.data.datasets.coco_dataset(json, images)."
            raise InputError(f"CocoEvaluator: {text}. {remedy}")
        if not Path(dataset.json_file).is_file():
            text = f"no annotation file {dataset.json_file} to evaluate by"
            raise InputError(f"{dataset.name}: {text}")
        self._dataset = dataset
        self._max_dets = max_dets
        self._encoder = ThreadPoolExecutor(1)  # its thread begins with the first predictions
        self.predictions: list[Json] = []
        self.reset()

    @property
    def metric_names(self) -> list[str]:
        """What `evaluate` may give, "bbox/AP" and so on; masks count when the model has them."""
        lvis = self._dataset.style == "lvis"
        kinds = ["", "50", "75", *"sml", *("rcf" if lvis else "")]
        limits = {self._max_dets} | (set() if lvis else {n for n in (1, 10) if n < self._max_dets})
        names = [f"AP{kind}" for kind in kinds] + [f"AR{n}" for n in (*sorted(limits), *"sml")]
        return [f"{task}/{name}" for task in ("bbox", "segm") for name in names]

    def reset(self) -> None:
        """Forget all predictions."""
        self._encoder.shutdown(cancel_futures=True)
        self._encoder = ThreadPoolExecutor(1)
        self._results: list[Future[list[Json]]] = []
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
            instances, image = output["instances"].to("cpu"), record["image_id"]
            self._seen.append(image)
            self._masks |= instances.has("pred_masks")
            self._results.append(self._encoder.submit(_of_image, instances, image, self._dataset))
            for future in self._results[:-_WAITING][-1:]:
                future.result()

    def evaluate(self) -> OrderedDict[str, Json]:
        """Score what all processes collected.

        Returns:
            {"bbox": metrics, "segm": metrics}, metrics in percent: AP, AP50, AP75, APs, APm, APl,
            AR..., for LVIS APr, APc, APf, and `per_class` {name: AP}; nan where nothing counts.
            The first also has `thresholds`, the scores with the largest F1 as fractions:
            {"over_all": score, "by_class": {name: score}}.
            Empty in processes other than the main one, and for files without annotations.

        Raises:
            InputError: not every image of the data set, and only these, once; in every process.
        """
        found = [result for future in self._results for result in future.result()]
        self._encoder.shutdown()  # processes that read images should not be forked beside a thread
        seen = distributed.all_gather_object((self._seen, self._masks))
        self._check_seen([image for images, _ in seen for image in images])
        gathered = distributed.gather_object(found)  # the main process alone needs them
        if not distributed.is_main():
            return OrderedDict()
        self.predictions = results = list(chain.from_iterable(gathered))
        truth = self._dataset.truth or read_json(self._dataset.json_file, dict)
        if "annotations" not in truth:
            logger.warning("%s has no annotations: nothing to score", self._dataset.json_file)
            return OrderedDict()
        masks = any(flag for _, flag in seen)
        iou_types = ("bbox", "segm") if masks else ("bbox",)
        return OrderedDict(
            (kind, self._score(truth, results, kind, find_threshold=not place))
            for place, kind in enumerate(iou_types)
        )

    def _score(
        self, truth: Json, results: list[Json], iou_type: str, *, find_threshold: bool
    ) -> Json:
        data = self._dataset
        images = {record["image_id"] for record in data.records}
        rules = (iou_type, self._max_dets, data.style, images)
        made = evaluated(truth, results, *rules, encoded_here=True)
        scores = metrics(made, truth, data.style)
        by_id = scores.pop("per_category_AP")
        classes = dict(zip(data.class_names, data.class_ids, strict=True))
        made_of = {name: 100 * value for name, value in scores.items()}
        made_of["per_class"] = {name: 100 * by_id[category] for name, category in classes.items()}
        if find_threshold:
            over_all, own = best_thresholds(made)
            by_class = {name: own[category] for name, category in classes.items()}
            made_of["thresholds"] = {"over_all": over_all, "by_class": by_class}
        return made_of

    def _check_seen(self, seen: list[int]) -> None:
        wanted = Counter({record["image_id"]: 1 for record in self._dataset.records})
        counts = Counter(seen)
        if odd := sorted((wanted - counts) + (counts - wanted)):
            raise InputError(
                f"evaluation on {self._dataset.name}: expected predictions for each of its "
                f"{len(wanted)} images once, got {counts[odd[0]]} for image {odd[0]} (and other "
                f"numbers for {len(odd) - 1} more). Evaluate with the loader of the same data set."
            )


def _of_image(instances: Any, image_id: int, dataset: Any) -> list[Json]:
    classes = instances.pred_classes
    if len(classes) and int(classes.max()) >= len(dataset.class_ids):
        raise InputError(
            f"prediction for image {image_id}: class {classes.max()}, but {dataset.name} has "
            f"{len(dataset.class_ids)} classes. Set the model's number of classes to that."
        )
    masks = encode(instances.pred_masks.numpy()) if instances.has("pred_masks") else None
    return coco_results(instances, image_id, dataset.class_ids, masks)


def coco_results(
    instances: Any, image_id: int, class_ids: Sequence[int], masks: list[RunLengths] | None
) -> list[Json]:
    """Return COCO results: image_id, category_id, bbox XYWH, score, segmentation if any."""
    boxes = instances.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    classes, scores = instances.pred_classes.tolist(), instances.scores.tolist()
    results = [
        {"image_id": image_id, "category_id": class_ids[c], "bbox": box, "score": score}
        for box, c, score in zip(boxes.tolist(), classes, scores, strict=True)
    ]
    for result, mask in zip(results, masks or (), strict=masks is not None):
        result["segmentation"] = mask
    return results
