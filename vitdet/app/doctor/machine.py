"""Checks of what the training stands on: device, memory, disk, folder, packages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vitdet import checkpoint, costs
from vitdet.app.doctor.finding import FAULT, OK, WARNING, Finding
from vitdet.app.doctor.patient import Patient
from vitdet.app.plan import free_memory
from vitdet.engine.checkpoints import last_checkpoint
from vitdet.engine.run import pick_device
from vitdet.utils.precision import autocast_dtype

_GIB = 2**30
_ADAM = 3  # weights, and the two averages of AdamW: of a run's state and of a checkpoint
_OPTIONAL = ("xformers", "triton", "wandb", "mlflow", "submitit")


def device(patient: Patient) -> Iterator[Finding]:
    """The device, and the precision on it."""
    train = patient.cfg.train
    where = pick_device(train.device)
    dtype = autocast_dtype(train.precision, where)
    kind = str(dtype or torch.float32).removeprefix("torch.")
    text = f"{where.type}, {kind} (train.precision={train.precision})"
    if where.type == "cpu" and dtype is torch.float16:
        remedy = "On a CPU use train.precision=auto; on a GPU this check has another result."
        yield Finding(WARNING, "device", f"{text}: slow on a CPU", remedy)
    else:
        yield Finding(OK, "device", text)
    many = torch.cuda.device_count()
    if where.type == "cuda" and patient.processes > many:
        text = f"{patient.processes} processes and {many} GPUs"
        yield Finding(WARNING, "device", text, "Right with more machines only.")


def memory(patient: Patient) -> Iterator[Finding]:
    """A step of a process, as `vitdet plan` counts it."""
    if patient.model is None:
        return
    cfg = patient.cfg
    where = pick_device(cfg.train.device)
    share = max(cfg.dataloader.train.total_batch_size // patient.processes, 1)
    images = max(share // (cfg.train.get("accumulate") or 1), 1)
    dtype = autocast_dtype(cfg.train.precision, where)
    one, two = (
        costs.training_memory(cfg.model, batch=n, dtype=dtype, device=where.type) for n in (1, 2)
    )
    step = one.peak + (images - 1) * (two.peak - one.peak)
    needed = (step + _state(patient)) / _GIB
    free = (free_memory(where.type) if patient.memory is None else patient.memory) / _GIB
    text = f"{needed:.2f} GiB for {images} images at once, {free:.2f} GiB free"
    if needed <= free:
        yield Finding(OK, "memory", text)
        return
    remedy = "vitdet plan shows what fits; train.accumulate, more --processes or --memory of the "
    yield Finding(FAULT, "memory", text, remedy + "machine that it is for.")


def _state(patient: Patient) -> int:
    """Return the bytes of weights and averages."""
    assert patient.model is not None
    copies = _ADAM + (patient.cfg.train.get("ema_decay") is not None)
    return copies * sum(p.numel() * p.element_size() for p in patient.model.parameters())


def disk(patient: Patient) -> Iterator[Finding]:
    """Room for the checkpoints: those that stay, the last, the best, and the one being written."""
    if patient.model is None:
        return
    train = patient.cfg.train
    extra = 2 + (train.get("best_metric") is not None)
    count = max(train.keep_checkpoints, 1) * (train.checkpoint_every != 0) + extra
    size = _state(patient)
    folder = _existing(Path(train.output_dir))
    free = shutil.disk_usage(folder).free
    text = f"{count} checkpoints of {size / _GIB:.2f} GiB, {free / _GIB:.1f} GiB free at {folder}"
    if count * size <= free:
        yield Finding(OK, "disk", text)
    else:
        remedy = "Set train.keep_checkpoints lower, or train.output_dir to another disk."
        yield Finding(FAULT, "disk", text, remedy)


def folder(patient: Patient) -> Iterator[Finding]:
    """What the output folder holds already."""
    path = Path(patient.cfg.train.output_dir)
    if path.exists() and not path.is_dir():
        yield Finding(FAULT, "folder", f"{path} is a file", "Set train.output_dir.")
        return
    above = _existing(path)
    if not os.access(above, os.W_OK | os.X_OK):
        yield Finding(FAULT, "folder", f"{above} cannot be written to", "Set train.output_dir.")
        return
    last = last_checkpoint(path)
    if last is None:
        yield Finding(OK, "folder", f"{path} holds no run")
        return
    seen = _images_seen(last)
    text = f"{path} holds a run, {last.name}" + f" after {seen} images" * (seen is not None)
    length = None if patient.lengths is None else patient.lengths.train.num_images
    if seen is not None and length is not None and seen >= length:
        remedy = "It is finished: choose another train.output_dir, or a longer training."
    else:
        remedy = "--resume goes on with it; without it the training does not start."
    yield Finding(WARNING, "folder", text, remedy)


def _images_seen(path: Path) -> int | None:
    if path.is_dir():  # in parts, one a process
        return None
    return checkpoint.read(path).get("images_seen")


def packages(_: Patient) -> Iterator[Finding]:
    """Versions that matter; those that are asked for were looked for with the recipe."""
    found: list[Any] = [("torch", torch.__version__)]
    found += [(name, _version(name)) for name in _OPTIONAL]
    text = ", ".join(f"{name} {version or '-'}" for name, version in found)
    yield Finding(OK, "packages", text)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    """Return the nearest folder that is there."""
    return next((each for each in (path, *path.absolute().parents) if each.exists()), Path.cwd())
