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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from vitdet.engine import watch
from vitdet.utils.checks import (
    INPUT_ERROR_STATUS,
    INTERRUPTED_STATUS,
    InputError,
    fail,
    open_streams,
)
from vitdet.utils.signals import PREEMPTION, end_with_parent

TIMEOUT = timedelta(minutes=30)  # of the start, and of every exchange between the processes
_STORE_TIMEOUT = timedelta(seconds=10)  # of torchrun's own table, at an end
LAUNCHER_GONE_STATUS = 3
PREEMPTED_STATUS = 75  # stopped by a signal after saving; what sysexits.h calls "try again"
GRACE_SECONDS = 10.0


def launch(
    main: Callable[..., Any],
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: Sequence[Any] = (),
) -> Any:
    """Call `main(*args)` in every process of the run.

    Args:
        main: a function of a module (it is imported again in new processes).
        num_gpus: processes on this machine: one a GPU (nccl), or on the CPU (gloo) without any.
        num_machines: machines, each of which calls this with the same arguments.
        machine_rank: number of this machine.
        dist_url: tcp://HOST:PORT of machine 0, or "auto" on one machine.
        args: for `main`; they must pickle when processes are started.

    Returns:
        What `main` returns when it runs in this process, else None.

    Raises:
        InputError: wrong arguments, processes that do not come, or the InputError of one of them.
        SystemExit: PREEMPTED_STATUS or INTERRUPTED_STATUS, when the processes ended with it.
    """
    if "LOCAL_RANK" in os.environ:
        return _as_torchrun_says(main, args)
    _check(num_gpus, num_machines, machine_rank, dist_url)
    processes = max(num_gpus, 1)
    if processes * num_machines == 1:
        return main(*args)
    if not torch.cuda.is_available():
        print(f"no GPU: {processes} processes on the CPU (gloo)", flush=True)
    host, port = _address(dist_url)
    # The store outlives the processes, so that the last of them can still reach it.
    store = _store(host, port, serve=True) if machine_rank == 0 else None
    port = store.port if store else port
    first = machine_rank * processes
    place = Place(host, port, first, processes * num_machines, processes)
    _spawn(main, args, place)
    return None


class Place(NamedTuple):
    """Where the processes of this machine stand among those of the run, and where they meet."""

    host: str
    port: int
    first: int  # rank of the first process of this machine
    world_size: int
    local_size: int  # processes of this machine


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


def _store(host: str, port: int, *, serve: bool = False) -> dist.TCPStore:
    """Return the table in which the processes meet, served here or elsewhere."""
    try:
        return dist.TCPStore(host, port, is_master=serve, wait_for_workers=False, timeout=TIMEOUT)
    except RuntimeError as error:
        raise _start_error(f"{host}, port {port}", error) from error


class StartError(InputError):
    """Not all processes of the run came; another try may succeed."""


def _start_error(where: str, error: RuntimeError) -> StartError:
    """One line for what torch tells with a C++ stack."""
    reason = str(error).split("\n", 1)[0].split("Exception raised", 1)[0].rstrip(" .")
    return StartError(
        f"start of the run at {where}: expected all processes, got: {reason}. Look whether all "
        "were started and reach each other there."
    )


