"""The command line of training, as a user types it."""

import subprocess
import sys

import pytest
from pair import PROJECT, environment
from tiny_recipe import write_recipe

import train_net
from vitdet import checkpoint


def said(capsys, *arguments):
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


@pytest.mark.slow
def test_two_processes_then_one_resumed_and_evaluated_from_the_command_line(tmp_path, capsys):
    config = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out", checkpoint_every=8)
    words = ("--config-file", str(config), "--num-gpus")
    started = [sys.executable, str(PROJECT / "train_net.py"), *words, "2", "train.num_images=8"]
    done = subprocess.run(started, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no GPU: 2 processes on the CPU (gloo)" in done.stdout
    status, text, error = said(capsys, *words, 1, "--resume", "train.num_images=12")
    assert (status, error) == (0, "")
    assert "(8 images seen)" in text
    assert checkpoint.read(tmp_path / "out/model_final.pth")["images_seen"] == 12
    again = ("--eval-only", "--resume", "train.num_images=12")
    status, text, error = said(capsys, *words, 1, *again)
    assert (status, error) == (0, "")
    assert "AP50" in text
