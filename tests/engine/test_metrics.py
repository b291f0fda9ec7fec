"""Where the numbers of a run go: files, loggers, terminal."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
import sys
from pathlib import Path

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
from vitdet.engine.writers import About
from vitdet.utils.checks import InputError


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_is_that_of_the_lines(tmp_path):
    train(recipe(tmp_path, num_images=16, eval_every=8))
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    rows = table(tmp_path / "metrics.csv")
    assert len(rows) == len(lines) == 4
    for row, line in zip(rows, lines, strict=True):
        assert {key: float(value) for key, value in row.items() if value} == pytest.approx(line)
    assert next(iter(rows[0])) == "images_seen"
    assert rows[0]["bbox/AP"] == ""  # a column of the evaluation, which came later
    assert rows[1]["bbox/AP"] == "6.0"


def test_a_new_column_comes_last_and_a_resume_drops_later_rows(tmp_path):
    metrics = Metrics(tmp_path, images_seen=0)
    metrics.write(4, {"b": 1.0, "a": 2.0})
    metrics.write(8, {"a": 3.0, "bbox/AP": 4.0})
    metrics.write(12, {"b": 5.0})
    metrics.close()
    text = "images_seen,b,a,bbox/AP\n4,1.0,2.0,\n8,,3.0,4.0\n12,5.0,,\n"
    assert (tmp_path / "metrics.csv").read_text() == text
    with (tmp_path / "metrics.json").open("a") as file:
        file.write('{"images_seen": 8, "cut')  # by a kill
    metrics = Metrics(tmp_path, images_seen=8)
    metrics.write(12, {"b": 6.0})
    metrics.close()
    metrics.close()  # once more does nothing
    text = "images_seen,b,a,bbox/AP\n4,1.0,2.0,\n8,,3.0,4.0\n12,6.0,,\n"
    assert (tmp_path / "metrics.csv").read_text() == text
    assert len((tmp_path / "metrics.json").read_text().splitlines()) == 3


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
    with pytest.raises(
        InputError, match=r"train\.loggers: expected names of wandb, mlflow, got 'w"
    ):
        train(recipe(tmp_path / "out", loggers=["wandbb"]))
    with pytest.raises(InputError, match=r"train\.loggers: expected a list or null, got 'wandb'"):
        train(recipe(tmp_path / "out", loggers="wandb"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError) as caught:
        train(recipe(tmp_path / "out", loggers=["mlflow"]))
    assert str(caught.value) == (
        "train.loggers: expected the package mlflow, got none. Install it (pip install "
        "'vitdet[mlflow]'), or leave it out of train.loggers."
    )
    assert not (tmp_path / "out").exists()


def _write_and_fail(metrics: Metrics) -> None:
    with metrics:
        metrics.write(4, {"AP[small]": 1.0})
        raise RuntimeError("boom")


# mlflow's own models, at import
SQLALCHEMY = pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy is deprecated")


@SQLALCHEMY
@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="mlflow is not installed")
def test_mlflow_gets_config_tags_and_points_and_a_resume_goes_on(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    logged = {"loggers": ["mlflow"], "tags": ["tiny"]}
    train(recipe(tmp_path, num_images=8, **logged))
    train(recipe(tmp_path, num_images=16, **logged), resume=True)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "vitdet"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"mlflow": run.info.run_id}
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.001"
    assert run.data.params["train.num_images"] == "8"  # those of the run's beginning
    assert run.data.tags["vitdet.tags"] == "tiny, rectangles, rectangles"
    assert run.data.tags["vitdet.train"].startswith("rectangles ")
    points = client.get_metric_history(run.info.run_id, "bbox/AP")
    assert [(point.step, point.value) for point in points] == [(8, 6.0), (16, 6.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = client.get_metric_history(run.info.run_id, "total_loss")
    assert [point.value for point in losses] == [
        line["total_loss"] for line in lines if "total_loss" in line
    ]


@SQLALCHEMY
@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="mlflow is not installed")
def test_a_run_that_fails_is_failed_in_mlflow_and_a_wrong_store_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "trials")
    about = About({"a": {"b c": "x" * 7000}})
    metrics = Metrics(tmp_path, images_seen=0, loggers=["mlflow"], about=about)
    with pytest.raises(RuntimeError, match="boom"):
        _write_and_fail(metrics)

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'other.db'}")
    experiment = client.get_experiment_by_name("trials")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"AP_small_": 1.0}
    assert len(run.data.params["a.b c"]) == 6000
    assert run.data.params["a.b c"].endswith("x...")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlit:///nowhere.db")
    with pytest.raises(InputError, match=r"train\.loggers, mlflow: expected a store at sqlit"):
        Metrics(tmp_path, images_seen=0, loggers=["mlflow"])


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_wandb_offline_keeps_config_tags_and_points_and_a_resume_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = {"loggers": ["wandb"], "tags": ["tiny"]}
    train(recipe(tmp_path, num_images=8, **logged))
    identity = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    train(recipe(tmp_path, num_images=16, **logged), resume=True)
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"wandb": identity}
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(identity) for folder in folders)
    content = b"".join((folder / f"run-{identity}.wandb").read_bytes() for folder in folders)
    for text in (b"total_loss", b"bbox/AP", b"lr/block_0", b"tiny", b"layer_decay_rate"):
        assert text in content, text
