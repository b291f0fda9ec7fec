"""What an evaluation says while it runs, and what it makes of any evaluator and model."""

from __future__ import annotations

import json
import logging
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.structures import Boxes, Instances
from tiny_recipe import recipe
from torch import nn

from vitdet.engine import evaluate as module
from vitdet.engine.evaluate import ap_table, build_dataset, flatten, run_evaluator
from vitdet.engine.run import evaluate, train
from vitdet.utils.checks import InputError


def test_a_long_evaluation_says_how_far_it_is(monkeypatch, caplog):
    times = iter([0.0, 5.0, 25.0, 30.0, 50.0, *range(60, 95, 7), 0.0, 1.0, 2.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(times)))
    batches = [[{"image_id": number}] for number in range(4)]
    with caplog.at_level(logging.INFO, "vitdet"):
        assert list(module._logged(batches)) == batches
        assert list(module._logged(iter(batches))) == batches  # of unknown length
        assert list(module._logged([[], []])) == [[], []]  # a short one says nothing
    assert [record.getMessage() for record in caplog.records] == [
        "evaluated 2/4 batches  eta 0:00:25",
        "evaluated 4/4 batches  eta 0:00:00",
        "evaluated 3 batches",
    ]


class Detector(nn.Module):
    """Says the same of every image: `outputs` of its own."""

    def __init__(self, **outputs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.outputs = outputs

    def forward(self, batch: list) -> list:
        return [self.outputs for _ in batch]


class Evaluator:
    """Any results."""

    def __init__(self, results: Any) -> None:
        self.results, self.seen = results, []

    def reset(self) -> None:
        self.seen.clear()

    def process(self, inputs: list, outputs: list) -> None:
        self.seen += outputs

    def evaluate(self) -> Any:
        return self.results


def run(results: Any, detector: Detector | None = None) -> tuple[Any, list]:
    evaluator = Evaluator(results)
    batches = [[{"image": torch.zeros(3, 8, 8)}]]
    return run_evaluator(detector or Detector(), batches, evaluator, "fp32"), evaluator.seen


@pytest.mark.parametrize(
    ("given", "expected", "left_out"),
    [
        (None, {}, ""),
        ({"accuracy": 0.5}, {"results": {"accuracy": 0.5}}, ""),
        ({"PQ": torch.tensor(2.0), "n": 3}, {"results": {"PQ": 2.0, "n": 3.0}}, ""),
        (
            {"panoptic_seg": {"PQ": 1.5, "per_class": {"a": np.float64(2)}}},
            {"panoptic_seg": {"PQ": 1.5, "per_class": {"a": 2.0}}},
            "",
        ),
        (
            {"sem_seg": {"mIoU": np.float32(1), "matrix": np.zeros((2, 2))}, "file": "x.json"},
            {"sem_seg": {"mIoU": 1.0}, "results": {}},
            "results that are no numbers are left out: sem_seg/matrix, file/file",
        ),
    ],
)
def test_results_of_any_evaluator(given, expected, left_out, caplog):
    found, _ = run(given)
    assert found == expected
    assert [record.getMessage() for record in caplog.records] == [left_out] * bool(left_out)
    json.dumps(found)


def test_outputs_of_other_models_arrive_in_float32():
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    found = Instances((8, 8), pred_boxes=Boxes(torch.ones(1, 4)), scores=half[0, :1])
    detector = Detector(
        instances=found, sem_seg=half, panoptic_seg=(torch.tensor([1]), [{"id": 1}])
    )
    _, (output,) = run({}, detector)
    assert output["sem_seg"].dtype == output["instances"].scores.dtype == torch.float32
    assert output["panoptic_seg"] == (torch.tensor([1]), [{"id": 1}])
    assert detector.outputs["sem_seg"] is half


def test_the_table_has_the_numbers_of_every_task():
    aps = {"AP": 12.345, "APs": math.nan, "AR1": 3.0, "per_class": {"a": 1.0}}
    mixed = {"bbox": aps, "panoptic_seg": {"PQ": 40.0, "a_long_name": 1.0}}
    assert ap_table(mixed).splitlines() == [
        "                   AP     APs      PQ a_long_name",
        "         bbox   12.35     nan",
        " panoptic_seg                   40.00        1.00",
    ]
    assert ap_table({"bbox": aps}).splitlines()[1] == "    bbox   12.35     nan"
    assert ap_table({}) == "(no results)"
    names = {"bbox/AP": 12.345, "bbox/AR1": 3.0, "panoptic_seg/PQ": 40.0}
    assert flatten(mixed) == {**names, "panoptic_seg/a_long_name": 1.0}


class Flat(Evaluator):
    def __init__(self, dataset: Any) -> None:
        super().__init__({"accuracy": 0.5})


def no_records() -> Any:
    """A data set of one's own: the loaders of the test draw their images themselves."""
    return SimpleNamespace(name="own", class_names=("dark", "light"), num_images=6)


def test_a_run_with_an_evaluator_and_data_of_another_kind(tmp_path, monkeypatch):
    """And it evaluates in float32, whatever it trains in."""
    text = r"data set: a list has no name and no class_names\. Use .*coco_dataset\(json, images\)"
    with pytest.raises(InputError, match=text):
        build_dataset(L(list)())
    used = []

    def seen(detector: nn.Module, batch: list, dtype: torch.dtype | None) -> list:
        used.append(dtype)
        return []

    monkeypatch.setattr(module, "infer", seen)
    best = {"eval_every": 4, "best_metric": "results/accuracy"}
    cfg = recipe(tmp_path, num_images=8, precision="bf16", **best)
    cfg.dataloader.evaluator = L(Flat)(dataset="${..test.dataset}")
    for part in ("train", "test"):
        cfg.dataloader[part].dataset = L(no_records)()
    assert train(cfg) == {"results": {"accuracy": 0.5}}
    stored = json.loads((tmp_path / "results.json").read_text())["results"]
    assert stored == {"results": {"accuracy": 0.5}}
    assert (tmp_path / "model_best.pth").exists()
    assert set(used) == {None}
    cfg.train.eval_precision = "bf16"
    used.clear()
    assert evaluate(cfg, resume=True) == {"results": {"accuracy": 0.5}}
    assert set(used) == {torch.bfloat16}
