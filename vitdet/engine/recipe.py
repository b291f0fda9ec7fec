"""A recipe's values against each other, and its length once the data are read."""

from __future__ import annotations

import copy
import logging
import math
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vitdet import checkpoint
from vitdet.config import KEYS, arguments
from vitdet.engine.bad_steps import POLICIES
from vitdet.engine.log import check_loggers
from vitdet.engine.parallel import PARALLEL
from vitdet.settings import complete
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import world_size
from vitdet.utils.precision import PRECISIONS

logger = logging.getLogger(__name__)

_PERIOD = re.compile(r"(\d+(?:\.\d+)?) *(%|iteration|image)s?")
PERIODS = ("checkpoint_every", "eval_every")  # of `train`
_CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": PRECISIONS,
    "eval_precision": PRECISIONS,
    "eval_weights": checkpoint.WEIGHTS,
    "on_bad_step": POLICIES,
    "parallel": PARALLEL,
}


def check_recipe(cfg: DictConfig) -> DictConfig:
    """Return a copy with all keys of `train`, checked before data are read and a model is made.

    Raises:
        InputError: keys that are missing or unknown, values left open or that cannot be right.
    """
    if absent := [key for key in KEYS if key not in cfg]:
        raise InputError(
            f"recipe to train or evaluate: expected {', '.join(KEYS)}, got no {', '.join(absent)}. "
            "This file describes a part: configs/COCO has whole recipes."
        )
    cfg = copy.deepcopy(cfg)
    train = cfg.train = complete(cfg.train)
    if missing := _missing(OmegaConf.to_container(cfg), ""):
        raise InputError(
            f"recipe: expected a value for {', '.join(missing)}, got ???. Give it as "
            f"{missing[0]}=VALUE on the command line."
        )
    for key, allowed in _CHOICES.items():
        if train[key] not in allowed:
            raise InputError(f"train.{key}: expected {' or '.join(allowed)}, got {train[key]}.")
    check_loggers(train.loggers)
    if train.parallel == "fsdp" and train.compile:
        raise InputError("train.compile: it does not go with train.parallel=fsdp: set one of them.")
    if train.epochs is not None and not 0 < train.epochs < math.inf:
        raise InputError(f"train.epochs: expected a number above 0 or null, got {train.epochs}.")
    if train.num_images < 1:
        raise InputError(f"train.num_images: expected at least one image, got {train.num_images}.")
    for key in PERIODS:
        _images(key, train[key], 100, 1)
    return cfg


def check_batch(cfg: DictConfig) -> None:
    """Raise an InputError for a batch that the processes cannot share equally."""
    total, parts = cfg.dataloader.train.total_batch_size, max(cfg.train.accumulate, 1)
    if total <= 0 or total % (world_size() * parts):
        times = f" times train.accumulate={parts}" if parts > 1 else ""
        raise InputError(
            f"dataloader.train.total_batch_size: expected a multiple of the {world_size()} "
            f"processes{times}, got {total}. Change it or the number of processes."
        )


def check_files(cfg: DictConfig) -> None:
    """Look for the files of the data, before many processes are started that would miss them.

    Raises:
        InputError: a file or a folder that a data set of the recipe names is not there.
    """
    for part in ("train", "test"):
        dataset = cfg.dataloader[part].get("dataset") or {}
        for key in ("json", "images"):
            path = dataset.get(key)
            if isinstance(path, str) and not Path(path).exists():
                raise InputError(
                    f"dataloader.{part}.dataset.{key}: there is no {path}. Give the path of your "
                    "data, or start the command where that one begins."
                )


def set_length(cfg: DictConfig, dataset: Any) -> None:
    """Set the images of the training and of its periods in the recipe.

    With `train.epochs` the training sees the data so many times, and its periods change in
    proportion. Schedules are shares of the training and need no change.

    Raises:
        InputError: epochs of no images.
    """
    train, batch = cfg.train, cfg.dataloader.train.total_batch_size
    own = train.num_images
    if train.epochs is not None:
        epoch = images_an_epoch(cfg, dataset)
        if round(train.epochs * epoch) < 1:
            raise InputError(f"train.epochs: {train.epochs} of {epoch} images is no image.")
        train.num_images = round(train.epochs * epoch)
        logger.info("%g epochs of %d images: %d images", train.epochs, epoch, train.num_images)
    for key in PERIODS:
        images = _images(key, train[key], train.num_images, batch)
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
    batch, reference = cfg.dataloader.train.total_batch_size, cfg.train.reference_batch
    lr = cfg.optimizer.get("lr")
    if not reference or batch == reference or not isinstance(lr, int | float):
        return ""
    share = batch / reference
    return (
        f"a step has {batch} images, and the recipe is made for {reference}; optimizer.lr={lr:g} "
        f"is left as it is. If that is the rate for {reference}, the linear rule has "
        f"{lr * share:.3g}, the square-root rule {lr * math.sqrt(share):.3g}"
    )


def _images(key: str, value: Any, length: int, batch: int) -> float:
    """Return the images of a period in a training of `length` images, `batch` a step."""
    number = value
    if isinstance(value, str) and (found := _PERIOD.fullmatch(value)):
        number = float(found[1]) * {"%": length / 100, "iteration": batch, "image": 1}[found[2]]
    plain = isinstance(number, int | float) and not isinstance(number, bool)
    if not plain or not 0 <= number < math.inf:
        wanted = 'expected images, "10%" of the training or "500 iterations"'
        raise InputError(f"train.{key}: {wanted}, got {value!r}. 0 means never.")
    return number


def _missing(node: Any, key: str) -> list[str]:
    """Names of the values that a recipe leaves open ("???")."""
    if node == "???":
        return [key]
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return []
    prefix = f"{key}." if key else ""
    return [name for part in node for name in _missing(node[part], f"{prefix}{part}")]
