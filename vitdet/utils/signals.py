"""Processes that work for another one: what they make of its signals, and of its end."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send before they take a machine


@contextmanager
def hold_back() -> Iterator[None]:
    """Let SIGTERM wait until the block ends; start processes that call `serve_parent` within it.

    They inherit this, with every thread that their imports start (of a BLAS, say). Otherwise such a
    thread takes the signal that is to end them, drops it as ignored, and their parent waits for
    them for ever.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Have the system send SIGTERM when the process that started this one has ended (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def serve_parent() -> None:
    """Heed only the process that this one works for, and end when that one has ended.

    Schedulers and terminals send signals to all processes of a run at once. A trainer still needs
    those that read its images until it has saved, and ends them itself, with a SIGTERM of its own.
    When it is killed they must not stay: torch's own watch looks every five seconds, and where a
    fork server started them (the default from Python 3.14 on) it looks at that one.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    for each in (*PREEMPTION, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # kept for the thread that waits
    threading.Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()
    end_after_parent(0)


def end_after_parent(status: int) -> None:
    """End this process with a status once the one that started it has ended, in whatever way."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def wait() -> None:
            parent.join()
            os._exit(status)

        threading.Thread(target=wait, daemon=True).start()


def _end_when_told(by: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != by:
        pass
    os._exit(0)
