"""Evaluation: a detector's predictions on the test data, an evaluator's results, their table."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from omegaconf import DictConfig
from torch import nn

from vitdet.config import instantiate
from vitdet.engine.log import clock
from vitdet.engine.losses import check_image_sizes
from vitdet.engine.parallel import gathered
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import is_main
from vitdet.utils.files import write_text
from vitdet.utils.precision import autocast_dtype

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, Any]]  # task -> metric -> value, and {name: value} of its classes
FLAT = "results"  # the task of an evaluator whose results name none: {"accuracy": 0.5}
PREDICTIONS = "coco_instances_results.json"  # beside results.json, named as detectron2 does
PROGRESS_EVERY = 20.0  # seconds between two lines of a long evaluation


def build_dataset(node: DictConfig) -> Any:
    """Build a data set; it may be of any class with a `name` and `class_names`.

    Raises:
        InputError: it has not got them, as detectron2's lists of records have not.
    """
    dataset = instantiate(node)
    missing = [name for name in ("name", "class_names") if not hasattr(dataset, name)]
    if missing:
        raise InputError(
            f"data set: a {type(dataset).__name__} has no {' and no '.join(missing)}. Use "
            "vitdet.data.datasets.coco_dataset(json, images), or a class of your own that has them."
        )
    return dataset


class TestSet:
    """The test half of `cfg.dataloader`: data set, loader, evaluator."""

    def __init__(self, cfg: DictConfig, expected_classes: tuple[str, ...] | None = None) -> None:
        self.dataset = build_dataset(cfg.dataloader.test.dataset)
        self.name = str(self.dataset.name)
        self.class_names = tuple(self.dataset.class_names)
        if expected_classes is not None and self.class_names != expected_classes:
            theirs, ours = (
                f"{len(names)}: {', '.join(names[:5])}, ..."
                for names in (expected_classes, self.class_names)
            )
            raise InputError(
                f"classes of the test data {self.name}: expected those of the training data "
                f"({theirs}), got {ours} Give both json files the same categories in the same "
                "order."
            )
        records = getattr(self.dataset, "records", None)
        if records and not any(record.get("annotations") for record in records):
            logger.warning("test data %s: no objects, so no score will be a number", self.name)
        # Built at once: a mistake in them should not show after the training.
        self.loader = instantiate(cfg.dataloader.test, dataset=self.dataset)
        self.evaluator = instantiate(cfg.dataloader.evaluator, dataset=self.dataset)

    def evaluate(self, detector: nn.Module, precision: str, prefix: str = "") -> Results:
        """Run the detector over the test images, print the AP table, return the results.

        `prefix` is put before the names of the tasks: "ema/" makes "bbox" to "ema/bbox".
        """
        found = run_evaluator(detector, self.loader, self.evaluator, precision)
        results = {f"{prefix}{task}": values for task, values in found.items()}
        if is_main():
            logger.info("%s\n%s", self.name, ap_table(results))
        return results


def write_results(output_dir: Path, test: TestSet, source: str, results: Results) -> None:
    """Write the last evaluation: AP and of which file, and the predictions, which a report shows.

    With a moving average they are those of the average, which is evaluated last.
    """
    if not is_main():
        return
    content = {"dataset": test.name, "checkpoint": source, "results": _json_ready(results)}
    write_text(output_dir / "results.json", json.dumps(content, indent=1) + "\n")
    predictions = getattr(test.evaluator, "predictions", None)  # one of your own may keep none
    if predictions is not None:
        write_text(output_dir / PREDICTIONS, json.dumps(predictions) + "\n")


def _json_ready(value: Any) -> Any:
    """JSON has no NaN (the AP of a class without instances): it becomes null."""
    if isinstance(value, Mapping):
        return {key: _json_ready(item) for key, item in value.items()}
    return float(value) if math.isfinite(value) else None


# --- predictions ---------------------------------------------------------------------------------


def run_evaluator(detector: nn.Module, loader: Any, evaluator: Any, precision: str) -> Results:
    """Feed a detector's predictions to an evaluator with detectron2's DatasetEvaluator API.

    The detector's training or evaluation mode is what it was before when this returns.

    Returns:
        What the evaluator does, {task: {metric: number or {class: number}}}; numbers without a task
        stand under "results". What is no number is left out.
    """
    device = next(detector.parameters()).device
    dtype = autocast_dtype(precision, device)
    was_training = detector.training
    detector.eval()
    evaluator.reset()
    try:
        with gathered(detector):
            for batch in _logged(loader):
                evaluator.process(batch, infer(detector, batch, dtype))
    finally:
        detector.train(was_training)
    return _by_task(evaluator.evaluate() or {})


def _by_task(found: Mapping[str, Any]) -> Results:
    results: Results = {}
    left_out = []
    for task, values in found.items():
        of, named = (task, values) if isinstance(values, Mapping) else (FLAT, {task: values})
        numbers = {str(metric): _number(value) for metric, value in named.items()}
        left_out += [f"{task}/{metric}" for metric, value in numbers.items() if value is None]
        good = {metric: value for metric, value in numbers.items() if value is not None}
        results.setdefault(str(of), {}).update(good)
    if left_out:
        logger.warning("results that are no numbers are left out: %s", ", ".join(left_out))
    return results


def _number(value: Any) -> float | dict[str, float] | None:
    """A number, or numbers by class, as Python's own; None for anything else."""
    if isinstance(value, Mapping):
        numbers = {str(name): _number(each) for name, each in value.items()}
        return {name: each for name, each in numbers.items() if isinstance(each, float)}
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, Real) else None


