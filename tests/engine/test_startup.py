from __future__ import annotations

import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import parallel_workers
import pytest
import torch.distributed as dist
from test_launch import PROJECT, alive, environment
from tiny_recipe import write_recipe

from vitdet.engine import startup
from vitdet.engine.first_step import STUCK_STATUS
from vitdet.engine.launch import launch
from vitdet.engine.startup import Place, StartError, connect, meet, numbers
from vitdet.utils.checks import InputError


def together(ranks, world_size: int, store: dist.Store, seconds: float) -> list:
    """Let ranks meet in threads; return what each got, or the error of each."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        jobs = [pool.submit(meet, store, rank, world_size, seconds) for rank in ranks]
        return [job.exception() or job.result() for job in jobs]


def test_ranks_meet_under_a_name_that_is_new_each_time():
    store = dist.HashStore()
    first = together([2, 1, 0], 3, store, 60)
    assert first == [first[0]] * 3
    again = together([1, 0], 2, store, 60)  # a restart with another number of ranks
    assert again == [again[0]] * 2
    assert again[0] != first[0]


def test_an_unfinished_meeting_of_the_past_is_left_alone():
    store = dist.HashStore()
    store.set("meeting", "meeting of a start that was killed")
    found = together([1, 0], 2, store, 60)
    assert found == [found[0]] * 2
    assert found[0] != "meeting of a start that was killed"


def test_ranks_that_do_not_come_are_named_by_all_that_did():
    errors = together([0, 1, 4], 5, dist.HashStore(), 1)
    host = socket.gethostname()
    expected = (
        "start of the run: expected all 5 ranks within 1 s, got no answer from ranks 2-3 "
        f"(here: ranks 0-1, 4 on {host}). Look whether these processes run and reach this machine, "
        "or give more time: --start-timeout, or VITDET_START_TIMEOUT under torchrun."
    )
    assert [str(error) for error in errors] == [expected] * 3
    assert all(isinstance(error, StartError) for error in errors)


def test_a_missing_rank_0_is_named(monkeypatch):
    monkeypatch.setattr(startup, "_LAST_WORDS", 0.0)
    with pytest.raises(StartError, match=r"all 2 ranks within 0\.2 s, got no answer from rank 0 "):
        meet(dist.HashStore(), 1, 2, 0.2)


def test_a_store_that_nobody_serves():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        port = taken.getsockname()[1]
        with pytest.raises(
            StartError,
            match=rf"expected rank 0 at 127\.0\.0\.1, port {port}, within 0\.2 s, got .*refused "
            r"\(this is rank 1\)\.",
        ):
            connect(Place(1, 2, 0, 1, "127.0.0.1", port), 0.2)


def test_a_port_that_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"expected port {port} of 127\.0\.0\.1 to be free"):
            connect(Place(0, 2, 0, 1, "127.0.0.1", port, serves=True), 1)


def test_the_time_limit_is_the_flags_or_the_environments(monkeypatch):
    monkeypatch.delenv(startup.TIMEOUT_VARIABLE, raising=False)
    assert startup.timeout() == 300
    monkeypatch.setenv(startup.TIMEOUT_VARIABLE, "20")
    assert startup.timeout() == 20
    assert startup.timeout(5) == 5
    for wrong in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv(startup.TIMEOUT_VARIABLE, wrong)
        with pytest.raises(InputError, match=rf"seconds, more than 0, got {wrong}\. 300 is"):
            startup.timeout()


def test_numbers_are_written_as_ranges():
    assert numbers([3]) == "rank 3"
    assert numbers([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_who_serves_the_store_under_torchrun(monkeypatch):
    known = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**known, "MASTER_ADDR": "a", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert Place.from_torchrun() == Place(0, 4, 0, 2, "a", 29500, serves=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert Place.from_torchrun().serves
    monkeypatch.setenv("RANK", "3")
    assert not Place.from_torchrun().serves


def test_a_restart_is_known_without_a_store(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    assert not startup.continues()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert startup.continues()


@pytest.mark.slow
def test_a_machine_that_is_never_started(tmp_path):
    config = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(PROJECT / "train_net.py"), "--config-file", str(config)]
    where = ["--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{port}", "--start-timeout", "2"]
    done = subprocess.run(
        [*command, *where, "--machine-rank", "0"],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: start of the run: expected all 2 ranks within 2 s, got no answer from rank 1 "
    )
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(config) not in found.stdout


@pytest.mark.slow
def test_the_rank_that_holds_up_the_first_step_is_named(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended:
        launch(parallel_workers.stall, 2, args=(str(tmp_path), 8.0))
    assert ended.value.code == STUCK_STATUS == 4
    out = tmp_path / "out"
    printed = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(printed) == 1
    host = socket.gethostname()
    assert printed[0].startswith(
        "error: first step: expected its end within 8 s, got rank 1: no data yet; rank 0: "
    )
    assert printed[0].endswith(
        f"Look at rank 1 on {host} first: the stacks of its threads are in "
        f"{out}/stuck_rank1.txt (those of the others beside it). If it only needs longer, raise "
        "train.first_step_timeout."
    )
    stacks = [(out / f"stuck_rank{rank}.txt").read_text() for rank in range(2)]
    in_the_loader = [re.search(r'parallel_workers\.py", line \d+ in __iter__', s) for s in stacks]
    assert in_the_loader[1]
    assert not in_the_loader[0]
    assert "first step: expected its end" in (out / "log.txt").read_text()
    assert not any(alive(tmp_path / f"pid{rank}") for rank in range(2))
