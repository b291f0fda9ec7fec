from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_launch import PROJECT, environment
from tiny_recipe import write_recipe

from vitdet import checkpoint
from vitdet.engine.checkpoints import last_checkpoint


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(PROJECT / "train_net.py"), *map(str, arguments)]


def train_net(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, check=False
    )


def test_the_flags_are_those_of_detectron2():
    shown = train_net("--help")
    assert shown.returncode == 0
    for flag in (
        *("--config-file", "--num-gpus", "--num-machines", "--machine-rank", "--dist-url"),
        *("--resume", "--eval-only", "--print-groups", "key=value"),
    ):
        assert flag in shown.stdout


def test_a_flag_without_effect_does_not_exist():
    """EVA's script takes --tta and never looks at it."""
    done = train_net("--config-file", "x.py", "--tta")
    assert done.returncode == 2
    assert "unrecognized arguments: --tta" in done.stderr


@pytest.mark.slow
def test_groups_are_printed_without_data(tmp_path):
    config = "configs/LVIS/cascade_mask_rcnn_vitdet_l_100ep.py"
    done = train_net("--config-file", PROJECT / config, "--print-groups", "optimizer.lr=1")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    (embedding,) = [line for line in lines if "patch_embed.proj.weight" in line]
    assert embedding.split(maxsplit=1)[1].lstrip().startswith("1024 x 3 x 16 x 16 ")
    assert embedding.split()[-2:] == ["0.00377789", "0.1"]  # 0.8 ** 25
    assert "364691690 are trained" in lines[-1]


@pytest.mark.slow
def test_a_typo_is_one_line_and_status_2(tmp_path):
    config = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    done = train_net("--config-file", config, "train.sede=1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: override 'train.sede'")
    assert done.stderr.count("\n") == 1
    assert "Did you mean train.seed?" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_input_error_in_processes_is_one_line_and_status_2(tmp_path):
    config = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    done = train_net(
        "--config-file", config, "--num-gpus", 2, "dataloader.train.total_batch_size=3"
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert lines == [
        "error: dataloader.train.total_batch_size: expected a multiple of the 2 processes, got 3. "
        "Change it or the number of processes."
    ]
    assert "Traceback" not in done.stderr


# A shell starts background jobs with ^C ignored, and what they start inherits that.
INTERRUPTIBLE = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_interrupted_resumed_and_evaluated_from_the_command_line(tmp_path, processes):
    config = write_recipe(
        tmp_path / "recipe.yaml", tmp_path / "out", num_images=100_000, checkpoint_every=8
    )
    arguments = ("--config-file", config, "--num-gpus", processes)
    running = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *command(*arguments)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 400  # a loaded machine needs minutes to import torch
        while not (tmp_path / "out" / "last_checkpoint").exists():
            assert running.poll() is None, running.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(running.pid, signal.SIGINT)  # as ^C: every process of the group
        errors = running.communicate(timeout=100)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    assert processes == 1 or errors.splitlines()[-1] == "interrupted"
    assert list((tmp_path / "out").glob(".*")) == []

    stopped_at = checkpoint.read(last_checkpoint(tmp_path / "out"))["images_seen"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"SIGINT after {stopped_at} images: saved model_" in log
    assert "leaving with status 130; --resume goes on from here" in log
    goal = stopped_at + 4
    done = train_net(*arguments, "--resume", f"train.num_images={goal}")
    assert done.returncode == 0, done.stderr
    assert f"({stopped_at} images seen)" in done.stdout
    assert checkpoint.read(tmp_path / "out" / "model_final.pth")["images_seen"] == goal

    done = train_net(*arguments, "--eval-only", "--resume", f"train.num_images={goal}")
    assert done.returncode == 0, done.stderr
    assert "AP50" in done.stdout
    assert processes == 1 or "no GPU: 2 processes" in done.stdout


def test_the_command_line_is_one_page():
    assert len(Path(PROJECT / "train_net.py").read_text().splitlines()) <= 80
