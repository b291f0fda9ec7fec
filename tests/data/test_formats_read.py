"""Data as people have them: each kind of oddity is read, and said where somebody may wonder."""

import json
import os
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from folders import (
    BOX,
    FORMS,
    LINE,
    OBJECT,
    SIZE,
    TRAIN,
    VAL,
    change,
    class_names,
    coco,
    content,
    described,
    image,
    labels,
    named,
    voc,
    xml,
    yolo,
)
from PIL import Image

from vitdet.data.datasets import coco_dataset
from vitdet.data.formats import find_data
from vitdet.data.prepare import prepare_data
from vitdet.utils.checks import InputError
from vitdet.utils.files import RESULT_MARKER

POSE = "0 0.5 0.5 0.4 0.4 0.4 0.4 2 0.6 0.45 0 0.42 0.6 1"
GBK = '<?xml version="1.0" encoding="gb2312"?>'
NAMES = "names: [cat, dog]\n"
FOUND = "2 of 2 images are found by their base names"


def _as_lvis(values):
    for each in values["images"]:
        each["coco_url"] = f"http://x.org/train/{each.pop('file_name')}"


def _other_ids(values):
    for key, entries in (("id", "categories"), ("category_id", "annotations")):
        for each in values[entries]:
            each[key] += 10


def _with_owl(values):
    values["categories"][0] = {"id": 1, "name": "owl"}
    values["annotations"][0]["category_id"] = 1


def _with_pets(values):
    for each in values["categories"]:
        each["supercategory"] = "pets"
    values["categories"].insert(0, {"id": 0, "name": "pets", "supercategory": "none"})


def _category(**entry):
    return {TRAIN: lambda values: values["categories"].append(entry)}


def _moved(split, other):
    return {split: f"mv:{other}/img", f"annotations/instances_{split}.json": f"mv:{other}/ann.json"}


CAPITALS = {"images": "mv:Images", "labels": "mv:Labels", "data.yaml": None}
DARKNET = CAPITALS | {
    "obj.names": "cat\ndog",
    "obj.data": "train = z/train.txt\nvalid=val.txt",
    "train.txt": "z/Images/train/a.jpg\nz/Images/train/b.jpg\n",
    "val.txt": "Images/val/c.jpg",
}
ODD = {  # what is left out, and counted
    "images/train/p/a.jpg": "img:",
    f"images/train/p/{RESULT_MARKER}": '{"a": "/x.jpg"}',
    "images/train/r/looks/a.jpg": "img:",
    "images/train/r/config.yaml": "",
    "images/train/r/run.json": "{}",
    "images/train/x": "to:../..",  # the folder of all, which is looked at once
    "images/train/x.jpg": "pipe:",
    "images/train/y.jpg": "to:/nowhere",
    "images/train/z.heic": "",
    os.fsdecode(b"images/train/\xff.png"): "img:",
    "images/train/._a.jpg": "x",
    "__MACOSX/images/a.jpg": "x",
    "args.yaml": "val: true\ndata: x\n",
}
COUNTED = (
    "1 x .heic (convert HEIC|1 x result of vitdet|1 x folder of a run|1 x pipe|"
    "1 x link that leads nowhere|1 x name that is"
)
TWO_FOLDERS = {
    "Annotations/a.xml": "mv:train/1.xml",
    "JPEGImages/a.jpg": "mv:train/1.jpg",
    "Annotations/b.xml": "mv:valid/1.xml",
    "JPEGImages/b.jpg": "mv:valid/1.jpg",
    "Annotations/c.xml": "mv:train/c.xml",
    "JPEGImages/c.jpg": "mv:train/c.jpg",
}
MACHINE = f"path: /x\ntrain: /x/images/train\nval: 'D:\\y\\images\\val'\n{NAMES}"

