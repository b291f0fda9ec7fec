"""Run a detector over test data and hand its predictions to an evaluator."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.structures import Instances
from omegaconf import DictConfig
from torch import nn

from vitdet.config import instantiate
from vitdet.engine.logs import clock
from vitdet.engine.losses import check_image_sizes
from vitdet.engine.parallel import gathered
from vitdet.utils.checks import fail
from vitdet.utils.distributed import is_main
from vitdet.utils.precision import autocast_dtype

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, Any]]
PROGRESS_EVERY = 20.0  # seconds between two lines of a long evaluation


def build(node: DictConfig, **parts: Any) -> Any:
    """Instantiate a config node, with some of its arguments given as finished objects."""
    described = {key: node[key] for key in node if key not in parts}
    return instantiate({**described, **parts})


class TestSet:
    """The test half of `cfg.dataloader`: data set, loader, evaluator."""

    def __init__(self, cfg: DictConfig, expected_classes: tuple[str, ...] | None = None) -> None:
        self.dataset = build(cfg.dataloader.test.dataset)
        self.name = str(self.dataset.name)
        self.class_names = tuple(self.dataset.class_names)
        if expected_classes is not None and self.class_names != expected_classes:
            fail(
                f"classes of the test data {self.name}",
                expected=f"those of the training data ({len(expected_classes)}: "
                f"{', '.join(expected_classes[:5])}, ...)",
                got=f"{len(self.class_names)}: {', '.join(self.class_names[:5])}, ...",
                remedy="Give both json files the same categories in the same order.",
            )
        # Built at once: a mistake in them should not show after the training.
        self.loader = build(cfg.dataloader.test, dataset=self.dataset)
        self.evaluator = build(cfg.dataloader.evaluator, dataset=self.dataset)

    def evaluate(self, detector: nn.Module, precision: str, prefix: str = "") -> Results:
        """Run the detector over the test images, print the AP table, return the results.

        `prefix` is put before the names of the tasks: "ema/" makes "bbox" to "ema/bbox".
        """
        found = run_evaluator(detector, self.loader, self.evaluator, precision)
        results = {f"{prefix}{task}": values for task, values in found.items()}
        if is_main():
            logger.info("%s\n%s", self.name, ap_table(results))
        return results


def run_evaluator(detector: nn.Module, loader: Any, evaluator: Any, precision: str) -> Results:
    """Feed a detector's predictions to an evaluator with detectron2's DatasetEvaluator API.

    The detector's training or evaluation mode is what it was before when this returns.
    """
    device = next(detector.parameters()).device
    dtype = autocast_dtype(precision, device)
    was_training = detector.training
    detector.eval()
    evaluator.reset()
    try:
        with gathered(detector):
            for batch in _told(loader):
                evaluator.process(batch, infer(detector, batch, dtype))
    finally:
        detector.train(was_training)
    return dict(evaluator.evaluate() or {})


def _told(loader: Any) -> Iterator[list[dict[str, Any]]]:
    """Pass the batches of this process through; the main one logs how far it is."""
    started = told = time.monotonic()
    # a loader of one's own may not know its length
    total = len(loader) if hasattr(loader, "__len__") else None
    for number, batch in enumerate(loader, start=1):
        yield batch
        now = time.monotonic()
        if is_main() and now - told >= PROGRESS_EVERY:
            told = now
            far = f"{number} batches"
            if total is not None:
                left = (now - started) / number * (total - number)
                far = f"{number}/{total} batches  eta {clock(left)}"
            logger.info("evaluated %s", far)


@torch.inference_mode()
def infer(
    detector: nn.Module, batch: list[dict[str, Any]], dtype: torch.dtype | None
) -> list[dict[str, Any]]:
    """Return a detector's outputs, one an input, in float32 whatever it computes in.

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


def _in_fp32(output: dict[str, Any]) -> dict[str, Any]:
    """NumPy, and so every evaluator, knows no bfloat16."""
    found: Instances = output["instances"]
    fields = {
        name: value.float()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in found.get_fields().items()
    }
    return {**output, "instances": Instances(found.image_size, **fields)}


def ap_table(results: Results) -> str:
    """Return the AP numbers (percent) as a table, one row a task."""
    if not results:
        return "(no results)"
    columns = [key for key in next(iter(results.values()), {}) if key.startswith("AP")]
    rows = [["", *columns]]
    for task, values in results.items():
        rows.append([task, *(f"{values.get(key, math.nan):.2f}" for key in columns)])
    first = max(8, *(len(row[0]) + 1 for row in rows))
    return "\n".join(
        f"{row[0]:>{first}}" + "".join(f"{cell:>8}" for cell in row[1:]) for row in rows
    )


def flatten(results: Results) -> dict[str, float]:
    """{"bbox": {"AP": 1.0}} -> {"bbox/AP": 1.0}; what is not a number (per class) stays out."""
    return {
        f"{task}/{key}": float(value)
        for task, values in results.items()
        for key, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }
