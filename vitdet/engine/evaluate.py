"""Evaluation: predictions on the test data, an evaluator's results; when, and what follows."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Instances
from omegaconf import DictConfig
from tabulate import tabulate
from torch import nn

from vitdet.config import instantiate
from vitdet.engine.checkpoints import BEST, Checkpoints, due
from vitdet.engine.log import IMAGES, bar, on_terminal, read_metrics
from vitdet.engine.losses import check_image_sizes
from vitdet.engine.parallel import gathered
from vitdet.engine.trainer import Hook, Trainer
from vitdet.utils.checks import InputError, nearest
from vitdet.utils.distributed import broadcast_object, is_main
from vitdet.utils.files import write_text
from vitdet.utils.precision import autocast_dtype
from vitdet.utils.thresholds import of_results

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, Any]]  # task -> metric -> value, and {name: value} of its classes
PREDICTIONS = "coco_instances_results.json"  # beside results.json, named as detectron2 does
_PROGRESS_EVERY = 20  # seconds between two lines of a long evaluation


def build_dataset(node: DictConfig) -> Any:
    """Build a data set; it may be of any class with a `name` and `class_names`.

    Raises:
        InputError: it has not got them, as detectron2's lists of records have not.
    """
    dataset = instantiate(node)
    if not hasattr(dataset, "name") or not hasattr(dataset, "class_names"):
        text = f"data set: a {type(dataset).__name__} has no name and class_names"
        raise InputError(f"{text}. Use vitdet.data.datasets.coco_dataset(json, images).")
    return dataset


class TestSet:
    """The test half of `cfg.dataloader`: data set, loader, evaluator."""

    def __init__(self, cfg: DictConfig, expected_classes: tuple[str, ...] | None = None) -> None:
        self.dataset = build_dataset(cfg.dataloader.test.dataset)
        self.name = str(self.dataset.name)
        self.class_names = tuple(self.dataset.class_names)
        if expected_classes is not None and self.class_names != expected_classes:
            theirs, ours = (
                f"{len(names)} ({', '.join(names[:5])}, ...)"
                for names in (expected_classes, self.class_names)
            )
            text = f"expected those of the training data, {theirs}, in their order, got {ours}"
            raise InputError(f"classes of the test data {self.name}: {text}.")
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
        stand under "results". What is no number is left out, and said.
    """
    device = next(detector.parameters()).device
    dtype = autocast_dtype(precision, device)
    was_training = detector.training
    detector.eval()
    evaluator.reset()
    try:
        with gathered(detector):
            for batch in _watched(loader):
                evaluator.process(batch, infer(detector, batch, dtype))
    finally:
        detector.train(was_training)
    found = _numbers(evaluator.evaluate() or {})
    flat = {name: value for name, value in found.items() if not isinstance(value, dict)}
    tasks = {name: value for name, value in found.items() if isinstance(value, dict)}
    return tasks | ({"results": flat} if flat else {})


def _watched(loader: Any) -> Iterator[Any]:
    """Yield batches and show how far it is: in a bar on a terminal, or in a line now and then."""
    total = len(loader) if hasattr(loader, "__len__") else None  # one of your own may not know
    last = time.monotonic()
    with bar("evaluate", total, loader, disable=not on_terminal()) as batches:
        for number, batch in enumerate(batches, start=1):
            yield batch
            if not on_terminal() and time.monotonic() - last > _PROGRESS_EVERY:
                last = time.monotonic()
                logger.info("evaluated %d/%s batches", number, total or "?")


