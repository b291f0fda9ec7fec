"""Data as people have them: each kind of oddity is read and said, or is an error of one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vitdet.data.datasets import coco_dataset
from vitdet.data.formats import Found, find_data
from vitdet.data.prepare import prepare_data, prepare_part
from vitdet.utils.checks import InputError
from vitdet.utils.files import RESULT_MARKER

Change = Callable[[Path], Any]
SIZE = (40, 20)  # width, height
LINE = "1 0.5 0.5 0.5 0.5\n"
BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>20</ymax></bndbox>"
OBJECT = f"<object><name>cat</name>{BOX}</object>"


def image(path: Path, **save: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (90, 120, 30)).save(path, **save)
    return path


def text(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def content(
    *names: str, first: int = 1, classes: tuple[str, ...] = ("cat", "dog")
) -> dict[str, Any]:
    """Images of these names, each with an object of the second class."""
    numbers = range(first, first + len(names))
    size = {"width": SIZE[0], "height": SIZE[1]}
    return {
        "images": [{"id": i, "file_name": n, **size} for i, n in zip(numbers, names, strict=True)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 2, "bbox": [1, 2, 9, 8], "iscrowd": 0}
            for i in numbers
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(classes, 1)],
    }


def coco(folder: Path) -> None:
    for split, name in (("train", "a.jpg"), ("train", "b.jpg"), ("val", "c.jpg")):
        image(folder / split / name)
    write(folder, "train", content("a.jpg", "b.jpg"))
    write(folder, "val", content("c.jpg"))


def write(folder: Path, split: str, values: Any, **options: Any) -> None:
    path = folder / f"annotations/instances_{split}.json"
    text(path, json.dumps(values).encode(options.get("encoding", "utf-8")))


def changed(split: str, change: Callable[[dict[str, Any]], Any], **options: Any) -> Change:
    """Change the content of a part's json."""

    def do(folder: Path) -> None:
        values = json.loads((folder / f"annotations/instances_{split}.json").read_text())
        change(values)
        write(folder, split, values, **options)

    return do


def named(*names: str) -> Change:
    """Give the training images other names in the json."""
    return changed(
        "train",
        lambda values: [
            i.update(file_name=n) for i, n in zip(values["images"], names, strict=True)
        ],
    )


def yolo(folder: Path) -> None:
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        image(folder / f"images/{split}/{name}.jpg")
        text(folder / f"labels/{split}/{name}.txt", f"\n{LINE}")
    text(folder / "data.yaml", "train: images/train\nval: images/val\nnames: [cat, dog]\n")


def yaml(content: str | bytes) -> Change:
    return lambda folder: text(folder / "data.yaml", content)


def described(content: str) -> Change:
    """Write the rest of a data.yaml that names both parts."""
    return yaml(f"train: images/train\nval: images/val\n{content}")


def labels(line: str) -> Change:
    """Give all label files this line, after an empty one."""
    return lambda folder: [text(path, f"\n{line}\n") for path in folder.glob("labels/*/*.txt")]


def voc(folder: Path) -> None:
    for name in "abc":
        image(folder / f"JPEGImages/{name}.jpg")
        text(folder / f"Annotations/{name}.xml", f"<annotation>\n{OBJECT}\n</annotation>")


def xml(inside: str, head: str = "", encoding: str = "utf-8") -> Change:
    """Write the xml of image a."""
    path = "Annotations/a.xml"
    return lambda folder: text(
        folder / path, f"{head}<annotation>{inside}</annotation>".encode(encoding)
    )


def moved(path: str, to: str, link: bool = False) -> Change:
    """Rename; with `link` leave a symbolic link at the old place."""

    def do(folder: Path) -> None:
        (folder / to).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).rename(folder / to)
        if link:
            (folder / path).symlink_to((folder / to).resolve())

    return do


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


FORMS = {"coco": coco, "yolo": yolo, "voc": voc}
POSE = "0 0.5 0.5 0.4 0.4 0.4 0.4 {v}0.6 0.45 {v}0.42 0.6{w}"
GBK = '<?xml version="1.0" encoding="{}"?>'

