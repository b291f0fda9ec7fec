"""The score from which a detection counts: found by evaluation, kept in files, used by predicting.

It is the threshold with the largest F1, 2 right / (detections + objects), at an IoU of 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from vitdet.utils.checks import InputError, one_line

DEFAULT = 0.5  # where none was found
FEWEST = 5  # objects of a class that has a threshold of its own
KEY = "thresholds"  # in checkpoints, of {"model": ..., "ema": ...}
_MOST = 6  # classes in a line


class Thresholds(NamedTuple):
    """Over all classes, and of each; `by_class` is empty where a person gave one for all."""

    over_all: float
    by_class: Mapping[str, float]
    found: bool = True

    def of(self, class_names: Sequence[str]) -> tuple[float, ...]:
        """Return the threshold of each class."""
        return tuple(self.by_class.get(name, self.over_all) for name in class_names)

    def note(self) -> dict[str, Any]:
        """Return what a file of these weights alone keeps, {} where none were found."""
        kept = {"over_all": self.over_all, "by_class": dict(self.by_class)}
        return {KEY: {"model": kept}} if self.found else {}

    def text(self) -> str:
        """Say them in words."""
        if not self.found:
            return f"{self.over_all:g}, as no evaluation found one"
        own = [(n, value) for n, value in self.by_class.items() if value != self.over_all]
        if not own:
            return f"{self.over_all:.2g}"
        shown = ", ".join(f"{one_line(name)} {value:.2f}" for name, value in own[:_MOST])
        more = f", {len(own) - _MOST} more" if len(own) > _MOST else ""
        return f"{self.over_all:.2f} ({shown}{more})"


def best(scores: np.ndarray, right: np.ndarray, objects: int) -> float:
    """Return the threshold with the largest F1, nan where no detection is right.

    It is the middle between the least score that counts and the next, which does not; of equals
    the highest.

    Args:
        scores: of the detections.
        right: bool, whether each has found an object.
        objects: how many there are to be found.
    """
    if not right.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], right[order].cumsum()
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + objects)
    f1[:-1][scores[1:] == scores[:-1]] = -1  # equal scores count together
    place = int(f1.argmax())
    return float(np.append(scores, 0.0)[place : place + 2].mean())


def of_results(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a checkpoint keeps of an evaluation, {KEY: ...}; {} where it found none.

    Of boxes and masks it takes the first.
    """
    found: dict[str, Any] = {}
    for task, values in results.items():
        kept = values.get(KEY)
        over_all = kept.get("over_all") if isinstance(kept, Mapping) else None
        if isinstance(over_all, Real) and not math.isnan(over_all):
            found.setdefault("ema" if task.startswith("ema/") else "model", kept)
    return {KEY: found} if found else {}


def chosen(
    given: float | None, note: Mapping[str, Any], which: str = "model", source: str = ""
) -> Thresholds:
    """Return the thresholds that hold: the one that is given, else those of a file, else 0.5.

    Args:
        given: by a person, for all classes.
        note: what this project wrote into the file.
        which: the weights of the file, "model" or "ema".
        source: the file, for the messages.

    Raises:
        InputError: a number that is no score, or something else in the file.
    """
    if given is not None:
        if not 0 <= given <= 1:
            raise InputError(f"threshold: expected a score of 0 to 1, got {given:g}.")
        return Thresholds(given, {})
    all_kept = note.get(KEY, {})
    if isinstance(all_kept, Mapping) and which not in all_kept:
        return Thresholds(DEFAULT, {}, found=False)
    try:
        kept = all_kept[which]
        by_class = {str(name): float(value) for name, value in kept["by_class"].items()}
        made = Thresholds(float(kept["over_all"]), by_class)
        if all(0 <= value <= 1 for value in (made.over_all, *by_class.values())):
            return made
    except (AttributeError, LookupError, TypeError, ValueError):
        pass
    text = "its thresholds are no scores of 0 to 1. Give one with --threshold"
    raise InputError(f"weights {source}: {text}.")
