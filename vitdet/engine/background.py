"""Writing beside the steps: copies of the state on the CPU, and one thread that saves them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

logger = logging.getLogger(__name__)


def on_cpu(value: Any) -> Any:
    """Return a copy of nested dicts, lists and tensors that later steps cannot change.

    Tensors that share their memory share it in the copy, so that a file does not grow.
    """
    return _copied(value, {})


def _copied(value: Any, made: dict[Any, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.dtype)
        key = (value.device, *place, value.shape, value.stride())
        if key not in made:
            made[key] = value.detach().to("cpu", copy=True)
        return made[key]
    if isinstance(value, Mapping):
        return {name: _copied(item, made) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, made) for item in value)
    return value


class Writer:
    """Does one job after the other, in a thread or at once.

    Python waits for the thread when it ends, so what was begun is completed.

    Args:
        background: whether there is a thread.
    """

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self._thread: ThreadPoolExecutor | None = None
        self._jobs: deque[Future[None]] = deque()

    def submit(self, *steps: Callable[[], None]) -> None:
        """Do the steps in their order; one that fails leaves out those after it."""
        if not self.background:
            _do(steps)
            return
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._jobs.append(self._thread.submit(_do, steps))

    def check(self) -> None:
        """Raise what went wrong in a job that is done."""
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()

    def wait(self) -> None:
        """Wait until all jobs are done; raise what went wrong."""
        while self._jobs:
            self._jobs.popleft().result()

    def close(self) -> None:
        """Complete what was begun. For an end that has its own error: another is only logged."""
        if self._thread is not None:
            self._thread.shutdown()
        for job in self._jobs:
            if (error := job.exception()) is not None:
                logger.error("%s", error)
        self._jobs.clear()


def _do(steps: tuple[Callable[[], None], ...]) -> None:
    for step in steps:
        step()
