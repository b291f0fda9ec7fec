"""One thing at a time; a few may wait, and no one waits for ever."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from vitdet.app.serve.uploads import RefusedError

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Line(Generic[Item, Answer]):
    """Places before one counter.

    `enter` takes a place before an upload is read, so that the memory for uploads is bounded too;
    `leave` gives it back. Work that has begun cannot be broken off: it goes on, and holds the
    counter, when nobody waits for its answer any more.

    Args:
        work: what is done at the counter, in a thread of its own.
        waiting: how many may stand behind the one who is served.
        seconds: the longest wait for an answer.
    """

    def __init__(self, work: Callable[[Item], Answer], *, waiting: int, seconds: float) -> None:
        self._work = work
        self._places = 1 + waiting
        self._seconds = seconds
        self._counter = ThreadPoolExecutor(1, thread_name_prefix="detector")
        self.taken = 0  # places
        self._last = 1.0  # seconds that the latest took

    def enter(self) -> None:
        """Take a place.

        Raises:
            RefusedError: there is none.
        """
        if self.taken >= self._places:
            raise self._busy("Too many pictures are waiting.")
        self.taken += 1

    def leave(self) -> None:
        """Give the place back."""
        self.taken -= 1

    async def serve(self, item: Item) -> Answer:
        """Wait for one's turn, and return the answer.

        Raises:
            RefusedError: it took too long. What waits is then taken out of the line.
        """
        future = self._counter.submit(self._timed, item)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._seconds)
        except asyncio.TimeoutError as error:
            raise self._busy("It took too long.") from error

    def close(self) -> None:
        """Take no more work; what has begun ends."""
        self._counter.shutdown(wait=True, cancel_futures=True)

    def _timed(self, item: Item) -> Answer:
        started = time.perf_counter()
        try:
            return self._work(item)
        finally:
            self._last = time.perf_counter() - started

    def _busy(self, text: str) -> RefusedError:
        wait = max(1, math.ceil(self._last * self.taken))
        return RefusedError(503, f"{text} Try again in {wait} s.", {"Retry-After": str(wait)})
