"""Which weights are the best, and when more training brings nothing: decided from the results."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from vitdet.utils.checks import fail, nearest

logger = logging.getLogger(__name__)

_STOPPING_KEYS = ("metric", "patience", "min_delta")
_EXAMPLES = ("bbox/AP", "bbox/AP50", "bbox/AP75", "segm/AP", "segm/AP50", "segm/AP75")


class Selection:
    """Functions of the results so far, so that a resumed run decides as one that never stopped.

    The higher a metric the better. An evaluation without a number for it (no object of that kind)
    counts as no improvement.

    Args:
        best_metric: such as "bbox/AP", of the results whose best weights are kept; None for none.
        early_stopping: None, or {"metric": name, "patience": evaluations, "min_delta": value}: stop
            after so many evaluations in a row that were not more than min_delta (default 0) above
            the best before them.
        eval_every: `train.eval_every`.
        average: whether the run has a moving average of the weights, with metrics "ema/...".

    Raises:
        InputError: values that cannot be right.
    """

    def __init__(
        self,
        best_metric: str | None = None,
        early_stopping: Mapping[str, Any] | None = None,
        *,
        eval_every: int = 0,
        average: bool = False,
    ) -> None:
        self.best_metric = best_metric
        self.stopping = None if early_stopping is None else dict(early_stopping)
        self._names: dict[str, str] = {}
        self._average = average
        if best_metric is not None:
            self._names["train.best_metric"] = best_metric
        if self.stopping is not None:
            _check_stopping(self.stopping, eval_every)
            self._names["train.early_stopping.metric"] = self.stopping["metric"]
        for key, name in self._names.items():
            _check_form(key, name, average)

    def check_evaluator(self, evaluator: object) -> None:
        """Check the names before the training if an evaluator says what it may give."""
        names = list(getattr(evaluator, "metric_names", ()))
        self.check_names([*names, *(f"ema/{name}" for name in names if self._average)])

    def check_names(self, found: Iterable[str]) -> None:
        """Raise InputError when an evaluation, which has the metrics `found`, lacks one of ours."""
        names = sorted(found)
        for key, name in self._names.items():
            if names and name not in names:
                close = nearest(name, names)
                fail(
                    key,
                    expected=f"a metric of the evaluation ({', '.join(names)})",
                    got=name,
                    remedy=f"Did you mean {close or names[0]}?",
                )

    def is_best(self, results: Mapping[int, Mapping[str, float]], images_seen: int) -> bool:
        """Whether the evaluation at `images_seen` is above all before it."""
        if self.best_metric is None:
            return False
        values = {n: each.get(self.best_metric, -math.inf) for n, each in results.items()}
        if values[images_seen] == -math.inf:
            logger.warning(
                "train.best_metric=%s: the evaluation after %d images gives no number for it (the "
                "test data may have nothing of the kind), so these weights are not the best",
                *(self.best_metric, images_seen),
            )
            return False
        before = max((v for n, v in values.items() if n < images_seen), default=-math.inf)
        if values[images_seen] <= before:
            return False
        logger.info(
            "best %s so far: %.4f after %d images (before: %s)",
            self.best_metric,
            values[images_seen],
            images_seen,
            "none" if before == -math.inf else f"{before:.4f}",
        )
        return True

    def stop(self, results: Mapping[int, Mapping[str, float]]) -> bool:
        """Whether to stop after these results."""
        if self.stopping is None:
            return False
        metric, patience = self.stopping["metric"], self.stopping["patience"]
        best, best_at, since = -math.inf, 0, 0
        for images, values in sorted(results.items()):
            value = values.get(metric, -math.inf)
            if value > best + self.stopping["min_delta"]:
                best, best_at, since = value, images, 0
            else:
                since += 1
        if since < patience:
            return False
        if best == -math.inf:
            logger.warning(
                "early stopping: %d evaluations without a number for %s: the test data may have "
                "nothing of the kind, or train.early_stopping.metric is to be another one",
                *(since, metric),
            )
            return True
        logger.info(
            "early stopping: %d evaluations without %s more than %g above %.4f (after %d images)",
            since,
            metric,
            self.stopping["min_delta"],
            best,
            best_at,
        )
        return True


def _check_stopping(stopping: dict[str, Any], eval_every: int) -> None:
    unknown = sorted(str(key) for key in stopping.keys() - set(_STOPPING_KEYS))
    missing = [key for key in _STOPPING_KEYS[:2] if key not in stopping]
    if unknown or missing:
        close = nearest(unknown[0], _STOPPING_KEYS) if unknown else None
        fail(
            "train.early_stopping",
            expected="metric, patience and optionally min_delta",
            got=f"{', '.join(missing) or 'nothing'} missing, {', '.join(unknown) or 'nothing'} "
            "unknown",
            remedy=f"Did you mean {close}?" if close else "Correct the recipe.",
        )
    stopping.setdefault("min_delta", 0.0)
    patience, delta = stopping["patience"], stopping["min_delta"]
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
        fail(
            "train.early_stopping.patience",
            expected="a number of evaluations, at least 1",
            got=patience,
            remedy="Each evaluation without improvement counts one.",
        )
    if not isinstance(delta, int | float) or isinstance(delta, bool) or not 0 <= delta < math.inf:
        fail(
            "train.early_stopping.min_delta",
            expected="0 or a positive number",
            got=delta,
            remedy="It is in the metric's unit: percent for AP.",
        )
    if eval_every <= 0:
        fail(
            "train.early_stopping",
            expected="evaluations during the training",
            got=f"train.eval_every={eval_every}",
            remedy="Set train.eval_every to the images between two evaluations.",
        )


def _check_form(key: str, name: str, average: bool) -> None:
    if not isinstance(name, str) or "/" not in name:
        close = nearest(str(name), _EXAMPLES)
        fail(
            key,
            expected="TASK/METRIC as in metrics.json, such as bbox/AP",
            got=name,
            remedy=f"Did you mean {close or 'bbox/AP'}?",
        )
    if name.startswith("ema/") and not average:
        fail(
            key,
            expected="a metric of the weights themselves, as train.ema_decay is not set",
            got=name,
            remedy=f"Use {name.removeprefix('ema/')}, or set train.ema_decay.",
        )
