"""A watch over every step: one that does not end is said, with the stacks, and ends the run."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from vitdet.engine.trainer import Hook, Trainer
from vitdet.utils.checks import INPUT_ERROR_STATUS, one_line
from vitdet.utils.distributed import rank

Batches = TypeVar("Batches")


def _print(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


report: Callable[[str], object] = _print  # takes the line; `launch` sets its own in a process


class Watch(Hook):
    """A hook that ends the run when a step is not done within a time limit.

    A file system that hangs, a process that is lost, a network that lets no data through: without
    it all ranks wait in silence. With it each writes the stacks of its threads to
    `stuck_rank<r>.txt` in the output folder, says so in a line, and ends with status 2. What other
    hooks do (evaluations, checkpoints) has no limit.

    Args:
        output_dir: folder of the run.
        limit: seconds of this process from a batch asked for to the end of its step; None for none.
    """

    def __init__(self, output_dir: Path, limit: float | None) -> None:
        self.output_dir = output_dir
        self.limit = limit
        self._step = 0  # even between steps
        self._done = threading.Event()

    def over(self, batches: Iterator[Batches]) -> Iterator[Batches]:
        """Return the same batches; a step begins where one is asked for."""
        if self.limit is not None:
            threading.Thread(target=self._watch, args=(self.limit,), daemon=True).start()
        self._step += 1
        for batch in batches:
            yield batch
            self._step += 1

    def after_step(self, trainer: Trainer) -> None:  # noqa: ARG002
        """End the step; the first hook to be called."""
        self._step += 1

    def stop(self) -> None:
        """End the watch."""
        self._done.set()

    def _watch(self, limit: float) -> None:
        """Count the looks, in a thread: the time for which a run is suspended does not count."""
        tick = min(1.0, limit / 4)
        step, waited = 0, 0.0
        while not self._done.wait(tick):
            waited = waited + tick if step == self._step and step % 2 else 0.0
            step = self._step
            if waited >= limit:
                self._end(limit)

    def _end(self, limit: float) -> None:
        path = self.output_dir / f"stuck_rank{rank()}.txt"
        text = (
            f"training: expected the end of a step within {limit:g} s, got none. The stacks of "
            f"rank {rank()} are in {path}: they say what it waits for. If it only needs longer, "
            "raise train.step_timeout."
        )
        try:
            with path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # the disk may be what hangs
            text += f" ({path.name} could not be written: {error.strerror})"
        report(one_line(text))
        os._exit(INPUT_ERROR_STATUS)
