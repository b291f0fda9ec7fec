"""coco-mini's photographs in other formats, read back: the same objects. And broken labels."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from folders import COCO_MINI, OBJECT, class_names, content, xml
from PIL import Image

from vitdet.data.clean import check_data, write_repaired
from vitdet.data.datasets import coco_dataset
from vitdet.data.formats import find_data
from vitdet.data.prepare import prepare_data
from vitdet.utils.checks import InputError

Json = dict[str, Any]
Photos = dict[str, dict[str, tuple[tuple[int, int], list[Json]]]]
photographs = pytest.mark.skipif(
    not COCO_MINI.is_dir(), reason=f"no photographs in {COCO_MINI} (set VITDET_COCO_MINI)"
)


@pytest.fixture(scope="module")
def photos() -> Photos:
    """{part: {file name: ((height, width), objects of one polygon, and crowd regions)}}."""
    found: Photos = {}
    for split in ("train", "val"):
        path = COCO_MINI / "annotations" / f"instances_{split}.json"
        coco = json.loads(path.read_text())
        names = {each["id"]: each["name"] for each in coco["categories"]}
        objects = defaultdict(list)
        for each in coco["annotations"]:
            if each["iscrowd"] or len(each["segmentation"]) == 1:
                objects[each["image_id"]].append(each | {"name": names[each["category_id"]]})
        images = sorted(coco["images"], key=lambda each: each["id"])[:8]
        found[split] = {
            each["file_name"]: ((each["height"], each["width"]), objects[each["id"]])
            for each in images
        }
    return found


def _by_image(found: Json) -> dict[str, list[Json]]:
    """{base name of the file: annotations} of what a reader made."""
    names = {image["id"]: Path(image["file_name"]).name for image in found["images"]}
    by_name: dict[str, list[Json]] = {name: [] for name in names.values()}
    for each in found["annotations"]:
        by_name[names[each["image_id"]]].append(each)
    return by_name


def _yolo_line(each: Json, label: int, size: tuple[int, int], polygons: bool) -> str:
    height, width = size
    x, y, w, h = each["bbox"]
    values = np.array([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height])
    if polygons:
        values = np.array(each["segmentation"][0]).reshape(-1, 2) / (width, height)
    return f"{label} " + " ".join(f"{value:.6f}" for value in values.ravel())


@photographs
@pytest.mark.parametrize("polygons", [False, True], ids=["boxes", "polygons"])
def test_yolo(photos: Photos, tmp_path: Path, polygons: bool) -> None:
    images = [each for part in photos.values() for each in part.values()]
    names = sorted({each["name"] for _, objects in images for each in objects})
    for split, part in photos.items():
        for name, (size, objects) in part.items():
            path = tmp_path / "a" / split / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(COCO_MINI / split / name, path)
            kept = [each for each in objects if not each["iscrowd"]]
            lines = [_yolo_line(each, names.index(each["name"]), size, polygons) for each in kept]
            label = tmp_path / "a" / split / "labels" / f"{path.stem}.txt"
            label.parent.mkdir(exist_ok=True)
            label.write_text("\n".join(lines))
    text = f"train: ../train/images\nval: ../val/images\n\nnc: {len(names)}\n"
    (tmp_path / "a/data.yaml").write_text(f"{text}names: {json.dumps(names)}\n")
    found = find_data(tmp_path / "a")
    assert (found.format, class_names(found)) == ("YOLO text labels", tuple(names))
    for split, part in found.parts.items():
        read = _by_image(part.content)
        assert set(read) == set(photos[split])
        for name, (_, everything) in photos[split].items():
            kept = [each for each in everything if not each["iscrowd"]]
            for ours, theirs in zip(read[name], kept, strict=True):
                assert names[ours["category_id"] - 1] == theirs["name"]
                # six digits of a side of 640 pixels; a polygon's box is a pixel off in COCO's file
                assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=6 if polygons else 0.002)
                assert ("segmentation" in ours) is polygons
                if polygons:
                    points = theirs["segmentation"][0]
                    assert ours["segmentation"][0] == pytest.approx(points, abs=0.002)
    prepared = prepare_data(tmp_path / "a", tmp_path / "run")
    assert prepared.masks is polygons
    assert coco_dataset(*prepared.val).class_names == tuple(names)


def _voc_box(each: Json) -> list[int]:
    """xmin, ymin, xmax, ymax of the pixels that a box touches, counted from 1."""
    x, y, w, h = each["bbox"]
    return [int(x) + 1, int(y) + 1, max(round(x + w), int(x) + 1), max(round(y + h), int(y) + 1)]


def _drawn(objects: list[Json], size: tuple[int, int]) -> np.ndarray:
    """The number of the object at each pixel, from 1 on; the later hide the earlier."""
    drawn = np.zeros(size, dtype=np.uint8)
    for place, each in enumerate(objects, 1):
        encoded = mask_util.frPyObjects(each["segmentation"], *size)
        merged = mask_util.merge(encoded) if isinstance(encoded, list) else encoded
        drawn[mask_util.decode(merged).astype(bool)] = place
    return drawn


@photographs
def test_voc_with_masks(photos: Photos, tmp_path: Path) -> None:
    for name in ("Annotations", "ImageSets/Main", "SegmentationObject", "JPEGImages"):
        (tmp_path / name).mkdir(parents=True)
    for split, part in photos.items():
        for name, (size, objects) in part.items():
            shutil.copy(COCO_MINI / split / name, tmp_path / "JPEGImages")
            items = ""
            for each in objects:
                box = _voc_box(each)
                sides = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
                inside = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
                items += f"<object><name>{each['name']}</name><bndbox>{inside}</bndbox>"
                items += f"<difficult>{each['iscrowd']}</difficult></object>"
            stem = Path(name).stem
            text = f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>"
            (tmp_path / f"Annotations/{stem}.xml").write_text(f"{text}{items}</annotation>")
            Image.fromarray(_drawn(objects, size)).save(tmp_path / f"SegmentationObject/{stem}.png")
        stems = "\n".join(Path(name).stem for name in part)
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text(stems + "\n")
    found = find_data(tmp_path)
    names = class_names(found)
    assert found.format == "Pascal VOC xml"
    for split, part in found.parts.items():
        read = _by_image(part.content)
        assert set(read) == set(photos[split])
        for name, (size, objects) in photos[split].items():
            drawn = _drawn(objects, size)
            for place, (ours, theirs) in enumerate(zip(read[name], objects, strict=True), 1):
                assert names[ours["category_id"] - 1] == theirs["name"]
                left, top, right, bottom = _voc_box(theirs)
                assert ours["bbox"] == [left - 1, top - 1, right - left + 1, bottom - top + 1]
                assert ours["iscrowd"] == theirs["iscrowd"]
                mask = mask_util.decode(ours["segmentation"])
                assert np.array_equal(mask.astype(bool), drawn == place)
    assert prepare_data(tmp_path, tmp_path / "run").masks
    # an object that others hide is left out
    name, (size, objects) = next(iter(photos["train"].items()))
    drawn = _drawn(objects, size)
    hidden = np.where(drawn == len(objects), 0, drawn)
    Image.fromarray(hidden).save(tmp_path / f"SegmentationObject/{Path(name).stem}.png")
    found = find_data(tmp_path)
    assert "left out: 1 object hidden by others in SegmentationObject" in found.notes
    assert len(_by_image(found.parts["train"].content)[name]) == len(objects) - 1


# --- whatever stands in a file of labels: it is read, or one line says what is wrong --------------

TURNS = 40
JUNK = [
    *(None, "x", "", -1, 0, 1, 0.5, 1e30, float("nan"), float("inf"), True, 10**30),
    *([], {}, [None], [[]], {"a": 1}, [1, 2, 3, 4], "../../x", "a.png"),
]
WORDS = ["0", "1", "2", "-1", "0.5", "1.5", "nan", "inf", "1e400", "x", "", "\x00", "é", "9" * 50]
XML = xml(f"<filename>1.png</filename>{OBJECT}")["Annotations/a.xml"]
POLYGON = {"area": 72, "segmentation": [[1, 2, 10, 2, 10, 10]]}


def _places(node: Any) -> list[tuple[Any, Any]]:
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    inside = [node[key] for key in keys if isinstance(node[key], dict | list)]
    return [(node, key) for key in keys] + [place for each in inside for place in _places(each)]


def _json(draw: random.Random) -> str:
    values = content(*(f"{i}.png" for i in range(1, 5)))
    for each in values["annotations"]:
        each.update(copy.deepcopy(POLYGON))
    for _ in range(draw.choice([1, 1, 2, 4])):
        node, key = draw.choice(_places(values))
        if isinstance(node, dict) and draw.random() < 0.2:
            del node[key]
        else:
            node[key] = copy.deepcopy(draw.choice(JUNK))
    return json.dumps(values)


def _line(draw: random.Random) -> str:
    words = ["0"] + ["0.5"] * (draw.choice([4, 5, 5, 5, 6, 7, 9]) - 1)
    words[draw.randrange(len(words))] = draw.choice(WORDS)
    return " ".join(words) + "\n"


def _xml(draw: random.Random) -> str:
    assert isinstance(XML, bytes)
    pieces = XML.decode().replace("<", "\n<").replace(">", ">\n").split("\n")
    junk = ["", "x", "nan", "-5", "1e999", "<a/>", "<a>", "&x;", "\x01"]
    pieces[draw.randrange(len(pieces))] = draw.choice(junk)
    return "".join(pieces)


def _train(data: Path, out: Path) -> None:
    prepared = prepare_data(data, out / "data")
    coco_dataset(*prepared.train)
    coco_dataset(*prepared.val, check="drop")


def _repair(data: Path, out: Path) -> None:
    write_repaired(check_data(find_data(data)), out)
    assert check_data(find_data(out)).faults == []


def _check(data: Path, _: Path) -> None:
    check_data(find_data(data))


@pytest.mark.parametrize(
    ("name", "broken", "do"),
    [
        ("labels.json", _json, _train),
        ("labels.json", _json, _repair),
        ("1.txt", _line, _check),
        ("1.xml", _xml, _check),
    ],
)
def test_broken_labels(
    tmp_path: Path, name: str, broken: Callable[[random.Random], str], do: Callable[..., None]
) -> None:
    data, draw, errors = tmp_path / "data", random.Random(0), []
    data.mkdir()
    for i in range(1, 5):
        Image.effect_noise((40, 20), 90).convert("RGB").save(data / f"{i}.png")
    if name == "1.txt":
        (data / "classes.txt").write_text("cat\ndog\n")
    for turn in range(TURNS):
        (data / name).write_text(broken(draw))
        try:
            do(data, tmp_path / str(turn))
        except InputError as error:
            errors.append(str(error))
    assert 0 < len(errors) < TURNS
    assert "\n" not in "".join(errors)
