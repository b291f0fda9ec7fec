"""Preemption: SIGTERM, SIGUSR1 and ^C end a run after its step, with a checkpoint and a status.

A scheduler sends one of them some time before it takes the machine away. The process only takes
note; after the step, if any process of the run was told, all of them save and leave. A second ^C
ends the process at once.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from vitdet.engine.launch import PREEMPTED_STATUS
from vitdet.engine.trainer import Hook, Trainer
from vitdet.utils.checks import INTERRUPTED_STATUS
from vitdet.utils.distributed import any_rank, world_size
from vitdet.utils.signals import PREEMPTION

logger = logging.getLogger(__name__)


class Preempted(SystemExit):
    """The run was asked to leave and has saved; the status of the process is 75, or 130 for ^C."""

    def __init__(self, text: str, status: int = PREEMPTED_STATUS) -> None:
        super().__init__(status)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Notice:
    """The signal that came, None before.

    Attributes:
        training: whether there is something to save; before that, ^C ends the process at once.
        saved: set while everything is on its way to the disk already (an evaluation): called when
            a signal comes.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.training = False
        self.saved: Callable[[], None] | None = None

    def take(self, number: int, _: FrameType | None) -> None:
        """Handle a signal."""
        again = self.signal is signal.SIGINT
        self.signal = signal.Signals(number)
        if number == signal.SIGINT and (again or not self.training):
            raise KeyboardInterrupt
        if self.saved is not None:
            self.saved()


@contextmanager
def noticed() -> Iterator[Notice]:
    """Within the block, in a main thread, SIGTERM, SIGUSR1 and ^C only leave a notice.

    After a preemption SIGTERM and SIGUSR1 are ignored: schedulers repeat them, and the process is
    to end with its own status.
    """
    notice = Notice()
    if threading.current_thread() is not threading.main_thread():
        yield notice  # Python lets no other thread handle signals
        return
    before = {each: signal.signal(each, notice.take) for each in (*PREEMPTION, signal.SIGINT)}
    try:
        yield notice
    except Preempted:
        before |= dict.fromkeys(PREEMPTION, signal.SIG_IGN)
        raise
    finally:
        for each, handler in before.items():
            # None: whoever set it was not Python
            signal.signal(each, signal.SIG_DFL if handler is None else handler)


class Preemption(Hook):
    """A hook that saves and leaves when a process of the run has got a signal.

    Args:
        notice: of this process.
        save: writes a checkpoint of this moment and returns its path when it is on the disk.
    """

    def __init__(self, notice: Notice, save: Callable[[Trainer], Path]) -> None:
        self.notice = notice
        self.save = save

    def after_step(self, trainer: Trainer) -> None:
        """Raise Preempted, with a checkpoint, if any process was told and training would go on."""
        if trainer.images_seen < trainer.num_images and any_rank(self.notice.signal is not None):
            self._leave(trainer, f"saved {self.save(trainer).name}")

    def after_train(self, trainer: Trainer) -> None:
        """Raise Preempted before the evaluation; the last checkpoint was just written."""
        if any_rank(self.notice.signal is not None):
            self._leave(trainer, "saved the last checkpoint")

    @contextmanager
    def evaluating(self, trainer: Trainer) -> Iterator[None]:
        """Within the block, of which nothing is lost, a process alone leaves at once."""
        if world_size() == 1:
            self.notice.saved = lambda: self._leave(trainer, "saved before this evaluation")
        try:
            yield
        finally:
            self.notice.saved = None

    def _leave(self, trainer: Trainer, what: str) -> None:
        told = "a signal" if self.notice.signal is None else self.notice.signal.name
        interrupted = any_rank(self.notice.signal is signal.SIGINT)
        status = INTERRUPTED_STATUS if interrupted else PREEMPTED_STATUS
        text = (
            f"{told} after {trainer.images_seen} images: {what}, leaving with status {status}; "
            "--resume goes on from here"
        )
        logger.info("%s", text)
        raise Preempted(text, status)