# What is read: (format, change, a part of the notes).
READ: dict[str, tuple[str, Change, str]] = {
    # labels through links
    "linked folder": ("yolo", moved("images/val", "../photos", link=True), ""),
    "linked images": ("yolo", moved("images", "../photos", link=True), ""),
    "linked file": ("yolo", moved("images/val/c.jpg", "../x/y.jpg", link=True), ""),
    "labels at the target": (
        "yolo",
        all_of(
            moved("images/val", "../other/images/val", link=True),
            moved("labels/val", "../other/labels/val"),
        ),
        "",
    ),
    "linked VOC": ("voc", moved("JPEGImages", "../photos", link=True), ""),
    "linked COCO": ("coco", moved("train", "store", link=True), ""),
    # poses
    "key points": (
        "yolo",
        all_of(
            labels(POSE.format(v="2 ", w=" 1")), described("kpt_shape: [3, 3]\nnames: [cat, dog]")
        ),
        "key points are left out",
    ),
    "quadrilaterals": ("yolo", labels("0 0.1 0.1 0.5 0.2 0.5 0.5 0.1 0.4"), ""),
    "not key points": (
        "yolo",
        all_of(labels(POSE.format(v="", w="")), described("kpt_shape: none\nnames: [cat, dog]")),
        "",
    ),
    # names of classes
    "yes and no": ("yolo", described("names: [yes, no]"), ""),
    "numbers": ("yolo", described("names: {0: 1e3, 1: 010}"), ""),
    "null and dates": ("yolo", described("names: [null, 2026-01-02]"), ""),
    # places that are otherwise
    "no such val": (
        "yolo",
        yaml("train: images/train\nval: ../valid/images\nnames: [cat, dog]"),
        "nothing at ../valid/images",
    ),
    "no such test": (
        "yolo",
        described("test: ../test/images\nnames: [cat, dog]"),
        "nothing at ../test/images",
    ),
    "another machine": (
        "yolo",
        yaml(
            "path: /content/x\ntrain: /content/x/images/train\n"
            "val: 'D:\\x\\images\\val'\nnames: [cat, dog]"
        ),
        "images\\val is found as",
    ),
    "capital folders": (
        "yolo",
        all_of(
            moved("images", "Images"),
            moved("labels", "Labels"),
            lambda f: (f / "data.yaml").unlink(),
            lambda f: text(f / "classes.txt", "cat\r\ndog\r\n"),
        ),
        "",
    ),
    "lists": (
        "yolo",
        all_of(
            yaml("train: train.txt\nval: images/val\nnames: [cat, dog]"),
            lambda f: text(
                f / "train.txt", "data/images/train/a.jpg\r\n\r\n./images/train/b.jpg\n"
            ),
        ),
        "train.txt: 1 of 2 images are found by their paths' ends",
    ),
    "val is train": (
        "yolo",
        yaml("train: images/train\nval: images/train\nnames: [cat, dog]"),
        "val is the same as train",
    ),
    "other suffixes": (
        "yolo",
        all_of(
            moved("images/train/b.jpg", "images/train/b.HEIC"),
            moved("images/train/a.jpg", "images/train/a.jfif"),
        ),
        "1 x .heic (convert HEIC",
    ),
    "labels without image": (
        "yolo",
        lambda f: text(f / "labels/train/x.txt", LINE),
        "1 label file without image",
    ),
    "image without labels": (
        "yolo",
        lambda f: (f / "labels/train/a.txt").unlink(),
        "train: 1 of 2 images have no label file",
    ),
    "lines of Windows": ("yolo", labels("\t1.0\t5.0E-01 +.5 .5 0.5  \r"), ""),
    "labels with a BOM": (
        "yolo",
        lambda f: text(f / "labels/train/a.txt", b"\xef\xbb\xbf" + LINE.encode()),
        "",
    ),
    # results of our own
    "results of predict": (
        "yolo",
        all_of(
            lambda f: image(f / "images/train/out/a.jpg"),
            lambda f: text(
                f / "images/train/out" / RESULT_MARKER, json.dumps({"a": "elsewhere.jpg"})
            ),
        ),
        "1 x result of vitdet",
    ),
    "a run": (
        "yolo",
        all_of(
            lambda f: image(f / "images/train/run/looks/a.jpg"),
            lambda f: text(f / "images/train/run/config.yaml", ""),
            lambda f: text(f / "images/train/run/run.json", "{}"),
        ),
        "1 x folder of a run",
    ),
    # file names in a json
    "backslashes": (
        "coco",
        named("train\\a.jpg", "x\\train/b.jpg"),
        "2 of 2 images are found by their base names",
    ),
    "drive": ("coco", named("C:\\pics\\a.jpg", "C:\\pics\\b.jpg"), "2 of 2"),
    "absolute": ("coco", named("/home/x/a.jpg", "/home/x/b.jpg"), "2 of 2"),
    "percent": (
        "coco",
        all_of(moved("train/a.jpg", "train/my a.jpg"), named("my%20a.jpg", "b.jpg")),
        "1 of 2 images",
    ),
    "percent as written": (
        "coco",
        all_of(moved("train/a.jpg", "train/my%20a.jpg"), named("my%20a.jpg", "b.jpg")),
        "",
    ),
    "case": ("coco", all_of(moved("train/a.jpg", "train/A.JPG")), "a.jpg is train/A.JPG"),
    "NFC and NFD": (
        "coco",
        all_of(moved("train/a.jpg", "train/e\u0301.jpg"), named("\u00e9.jpg", "b.jpg")),
        "1 of 2 images",
    ),
    "folders left out": (
        "coco",
        all_of(moved("train/a.jpg", "train/x/a.jpg"), moved("train/b.jpg", "train/y/b.jpg")),
        "images are found",
    ),
    "Label Studio": (
        "coco",
        named("/data/local-files/?d=train/a.jpg", "file:///x/b.jpg"),
        "2 of 2",
    ),
    "LVIS": (
        "coco",
        changed(
            "train",
            lambda c: [
                i.update(coco_url=f"http://x/train/{i.pop('file_name')}") for i in c["images"]
            ],
        ),
        "",
    ),
    "Supervisely's folders": (
        "coco",
        all_of(
            moved("train", "training/img"),
            moved("annotations/instances_train.json", "training/ann.json"),
            moved("val", "validation/img"),
            moved("annotations/instances_val.json", "validation/ann.json"),
        ),
        "",
    ),
    "dev": (
        "coco",
        all_of(
            moved("val", "dev"),
            moved("annotations/instances_val.json", "annotations/instances_dev.json"),
        ),
        "",
    ),
    # encodings
    "json with a BOM": (
        "coco",
        changed("train", lambda c: None, encoding="utf-8-sig"),
        "read as UTF-8 with a byte order mark",
    ),
    "json in UTF-16": (
        "coco",
        changed("train", lambda c: None, encoding="utf-16"),
        "instances_train.json is read as UTF-16",
    ),
    "xml in gb2312": ("voc", xml(OBJECT.replace("cat", "方块"), GBK.format("gb2312"), "gbk"), ""),
    "xml in UTF-16": ("voc", xml(OBJECT, GBK.format("utf-16"), "utf-16"), ""),
    "xml with a BOM": ("voc", xml(OBJECT, '<?xml version="1.0"?>', "utf-8-sig"), ""),
    # categories
    "val lacks a class": (
        "coco",
        changed("train", lambda c: c["categories"].append({"id": 9, "name": "cow"})),
        "val has no class cow",
    ),
    "other ids": (
        "coco",
        changed(
            "val",
            lambda c: [
                each.update({key: each[key] + 10})
                for part, key in (("categories", "id"), ("annotations", "category_id"))
                for each in c[part]
            ],
        ),
        "val has other ids of 2 classes",
    ),
    "only val has it": (
        "coco",
        changed(
            "val",
            lambda c: (
                c["categories"].append({"id": 1, "name": "owl"}),
                c["categories"].pop(0),
                c["annotations"][0].update(category_id=1),
            ),
        ),
        "only val has objects of owl",
    ),
    "unused class": ("coco", lambda f: None, "1 class without any object: cat"),
    "Roboflow's category": (
        "coco",
        changed(
            "train",
            lambda c: c["categories"].extend([{"id": 0, "name": "dog", "supercategory": "none"}]),
        ),
        "left out: the category dog",
    ),
    "unnamed images": (
        "coco",
        lambda f: image(f / "train/x.jpg"),
        "1 image files that no json names",
    ),
    # VOC
    "Annotation": ("voc", moved("Annotations", "Annotation"), ""),
    "xmls and pictures": (
        "voc",
        all_of(moved("Annotations", "xmls"), moved("JPEGImages", "pictures")),
        "",
    ),
    "labels and images": (
        "voc",
        all_of(moved("Annotations", "labels"), moved("JPEGImages", "images")),
        "",
    ),
    "capital suffix": ("voc", moved("Annotations/a.xml", "Annotations/a.XML"), ""),
    "lists with suffix": (
        "voc",
        lambda f: [
            text(f / f"ImageSets/Main/{s}.txt", lines)
            for s, lines in (("train", "a.jpg\nVOC/b.jpg 1\n"), ("val", "c\n"))
        ],
        "",
    ),
    "some in no list": (
        "voc",
        lambda f: text(f / "ImageSets/Main/train.txt", "a\n"),
        "2 xml files that no list of ImageSets names",
    ),
    "parts of an object": (
        "voc",
        xml(OBJECT.replace("</object>", f"<part><name>head</name>{BOX}</part></object>")),
        "",
    ),
    "image without xml": ("voc", lambda f: image(f / "JPEGImages/x.jpg"), "1 image without xml"),
    "one name in two folders": (
        "voc",
        all_of(
            *(
                all_of(
                    moved(f"Annotations/{n}.xml", f"{s}/1.xml"),
                    moved(f"JPEGImages/{n}.jpg", f"{s}/1.jpg"),
                )
                for n, s in (("a", "train"), ("b", "valid"))
            ),
            moved("Annotations/c.xml", "train/c.xml"),
            moved("JPEGImages/c.jpg", "train/c.jpg"),
        ),
        "",
    ),
    # what lies there besides
    "dead link": (
        "coco",
        lambda f: (f / "train/x.jpg").symlink_to("/nowhere/x"),
        "1 x link that leads nowhere",
    ),
    "circle": (
        "yolo",
        lambda f: (f / "images/train/x").symlink_to(f),
        "1 x folder that leads in a circle",
    ),
    "pipe": ("yolo", lambda f: os.mkfifo(f / "images/train/x.jpg"), "1 x pipe, socket or device"),
    "name that is no text": (
        "yolo",
        lambda f: image(f / "images/train" / os.fsdecode(b"\xff.png")),
        "1 x name that is no UTF-8",
    ),
    "hidden": ("yolo", lambda f: text(f / "images/train/._a.jpg", "x"), ""),
    "args.yaml of a run": ("yolo", lambda f: text(f / "args.yaml", "val: true\ndata: x\n"), ""),
}

