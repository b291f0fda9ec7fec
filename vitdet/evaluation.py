"""Collects a detector's predictions and scores them by the rules of COCO and LVIS."""

from __future__ import annotations

import json
import logging
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from vitdet.scores import Json, evaluated, metrics, read_truth
from vitdet.utils import distributed
from vitdet.utils.checks import InputError
from vitdet.utils.files import write_text
from vitdet.utils.run_lengths import encode

logger = logging.getLogger(__name__)

_WAITING = 2  # calls whose masks may be in memory, a bool a pixel, until they are encoded
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
        iou_types: of "bbox" and "segm"; None for bbox, and segm when the model predicts masks.
        output_dir: folder for the predictions, `coco_instances_results.json`, or None.

    Raises:
        InputError: the data set does not say what evaluation needs, or has no annotation file.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        max_dets: int = 100,
        iou_types: Sequence[str] | None = None,
        output_dir: str | Path | None = None,
    ) -> None:
        if missing := [name for name in _OF_DATA if not hasattr(dataset, name)]:
            raise InputError(
                f"CocoEvaluator: the data set, a {type(dataset).__name__}, has no "
                f"{', '.join(missing)}. Use vitdet.data.datasets.coco_dataset(json, images)."
            )
        if not Path(dataset.json_file).is_file():
            raise InputError(
                f"{dataset.name}: no annotation file {dataset.json_file} to evaluate by"
            )
        self._output_dir = output_dir
        self._dataset = dataset
        self._max_dets = max_dets
        self._iou_types = iou_types
        self._encoder: ThreadPoolExecutor | None = None
        self._waiting: deque[Future[None]] = deque()
        self.predictions: list[Json] = []
        self.reset()

    @property
    def metric_names(self) -> list[str]:
        """What `evaluate` may give, "bbox/AP" and so on; masks count when the model has them."""
        lvis = self._dataset.style == "lvis"
        kinds = ["", "50", "75", *"sml", *("rcf" if lvis else "")]
        limits = {self._max_dets} | (set() if lvis else {n for n in (1, 10) if n < self._max_dets})
        names = [f"AP{kind}" for kind in kinds] + [f"AR{n}" for n in (*sorted(limits), *"sml")]
        tasks = self._iou_types or ("bbox", "segm")
        return [f"{task}/{name}" for task in tasks for name in names]

    def reset(self) -> None:
        """Forget all predictions."""
        self._stop_encoder()
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
        masks: list[tuple[Any, list[Json]]] = []
        for record, output in zip(inputs, outputs, strict=True):
            instances = output["instances"].to("cpu")
            results = _to_results(instances, record["image_id"], self._dataset)
            self._seen.append(record["image_id"])
            self._results += results
            if instances.has("pred_masks"):
                masks.append((instances.pred_masks.numpy(), results))
        if masks:
            self._masks = True
            self._encoder = self._encoder or ThreadPoolExecutor(1, thread_name_prefix="masks")
            self._waiting.append(self._encoder.submit(_add_masks, masks))
        self._wait(_WAITING)

    def _wait(self, left: int) -> None:
        """Wait until the masks of at most `left` calls are not encoded; raise what went wrong."""
        while len(self._waiting) > left:
            self._waiting.popleft().result()

    def _stop_encoder(self) -> None:
        # processes that read images should not be forked beside a thread
        if self._encoder is not None:
            self._encoder.shutdown(cancel_futures=True)
        self._encoder = None
        self._waiting.clear()

    def evaluate(self) -> OrderedDict[str, Json]:
        """Score what all processes collected.

        Returns:
            {"bbox": metrics, "segm": metrics}, metrics in percent: AP, AP50, AP75, APs, APm, APl,
            AR..., for LVIS APr, APc, APf, and `per_class` {name: AP}; nan where nothing counts.
            Empty in processes other than the main one, and for files without annotations.

        Raises:
            InputError: not every image of the data set, and only these, once; in every process.
        """
        self._wait(0)
        self._stop_encoder()
        seen = distributed.all_gather_object((self._seen, self._masks))
        self._check_seen([image for images, _ in seen for image in images])
        gathered = distributed.gather_object(self._results)  # the main process alone needs them
        if not distributed.is_main():
            return OrderedDict()
        self.predictions = results = list(chain.from_iterable(gathered))
        if self._output_dir is not None:
            Path(self._output_dir).mkdir(parents=True, exist_ok=True)
            text = json.dumps(results)
            write_text(Path(self._output_dir) / "coco_instances_results.json", text)
        truth = self._dataset.truth or read_truth(self._dataset.json_file)
        if "annotations" not in truth:
            logger.warning("%s has no annotations: nothing to score", self._dataset.json_file)
            return OrderedDict()
        masks = any(flag for _, flag in seen)
        iou_types = self._iou_types or (("bbox", "segm") if masks else ("bbox",))
        return OrderedDict((kind, self._score(truth, results, kind)) for kind in iou_types)

    def _score(self, truth: Json, results: list[Json], iou_type: str) -> Json:
        data = self._dataset
        images = {record["image_id"] for record in data.records}
        rules = (iou_type, self._max_dets, data.style, images)
        made = evaluated(truth, results, *rules, encoded_here=True)
        scores = metrics(made, truth, data.style)
        by_id = scores.pop("per_category_AP")
        classes = zip(data.class_names, data.class_ids, strict=True)
        per_class = {name: 100 * by_id[category] for name, category in classes}
        return {name: 100 * value for name, value in scores.items()} | {"per_class": per_class}

    def _check_seen(self, seen: list[int]) -> None:
        wanted = Counter({record["image_id"]: 1 for record in self._dataset.records})
        counts = Counter(seen)
        if odd := sorted((wanted - counts) + (counts - wanted)):
            raise InputError(
                f"evaluation on {self._dataset.name}: expected predictions for each of its "
                f"{len(wanted)} images once, got {counts[odd[0]]} for image {odd[0]} (and other "
                f"numbers for {len(odd) - 1} more). Evaluate with the loader of the same data set."
            )


def _to_results(instances: Any, image_id: int, dataset: Any) -> list[Json]:
    """Turn detectron2 Instances into COCO results with boxes XYWH, without masks."""
    boxes = instances.pred_boxes.tensor.clone()
    boxes[:, 2:] -= boxes[:, :2]
    classes = instances.pred_classes.tolist()
    if classes and max(classes) >= len(dataset.class_ids):
        text = f"expected a class index below {len(dataset.class_ids)}, as {dataset.name} has "
        text += f"classes, got {max(classes)}. Set the model's number of classes to the data set's."
        raise InputError(f"prediction for image {image_id}: {text}")
    return [
        {"image_id": image_id, "category_id": dataset.class_ids[c], "bbox": box, "score": score}
        for box, c, score in zip(boxes.tolist(), classes, instances.scores.tolist(), strict=True)
    ]


def _add_masks(masks: Iterable[tuple[Any, list[Json]]]) -> None:
    for pixels, results in masks:
        for result, encoded in zip(results, encode(pixels), strict=True):
            result["segmentation"] = encoded
