from pathlib import Path

import cv2
import numpy as np
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