# {kind: (changes to the folder, what the notes say, parts of it separated by |)}
READ = {
    "yolo": {
        "as it is": ({}, "1 class without any object: cat"),
        "linked images": ({"images": "ln:../photos"}, ""),
        "labels at the target": (
            {"images/val": "ln:../x/images/val", "labels/val": "mv:../x/labels/val"},
            "",
        ),
        "key points": (labels(POSE) | described(f"kpt_shape: [3, 3]\n{NAMES}"), "key points are"),
        "upright rectangles": (labels("0 .45 .4 .6 .4 .6 .6 .45 .6"), ""),
        "other quadrangles": (labels("0 .45 .4 .6 .41 .65 .6 .42 .57"), ""),
        "names are text": (
            described("names: {0: yes, 1: 010, 2: 1e3, 3: null, 4: 2026-01-02}"),
            "",
        ),
        "no such val": (
            {"data.yaml": f"train: images/train\nval: ../valid/images\n{NAMES}"},
            "data.yaml: nothing at ../valid/images, which it names as val",
        ),
        "another machine": (
            {"data.yaml": MACHINE, "older/images/train/z.jpg": "img:"},
            "D:\\y\\images\\val is found as",
        ),
        "capital folders": (CAPITALS | {"classes.txt": "cat\r\ndog\r\n"}, ""),
        "darknet": (DARKNET, "train.txt: 2 of 2 images are found by their base"),
        "Roboflow, Windows": (
            {
                **{f"{kind}/val": f"mv:valid/{kind}" for kind in ("images", "labels")},
                "data.yaml": f"train: ../images/train\nval: D:\\rf\\valid\\images\n{NAMES}",
            },
            "data.yaml: D:\\rf\\valid\\images is found as",
        ),
        "case of folders": ({"data.yaml": f"train: Images/Train\nval: images/VAL\n{NAMES}"}, ""),
        "case of labels": (
            {"labels/train/a.txt": "mv:labels/train/A.TXT", "labels/old/a.txt": LINE},
            "train: labels of 1 image are found by their base names",
        ),
        "pictures": (
            {
                "images": "mv:JPEGImages",
                "labels": "mv:annotations",
                "data.yaml": f"train: JPEGImages/train\nval: JPEGImages/val\n{NAMES}",
            },
            "train: labels of 2 images are found|val: labels of 1 image are found",
        ),
        "lists": (
            {
                "data.yaml": f"train: t.txt\nval: /x/v.txt\n{NAMES}",
                "t.txt": "a\r\nIMAGES/train/b.JPG\r\n",
                "v.txt": "D:\\x\\images\\val\\c.jpg".encode("utf-16"),
            },
            "t.txt: 2 of 2 images are found by their base names|v.txt: 1 of 1 images",
        ),
        "other names of names": (
            {
                "data.yaml": None,
                "x.data": "train=t.txt\nvalid = v.txt\nnames = x/my.names",
                "my.names": "\ufeffcat\ndog\n",
                "t.txt": "images/train/a.jpg\nimages/train/b.jpg",
                "v.txt": "images/val/c.jpg",
            },
            "",
        ),
        "labelImg": ({"data.yaml": None, "predefined_classes.txt": "cat\ndog\n"}, ""),
        "val is train": (
            {"data.yaml": f"train: images/train\nval: images/train\n{NAMES}"},
            "2 images of val are in train, too",
        ),
        "label without image": ({"labels/train/x.txt": LINE}, "1 label file without image"),
        "image without label": ({"labels/train/a.txt": None}, "train: 1 of 2 images have no label"),
        "lines of Windows": (labels("\t1.0\t5.0E-01 +.5 .5 0.5  \r"), ""),
        "left out": (ODD, COUNTED),
    },
    "coco": {
        "linked": ({"train": "ln:store"}, ""),
        "Windows": (named("train\\a.jpg", "C:\\pics\\B.JPEG"), FOUND),
        "absolute, Label Studio": (named("/x/a.jpg", "/data/local-files/?d=train/b.jpg"), FOUND),
        "percent": ({"train/a.jpg": "mv:train/my a.jpg"} | named("my%20a.jpg", "b.jpg"), "1 of 2"),
        "case": ({"train/a.jpg": "mv:train/A.JPG"}, "a.jpg is train/A.JPG"),
        "NFC": ({"train/a.jpg": "mv:train/e\u0301.jpg"} | named("\u00e9.jpg", "b.jpg"), "1 of 2"),
        "addresses": (named("s3://x/train/a.jpg", "https://x.org/b.jpg?alt=1"), FOUND),
        "blanks, no suffix": (named(" a.jpg ", "x/b"), FOUND),
        "far down": ({"annotations": "mv:x/y/z/annotations"}, ""),
        "predictions beside": (
            {"annotations/results_train.json": '[{"image_id": 1, "score": 0.5}]'},
            "left out: 1 json file of other kinds (first: annotations/results_train.json)",
        ),
        "test without labels": (
            {"annotations/image_info_test.json": '{"images": [], "categories": []}'},
            "kinds",
        ),
        "spelt otherwise": (
            _category(id=9, name="DOG"),
            "classes that differ in their spelling alone: dog, DOG",
        ),
        "no folders": (
            {"train/a.jpg": "mv:train/x/a.jpg", "train/b.jpg": "mv:train/y/b.jpg"},
            FOUND,
        ),
        "LVIS": ({TRAIN: _as_lvis}, ""),
        "Supervisely": (_moved("train", "training") | _moved("val", "validation"), FOUND),
        "BOM": ({VAL: "\ufeff" + json.dumps(content("c.jpg"))}, "as UTF-8 with a byte order mark"),
        "UTF-16": ({VAL: json.dumps(content("c.jpg")).encode("utf-16")}, "is read as UTF-16"),
        "val lacks a class": (_category(id=9, name="cow"), "val has no class cow"),
        "other ids": (
            {VAL: _other_ids},
            "val has other ids of 2 classes: they are matched by name",
        ),
        "only val has it": ({VAL: _with_owl}, "only val has objects of owl"),
        "Roboflow": ({TRAIN: _with_pets, VAL: _with_pets}, "left out: the category pets"),
        "Roboflow, name of a class": (
            _category(id=0, name="dog", supercategory="none"),
            "left out: the category dog",
        ),
        "unnamed images": ({"train/x.jpg": "img:"}, "1 image file that no json names"),
    },
    "voc": {
        "linked": ({"JPEGImages": "ln:../photos"}, ""),
        "xmls, pictures": ({"Annotations": "mv:xmls", "JPEGImages": "mv:pictures"}, ""),
        "capital suffix": ({"Annotations/a.xml": "mv:Annotations/a.XML"}, ""),
        "Windows path": (
            {"JPEGImages/a.jpg": "mv:JPEGImages/x.jpg"}
            | xml(f"<filename>C:\\p\\x.JPG</filename>{OBJECT}"),
            "",
        ),
        "lists": (
            {"ImageSets/Main/train.txt": "a.jpg\nVOC/b.jpg 1\n", "ImageSets/Main/val.txt": "c"},
            "",
        ),
        "lists of segmentation alone": (
            {"ImageSets/Segmentation/train.txt": "a\nb", "ImageSets/Segmentation/val.txt": "c"},
            "",
        ),
        "lists of segmentation beside": (
            {
                "ImageSets/Main/train.txt": "a\nb",
                "ImageSets/Main/val.txt": "c",
                "ImageSets/Segmentation/train.txt": "a",
                "ImageSets/Segmentation/val.txt": "b",
            },
            "left out: 2 lists of a part, since ImageSets/Main has such (first: ImageSets/Segm",
        ),
        "no list": ({"ImageSets/Main/train.txt": "a\n"}, "2 xml files that no list of a part"),
        "lists beside": ({"train.txt": "a\nb\n", "val.txt": "C.JPG"}, ""),
        "no images of a test": (
            {"imagesets/main/test.txt": "x\ny\n", "imagesets/main/train.txt": "a\nb\nc"},
            "test.txt: 2 names without xml",
        ),
        "rest of trainval": (
            {"ImageSets/Main/trainval.txt": "a\nb\nc", "ImageSets/Main/train.txt": "a\nc"},
            "",
        ),
        "empty list": ({"ImageSets/Main/train.txt": "a\nb\nc", "ImageSets/Main/val.txt": ""}, ""),
        "other xml": (
            {"annotations.xml": "<annotations><image/></annotations>"},
            "left out: 1 xml file of other kinds (first: annotations.xml)",
        ),
        "percent": (
            {
                "JPEGImages/a.jpg": "mv:JPEGImages/a 1.png",
                "Annotations/a.xml": "mv:Annotations/a%201.xml",
            },
            "",
        ),
        "namespace": ({"Annotations/a.xml": f'<annotation xmlns="x">{OBJECT}</annotation>'}, ""),
        "parts": (xml(OBJECT.replace("</o", f"<part><name>head</name>{BOX}</part></o")), ""),
        "image without xml": ({"JPEGImages/x.jpg": "img:"}, "1 image without xml"),
        "one name in two folders": (TWO_FOLDERS, ""),
        "gb2312": (xml(OBJECT.replace("cat", "方块"), GBK, "gbk"), ""),
        "UTF-16": (xml(OBJECT, '<?xml version="1.0" encoding="utf-16"?>', "utf-16"), ""),
        "deep": (xml("<a>" * 200_000 + "</a>" * 200_000 + OBJECT), ""),
    },
}
# Class names and numbers of objects where they are not those of the builders.
EXPECTED = {
    "names are text": (("yes", "010", "1e3", "null", "2026-01-02"), 3),
    "no such val": (("cat", "dog"), 2),
    "spelt otherwise": (("cat", "dog", "DOG"), 3),
    "val is train": (("cat", "dog"), 4),
    "image without label": (("cat", "dog"), 2),
    "val lacks a class": (("cat", "dog", "cow"), 3),
    "only val has it": (("cat", "dog", "owl"), 3),
    "no list": (("cat",), 1),
    "gb2312": (("cat", "方块"), 3),
}


