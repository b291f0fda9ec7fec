"""The processes of a run find each other, or say which of them is missing.

They meet in a store (torch.distributed.TCPStore): a table of names and values that one process
serves. torchrun serves one for its workers, `launch` for its own; otherwise rank 0 does.
"""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch.distributed as dist

from vitdet.utils.checks import InputError, fail

TIMEOUT_VARIABLE = "VITDET_START_TIMEOUT"
DEFAULT_TIMEOUT = 300.0  # seconds
_EVERY = 0.1  # seconds between two looks into the store
_LAST_WORDS = 5.0  # seconds that rank 0 stays after a failure, so that the others can read why


class StartError(InputError):
    """Not all processes of the run came; another try may succeed."""


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of the run, and where they meet.

    Args:
        rank: number of this process.
        world_size: number of processes.
        local_rank: number of this process on its machine.
        local_size: processes on its machine.
        host: of the process that serves the store.
        port: of the store.
        serves: whether this process serves it.
    """

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    serves: bool = False

    @classmethod
    def from_torchrun(cls) -> Place:
        """Return the place that torchrun has put into this process's environment."""
        number = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
        return cls(
            rank=number["RANK"],
            world_size=number["WORLD_SIZE"],
            local_rank=int(os.environ["LOCAL_RANK"]),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            host=os.environ["MASTER_ADDR"],
            port=number["MASTER_PORT"],
            serves=number["RANK"] == 0 and not served_by_torchrun(),
        )


@dataclass(frozen=True)
class Meeting:
    """The start that this process takes part in.

    Args:
        place: of this process.
        store: in which the processes meet.
        name: of this start; names of its values in the store begin with it.
        continues: whether these ranks were started before for the same run, which had begun.
    """

    place: Place
    store: dist.TCPStore
    name: str
    continues: bool = False


_BEGUN = "begun"
_meeting: Meeting | None = None


def join(place: Place, store: dist.TCPStore, seconds: float) -> Meeting:
    """Wait until every rank of the run is here.

    Raises:
        StartError: some rank did not come in time.
    """
    global _meeting  # noqa: PLW0603  a process takes part in one run
    continues = store.check([_BEGUN])
    name = meet(store, place.rank, place.world_size, seconds)
    _meeting = Meeting(place, store, name, continues)
    return _meeting


def current() -> Meeting | None:
    """Return the start that this process takes part in, None for a process alone."""
    return _meeting


def mark_begun() -> None:
    """Note that the run has begun in its folder; if it is restarted, it is to continue there."""
    if _meeting is not None and _meeting.place.rank == 0:
        _meeting.store.set(_BEGUN, "")


def continues() -> bool:
    """Whether torchrun has restarted this run, which then goes on after its last checkpoint.

    A store that torchrun serves remembers that the run had begun, however often and with however
    many ranks it is restarted. Without one torchrun's own count must do.
    """
    if _meeting is not None and _meeting.continues:
        return True
    return not served_by_torchrun() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def served_by_torchrun() -> bool:
    """Whether torchrun serves the store, which then outlives its workers."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def timeout(seconds: float | None = None) -> float:
    """Return the time limit of the start: as given, else of the environment, else the default.

    Raises:
        InputError: it is no positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE) if seconds is None else str(seconds)
    try:
        found = DEFAULT_TIMEOUT if text is None else float(text)
    except ValueError:
        found = 0.0
    if not found > 0:
        fail(
            f"--start-timeout or {TIMEOUT_VARIABLE}",
            expected="seconds, more than 0",
            got=text,
            remedy=f"{DEFAULT_TIMEOUT:g} is the default.",
        )
    return found


def serve(host: str, port: int = 0) -> dist.TCPStore:
    """Serve a store on this machine; port 0 takes a free one.

    Raises:
        InputError: the port is taken.
    """
    try:
        return dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise StartError(
            f"start of the run: expected port {port} of {host} to be free here, got "
            f"{_reason(error)}. Choose another port, or end what holds it."
        ) from error


def connect(place: Place, seconds: float) -> dist.TCPStore:
    """Return the store in which the processes meet.

    Raises:
        StartError: nobody serves it within the time limit, or its port is taken.
    """
    if place.serves:
        return serve(place.host, place.port)
    error = _knock(place.host, place.port, seconds)
    if error:
        raise StartError(
            f"start of the run: expected rank 0 at {place.host}, port {place.port}, within "
            f"{seconds:g} s, got {error} (this is rank {place.rank}). Look whether rank 0 was "
            "started, and whether this machine reaches that port."
        )
    return dist.TCPStore(place.host, place.port, is_master=False)


