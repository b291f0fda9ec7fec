"""Folders of data in each format, as small as they can be, and changes to them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

# {path or pattern: what becomes of it}: text or bytes are written, None removes, a function changes
# the json, and a word and a path do the rest: "mv:NEW", "ln:NEW" (moved, with a link left behind),
# "to:TARGET" (a link), "img:" (an image), "pipe:".
Changes = dict[str, str | bytes | Callable[[Any], Any] | None]

PROJECT = Path(__file__).resolve().parents[2]
COCO_MINI = Path(
    os.environ.get("VITDET_COCO_MINI", PROJECT.parent / "shared" / "data" / "coco-mini")
)
SIZE = (40, 20)  # width, height of all images
LINE = "1 0.5 0.5 0.5 0.5"
BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>20</ymax></bndbox>"
OBJECT = f"<object><name>cat</name>{BOX}</object>"
TRAIN, VAL = (f"annotations/instances_{split}.json" for split in ("train", "val"))


def image(path, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (90, 120, 30)).save(path, **save)


def content(*names):
    """Images of these names, each with an object of the second class."""
    size = {"width": SIZE[0], "height": SIZE[1]}
    box = {"category_id": 2, "bbox": [1, 2, 9, 8], "iscrowd": 0}
    return {
        "images": [{"id": i, "file_name": name, **size} for i, name in enumerate(names, 1)],
        "annotations": [{"id": i, "image_id": i, **box} for i in range(1, len(names) + 1)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def change(folder, changes):
    """Change a folder as `Changes` says."""
    for name, value in changes.items():
        paths = sorted(folder.glob(name)) if "*" in name else [folder / name]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            _change(folder, path, value)


def _change(folder, path, value):
    word, _, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if value is None or word in ("to", "pipe"):
        path.unlink(missing_ok=True)
    if callable(value):
        values = json.loads(path.read_text())
        value(values)
        value = json.dumps(values)
    if word in ("mv", "ln"):
        (folder / rest).parent.mkdir(parents=True, exist_ok=True)
        path.rename(folder / rest)
    if word == "ln":
        path.symlink_to((folder / rest).resolve())
    elif word == "to":
        path.symlink_to(rest)
    elif word == "pipe":
        os.mkfifo(path)
    elif word == "img":
        image(path)
    elif value is not None and word != "mv":
        path.write_bytes(value.encode() if isinstance(value, str) else value)


def coco(folder):
    for name in ("train/a.jpg", "train/b.jpg", "val/c.jpg"):
        image(folder / name)
    texts = {TRAIN: json.dumps(content("a.jpg", "b.jpg")), VAL: json.dumps(content("c.jpg"))}
    change(folder, texts)


def yolo(folder):
    for name in ("train/a", "train/b", "val/c"):
        image(folder / f"images/{name}.jpg")
        change(folder, {f"labels/{name}.txt": f"\n{LINE}\n"})
    change(folder, described("names: [cat, dog]\n"))


def voc(folder):
    for name in "abc":
        image(folder / f"JPEGImages/{name}.jpg")
        text = f"<annotation>\n{OBJECT}\n</annotation>"
        change(folder, {f"Annotations/{name}.xml": text})


FORMS = {"coco": coco, "yolo": yolo, "voc": voc}


def named(*names):
    """Give the training images other names in the json."""

    def rename(values):
        for each, name in zip(values["images"], names, strict=True):
            each["file_name"] = name

    return {TRAIN: rename}


def described(rest):
    """Write a data.yaml that names both parts, and the rest."""
    return {"data.yaml": f"train: images/train\nval: images/val\n{rest}"}


def labels(line):
    """Give all label files this line, after an empty one."""
    return {"labels/*/*.txt": f"\n{line}\n"}


def xml(inside, head="", encoding="utf-8"):
    """Write the xml of image a."""
    return {"Annotations/a.xml": f"{head}<annotation>{inside}</annotation>".encode(encoding)}


def class_names(found):
    """Names of the classes of a data set, in the order of their ids."""
    categories = next(iter(found.parts.values())).content["categories"]
    return tuple(each["name"] for each in sorted(categories, key=lambda each: each["id"]))