def objects(found):
    return sum(len(part.content["annotations"]) for part in found.parts.values())


@pytest.mark.parametrize(("form", "kind"), [(form, kind) for form in READ for kind in READ[form]])
def test_is_read_and_said(tmp_path, form, kind):
    folder = tmp_path / "data"
    FORMS[form](folder)
    changes, notes = READ[form][kind]
    change(folder, changes)
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    found = find_data(folder)
    default = (("cat",) if form == "voc" else ("cat", "dog"), 3)
    assert (class_names(found), objects(found)) == EXPECTED.get(kind, default)
    assert all(note in "\n".join(found.notes) for note in notes.split("|")), found.notes
    for part in found.parts.values():
        used = {each["category_id"] for each in part.content["annotations"]}
        assert used <= {each["id"] for each in part.content["categories"]}
        for each in part.content["images"]:
            assert (part.images / each["file_name"]).is_file()
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("json_file", "images", "name"),
    [
        ("instances_{}.json", "images/{}", "{}"),
        ("annotations/instances_{}2017.json", "{}2017", "{}"),
        ("{}/_annotations.coco.json", "{}", "{}"),
        ("{}/labels.json", "{}/data", "data/{}"),  # relative to the json
        ("{}.json", ".", "{}"),
    ],
)
def test_coco_is_used_as_it_is(tmp_path, json_file, images, name):
    for split in ("train", "val"):
        image(tmp_path / images.format(split) / f"{split}.jpg")
        text = json.dumps(content(name.format(f"{split}.jpg")))
        change(tmp_path, {json_file.format(split): text})
    prepared = prepare_data(tmp_path, tmp_path / "run")
    for split, part in (("train", prepared.train), ("val", prepared.val)):
        assert part[0] == str(tmp_path / json_file.format(split))
        (record,) = coco_dataset(*part).records
        assert Path(record["file_name"]).is_file()
    assert not (tmp_path / "run").exists()


