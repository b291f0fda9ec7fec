"""Where lines and numbers of a run go."""

from __future__ import annotations

import importlib.util
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from tiny_recipe import recipe

from vitdet.engine.log import Metrics, gradient_norm, logging_to
from vitdet.engine.run import train
from vitdet.engine.trainer import StepRecord
from vitdet.utils.checks import InputError


def test_a_resume_drops_later_lines(tmp_path):
    options = SimpleNamespace(output_dir=tmp_path, loggers=[])
    with Metrics(options, 0, about={}) as metrics:
        metrics.write(4, {"a": 2.0})
        metrics.write(8, {"a": 3.0, "bbox/AP": 4.0})
        metrics.write(12, {"a": 5.0})
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"images_seen": 8, "cut')  # by a kill
    with Metrics(options, 8, about={}) as metrics:
        metrics.write(12, {"a": 6.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [(line["images_seen"], line["a"]) for line in lines] == [(4, 2.0), (8, 3.0), (12, 6.0)]


def test_the_gradient_norm_is_the_mean_of_the_finite_ones():
    def step(norm: float | None) -> StepRecord:
        given = None if norm is None else torch.tensor(norm)
        return StepRecord(torch.zeros(0), (), [], 0.1, 0, given)

    assert gradient_norm([step(1.0), step(3.0), step(float("inf"))]) == {"grad_norm": 2.0}
    assert gradient_norm([step(float("inf"))]) == gradient_norm([step(None)]) == {}


def test_lines_go_to_the_terminal_and_to_the_file(tmp_path, capsys):
    with logging_to() as log_to:
        logging.getLogger("vitdet.anything").info("a line\x1b[2J")
        log_to(tmp_path / "log.txt")
    printed = capsys.readouterr().out
    assert printed.endswith("a line\\x1b[2J\n")  # a terminal would obey it
    assert (tmp_path / "log.txt").read_text() == printed


def test_wrong_loggers_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"train\.loggers: expected \[wandb\] or \[\], got 'wandb"):
        train(recipe(tmp_path / "out", loggers=["wandbb"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    text = r"train\.loggers: expected the package wandb, got none\. Install it \(pip install wandb"
    with pytest.raises(InputError, match=text):
        train(recipe(tmp_path / "out", loggers=["wandb"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_wandb_offline_keeps_config_and_points_and_a_resume_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(recipe(tmp_path, num_images=8, loggers=["wandb"]))
    identity = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    train(recipe(tmp_path, num_images=16, loggers=["wandb"]), resume=True)
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": identity}
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(identity) for folder in folders)
    content = b"".join((folder / f"run-{identity}.wandb").read_bytes() for folder in folders)
    for text in (b"total_loss", b"bbox/AP", b"lr/block_0", b"layer_decay_rate"):
        assert text in content, text
