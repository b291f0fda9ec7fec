from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes, Instances
from test_run import assert_same, numbers, stop_after
from tiny_recipe import recipe

from vitdet import checkpoint
from vitdet.data.shapes import shapes_dataset
from vitdet.engine import inference
from vitdet.engine.checkpoints import BEST, FINAL, LAST
from vitdet.engine.hooks import RECORD
from vitdet.engine.run import train
from vitdet.engine.selection import Selection
from vitdet.evaluation import CocoEvaluator
from vitdet.utils.checks import InputError

OPTIONS = {"checkpoint_every": 8, "eval_every": 4, "keep_checkpoints": 1}


def record(folder: Path) -> dict[int, dict[str, float]]:
    listed = json.loads((folder / RECORD).read_text())
    return {each["images_seen"]: each["values"] for each in listed}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    train(recipe(folder, **OPTIONS, best_metric="bbox/AP50"))
    return folder


# --- the best ----------------------------------------------------------------------------------


def test_the_best_weights_are_kept_and_said(undisturbed):
    values = {images: each["bbox/AP50"] for images, each in record(undisturbed).items()}
    assert list(values) == [4, 8, 12, 16, 20, 24]
    best = max(values, key=lambda images: values[images])
    content = checkpoint.read(undisturbed / BEST)
    assert content["images_seen"] == best
    assert {"model", "optimizer", "seed", "vitdet"} <= content.keys()
    log = (undisturbed / "log.txt").read_text()
    said = f"best bbox/AP50 so far: {values[best]:.4f} after {best} images"
    assert said in log
    assert "best bbox/AP50 so far" not in log.split(said)[1]
    assert "(before: none)" in log
    # the one of the best step may be gone by now, the best itself is not
    assert [path.name for path in undisturbed.glob("model_0*")] == ["model_000000020.pth"]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_a_resumed_run_does_not_forget_the_best(undisturbed, tmp_path, monkeypatch, steps):
    cfg = recipe(tmp_path, **OPTIONS, best_metric="bbox/AP50")
    stop_after(monkeypatch, steps)
    with pytest.raises(KeyboardInterrupt):
        train(cfg)
    train(recipe(tmp_path, **OPTIONS, best_metric="bbox/AP50"), resume=True)
    assert record(tmp_path) == record(undisturbed)
    for name in (BEST, FINAL):
        ours, theirs = checkpoint.read(tmp_path / name), checkpoint.read(undisturbed / name)
        for key in ("model", "optimizer", "images_seen", "evaluations"):
            assert_same(ours.get(key), theirs.get(key), f"{name} {key}")


def test_the_best_metric_of_a_resumed_run_may_be_new(undisturbed, tmp_path, monkeypatch):
    """Results are recorded anyway, so nothing worse takes the place of what came before."""
    stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(tmp_path, **OPTIONS))
    assert not (tmp_path / BEST).exists()
    train(recipe(tmp_path, **OPTIONS, best_metric="bbox/AP"), resume=True)
    assert not (tmp_path / BEST).exists()  # 6.0 each time: the first was the best


