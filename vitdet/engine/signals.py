"""Preemption: SIGTERM and SIGUSR1 end a run after its step, with a checkpoint and a status.

A scheduler sends one of them some time before it takes the machine away. The process only takes
note; after the step, if any process of the run was told, all of them save and leave.
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
from vitdet.engine.trainer import Trainer
from vitdet.utils.distributed import any_rank
from vitdet.utils.signals import PREEMPTION

logger = logging.getLogger(__name__)


class Preempted(SystemExit):
    """The run was asked to leave and has saved; a process that lets it pass exits with 75."""

    def __init__(self, text: str) -> None:
        super().__init__(PREEMPTED_STATUS)
        self.text = text

    def __str__(self) -> str:
        return self.text


class Notice:
    """The signal that came, None before."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def take(self, number: int, _: FrameType | None) -> None:
        """Handle a signal."""
        self.signal = signal.Signals(number)


@contextmanager
def noticed() -> Iterator[Notice]:
    """Within the block, in a main thread, SIGTERM and SIGUSR1 only leave a notice."""
    notice = Notice()
    if threading.current_thread() is not threading.main_thread():
        yield notice  # Python lets no other thread handle signals
        return
    before = {each: signal.signal(each, notice.take) for each in PREEMPTION}
    try:
        yield notice
    finally:
        for each, handler in before.items():
            # None: whoever set it was not Python
            signal.signal(each, signal.SIG_DFL if handler is None else handler)


class Preemption:
    """A hook that saves and leaves when a process of the run has got a signal.

    Args:
        notice: of this process.
        save: writes a checkpoint of this moment and returns its path when it is on the disk.
    """

    def __init__(self, notice: Notice, save: Callable[[Trainer], Path]) -> None:
        self.notice = notice
        self.save = save

    def after_step(self, trainer: Trainer) -> None:
        """Leave if any process was told to and training would go on.

        Raises:
            Preempted: after the checkpoint was written.
        """
        if trainer.images_seen < trainer.num_images and any_rank(self.notice.signal is not None):
            self._leave(trainer, self.save(trainer).name)

    def after_train(self, trainer: Trainer) -> None:
        """Leave before the evaluation; the last checkpoint was just written.

        Raises:
            Preempted: if any process was told to leave.
        """
        if any_rank(self.notice.signal is not None):
            self._leave(trainer, "the last checkpoint")

    def _leave(self, trainer: Trainer, name: str) -> None:
        told = "a signal" if self.notice.signal is None else self.notice.signal.name
        text = (
            f"{told} after {trainer.images_seen} images: saved {name}, leaving with status "
            f"{PREEMPTED_STATUS}; --resume goes on from here"
        )
        logger.info("%s", text)
        raise Preempted(text)
