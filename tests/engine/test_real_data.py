"""The engine with the project's own loader, mapper and evaluator, on drawn shapes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from detectron2.config import LazyCall as L
from test_run import assert_same, stop_after
from tiny_recipe import SIZE, recipe

from vitdet import checkpoint
from vitdet.data.augment import large_scale_jitter, resize_shortest_edge
from vitdet.data.loaders import build_test_loader, build_train_loader
from vitdet.data.mapper import Mapper
from vitdet.data.shapes import shapes_dataset
from vitdet.engine.run import evaluate, train
from vitdet.evaluation import CocoEvaluator

pytestmark = pytest.mark.slow


def shapes_recipe(folder: Path, output_dir: Path, *, workers: int, **options):
    cfg = recipe(output_dir, checkpoint_every=8, **options)
    train_set = L(shapes_dataset)(root=str(folder), split="train", num_images=6, size=SIZE)
    test_set = L(shapes_dataset)(root=str(folder), split="val", num_images=3, size=SIZE)
    cfg.dataloader = {
        "train": L(build_train_loader)(
            dataset=train_set,
            mapper=L(Mapper)(augmentations=L(large_scale_jitter)(size=SIZE), is_train=True),
            total_batch_size=4,
            num_workers=workers,
            seed="${train.seed}",
        ),
        "test": L(build_test_loader)(
            dataset=test_set,
            mapper=L(Mapper)(
                augmentations=L(resize_shortest_edge)(size=SIZE, max_size=SIZE), is_train=False
            ),
            num_workers=workers,
        ),
        "evaluator": L(CocoEvaluator)(dataset="${..test.dataset}"),
    }
    return cfg


def test_stopped_and_resumed_with_other_workers_ends_with_the_same_bits(tmp_path, monkeypatch):
    data = tmp_path / "data"
    results = train(shapes_recipe(data, tmp_path / "whole", workers=0))
    assert set(results) == {"bbox", "segm"}
    assert 0 <= results["segm"]["AP"] <= 100
    assert math.isfinite(results["bbox"]["AP"])

    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        train(shapes_recipe(data, tmp_path / "parts", workers=2))
    resumed = train(shapes_recipe(data, tmp_path / "parts", workers=1), resume=True)
    assert resumed["bbox"]["AP"] == results["bbox"]["AP"]
    whole, parts = (
        checkpoint.read(tmp_path / name / "model_final.pth") for name in ("whole", "parts")
    )
    for key in ("model", "optimizer", "images_seen"):
        assert_same(parts[key], whole[key], key)

    weights = str(tmp_path / "whole" / "model_final.pth")
    cfg = shapes_recipe(data, tmp_path / "again", workers=0, init_checkpoint=weights)
    assert evaluate(cfg)["segm"]["AP"] == results["segm"]["AP"]


def test_training_in_bfloat16_ends_with_a_table(tmp_path, capsys):
    cfg = shapes_recipe(
        tmp_path / "data", tmp_path / "out", workers=0, precision="bf16", num_images=8
    )
    results = train(cfg)
    assert set(results) == {"bbox", "segm"}
    table = capsys.readouterr().out
    assert "bbox" in table
    assert "segm" in table