def test_an_evaluation_cut_off_is_done_again(undisturbed, tmp_path, monkeypatch):
    """The checkpoint of its step was already written."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(inference.TestSet, "evaluate", interrupted)
        cfg = recipe(tmp_path, **OPTIONS | {"eval_every": 8}, best_metric="bbox/AP50")
        with pytest.raises(KeyboardInterrupt):
            train(cfg)
    assert (tmp_path / LAST).read_text() == "model_000000008.pth\n"
    train(recipe(tmp_path, **OPTIONS | {"eval_every": 8}, best_metric="bbox/AP50"), resume=True)
    assert list(record(tmp_path)) == [8, 16, 24]
    lines = [line["images_seen"] for line in numbers(tmp_path) if "bbox/AP50" in line]
    assert lines == [8, 16, 24]


def test_a_damaged_record_is_said_and_that_of_the_checkpoint_used(tmp_path, monkeypatch):
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(tmp_path, **OPTIONS))
    whole = record(tmp_path)
    (tmp_path / RECORD).write_text("[1]")
    train(recipe(tmp_path, **OPTIONS, num_images=12), resume=True)
    assert record(tmp_path) == whole  # 4 from the checkpoint at 8; 8 and 12 done again
    assert "evaluations.json cannot be read (" in (tmp_path / "log.txt").read_text()


# --- early stopping ----------------------------------------------------------------------------

STOPPING = {"metric": "bbox/AP", "patience": 2}  # 6.0 each time


def test_a_run_without_improvement_ends_early_and_normally(tmp_path, monkeypatch):
    results = train(recipe(tmp_path / "whole", **OPTIONS, early_stopping=STOPPING))
    assert results["bbox"]["AP"] == 6.0
    content = checkpoint.read(tmp_path / "whole" / FINAL)
    assert content["images_seen"] == 12
    assert list(record(tmp_path / "whole")) == [4, 8, 12]
    assert "results.json" in {path.name for path in (tmp_path / "whole").iterdir()}
    assert (
        "early stopping: 2 evaluations without bbox/AP more than 0 above 6.0000 (after 4 images)"
    ) in (tmp_path / "whole" / "log.txt").read_text()

    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(tmp_path / "parts", **OPTIONS, early_stopping=STOPPING))
    for _ in range(2):  # stopped it is, also when resumed once more
        train(recipe(tmp_path / "parts", **OPTIONS, early_stopping=STOPPING), resume=True)
        ours = checkpoint.read(tmp_path / "parts" / FINAL)
        for key in ("model", "optimizer", "images_seen"):
            assert_same(ours[key], content[key], key)
        assert record(tmp_path / "parts") == record(tmp_path / "whole")
    patient = recipe(tmp_path / "parts", **OPTIONS, early_stopping=STOPPING | {"patience": 3})
    train(patient, resume=True)
    assert checkpoint.read(tmp_path / "parts" / FINAL)["images_seen"] == 16


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "stops_after"),
    [
        ([1, 2, 3, 4, 5], 1, 0, None),
        ([1, 1], 1, 0, 2),
        ([3, 2, 2.9, 3.1, 3, 3.1], 2, 0, 3),
        ([3, 2, 3.1, 3, 3.1, 9], 2, 0, 5),
        ([1, 1.4, 1.8, 2.2], 2, 0.5, None),  # 1.8 is 0.8 above the best that counted
        ([1, 1.4, 1.5, 2.2], 2, 0.5, 3),
        ([None, None], 2, 0, 2),
    ],
)
def test_when_to_stop(values, patience, min_delta, stops_after):
    stopping = {"metric": "segm/AP", "patience": patience, "min_delta": min_delta}
    selection = Selection(early_stopping=stopping, eval_every=1)
    results: dict[int, dict[str, float]] = {}
    stopped = None
    for number, value in enumerate(values, start=1):
        results[number] = {} if value is None else {"segm/AP": float(value)}
        if stopped is None and selection.stop(results):
            stopped = number
    assert stopped == stops_after


def test_what_is_not_a_number_is_never_the_best():
    selection = Selection("bbox/APs")
    assert not selection.is_best({4: {}}, 4)
    assert selection.is_best({4: {}, 8: {"bbox/APs": 0.0}}, 8)
    assert not selection.is_best({4: {"bbox/APs": 0.0}, 8: {"bbox/APs": 0.0}}, 8)


# --- wrong values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"best_metric": "AP"},
            r"train\.best_metric: expected TASK/METRIC .*got AP\. Did you mean",
        ),
        (
            {"best_metric": "ema/bbox/AP"},
            r"as train\.ema_decay is not set, got ema/bbox/AP\. Use bbox/AP, or set",
        ),
        (
            {"early_stopping": {"metric": "bbox/AP", "patiense": 2}, "eval_every": 4},
            r"got patience missing, patiense unknown\. Did you mean patience\?",
        ),
        (
            {"early_stopping": STOPPING | {"patience": 0}, "eval_every": 4},
            r"train\.early_stopping\.patience: expected .* at least 1, got 0",
        ),
        (
            {"early_stopping": STOPPING | {"min_delta": math.nan}, "eval_every": 4},
            r"min_delta: expected 0 or a positive number, got nan",
        ),
        (
            {"early_stopping": STOPPING},
            r"expected evaluations during the training, got train\.eval_every=0",
        ),
    ],
)
def test_what_is_wrong_before_the_start_is_said_there(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(recipe(tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("masks", [False, True])
def test_the_evaluator_knows_its_names_before_it_has_results(tmp_path, masks):
    dataset = shapes_dataset(tmp_path, "val", num_images=2, size=64)
    evaluator = CocoEvaluator(dataset)
    fields = {"pred_boxes": Boxes(torch.tensor([[1.0, 1, 30, 30]])), "scores": torch.ones(1)}
    fields["pred_classes"] = torch.zeros(1, dtype=torch.long)
    if masks:
        fields["pred_masks"] = torch.ones(1, 64, 64, dtype=torch.bool)
    outputs = [{"instances": Instances((64, 64), **fields)}] * 2
    evaluator.process([{"image_id": record["image_id"]} for record in dataset.records], outputs)
    results = evaluator.evaluate()
    found = [f"{task}/{key}" for task, each in results.items() for key in each]
    found = [name for name in found if not name.endswith("/per_class")]
    assert evaluator.metric_names[: len(found)] == found
    assert len(evaluator.metric_names) == len(found) * (1 if masks else 2)
    selection = Selection("segm/APm", STOPPING, eval_every=1)
    selection.check_evaluator(evaluator)
    selection.check_evaluator(object())  # says nothing
    with pytest.raises(
        InputError, match=r"train\.best_metric: .*got bbox/APx\. Did you mean bbox/"
    ):
        Selection("bbox/APx").check_evaluator(evaluator)
    Selection("ema/segm/AP", average=True).check_evaluator(evaluator)


def test_an_unknown_metric_is_named_by_the_first_evaluation(tmp_path):
    with pytest.raises(
        InputError,
        match=r"train\.early_stopping\.metric: expected a metric of the evaluation \(bbox/AP, "
        r"bbox/AP50, bbox/APs\), got bbox/AP5O\. Did you mean bbox/AP50\?",
    ):
        train(recipe(tmp_path, **OPTIONS, early_stopping=STOPPING | {"metric": "bbox/AP5O"}))
    with pytest.raises(InputError, match=r"train\.best_metric: .*got segm/AP\. Did you mean bbox/"):
        train(recipe(tmp_path, **OPTIONS, best_metric="segm/AP"), resume=True)
    train(recipe(tmp_path, **OPTIONS, best_metric="bbox/APs"), resume=True)  # nan, but known
    assert not (tmp_path / BEST).exists()
