"""Start the processes of a run: in this process, one for each GPU, or as torchrun says."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from vitdet.engine import first_step, startup
from vitdet.engine.first_step import STUCK_STATUS
from vitdet.engine.startup import Place, StartError
from vitdet.utils.checks import InputError, fail
from vitdet.utils.signals import PREEMPTION

TIMEOUT = timedelta(minutes=30)
INPUT_ERROR_STATUS = 2
LAUNCHER_GONE_STATUS = 3
PREEMPTED_STATUS = 75  # stopped by a signal after saving; what sysexits.h calls "try again"
INTERRUPTED_STATUS = 130  # what shells give for ^C: 128 + SIGINT
GRACE_SECONDS = 10.0


def launch(
    main: Callable[..., Any],
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: Sequence[Any] = (),
    start_timeout: float | None = None,
) -> Any:
    """Call `main(*args)` in every process of the run.

    Args:
        main: a function of a module (it is imported again in new processes).
        num_gpus: processes on this machine: one a GPU (nccl), or on the CPU (gloo) without any.
        num_machines: machines, each of which calls this with the same arguments.
        machine_rank: number of this machine.
        dist_url: tcp://HOST:PORT of machine 0, or "auto" on one machine.
        args: for `main`; they must pickle when processes are started.
        start_timeout: seconds within which all processes must be there; None for those of the
            environment (VITDET_START_TIMEOUT), or 300.

    Returns:
        What `main` returns when it runs in this process, else None.

    Raises:
        InputError: wrong arguments, processes that do not come, or the InputError of one of them.
        SystemExit: PREEMPTED_STATUS or first_step.STUCK_STATUS, when the processes ended with it.
    """
    seconds = startup.timeout(start_timeout)
    if "LOCAL_RANK" in os.environ:
        return _as_torchrun_says(main, args, seconds)
    _check(num_gpus, num_machines, machine_rank, dist_url)
    processes = max(num_gpus, 1)
    if processes * num_machines == 1:
        return main(*args)
    if not torch.cuda.is_available():
        print(f"no GPU: {processes} processes on the CPU (gloo)", flush=True)
    host, port = _address(dist_url)
    # The store outlives the processes, so that the last of them can still read what happened.
    store = startup.serve(host, port) if machine_rank == 0 else None
    places = [
        Place(
            rank=machine_rank * processes + local_rank,
            world_size=processes * num_machines,
            local_rank=local_rank,
            local_size=processes,
            host=host,
            port=store.port if store else port,
        )
        for local_rank in range(processes)
    ]
    _spawn(main, args, places, seconds)
    return None


def _check(num_gpus: int, num_machines: int, machine_rank: int, dist_url: str) -> None:
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus < 0 or (present and num_gpus > present):
        fail(
            "--num-gpus",
            expected=f"0 to {present}, the GPUs of this machine",
            got=num_gpus,
            remedy="Lower it, or look at CUDA_VISIBLE_DEVICES.",
        )
    if num_machines < 1 or not 0 <= machine_rank < num_machines:
        fail(
            "--machine-rank",
            expected=f"0 to {num_machines - 1} for --num-machines {num_machines}",
            got=machine_rank,
            remedy="Number the machines from 0.",
        )
    if num_machines > 1 and dist_url == "auto":
        fail(
            "--dist-url",
            expected="tcp://HOST:PORT of machine 0",
            got="auto",
            remedy="A port can only be found automatically on one machine.",
        )


def _address(dist_url: str) -> tuple[str, int]:
    if dist_url == "auto":
        return "127.0.0.1", 0  # 0: a free one
    found = re.fullmatch(r"tcp://(.+):(\d{1,5})", dist_url)
    if not found:
        fail(
            "--dist-url",
            expected="tcp://HOST:PORT of machine 0",
            got=dist_url,
            remedy="As in tcp://node0:29500.",
        )
    return found[1], int(found[2])


_TOLD = "input error"  # a name in torchrun's store


def _as_torchrun_says(main: Callable[..., Any], args: Sequence[Any], seconds: float) -> Any:
    place = Place.from_torchrun()
    store = startup.connect(place, seconds)
    if not startup.served_by_torchrun():
        return run_as(place, store, main, args, seconds)
    if store.check([_TOLD]):  # torchrun starts again what would fail again
        sys.exit(INPUT_ERROR_STATUS)
    try:
        return run_as(place, store, main, args, seconds)
    except InputError as error:
        if not isinstance(error, StartError):
            store.set(_TOLD, "")
        if store.add(f"told: {error}", 1) > 1:  # another rank has met it too
            sys.exit(INPUT_ERROR_STATUS)
        raise
    except RuntimeError:
        # A lost connection is no news where the other end has said why it left.
        if store.check([_TOLD]):
            sys.exit(INPUT_ERROR_STATUS)
        raise


def run_as(
    place: Place,
    store: dist.TCPStore,
    main: Callable[..., Any],
    args: Sequence[Any],
    seconds: float,
) -> Any:
    """Call `main(*args)` in this process as the rank that `place` says.

    Args:
        place: of this process.
        store: in which the processes meet.
        main: as in `launch`.
        args: for `main`.
        seconds: within which all processes must be there.

    Raises:
        InputError: processes that do not come, or the one of `main`.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        if place.local_rank >= torch.cuda.device_count():
            fail(
                "processes of this machine",
                expected=f"at most {torch.cuda.device_count()}, one a GPU",
                got=place.local_size,
                remedy="Start fewer, or look at CUDA_VISIBLE_DEVICES.",
            )
        torch.cuda.set_device(place.local_rank)
    meeting = startup.join(place, store, seconds)
    # Both backends on a GPU machine: train.device=cpu stays possible there.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore(meeting.name, store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=TIMEOUT,
    )
    # detectron2's samplers and evaluators ask for their rank on this machine.
    comm.create_local_process_group(place.local_size)
    result = main(*args)
    # Not after an error: the others may wait in an operation that this process will never join.
    dist.destroy_process_group()
    return result