# Class names and number of objects, where they are not those of the builders.
EXPECTED: dict[str, tuple[tuple[str, ...], int]] = {
    "yes and no": (("yes", "no"), 3),
    "numbers": (("1e3", "010"), 3),
    "null and dates": (("null", "2026-01-02"), 3),
    "no such val": (("cat", "dog"), 2),
    "val is train": (("cat", "dog"), 4),
    "other suffixes": (("cat", "dog"), 2),
    "image without labels": (("cat", "dog"), 2),
    "xml in gb2312": (("cat", "方块"), 3),
    "val lacks a class": (("cat", "dog", "cow"), 3),
    "only val has it": (("cat", "dog", "owl"), 3),
    "some in no list": (("cat",), 1),
}


def objects(found: Found) -> int:
    return sum(len(part.content["annotations"]) for part in found.parts.values())


@pytest.mark.parametrize("kind", READ)
def test_is_read_and_said(tmp_path: Path, kind: str) -> None:
    form, change, note = READ[kind]
    names, count = EXPECTED.get(kind, (("cat", "dog") if form != "voc" else ("cat",), 3))
    folder = tmp_path / "data"
    FORMS[form](folder)
    change(folder)
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    found = find_data(folder)
    assert found.class_names == names
    assert objects(found) == count
    assert any(note in each for each in found.notes) or not note, found.notes
    for part in found.parts.values():
        used = {each["category_id"] for each in part.content["annotations"]}
        assert used <= {each["id"] for each in part.content["categories"]}
        for each in part.content["images"]:
            assert (part.images / each["file_name"]).is_file()
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


