"""A small training on drawn shapes for processes that are to be killed; a fork server imports it.

Everything that a run needs is imported here once, so that a new process is there in milliseconds.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.utils.tensorboard  # imported by the first run otherwise, in every process
from detectron2.config import LazyCall as L
from omegaconf import DictConfig
from tiny_recipe import SIZE, CountingEvaluator, recipe

from vitdet.data.augment import fixed_resize
from vitdet.data.loaders import build_test_loader, build_train_loader
from vitdet.data.mapper import Mapper
from vitdet.data.shapes import CLASSES, shapes_dataset
from vitdet.engine.run import train
from vitdet.engine.trainer import Trainer
from vitdet.utils import files

assert torch.utils.tensorboard


def shapes_recipe(folder: Path, shapes: Path, **options: Any) -> DictConfig:
    """The embedded data, one reading process, two images a step, a checkpoint after each."""
    settings = {"checkpoint_every": 2, "keep_checkpoints": 2, "eval_every": 40, "log_every": 1}
    settings |= {"best_metric": "bbox/AP50", "ema_decay": 0.9, "num_images": 100_000}
    cfg = recipe(folder, **{**settings, **options})
    cfg.model.roi_heads.num_classes = len(CLASSES)
    cfg.dataloader.train = L(build_train_loader)(
        dataset=L(shapes_dataset)(root=str(shapes), split="train", num_images=12, size=SIZE),
        mapper=L(Mapper)(
            augmentations=L(fixed_resize)(height=SIZE, width=SIZE, flip=True), is_train=True
        ),
        total_batch_size=2,
        num_workers=1,
        seed="${train.seed}",
    )
    cfg.dataloader.test = L(build_test_loader)(
        dataset=L(shapes_dataset)(root=str(shapes), split="val", num_images=2, size=SIZE),
        mapper=L(Mapper)(augmentations=L(fixed_resize)(height=SIZE, width=SIZE), is_train=False),
        num_workers=1,
    )
    cfg.dataloader.evaluator = L(CountingEvaluator)(dataset="${..test.dataset}")
    return cfg


def run(folder: str, shapes: str, told: Any, options: dict[str, Any]) -> None:
    """Begin or go on; `told` counts this process's steps, and what it flushed to the disk."""
    multiprocessing.set_start_method("fork", force=True)  # not from this server too
    os.setsid()  # with its helpers a process group of its own
    torch.set_num_threads(1)
    step, flush = Trainer.step, files._flush

    def counted_step(self: Trainer, batch: list) -> None:
        step(self, batch)
        told[0] += 1

    def counted_flush(path: Path) -> None:
        told[1] += 1
        time.sleep(0.005)  # a slow disk, so that a kill finds it busy
        flush(path)

    Trainer.step, files._flush = counted_step, counted_flush
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # it is in log.txt
        train(shapes_recipe(Path(folder), Path(shapes), **options), resume=True)
