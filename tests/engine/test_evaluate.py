"""Evaluations: any evaluator and model, the best weights, the end of a run that gets no better."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from test_run import assert_same, numbers, stop_after
from tiny_recipe import recipe
from torch import nn

from vitdet import checkpoint
from vitdet.config import complete
from vitdet.data.shapes import shapes_dataset
from vitdet.engine import evaluate as module
from vitdet.engine.checkpoints import BEST, FINAL
from vitdet.engine.evaluate import (
    Evaluations,
    ap_table,
    build_dataset,
    check_metric,
    flatten,
    run_evaluator,
)
from vitdet.engine.run import evaluate, train
from vitdet.evaluation import CocoEvaluator
from vitdet.utils.checks import InputError

OPTIONS = {"checkpoint_every": 8, "eval_every": 4, "keep_checkpoints": 1}
STOPPING = {"best_metric": "bbox/AP", "patience": 2}  # 6.0 each time


class Detector(nn.Module):
    """Says the same of every image: `outputs` of its own."""

    def __init__(self, **outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.outputs = outputs

    def forward(self, batch):
        return [self.outputs for _ in batch]


class Evaluator:
    """Any results."""

    def __init__(self, results):
        self.results, self.seen = results, []

    def reset(self):
        self.seen.clear()

    def process(self, inputs, outputs):
        self.seen += outputs

    def evaluate(self):
        return self.results


def run(results, detector=None):
    evaluator = Evaluator(results)
    batches = [[{"image": torch.zeros(3, 8, 8)}]]
    return run_evaluator(detector or Detector(), batches, evaluator, "fp32"), evaluator.seen


def test_results_of_any_evaluator(caplog):
    named = {"PQ": 1.5, "per_class": {"a": np.float64(2)}, "matrix": np.zeros((2, 2))}
    for given, expected in (
        (None, {}),
        ({"PQ": torch.tensor(2.0), "n": 3}, {"results": {"PQ": 2.0, "n": 3.0}}),
        ({"panoptic_seg": named}, {"panoptic_seg": {"PQ": 1.5, "per_class": {"a": 2.0}}}),
    ):
        found, _ = run(given)
        assert json.loads(json.dumps(found)) == expected
    assert "result matrix is no number: left out" in caplog.messages
    mixed = {"bbox": {"AP": 12.345, "APs": math.nan, "AR1": 3.0, "per_class": {"a": 1.0}}}
    mixed |= {"panoptic_seg": {"PQ": 40.0}}
    assert [line.split() for line in ap_table(mixed).splitlines()] == [
        ["AP", "APs", "PQ"],
        ["bbox", "12.35", "nan"],
        ["panoptic_seg", "40.00"],
    ]
    assert flatten(mixed) == {"bbox/AP": 12.345, "bbox/AR1": 3.0, "panoptic_seg/PQ": 40.0}


def test_outputs_of_other_models_arrive_in_float32():
    half = torch.ones(2, 3, dtype=torch.bfloat16)
    found = Instances((8, 8), pred_boxes=Boxes(torch.ones(1, 4)), scores=half[0, :1])
    detector = Detector(
        instances=found, sem_seg=half, panoptic_seg=(torch.tensor([1]), [{"id": 1}])
    )
    _, (output,) = run({}, detector)
    assert output["sem_seg"].dtype == output["instances"].scores.dtype == torch.float32
    assert output["panoptic_seg"] == (torch.tensor([1]), [{"id": 1}])


class Flat(Evaluator):
    def __init__(self, dataset):
        super().__init__({"accuracy": 0.5})


def no_records():
    """A data set of one's own: the loaders of the test draw their images themselves."""
    return SimpleNamespace(name="own", class_names=("dark", "light"), num_images=6)


def test_a_run_with_an_evaluator_and_data_of_another_kind(tmp_path, monkeypatch):
    """And it evaluates in float32, whatever it trains in."""
    text = r"data set: a list has no name and class_names\. Use .*coco_dataset\(json, images\)"
    with pytest.raises(InputError, match=text):
        build_dataset(L(list)())
    used = []
    monkeypatch.setattr(module, "infer", lambda *given: used.append(given[-1]) or [])
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


# --- the best weights, and an early end ----------------------------------------------------------


def evaluated(folder):
    lines = [line for line in numbers(folder) if "bbox/AP" in line]
    return {line["images_seen"]: line["bbox/AP50"] for line in lines}


