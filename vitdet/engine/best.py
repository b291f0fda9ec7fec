"""Evaluations during a training: the best weights are kept, and it ends when nothing improves.

They happen at checkpoints, so the best weights are a second name of one. What is best, and when to
stop, are functions of all results so far: a resumed run decides as one that never stopped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vitdet.engine.checkpoints import Checkpoints, due
from vitdet.engine.evaluate import Results, flatten
from vitdet.engine.log import IMAGES, read_metrics
from vitdet.engine.trainer import Hook, Trainer
from vitdet.utils.checks import InputError, nearest
from vitdet.utils.distributed import broadcast_object, is_main

logger = logging.getLogger(__name__)


class Evaluations(Hook):
    """Evaluate every so many images, keep the best weights, and stop when nothing improves.

    A checkpoint of the same step is written first: whatever ends the evaluation loses nothing.
    Checkpoints hold the results of the evaluations before them; those at a checkpoint's own step
    stand in metrics.json. The higher a metric the better. An evaluation without a number for it
    (no object of that kind) counts as no improvement.

    Args:
        train: the recipe's, periods in images.
        total_batch_size: images a step over all processes.

    Attributes:
        values: {images seen: {"bbox/AP": ...}} of all evaluations.

    Raises:
        InputError: values that cannot be right.
    """

    checkpoints: Checkpoints  # set before the training begins, and
    evaluate: Callable[[], Results]  # evaluates, prints, writes metrics; back to training mode

    def __init__(self, train: Any, total_batch_size: int) -> None:
        self.train = train
        self.total_batch_size = total_batch_size
        self.values: dict[int, dict[str, float]] = {}
        self._latest: Results | None = None  # of the last step, if it was evaluated
        stopping = train.early_stopping
        if stopping is None:
            return
        what = "train.early_stopping"
        if stopping.patience < 1:
            got = f"expected a number of evaluations, at least 1, got {stopping.patience}"
            raise InputError(f"{what}.patience: {got}.")
        if not 0 <= stopping.min_delta < math.inf:
            got = f"expected 0 or a positive number, got {stopping.min_delta}"
            raise InputError(f"{what}.min_delta: {got}.")
        if train.eval_every in (0, "0%"):
            raise InputError(f"{what}: there is no evaluation, as train.eval_every is 0.")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it: nothing before the first evaluation."""
        found = [{IMAGES: n, "values": each} for n, each in sorted(self.values.items())]
        return {"evaluations": found} if found else {}

    def load_state_dict(self, state: dict[str, Any], images_seen: int) -> None:
        """Continue from a checkpoint's content.

        Raises:
            InputError: it holds something else.
        """
        try:
            listed = state.get("evaluations", ())
            known = {int(each[IMAGES]): dict(each["values"]) for each in listed}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            what = "its evaluations are no list of results"
            raise InputError(f"checkpoint: {what} ({error}).") from error
        lines = broadcast_object(read_metrics(Path(self.train.output_dir)) if is_main() else [])
        for line in lines:
            if line.pop(IMAGES) == images_seen and "total_loss" not in line:  # no step's
                known[images_seen] = line
        self.values = {n: each for n, each in known.items() if n <= images_seen}

    def before_train(self, trainer: Trainer) -> int:
        """Return until where to train, after a resume to a step whose evaluation was not done."""
        images, goal = trainer.images_seen, self.train.num_images
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
        if self._latest is not None:
            return self._latest
        images = trainer.images_seen
        self.checkpoints.ensure(trainer)
        results = self.evaluate()
        names = [
            f"{task}/{key}"
            for task, values in results.items()
            for key, value in values.items()
            if isinstance(value, int | float)  # also one that is not a number this time
        ]
        # Only the main process has numbers, and all must decide alike.
        values, names = broadcast_object((flatten(results), names))
        self._check_names(names)
        # what a run that has gone back found after this no longer counts
        self.values = {n: each for n, each in self.values.items() if n < images} | {images: values}
        self._keep_best(images)
        self._latest = results
        return results

    def check_evaluator(self, evaluator: object) -> None:
        """Check the recipe's metrics before the training if an evaluator says what it may give.

        Raises:
            InputError: it does not give one of them.
        """
        names = list(getattr(evaluator, "metric_names", ()))
        averages = [f"ema/{name}" for name in names if self.train.ema_decay is not None]
        self._check_names(names + averages)

    def _check_names(self, found: Iterable[str]) -> None:
        names, stopping = sorted(found), self.train.early_stopping
        wanted = {"train.best_metric": self.train.best_metric}
        if stopping is not None:
            wanted["train.early_stopping.metric"] = stopping.metric
        for key, name in wanted.items():
            if name is not None and names and name not in names:
                raise InputError(
                    f"{key}: expected a metric of the evaluation ({', '.join(names)}), got {name}. "
                    f"Did you mean {nearest(name, names) or names[0]}?"
                )

    def _keep_best(self, images: int) -> None:
        """Keep the weights of this moment if their evaluation is above all before it."""
        metric = self.train.best_metric
        if metric is None:
            return
        found = {n: each.get(metric, -math.inf) for n, each in self.values.items()}
        value = found.pop(images)
        before = max((other for n, other in found.items() if n < images), default=-math.inf)
        if value == -math.inf:
            logger.warning(
                "train.best_metric=%s: the evaluation after %d images gives no number for it (the "
                "test data may have nothing of the kind), so these weights are not the best",
                *(metric, images),
            )
        elif value > before:
            said = "none" if before == -math.inf else f"{before:.4f}"
            text = "best %s so far: %.4f after %d images (before: %s)"
            logger.info(text, metric, value, images, said)
            self.checkpoints.keep_best()

    def _stop(self) -> bool:
        """Whether to stop after these results."""
        stopping = self.train.early_stopping
        if stopping is None:
            return False
        metric, least = stopping.metric, stopping.min_delta
        best, best_at, since = -math.inf, 0, 0
        for images, values in sorted(self.values.items()):
            value = values.get(metric, -math.inf)
            if value > best + least:
                best, best_at, since = value, images, 0
            else:
                since += 1
        if since < stopping.patience:
            return False
        if best == -math.inf:
            logger.warning(
                "early stopping: %d evaluations without a number for %s: the test data may have "
                "nothing of the kind, or train.early_stopping.metric is to be another one",
                *(since, metric),
            )
        else:
            text = "early stopping: %d evaluations without %s more than %g above %.4f"
            logger.info(f"{text} (after %d images)", since, metric, least, best, best_at)
        return True
