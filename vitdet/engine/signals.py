"""What ends a run before its time: SIGTERM, SIGUSR1 and ^C, or a step that does not end."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from detectron2.utils import comm

from vitdet.engine.trainer import Hook, Trainer
from vitdet.utils.checks import (
    INPUT_ERROR_STATUS,
    INTERRUPTED_STATUS,
    NOTHING_YET,
    PREEMPTED_STATUS,
    one_line,
)
from vitdet.utils.distributed import PREEMPTION, any_rank, is_main, rank, world_size

logger = logging.getLogger(__name__)

Batches = TypeVar("Batches")
_WAIT = 30  # seconds, doubled each time, after which a first step that goes on is said


class Preempted(SystemExit):
    """The run was asked to leave and has saved; the status of the process is 75, or 130 for ^C."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(status)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Signals(Hook):
    """A hook that saves and leaves when a process of the run has got a signal.

    Within a `with` block, in a main thread, signals are only noted, and acted on after the step; a
    second ^C ends the process at once. After a preemption SIGTERM and SIGUSR1 are ignored:
    schedulers repeat them, and the process is to end with its own status.

    Attributes:
        signal: the last that came.
        save: writes a checkpoint of this moment and returns its path when it is on the disk. None
            before the training: there is nothing to save, and ^C ends the process at once.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.save: Callable[[Trainer], Path] | None = None
        self._saved: Callable[[], None] | None = None  # called at once while all is saved
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # no other can handle signals
            numbers = (*PREEMPTION, signal.SIGINT)
            self._before = {each: signal.signal(each, self.take) for each in numbers}
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        ignored = PREEMPTION if isinstance(error, Preempted) else ()
        for each, handler in self._before.items():
            # None: whoever set it was not Python
            before = signal.SIG_DFL if handler is None else handler
            signal.signal(each, signal.SIG_IGN if each in ignored else before)

    def take(self, number: int, _: FrameType | None) -> None:
        """Handle a signal."""
        again = self.signal is signal.SIGINT
        self.signal = signal.Signals(number)
        if number == signal.SIGINT and self.save is None:
            raise KeyboardInterrupt(NOTHING_YET)
        if number == signal.SIGINT and again:
            raise KeyboardInterrupt("at once; --resume goes on from the last checkpoint")
        if self._saved is not None:
            self._saved()
        elif is_main():  # not by print or logging, which it may have come into
            again = " (^C again: end at once)" if number == signal.SIGINT else ""
            os.write(2, f"\n{_called(number)}: saving after this step{again}\n".encode())

    def after_step(self, trainer: Trainer) -> None:
        """Raise Preempted, with a checkpoint, if any process was told and training would go on."""
        if trainer.images_seen < trainer.num_images and any_rank(self.signal is not None):
            assert self.save is not None, "set before the training"
            interrupted = any_rank(self.signal is signal.SIGINT)
            self._leave(trainer, f"saved {self.save(trainer).name}", interrupted)

    def after_train(self, trainer: Trainer) -> None:
        """Raise Preempted before the evaluation; the last checkpoint was just written."""
        if any_rank(self.signal is not None):
            interrupted = any_rank(self.signal is signal.SIGINT)
            self._leave(trainer, "saved the last checkpoint", interrupted)

    @contextmanager
    def evaluating(self, trainer: Trainer) -> Iterator[None]:
        """Within the block, of which nothing is lost, the processes of one machine leave at once.

        Those of several would leave without those of a machine that nobody told.
        """
        if world_size() == 1 or world_size() == comm.get_local_size():
            what = "saved before this evaluation"
            self._saved = lambda: self._leave(trainer, what, self.signal is signal.SIGINT)
        try:
            yield
        finally:
            self._saved = None

    def _leave(self, trainer: Trainer, what: str, interrupted: bool) -> None:
        told = "a signal" if self.signal is None else _called(self.signal)
        status = INTERRUPTED_STATUS if interrupted else PREEMPTED_STATUS
        text = (
            f"{told} after {trainer.images_seen} images: {what}, leaving with status {status}; "
            "the same command with --resume goes on from here"
        )
        logger.info("%s", text)
        raise Preempted(text, status)


def _called(number: int) -> str:
    return "^C" if number == signal.SIGINT else signal.Signals(number).name


class Watch(Hook):
    """A hook that ends the run when a step is not done within a time limit.

    A first step that takes long is said.

    A file system that hangs, a process that is lost, a network that lets no data through: without
    it all ranks wait in silence. With it each writes the stacks of its threads to
    `stuck_rank<r>.txt` in the output folder, says so in a line, and ends with status 2. What other
    hooks do (evaluations, checkpoints) has no limit, nor has the time for which a run is suspended.

    Args:
        output_dir: folder of the run.
        limit: seconds of this process from a batch asked for to the end of its step; None for none.
    """

    def __init__(self, output_dir: Path, limit: float | None) -> None:
        self.output_dir = output_dir
        self.limit = limit
        self._step = 0  # even between steps
        self._reads = True
        self._done = threading.Event()

    def over(self, batches: Iterator[Batches]) -> Iterator[Batches]:
        """Return the same batches; a step begins where one is asked for."""
        if self.limit is not None:
            threading.Thread(target=self._watch, args=(self.limit,), daemon=True).start()
        self._step += 1
        for batch in batches:
            self._reads = False
            yield batch
            self._step, self._reads = self._step + 1, True

    def after_step(self, trainer: Trainer) -> None:  # noqa: ARG002
        """End the step; the first hook to be called."""
        self._step += 1

    def stop(self) -> None:
        """End the watch."""
        self._done.set()

    def _watch(self, limit: float) -> None:
        tick = min(1.0, limit / 4)
        step, waited, said = 0, 0.0, _WAIT
        while not self._done.wait(tick):
            waited = waited + tick if step == self._step and step % 2 else 0.0
            step = self._step
            if step == 1 and waited >= said:
                what = "its images are read" if self._reads else "it is computed"
                logger.info("first step: %d s so far, %s", waited, what)
                said *= 2
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
        print(one_line(f"error: {text}"), file=sys.stderr, flush=True)
        os._exit(INPUT_ERROR_STATUS)
