from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import parallel_workers
import pytest
import torch
from detectron2.config import LazyCall as L
from test_kill import PATIENCE, born
from test_launch import PROJECT, environment
from tiny_recipe import own_recipe, recipe, rectangles, write_recipe

from vitdet import checkpoint
from vitdet.engine.checkpoints import last_checkpoint


def torchrun_words(config: Path, *arguments: str, restarts: int) -> list[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(PROJECT / "train_net.py"), "--config-file", str(config), *arguments]
    return [sys.executable, *start, "--max-restarts", str(restarts), *script]


def torchrun(config: Path, *arguments: str, restarts: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun_words(config, *arguments, restarts=restarts),
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def mortal(folder: Path, dies_at: int) -> Path:
    """Write a recipe whose rank 1 is killed once; there is a checkpoint after 8 images."""
    folder.mkdir()
    options = {"checkpoint_every": 8, "async_checkpoints": False, "ema_decay": 0.9}
    cfg = recipe(folder / "out", **options)
    cfg.dataloader.train = L(parallel_workers.MortalLoader)(
        dataset=L(rectangles)(), total_batch_size=4, folder=str(folder), dies_at=dies_at, seed=3
    )
    return own_recipe(cfg, folder / "recipe.yaml")


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_nothing_is_lost(tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    done = torchrun(mortal(killed, 12), restarts=2)
    assert done.returncode == 0, done.stderr
    assert (killed / "struck").exists()
    assert "model_000000008.pth (8 images seen)" in (killed / "out/log.txt").read_text()
    undisturbed = torchrun(mortal(whole, -1), restarts=0)
    assert undisturbed.returncode == 0, undisturbed.stderr
    ours, theirs = (checkpoint.read(each / "out/model_final.pth") for each in (killed, whole))
    for part in ("model", "ema_state"):
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), name
    pids = [each.name.removeprefix("pid") for each in killed.glob("pid*")]
    assert len(pids) == 4
    assert not any(Path("/proc", pid).exists() for pid in pids)


@pytest.mark.slow
def test_a_wrong_input_is_said_once_however_many_restarts_are_left(tmp_path):
    config = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    done = torchrun(config, "dataloader.train.total_batch_size=3", restarts=2)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "total_batch_size" in line]
    assert lines == [
        "error: dataloader.train.total_batch_size: expected a multiple of the 2 processes, got 3. "
        "Change it or the number of processes."
    ]
    assert "InputError" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("to", ["a worker", "torchrun"])
def test_a_signal_under_torchrun_saves_and_ends_the_run(tmp_path, to):
    """A restart would go on training where the machine is taken away; an orphan would, too."""
    out = tmp_path / "out"
    config = write_recipe(
        tmp_path / "recipe.yaml", out, num_images=100_000, log_every=1, checkpoint_every=0
    )
    words = torchrun_words(config, "--resume", restarts=3)
    with subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True) as agent:
        try:
            deadline = time.monotonic() + 4 * PATIENCE
            while not (out / "metrics.json").exists() or not (out / "metrics.json").read_text():
                assert agent.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
            workers = {int(pid): born(int(pid)) for pid in children}
            os.kill(min(workers) if to == "a worker" else agent.pid, signal.SIGUSR1)
            agent.communicate(timeout=2 * PATIENCE)
        finally:
            agent.kill()
    deadline = time.monotonic() + PATIENCE
    while any(born(pid) == start for pid, start in workers.items()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert agent.returncode != 0
    last = last_checkpoint(out)
    assert last is not None
    images = checkpoint.read(last)["images_seen"]
    log = (out / "log.txt").read_text()
    assert f"after {images} images: saved {last.name}, leaving with status 75" in log
    assert log.count("starting from random weights") == 1  # it was not started again
    assert "(4 images seen)" not in log


SRUN = """#!/bin/bash
# as SLURM: one task on one machine
export SLURM_NNODES=1 SLURM_NODEID=0
exec "${@:2}"
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_script_for_slurm_queues_a_preempted_run_again(tmp_path):
    out, tools = tmp_path / "out", tmp_path / "tools"
    tools.mkdir()
    scontrol = f'#!/bin/bash\ntest $1 = show && echo 127.0.0.1 || echo "$@" > {tools}/asked\n'
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in (("srun", SRUN), ("scontrol", scontrol), ("python", python)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    config = write_recipe(tmp_path / "recipe.yaml", out, num_images=100_000, log_every=1)
    env = {**environment(), "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "1"}
    env |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "here"}
    script = ["bash", str(PROJECT / "docs/train.sbatch"), "--config-file", str(config)]
    with subprocess.Popen(script, env=env, cwd=PROJECT, start_new_session=True) as job:
        try:
            deadline = time.monotonic() + 4 * PATIENCE
            while not (out / "metrics.json").exists() or not (out / "metrics.json").read_text():
                assert job.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            (step,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            os.kill(int(step), signal.SIGTERM)  # `--signal=TERM@120` is for the steps
            assert job.wait(2 * PATIENCE) == 75
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    assert (tools / "asked").read_text() == "requeue 77\n"
    assert last_checkpoint(out) is not None
