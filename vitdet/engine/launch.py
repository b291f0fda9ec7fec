"""Start the processes of a run: in this process, one for each GPU, or as torchrun says."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessException, ProcessExitedException

from vitdet.utils.checks import (
    INPUT_ERROR_STATUS,
    INTERRUPTED_STATUS,
    NOTHING_YET,
    PREEMPTED_STATUS,
    InputError,
    open_streams,
)
from vitdet.utils.distributed import PREEMPTION, end_after_parent, end_with_parent

TIMEOUT = timedelta(minutes=30)  # of the start, and of every exchange between the processes
LAUNCHER_GONE_STATUS = 3
Main = Callable[..., Any]


def launch(
    main: Main,
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: Sequence[Any] = (),
) -> Any:
    """Call `main(*args)` in every process of the run; return its value if it is this one.

    Args:
        main: a function of a module (it is imported again in new processes).
        num_gpus: processes on this machine: one a GPU (nccl), or on the CPU (gloo) without any.
        num_machines: machines, each of which calls this, with its own number `machine_rank`.
        dist_url: tcp://HOST:PORT of machine 0, or "auto" on one machine.
        args: for `main`; they must pickle when processes are started.

    Raises:
        InputError: wrong arguments, processes that do not come, or the InputError of one of them.
        SystemExit: PREEMPTED_STATUS or INTERRUPTED_STATUS, when the processes ended with it.
    """
    if "LOCAL_RANK" in os.environ:
        return _under_torchrun(main, args)
    host, port = _address(num_gpus, num_machines, machine_rank, dist_url)
    processes = max(num_gpus, 1)
    if processes * num_machines == 1:
        return main(*args)
    if not torch.cuda.is_available():
        print(f"no GPU: {processes} processes on the CPU (gloo)", flush=True)
    # The store outlives the processes, so that the last of them can still reach it.
    store = _store(host, port, serve=True) if machine_rank == 0 else None
    address = host, store.port if store else port
    group = {"rank": machine_rank * processes, "world_size": processes * num_machines}
    _spawn(processes, main, args, address, group)
    return None


def _address(num_gpus: int, num_machines: int, machine_rank: int, dist_url: str) -> tuple[str, int]:
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus < 0 or (present and num_gpus > present):
        raise InputError(
            f"--num-gpus: expected 0 to {present}, the GPUs of this machine, got {num_gpus}. Lower "
            "it, or look at CUDA_VISIBLE_DEVICES."
        )
    if num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise InputError(
            f"--machine-rank: expected 0 to {num_machines - 1} for --num-machines {num_machines}, "
            f"got {machine_rank}. Number the machines from 0."
        )
    if num_machines == 1 and dist_url == "auto":
        return "127.0.0.1", 0  # 0: a free one
    found = re.fullmatch(r"tcp://(.+):(\d{1,5})", dist_url)
    if not found:
        raise InputError(
            f"--dist-url: expected tcp://HOST:PORT of machine 0, got {dist_url}. As in "
            "tcp://node0:29500; auto is for one machine."
        )
    return found[1], int(found[2])


class StartError(InputError):
    """Not all processes of the run came; another try may succeed."""


@contextmanager
def _start_errors(where: str) -> Iterator[None]:
    """Make one line of what torch tells with a C++ stack."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split("\n", 1)[0].split("Exception raised", 1)[0].rstrip(" .")
        raise StartError(
            f"start of the run at {where}: expected all processes, got: {reason}. Look whether all "
            "were started and reach each other there."
        ) from error


def _store(host: str, port: int, *, serve: bool = False) -> dist.TCPStore:
    """Return the table in which the processes find each other, served here or elsewhere."""
    with _start_errors(f"{host}, port {port}"):
        return dist.TCPStore(host, port, is_master=serve, wait_for_workers=False, timeout=TIMEOUT)


def _run(
    main: Main, args: Sequence[Any], local_rank: int, local_size: int, group: dict[str, Any]
) -> Any:
    """Call `main(*args)` in this process as a rank of the run; `group` is for torch."""
    cuda = torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"processes of this machine: expected at most {torch.cuda.device_count()}, one a "
                f"GPU, got {local_size}. Start fewer, or look at CUDA_VISIBLE_DEVICES."
            )
        torch.cuda.set_device(local_rank)
    with _start_errors("init_process_group"):
        # Both backends on a GPU machine: train.device=cpu stays possible there.
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, **group)
    # detectron2's samplers and evaluators ask for their rank on this machine.
    comm.create_local_process_group(local_size)
    result = main(*args)
    # Not after an error: the others may wait in an operation that this process will never join.
    dist.destroy_process_group()
    return result


# --- torchrun ------------------------------------------------------------------------------------


def _under_torchrun(main: Main, args: Sequence[Any]) -> Any:
    end_with_parent()
    torchrun = os.getppid()
    try:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
        rank, world_size, *local, port = (int(os.environ[name]) for name in names)
        served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = _store(os.environ["MASTER_ADDR"], port, serve=rank == 0 and not served)
        # torchrun's store outlives a start: addresses of the one before are not to be read again
        store = dist.PrefixStore(f"start {_attempt()} of {world_size}", store)
        group = {"store": store, "rank": rank, "world_size": world_size}
        return _run(main, args, *local, group=group)
    except InputError as error:
        if _is_first("error", str(error)):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if not isinstance(error, StartError):
            _end(torchrun)
        sys.exit(INPUT_ERROR_STATUS)
    except SystemExit:
        _end(torchrun)
        raise


