"""What a run says: lines on the terminal and in log.txt, numbers in metrics.json and elsewhere."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import resource
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
import yaml

from vitdet.engine.trainer import Hook, StepRecord, Trainer, Window
from vitdet.utils.checks import InputError, printable
from vitdet.utils.distributed import is_main, reduce_mean
from vitdet.utils.files import read_small, write_text

logger = logging.getLogger(__name__)

IMAGES = "images_seen"  # x of every number
METRICS = "metrics.json"
_LOGGERS = "loggers.json"  # {"wandb": id of the run there}, so that a resume goes on with it

# --- lines ---------------------------------------------------------------------------------------


@contextmanager
def logging_to() -> Iterator[Callable[[Path], None]]:
    """Send the main process's log lines to stdout; yields what also sends all of them to a file."""
    package = logging.getLogger("vitdet")
    level = package.level
    style = _Printable("[%(asctime)s] %(message)s", "%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = []
    earlier = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)

    def add(handler: logging.Handler) -> None:
        handler.setFormatter(style)
        package.addHandler(handler)
        handlers.append(handler)

    def log_to(path: Path) -> None:
        if is_main():
            file = _LogFile(path, encoding="utf-8")
            add(file)
            for record in earlier.buffer:
                file.handle(record)
            package.removeHandler(earlier)

    if is_main():
        add(_Terminal(sys.stdout))
        add(earlier)
    package.setLevel(logging.INFO if is_main() else logging.WARNING)
    try:
        yield log_to
    finally:
        for handler in handlers:
            package.removeHandler(handler)
            handler.close()
        package.setLevel(level)


class _Printable(logging.Formatter):
    """Texts of files may be in a line, and the terminal would obey them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _LogFile(logging.FileHandler):
    """A file whose errors are the run's: a full disk is one line there, not a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 (logging's)
        if (error := sys.exc_info()[1]) is not None:
            raise error


class _Terminal(logging.StreamHandler):
    """Prints no more where nobody reads or the disk is full: the run goes on, and log.txt."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's)
        if isinstance(sys.exc_info()[1], OSError):
            self.setLevel(logging.CRITICAL + 1)
        else:
            super().handleError(record)


# --- numbers -------------------------------------------------------------------------------------


def check_loggers(names: Sequence[str] | None) -> None:
    """Raise an InputError for a name in `train.loggers` that is none, or a missing package."""
    for name in names or ():
        if name != "wandb":
            raise InputError(f"train.loggers: expected [wandb] or [], got {name!r}.")
        if importlib.util.find_spec(name) is None:
            raise InputError("train.loggers: wandb is not installed (pip install wandb).")


class Metrics:
    """Write lines of numbers to metrics.json and TensorBoard, and to Weights & Biases if asked for.

    x is the number of images seen. Only the main process writes. A resumed run drops what was
    written after its checkpoint. As a context it ends the run of W&B, as failed after an error.
    W&B gets `about`, the run's record (`vitdet.engine.recipe.write_record`).
    """

    def __init__(self, options: Any, images_seen: int, *, about: Mapping[str, Any]) -> None:
        folder = Path(options.output_dir)
        self.path = folder / METRICS
        self._board: Any = None
        self._wandb: Any = None
        if not is_main():
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        lines = read_metrics(folder) if images_seen else []
        kept = [json.dumps(each) + "\n" for each in lines if each[IMAGES] <= images_seen]
        write_text(self.path, "".join(kept))
        self._board = SummaryWriter(str(folder), purge_step=images_seen + 1)
        if "wandb" in (options.loggers or ()):
            self._wandb = _open_wandb(folder, about)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(kind is not None))

    def write(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Add one line."""
        if not is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({IMAGES: images_seen, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, images_seen)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=images_seen)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.json; one that a kill cut off is left out."""
    found = []
    for line in read_small(folder / METRICS, str.splitlines, []):
        with suppress(json.JSONDecodeError, RecursionError):
            found.append(json.loads(line))
    return [each for each in found if isinstance(each, dict) and isinstance(each.get(IMAGES), int)]


def _open_wandb(folder: Path, about: Mapping[str, Any]) -> Any:
    """Begin or go on with a run of W&B; its own environment says where (WANDB_PROJECT, ...)."""
    import wandb

    known = read_small(folder / _LOGGERS, lambda text: dict(json.loads(text)), {})
    identity = known.get("wandb") or uuid.uuid4().hex[:12]
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "vitdet"),
            name=os.environ.get("WANDB_NAME", folder.resolve().name),
            id=identity,
            resume="allow",
            dir=str(folder),
            config={**yaml.safe_load(about["config"]), "environment": about["environment"]},
            settings=wandb.Settings(console="off"),  # log.txt has the lines
        )
    except wandb.Error as error:
        remedy = "Log in with `wandb login`, or set WANDB_MODE=offline and `wandb sync` it later"
        raise InputError(f"train.loggers, wandb: {error}. {remedy}.") from error
    write_text(folder / _LOGGERS, json.dumps({"wandb": identity}, indent=1) + "\n")
    return run


class Progress(Hook):
    """One log line and one set of metrics every `every` iterations, of means over these."""

    def __init__(self, metrics: Metrics, *, every: int) -> None:
        self.metrics = metrics
        self.every = max(every, 1)

    def after_step(self, trainer: Trainer) -> None:
        """Log when enough steps have gathered, and after the last step."""
        if len(trainer.window.steps) < self.every and trainer.images_seen < trainer.num_images:
            return
        window = trainer.next_window()
        if window.steps:  # none: all of them were passed over
            self._log(trainer, window)

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
            **gradient_norm(window.steps),
            "images_per_second": speed,
            "data_seconds": window.data_seconds / len(window.steps),
            "max_memory_mb": max_memory(trainer.device) / 2**20,
        }
        heads = {name: float(v) for name, v in trainer.statistics.latest_values.items()}
        self.metrics.write(trainer.images_seen, {**values, **heads})
        logger.info(
            "%d/%d images  eta %s  loss %.4g (%s)  lr %.3g lowest %.3g  %.2f img/s  "
            "data %.3f s  %d MB",
            trainer.images_seen,
            trainer.num_images,
            timedelta(seconds=round((trainer.num_images - trainer.images_seen) / speed)),
            values["total_loss"],
            "  ".join(f"{name.removeprefix('loss_')} {loss:.4g}" for name, loss in losses.items()),
            *(values[name] for name in ("lr", "lr_lowest", "images_per_second", "data_seconds")),
            values["max_memory_mb"],
        )


def gradient_norm(steps: Sequence[StepRecord]) -> dict[str, float]:
    """{"grad_norm": mean over the steps}; those in which fp16 overflowed do not count."""
    norms = [step.grad_norm.float() for step in steps if step.grad_norm is not None]
    finite = [norm for norm in norms if norm.isfinite()]
    return {"grad_norm": float(torch.stack(finite).mean())} if finite else {}


def max_memory(device: torch.device) -> int:
    """Largest memory so far in bytes: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
