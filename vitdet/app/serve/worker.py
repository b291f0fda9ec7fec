"""The process that decodes and detects: it can be ended in the midst of a picture."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import signal
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from starlette.exceptions import HTTPException

from vitdet.utils.checks import InputError

Json = dict[str, Any]
Answer = Callable[[bytes], tuple[int, bytes]]  # from an upload to a status of HTTP and JSON
Start = Callable[[], tuple[Json, Answer]]  # loads the model; what is known of it, what answers


class Worker:
    """One picture at a time, in a process of its own; a few may wait, and no one waits for ever.

    What nobody waits for any more may end in a few seconds; else the process is ended, and the
    next picture starts a new one.

    Args:
        start: called in the process.
        waiting: how many pictures may wait while one is worked on.
        seconds: the longest wait for an answer.
        method: of multiprocessing.
    """

    GRACE = 5.0  # seconds

    def __init__(
        self, start: Start, waiting: int, seconds: float, method: str = "forkserver"
    ) -> None:
        self._start, self._seconds, self._places = start, seconds, 1 + waiting
        self._context: Any = multiprocessing.get_context(method)
        self._turns = ThreadPoolExecutor(1)
        self._asked: set[Future[tuple[int, bytes]]] = set()
        self._process: Any = None
        self._ended = False
        self._last = 1.0  # seconds that the latest took

    @property
    def taken(self) -> int:
        """How many pictures wait or are worked on."""
        return len(self._asked)

    def begin(self) -> Json:
        """Start the process; return what is known of the model.

        Raises:
            InputError: the model cannot be used.
        """
        self._mine, theirs = self._context.Pipe()
        given = (self._start, self._mine, theirs)
        self._process = self._context.Process(target=_work, args=given, daemon=True)
        self._process.start()
        theirs.close()
        try:
            error, about = self._mine.recv()
        except EOFError:
            error, about = "detector: its process died at its start, see above.", {}
        if error:
            self._kill()
            raise InputError(error)
        return about

    def end(self) -> None:
        """End the process, whatever it does; there will be no other."""
        self._ended = True
        self._kill()
        self._turns.shutdown(wait=False)

    async def answer(
        self, content: bytes, left: Callable[[], Awaitable[None]]
    ) -> tuple[int, bytes]:
        """Return the status and the JSON for an upload; `left` returns when its client has left.

        Raises:
            HTTPException: too many wait, it took too long, or the process died of it.
        """
        if self.taken >= self._places:
            raise self._busy("Too many pictures are waiting.")
        asked = self._turns.submit(self._exchange, content)
        self._asked.add(asked)
        asked.add_done_callback(self._asked.discard)
        answer, gone = asyncio.wrap_future(asked), asyncio.ensure_future(left())
        first = asyncio.FIRST_COMPLETED
        try:
            await asyncio.wait({answer, gone}, timeout=self._seconds, return_when=first)
            if answer.done():
                return answer.result()
            answer.cancel()
            asyncio.get_running_loop().call_later(self.GRACE, self._give_up, asked)
            raise self._busy("It took too long.")
        finally:
            gone.cancel()

    def _give_up(self, asked: Future[Any]) -> None:
        if not asked.done():
            self._kill()

    def _exchange(self, content: bytes) -> tuple[int, bytes]:
        begun = time.perf_counter()
        try:
            if self._process is None and not self._ended:
                self.begin()
            self._mine.send_bytes(content)
            return self._mine.recv()
        except (EOFError, OSError) as error:  # the process died, or was ended
            self._kill()
            raise HTTPException(500, "The server failed. Its log tells more.") from error
        finally:
            self._last = time.perf_counter() - begun

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.join()

    def _busy(self, text: str) -> HTTPException:
        wait = max(1, math.ceil(self._last * self.taken))
        return HTTPException(503, f"{text} Try again in {wait} s.", {"Retry-After": str(wait)})


def _work(start: Start, theirs: Connection, parent: Connection) -> None:
    """Answer uploads until the parent ends."""
    theirs.close()  # else this process would never see that the parent has gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the parent, which ends this process
    try:
        about, answer = start()
    except InputError as error:
        parent.send((str(error), None))
        return
    parent.send(("", about))
    while True:
        try:
            content = parent.recv_bytes()
        except EOFError:
            return
        parent.send(answer(content))
