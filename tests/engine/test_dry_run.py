"""`--dry-run`: what it says, what it refuses, and that nothing stays."""

import re
import shutil
from collections import namedtuple
from unittest.mock import Mock

import pytest
import torch
from tiny_recipe import recipe, write_recipe

import train_net
from vitdet.engine import dry_run
from vitdet.engine.run import train
from vitdet.engine.trainer import Trainer
from vitdet.utils.checks import InputError

EXPECTED = [
    "train        0 images, 0 objects",
    "test         0 images, 0 objects",
    "model        GeneralizedRCNN, 0.13 M parameters, from random weights",
    "step         4 images in 1 process, X s, images read included",
    "memory       Y GiB in a process, at the most (resident set)",
    "length       6 steps, about Z without evaluations",
    "dry run      done; nothing was kept",
]


def files(folder):
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def page(text):
    """The printed lines; times and memory as letters, after a look at them."""
    seconds = re.search(r", ([\d.e-]+) s, images read included", text)
    memory = re.search(r"memory       ([\d.]+) GiB in a process, at the most", text)
    assert seconds
    assert memory
    assert 0.001 < float(seconds[1]) < 100
    assert 0.1 < float(memory[1]) < 10
    text = text.replace(f"{seconds[1]} s", "X s").replace(f"{memory[1]} GiB", "Y GiB")
    text = re.sub(r"about \d+ h \d\d min", "about Z", text)
    return [line for line in text.splitlines() if not line.startswith("[")]  # of the log


def test_a_page_and_nothing_else(tmp_path, capsys):
    out = tmp_path / "out"
    config = write_recipe(tmp_path / "recipe.yaml", out, ema_decay=0.9)
    before = files(tmp_path)
    assert train_net.run(["--config-file", str(config), "--dry-run"]) == 0
    assert page(capsys.readouterr().out) == EXPECTED
    assert files(tmp_path) == before
    train(recipe(out, num_images=8))
    before = files(tmp_path)
    capsys.readouterr()
    with pytest.raises(InputError, match="--resume"):
        train(recipe(out), dry_run=True)
    assert train(recipe(out), resume=True, dry_run=True) == {}
    lines = page(capsys.readouterr().out)
    assert lines[2].endswith("from the last checkpoint")
    assert lines[5] == "length       4 steps, about Z without evaluations"
    assert files(tmp_path) == before


@pytest.mark.slow
def test_two_processes(tmp_path, capfd):
    """One page, of the slower process."""
    config = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out")
    words = ["--config-file", str(config), "--num-gpus", "2", "--dry-run"]
    assert train_net.run(words) == 0
    lines = page(capfd.readouterr().out.partition("(gloo)\n")[2])
    assert lines == [line.replace("in 1 process", "in 2 processes") for line in EXPECTED]
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_one_line(tmp_path, capsys, monkeypatch):
    """Loss, weights, folder, disk: status 2, and no file of a run."""
    config = write_recipe(tmp_path / "recipe.yaml", tmp_path / "out", ema_decay=0.9)
    (tmp_path / "file").write_text("")
    usage = namedtuple("usage", "total used free")
    before = files(tmp_path)

    def said(*words):
        assert train_net.run(["--config-file", str(config), "--dry-run", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert files(tmp_path) == before
        return error

    assert "expected finite losses" in said("dataloader.train.poison_at=1")
    assert "none.pth" in said("train.init_checkpoint=none.pth")
    assert "cannot be written to" in said(f"train.output_dir={tmp_path / 'file' / 'out'}")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1 << 20))
    text = said("train.checkpoint_every=8")
    assert re.search(r"disk of .*: 7 checkpoints of 0\.00 GiB do not fit into 0\.00 GiB", text)


def test_a_step_that_does_not_fit(tmp_path, monkeypatch):
    text = r"a step with 4 images a process does not fit .*train\.accumulate=2"
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ):
        monkeypatch.setattr(Trainer, "step", Mock(side_effect=error))
        with pytest.raises(dry_run.DoesNotFitError, match=text):
            train(recipe(tmp_path / "out"), dry_run=True)