def _numbers(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return numbers, and numbers in mappings, as Python's own."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found[str(name)] = _numbers(value)
        elif isinstance(value, Real) or (isinstance(value, torch.Tensor) and value.numel() == 1):
            found[str(name)] = float(value)
        else:
            logger.warning("result %s is no number: left out", name)
    return found


@torch.inference_mode()
def infer(
    detector: nn.Module, batch: list[dict[str, Any]], dtype: torch.dtype | None
) -> list[dict[str, Any]]:
    """Return a detector's outputs, one an input, in float32; `dtype` is that of autocast."""
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
    if isinstance(output, dict):
        return {key: _in_fp32(value) for key, value in output.items()}
    if type(output) in (list, tuple):
        return type(output)(_in_fp32(value) for value in output)
    return output


def ap_table(results: Results) -> str:
    """Return the numbers of each task, of those with AP (percent) the APs, as a table."""
    rows = []
    for task, values in results.items():
        numbers = {key: value for key, value in values.items() if isinstance(value, Real)}
        aps = {key: value for key, value in numbers.items() if key.startswith("AP")}
        rows.append({"": task, **(aps or numbers)})
    return tabulate(rows, "keys", "plain", floatfmt=".2f") or "(no results)"


def flatten(results: Results) -> dict[str, float]:
    """{"bbox": {"AP": 1.0}} -> {"bbox/AP": 1.0}; what is not a number (per class) stays out."""
    return {
        f"{task}/{key}": float(value)
        for task, values in results.items()
        for key, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


# --- during a training ---------------------------------------------------------------------------


class Evaluations(Hook):
    """Evaluate every so many images, keep the best weights, and stop when nothing improves.

    A checkpoint of the same step is written first, so whatever ends the evaluation loses nothing,
    and the best weights are a second name of one. What is best, and when to stop, are functions of
    all results in metrics.json: a resumed run decides as one that never stopped. The higher a
    metric the better; none (no object of that kind) is no improvement.

    Attributes:
        values: images seen -> {"bbox/AP": ...} of each evaluation.

    Args:
        train: the recipe's, periods in images.
        total_batch_size: images a step over all processes.
        checkpoints: of the run.
        evaluate: evaluates, prints, writes metrics; back to training mode.
    """

    def __init__(
        self,
        train: Any,
        total_batch_size: int,
        checkpoints: Checkpoints,
        evaluate: Callable[[], Results],
    ) -> None:
        self.train = train
        self.total_batch_size = total_batch_size
        self.checkpoints = checkpoints
        self.evaluate = evaluate
        self.values: dict[int, dict[str, float]] = {}
        self._latest: Results | None = None  # of the last step, if it was evaluated

    def before_train(self, trainer: Trainer) -> int:
        """Return until where to train, after a resume to a step whose evaluation was not done."""
        images, goal = trainer.images_seen, self.train.num_images
        lines = broadcast_object(read_metrics(Path(self.train.output_dir)) if is_main() else [])
        for line in lines:
            if "total_loss" not in line and line[IMAGES] <= images:  # no step's
                self.values[line.pop(IMAGES)] = line
        if images in self.values:
            self._keep_best(images)  # the run may have ended before that was done
        elif 0 < images < goal and due(trainer, self.train.eval_every, self.total_batch_size):
            self.now(trainer)
        return images if self._stop() else goal

    def after_step(self, trainer: Trainer) -> None:
        """Evaluate when it is due and training goes on (the end has its own evaluation)."""
        self._latest = None
        if trainer.images_seen >= trainer.num_images:
            return
        if due(trainer, self.train.eval_every, self.total_batch_size):
            self.now(trainer)
            if self._stop():
                trainer.num_images = trainer.images_seen

    def now(self, trainer: Trainer) -> Results:
        """Return the results of this moment's weights; one evaluation a step is enough."""
        if self._latest is None:
            self.checkpoints.ensure(trainer)
            self._latest = self.evaluate()
            self.checkpoints.add_note(of_results(self._latest))
            # Only the main process has numbers, and all must decide alike.
            self.values[trainer.images_seen] = broadcast_object(flatten(self._latest))
            self._keep_best(trainer.images_seen)
        return self._latest

    @property
    def metric(self) -> str | None:
        """What decides; None where there is none, or nothing yet."""
        if self.train.best_metric != "auto":
            return self.train.best_metric
        names = [name for each in self.values.values() for name in each]
        return next((name for name in names if name.rpartition("/")[2] == "AP"), None)

    def best(self, until: float = math.inf) -> tuple[int, float]:
        """Return images seen and value of the best evaluation up to there; (0, -inf) for none."""
        found = {n: each.get(self.metric or "", -math.inf) for n, each in self.values.items()}
        found = {n: value for n, value in sorted(found.items()) if n <= until}
        images = max(found, key=found.__getitem__, default=0)  # the first of equals
        value = found.get(images, -math.inf)
        return (images, value) if value > -math.inf else (0, value)

    def _keep_best(self, images: int) -> None:
        """Keep the weights of this moment if their evaluation is above all before it."""
        metric = self.metric
        if metric is not None and metric not in self.values[images]:
            text = "train.best_metric=%s: the evaluation after %d images gives no number for it"
            logger.warning(f"{text}, so these weights are not the best", metric, images)
        if (best := self.best(images))[0] == images:
            logger.info("best %s so far: %.2f after %d images: %s", metric, best[1], images, BEST)
            self.checkpoints.keep_best()

    def _stop(self) -> bool:
        """Whether to stop after these results, which is said."""
        best_at, best = self.best()
        since = sum(images > best_at for images in self.values)
        if self.train.patience is None or since < self.train.patience:
            return False
        above = f"{best:.2f} (after {best_at} images)" if best_at else "nothing: none had a number"
        logger.warning("early end: %d evaluations without %s above %s", since, self.metric, above)
        return True


def check_metric(train: Any, evaluator: object) -> None:
    """Raise an InputError for a train.best_metric that an evaluator says it does not give."""
    names = list(getattr(evaluator, "metric_names", ()))
    names += [f"ema/{name}" for name in names if train.ema_decay is not None]
    name = train.best_metric
    if name not in (None, "auto") and names and name not in names:
        text = f"expected auto or a metric of the evaluation ({', '.join(names)}), got {name}"
        close = nearest(name, names) or names[0]
        raise InputError(f"train.best_metric: {text}. Did you mean {close}?")