def test_the_best_weights_are_kept_and_said(tmp_path):
    train(recipe(tmp_path, **OPTIONS, best_metric="bbox/AP50"))
    values = evaluated(tmp_path)
    assert list(values) == [4, 8, 12, 16, 20, 24]
    best = max(values, key=lambda images: values[images])
    content = checkpoint.read(tmp_path / BEST)
    assert content["images_seen"] == best
    assert {"model", "optimizer", "seed", "vitdet"} <= content.keys()
    for name in (BEST, FINAL):  # with what their evaluation found
        kept = checkpoint.read(tmp_path / name)["vitdet"]["thresholds"]
        assert kept == {"model": {"over_all": 0.06, "by_class": {}}}
    log = (tmp_path / "log.txt").read_text()
    said = f"best bbox/AP50 so far: {values[best]:.2f} after {best} images: {BEST}"
    assert said in log
    assert "best bbox/AP50 so far" not in log.split(said)[1]
    # the one of the best step may be gone by now, the best itself is not
    assert [path.name for path in tmp_path.glob("model_0*")] == ["model_000000020.pth"]


def test_a_resumed_run_knows_the_best_of_before(tmp_path):
    """Also when it ended between evaluation and link, and when the metric is new."""
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, options in ((a, {}), (b, {"eval_every": 4})):  # 6.0 each time: the first is best
        train(recipe(folder, num_images=8, best_metric=None, **options))
        assert not (folder / BEST).exists()
        train(recipe(folder, num_images=12), resume=True)
    assert checkpoint.read(a / BEST)["images_seen"] == 8
    assert (list(evaluated(a)), list(evaluated(b))) == ([8, 12], [4, 8, 12])
    assert not (b / BEST).exists()


@pytest.mark.slow
def test_a_run_without_improvement_ends_early_and_normally(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    results = train(recipe(whole, **OPTIONS, **STOPPING))
    assert results["bbox"]["AP"] == 6.0
    content = checkpoint.read(whole / FINAL)
    assert content["images_seen"] == 12
    assert list(evaluated(whole)) == [4, 8, 12]
    assert ("early end: 2 evaluations without bbox/AP above 6.00 (after 4 images)") in (
        whole / "log.txt"
    ).read_text()
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(parts, **OPTIONS, **STOPPING))
    for _ in range(2):  # stopped it is, also when resumed once more
        train(recipe(parts, **OPTIONS, **STOPPING), resume=True)
        ours = checkpoint.read(parts / FINAL)
        for key in ("model", "optimizer", "images_seen"):
            assert_same(ours[key], content[key], key)
    train(recipe(parts, **OPTIONS, **STOPPING | {"patience": 3}), resume=True)
    assert checkpoint.read(parts / FINAL)["images_seen"] == 16


@pytest.mark.parametrize(
    ("values", "patience", "stops_after"),
    [
        ([1, 2, 3, 4, 5], 1, None),
        ([1, 1], 1, 2),
        ([3, 2, 3.1, 3, 3.1, 9], 2, 5),
        ([None, None], 2, 2),
    ],
)
def test_when_to_stop(values, patience, stops_after, caplog):
    options = complete(OmegaConf.create({"patience": patience}))
    found = Evaluations(options, 4, None, dict)
    stopped = None
    for number, value in enumerate(values, start=1):
        found.values[number] = {} if value is None else {"segm/AP": float(value)}
        if stopped is None and found._stop():
            stopped = number
    assert stopped == stops_after
    assert ("none had a number" in caplog.text) == (values == [None, None])


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
    found = [name for name in found if not name.endswith(("/per_class", "/thresholds"))]
    assert evaluator.metric_names[: len(found)] == found
    assert len(evaluator.metric_names) == len(found) * (1 if masks else 2)

    def check(evaluator, **options):
        check_metric(complete(OmegaConf.create(options)), evaluator)

    check(evaluator, best_metric="segm/APm")
    check(evaluator)
    check(object(), best_metric="anything")  # says nothing
    check(evaluator, best_metric="ema/segm/AP", ema_decay=0.5)
    for name in ("bbox/APx", "AP", "ema/bbox/AP"):
        text = rf"train\.best_metric: .*got {name}\. Did you mean bbox/"
        with pytest.raises(InputError, match=text):
            check(evaluator, best_metric=name)


def test_a_metric_without_a_number_is_said(tmp_path):
    train(recipe(tmp_path, num_images=4, best_metric="bbox/APs"))  # nan
    text = "train.best_metric=bbox/APs: the evaluation after 4 images gives no number for it"
    assert text in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / BEST).exists()
