"""The command line of training, as a user types it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from killing import PATIENCE, wait_until
from pair import PROJECT, environment
from tiny_recipe import write_recipe

import train_net
from vitdet import checkpoint
from vitdet.engine.checkpoints import last_checkpoint


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(PROJECT / "train_net.py"), *map(str, arguments)]


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Run the command line in this process; return status, stdout and stderr."""
    try:
        status = train_net.run([str(each) for each in arguments])
    except SystemExit as ended:
        status = ended.code
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_the_flags_are_those_of_detectron2(capsys):
    status, text, _ = said(capsys, "--help")
    assert status == 0
    for flag in (
        *("--config-file", "--num-gpus", "--num-machines", "--machine-rank", "--dist-url"),
        *("--resume", "--eval-only", "--print-groups", "--dry-run", "key=value"),
    ):
        assert flag in " ".join(text.split())
    # EVA's script takes --tta and never looks at it
    status, _, error = said(capsys, "--config-file", "x.py", "--tta")
    assert (status, "unrecognized arguments: --tta" in error) == (2, True)


def test_groups_are_printed_without_data(capsys):
    config = PROJECT / "configs/LVIS/cascade_mask_rcnn_vitdet_l_100ep.py"
    words = ("--config-file", config, "--print-groups", "optimizer.lr=1")
    status, text, error = said(capsys, *words)
    assert (status, error) == (0, "")
    lines = text.splitlines()
    (embedding,) = [line for line in lines if "patch_embed.proj.weight" in line]
    assert embedding.split(maxsplit=1)[1].lstrip().startswith("1024 x 3 x 16 x 16 ")
    assert embedding.split()[-2:] == ["0.00377789", "0.1"]  # 0.8 ** 25
    assert "364691690 are trained" in lines[-1]


def test_a_typo_is_one_line_and_status_2(tmp_path, capsys):
    config = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    status, _, error = said(capsys, "--config-file", config, "train.sede=1")
    assert status == 2
    assert error.startswith("error: override 'train.sede'")
    assert error.count("\n") == 1
    assert "Did you mean train.seed?" in error
    assert not (tmp_path / "out").exists()


# A shell starts background jobs with ^C ignored, and what they start inherits that.
INTERRUPTIBLE = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.mark.slow
def test_interrupted_resumed_and_evaluated_from_the_command_line(tmp_path, capsys):
    """In two processes; it goes on in one."""
    options = {"num_images": 100_000, "checkpoint_every": 8}
    config = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out", **options)
    arguments = ("--config-file", config, "--num-gpus")
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, *command(*arguments, 2)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            last = tmp_path / "out" / "last_checkpoint"
            wait_until(last.exists, lambda: running.poll() is None)
            os.killpg(running.pid, signal.SIGINT)  # as ^C: every process of the group
            errors = running.communicate(timeout=PATIENCE)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "interrupted"
    assert list((tmp_path / "out").glob(".*")) == []

    stopped_at = checkpoint.read(last_checkpoint(tmp_path / "out"))["images_seen"]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert f"SIGINT after {stopped_at} images: saved model_" in log
    assert "leaving with status 130; --resume goes on from here" in log
    goal = f"train.num_images={stopped_at + 4}"
    status, text, error = said(capsys, *arguments, 1, "--resume", goal)
    assert (status, error) == (0, "")
    assert f"({stopped_at} images seen)" in text
    assert checkpoint.read(tmp_path / "out/model_final.pth")["images_seen"] == stopped_at + 4
    status, text, error = said(capsys, *arguments, 1, "--eval-only", "--resume", goal)
    assert (status, error) == (0, "")
    assert "AP50" in text
