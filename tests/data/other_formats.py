"""Writes a data set in COCO's format in the other formats, as their tools would."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

Json = dict[str, Any]
PROJECT = Path(__file__).resolve().parents[2]
COCO_MINI = Path(
    os.environ.get("VITDET_COCO_MINI", PROJECT.parent / "shared" / "data" / "coco-mini")
)


class Source:
    """The first images of each part of coco-mini, objects of one polygon and crowd regions."""

    def __init__(self, num_images: int = 8) -> None:
        self.parts: dict[str, Json] = {}
        for split in ("train", "val"):
            path = COCO_MINI / "annotations" / f"instances_{split}.json"
            content = json.loads(path.read_text())
            content["images"] = sorted(content["images"], key=lambda each: each["id"])[:num_images]
            kept = {image["id"] for image in content["images"]}
            content["annotations"] = [
                each
                for each in content["annotations"]
                if each["image_id"] in kept and (each["iscrowd"] or len(each["segmentation"]) == 1)
            ]
            self.parts[split] = content
        self.names = [each["name"] for each in self.parts["train"]["categories"]]
        self.index = {each["id"]: i for i, each in enumerate(self.parts["train"]["categories"])}

    def objects(self, split: str) -> dict[str, list[Json]]:
        """Return {file name: annotations}, for every image."""
        names = {image["id"]: image["file_name"] for image in self.parts[split]["images"]}
        found: dict[str, list[Json]] = {name: [] for name in names.values()}
        for each in self.parts[split]["annotations"]:
            found[names[each["image_id"]]].append(each)
        return found

    def sizes(self, split: str) -> dict[str, tuple[int, int]]:
        images = self.parts[split]["images"]
        return {each["file_name"]: (each["height"], each["width"]) for each in images}

    def copy_images(self, split: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for image in self.parts[split]["images"]:
            shutil.copy(COCO_MINI / split / image["file_name"], folder)


def write_yolo(source: Source, folder: Path, *, polygons: bool) -> None:
    for split in source.parts:
        part = folder / {"val": "valid"}.get(split, split)
        source.copy_images(split, part / "images")
        (part / "labels").mkdir()
        sizes = source.sizes(split)
        for name, objects in source.objects(split).items():
            lines = [
                _yolo_line(each, source.index[each["category_id"]], sizes[name], polygons)
                for each in objects
                if not each["iscrowd"]
            ]
            if lines:
                (part / "labels" / name).with_suffix(".txt").write_text("\n".join(lines) + "\n")
    names = json.dumps(source.names)
    text = f"train: ../train/images\nval: ../valid/images\n\nnc: {len(source.names)}\n"
    (folder / "data.yaml").write_text(f"{text}names: {names}\n")


def _yolo_line(each: Json, index: int, size: tuple[int, int], polygons: bool) -> str:
    height, width = size
    if polygons:
        points = np.array(each["segmentation"][0]).reshape(-1, 2) / (width, height)
        return f"{index} " + " ".join(f"{value:.6f}" for value in points.ravel())
    x, y, w, h = each["bbox"]
    values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
    return f"{index} " + " ".join(f"{value:.6f}" for value in values)


def write_voc(source: Source, folder: Path, *, masks: bool) -> None:
    for name in ("Annotations", "ImageSets/Main", "SegmentationObject"):
        (folder / name).mkdir(parents=True)
    for split in source.parts:
        source.copy_images(split, folder / "JPEGImages")
        sizes = source.sizes(split)
        for name, objects in source.objects(split).items():
            stem = Path(name).stem
            items = "".join(_voc_object(each, source) for each in objects)
            height, width = sizes[name]
            size = f"<width>{width}</width><height>{height}</height><depth>3</depth>"
            (folder / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation>\n<folder>VOC</folder>\n<filename>{name}</filename>\n"
                f"<size>{size}</size>\n{items}</annotation>\n"
            )
            if masks:
                drawn = Image.fromarray(drawn_masks(objects, sizes[name]))
                drawn.putpalette([value for value in range(256) for _ in range(3)])
                drawn.save(folder / "SegmentationObject" / f"{stem}.png")
        stems = "\n".join(Path(name).stem for name in source.objects(split))
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(stems + "\n")


def voc_box(each: Json) -> list[int]:
    """Return xmin, ymin, xmax, ymax of the pixels that a box touches, counted from 1."""
    x, y, w, h = each["bbox"]
    return [int(x) + 1, int(y) + 1, max(round(x + w), int(x) + 1), max(round(y + h), int(y) + 1)]


def _voc_object(each: Json, source: Source) -> str:
    name = source.names[source.index[each["category_id"]]]
    sides = zip(("xmin", "ymin", "xmax", "ymax"), voc_box(each), strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    difficult = f"<difficult>{each['iscrowd']}</difficult>"
    return f"<object>\n<name>{name}</name>\n{difficult}\n<bndbox>{box}</bndbox>\n</object>\n"


def drawn_masks(objects: list[Json], size: tuple[int, int]) -> np.ndarray:
    """Return the number of the object at each pixel, from 1 on; the later hide the earlier."""
    drawn = np.zeros(size, dtype=np.uint8)
    for place, each in enumerate(objects, 1):
        drawn[mask_of(each["segmentation"], size)] = place
    return drawn


def mask_of(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    encoded = segmentation
    if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
        encoded = mask_util.frPyObjects(segmentation, *size)
    if isinstance(encoded, list):
        encoded = mask_util.merge(encoded)
    return mask_util.decode(encoded).astype(bool)


def by_image(content: Json) -> dict[str, list[Json]]:
    """Return {base name of the file: annotations} of what a reader made."""
    names = {image["id"]: Path(image["file_name"]).name for image in content["images"]}
    found: dict[str, list[Json]] = defaultdict(list, {name: [] for name in names.values()})
    for each in content["annotations"]:
        found[names[each["image_id"]]].append(each)
    return found
