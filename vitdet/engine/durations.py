"""From what a recipe says of durations and of its batch to images and learning rates.

A recipe counts images. It may say text instead ("12 epochs", "500 iterations", "80%"), and
`train.epochs` stretches a whole recipe to another data set: the schedule keeps its shape over the
epochs. See `vitdet.utils.durations` for the text.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from vitdet.lazy_calls import arguments
from vitdet.utils.checks import fail
from vitdet.utils.durations import KEYS, LENGTH, PERIODS, Duration, parse

logger = logging.getLogger(__name__)


def images_an_epoch(cfg: DictConfig, dataset: Any) -> int:
    """Return how many images of the training data a run draws from.

    Those without objects do not count when the loader leaves them out (`filter_empty`). Images that
    repeat-factor sampling repeats count once, as in the published lengths ("100 epochs" of LVIS).
    """
    records = dataset.records
    node = cfg.dataloader.train
    if not node.get("filter_empty", arguments(node).get("filter_empty", False)):
        return len(records)
    return sum(
        any(not each.get("iscrowd", 0) for each in record.get("annotations", ()))
        for record in records
    )


def resolve(cfg: DictConfig, dataset: Any) -> dict[str, str]:
    """Turn every duration of a recipe into images, in place; log what became of text and batch.

    With `train.epochs` the training sees the data so many times, and every duration that is a
    number changes in proportion to the recipe's own length. Text keeps its meaning.

    Args:
        cfg: a recipe.
        dataset: the training data.

    Returns:
        {key: "80% = 9600 images"} of what was not a number of images in the recipe.

    Raises:
        InputError: a duration that is none, no images, epochs that are no positive number.
    """
    batch = cfg.dataloader.train.total_batch_size
    written = _durations(cfg)
    epochs = _epochs(cfg)
    by_epoch = epochs is not None or any(each.unit == "epochs" for _, each in _flat(written))
    epoch = _counted(cfg, dataset) if by_epoch else 0
    (length,) = written[LENGTH]
    own = round(length.images(epoch=epoch, batch=batch, whole=math.nan))
    whole = own if epochs is None else round(epochs * epoch)
    if whole < 1:
        fail(LENGTH, expected="at least one image", got=whole, remedy="Train longer.")

    def images(key: str, each: Duration) -> int | float:
        if key == LENGTH:
            return whole
        found = each.images(epoch=epoch, batch=batch, whole=whole)
        if each.unit == "images":
            found = found if whole == own else found * whole / own
        least = 1 if key in PERIODS and found > 0 else 0
        return max(round(found), least)

    notes = {}
    for key, durations in written.items():
        old = OmegaConf.select(cfg, key)
        new = [images(key, each) for each in durations]
        several = isinstance(old, ListConfig)
        before = list(old) if several else [old]
        if before == new:
            continue
        OmegaConf.update(cfg, key, new if several else new[0])
        notes[key] = f"{', '.join(map(str, before))} = {', '.join(map(str, new))} images"
    if epochs is not None:
        notes["train.epochs"] = f"{epochs:g} x {epoch} images = {whole} images"
    for key, text in notes.items():
        logger.info("%s: %s", key, text)
    if rules := lr_rules(cfg):
        logger.info("%s", rules)
    return notes


def check(cfg: DictConfig) -> None:
    """Look at the text of every duration, without any data.

    Raises:
        InputError: a duration that is none, epochs that are no positive number.
    """
    _durations(cfg)
    _epochs(cfg)


def _durations(cfg: DictConfig) -> dict[str, list[Duration]]:
    found: dict[str, list[Duration]] = {}
    for key in KEYS:
        part, _, name = key.partition(".")
        if OmegaConf.is_interpolation(cfg[part], name):  # of the length, which is read itself
            continue
        value = OmegaConf.select(cfg, key)
        if value is None:  # a schedule without it
            continue
        several = isinstance(value, ListConfig)
        if several is not (key == "schedule.milestones"):
            expected = "a list of durations" if not several else "one duration"
            fail(key, expected=expected, got=repr(value), remedy="Write [a, b] for a list.")
        items = list(value) if several else [value]
        found[key] = [parse(key, item) for item in items]
    return found


def _flat(durations: dict[str, list[Duration]]) -> Iterable[tuple[str, Duration]]:
    return ((key, each) for key, values in durations.items() for each in values)


def _epochs(cfg: DictConfig) -> float | None:
    value = cfg.train.get("epochs")
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        remedy = "It stretches every duration of the recipe; null leaves them as they are."
        fail("train.epochs", expected="a number above 0", got=repr(value), remedy=remedy)
    return value


def _counted(cfg: DictConfig, dataset: Any) -> int:
    epoch = images_an_epoch(cfg, dataset)
    if epoch < 1:
        fail(
            f"an epoch of {dataset.name}",
            expected="images to train on",
            got="none",
            remedy="Give the durations in images, or data with objects.",
        )
    return epoch


def lr_rules(cfg: DictConfig) -> str:
    """Return what the usual rules make of the learning rate for another batch, "" for the same.

    `train.reference_batch` is the batch that the recipe's lr is for. The linear rule is that of
    "Accurate, Large Minibatch SGD" (Goyal et al. 2017); the square root is usual with Adam ("On the
    SDEs and Scaling Rules for Adaptive Gradient Algorithms", Malladi et al. 2022). Nothing changes.
    """
    batch, reference = cfg.dataloader.train.total_batch_size, cfg.train.get("reference_batch")
    lr = cfg.optimizer.get("lr")
    if not reference or batch == reference or not isinstance(lr, int | float):
        return ""
    share = batch / reference
    return (
        f"a step has {batch} images, and the recipe is made for {reference}; optimizer.lr={lr:g} "
        f"is left as it is. If that is the rate for {reference}, the linear rule has "
        f"{lr * share:.3g}, the square-root rule {lr * math.sqrt(share):.3g}"
    )