def _logged(loader: Any) -> Iterator[list[dict[str, Any]]]:
    """Pass the batches of this process through; the main one logs how far it is."""
    started = logged = time.monotonic()
    # a loader of one's own may not know its length
    total = len(loader) if hasattr(loader, "__len__") else None
    for number, batch in enumerate(loader, start=1):
        yield batch
        now = time.monotonic()
        if is_main() and now - logged >= PROGRESS_EVERY:
            logged = now
            far = f"{number} batches"
            if total is not None:
                left = (now - started) / number * (total - number)
                far = f"{number}/{total} batches  eta {clock(left)}"
            logger.info("evaluated %s", far)


@torch.inference_mode()
def infer(
    detector: nn.Module, batch: list[dict[str, Any]], dtype: torch.dtype | None
) -> list[dict[str, Any]]:
    """Return the outputs of a detector in evaluation mode, one an input, in float32.

    Args:
        detector: in evaluation mode.
        batch: model inputs.
        dtype: of autocast (see `vitdet.utils.precision`), None for none.
    """
    check_image_sizes(detector, batch)
    device = next(detector.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        outputs = detector(batch)
    return [_in_fp32(output) for output in outputs]


def _in_fp32(output: Any) -> Any:
    """NumPy, and so every evaluator, knows no bfloat16. Outputs may be of any kind of model."""
    if isinstance(output, torch.Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    if isinstance(output, Instances):
        return Instances(output.image_size, **_in_fp32(output.get_fields()))
    if isinstance(output, Boxes):
        return Boxes(_in_fp32(output.tensor))
    if isinstance(output, dict):
        return {key: _in_fp32(value) for key, value in output.items()}
    if type(output) in (list, tuple):
        return type(output)(_in_fp32(value) for value in output)
    return output


def ap_table(results: Results) -> str:
    """Return the numbers of each task, of those with AP (percent) the APs, as a table."""
    if not results:
        return "(no results)"
    rows = {}
    for task, values in results.items():
        numbers = {key: value for key, value in values.items() if isinstance(value, Real)}
        aps = {key: value for key, value in numbers.items() if key.startswith("AP")}
        rows[task] = {key: f"{value:.2f}" for key, value in (aps or numbers).items()}
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    first = max(8, *(len(task) + 1 for task in rows))
    lines = ["".join([" " * first, *(f"{key:>{max(8, len(key) + 1)}}" for key in columns)])]
    for task, row in rows.items():
        cells = (f"{row.get(key, ''):>{max(8, len(key) + 1)}}" for key in columns)
        lines.append(f"{task:>{first}}{''.join(cells)}")
    return "\n".join(line.rstrip() for line in lines)


def flatten(results: Results) -> dict[str, float]:
    """{"bbox": {"AP": 1.0}} -> {"bbox/AP": 1.0}; what is not a number (per class) stays out."""
    return {
        f"{task}/{key}": float(value)
        for task, values in results.items()
        for key, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
