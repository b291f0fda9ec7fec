"""Pictures of a training: they show what they should, and change nothing."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, PolygonMasks
from PIL import Image
from tiny_recipe import draw, recipe

from vitdet import checkpoint
from vitdet.drawing import draw_instances
from vitdet.engine import looks as looks_module
from vitdet.engine.launch import launch
from vitdet.engine.run import train


def run(folder: Path, **settings) -> dict:
    """Train, and return the final weights and the random numbers that would come next."""
    train(recipe(folder, num_images=16, **settings))
    states = {
        "torch": torch.rand(3),
        "numpy": torch.from_numpy(np.random.rand(3)),
        "random": torch.tensor(random.random()),
    }
    return checkpoint.read(folder / "model_final.pth")["model"] | states


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "looks").iterdir())


def test_the_training_is_the_same_bit_by_bit(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    watched = run(tmp_path / "watched", looks_every=8)
    assert not (tmp_path / "plain" / "looks").exists()
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert names(tmp_path / "watched") == [
        "batch_000000004.jpg",  # the first one
        "batch_000000008.jpg",
        "batch_000000016.jpg",
        "predictions_000000008.jpg",
        "predictions_000000016.jpg",
    ]


def test_pictures_show_the_batch_and_the_predictions(tmp_path: Path, monkeypatch) -> None:
    drawn = []

    def remember(image, instances, class_names, threshold=0.5):
        drawn.append((image, instances, class_names, threshold))
        return draw_instances(image, instances, class_names, threshold, min_side=64)

    monkeypatch.setattr(looks_module, "draw_instances", remember)
    train(recipe(tmp_path, num_images=8, looks_every=6))
    # the first batch: positions 0 to 3, as the detector got them
    for position, (image, instances, class_names, _) in enumerate(drawn[:4]):
        expected = draw(position)
        assert np.array_equal(image, expected["image"].numpy().transpose(1, 2, 0))
        assert torch.equal(instances.gt_boxes.tensor, expected["instances"].gt_boxes.tensor)
        assert class_names == ("dark", "light")
    # due after 8 images: the second batch, and predictions on the six test images
    assert [
        torch.equal(a[1].gt_classes, draw(4 + i)["instances"].gt_classes)
        for i, a in enumerate(drawn[4:8])
    ] == [True] * 4
    assert len(drawn) == 4 + 4 + 6
    for index, (image, instances, _, threshold) in enumerate(drawn[8:]):
        expected = draw(10_000 + index)["image"].numpy().transpose(1, 2, 0)
        assert np.array_equal(image, expected)
        assert instances.has("scores")
        assert threshold == looks_module.THRESHOLD
    with Image.open(tmp_path / "looks" / "batch_000000004.jpg") as picture:
        sheet = np.asarray(picture)
    assert sheet.shape == (360 + 2 * 8, 4 * 360 + 5 * 8, 3)
    assert sheet.std() > 20


def test_no_pictures_at_a_resume_before_they_are_due(tmp_path: Path) -> None:
    train(recipe(tmp_path, num_images=8, looks_every=8))
    before = names(tmp_path)
    train(recipe(tmp_path, num_images=12, looks_every=8), resume=True)
    assert names(tmp_path) == sorted([*before, "predictions_000000012.jpg"])


def test_targets_are_drawn_from_bit_masks_and_polygons_alike() -> None:
    grey = np.full((64, 64, 3), 90, np.uint8)
    truth = draw(0)["instances"][:1]
    x0, y0, x1, y1 = truth.gt_boxes.tensor[0].tolist()
    plain = draw_instances(grey, truth, ["dark", "light"], min_side=64)
    middle = plain[int(y0 + y1) // 2, int(x0 + x1) // 2].astype(int)
    assert abs(middle - 90).max() > 20
    truth.gt_masks = PolygonMasks([[np.array([x0, y0, x1, y0, x1, y1, x0, y1])]])
    polygon = draw_instances(grey, truth, ["dark", "light"], min_side=64)
    assert abs(polygon.astype(int) - plain)[int(y0) + 3 : int(y1) - 3].mean() < 3
    truth.remove("gt_masks")
    assert not np.array_equal(draw_instances(grey, truth, ["dark", "light"], min_side=64), plain)


def test_holes_of_masks_stay_open() -> None:
    grey = np.full((64, 64, 3), 90, np.uint8)
    truth = draw(0)["instances"][:1]
    ring = torch.zeros(1, 64, 64, dtype=torch.bool)
    ring[0, 10:50, 10:50] = True
    ring[0, 24:36, 24:36] = False
    truth.gt_masks = BitMasks(ring)
    truth.gt_boxes.tensor[:] = torch.tensor([10.0, 10, 50, 50])
    drawn = draw_instances(grey, truth, ["dark", "light"], min_side=64).astype(int)
    assert abs(drawn[30, 30] - 90).max() < 3
    assert abs(drawn[17, 30] - 90).max() > 20
    assert abs(drawn[43, 30] - 90).max() > 20


def _train(folder: Path) -> None:
    train(recipe(folder, num_images=8, looks_every=4))


@pytest.mark.slow
def test_several_processes_and_one_of_them_draws(tmp_path: Path) -> None:
    launch(_train, 2, args=(tmp_path,))
    assert names(tmp_path)[0] == "batch_000000004.jpg"
    assert names(tmp_path)[-1] == "predictions_000000008.jpg"
    assert len(names(tmp_path)) == 4
    # the main process's share of a batch is two images
    with Image.open(tmp_path / "looks" / "batch_000000004.jpg") as sheet:
        assert sheet.width == 2 * 360 + 3 * 8
