"""Start the processes of a run: in this process, one for each GPU, or as torchrun says."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from vitdet.utils.checks import InputError, fail

TIMEOUT = timedelta(minutes=30)
INPUT_ERROR_STATUS = 2
LAUNCHER_GONE_STATUS = 3
INTERRUPTED_STATUS = 130  # what shells give for ^C: 128 + SIGINT
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
        InputError: wrong arguments, or the InputError of one of the processes.
    """
    if "LOCAL_RANK" in os.environ:
        return _as_torchrun_says(main, args)
    _check(num_gpus, num_machines, machine_rank, dist_url)
    processes = max(num_gpus, 1)
    if processes * num_machines == 1:
        return main(*args)
    if dist_url == "auto":
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
    if not torch.cuda.is_available():
        print(f"no GPU: {processes} processes on the CPU (gloo)", flush=True)
    _spawn(main, args, processes, num_machines, machine_rank, dist_url)
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


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _as_torchrun_says(main: Callable[..., Any], args: Sequence[Any]) -> Any:
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return _with_group(main, args, local_rank, local_size, init_method="env://")


def _with_group(
    main: Callable[..., Any], args: Sequence[Any], local_rank: int, local_size: int, **group: Any
) -> Any:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    # Both backends on a GPU machine: train.device=cpu stays possible there.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT, **group)
    # detectron2's samplers and evaluators ask for their rank on this machine.
    comm.create_local_process_group(local_size)
    result = main(*args)
    # Not after an error: the others may wait in an operation that this process will never join.
    dist.destroy_process_group()
    return result


def _spawn(
    main: Callable[..., Any],
    args: Sequence[Any],
    processes: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
) -> None:
    # It reports each process that it ends; the one line that matters is the error's own.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    errors = mp.get_context("spawn").SimpleQueue()
    world = processes * num_machines
    context: Any = mp.start_processes(
        _child,
        args=(main, args, processes, machine_rank, world, dist_url, errors),
        nprocs=processes,
        join=False,
        start_method="spawn",
    )
    try:
        while not context.join():
            pass
    except mp.ProcessExitedException as error:
        if not errors.empty():
            raise InputError(errors.get()) from error
        if error.exit_code == INTERRUPTED_STATUS:
            raise KeyboardInterrupt from error
        fail(
            f"process {error.error_index}",
            expected="to end normally",
            got=error.signal_name or f"exit status {error.exit_code}",
            remedy="SIGKILL often means too little memory: lower "
            "dataloader.train.total_batch_size or the number of workers.",
        )
    except mp.ProcessRaisedException as error:
        # The first to end may be one that lost the connection to the one with the true cause.
        if not errors.empty():
            raise InputError(errors.get()) from error
        raise
    finally:
        for process in context.processes:
            _stop(process)


def _stop(process: BaseProcess) -> None:
    """End a process that is still there: politely, then by force."""
    if process.is_alive():
        process.terminate()
    process.join(GRACE_SECONDS)
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
    processes: int,
    machine_rank: int,
    world: int,
    dist_url: str,
    errors: Any,
) -> None:
    threading.Thread(target=_end_with_the_launcher, daemon=True).start()
    if not torch.cuda.is_available():
        # Each process would otherwise start a thread for every core of the machine.
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    rank = machine_rank * processes + local_rank
    group = {"init_method": dist_url, "rank": rank, "world_size": world}
    try:
        _with_group(main, args, local_rank, processes, **group)
    except InputError as error:
        errors.put(str(error))  # before this process ends and the others lose the connection
        sys.exit(INPUT_ERROR_STATUS)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED_STATUS)
