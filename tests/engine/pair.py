"""Two ranks on this machine: processes forked where everything is imported already.

A new interpreter needs seconds to import torch; a fork of the server needs milliseconds, and no
call leaves anything to the next one.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from detectron2.utils import comm

from vitdet.utils.checks import InputError

PROJECT = Path(__file__).resolve().parents[2]
PATIENCE = 300.0  # seconds for what takes one on an idle machine


def environment():
    """The environment of a new python that finds the tiny recipe."""
    paths = [str(PROJECT), str(Path(__file__).parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@cache
def fork_server():
    """Return a context whose processes have imported what the tests of the engine need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    before = dict(os.environ)
    os.environ.update(environment())  # the server finds modules by it alone
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


def as_new():
    """Make a forked process like one of its own: its helpers are forked from it, one thread."""
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)


def in_pair(function, *args, **options):
    """Call a function of a module in two ranks (gloo); raise the InputError of one of them."""
    context = fork_server()
    errors = context.SimpleQueue()
    with TemporaryDirectory() as folder:
        words = [
            (rank, f"{folder}/store", errors, partial(function, *args, **options))
            for rank in range(2)
        ]
        ranks = [context.Process(target=_rank, args=each) for each in words]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(500)
            each.kill()
    if not errors.empty():
        raise InputError(errors.get())
    assert [each.exitcode for each in ranks] == [0, 0]


def _rank(rank, store, errors, function):
    as_new()
    group = {"store": dist.FileStore(store, 2), "rank": rank, "world_size": 2}
    dist.init_process_group("gloo", **group)
    comm.create_local_process_group(2)
    try:
        function()
    except InputError as error:
        errors.put(str(error))
    dist.destroy_process_group()


def wait_until(condition, goes_on=lambda: True, pause=0.05):
    """Wait for a condition, as long as something else holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert goes_on()
        assert time.monotonic() < deadline
        time.sleep(pause)


def children(pid):
    """Process ids of what a process has started."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def born(pid):
    """Start time of a process that lives, in clock ticks; "" for none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
