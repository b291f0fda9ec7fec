from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest

from vitdet.data import shapes
from vitdet.data.shapes import CLASSES, draw_image, shapes_dataset
from vitdet.utils.checks import InputError


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
    many = [draw_image("val", index, seed=7) for index in range(20)]  # all kinds of everything
    assert np.mean([image for image, _ in many]) == pytest.approx(133.434, abs=0.02)
    areas = [each["area"] for _, found in many for each in found]
    assert (len(areas), sum(areas)) == (102, pytest.approx(58831, abs=50))


def test_a_data_set_depends_on_seed_split_and_index_alone(tmp_path):
    small = shapes_dataset(tmp_path, "val", num_images=2, size=64)
    stamp = small.json_file.stat().st_mtime_ns
    large = shapes_dataset(tmp_path, "val", num_images=4, size=64)
    again = shapes_dataset(tmp_path, "val", num_images=2, size=64)
    assert again.json_file.stat().st_mtime_ns == stamp  # taken as it is
    names = [f"shapes_v1_val_{count}x64px_seed0" for count in (2, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert large.class_names == CLASSES
    for first, second in zip(small.records, large.records[:2], strict=True):
        files = [Path(each["file_name"]).read_bytes() for each in (first, second)]
        assert files[0] == files[1]
        assert first["annotations"] == second["annotations"]
    for index, record in enumerate(large.records):
        pixels, annotations = draw_image("val", index, size=64)
        stored = cv2.imread(record["file_name"])
        assert stored is not None
        assert np.abs(stored[:, :, ::-1].astype(float) - pixels).mean() < 12  # JPEG
        assert len(record["annotations"]) == len(annotations)
    reference, _ = draw_image("val", 1, size=64)
    for split, index, seed in (("val", 2, 0), ("train", 1, 0), ("val", 1, 1)):
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
    kernel, ratios, objects = np.ones((3, 3), np.uint8), [], []
    for index in range(60):
        image, found = draw_image("train", index)
        masks = []
        for each in found:
            mask = each["segmentation"]
            if isinstance(mask, list):
                mask = mask_util.merge(mask_util.frPyObjects(mask, 128, 128))
            masks.append(mask_util.decode(mask).astype(bool))
        union = np.sum(masks, axis=0)
        gradient = cv2.morphologyEx(image, cv2.MORPH_GRADIENT, kernel).sum(axis=2)
        background = cv2.dilate((union > 0).astype(np.uint8), kernel, iterations=2) == 0
        for annotation, mask in zip(found, masks, strict=True):
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert [x, y] == [columns.min(), rows.min()]
            assert [x + width, y + height] == [columns.max() + 1, rows.max() + 1]
            assert annotation["area"] == mask.sum() >= 10
            if not annotation["iscrowd"]:
                edge = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_GRADIENT, kernel) > 0
                ratios.append(gradient[edge].mean() / gradient[background].mean())
                objects.append(annotation)
        # masks are the visible parts: none lies over another, but for pixels of polygon edges
        assert (union > 1).sum() <= 0.02 * (union > 0).sum() + 4
    assert np.mean(np.array(ratios) > 1) > 0.98
    assert np.median(ratios) > 3
    sides = np.array([max(each["bbox"][2:]) for each in objects])
    assert (sides.min() <= 9, sides.max() >= 70) == (True, True)
    assert {each["category_id"] for each in objects} == set(range(1, 7))
    assert {type(each["segmentation"]) for each in objects} == {list, dict}  # some are occluded
