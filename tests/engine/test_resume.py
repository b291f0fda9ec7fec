"""The exact resume, with everything that has state: a stop changes nothing at all.

Average of the weights, accumulation, stochastic depth, clipping, moments of AdamW, two reading
processes of the project's own loader, and two training processes (gloo).
"""

import json
import shutil

import pytest
import torch
from detectron2.config import LazyCall as L
from pair import in_pair
from ranks import shapes_recipe, train_even_batches, train_shapes
from test_run import assert_same, numbers, stop_after

from vitdet import checkpoint
from vitdet.data.shapes import CLASSES
from vitdet.engine.checkpoints import FINAL
from vitdet.engine.run import evaluate, train
from vitdet.evaluation import CocoEvaluator

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("shapes")


def in_processes(world, folder, data, num_images, resume):
    arguments = (str(folder), str(data), num_images, resume)
    if world == 1:
        train_shapes(*arguments)
    else:
        in_pair(train_shapes, *arguments)


def images(folder):
    """[position, file name, sum of the pixels] of all images trained on, in their order."""
    lines = [
        json.loads(line)
        for path in sorted(folder.glob("images.*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert len({position for position, *_ in lines}) == len(lines)  # none twice
    return sorted(lines)


def assert_same_run(folder, whole):
    ours, theirs = (checkpoint.read(each / "model_final.pth") for each in (folder, whole))
    assert ours["images_seen"] == 24
    for key in ("model", "ema_state", "optimizer", "scaler", "images_seen", "seed"):
        assert_same(ours[key], theirs[key], key)
    # each part of a run ends with an evaluation, which the whole run has at its end only
    steps, wholes = (
        [row for row in numbers(each) if "loss_rpn_cls" in row] for each in (folder, whole)
    )
    assert steps == wholes != []
    assert numbers(folder)[-1] == numbers(whole)[-1]
    assert images(folder) == images(whole)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("one") / "run"
    in_processes(1, folder, data, 24, resume=False)
    return folder


@pytest.fixture(scope="module")
def two_processes_stopped(tmp_path_factory, data):
    """A run of two processes that was stopped after 8 of its 24 images; copy it."""
    folder = tmp_path_factory.mktemp("two") / "run"
    in_processes(2, folder, data, 8, resume=False)
    return folder


def test_one_process_stopped_twice_ends_with_the_same_bits(one_process, data, tmp_path):
    in_processes(1, tmp_path, data, 8, resume=False)
    in_processes(1, tmp_path, data, 16, resume=True)
    in_processes(1, tmp_path, data, 24, resume=True)
    assert_same_run(tmp_path, one_process)
    assert [position for position, *_ in images(tmp_path)] == list(range(24))


def test_two_processes_stopped_end_with_the_same_bits(two_processes_stopped, data, tmp_path):
    in_processes(2, tmp_path / "whole", data, 24, resume=False)
    shutil.copytree(two_processes_stopped, tmp_path / "parts")
    in_processes(2, tmp_path / "parts", data, 24, resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_two_processes_then_one_then_two_train_on_the_same_images(
    one_process, two_processes_stopped, data, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(two_processes_stopped, folder)
    in_processes(1, folder, data, 16, resume=True)
    in_processes(2, folder, data, 24, resume=True)
    assert images(folder) == images(one_process)
    assert checkpoint.read(folder / "model_final.pth")["images_seen"] == 24


def test_two_processes_train_to_the_weights_of_one(tmp_path):
    """Same total batch, five steps of AdamW, and the same average of the weights."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_even_batches(str(one), checkpoint_every=8, ema_decay=0.75)
    in_pair(train_even_batches, str(two), ema_decay=0.75)
    first = checkpoint.read(one / "model_000000008.pth")["model"]
    ours, theirs = (checkpoint.read(each / "model_final.pth") for each in (one, two))
    assert ours["images_seen"] == theirs["images_seen"] == 40
    moved = [(ours["model"][name] - first[name]).abs().max().item() for name in first]
    assert max(moved) > 1e-3  # the steps are large against the difference below
    for part in ("model", "ema_state"):
        for name, weight in ours[part].items():
            torch.testing.assert_close(theirs[part][name], weight, rtol=0, atol=1e-6, msg=name)


def test_with_other_reading_processes_and_the_real_evaluator(data, tmp_path, monkeypatch):
    def cfg(folder, workers, **options):
        made = shapes_recipe(tmp_path / folder, data, **options)
        for part in ("train", "test"):
            made.dataloader[part].num_workers = workers
        made.dataloader.evaluator = L(CocoEvaluator)(dataset="${..test.dataset}")
        return made

    options = {"num_images": 12, "checkpoint_every": 8, "precision": "bf16"}
    results = train(cfg("whole", 0, **options))
    assert set(results) >= {"bbox", "segm"}
    assert 0 <= results["segm"]["AP"] <= 100
    stop_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(cfg("parts", 2, **options))
    resumed = train(cfg("parts", 1, **options), resume=True)
    assert resumed["bbox"]["AP"] == results["bbox"]["AP"]
    whole, parts = (checkpoint.read(tmp_path / name / FINAL) for name in ("whole", "parts"))
    for key in ("model", "ema_state", "optimizer", "images_seen"):
        assert_same(parts[key], whole[key], key)
    again = evaluate(cfg("again", 0, init_checkpoint=str(tmp_path / "whole" / FINAL)))
    assert again["segm"]["AP"] == results["segm"]["AP"]
    assert parts["vitdet"]["class_names"] == list(CLASSES)
