from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import parallel_workers
import pytest
import torch
from detectron2.config import LazyCall as L
from test_launch import PROJECT, environment
from tiny_recipe import own_recipe, recipe, rectangles, write_recipe

from vitdet import checkpoint


def torchrun(config: Path, *arguments: str, restarts: int) -> subprocess.CompletedProcess[str]:
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(PROJECT / "train_net.py"), "--config-file", str(config), *arguments]
    return subprocess.run(
        [sys.executable, *start, "--max-restarts", str(restarts), *script],
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
