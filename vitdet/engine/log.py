"""What a run says: lines and a bar on the terminal, log.txt, metrics.json, TensorBoard."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vitdet.engine.trainer import Hook, StepRecord, Trainer, Window
from vitdet.utils.checks import printable
from vitdet.utils.distributed import is_main, reduce_mean
from vitdet.utils.files import read_small, write_text

logger = logging.getLogger(__name__)

IMAGES = "images_seen"  # x of every number
METRICS = "metrics.json"
_WAITS = 0.3  # of its time, and a run says so
_STEPS = 20  # between two lines, where the recipe says nothing; and the least lines of a run

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

    def emit(self, record: logging.LogRecord) -> None:
        """Print the line above a bar."""
        if not on_terminal():
            super().emit(record)
            return
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's)
        if isinstance(sys.exc_info()[1], OSError):
            self.setLevel(logging.CRITICAL + 1)
        else:
            super().handleError(record)


# --- bars ----------------------------------------------------------------------------------------


def on_terminal() -> bool:
    """Whether somebody may watch a bar."""
    return is_main() and sys.stdout.isatty()


def bar(what: str, total: int | None, steps: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return a bar on the terminal, which goes when it is done."""
    tqdm.monitor_interval = 0  # neither a thread nor a lock for processes: reading ones are forked
    tqdm.set_lock(threading.RLock())
    size = shutil.get_terminal_size()  # tqdm shows nothing where the system says 0
    style = {"leave": False, "file": sys.stdout, "ncols": size.columns, "nrows": size.lines}
    return tqdm(steps, what, total, **style, **options)


# --- numbers -------------------------------------------------------------------------------------


class Metrics:
    """Write lines of numbers to metrics.json and TensorBoard.

    x is the number of images seen. Only the main process writes. A resumed run drops what was
    written after its checkpoint.
    """

    def __init__(self, folder: Path, images_seen: int) -> None:
        self.path = folder / METRICS
        self._board: Any = None
        if not is_main():
            return
        from torch.utils.tensorboard.writer import SummaryWriter

        lines = read_metrics(folder) if images_seen else []
        kept = [json.dumps(each) + "\n" for each in lines if each[IMAGES] <= images_seen]
        write_text(self.path, "".join(kept))
        self._board = SummaryWriter(str(folder), purge_step=images_seen + 1)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()

    def write(self, images_seen: int, values: Mapping[str, float]) -> None:
        """Add one line."""
        if not is_main():
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({IMAGES: images_seen, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, images_seen)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.json; one that a kill cut off is left out."""
    found = []
    for line in read_small(folder / METRICS, str.splitlines, []):
        with suppress(json.JSONDecodeError, RecursionError):
            found.append(json.loads(line))
    return [each for each in found if isinstance(each, dict) and isinstance(each.get(IMAGES), int)]


class Progress(Hook):
    """A line and a set of metrics every `every` steps, of means over these; a bar on a terminal.

    The loss of the first step is said at once. As a context it takes the bar away at the end.

    Args:
        metrics: of the run.
        every: None for as many as give a run at least twenty lines.
        total_batch_size: images a step over all processes.
        num_images: length of the training.
    """

    def __init__(
        self, metrics: Metrics, every: int | None, total_batch_size: int, num_images: int
    ) -> None:
        self.metrics = metrics
        steps = -(-num_images // total_batch_size)
        self.every = every or min(max(steps // _STEPS, 1), _STEPS)
        self.total_batch_size = total_batch_size
        self.goal = steps * total_batch_size
        self._begun = False
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def after_step(self, trainer: Trainer) -> None:
        """Log when enough steps have gathered, and after the last step."""
        self._show(trainer)
        if len(trainer.window.steps) < self.every and trainer.images_seen < trainer.num_images:
            return
        window = trainer.next_window()
        if window.steps:  # none: all of them were passed over
            self._log(trainer, window)

    def _show(self, trainer: Trainer) -> None:
        """Move the bar, and say the loss of the first step."""
        window = trainer.window
        if not self._begun and window.steps:
            self._begun = True
            seconds = time.perf_counter() - window.started
            losses = _mean_losses(window)
            if self.every > 1:  # else its own line follows
                text = "first step: %d images in %.3g s (%.2g s of it read), loss %s"
                logger.info(text, window.images, seconds, window.data_seconds, _losses(losses))
            if on_terminal():
                self._bar = bar("train", self.goal, initial=trainer.images_seen, unit="img")
                self._bar.set_postfix_str(f"loss {sum(losses.values()):.4g}")
        if self._bar is not None:
            self._bar.update(trainer.images_seen - self._bar.n)

    def _log(self, trainer: Trainer, window: Window) -> None:
        seconds = max(time.perf_counter() - window.started, 1e-9)
        losses = _mean_losses(window)
        lrs = [group["lr"] for group in trainer.optimizer.param_groups]
        speed, seen = window.images / seconds, trainer.images_seen
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
        self.metrics.write(seen, {**values, **heads})
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['total_loss']:.4g}")
        waited = window.data_seconds / seconds
        logger.info(
            "%d/%d images  eta %s  loss %s  lr %.3g  %.2f img/s%s",
            seen,
            max(self.goal, seen),
            timedelta(seconds=round(max(self.goal - seen, 0) / speed)),
            _losses(losses),
            values["lr"],
            speed,
            f"  {waited:.0%} of the time waiting for images" if waited > _WAITS else "",
        )


def _mean_losses(window: Window) -> dict[str, float]:
    """Losses by name, of all processes."""
    means = torch.stack([step.losses for step in window.steps]).mean(0)
    return reduce_mean(dict(zip(window.steps[-1].names, means, strict=True)))


def _losses(losses: Mapping[str, float]) -> str:
    parts = "  ".join(f"{name.removeprefix('loss_')} {loss:.4g}" for name, loss in losses.items())
    return f"{sum(losses.values()):.4g} ({parts})"


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
