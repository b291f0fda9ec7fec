"""The best weights are kept, a run without improvement ends, and wrong metrics are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from test_run import assert_same, numbers, stop_after
from tiny_recipe import recipe

from vitdet import checkpoint
from vitdet.data.shapes import shapes_dataset
from vitdet.engine.best import Evaluations
from vitdet.engine.checkpoints import BEST, FINAL
from vitdet.engine.run import train
from vitdet.evaluation import CocoEvaluator
from vitdet.settings import complete
from vitdet.utils.checks import InputError

OPTIONS = {"checkpoint_every": 8, "eval_every": 4, "keep_checkpoints": 1}
STOPPING = {"metric": "bbox/AP", "patience": 2}  # 6.0 each time


def evaluated(folder: Path) -> dict[int, float]:
    lines = [line for line in numbers(folder) if "bbox/AP" in line]
    return {line["images_seen"]: line["bbox/AP50"] for line in lines}


def evaluations(**train) -> Evaluations:
    return Evaluations(complete(OmegaConf.create(train)), 4)


def test_the_best_weights_are_kept_and_said(tmp_path):
    train(recipe(tmp_path, **OPTIONS, best_metric="bbox/AP50"))
    values = evaluated(tmp_path)
    assert list(values) == [4, 8, 12, 16, 20, 24]
    best = max(values, key=lambda images: values[images])
    content = checkpoint.read(tmp_path / BEST)
    assert content["images_seen"] == best
    assert {"model", "optimizer", "seed", "vitdet"} <= content.keys()
    log = (tmp_path / "log.txt").read_text()
    said = f"best bbox/AP50 so far: {values[best]:.4f} after {best} images"
    assert said in log
    assert "best bbox/AP50 so far" not in log.split(said)[1]
    assert "(before: none)" in log
    # the one of the best step may be gone by now, the best itself is not
    assert [path.name for path in tmp_path.glob("model_0*")] == ["model_000000020.pth"]


def test_the_best_metric_of_a_resumed_run_may_be_new(tmp_path, monkeypatch):
    """Results are recorded anyway, so nothing worse takes the place of what came before."""
    stop_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(tmp_path, **OPTIONS))
    train(recipe(tmp_path, **OPTIONS, best_metric="bbox/AP"), resume=True)
    assert not (tmp_path / BEST).exists()  # 6.0 each time: the first was the best


def test_an_end_between_evaluation_and_link_loses_no_best(tmp_path):
    """The line of the evaluation is there, at the step of the last checkpoint."""
    train(recipe(tmp_path, num_images=8))
    train(recipe(tmp_path, num_images=12, best_metric="bbox/AP"), resume=True)
    assert checkpoint.read(tmp_path / BEST)["images_seen"] == 8
    assert list(evaluated(tmp_path)) == [8, 12]


def test_a_run_without_improvement_ends_early_and_normally(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    results = train(recipe(whole, **OPTIONS, early_stopping=STOPPING))
    assert results["bbox"]["AP"] == 6.0
    content = checkpoint.read(whole / FINAL)
    assert content["images_seen"] == 12
    assert list(evaluated(whole)) == [4, 8, 12]
    assert (
        "early stopping: 2 evaluations without bbox/AP more than 0 above 6.0000 (after 4 images)"
    ) in (whole / "log.txt").read_text()
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(parts, **OPTIONS, early_stopping=STOPPING))
    for _ in range(2):  # stopped it is, also when resumed once more
        train(recipe(parts, **OPTIONS, early_stopping=STOPPING), resume=True)
        ours = checkpoint.read(parts / FINAL)
        for key in ("model", "optimizer", "images_seen"):
            assert_same(ours[key], content[key], key)
    train(recipe(parts, **OPTIONS, early_stopping=STOPPING | {"patience": 3}), resume=True)
    assert checkpoint.read(parts / FINAL)["images_seen"] == 16


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
    found = evaluations(early_stopping=stopping)
    stopped = None
    for number, value in enumerate(values, start=1):
        found.values[number] = {} if value is None else {"segm/AP": float(value)}
        if stopped is None and found._stop():
            stopped = number
    assert stopped == stops_after


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"early_stopping": {"metric": "bbox/AP", "patiense": 2}},
            r"train\.early_stopping: Key 'patiense' not in 'EarlyStopping'",
        ),
        (
            {"early_stopping": {"metric": "bbox/AP"}},
            r"expected a value for train\.early_stopping\.patience",
        ),
        (
            {"early_stopping": STOPPING | {"patience": 0}, "eval_every": 4},
            r"train\.early_stopping\.patience: expected .* at least 1, got 0",
        ),
        (
            {"early_stopping": STOPPING | {"min_delta": float("nan")}},
            r"min_delta: expected 0 or a positive number, got nan",
        ),
        (
            {"early_stopping": STOPPING},
            r"train\.early_stopping: there is no evaluation, as train\.eval_every is 0",
        ),
    ],
)
def test_what_is_wrong_before_the_start_is_said_there(tmp_path, options, text):
    with pytest.raises(InputError, match=text):
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
    known = evaluations(best_metric="segm/APm", early_stopping=STOPPING)
    known.check_evaluator(evaluator)
    known.check_evaluator(object())  # says nothing
    evaluations(best_metric="ema/segm/AP", ema_decay=0.5).check_evaluator(evaluator)
    for name in ("bbox/APx", "AP", "ema/bbox/AP"):
        text = rf"train\.best_metric: .*got {name}\. Did you mean bbox/"
        with pytest.raises(InputError, match=text):
            evaluations(best_metric=name).check_evaluator(evaluator)


def test_an_unknown_metric_is_named_by_the_first_evaluation(tmp_path):
    with pytest.raises(
        InputError,
        match=r"train\.early_stopping\.metric: expected a metric of the evaluation \(bbox/AP, "
        r"bbox/AP50, bbox/APs\), got bbox/AP5O\. Did you mean bbox/AP50\?",
    ):
        train(recipe(tmp_path, **OPTIONS, early_stopping=STOPPING | {"metric": "bbox/AP5O"}))
    train(recipe(tmp_path, **OPTIONS, best_metric="bbox/APs"), resume=True)  # nan, but known
    assert not (tmp_path / BEST).exists()