def _knock(host: str, port: int, seconds: float) -> str:
    """Wait until somebody listens there; return "" or what the last try said.

    TCPStore waits too, but writes pages of its own stack meanwhile.
    """
    error = "no answer"

    def open_door() -> bool:
        nonlocal error
        try:
            socket.create_connection((host, port), timeout=min(seconds, 10)).close()
        except OSError as refused:
            error = str(refused)
            return False
        return True

    return "" if _until(open_door, seconds) else error


def meet(store: dist.Store, rank: int, world_size: int, seconds: float) -> str:
    """Wait until every rank is here; return the name of this meeting.

    The store may still hold what an earlier start of the same ranks wrote (torchrun restarts its
    workers). So rank 0 opens each meeting under a new name, the others register there, and who
    has read an old name is not in that meeting's answer and looks again. What else this start
    writes into the store should go under the name.

    Raises:
        StartError: some rank did not come in time. Every rank that did raises the same line.
    """
    me = {"host": socket.gethostname(), "pid": os.getpid(), "key": uuid.uuid4().hex}
    if rank == 0:
        return _open(store, me, world_size, seconds)
    name, answer = "", {}

    def welcome() -> bool:
        nonlocal name, answer
        if not store.check(["meeting"]):
            return False
        name = store.get("meeting").decode()
        part = dist.PrefixStore(name, store)
        part.set(f"rank {rank}", json.dumps(me))
        if not part.check(["answer"]):
            return False
        answer = json.loads(part.get("answer"))
        return me["key"] in answer["keys"]

    # Rank 0 may have begun to wait later, and says who is missing when its own time is over.
    if not _until(welcome, seconds + 2 * _LAST_WORDS):
        raise StartError(
            f"start of the run: expected all {world_size} ranks within {seconds:g} s, got no "
            f"answer from rank 0 (this is rank {rank}, on {me['host']}). Look at the log of "
            "rank 0 and at the network between the machines."
        )
    dist.PrefixStore(name, store).set(f"read {rank}", "")
    if answer["error"]:
        raise StartError(answer["error"])
    return name


def _open(store: dist.Store, me: dict[str, Any], world_size: int, seconds: float) -> str:
    """Rank 0's side of `meet`."""
    name = f"meeting {me['key']}"
    part = dist.PrefixStore(name, store)
    part.set("rank 0", json.dumps(me))
    store.set("meeting", name)
    waiting = set(range(world_size))

    def complete() -> bool:
        waiting.difference_update([each for each in waiting if part.check([f"rank {each}"])])
        return not waiting

    came = _until(complete, seconds)
    here = [each for each in range(world_size) if each not in waiting]
    known = {each: json.loads(part.get(f"rank {each}")) for each in here}
    error = "" if came else _absent(known, sorted(waiting), world_size, seconds)
    part.set("answer", json.dumps({"keys": [who["key"] for who in known.values()], "error": error}))
    if error:
        _until(lambda: all(part.check([f"read {each}"]) for each in here if each), _LAST_WORDS)
        raise StartError(error)
    return name


def _absent(
    known: dict[int, dict[str, Any]], absent: list[int], world_size: int, seconds: float
) -> str:
    by_host: dict[str, list[int]] = {}
    for rank, who in known.items():
        by_host.setdefault(who["host"], []).append(rank)
    present = "; ".join(f"{numbers(ranks)} on {host}" for host, ranks in by_host.items())
    return (
        f"start of the run: expected all {world_size} ranks within {seconds:g} s, got no answer "
        f"from {numbers(absent)} (here: {present}). Look whether these processes run and reach "
        f"this machine, or give more time: --start-timeout, or {TIMEOUT_VARIABLE} under torchrun."
    )


def numbers(ranks: Iterable[int]) -> str:
    """Return "rank 3", or "ranks 0-2, 5" of growing numbers."""
    ranks = list(ranks)
    runs = [
        [rank for _, rank in run] for _, run in groupby(enumerate(ranks), lambda p: p[1] - p[0])
    ]
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _until(done: Callable[[], bool], seconds: float) -> bool:
    """Wait until `done`, at most for `seconds`. A store that is gone will not say more: False."""
    deadline = time.monotonic() + seconds
    try:
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(_EVERY)
    except (dist.DistNetworkError, dist.DistStoreError):
        return False
    return True


def _reason(error: Exception) -> str:
    """The first sentence of torch's account, which goes on with a C++ stack."""
    text = " ".join(str(error).split("\n", 1)[0].split())
    return text.split("Exception raised", 1)[0].rstrip(" .") or type(error).__name__
