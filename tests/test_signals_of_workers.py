"""Processes that work for another one end when it tells them to, whatever threads they have."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

from vitdet.utils.signals import hold_back, serve_parent


def work(ready: Any, ended: Any) -> None:
    """Start a thread as the import of a BLAS does, serve the parent, and go on until told."""
    threading.Thread(target=ended.wait, daemon=True).start()
    serve_parent()
    ready.set()
    ended.wait()


def test_a_thread_of_an_import_does_not_swallow_the_signal() -> None:
    context: Any = multiprocessing.get_context("spawn")
    ready, ended = context.Event(), context.Event()
    with hold_back():
        worker = context.Process(target=work, args=(ready, ended), daemon=True)
        worker.start()
    assert ready.wait(60)
    worker.terminate()
    worker.join(20)
    alive = worker.is_alive()
    worker.kill()
    assert not alive
    assert worker.exitcode == 0
