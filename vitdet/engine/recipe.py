"""What a recipe says: values against each other, lengths, data; and what a run keeps of it."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vitdet import checkpoint
from vitdet.config import KEYS, arguments, complete, config_text
from vitdet.engine.bad_steps import POLICIES
from vitdet.engine.parallel import PARALLEL
from vitdet.engine.tune import TUNE
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import is_main, world_size
from vitdet.utils.env import describe
from vitdet.utils.files import write_text
from vitdet.utils.precision import PRECISIONS

logger = logging.getLogger(__name__)

Counts = dict[str, Any]  # of a data set

_PERIOD = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?) *(%|iteration|image)s?")
_PERIODS = ("checkpoint_every", "eval_every")  # of `train`
_CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": PRECISIONS,
    "eval_precision": PRECISIONS,
    "eval_weights": checkpoint.WEIGHTS,
    "on_bad_step": POLICIES,
    "parallel": PARALLEL,
    "tune": TUNE,
}
_LEAST = {
    "num_images": 1,
    "accumulate": 1,
    "max_bad_steps": 0,
    "log_every": 1,
    "patience": 1,
    "lora_rank": 1,
}


def check_recipe(cfg: DictConfig) -> DictConfig:
    """Return a copy with all keys of `train`, checked before data are read and a model is made.

    Raises:
        InputError: keys that are missing or unknown, values left open or that cannot be right.
    """
    if absent := [key for key in KEYS if key not in cfg]:
        text = f"expected {', '.join(KEYS)}, got no {', '.join(absent)}"
        raise InputError(f"recipe to train or evaluate: {text}. configs/COCO has whole recipes.")
    cfg = copy.deepcopy(cfg)
    train = cfg.train = complete(cfg.train)
    if missing := _missing(OmegaConf.to_container(cfg), ""):
        text = f"expected a value for {', '.join(missing)}, got ???"
        raise InputError(f"recipe: {text}. Give it as {missing[0]}=VALUE on the command line.")
    _check_train(train)
    return cfg


def _missing(node: Any, key: str) -> list[str]:
    """Names of the values that a recipe leaves open."""
    if node == "???":
        return [key.removeprefix(".")]
    parts = node.items() if isinstance(node, dict) else ()
    parts = enumerate(node) if isinstance(node, list) else parts
    return [name for part, value in parts for name in _missing(value, f"{key}.{part}")]


def _check_train(train: DictConfig) -> None:
    for key, allowed in _CHOICES.items():
        if train[key] not in allowed:
            raise InputError(f"train.{key}: expected {' or '.join(allowed)}, got {train[key]}.")
    for key, least in _LEAST.items():
        if train[key] is not None and train[key] < least:
            raise InputError(f"train.{key}: expected {least} or more, got {train[key]}.")
    if train.parallel == "fsdp" and train.compile:
        raise InputError("train.compile: it does not go with train.parallel=fsdp: set one of them.")
    if train.tune != "all" and train.freeze_blocks:
        text = f"train.tune={train.tune} freezes every block, got train.freeze_blocks"
        raise InputError(f"{text}={train.freeze_blocks} too. Leave one of them out.")
    for key, wanted in (("lora_alpha", "a number above 0"), ("epochs", "a number above 0 or null")):
        if train[key] is not None and not 0 < train[key] < math.inf:
            raise InputError(f"train.{key}: expected {wanted}, got {train[key]}.")
    _ = [_images("train", key, train[key], 100, 1) for key in _PERIODS]
    if train.patience is not None and (train.eval_every in (0, "0%") or train.best_metric is None):
        text = f"eval_every={train.eval_every} and best_metric={train.best_metric}"
        raise InputError(f"train.patience: it needs evaluations and a metric, got {text}.")


def check_batch(cfg: DictConfig) -> None:
    """Raise an InputError for a batch that the processes cannot share equally."""
    total, parts = cfg.dataloader.train.total_batch_size, cfg.train.accumulate
    if total <= 0 or total % (world_size() * parts):
        times = f" times train.accumulate={parts}" if parts > 1 else ""
        text = f"expected a multiple of the {world_size()} processes{times}, got {total}"
        raise InputError(f"dataloader.train.total_batch_size: {text}.")


# --- lengths -------------------------------------------------------------------------------------


def set_length(cfg: DictConfig, dataset: Any) -> None:
    """Set the images of the training and of its periods in the recipe.

    With `train.epochs` the training sees the data so many times, and the recipe's periods change in
    proportion; schedules are shares of the training. What a person typed in images stays that.
    """
    train, batch = cfg.train, cfg.dataloader.train.total_batch_size
    own, what = train.num_images, ""
    if train.epochs is not None:
        epoch = images_an_epoch(cfg, dataset)
        train.num_images = round(train.epochs * epoch)
        if train.num_images < 1:
            raise InputError(f"train.epochs: {train.epochs} of {epoch} images is no image.")
        what = f" ({train.epochs:g} epochs of {epoch})"
    for key in _PERIODS:
        images = _images("train", key, train[key], train.num_images, batch)
        if not isinstance(train[key], str):
            images *= train.num_images / own
        # up: four quarters of 410 images are done at the end, not just before it
        train[key] = math.ceil(round(images, 3)) if images else 0
    _set_schedule(cfg)
    images, steps = train.num_images, -(-train.num_images // batch)
    evaluated = (
        f"every {train.eval_every} images" if 0 < train.eval_every < images else "at the end"
    )
    text = "length: %d images%s, %d a step, so %d steps; evaluated %s"
    logger.info(text, images, what, batch, steps, evaluated)
    _say_lr_rules(cfg)


def _set_schedule(cfg: DictConfig) -> None:
    """Turn what was typed of the schedule, text, into shares of this training."""
    node, length, batch = cfg.schedule, cfg.train.num_images, cfg.dataloader.train.total_batch_size

    def share(key: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if (images := _images("schedule", key, value, length, batch)) > length:
            text = f"expected at most the {length} images of the training, got {value}"
            raise InputError(f"schedule.{key}: {text}. Lower it, or train longer.")
        return images / length * node.num_images

    for key in ("warmup", "milestones"):
        if (value := node.get(key)) is not None:
            several = isinstance(value, Sequence) and not isinstance(value, str)
            node[key] = [share(key, each) for each in value] if several else share(key, value)


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


def _say_lr_rules(cfg: DictConfig) -> None:
    """Say what the usual rules make of the learning rate for another batch; nothing changes.

    `train.reference_batch` is the batch that the recipe's lr is for. The linear rule is that of
    "Accurate, Large Minibatch SGD" (Goyal et al. 2017); the square root is usual with Adam ("On the
    SDEs and Scaling Rules for Adaptive Gradient Algorithms", Malladi et al. 2022).
    """
    batch, reference = cfg.dataloader.train.total_batch_size, cfg.train.reference_batch
    lr = cfg.optimizer.get("lr")
    if reference and batch != reference and isinstance(lr, int | float):
        text = "a step has %d images, the recipe is made for %d: optimizer.lr=%g is left as it is"
        text += " (the linear rule has %.3g, the square-root rule %.3g)"
        share = batch / reference
        logger.info(text, batch, reference, lr, lr * share, lr * math.sqrt(share))


def _images(part: str, key: str, value: Any, length: int, batch: int) -> float:
    """Return the images of a period in a training of `length` images, `batch` a step."""
    number = value
    if isinstance(value, str) and (found := _PERIOD.fullmatch(value)):
        number = float(found[1]) * {"%": length / 100, "iteration": batch, "image": 1}[found[2]]
    plain = isinstance(number, int | float) and not isinstance(number, bool)
    if not plain or not 0 <= number < math.inf:
        wanted = 'expected images, "10%" of the training or "500 iterations"'
        raise InputError(f"{part}.{key}: {wanted}, got {value!r}. 0 means never.")
    return number


# --- data, and the run's record ------------------------------------------------------------------


def counts(dataset: Any) -> Counts:
    """Return name, class names, and the numbers of images and objects of a data set.

    A data set of another project may be without `records`: the numbers are None then.
    """
    records = getattr(dataset, "records", None)
    known = isinstance(records, Sequence)
    return {
        "name": str(dataset.name),
        "class_names": list(dataset.class_names),
        "images": len(records) if known else None,
        "objects": sum(len(each.get("annotations", ())) for each in records) if known else None,
    }


def check_data(
    data: Mapping[str, Counts], content: Mapping[str, Any], source: str, *, allow: bool
) -> None:
    """Raise an InputError for a resume with other data than those that the run began with.

    Args:
        data: counts of "train" and "test" now. Class names are compared with the weights.
        content: of the checkpoint `source`.
        allow: `train.allow_changed_data`: only log what changed.
    """
    about = content.get("vitdet")
    before = about.get("data", {}) if isinstance(about, Mapping) else {}
    changes = "; ".join(
        f"{part} data: {before[part][key]} {key}, now {data[part][key]}"
        for part in data
        for key in ("images", "objects")
        if part in before and before[part][key] != data[part][key]
    )
    if changes and not allow:
        raise InputError(
            f"data for resuming {source}: expected those with which the run began, got {changes}. "
            "Give it the same data, or go on all the same with train.allow_changed_data=true."
        )
    if changes:
        logger.warning("the data changed since %s: %s", source, changes)


def set_absolute_paths(cfg: DictConfig) -> None:
    """Let a recipe say where its data lie from whatever folder it is read later."""
    for part in ("train", "test"):
        node = cfg.dataloader[part].dataset
        for key in ("json", "images"):
            value = node.get(key) if isinstance(node, DictConfig) else None
            if isinstance(value, str) and Path(value).exists():
                node[key] = str(Path(value).absolute())


def write_record(
    cfg: DictConfig, output_dir: Path, dataset: Any, data: Mapping[str, Counts]
) -> dict[str, Any]:
    """Write config.yaml, environment.json and run.json; return what checkpoints keep of them."""
    names = list(dataset.class_names)
    note = {
        "class_names": names,
        "class_ids": list(getattr(dataset, "class_ids", range(1, len(names) + 1))),
        "config": config_text(cfg),
        "environment": describe(),
        "data": dict(data),
    }
    if is_main():
        about = {"command": sys.argv, "seed": cfg.train.seed, "data": data}
        write_text(output_dir / "config.yaml", note["config"])
        for name, content in (("environment", note["environment"]), ("run", about)):
            write_text(output_dir / f"{name}.json", json.dumps(content, indent=1) + "\n")
    return note
