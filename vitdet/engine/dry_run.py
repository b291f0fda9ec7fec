"""`--dry-run`: a training that is built as always takes two real steps, and nothing is kept."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils._pytree import tree_leaves

from vitdet.engine.bad_steps import BadSteps
from vitdet.engine.log import max_memory
from vitdet.engine.recipe import Counts
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import InputError
from vitdet.utils.distributed import all_gather_object, is_main, world_size

_GIB = 2**30


class DoesNotFitError(InputError):
    """A step needs more memory than the device has."""


def try_steps(cfg: DictConfig, trainer: Trainer, loader: Any, data: dict[str, Counts]) -> None:
    """Take two steps, the first to warm up, and print what a training takes; every rank calls it.

    Raises:
        DoesNotFitError: the step needs more memory than the GPU, or this machine, has.
        InputError: a loss that is not finite, an output folder that cannot be written to, a disk
            that does not hold the checkpoints.
    """
    trainer.bad_steps = BadSteps()  # writes no file
    batch, start = cfg.dataloader.train.total_batch_size, trainer.images_seen
    batches, ends = iter(loader), []
    try:
        for step in (1, 2):
            trainer.run(batches, start + step * batch)
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
            ends.append(time.perf_counter())
    except RuntimeError as error:  # on a CPU torch has no class of its own for it
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise DoesNotFitError(
            f"memory: a step with {batch // world_size()} images a process does not fit "
            f"({_of(trainer.device)}). Lower dataloader.train.total_batch_size, or take "
            "train.accumulate=2 or model.backbone.net.checkpoint_blocks (docs/measured.md)."
        ) from error
    found = all_gather_object((max_memory(trainer.device), ends[1] - ends[0]))
    memory, seconds = (max(each) for each in zip(*found, strict=True))
    _check_disk(cfg, trainer)
    if not is_main():
        return
    steps = max(0, -(-(cfg.train.num_images - start) // batch))
    count = sum(parameter.numel() for parameter in trainer.detector.parameters())
    source = "the last checkpoint" if start else cfg.train.init_checkpoint or "random weights"
    minutes = round(steps * seconds / 60)
    for name, each in data.items():
        print(f"{name:<12} {each['images'] or 0} images, {each['objects'] or 0} objects")
    print(
        f"model        {type(trainer.detector).__name__}, {count / 1e6:.2f} M parameters, "
        f"from {source}\n"
        f"step         {batch} images in {world_size()} process{'es' * (world_size() > 1)}, "
        f"{seconds:.3g} s, images read included\n"
        f"memory       {memory / _GIB:.2f} GiB {_of(trainer.device)}\n"
        f"length       {steps} steps, about {minutes // 60} h {minutes % 60:02d} min without "
        "evaluations"
    )
    if 0 < (images := data["train"]["images"] or 0) < batch:
        print(f"note         a step of {batch} images is larger than the data, {images} images")
    print("dry run      done; nothing was kept", flush=True)


def _of(device: torch.device) -> str:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"of the {total / _GIB:.1f} GiB of a GPU, at the most"
    return "in a process, at the most (resident set)"


def _check_disk(cfg: DictConfig, trainer: Trainer) -> None:
    """Raise an InputError for a folder that cannot be written to, and checkpoints without room."""
    train, folder = cfg.train, Path(cfg.train.output_dir).absolute()
    size = sum(x.nbytes for x in tree_leaves(trainer.state_dict()) if isinstance(x, torch.Tensor))
    count = max(train.keep_checkpoints, 1) * (train.checkpoint_every != 0) + 2
    here = next(each for each in (folder, *folder.parents) if each.exists())
    if not here.is_dir() or not os.access(here, os.W_OK | os.X_OK):
        raise InputError(f"train.output_dir={folder}: {here} cannot be written to. Set another.")
    free = shutil.disk_usage(here).free
    if count * size > free:
        raise InputError(
            f"disk of {here}: {count} checkpoints of {size / _GIB:.2f} GiB do not fit into "
            f"{free / _GIB:.2f} GiB. Set train.keep_checkpoints lower, or train.output_dir."
        )
