"""Durations of a recipe: a number of images, or text in epochs, iterations or a share.

"12 epochs", "500 iterations" and "80%" say what a number of images would be for a data set and a
batch; `vitdet.engine.durations` puts that number in their place once both are known.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from vitdet.utils.checks import fail, nearest

# Where a recipe has one. "schedule.milestones" is a list of them.
LENGTH = "train.num_images"
PERIODS = ("train.checkpoint_every", "train.eval_every")
POINTS = ("schedule.num_images", "schedule.milestones", "schedule.warmup")
KEYS = (LENGTH, *PERIODS, *POINTS)

_UNITS = {
    "image": "images",
    "images": "images",
    "iteration": "iterations",
    "iterations": "iterations",
    "epoch": "epochs",
    "epochs": "epochs",
    "%": "%",
}
_FORM = re.compile(r"\s*([-+.\d]+(?:[eE][-+]?\d+)?)\s*([^\d\s.+-][^\d]*?)?\s*")
_EXPECTED = 'a number of images, or text such as "12 epochs", "500 iterations" or "80%"'


class Duration(NamedTuple):
    """So many images, iterations, epochs, or percent ("%") of the training."""

    value: float
    unit: str

    def images(self, *, epoch: float, batch: int, whole: float) -> float:
        """Return the duration in images.

        Args:
            epoch: images that the training data has.
            batch: images a step, over all processes.
            whole: images of the training, for a share of it.
        """
        sizes = {"images": 1.0, "iterations": batch, "epochs": epoch, "%": whole / 100}
        return self.value * sizes[self.unit]


def is_duration(key: str) -> bool:
    """Whether the value at a dotted key of a recipe is a duration, or a list of them."""
    return any(key == name or key.startswith(f"{name}.") for name in KEYS)


def parse(key: str, value: Any) -> Duration:
    """Read one duration.

    Args:
        key: its place in the recipe, for the error message.
        value: a number of images, or text.

    Raises:
        InputError: no duration; names the nearest form.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = Duration(value, "images")
    elif isinstance(value, str) and (form := _FORM.fullmatch(value)):
        found = _of_text(key, value, form[1], form[2] or "images")
    else:
        fail(key, expected=_EXPECTED, got=repr(value), remedy="Write one of these.")
    if not math.isfinite(found.value) or found.value < 0:
        fail(key, expected=_EXPECTED, got=repr(value), remedy="It cannot be negative or endless.")
    if key == LENGTH and found.unit == "%":
        remedy = "Give the length itself in epochs, iterations or images."
        fail(key, expected="a length of its own", got=repr(value), remedy=remedy)
    return found


def _of_text(key: str, text: str, number: str, unit: str) -> Duration:
    try:
        value = float(number)
    except ValueError:
        fail(key, expected=_EXPECTED, got=repr(text), remedy=f"{number!r} is no number.")
    if unit not in _UNITS:
        close = nearest(unit.lower(), _UNITS)
        remedy = f"Did you mean {f'{number}%' if close == '%' else f'{number} {close}'!r}?"
        if close is None:
            remedy = f"Units are {', '.join(dict.fromkeys(_UNITS.values()))}."
        fail(key, expected=_EXPECTED, got=repr(text), remedy=remedy)
    return Duration(value, _UNITS[unit])
