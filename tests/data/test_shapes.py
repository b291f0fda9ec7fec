from __future__ import annotations

import json
from collections import Counter
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


def _drawn(count, size=128, split="train"):
    return [draw_image(split, index, size=size) for index in range(count)]


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_same_seed_same_bytes(tmp_path):
    for root in ("one", "two"):
        shapes_dataset(tmp_path / root, "train", num_images=4, size=64, seed=5)
    files = _files(tmp_path / "one")
    assert len(files) == 5
    assert files == _files(tmp_path / "two")


def test_an_image_depends_on_seed_split_and_index_alone(tmp_path):
    small = shapes_dataset(tmp_path, "val", num_images=2, size=64)
    large = shapes_dataset(tmp_path, "val", num_images=4, size=64)
    assert small.records[1]["annotations"] == large.records[1]["annotations"]
    reference, _ = draw_image("val", 1, size=64)
    for other in (
        draw_image("val", 2, size=64),
        draw_image("train", 1, size=64),
        draw_image("val", 1, size=64, seed=1),
    ):
        assert (other[0] != reference).mean() > 0.5


def test_the_ordinary_loader_reads_it(tmp_path):
    dataset = shapes_dataset(tmp_path, "train", num_images=20, size=64)
    assert dataset.class_names == CLASSES
    assert len(dataset.records) == 20
    for index, record in enumerate(dataset.records):
        pixels, annotations = draw_image("train", index, size=64)
        stored = cv2.imread(record["file_name"])[:, :, ::-1].astype(float)
        assert stored.shape == (64, 64, 3)
        assert np.abs(stored - pixels).mean() < 12  # JPEG
        assert len(record["annotations"]) == len(annotations)


def test_a_drawn_folder_is_taken_as_it_is(tmp_path):
    first = shapes_dataset(tmp_path, "train", num_images=2, size=64)
    stamp = first.json_file.stat().st_mtime_ns
    again = shapes_dataset(tmp_path, "train", num_images=2, size=64)
    assert again.json_file.stat().st_mtime_ns == stamp
    assert [path.name for path in tmp_path.iterdir()] == [first.json_file.parent.name]


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
    dataset = shapes_dataset(tmp_path, "train", num_images=2, size=64)
    assert len(dataset.records) == 2
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({"split": "trian"}, "split='trian'"),
        ({"num_images": 0}, "num_images=0"),
        ({"size": 16}, "size=16"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, got):
    with pytest.raises(InputError, match=f"shapes data set: expected split of train.*{got}"):
        shapes_dataset(tmp_path, **({"split": "train", "num_images": 1, "size": 64} | arguments))


def test_annotations_are_sound():
    for image, objects in _drawn(60):
        assert image.shape == (128, 128, 3)
        assert image.dtype == np.uint8
        union = np.zeros((128, 128), dtype=int)
        for annotation in objects:
            mask = _mask(annotation, 128)
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert [x, y, x + width, y + height] == [
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            ]
            assert annotation["area"] == mask.sum() >= 10
            union += mask
        # masks are the visible parts: none lies over another, but for pixels of polygon edges
        assert (union > 1).sum() <= 0.02 * (union > 0).sum() + 4


def test_masks_lie_on_the_drawn_objects():
    # along the edge of a mask the image changes more than elsewhere in the background
    kernel = np.ones((3, 3), np.uint8)
    ratios = []
    for image, objects in _drawn(40):
        gradient = cv2.morphologyEx(image, cv2.MORPH_GRADIENT, kernel).sum(axis=2)
        everything = sum((_mask(a, 128) for a in objects), np.zeros((128, 128), bool))
        background = cv2.dilate(everything.astype(np.uint8), kernel, iterations=2) == 0
        for annotation in objects:
            if not annotation["iscrowd"]:
                mask = _mask(annotation, 128).astype(np.uint8)
                edge = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, kernel) > 0
                ratios.append(gradient[edge].mean() / gradient[background].mean())
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
    occluded = [a for a in objects if isinstance(a["segmentation"], dict)]
    assert len(occluded) > 0.3 * len(objects)


def test_rings_have_holes():
    holes = 0
    for _, objects in _drawn(40):
        for annotation in objects:
            if CLASSES[annotation["category_id"] - 1] == "ring" and not annotation["iscrowd"]:
                x, y, width, height = annotation["bbox"]
                centre = _mask(annotation, 128)[int(y + height / 2), int(x + width / 2)]
                holes += not centre
    assert holes > 10


def test_objects_scale_with_the_image():
    small = [a for _, ann in _drawn(40, 64) for a in ann]
    large = [a for _, ann in _drawn(40, 256) for a in ann]
    ratio = np.median([a["bbox"][2] for a in large]) / np.median([a["bbox"][2] for a in small])
    assert 3 < ratio < 5


def test_the_file_is_complete_coco(tmp_path):
    dataset = shapes_dataset(tmp_path, "test", num_images=5, size=64)
    content = json.loads(dataset.json_file.read_text())
    assert sorted(content) == ["annotations", "categories", "images", "info"]
    assert [a["id"] for a in content["annotations"]] == list(
        range(1, len(content["annotations"]) + 1)
    )
    assert {image["height"] for image in content["images"]} == {64}
