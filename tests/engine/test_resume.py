"""The exact resume, with everything that has state: a stop changes nothing at all.

Average of the weights, accumulation, stochastic depth, clipping, moments of AdamW, two reading
processes of the project's own loader, and two training processes (gloo).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import step_workers
from test_run import assert_same, numbers

from vitdet import checkpoint
from vitdet.engine.launch import launch


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def in_processes(world: int, folder: Path, data: Path, num_images: int, resume: bool) -> None:
    arguments = (str(folder), str(data), num_images, resume)
    launch(step_workers.train_shapes_until, world, args=arguments)


def images(folder: Path) -> list[list]:
    """[position, file name, sum of the pixels] of all images trained on, in their order."""
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("images.*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len({position for position, *_ in lines}) == len(lines)  # none twice
    return sorted(lines)


def assert_same_run(folder: Path, whole: Path) -> None:
    ours, theirs = (checkpoint.read(each / "model_final.pth") for each in (folder, whole))
    assert ours["images_seen"] == 24
    for key in ("model", "ema_state", "optimizer", "scaler", "images_seen", "seed"):
        assert_same(ours[key], theirs[key], key)
    assert numbers(folder) == numbers(whole)
    assert images(folder) == images(whole)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    in_processes(1, folder, data, 24, resume=False)
    return folder


@pytest.fixture(scope="module")
def two_processes_stopped(tmp_path_factory, data) -> Path:
    """A run of two processes that was stopped after 8 of its 24 images; copy it."""
    folder = tmp_path_factory.mktemp("two") / "run"
    in_processes(2, folder, data, 8, resume=False)
    return folder


@pytest.mark.slow
def test_one_process_stopped_twice_ends_with_the_same_bits(one_process, data, tmp_path):
    in_processes(1, tmp_path, data, 8, resume=False)
    in_processes(1, tmp_path, data, 16, resume=True)
    in_processes(1, tmp_path, data, 24, resume=True)
    drop_evaluations(tmp_path)
    assert_same_run(tmp_path, one_process)
    assert [position for position, *_ in images(tmp_path)] == list(range(24))


@pytest.mark.slow
def test_two_processes_stopped_end_with_the_same_bits(two_processes_stopped, data, tmp_path):
    in_processes(2, tmp_path / "whole", data, 24, resume=False)
    shutil.copytree(two_processes_stopped, tmp_path / "parts")
    in_processes(2, tmp_path / "parts", data, 24, resume=True)
    drop_evaluations(tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_then_one_then_two_train_on_the_same_images(
    one_process, two_processes_stopped, data, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(two_processes_stopped, folder)
    in_processes(1, folder, data, 16, resume=True)
    in_processes(2, folder, data, 24, resume=True)
    assert images(folder) == images(one_process)
    assert checkpoint.read(folder / "model_final.pth")["images_seen"] == 24


def drop_evaluations(folder: Path) -> None:
    """Each part of a run ends with an evaluation, which the whole run has at its end only."""
    lines = (folder / "metrics.json").read_text().splitlines()
    kept = [line for line in lines if "bbox/AP" not in line]
    kept.append(lines[-1])
    (folder / "metrics.json").write_text("".join(line + "\n" for line in kept))
