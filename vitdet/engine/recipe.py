"""A recipe's values against each other, before data are read and a model is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vitdet import checkpoint
from vitdet.config import KEYS
from vitdet.engine.length import check_length
from vitdet.engine.parallel import check_parallel
from vitdet.engine.selection import Selection
from vitdet.engine.writers import check_loggers
from vitdet.settings import check_train, optional
from vitdet.utils.checks import InputError, fail
from vitdet.utils.distributed import world_size
from vitdet.utils.precision import check_precision


def check_recipe(cfg: DictConfig) -> None:
    """Check what would otherwise be found out late, or never; no data, no model.

    Raises:
        InputError: keys that are missing or unknown, values left open or of a wrong type.
    """
    absent = [key for key in KEYS if key not in cfg]
    if absent:
        fail(
            "recipe to train or evaluate",
            expected=", ".join(KEYS),
            got=f"no {', '.join(absent)}",
            remedy="This file describes a part: configs/COCO has whole recipes.",
        )
    missing = _missing(OmegaConf.to_container(cfg), "")
    if missing:
        fail(
            "recipe",
            expected=f"a value for {', '.join(missing)}",
            got="???",
            remedy=f"Give it as {missing[0]}=VALUE on the command line.",
        )
    check_train(cfg.train)
    if optional(cfg.train, "eval_weights") not in checkpoint.WEIGHTS:
        fail(
            "train.eval_weights",
            expected=" or ".join(checkpoint.WEIGHTS),
            got=cfg.train.eval_weights,
            remedy="ema is the moving average of a run with train.ema_decay.",
        )
    check_precision("train.precision", cfg.train.precision)
    check_precision("train.eval_precision", optional(cfg.train, "eval_precision"))
    check_loggers(optional(cfg.train, "loggers"))
    check_parallel(*(optional(cfg.train, key) for key in ("parallel", "compile")))
    check_length(cfg.train)
    selection_of(cfg)


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


def check_batch(cfg: DictConfig) -> None:
    """Raise an InputError for a batch that the processes cannot share equally."""
    total, parts = cfg.dataloader.train.total_batch_size, max(optional(cfg.train, "accumulate"), 1)
    if total <= 0 or total % (world_size() * parts):
        times = f" times train.accumulate={parts}" if parts > 1 else ""
        fail(
            "dataloader.train.total_batch_size",
            expected=f"a multiple of the {world_size()} processes{times}",
            got=total,
            remedy="Change it or the number of processes.",
        )


def selection_of(cfg: DictConfig) -> Selection:
    """Return what `train.best_metric` and `train.early_stopping` ask for."""
    stopping = optional(cfg.train, "early_stopping")
    return Selection(
        optional(cfg.train, "best_metric"),
        None if stopping is None else dict(stopping),
        eval_every=int(cfg.train.eval_every not in (0, "0%")),
        average=optional(cfg.train, "ema_decay") is not None,
    )


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