def test_boxes_are_right(tmp_path):
    for form, box in (("yolo", [10, 5, 20, 10]), ("voc", [0, 1, 10, 19])):
        FORMS[form](tmp_path / form)
        part = next(iter(find_data(tmp_path / form).parts.values()))
        assert [each["bbox"] for each in part.content["annotations"]][:2] == [box, box]
    change(tmp_path / "yolo", labels(POSE) | described(f"kpt_shape: [3, 3]\n{NAMES}"))
    each = find_data(tmp_path / "yolo").parts["train"].content["annotations"][0]
    assert (each["bbox"], each["category_id"], "segmentation" in each) == ([12, 6, 16, 8], 1, False)
    change(tmp_path / "voc", xml(OBJECT.replace("<xmin>1<", "<xmin>0<")))
    found = find_data(tmp_path / "voc")
    assert found.parts["all"].content["annotations"][0]["bbox"] == [0, 2, 10, 18]
    assert "a box begins at 0, so all are read as counted from 0" in found.notes
    exif = Image.Exif()
    exif[0x0112] = 6
    image(tmp_path / "yolo/images/train/a.jpg", exif=exif)
    part = find_data(tmp_path / "yolo").parts["train"]
    assert (part.content["images"][0]["height"], part.content["images"][0]["width"]) == SIZE
    assert part.content["annotations"][0]["bbox"] == [6, 12, 8, 16]


def test_polygons_masks_and_flags(tmp_path):
    def objects_of(folder):
        return next(iter(find_data(folder).parts.values())).content["annotations"]

    yolo(tmp_path / "yolo")
    change(tmp_path / "yolo", labels("0 .1 .1 .5 .1 .5 .5"))
    polygon = {"bbox": [4, 2, 16, 8], "segmentation": [[4, 2, 20, 2, 20, 10]]}
    assert objects_of(tmp_path / "yolo")[0].items() >= polygon.items()
    folder = tmp_path / "voc"
    voc(folder)
    for flag, crowd in (("1", 1), ("0", 0), ("", 0), ("Unspecified", 0), ("true", 1)):
        change(folder, xml(OBJECT.replace("</o", f"<difficult>{flag}</difficult></o")))
        assert objects_of(folder)[0]["iscrowd"] == crowd
    points = "<x1>2</x1><y1>3</y1><x2>9</x2><y2>3</y2><x3>9</x3><y3>12</y3>"
    change(folder, xml(OBJECT.replace("</o", f"<polygon>{points}</polygon></o")))
    assert objects_of(folder)[0]["segmentation"] == [[1, 2, 8, 2, 8, 11]]
    # masks by the numbers of objects, where all images have them; 255 is none
    change(folder, {"SegmentationObject/a.png": "img:", **xml(OBJECT * 2)})
    assert any("masks of 1 of 3 images" in note for note in find_data(folder).notes)
    pixels = np.zeros(SIZE[::-1], dtype=np.uint8)
    pixels[5:9, 3:7], pixels[0] = 1, 255
    for name in "abc":
        Image.fromarray(pixels).save(folder / f"SegmentationObject/{name}.png")
    found = find_data(folder)
    assert "left out: 1 object hidden by others in SegmentationObject" in found.notes
    for each in objects_of(folder):
        assert np.array_equal(mask_util.decode(each["segmentation"]), pixels == 1)
    change(folder, {"SegmentationObject/a.png": "img:"})
    with pytest.raises(InputError, match=r"a\.png: expected 20 x 40 pixels .*of 2 objects"):
        find_data(folder)