def _as_torchrun_says(main: Callable[..., Any], args: Sequence[Any]) -> Any:
    end_with_parent()
    torchrun = os.getppid()
    try:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        rank, world_size, local_rank, local_size, port = (int(os.environ[name]) for name in names)
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = _store(os.environ["MASTER_ADDR"], port, serve=rank == 0 and not served)
        # torchrun's store outlives a start: addresses of the one before are not to be read again
        store = dist.PrefixStore(f"start {_attempt()} of {world_size}", store)
        group = {"store": store, "rank": rank, "world_size": world_size}
        return _run(main, args, local_rank, local_size, group)
    except InputError as error:
        if _first("error", str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not isinstance(error, StartError):
            _end(torchrun)
        sys.exit(INPUT_ERROR_STATUS)
    except SystemExit:
        _end(torchrun)
        raise


def _end(torchrun: int) -> None:
    """End the torchrun of this machine, which would start again what has ended for good.

    Where it has ended already this process has another parent, which is left alone.
    """
    if os.getppid() == torchrun and _first("end", os.environ["GROUP_RANK"]):
        os.kill(torchrun, signal.SIGTERM)


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _first(*words: str) -> bool:
    """Whether this process is the first of a start to come here."""
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(*where, is_master=False, timeout=_STORE_TIMEOUT)
        return store.add(" ".join((_attempt(), *words)), 1) == 1
    except RuntimeError:  # who served it has ended
        return True


def _run(
    main: Callable[..., Any],
    args: Sequence[Any],
    local_rank: int,
    local_size: int,
    group: dict[str, Any],
) -> Any:
    """Call `main(*args)` in this process as a rank of the run; `group` is for torch."""
    cuda = torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            fail(
                "processes of this machine",
                expected=f"at most {torch.cuda.device_count()}, one a GPU",
                got=local_size,
                remedy="Start fewer, or look at CUDA_VISIBLE_DEVICES.",
            )
        torch.cuda.set_device(local_rank)
    try:
        # Both backends on a GPU machine: train.device=cpu stays possible there.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, **group)
    except RuntimeError as error:
        raise _start_error("init_process_group", error) from error
    # detectron2's samplers and evaluators ask for their rank on this machine.
    comm.create_local_process_group(local_size)
    result = main(*args)
    # Not after an error: the others may wait in an operation that this process will never join.
    dist.destroy_process_group()
    return result


def _spawn(main: Callable[..., Any], args: Sequence[Any], place: Place) -> None:
    spawn = mp.get_context("spawn")
    errors, interrupted = spawn.SimpleQueue(), spawn.RawValue("b", 0)
    with _without_interrupts():  # what is started now ignores ^C until it can act on it
        context: Any = mp.start_processes(
            _child,
            args=(main, args, place, errors, interrupted),
            nprocs=place.local_size,
            join=False,
            start_method="spawn",
        )
    processes: list[BaseProcess] = context.processes
    try:
        with _passing_signals_to(processes, interrupted) as signals:
            failed = _first_failure(processes)
    finally:
        _stop(processes)
    if interrupted.value or any(each.exitcode == INTERRUPTED_STATUS for each in processes):
        raise KeyboardInterrupt
    if failed is None:
        if any(process.exitcode == PREEMPTED_STATUS for process in processes):
            sys.exit(PREEMPTED_STATUS)
        return
    if not errors.empty():  # it is the cause, whichever process ended first
        raise InputError(errors.get())
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
            if processes[index].exitcode not in (0, PREEMPTED_STATUS, INTERRUPTED_STATUS):
                return index
    return None


@contextmanager
def _without_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _passing_signals_to(processes: Sequence[BaseProcess], interrupted: Any) -> Iterator[list[int]]:
    """Pass signals of a scheduler and ^C on to the processes, which save and end; yields those.

    A second ^C ends them at once. `interrupted` tells it to those that are being started.
    """
    passed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield passed  # only the main thread can set what a signal does
        return

    def pass_on(number: int, _: object) -> None:
        passed.append(number)
        interrupted.value = interrupted.value or number == signal.SIGINT
        again = passed.count(signal.SIGINT) > 1
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGKILL if again else number)

    numbers = (*PREEMPTION, signal.SIGINT)
    before = [signal.signal(number, pass_on) for number in numbers]
    try:
        yield passed
    finally:
        if passed:  # schedulers repeat them, and this process is to end with its own status
            before[: len(PREEMPTION)] = [signal.SIG_IGN] * len(PREEMPTION)
        for number, handler in zip(numbers, before, strict=True):
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
    place: Place,
    errors: Any,
    interrupted: Any,
) -> None:
    open_streams()
    os.setpgrp()  # a terminal sends ^C to its whole group; here it comes from the launcher alone
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted.value:
        sys.exit(INTERRUPTED_STATUS)
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    if not torch.cuda.is_available():
        # Each process would otherwise start a thread for every core of the machine.
        torch.set_num_threads(max(1, torch.get_num_threads() // place.local_size))
    watch.report_with(errors.put)
    try:
        group = {"store": _store(place.host, place.port), "world_size": place.world_size}
        group["rank"] = place.first + local_rank
        _run(main, args, local_rank, place.local_size, group)
    except InputError as error:
        errors.put(str(error))  # before this process ends and the others lose the connection
        sys.exit(INPUT_ERROR_STATUS)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_STATUS)
