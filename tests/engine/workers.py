"""What processes started by the launch tests run; importable by them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from detectron2.utils import comm
from tiny_recipe import recipe

from vitdet.engine import ema
from vitdet.engine.ema import Ema
from vitdet.engine.run import train
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import all_gather_object, rank, world_size


def report_ranks(folder: str) -> None:
    """Write what each process knows about the others."""
    gathered = all_gather_object((rank(), comm.get_local_rank()))
    (Path(folder) / f"rank{rank()}.txt").write_text(f"{world_size()} {gathered}")


def train_even_batches(folder: str, **train_options) -> None:
    """Five steps of 8 images without stochastic depth, whatever the number of processes.

    AdamW divides a gradient by its own size. With the default eps of 1e-8 one that is rounding
    noise would move its weight by the learning rate, up or down as the order of a sum wills.
    """
    cfg = recipe(Path(folder), num_images=40, **train_options)
    cfg.model.backbone.net.drop_path_rate = 0.0
    cfg.optimizer.eps = 1e-4
    cfg.dataloader.train.total_batch_size = 8
    train(cfg)


def train_with_average(folder: str, decay: float) -> None:
    """As `train_even_batches`, and every process writes down its own average of the weights."""

    class Recorded(Ema):
        def update(self) -> None:
            super().update()
            torch.save(self.state, Path(folder) / f"ema{rank()}.pth")

    Path(folder).mkdir(exist_ok=True)
    ema.Ema = Recorded
    train_even_batches(folder, ema_decay=decay)


def fail_on_rank_1(folder: str) -> None:
    """Rank 1 meets a bad input; rank 0 would wait for it for an hour."""
    (Path(folder) / f"pid{rank()}").write_text(str(os.getpid()))
    if rank() == 1:
        raise InputError("image x.jpg: expected a JPEG, got text. Remove it.")
    time.sleep(3600)


def die_on_rank_1(folder: str) -> None:
    """Rank 1 is killed, as the kernel does when memory is short."""
    (Path(folder) / f"pid{rank()}").write_text(str(os.getpid()))
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)


def crash_on_rank_0(_: str) -> None:
    """An error of the program, not of the user."""
    if rank() == 0:
        raise ZeroDivisionError("a bug")
    time.sleep(3600)


def kill_the_launcher(folder: str) -> None:
    """Rank 0 kills the process that started both, which would leave two orphans."""
    (Path(folder) / f"pid{rank()}").write_text(str(os.getpid()))
    all_gather_object(None)  # both have written
    if rank() == 0:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)