def test_boxes_are_right(tmp_path: Path) -> None:
    for form, box in (("yolo", [10, 5, 20, 10]), ("voc", [0, 1, 10, 19])):
        FORMS[form](tmp_path / form)
        part = next(iter(find_data(tmp_path / form).parts.values()))
        assert [each["bbox"] for each in part.content["annotations"]][:2] == [box, box]
    labels(POSE.format(v="2 ", w=" 0"))(tmp_path / "yolo")
    yaml("train: images/train\nkpt_shape: [3, 3]\nnames: [cat, dog]")(tmp_path / "yolo")
    (each, _) = find_data(tmp_path / "yolo").parts["train"].content["annotations"]
    assert (each["bbox"], each["category_id"], "segmentation" in each) == ([12, 6, 16, 8], 1, False)
    xml(OBJECT.replace("<xmin>1<", "<xmin>0<"))(tmp_path / "voc")
    found = find_data(tmp_path / "voc")
    assert found.parts["all"].content["annotations"][0]["bbox"] == [0, 2, 10, 18]
    assert "a box begins at 0, so all are read as counted from 0" in found.notes
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "yolo/images/train/a.jpg", exif=exif)
    part = find_data(tmp_path / "yolo").parts["train"]
    assert (part.content["images"][0]["height"], part.content["images"][0]["width"]) == SIZE
    assert part.content["annotations"][0]["bbox"] == [6, 12, 8, 16]


@pytest.mark.parametrize(
    ("flag", "crowd"), [("1", 1), ("0", 0), ("", 0), ("Unspecified", 0), ("true", 1), ("nan", 0)]
)
def test_difficult(tmp_path: Path, flag: str, crowd: int) -> None:
    voc(tmp_path)
    xml(OBJECT.replace("</object>", f"<difficult>{flag}</difficult></object>"))(tmp_path)
    assert find_data(tmp_path).parts["all"].content["annotations"][0]["iscrowd"] == crowd


def test_voc_polygons_and_masks(tmp_path: Path) -> None:
    voc(tmp_path)
    points = [(2, 3), (9, 3), (9, 12)]
    polygon = "".join(f"<x{i}>{x}</x{i}><y{i}>{y}</y{i}>" for i, (x, y) in enumerate(points, 1))
    xml(f"<object><name>cat</name>{BOX}<polygon>{polygon}</polygon></object>")(tmp_path)
    each = find_data(tmp_path).parts["all"].content["annotations"][0]
    assert each["segmentation"] == [[1, 2, 8, 2, 8, 11]]
    Image.new("L", (30, 20)).save(image(tmp_path / "SegmentationObject/a.png"))
    assert any("masks of 1 of 3 images" in note for note in find_data(tmp_path).notes)
    for name in "bc":
        image(tmp_path / f"SegmentationObject/{name}.png")
    with pytest.raises(InputError, match=r"a\.png: expected 20 x 40 pixels .*of 1 objects"):
        find_data(tmp_path)


def test_images_elsewhere(tmp_path: Path) -> None:
    for form, build in FORMS.items():
        build(tmp_path / form)
    named("/x/a.jpg", "b.jpg")(tmp_path / "coco")
    moved("train", "../pictures/train")(tmp_path / "coco")
    image(tmp_path / "pictures/c.jpg")
    assert objects(find_data(tmp_path / "coco", images=tmp_path / "pictures")) == 3
    moved("JPEGImages", "../store")(tmp_path / "voc")
    assert objects(find_data(tmp_path / "voc", images=tmp_path / "store")) == 3
    moved("images", "../photos")(tmp_path / "yolo")
    (tmp_path / "yolo/data.yaml").unlink()
    text(tmp_path / "yolo/classes.txt", "cat\ndog\n")
    found = find_data(tmp_path / "yolo", images=tmp_path / "photos")
    assert (set(found.parts), objects(found)) == ({"train", "val"}, 3)
    # an absolute name that is there does not win over the folder that was named
    here = image(tmp_path / "old/a.jpg")
    write(tmp_path / "coco", "train", content(str(here), "b.jpg"))
    part = find_data(tmp_path / "coco", images=tmp_path / "pictures").parts["train"]
    assert part.content["images"][0]["file_name"] == "train/a.jpg"