def _end(torchrun: int) -> None:
    """End the torchrun of this machine, unless it has: it would start again what is over."""
    if os.getppid() == torchrun and _is_first("end", os.environ["GROUP_RANK"]):
        os.kill(torchrun, signal.SIGTERM)


def _attempt() -> str:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _is_first(*words: str) -> bool:
    """Whether this process is the first of a start to come here."""
    where, seconds = os.environ["MASTER_ADDR"], timedelta(seconds=10)
    try:
        store = dist.TCPStore(where, int(os.environ["MASTER_PORT"]), timeout=seconds)
        return store.add(" ".join((_attempt(), *words)), 1) == 1
    except RuntimeError:  # who served it has ended
        return True


# --- processes of our own ------------------------------------------------------------------------


def _spawn(processes: int, *words: Any) -> None:
    """Start processes, pass signals on to them, and end as they do."""
    spawn = mp.get_context("spawn")
    errors, interrupted = spawn.SimpleQueue(), spawn.RawValue("b", 0)
    words = (processes, errors, interrupted, *words)
    logging.getLogger(mp.spawn.__module__).setLevel(logging.ERROR)  # it tells whom it ends
    with _handling({signal.SIGINT: signal.SIG_IGN}):  # inherited, until they can act on it
        context: Any = mp.start_processes(
            _child, args=words, nprocs=processes, join=False, start_method="spawn"
        )
    passed: list[int] = []

    def pass_on(number: int, _: object) -> None:
        """Pass signals of a scheduler and ^C on; a second ^C ends the processes at once."""
        passed.append(number)
        interrupted.value = interrupted.value or number == signal.SIGINT
        again = passed.count(signal.SIGINT) > 1
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL if again else number)

    try:
        with _handling(dict.fromkeys((*PREEMPTION, signal.SIGINT), pass_on)):
            while not context.join():  # the others are ended with the first that fails
                pass
    except ProcessException as error:
        statuses = {process.exitcode for process in context.processes}
        said = None if errors.empty() else errors.get()
        raise _cause(error, said, statuses, passed) from error
    finally:
        if passed:  # schedulers repeat them, and this process is to end with its own status
            for number in PREEMPTION:
                signal.signal(number, signal.SIG_IGN)


def _cause(
    error: ProcessException, said: str | None, statuses: set[int], passed: list[int]
) -> BaseException:
    """Return what the end of the first process means, after signals that were `passed` on."""
    interrupted = INTERRUPTED_STATUS in statuses
    if signal.SIGINT in passed or interrupted:
        saved = said is None and interrupted  # and said so
        return SystemExit(INTERRUPTED_STATUS) if saved else KeyboardInterrupt(said or "")
    if said is None and passed:  # maybe before they had learned what to do then
        return SystemExit(PREEMPTED_STATUS)
    if said is not None:  # it is the cause, whichever process ended first
        return InputError(said)
    for status in (PREEMPTED_STATUS, INPUT_ERROR_STATUS):
        if status in statuses:  # it has said why
            return SystemExit(status)
    if not isinstance(error, ProcessExitedException):
        return error
    ended = error.signal_name or f"exit status {error.exit_code}"
    return InputError(
        f"process {error.error_index}: expected to end normally, got {ended}. SIGKILL often means "
        "too little memory: lower dataloader.train.total_batch_size or the number of workers."
    )


@contextmanager
def _handling(handlers: dict[signal.Signals, Any]) -> Iterator[None]:
    """Have signals handled so within the block, in the main thread, the only one that can."""
    main = threading.current_thread() is threading.main_thread()
    before = {each: signal.signal(each, handlers[each]) for each in handlers if main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _child(
    local_rank: int,
    local_size: int,
    errors: Any,
    interrupted: Any,
    main: Main,
    args: Sequence[Any],
    address: tuple[str, int],
    group: dict[str, Any],
) -> None:
    open_streams()
    os.setpgrp()  # a terminal sends ^C to its whole group; here it comes from the launcher alone
    mp.set_start_method(None, force=True)  # reading processes as the system's usual, not spawned
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if interrupted.value:
        errors.put(NOTHING_YET)
        sys.exit(INTERRUPTED_STATUS)
    end_after_parent(LAUNCHER_GONE_STATUS)
    if not torch.cuda.is_available():
        # Each process would otherwise start a thread for every core of the machine.
        torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    try:
        place = {"store": _store(*address), "rank": group["rank"] + local_rank}
        _run(main, args, local_rank, local_size, group | place)
    except InputError as error:
        errors.put(str(error))  # before this process ends and the others lose the connection
        sys.exit(INPUT_ERROR_STATUS)
    except KeyboardInterrupt as error:
        errors.put(str(error) or NOTHING_YET)
        sys.exit(INTERRUPTED_STATUS)
