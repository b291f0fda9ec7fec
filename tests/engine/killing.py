"""A small training on drawn shapes, for processes that are to be killed."""

from __future__ import annotations

import contextlib
import os
import time
from contextlib import redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch.utils.tensorboard  # imported by the first run otherwise, in every process
from detectron2.config import LazyCall as L
from omegaconf import DictConfig
from pair import as_new, fork_server
from tiny_recipe import SIZE, CountingEvaluator, recipe

from vitdet.data.augment import fixed_resize
from vitdet.data.loaders import build_test_loader, build_train_loader
from vitdet.data.mapper import Mapper
from vitdet.data.shapes import CLASSES, shapes_dataset
from vitdet.engine.run import train
from vitdet.engine.trainer import Trainer
from vitdet.utils import files

assert torch.utils.tensorboard
PATIENCE = 300.0  # seconds for what takes one on an idle machine


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
    as_new()
    os.setsid()  # with its helpers a process group of its own
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


class Runs:
    """Processes that train in a folder."""

    def __init__(self, folder: Path, shapes: Path, **options: Any) -> None:
        self.folder, self.shapes, self.options = folder, shapes, options
        self.start_seconds = 1.0  # until the first step, of the last process that took one
        self.helpers: set[tuple[int, str]] = set()  # process id and start time

    def start(self, **options: Any) -> BaseProcess:
        self.told = fork_server().RawArray("i", 2)
        arguments = (str(self.folder), str(self.shapes), self.told, {**self.options, **options})
        process = fork_server().Process(target=run, args=arguments)
        process.start()
        self.started = time.monotonic()
        return process

    @property
    def steps(self) -> int:
        """Steps of the last process."""
        return self.told[0]

    def wait_for(self, process: BaseProcess, steps: int, flushes: int = 0) -> None:
        """Wait for steps of a process, then for so many parts of what it writes."""
        for which, count in ((0, steps), (1, flushes)):
            goal = which * self.told[which] + count
            wait_until(lambda w=which, g=goal: self.told[w] >= g, process.is_alive, 0.0005)

    def note_helpers(self, process: BaseProcess) -> None:
        """Remember the reading processes."""
        with contextlib.suppress(FileNotFoundError):
            self.helpers |= {(pid, born(pid)) for pid in children(process.pid)}

    def left(self) -> list[int]:
        """Reading processes that are still there."""
        return [pid for pid, start in self.helpers if start and born(pid) == start]


def wait_until(condition, goes_on=lambda: True, pause: float = 0.05) -> None:
    """Wait for a condition, as long as something else holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert goes_on()
        assert time.monotonic() < deadline
        time.sleep(pause)


def children(pid: int) -> list[int]:
    """Process ids of what a process has started."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def born(pid: int) -> str:
    """Start time of a process that lives, in clock ticks; "" for none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
