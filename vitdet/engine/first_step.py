"""A watch over the first step: when it does not end, say which rank holds the others up."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vitdet.engine import startup
from vitdet.engine.trainer import Trainer
from vitdet.utils.distributed import is_main, rank, world_size

logger = logging.getLogger(__name__)

STUCK_STATUS = 4
PARTS = ("no data yet", "data, no loss yet", "a loss, no end of the step yet", "all of it")
_EVERY = 0.5  # seconds between two looks at the other ranks
_GRACE = 10.0  # seconds that a rank waits for the others to write their stacks

Batches = TypeVar("Batches")


def _print(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


_tell: Callable[[str], object] = _print


def tell_with(tell: Callable[[str], object]) -> None:
    """Set who gets the line when the first step does not end; by default it goes to stderr."""
    global _tell  # noqa: PLW0603  of this process, which is about to end
    _tell = tell


class FirstStep:
    """End the run when its first step is not done within a time limit.

    Many mistakes of large runs show there: a loader that hangs on a file system, a network
    interface that lets no data through, kernels that compile for ever. Without this watch every
    rank waits in silence. With it each writes the stacks of its threads to
    `stuck_rank<r>.txt` in the output folder, one line says how far every rank came, and all end
    with STUCK_STATUS.

    Use it as a hook of the trainer, the first, round the batches:
    `trainer.run(watch.over(batches, trainer), n, [watch, ...])`, and `stop` it when that ends.

    Args:
        output_dir: folder of the run.
        limit: seconds from the first batch asked for to the end of the first step; None for no
            watch.
    """

    def __init__(self, output_dir: Path, limit: float | None) -> None:
        self.output_dir = output_dir
        self.limit = limit
        self.done = threading.Event()
        self.store: dist.Store = dist.HashStore()

    def over(self, batches: Iterator[Batches], trainer: Trainer) -> Iterator[Batches]:
        """Return the same batches; the watch begins when the first is asked for."""
        if self.limit is None:
            yield from batches
            return
        meeting = startup.current()
        if meeting is not None:
            # A connection of its own: that of the main thread may be held up in it.
            self.store = dist.PrefixStore(f"{meeting.name} first step", meeting.store.clone())
        self._reached(0)
        threading.Thread(target=self._watch, args=(self.limit,), daemon=True).start()
        hook = None
        for batch in batches:
            if hook is None:
                self._reached(1)
                hook = trainer.loss.register_forward_hook(lambda *_: self._reached(2))
            else:
                hook.remove()
            yield batch

    def stop(self) -> None:
        """End the watch, whatever was reached."""
        self.done.set()

    def after_step(self, trainer: Trainer) -> None:
        """End the watch after the first step."""
        if self.limit is None or self.done.is_set():
            return
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()  # until then the step is only under way
        self._reached(3)
        self.stop()

    def after_train(self, trainer: Trainer) -> None:
        """Nothing is left to watch."""

    def _reached(self, part: int) -> None:
        state = {"part": part, "host": socket.gethostname()}
        self.store.set(f"rank {rank()}", json.dumps(state))

    def _watch(self, limit: float) -> None:
        """Run in a thread: wait for the end of the step, the limit, or another rank's alarm."""
        deadline = time.monotonic() + limit
        while not self.done.wait(_EVERY):
            if time.monotonic() > deadline or self._asked(lambda: self.store.check(["alarm"])):
                break
        else:
            return
        self._asked(lambda: self.store.set("alarm", ""))
        path = self._write_stacks()
        text = self._asked(lambda: self._account(limit)) or (
            f"first step: expected its end within {limit:g} s, got none, and no word of the other "
            f"ranks. The stacks of rank {rank()} are in {path}."
        )
        if is_main():
            logger.error("%s", text)
        if self._asked(lambda: self.store.add("told", 1)) in (1, None):
            _tell(text)
        self._asked(self._wait_for_the_others)
        os._exit(STUCK_STATUS)

    def _write_stacks(self) -> Path:
        path = self.output_dir / f"stuck_rank{rank()}.txt"
        try:
            with path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # the disk may be what hangs: then to where it can still be read
            print(f"{path} could not be written ({error})", file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True)
        return path

    def _account(self, limit: float) -> str:
        """One line: which rank came how far."""
        states = [self._state(each) for each in range(world_size())]
        slowest = min(part for part, _ in states)
        told = []
        for part in sorted({part for part, _ in states}):
            ranks = [each for each, (reached, _) in enumerate(states) if reached == part]
            where = PARTS[part] if part >= 0 else "not begun"
            told.append(f"{startup.numbers(ranks)}: {where}")
        silent = [each for each, (part, _) in enumerate(states) if part == slowest]
        hosts = sorted({states[each][1] for each in silent})
        return (
            f"first step: expected its end within {limit:g} s, got {'; '.join(told)}. Look at "
            f"{startup.numbers(silent)} on {', '.join(hosts)} first: the stacks of its threads "
            f"are in {self.output_dir}/stuck_rank{silent[0]}.txt (those of the others beside it). "
            "If it only needs longer, raise train.first_step_timeout."
        )

    def _state(self, each: int) -> tuple[int, str]:
        if not self.store.check([f"rank {each}"]):
            return -1, "an unknown machine"
        state: dict[str, Any] = json.loads(self.store.get(f"rank {each}"))
        return state["part"], state["host"]

    def _wait_for_the_others(self) -> None:
        """Stay until all have written their stacks: who leaves may take them along."""
        self.store.set(f"written {rank()}", "")
        names = [f"written {each}" for each in range(world_size())]
        deadline = time.monotonic() + _GRACE
        while not self.store.check(names) and time.monotonic() < deadline:
            time.sleep(_EVERY)

    @staticmethod
    def _asked(question: Callable[[], Any]) -> Any:
        """Return the store's answer, None when it is gone: this rank then speaks for itself."""
        try:
            return question()
        except (dist.DistNetworkError, dist.DistStoreError):
            return None
