from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest

from vitdet.data import shapes
from vitdet.data.shapes import CLASSES, draw_image, shapes_dataset
from vitdet.utils.checks import InputError


def _mask(annotation, size):
    segmentation = annotation["segmentation"]
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, size, size))
    return mask_util.decode(segmentation).astype(bool)


@cache
def _drawn(count, size=128):
    return [draw_image("train", index, size=size) for index in range(count)]


def test_what_is_drawn_stays_the_same():
    """The published numbers of the demo are of these images."""
    image, annotations = draw_image("train", 3, size=64)
    assert image.mean(axis=(0, 1)) == pytest.approx([130.72, 143.75, 84.31], abs=0.1)
    boxes = [
        (1, 21, 15, 31, 31),
        (5, 12, 5, 22, 22),
        (1, 37, 24, 5, 6),
        (1, 26, 43, 5, 6),
        (5, 34, 7, 9, 9),
        (6, 35, 3, 5, 4),
    ]
    assert [each["category_id"] for each in annotations] == [label for label, *_ in boxes]
    for each, (_, *box) in zip(annotations, boxes, strict=True):
        assert each["bbox"] == pytest.approx(box, abs=1)


def test_a_data_set_depends_on_seed_split_and_index_alone(tmp_path):
    small = shapes_dataset(tmp_path / "one", "val", num_images=2, size=64)
    stamp = small.json_file.stat().st_mtime_ns
    large = shapes_dataset(tmp_path / "two", "val", num_images=4, size=64)
    again = shapes_dataset(tmp_path / "one", "val", num_images=2, size=64)
    assert again.json_file.stat().st_mtime_ns == stamp  # taken as it is
    assert [path.name for path in (tmp_path / "one").iterdir()] == [small.json_file.parent.name]
    assert large.class_names == CLASSES
    assert [len(each.records) for each in (small, large)] == [2, 4]
    for first, second in zip(small.records, large.records, strict=False):
        files = [Path(each["file_name"]).read_bytes() for each in (first, second)]
        assert files[0] == files[1]
        assert first["annotations"] == second["annotations"]
    for index, record in enumerate(large.records):
        pixels, annotations = draw_image("val", index, size=64)
        stored = cv2.imread(record["file_name"])
        assert stored is not None
        assert np.abs(stored[:, :, ::-1].astype(float) - pixels).mean() < 12  # JPEG
        assert len(record["annotations"]) == len(annotations)
    content = json.loads(large.json_file.read_text())
    assert sorted(content) == ["annotations", "categories", "images", "info"]
    ids = [each["id"] for each in content["annotations"]]
    assert ids == list(range(1, len(ids) + 1))
    reference, _ = draw_image("val", 1, size=64)
    others = {"index": ("val", 2, 0), "split": ("train", 1, 0), "seed": ("val", 1, 1)}
    for split, index, seed in others.values():
        assert (draw_image(split, index, size=64, seed=seed)[0] != reference).mean() > 0.5


def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes.cv2, "imencode", stop)
    with pytest.raises(KeyboardInterrupt):
        shapes_dataset(tmp_path, "train", num_images=2, size=64)
    assert list(tmp_path.iterdir()) == []


def test_another_process_may_be_faster(tmp_path, monkeypatch):
    rename = Path.rename

    def late(self, target):
        monkeypatch.setattr(Path, "rename", rename)
        shapes_dataset(tmp_path, "train", num_images=2, size=64)  # the other one, just before
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert len(shapes_dataset(tmp_path, "train", num_images=2, size=64).records) == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_wrong_arguments(tmp_path):
    for key, value in (("split", "trian"), ("num_images", 0), ("size", 16)):
        arguments = {"split": "train", "num_images": 1, "size": 64, key: value}
        with pytest.raises(InputError, match=f"expected split of train.*{key}={value!r}"):
            shapes_dataset(tmp_path, **arguments)


def test_annotations_lie_on_the_drawn_objects():
    # along the edge of a mask the image changes more than elsewhere in the background
    kernel, ratios = np.ones((3, 3), np.uint8), []
    for image, objects in _drawn(60):
        assert (image.shape, image.dtype) == ((128, 128, 3), np.uint8)
        masks = [_mask(annotation, 128) for annotation in objects]
        union = np.sum(masks, axis=0)
        gradient = cv2.morphologyEx(image, cv2.MORPH_GRADIENT, kernel).sum(axis=2)
        background = cv2.dilate((union > 0).astype(np.uint8), kernel, iterations=2) == 0
        for annotation, mask in zip(objects, masks, strict=True):
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert [x, y] == [columns.min(), rows.min()]
            assert [x + width, y + height] == [columns.max() + 1, rows.max() + 1]
            assert annotation["area"] == mask.sum() >= 10
            if not annotation["iscrowd"]:
                edge = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, kernel) > 0
                ratios.append(gradient[edge].mean() / gradient[background].mean())
        # masks are the visible parts: none lies over another, but for pixels of polygon edges
        assert (union > 1).sum() <= 0.02 * (union > 0).sum() + 4
    assert np.mean(np.array(ratios) > 1) > 0.98
    assert np.median(ratios) > 3


def test_it_holds_what_it_promises():
    drawn = _drawn(200)
    objects = [a for _, annotations in drawn for a in annotations if not a["iscrowd"]]
    crowds = [a for _, annotations in drawn for a in annotations if a["iscrowd"]]
    sides = np.array([max(a["bbox"][2:]) for a in objects])
    assert sides.min() <= 9
    assert sides.max() >= 70
    assert (sides < 16).mean() > 0.15
    assert (sides > 32).mean() > 0.2
    assert {type(a["segmentation"]) for a in objects} == {list, dict}
    assert 0.05 < len(crowds) / len(drawn) < 0.25
    assert all(isinstance(a["segmentation"], dict) for a in crowds)
    counts = Counter(len([a for a in ann if not a["iscrowd"]]) for _, ann in drawn)
    assert set(range(1, 8)) <= set(counts) <= set(range(9))
    labels = Counter(a["category_id"] for a in objects)
    assert set(labels) == set(range(1, len(CLASSES) + 1))
    assert min(labels.values()) > 0.5 * max(labels.values())
    assert np.mean([isinstance(a["segmentation"], dict) for a in objects]) > 0.3  # occluded
    rings = [a for a in objects if CLASSES[a["category_id"] - 1] == "ring"]
    centres = [np.add(a["bbox"][:2], np.divide(a["bbox"][2:], 2)).astype(int) for a in rings]
    holes = [not _mask(a, 128)[y, x] for a, (x, y) in zip(rings, centres, strict=True)]
    assert sum(holes) > 40