def test_a_name_that_may_mean_two_files_is_not_guessed(tmp_path: Path) -> None:
    coco(tmp_path)
    moved("train/a.jpg", "train/x/a.jpg")(tmp_path)
    image(tmp_path / "train/y/a.jpg")
    part = find_data(tmp_path).parts["train"]
    assert [each["file_name"] for each in part.content["images"]] == ["a.jpg", "b.jpg"]
    with pytest.raises(InputError, match="missing image"):
        coco_dataset(*prepare_data(tmp_path, tmp_path / "run/data").train)
    # nor is one file taken for two images
    named("one/b.jpg", "two/b.jpg")(tmp_path)
    with pytest.raises(InputError, match=r"expected a folder that holds one/b\.jpg"):
        find_data(tmp_path)


# --- errors ---------------------------------------------------------------------------------------

# (format, change, part of the error).
WRONG: dict[str, tuple[str, Change, str]] = {
    "class too high": (
        "yolo",
        labels("2 0.5 0.5 0.5 0.5"),
        r"labels/train/a\.txt, line 2: expected a class number from 0 to 1, got 2",
    ),
    "class with a fraction": (
        "yolo",
        labels("0.5 0.5 0.5 0.5 0.5"),
        "expected a class number from 0 to 1, got 0.5",
    ),
    "too few": (
        "yolo",
        labels("0 0.5 0.5 0.5"),
        "expected a class and x y width height, .*got 4 numbers",
    ),
    "score": ("yolo", labels("0 0.5 0.5 0.5 0.5 0.9"), "got 6 numbers.*the score of a prediction"),
    "nan": ("yolo", labels("0 0.5 nan 0.5 0.5"), "expected finite numbers, got 'nan'"),
    "decimal comma": ("yolo", labels("0 0,5 0.5 0.5 0.5"), "got '0,5'"),
    "commas": ("yolo", labels("0,0.5,0.5,0.5,0.5"), "Separate the numbers by blanks"),
    "pixels": (
        "yolo",
        labels("0 20 10 10 10"),
        "parts of the image's sides, 0 to 1, got 20. Divide pixels",
    ),
    "name of a class": (
        "yolo",
        labels("cat 0.5 0.5 0.5 0.5"),
        "number of the class, from 0, not with its name",
    ),
    "KITTI": ("yolo", labels("Car 0 0 -1.5 1 2 3 4 1 1 1 1 1 1 1"), "KITTI"),
    "DOTA": ("yolo", labels("1 2 3 4 5 6 7 8 plane 0"), "oriented boxes of DOTA"),
    "key points": (
        "yolo",
        labels(POSE.format(v="", w="")),
        r"box and 3 key points.*`kpt_shape: \[3, 2\]`",
    ),
    "visible key points": (
        "yolo",
        labels(POSE.format(v="2 ", w=" 0")),
        r"3 key points.*`kpt_shape: \[3, 3\]`",
    ),
    "one key point": (
        "yolo",
        all_of(
            labels("0 0.5 0.5 0.2 0.2 0.55 0.5"),
            lambda f: text(f / "labels/train/a.txt", "0 0.5 0.5 0.2 0.2 0.45 0.5\n" * 3),
        ),
        "box and 1 key point,",
    ),
    "other kpt_shape": (
        "yolo",
        all_of(labels(POSE.format(v="", w="")), described("kpt_shape: [5, 2]\nnames: [a, b]")),
        "a box and 5 x 2 numbers of key points, as kpt_shape says, got 11 numbers",
    ),
    "wrong kpt_shape": ("yolo", described("kpt_shape: 3\nnames: [a, b]"), "kpt_shape: expected"),
    "no names": ("yolo", described(""), r"data\.yaml: names: expected a list .*got no such key"),
    "no list": (
        "yolo",
        described("names: 3\n"),
        r"names: expected a list of class names.*got '3'",
    ),
    "gap": (
        "yolo",
        described("names: {0: a, 2: b}\n"),
        r"names: expected a list.*got \{'0': 'a', '2': 'b'\}",
    ),
    "nc": ("yolo", described("nc: 3\nnames: [a]\n"), "expected 3 names, as nc says, got 1"),
    "name twice": (
        "yolo",
        described("names: [a, a]\n"),
        "expected names that differ, got 'a' 2 times",
    ),
    "no folder": (
        "yolo",
        yaml("train: elsewhere\nnames: [a]\n"),
        r"data\.yaml: train: expected a folder.*nothing at elsewhere",
    ),
    "lost in a list": (
        "yolo",
        yaml("train: [images/train, images/x]\nnames: [a]\n"),
        "train: nothing at images/x",
    ),
    "no yaml": (
        "yolo",
        yaml("train: [\nnames: [a]"),
        r"data\.yaml: expected YAML, got text that is not",
    ),
    "references": ("yolo", described("names: &a [x, y]\nother: [*a, *a]\n"), "holds references"),
    "deep yaml": ("yolo", described(f"names: {'[' * 5000}"), "text nested too deep"),
    "yaml in GBK": (
        "yolo",
        yaml("names: [方块, b]\ntrain: x".encode("gbk")),
        "expected text in UTF-8.*Save it as UTF-8",
    ),
    "two yaml": (
        "yolo",
        all_of(
            moved("data.yaml", "x.yaml"), lambda f: text(f / "y.yaml", (f / "x.yaml").read_text())
        ),
        r"expected one yaml of a data set, got x\.yaml, y\.yaml",
    ),
    "line of a list": (
        "yolo",
        all_of(
            yaml("train: l.txt\nnames: [a, b]"),
            lambda f: text(f / "l.txt", "images/train/a.jpg\n\nq.jpg"),
        ),
        r"l\.txt, line 3: expected an image file, got q\.jpg",
    ),
    "two of a name": (
        "yolo",
        lambda f: image(f / "images/train/a.png"),
        r"differ by more than their suffix.*got a\.jpg and a\.png",
    ),
    "label is a pipe": (
        "yolo",
        all_of(
            lambda f: (f / "labels/train/a.txt").unlink(),
            lambda f: os.mkfifo(f / "labels/train/a.txt"),
        ),
        r"a\.txt: expected a file, got a pipe",
    ),
    "label is a dead link": (
        "yolo",
        all_of(
            lambda f: (f / "labels/train/a.txt").unlink(),
            lambda f: (f / "labels/train/a.txt").symlink_to("/nowhere"),
        ),
        "a link that leads nowhere",
    ),
    "no names of classes": (
        "yolo",
        lambda f: (f / "data.yaml").unlink(),
        r"There are \d x \.txt in labels/train/, and no names of classes",
    ),
    "no box": (
        "voc",
        xml("<object><name>cat</name></object>"),
        r"Annotations/a\.xml: expected <bndbox> in <object>, got none",
    ),
    "oriented": ("voc", xml("<object><name>cat</name><robndbox/></object>"), "got oriented boxes"),
    "no name": (
        "voc",
        xml(f"<object><name></name>{BOX}</object>"),
        "expected <name> in <object>, got none",
    ),
    "no side": (
        "voc",
        xml("<object><name>a</name><bndbox><xmin>1</xmin></bndbox></object>"),
        r"a\.xml: expected <ymin> in <bndbox>",
    ),
    "no number": ("voc", xml(OBJECT.replace("20", "x")), "expected a number in <ymax>, got 'x'"),
    "polygon": (
        "voc",
        xml(OBJECT.replace("</object>", "<polygon><x1>1</x1><y1>1</y1></polygon></object>")),
        "expected <x1>, <y1>, .*got x1, y1",
    ),
    "not closed": (
        "voc",
        xml("<object>"),
        r"a\.xml, line 1: expected xml, got text that is not \(mismatched tag\)",
    ),
    "empty xml": (
        "voc",
        lambda f: text(f / "Annotations/a.xml", ""),
        r"a\.xml, line 1: expected xml, got an empty file",
    ),
    "entities": (
        "voc",
        xml("&b;", '<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>'),
        "got declarations",
    ),
    "deep xml": ("voc", xml("<a>" * 3000), "elements nested too deep"),
    "unknown encoding": (
        "voc",
        xml(OBJECT, GBK.format("x-none")),
        "in the encoding that it declares.*x-none",
    ),
    "no text encoding": ("voc", xml(OBJECT, GBK.format("hex")), "in the encoding that it declares"),
    "other bytes": (
        "voc",
        xml(OBJECT.replace("cat", "é"), encoding="latin-1"),
        "expected xml in UTF-8",
    ),
    "xml without image": (
        "voc",
        lambda f: (f / "JPEGImages/a.jpg").unlink(),
        r"a\.xml: expected an image a\.\*.*got none in the data folder",
    ),
    "one image twice": (
        "voc",
        all_of(
            lambda f: (f / "JPEGImages/a.jpg").unlink(), xml(f"<filename>b.jpg</filename>{OBJECT}")
        ),
        r"b\.xml: expected an image of its own|a\.xml: expected an image of its own",
    ),
    "lost in a list of VOC": (
        "voc",
        lambda f: text(f / "ImageSets/Main/train.txt", "a\nq\n"),
        r"train\.txt, line 2: expected the name of an xml file, got 'q'",
    ),
    "no objects": (
        "voc",
        lambda f: [text(path, "<annotation/>") for path in (f / "Annotations").iterdir()],
        "expected objects, got none in 3 xml files",
    ),
    "two years": (
        "voc",
        all_of(
            moved("Annotations", "VOC1/Annotations"),
            moved("VOC1/Annotations/a.xml", "VOC2/Annotations/a.xml"),
        ),
        "xml files of one data set, got VOC1/Annotations and VOC2/Annotations",
    ),
    "cut json": (
        "coco",
        lambda f: text(f / "annotations/instances_train.json", json.dumps(content("a.jpg"))[:-30]),
        r"train\.json: expected json, got text that is not \(.*char \d+\)",
    ),
    "LFS": (
        "coco",
        lambda f: text(
            f / "annotations/instances_val.json",
            "version https://git-lfs.github.com/spec/v1\noid sha256:1",
        ),
        r"instances_val\.json: expected json, got a pointer of Git LFS.*git lfs pull",
    ),
    "web page": (
        "coco",
        lambda f: text(f / "annotations/instances_val.json", "\n<!DOCTYPE html><html>"),
        "got a web page",
    ),
    "archive as json": (
        "coco",
        lambda f: text(f / "annotations/instances_val.json", b"PK\x03\x04xx"),
        "got a zip archive",
    ),
    "empty json": (
        "coco",
        lambda f: text(f / "annotations/instances_val.json", b""),
        "got an empty file",
    ),
    "deep json": (
        "coco",
        lambda f: text(
            f / "annotations/instances_val.json", '{"images": [], "categories": ' + "[" * 200_000
        ),
        "nested too deep",
    ),
    "endless number": (
        "coco",
        lambda f: text(
            f / "annotations/instances_val.json", '{"images": [], "categories": ' + "1" * 5000
        ),
        "expected json, got text that is not",
    ),
    "no list of annotations": (
        "coco",
        changed("train", lambda c: c.update(annotations=3)),
        r'expected a list "annotations" of objects \(COCO format\), got 3',
    ),
    "no images": (
        "coco",
        lambda f: [path.unlink() for path in f.glob("*/*.jpg")],
        r"train\.json: expected a folder that holds a\.jpg, got no such file.*--images",
    ),
    "two files of a part": (
        "coco",
        lambda f: write(f, "train_small", content("a.jpg")),
        r"one annotation file for train, got annotations/instances_train\.json and",
    ),
    "part of no name": (
        "coco",
        lambda f: write(f, "other", content("a.jpg")),
        r"expected parts whose names say train or val, got .*other\.json",
    ),
    "other classes": (
        "coco",
        changed("val", lambda c: c.update(categories=[{"id": 2, "name": "owl"}])),
        r"val\.json: expected the categories of .*got 'owl' with id 2 instead of 'cat'",
    ),
    "other spelling": (
        "coco",
        changed("val", lambda c: c["categories"][0].update(name="Cat")),
        "got 'Cat' with id 1 instead of 'cat'",
    ),
    "endless name": ("coco", named("x" * 5000, "y" * 300), "expected a folder that holds x"),
    "zero byte in a name": ("coco", named("a\0.jpg", "\ud800.jpg"), "expected a folder that holds"),
    "two formats": (
        "coco",
        yolo,
        r"got COCO json \(annotations/.*\) and YOLO text labels \(data\.yaml\)\. Choose with",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_is_an_error_of_one_line(tmp_path: Path, kind: str) -> None:
    form, change, wanted = WRONG[kind]
    FORMS[form](tmp_path)
    change(tmp_path)
    with pytest.raises(InputError) as caught:
        find_data(tmp_path)
    assert re.search(wanted, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


FOREIGN = {
    "labelme": ('{"version": "5", "shapes": [], "imagePath": "a.jpg"}', "labelme2coco"),
    "Supervisely": ('{"tags": [], "objects": [{"classTitle": "a"}]}', "Supervisely: export it"),
    "CreateML": ('[{"image": "a.jpg", "annotations": [{"coordinates": {}}]}]', "CreateML"),
    "VIA": ('{"a.jpg": {"regions": [{"shape_attributes": {}}]}}', "VGG Image Annotator"),
    "Label Studio": ('[{"annotations": [{"result": [{"from_name": "x"}]}]}]', "Label Studio"),
    "results": ('[{"image_id": 1, "bbox": [], "score": 1}]', "results of a detector"),
    "LFS": ("version https://git-lfs.github.com/spec/v1", "pointer of Git LFS"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_labels_of_other_tools_are_named(tmp_path: Path, kind: str) -> None:
    image(tmp_path / "a.jpg")
    text(tmp_path / "a.json", FOREIGN[kind][0])
    with pytest.raises(InputError, match=f"got 1 x .jpg, 1 x .json.*{FOREIGN[kind][1]}"):
        find_data(tmp_path)


def test_a_folder_of_no_format_says_what_was_looked_for_and_what_is_near(tmp_path: Path) -> None:
    image(tmp_path / "a.jpg")
    text(tmp_path / "notes/x.md", "")
    with pytest.raises(
        InputError, match=r"expected json files .* got notes/, 1 x \.jpg\. Give the"
    ):
        find_data(tmp_path)
    yolo(tmp_path / "inside")
    with pytest.raises(InputError, match=r"There is inside/data\.yaml: give .*inside\."):
        find_data(tmp_path)
    text(tmp_path / "new/x.zip", "")
    with pytest.raises(InputError, match=r"There is 1 x \.zip: unpack the archive"):
        find_data(tmp_path / "new")
    text(tmp_path / "cvat/a.xml", "<annotations><image/></annotations>")
    with pytest.raises(InputError, match="no xml of Pascal VOC: export it as COCO"):
        find_data(tmp_path / "cvat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="got an empty folder"):
        find_data(tmp_path / "empty")


def test_paths_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for good in ("~/data", f"file://{tmp_path}/data", "data/", "data/annotations/../"):
        assert objects(find_data(Path(good))) == 3
    yolo(tmp_path / "yolo")
    assert objects(find_data(Path("yolo/data.yaml"))) == 3
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    text(tmp_path / "x.zip", b"PK\x03\x04")
    text(tmp_path / "x.csv", "a,b")
    for path, wanted in {
        "none": "data: expected a folder none, got nothing at this path. Check the path.",
        "data ": "Did you mean 'data', without the blank",
        "data\\": "Did you mean 'data/'",
        "https://x.org/d.zip": "Download it first",
        "pipe": "pipe: expected a file, got a pipe",
        "loop": "got a link that leads nowhere",
        "x.zip": "got a zip archive .unpack it and give the folder",
        "x.csv": r"expected a folder, a json in COCO's format or a data\.yaml, got another file",
        "x" * 5000: "nothing at this path",
    }.items():
        with pytest.raises(InputError, match=wanted):
            find_data(Path(path))


# --- parts, and what a training stops at ----------------------------------------------------------


def test_parts_of_a_training_and_of_an_evaluation(tmp_path: Path) -> None:
    coco(tmp_path)
    run = tmp_path / "run/data"
    for split in ("train", "val"):  # the test part is not read for a training
        moved(f"annotations/instances_{split}.json", f"{split}.json")(tmp_path)
    text(tmp_path / "test.json", '{"images": [], "annotations": [], "categories": 3}')
    assert set(find_data(tmp_path, splits=("train", "val")).parts) == {"train", "val"}
    assert prepare_data(tmp_path, run).train[0] == str(tmp_path / "train.json")
    text(tmp_path / "test.json", json.dumps(content("a.jpg")))
    (annotations, images), notes = prepare_part(tmp_path, run)
    assert (annotations, images) == (str(tmp_path / "val.json"), str(tmp_path / "val"))
    assert notes[-1] == "evaluated is val, of 1 images"
    # images of a json are found as for a training
    assert prepare_part(tmp_path / "train.json", run)[0][1] == str(tmp_path / "train")
    (tmp_path / "val.json").unlink()
    assert prepare_part(tmp_path, run)[0][0] == str(tmp_path / "test.json")
    (tmp_path / "train.json").unlink()
    with pytest.raises(InputError, match="images to train on, got COCO json with test only"):
        prepare_data(tmp_path, run)
    # a file that the user names is what he trains on, whatever its name
    text(tmp_path / "test.json", json.dumps(content("a.jpg", "b.jpg")))
    Image.new("RGB", SIZE).save(tmp_path / "train/b.jpg")
    assert prepare_data(tmp_path / "test.json", run, val_fraction=0.5).num_images == 1


def test_a_part_without_objects_is_an_error_unless_it_is_asked_for(tmp_path: Path) -> None:
    coco(tmp_path)
    changed("val", lambda values: values.update(annotations=[]))(tmp_path)
    wanted = r"validation part .*val\.json: expected images with objects, got none in 1 image, "
    with pytest.raises(InputError, match=f"{wanted}.*--allow-empty"):
        prepare_data(tmp_path, tmp_path / "run")
    assert prepare_data(tmp_path, tmp_path / "run", allow_empty=True).num_images == 2
    with pytest.raises(InputError, match="objects to evaluate on, got none in 1 image"):
        prepare_part(tmp_path, tmp_path / "run")
    changed("train", lambda values: values.update(annotations=[]))(tmp_path)
    with pytest.raises(InputError, match=r"training part .*got none in 2 images\. Add labels"):
        prepare_data(tmp_path, tmp_path / "run", allow_empty=True)


def test_faults_of_voc_stop_a_training_and_name_the_xml(tmp_path: Path) -> None:
    voc(tmp_path)
    for inside, wanted in (
        (
            f"<size><width>80</width><height>20</height></size>{OBJECT}",
            "the size of a.jpg, 40 x 20",
        ),
        (OBJECT.replace("<xmin>1<", "<xmin>11<"), "xmin below xmax .*xmin 11, .*xmax 10"),
    ):
        xml(inside)(tmp_path)
        found = find_data(tmp_path)  # a check goes on
        assert len(found.parts["all"].problems) == 1
        with pytest.raises(InputError, match=rf"Annotations/a\.xml: expected {wanted}"):
            prepare_data(tmp_path, tmp_path / "run")
    xml(f"<size><width>0</width><height>0</height></size>{OBJECT}")(tmp_path)
    text(tmp_path / "JPEGImages/b.jpg", "no image")
    with pytest.raises(InputError, match=r"JPEGImages/b\.jpg"):
        prepare_data(tmp_path, tmp_path / "run")
