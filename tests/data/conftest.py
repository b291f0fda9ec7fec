"""A tiny data set on disk, written anew for each test, that a test may then damage."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image


def _object(number, image, category, box, iscrowd=0):
    x, y, width, height = box
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    ids = {"id": number, "image_id": image, "category_id": category, "iscrowd": iscrowd}
    return {**ids, "bbox": box, "area": width * height, "segmentation": [corners]}


class TinyCoco:
    """Three 40 x 30 images (width x height) with four objects of two classes, ids with gaps."""

    def __init__(self, folder):
        self.json_file = folder / "instances.json"
        self.images = folder / "images"
        self.images.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for number in (1, 2, 3):
            pixels = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images / f"{number}.jpg")
        self.content = {
            "images": [
                {"id": n, "file_name": f"{n}.jpg", "width": 40, "height": 30} for n in (3, 1, 2)
            ],
            "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
            "annotations": [
                _object(11, 1, 3, [5, 5, 10, 8]),
                _object(12, 1, 7, [20, 10, 12, 12]),
                _object(13, 2, 7, [0, 0, 40, 30]),
                _object(14, 3, 3, [2, 2, 6, 6], iscrowd=1),
            ],
        }

    def write(self):
        self.json_file.write_text(json.dumps(self.content))
        return self


@pytest.fixture
def tiny(tmp_path):
    return TinyCoco(tmp_path / "tiny").write()
