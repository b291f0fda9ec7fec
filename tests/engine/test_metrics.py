"""Where the numbers of a run go: files, loggers, terminal."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import sys

import pytest
import torch
from tiny_recipe import recipe
from torch import nn

from vitdet.config import build_model
from vitdet.engine.groups import named_rates
from vitdet.engine.inference import build
from vitdet.engine.logs import logging_to
from vitdet.engine.metrics import Metrics, Progress, _gradient_norm
from vitdet.engine.run import train
from vitdet.engine.trainer import StepRecord
from vitdet.utils.checks import InputError


def test_a_resume_drops_later_lines(tmp_path):
    metrics = Metrics(tmp_path, images_seen=0)
    metrics.write(4, {"a": 2.0})
    metrics.write(8, {"a": 3.0, "bbox/AP": 4.0})
    metrics.write(12, {"a": 5.0})
    metrics.close()
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"images_seen": 8, "cut')  # by a kill
    metrics = Metrics(tmp_path, images_seen=8)
    metrics.write(12, {"a": 6.0})
    metrics.close()
    metrics.close()  # once more does nothing
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [(line["images_seen"], line["a"]) for line in lines] == [(4, 2.0), (8, 3.0), (12, 6.0)]


def test_rates_have_names(tmp_path):
    cfg = recipe(tmp_path)  # lr 1e-3, decay 0.7, 2 blocks
    detector = build_model(cfg.model, "meta")
    optimizer = build(cfg.optimizer, model=detector)
    assert named_rates(detector, optimizer) == pytest.approx(
        {"lr/block_0": 0.49e-3, "lr/block_1": 0.7e-3, "lr/head": 1e-3, "lr/pyramid": 1e-3}
    )
    for value in detector.backbone.net.blocks[0].parameters():
        value.requires_grad_(False)
    assert "lr/block_0" not in named_rates(detector, build(cfg.optimizer, model=detector))


def test_rates_of_other_models_have_names_too():
    model = nn.Sequential()
    model.add_module("backbone", nn.Linear(2, 2))  # knows no layers
    model.add_module("head", nn.Linear(2, 2))
    groups = [
        {"params": [model.backbone.weight], "lr": 0.1},
        {"params": [model.backbone.bias], "lr": 0.3},
        {"params": list(model.head.parameters()), "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups)
    assert named_rates(model, optimizer) == {"lr/backbone": 0.3, "lr/head": 0.2}
    alone = nn.Linear(2, 2)
    assert named_rates(alone, torch.optim.SGD(alone.parameters(), lr=0.1)) == {"lr/head": 0.1}


def test_the_gradient_norm_is_the_mean_of_the_finite_ones():
    def step(norm: float | None) -> StepRecord:
        given = None if norm is None else torch.tensor(norm)
        return StepRecord(torch.zeros(0), (), [], 0.1, 0, given)

    assert _gradient_norm([step(1.0), step(3.0), step(float("inf"))]) == {"grad_norm": 2.0}
    assert _gradient_norm([step(float("inf"))]) == _gradient_norm([step(None)]) == {}


def test_a_run_logs_rates_and_gradient(tmp_path):
    train(recipe(tmp_path, num_images=8))
    line = json.loads((tmp_path / "metrics.json").read_text().splitlines()[0])
    assert line["lr/head"] == pytest.approx(1e-3)
    assert line["lr/block_0"] == pytest.approx(0.49e-3)
    assert line["grad_norm"] > 0
    assert line["max_memory_mb"] > 100
    assert line["data_seconds"] >= 0


# --- terminal ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_stands_below_the_lines_of_a_terminal(tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    train(recipe(tmp_path, num_images=24))
    text = screen.getvalue()
    bars = [part for part in text.split("\r") if "/24 [" in part]
    assert any("12/24 [" in bar for bar in bars)  # drawn again below the line of 16 images
    # every log line begins at the left edge of a line of its own: what stood there was erased
    for line in (tmp_path / "log.txt").read_text().splitlines():
        if "images  eta" in line:
            assert f"\n{line}\n" in text or f"\r{line}\n" in text
    assert "\r" not in (tmp_path / "log.txt").read_text()
    assert not text.rstrip("\r ").endswith("]")  # the bar is gone at the end


def test_no_bar_where_there_is_no_terminal(tmp_path, capsys):
    train(recipe(tmp_path, num_images=8))
    text = capsys.readouterr().out
    assert "8/8 images  eta" in text
    assert "\r" not in text


def test_a_bar_goes_when_a_run_is_interrupted(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    progress = Progress(Metrics.__new__(Metrics), every=100)

    class Running:
        class window:  # noqa: N801
            steps = ()

        images_seen, num_images = 4, 24

    progress._move_bar(Running)
    Running.images_seen = 8
    assert progress.bar is not None
    progress._move_bar(Running)
    assert progress.bar.n == 8
    progress.close()
    progress.close()
    assert progress.bar is None
    assert screen.getvalue().endswith("\r")


def test_lines_are_printed_as_before_without_a_bar(capsys):
    with logging_to():
        logging.getLogger("vitdet.anything").info("a line")
    assert capsys.readouterr().out.endswith("a line\n")


# --- loggers -------------------------------------------------------------------------------------


def test_wrong_loggers_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"train\.loggers: expected names of wandb, got 'w"):
        train(recipe(tmp_path / "out", loggers=["wandbb"]))
    with pytest.raises(InputError, match=r"train\.loggers: expected a list or null, got 'wandb'"):
        train(recipe(tmp_path / "out", loggers="wandb"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError) as caught:
        train(recipe(tmp_path / "out", loggers=["wandb"]))
    assert str(caught.value) == (
        "train.loggers: expected the package wandb, got none. Install it (pip install "
        "wandb), or leave it out of train.loggers."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_wandb_offline_keeps_config_tags_and_points_and_a_resume_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = {"loggers": ["wandb"]}
    train(recipe(tmp_path, num_images=8, **logged))
    identity = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    train(recipe(tmp_path, num_images=16, **logged), resume=True)
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": identity}
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(identity) for folder in folders)
    content = b"".join((folder / f"run-{identity}.wandb").read_bytes() for folder in folders)
    for text in (b"total_loss", b"bbox/AP", b"lr/block_0", b"layer_decay_rate"):
        assert text in content, text
