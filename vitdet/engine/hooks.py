"""What happens beside the steps of training: log lines, checkpoints, evaluations."""

from __future__ import annotations

import json
import logging
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vitdet import checkpoint
from vitdet.engine.trainer import Trainer, Window
from vitdet.utils.checks import InputError, fail
from vitdet.utils.distributed import barrier, is_main, reduce_mean

logger = logging.getLogger(__name__)

LAST = "last_checkpoint"
FINAL = "model_final.pth"


def write_text(path: Path, text: str) -> None:
    """Replace a small text file at once: a reader sees the old or the new one, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"{path}: could not be written ({error}). Check disk and rights."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def last_checkpoint(output_dir: Path) -> Path | None:
    """Return the file that `--resume` continues from, None when the folder holds no run.

    Raises:
        InputError: the file that is named there is gone.
    """
    pointer = output_dir / LAST
    if not pointer.exists():
        return None
    path = output_dir / pointer.read_text(encoding="utf-8").strip()
    if not path.is_file():
        others = sorted(item.name for item in output_dir.glob("model_*.pth"))
        fail(
            str(pointer),
            expected="the name of a checkpoint in the same folder",
            got=f"{path.name}, which is not there",
            remedy=f"Write another name into it (there are: {', '.join(others) or 'none'}), "
            "or remove it to start anew.",
        )
    return path


def due(trainer: Trainer, every: int, images: int) -> bool:
    """Whether the last step, of `images` images, passed a multiple of `every` (0: never)."""
    if every <= 0:
        return False
    return trainer.images_seen // every > (trainer.images_seen - images) // every


class Checkpoints:
    """Write `model_<images>.pth` every so many images and `model_final.pth` at the end.

    Args:
        output_dir: folder of the run.
        every: images between checkpoints, 0 for only the last one.
        keep: how many of the newest `model_<images>.pth` stay.
        total_batch_size: images a step over all processes.
        note: stored under "vitdet": class names, the config as text, versions.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        every: int,
        keep: int,
        total_batch_size: int,
        note: dict[str, Any],
    ) -> None:
        self.output_dir = output_dir
        self.every = every
        self.keep = max(keep, 1)
        self.total_batch_size = total_batch_size
        self.note = note
        if is_main():  # what a killed process left
            for partial in output_dir.glob(".*.partial"):
                partial.unlink()

    def after_step(self, trainer: Trainer) -> None:
        """Write a checkpoint when one is due and training goes on."""
        if trainer.images_seen < trainer.num_images and due(
            trainer, self.every, self.total_batch_size
        ):
            self._write(trainer, f"model_{trainer.images_seen:09d}.pth")

    def after_train(self, trainer: Trainer) -> None:
        """Write the last checkpoint."""
        self._write(trainer, FINAL)

    def _write(self, trainer: Trainer, name: str) -> None:
        trainer.check_finite()
        trainer.check_weights()
        if is_main():
            content = {**trainer.state_dict(), "vitdet": self.note}
            checkpoint.write(self.output_dir / name, content)
            # Only now is the new file complete: a kill before this line loses no checkpoint.
            write_text(self.output_dir / LAST, name + "\n")
            numbered = sorted(self.output_dir.glob("model_" + "[0-9]" * 9 + ".pth"))
            for old in numbered[: -self.keep]:
                old.unlink()
            logger.info("saved %s", self.output_dir / name)
        barrier()


class Evaluations:
    """Evaluate every so many images, between the first and the last step.

    Args:
        every: images between evaluations, 0 for none before the end of training.
        total_batch_size: images a step over all processes.
        evaluate: no arguments; evaluates, prints, and returns to training mode.
    """

    def __init__(
        self, *, every: int, total_batch_size: int, evaluate: Callable[[], object]
    ) -> None:
        self.every = every
        self.total_batch_size = total_batch_size
        self.evaluate = evaluate

    def after_step(self, trainer: Trainer) -> None:
        """Evaluate when it is due and training goes on (the end has its own evaluation)."""
        if trainer.images_seen < trainer.num_images and due(
            trainer, self.every, self.total_batch_size
        ):
            self.evaluate()

    def after_train(self, trainer: Trainer) -> None:
        """Nothing: the caller evaluates the final weights."""


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
