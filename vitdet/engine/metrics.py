"""The numbers of a run: log lines, metrics.json, TensorBoard."""

from __future__ import annotations

import json
import logging
import resource
import time
from pathlib import Path
from typing import Any

import torch

from vitdet.engine.trainer import Trainer, Window
from vitdet.utils.distributed import is_main, reduce_mean
from vitdet.utils.files import write_text

logger = logging.getLogger(__name__)


class Metrics:
    """metrics.json (JSON lines) and TensorBoard files; x is the number of images seen.

    Only the main process writes. A resumed run drops what was written after its checkpoint.
    """

    def __init__(self, output_dir: Path, *, images_seen: int) -> None:
        self.path = output_dir / "metrics.json"
        self.writer: Any = None
        if not is_main():
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        kept = []
        if images_seen and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _images_of(line) <= images_seen]
        write_text(self.path, "".join(line + "\n" for line in kept))
        self.writer = SummaryWriter(str(output_dir), purge_step=images_seen + 1)

    def write(self, images_seen: int, values: dict[str, float]) -> None:
        """Add one line and one point a name."""
        if self.writer is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images_seen": images_seen, **values}) + "\n")
        for name, value in values.items():
            self.writer.add_scalar(name, value, images_seen)

    def close(self) -> None:
        """Flush and close the TensorBoard file."""
        if self.writer is not None:
            self.writer.close()


def _images_of(line: str) -> float:
    try:
        return json.loads(line)["images_seen"]
    except (json.JSONDecodeError, KeyError):  # a line cut off by a kill
        return float("inf")


class Progress:
    """One progress line and one set of metrics every `every` iterations.

    Args:
        metrics: where the numbers go.
        every: iterations between lines; the numbers are means over these iterations.
    """

    def __init__(self, metrics: Metrics, *, every: int) -> None:
        self.metrics = metrics
        self.every = max(every, 1)

    def after_step(self, trainer: Trainer) -> None:
        """Log when enough steps have gathered, and after the last step."""
        if len(trainer.window.steps) >= self.every or trainer.images_seen >= trainer.num_images:
            self._log(trainer, trainer.next_window())

    def after_train(self, trainer: Trainer) -> None:
        """Nothing is left: the last step was logged."""

    def _log(self, trainer: Trainer, window: Window) -> None:
        seconds = max(time.perf_counter() - window.started, 1e-9)
        means = torch.stack([step.losses for step in window.steps]).mean(0)
        losses = reduce_mean(dict(zip(window.steps[-1].names, means, strict=True)))
        lrs = [group["lr"] for group in trainer.optimizer.param_groups]
        speed = window.images / seconds
        values = {
            "total_loss": sum(losses.values()),
            **losses,
            "lr": max(lrs),
            "lr_lowest": min(lrs),
            "images_per_second": speed,
            "data_seconds": window.data_seconds / len(window.steps),
            "max_memory_mb": max_memory_mb(trainer.device),
        }
        heads = {name: float(v) for name, v in trainer.statistics.latest_values.items()}
        self.metrics.write(trainer.images_seen, {**values, **heads})
        logger.info(
            "%d/%d images  eta %s  loss %.4g (%s)  lr %.3g lowest %.3g  %.2f img/s  "
            "data %.3f s  %d MB",
            trainer.images_seen,
            trainer.num_images,
            _clock((trainer.num_images - trainer.images_seen) / speed),
            values["total_loss"],
            "  ".join(f"{name.removeprefix('loss_')} {loss:.4g}" for name, loss in losses.items()),
            values["lr"],
            values["lr_lowest"],
            speed,
            values["data_seconds"],
            values["max_memory_mb"],
        )


def max_memory_mb(device: torch.device) -> float:
    """Largest memory so far: of the GPU's allocator, or of this process on a CPU, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