def _spawn(
    main: Callable[..., Any], args: Sequence[Any], places: Sequence[Place], seconds: float
) -> None:
    errors = mp.get_context("spawn").SimpleQueue()
    context: Any = mp.start_processes(
        _child,
        args=(main, args, places, seconds, errors),
        nprocs=len(places),
        join=False,
        start_method="spawn",
    )
    processes: list[BaseProcess] = context.processes
    try:
        with _passing_signals_to(processes) as signals:
            failed = _first_failure(processes)
    finally:
        _stop(processes)
    if failed is None:
        if any(process.exitcode == PREEMPTED_STATUS for process in processes):
            sys.exit(PREEMPTED_STATUS)
        return
    if not errors.empty():  # it is the cause, whichever process ended first
        text = errors.get()
        if any(process.exitcode == STUCK_STATUS for process in processes):
            print(f"error: {text}", file=sys.stderr)
            sys.exit(STUCK_STATUS)
        raise InputError(text)
    if processes[failed].exitcode == INTERRUPTED_STATUS:
        raise KeyboardInterrupt
    if signals:  # it came before the process had learned what to do then
        sys.exit(PREEMPTED_STATUS)
    try:
        mp.ProcessContext([processes[failed]], [context.error_files[failed]]).join()
    except mp.ProcessExitedException as error:
        fail(
            f"process {failed}",
            expected="to end normally",
            got=error.signal_name or f"exit status {error.exit_code}",
            remedy="SIGKILL often means too little memory: lower "
            "dataloader.train.total_batch_size or the number of workers.",
        )


def _first_failure(processes: Sequence[BaseProcess]) -> int | None:
    """Wait until one fails, and return its number; None when all have ended as they should."""
    running = {process.sentinel: index for index, process in enumerate(processes)}
    while running:
        for sentinel in connection.wait(list(running)):
            index = running.pop(int(sentinel))  # pyright: ignore[reportArgumentType]
            processes[index].join()
            if processes[index].exitcode not in (0, PREEMPTED_STATUS):
                return index
    return None


@contextmanager
def _passing_signals_to(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Pass the signals of a scheduler on to the processes, which save and end; yields those."""
    passed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield passed  # only the main thread can set what a signal does
        return

    def pass_on(number: int, _: object) -> None:
        passed.append(number)
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    before = [signal.signal(number, pass_on) for number in PREEMPTION]
    try:
        yield passed
    finally:
        for number, handler in zip(PREEMPTION, before, strict=True):
            signal.signal(number, handler)


def _stop(processes: Sequence[BaseProcess]) -> None:
    """End the processes that are still there: politely, then by force."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _end_with_the_launcher() -> None:
    """End this process when the one that started it is gone, however that one was ended."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os._exit(LAUNCHER_GONE_STATUS)


def _child(
    local_rank: int,
    main: Callable[..., Any],
    args: Sequence[Any],
    places: Sequence[Place],
    seconds: float,
    errors: Any,
) -> None:
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    if not torch.cuda.is_available():
        # Each process would otherwise start a thread for every core of the machine.
        torch.set_num_threads(max(1, torch.get_num_threads() // len(places)))
    place = places[local_rank]
    first_step.tell_with(errors.put)
    try:
        run_as(place, startup.connect(place, seconds), main, args, seconds)
    except InputError as error:
        errors.put(str(error))  # before this process ends and the others lose the connection
        sys.exit(INPUT_ERROR_STATUS)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_STATUS)
