"""How long a training is: epochs and shares of it become images, once the data are read."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any, TypeGuard

from omegaconf import DictConfig

from vitdet.lazy_calls import arguments
from vitdet.utils.checks import InputError

logger = logging.getLogger(__name__)

PERIODS = ("checkpoint_every", "eval_every")  # of `train`: images, or a share such as "10%"


def check_length(train: DictConfig) -> None:
    """Raise an InputError for epochs or periods that cannot be right, before data are read."""
    epochs = train.get("epochs")
    if epochs is not None and not (_is_number(epochs) and 0 < epochs < math.inf):
        raise InputError(f"train.epochs: expected a number above 0 or null, got {epochs!r}.")
    if not (_is_number(train.num_images) and 1 <= train.num_images < math.inf):
        got = f"expected a number of images, got {train.num_images!r}"
        raise InputError(f"train.num_images: {got}. train.epochs=N is N times the data.")
    for key in PERIODS:
        _images(key, train[key], 100)


def set_length(cfg: DictConfig, dataset: Any) -> None:
    """Set the images of the training and of its periods in the recipe.

    With `train.epochs` the training sees the data so many times, and its periods change in
    proportion. Schedules are shares of the training and need no change.

    Raises:
        InputError: epochs of no images.
    """
    train = cfg.train
    own = train.num_images
    if train.get("epochs") is not None:
        epoch = images_an_epoch(cfg, dataset)
        train.num_images = round(train.epochs * epoch)
        if train.num_images < 1:
            raise InputError(f"train.epochs: {train.epochs} of {epoch} images is no image.")
        logger.info("%g epochs of %d images: %d images", train.epochs, epoch, train.num_images)
    for key in PERIODS:
        images = _images(key, train[key], train.num_images)
        if not isinstance(train[key], str):
            images *= train.num_images / own
        train[key] = max(round(images), 1) if images else 0
    if text := lr_rules(cfg):
        logger.info("%s", text)


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


def _images(key: str, value: Any, length: int) -> float:
    """Return the images of a period in a training of `length` images."""
    number = value
    if isinstance(value, str) and value.endswith("%"):
        with contextlib.suppress(ValueError):
            number = float(value[:-1]) / 100 * length
    if not _is_number(number) or not 0 <= number < math.inf:
        got = f'expected images or a share such as "10%", got {value!r}'
        raise InputError(f"train.{key}: {got}. 0 means never.")
    return number


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
