"""The numbers of a run: log lines, what the writers get, and a bar on a terminal."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from omegaconf import DictConfig
from tqdm import tqdm

from vitdet.engine.groups import named_rates
from vitdet.engine.logs import clock
from vitdet.engine.trainer import StepRecord, Trainer, Window
from vitdet.engine.writers import About, Values, Writer, open_writers
from vitdet.utils.distributed import is_main, reduce_mean

logger = logging.getLogger(__name__)

tqdm.monitor_interval = 0  # no thread beside the training: every step moves the bar


class Metrics:
    """Hands lines of numbers to every writer; x is the number of images seen.

    Only the main process writes. A resumed run drops what was written after its checkpoint. As a
    context it closes the writers, and tells them whether the run came to its end.

    Args:
        output_dir: folder of the run.
        images_seen: where the run begins or goes on.
        loggers: names of `vitdet.engine.writers.LOGGERS` beside the files.
        about: what these get to know of the run.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        images_seen: int,
        loggers: Sequence[str] = (),
        about: About | None = None,
    ) -> None:
        self.writers: list[Writer] = []
        if is_main():
            self.writers = open_writers(output_dir, images_seen, loggers, about or About())

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)

    def write(self, images_seen: int, values: Values) -> None:
        """Add one line."""
        for writer in self.writers:
            writer.write(images_seen, values)

    def close(self, *, failed: bool = False) -> None:
        """Close the writers; once is enough."""
        writers, self.writers = self.writers, []
        for writer in writers:
            writer.close(failed=failed)


def open_metrics(cfg: DictConfig, note: Mapping[str, Any], images_seen: int) -> Metrics:
    """Open what the numbers of a run go to.

    Args:
        cfg: the recipe.
        note: what `vitdet.engine.record.write` returned.
        images_seen: where the run begins or goes on.
    """
    data, versions = note["data"], note["environment"]
    facts = {"git": versions["git"], "torch": versions["torch"]}
    facts |= {name: each["name"] for name, each in data.items()}
    about = About(config=yaml.safe_load(note["config"]), facts=facts)
    loggers = cfg.train.get("loggers") or ()
    folder = Path(cfg.train.output_dir)
    return Metrics(folder, images_seen=images_seen, loggers=loggers, about=about)


class Progress:
    """One progress line and one set of metrics every `every` iterations.

    On a terminal a bar stands below the lines.

    Args:
        metrics: where the numbers go.
        every: iterations between lines; the numbers are means over these iterations.
    """

    def __init__(self, metrics: Metrics, *, every: int) -> None:
        self.metrics = metrics
        self.every = max(every, 1)
        self.bar: tqdm[Any] | None = None

    def after_step(self, trainer: Trainer) -> None:
        """Log when enough steps have gathered, and after the last step."""
        if len(trainer.window.steps) >= self.every or trainer.images_seen >= trainer.num_images:
            self._log(trainer, trainer.next_window())
        self._move_bar(trainer)

    def after_train(self, trainer: Trainer) -> None:
        """Nothing is left: the last step was logged."""

    def close(self) -> None:
        """Take the bar away, also when the run ends early."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _move_bar(self, trainer: Trainer) -> None:
        if trainer.images_seen >= trainer.num_images:
            self.close()
        elif self.bar is not None:
            self.bar.total = trainer.num_images
            self.bar.update(trainer.images_seen - self.bar.n)
        elif is_main() and sys.stdout.isatty():
            self.bar = tqdm(
                total=trainer.num_images,
                initial=trainer.images_seen,
                unit=" images",
                file=sys.stdout,
                leave=False,
                dynamic_ncols=True,
            )

    def _log(self, trainer: Trainer, window: Window) -> None:
        if not window.steps:  # all of them were passed over
            return
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
            **named_rates(trainer.detector, trainer.optimizer),
            **_gradient_norm(window.steps),
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
            clock((trainer.num_images - trainer.images_seen) / speed),
            values["total_loss"],
            "  ".join(f"{name.removeprefix('loss_')} {loss:.4g}" for name, loss in losses.items()),
            values["lr"],
            values["lr_lowest"],
            speed,
            values["data_seconds"],
            values["max_memory_mb"],
        )


def _gradient_norm(steps: Sequence[StepRecord]) -> dict[str, float]:
    """{"grad_norm": mean over the steps}; those in which fp16 overflowed do not count."""
    norms = [step.grad_norm for step in steps if step.grad_norm is not None]
    if not norms:
        return {}
    found = torch.stack([norm.float() for norm in norms])
    finite = found[found.isfinite()]
    return {"grad_norm": float(finite.mean())} if len(finite) else {}


def max_memory_mb(device: torch.device) -> float:
    """Largest memory so far: of the GPU's allocator, or of this process on a CPU, in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