def test_images_elsewhere(tmp_path, monkeypatch):
    for form, build in FORMS.items():
        build(tmp_path / form)
    image(tmp_path / "old/a.jpg")  # an absolute name does not win over the folder that was named
    here = str(tmp_path / "old/a.jpg")
    change(tmp_path / "coco", {"train": "mv:../pictures/train", **named(here, "b.jpg")})
    image(tmp_path / "pictures/c.jpg")
    found = find_data(tmp_path / "coco", images=tmp_path / "pictures")
    assert found.parts["train"].content["images"][0]["file_name"] == "train/a.jpg"
    assert objects(found) == 3
    change(tmp_path / "voc", {"JPEGImages": "mv:../store"})
    assert objects(find_data(tmp_path / "voc", images=tmp_path / "store")) == 3
    change(tmp_path / "yolo", {"images": "mv:../photos", "data.yaml": None})
    change(tmp_path / "yolo", {"classes.txt": "cat\ndog\n"})
    monkeypatch.chdir(tmp_path)
    found = find_data(tmp_path / "yolo", images=Path("photos"))
    assert (set(found.parts), objects(found)) == ({"train", "val"}, 3)


def test_nothing_is_guessed(tmp_path):
    coco(tmp_path)
    # an id that only another part has stays wrong
    change(tmp_path, _category(id=9, name="cow"))
    change(tmp_path, {VAL: lambda values: values["annotations"][0].update(category_id=9)})
    with pytest.raises(InputError, match=r"1 x unknown category id.*'9 of val'"):
        prepare_data(tmp_path, tmp_path / "run")
    # Roboflow's category is a class where an object is of it
    coco(tmp_path)
    change(tmp_path, {TRAIN: _with_pets, VAL: _with_pets})
    change(tmp_path, {TRAIN: lambda values: values["annotations"][0].update(category_id=0)})
    assert class_names(find_data(tmp_path)) == ("pets", "cat", "dog")
    # a name that may mean two files is none of them
    coco(tmp_path)
    change(tmp_path, {"train/a.jpg": "mv:train/x/a.jpg", "train/y/a.jpg": "img:"})
    part = find_data(tmp_path).parts["train"]
    assert [each["file_name"] for each in part.content["images"]] == ["a.jpg", "b.jpg"]
    with pytest.raises(InputError, match="missing image"):
        coco_dataset(*prepare_data(tmp_path, tmp_path / "run/data").train)
    # nor is one file taken for two images
    change(tmp_path, named("one/b.jpg", "two/b.jpg"))
    with pytest.raises(InputError, match=r"expected a folder that holds one/b\.jpg"):
        find_data(tmp_path)


def test_paths_on_the_command_line(tmp_path, monkeypatch):
    coco(tmp_path / "data")
    yolo(tmp_path / "yolo")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for good in ("~/data", f"file://{tmp_path}/data", "data/annotations/../", "yolo/data.yaml"):
        assert objects(find_data(Path(good))) == 3
    change(tmp_path, {"pipe": "pipe:", "loop": "to:loop", "x.zip": b"PK\x03\x04", "x.csv": "a,b"})
    for path, wanted in {
        "none": "data: expected a folder none, got nothing at this path. Check the path.",
        "data ": r"Did you mean 'data'\?",
        "data\\": "Did you mean 'data/'",
        "https://x.org/d.zip": "Download it first",
        "pipe": "pipe: expected a file, got a folder, pipe or device",
        "loop": "got a link that leads nowhere",
        "x.zip": "got an archive .unpack it and give the folder",
        "x.csv": r"x\.csv: expected json, got text that is not",
        "x" * 5000: "nothing at this path",
    }.items():
        with pytest.raises(InputError, match=wanted):
            find_data(Path(path))
