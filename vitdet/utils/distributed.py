"""Processes of a run: what the others say (all works alone, too), and those that work for one."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from vitdet.utils.checks import InputError

PREEMPTION = (signal.SIGTERM, signal.SIGUSR1)  # what schedulers send before they take a machine


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 without a group."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Number of processes, 1 without a group."""
    return dist.get_world_size() if _active() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def all_gather_object(item: Any) -> list[Any]:
    """Return every process's `item`, in the order of ranks."""
    items = [item] * world_size()
    if world_size() > 1:
        dist.all_gather_object(items, item)
    return items


def gather_object(item: Any) -> list[Any]:
    """Return every process's `item`, in the order of ranks, in the main process; [] in others."""
    items = [item] * world_size() if is_main() else []
    if world_size() > 1:
        dist.gather_object(item, items or None)
    return [item, *items[1:]] if items else []  # its own, not a copy


def reduce_mean(values: dict[str, torch.Tensor]) -> dict[str, float]:
    """Average scalar tensors over the processes; every process must bring the same names."""
    names = sorted(values)
    if not names:
        return {}
    stacked = torch.stack([values[name].detach().float() for name in names])
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(names, stacked.tolist(), strict=True))


def broadcast_object(item: Any) -> Any:
    """Return the main process's `item` in every process."""
    items = [item]
    if world_size() > 1:
        dist.broadcast_object_list(items, src=0)
    return items[0]


def main_only(function: Callable[[], Any]) -> Any:
    """Return in every process what `function` returns in the main one, where alone it is called.

    Raises:
        InputError: the one of the main process, in every process.
    """
    result, error = None, None
    if is_main():
        try:
            result = function()
        except InputError as raised:
            error = str(raised)
    result, error = broadcast_object((result, error))
    if error is not None:
        raise InputError(error)
    return result


def any_rank(flag: bool) -> bool:
    """Whether the flag is set in at least one process; every process must ask, and gets the same.

    The processes wait for each other on the CPU (`launch` gives every group a backend there), so
    a GPU is not held up.
    """
    if world_size() == 1:
        return flag
    group: Any = dist.group.WORLD
    devices = {device.type for device in group._device_types}
    value = torch.tensor(int(flag), device="cpu" if "cpu" in devices else "cuda")
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


# --- processes that work for another one ---------------------------------------------------------


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

    def wait_for_its_signal() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_its_signal, daemon=True).start()
    end_after_parent(0)


def end_after_parent(status: int) -> None:
    """End this process with a status once the one that started it has ended, in whatever way."""
    if (parent := multiprocessing.parent_process()) is not None:

        def wait() -> None:
            parent.join()
            os._exit(status)

        threading.Thread(target=wait, daemon=True).start()


def end_with_parent() -> None:
    """Have the system send SIGTERM when the process that started this one has ended (Linux)."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
