from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import parallel_workers
import pytest
import torch
from test_launch import environment

from vitdet import checkpoint
from vitdet.engine import slurm
from vitdet.engine.slurm import parameters, place_in, submit
from vitdet.utils.checks import InputError

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'vitdet[slurm]'")


def arguments(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(folder=str(folder), resume=False, start_timeout=120.0)


def test_settings_are_numbers_and_words():
    assert parameters("") == {}
    assert parameters("partition=gpu,nodes=2,gres=gpu:8") == {
        "partition": "gpu",
        "nodes": 2,
        "gres": "gpu:8",
    }
    for wrong in ("nodes", "=2", "nodes="):
        with pytest.raises(InputError, match=rf"--slurm: expected key=value,.* got {wrong}\. As"):
            parameters(wrong)


def test_without_submitit(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"package submitit, got none\. Install it: pip install"):
        submit(print, arguments(tmp_path), {}, tmp_path)


def test_without_sbatch(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match=r"--slurm: expected the command sbatch, got none on"):
        submit(print, arguments(tmp_path), {}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_that_nobody_knows(tmp_path):
    with pytest.raises(InputError, match=r"--slurm: .* Unknown argument 'colour' .*SLURM of docs"):
        submit(print, arguments(tmp_path), {"cluster": "local", "colour": "red"}, tmp_path)
    with pytest.raises(InputError, match=r"--slurm cluster: expected slurm or local, got moon"):
        submit(print, arguments(tmp_path), {"cluster": "moon"}, tmp_path)


def test_what_sbatch_gets(monkeypatch, tmp_path):
    """A stand-in for sbatch keeps the script that it is given."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in {
        "sbatch": f'cp "$1" {tmp_path}/given.sh; echo Submitted batch job 12345',
        "srun": "exit 1",
    }.items():
        (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    settings = parameters("partition=gpu,nodes=2,gpus_per_node=8,timeout_min=90,account=vision")
    job = submit(print, arguments(tmp_path), settings, tmp_path / "big_run")
    assert job.job_id == "12345"
    lines = (tmp_path / "given.sh").read_text().splitlines()
    options = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert options >= {
        *("partition=gpu", "nodes=2", "gpus-per-node=8", "ntasks-per-node=8", "time=90"),
        *("account=vision", "job-name=big_run", "signal=USR2@90", "open-mode=append"),
    }
    (run,) = [line for line in lines if line.startswith("srun")]
    assert "--kill-on-bad-exit=1" in run
    assert f"submitit.core._submit {tmp_path}/big_run/slurm" in run


def test_the_place_of_a_task():
    job = SimpleNamespace(
        job_id="34567_2",
        global_rank=9,
        num_tasks=16,
        num_nodes=2,
        local_rank=1,
        hostnames=["a", "b"],
    )
    place = place_in(job)
    assert (place.rank, place.world_size, place.local_rank, place.local_size) == (9, 16, 1, 8)
    assert (place.host, place.serves) == ("a", False)
    assert place.port == 20000 + 345672 % 20000
    job.global_rank = 0
    assert place_in(job).serves


@pytest.mark.slow
def test_a_job_that_must_leave_goes_on_where_it_was(tmp_path, monkeypatch):
    """Two tasks on this machine get the signal that SLURM sends before the time limit."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    settings = parameters("cluster=local,tasks_per_node=2,gpus_per_node=0,timeout_min=9")
    told, alone = tmp_path / "told", tmp_path / "alone"
    told.mkdir()
    job = submit(parallel_workers.waiting_in_the_middle, arguments(told), settings, told)
    deadline = time.monotonic() + 300
    while len(list(told.glob("waits*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    pids = [int(path.name.removeprefix("waits")) for path in told.glob("waits*")]
    assert len(pids) == 2
    for pid in pids:
        os.kill(pid, signal.SIGUSR2)
    job._process.wait(300)
    logs = [path.read_text() for path in sorted((told / "slurm").glob("*_log.out"))]
    assert len(logs) == 2
    assert "Requeued job" in logs[0]
    assert "SIGTERM after 12 images: saved model_000000012.pth" in logs[0]
    assert "model_000000012.pth (12 images seen)" in logs[0]
    alone.mkdir()
    (alone / "go_on").touch()
    parallel_workers.launch_alone(alone)
    ours, theirs = (checkpoint.read(each / "out/model_final.pth") for each in (told, alone))
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name
    assert not any(Path("/proc", str(pid)).exists() for pid in pids)
