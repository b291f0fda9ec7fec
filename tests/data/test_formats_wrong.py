"""Data that cannot be read: one line that says where, what came, and what to do."""

import json
import re

import pytest
from folders import (
    FORMS,
    LINE,
    OBJECT,
    TRAIN,
    VAL,
    change,
    content,
    described,
    image,
    labels,
    named,
    xml,
    yolo,
)

from vitdet.data.formats import find_data
from vitdet.utils.checks import InputError

POSE = "0 0.5 0.5 0.4 0.4 0.4 0.4 {v}0.6 0.45 {v}0.42 0.6{w}"
DECLARED = '<?xml version="1.0" encoding="{}"?>'
DTD = '<!DOCTYPE x [<!ENTITY a "aa"><!ENTITY b "&a;&a;">]>'
OPEN = '{"images": [], "categories": '
A_TXT, A_XML = "labels/train/a.txt", "Annotations/a.xml"
SHAPE = described("kpt_shape: [5, 2]\nnames: [a, b]")
TWO_YEARS = {
    "Annotations/a.xml": "mv:V1/Annotations/a.xml",
    "Annotations": "mv:V2/Annotations",
}


def _yaml(text, **files):
    return {"data.yaml": text, **{f"{name}.txt": lines for name, lines in files.items()}}


def _of_another_task(**values):
    return {VAL: lambda content: [each.update(values) for each in content["annotations"]]}


WRONG = {
    "yolo": {
        "class": (labels("2 .5 .5 .5 .5"), r"a\.txt, line 2: .*number from 0 to 1, got 2"),
        "score": (labels("0 .5 .5 .5 .5 .9"), "got 6 numbers .a sixth is a score;"),
        "oriented boxes": (labels("0 .45 .4 .6 .41 .6 .6 .45 .59"), "look like an oriented box"),
        "score of a polygon": (labels("0 .1 .1 .5 .1 .5 .5 .9"), "got 8 numbers"),
        "pixels": (labels("0 20 10 10 10"), "parts of the image's sides, 0 to 1, got 20 .pix"),
        "name": (labels("cat .5 .5 .5 .5"), "that of the class and not its name, got 'cat"),
        "key points": (labels(POSE.format(v="", w="")), r"3 key points.*`kpt_shape: \[3, 2\]`"),
        "visibility": (labels(POSE.format(v="2 ", w=" 0")), r"3 key points.*`kpt_shape: \[3, 3\]`"),
        "kpt_shape": (
            labels(POSE.format(v="", w="")) | SHAPE,
            "5 x 2 numbers, as .*got 11 numbers",
        ),
        "no names": (described(""), r"data\.yaml: names: expected \[name.*got .no such key"),
        "gap": (described("names: {0: a, 2: b}"), r"names: expected \[name.*got \{'0': 'a', '2'"),
        "nc": (described("nc: 3\nnames: [a]\n"), "expected 3 names, as nc says, got 1"),
        "name twice": (described("names: [a, a]\n"), "that differ, got 'a' twice"),
        "no folder": (_yaml("train: q\nnames: [a]"), "train: expected a folder.*nothing at q"),
        "references": (described("names: &a [x, y]\nother: [*a, *a]\n"), "holds references"),
        "deep": (described(f"names: {'[' * 1000}"), "text nested too deep"),
        "GBK": ({"data.yaml": "names: [方块]\ntrain: x".encode("gbk")}, "Save it as UTF-8"),
        "two yaml": (
            {"data.yaml": "mv:x.yaml", "y.yaml": "train: x\nnames: [a]"},
            r"expected one yaml of a data set, got x\.yaml, y\.yaml",
        ),
        "line of a list": (
            _yaml("train: l.txt\nnames: [a, b]", l="images/train/a.jpg\n\nq.jpg"),
            r"l\.txt, line 3: expected an image file, got q\.jpg",
        ),
        "two of a name": ({"images/train/a.png": "img:"}, r"got a\.jpg and a\.png"),
        "pipe": ({A_TXT: "pipe:"}, r"a\.txt: expected a file, got a folder, pipe"),
        "dead link": ({A_TXT: "to:/nowhere"}, "a link that leads nowhere"),
        "no classes": ({"data.yaml": None}, r"There are \d x \.txt in labels/train/, and no na"),
    },
    "voc": {
        "no box": (xml("<object><name>cat</name></object>"), r"a\.xml: expected <bndbox>.*got no"),
        "no side": (xml(OBJECT.replace("ymin", "y")), r"in <ymin> of <bndbox>, got no such elem"),
        "not closed": (
            xml("<object>"),
            r"a\.xml: expected complete xml, .*\(mismatched tag: line 1",
        ),
        "empty": ({A_XML: ""}, r"a\.xml: expected complete xml, .*got an empty file"),
        "entities": (xml("&b;", DTD), "got declarations"),
        "unknown encoding": (xml(OBJECT, DECLARED.format("x-none")), "or what it declares.*x-none"),
        "no image": ({"JPEGImages/a.jpg": None}, r"a\.xml: expected an image .* a\.\* .*got none"),
        "dead link": ({"JPEGImages/a.jpg": "to:/nowhere"}, r"a\.xml: expected an image .*got none"),
        "oriented boxes": (xml(OBJECT.replace("bndbox", "robndbox")), "got oriented boxes .<rob"),
        "one image twice": (
            {"JPEGImages/a.jpg": None} | xml(f"<filename>b.jpg</filename>{OBJECT}"),
            r"a\.xml: expected an image of its own, a\.\* \(or b\.jpg, as <filename> says\)",
        ),
        "list": ({"ImageSets/Main/train.txt": "a\nq\n"}, r"train\.txt, line 2: .*got 'q'"),
        "no objects": ({"Annotations/*.xml": "<annotation/>"}, "got none in its xml files"),
        "two years": (TWO_YEARS, "expected one data set, got V1 and V2"),
    },
    "coco": {
        "cut": ({TRAIN: json.dumps(content("a.jpg"))[:-30]}, r"train\.json: expected json, got .*"),
        "LFS": ({VAL: "version https://git-lfs.github.com/spec/v1"}, "Git LFS.*git lfs pull"),
        "web page": ({VAL: "\n<!DOCTYPE html><html>"}, "got a web page"),
        "deep": ({VAL: OPEN + "[" * 200_000}, "nested too deep"),
        "endless number": ({VAL: OPEN + "1" * 5000}, "expected json, got text that is not"),
        "pipe": ({VAL: "pipe:"}, r"val\.json: expected a file, got a folder, pipe"),
        "no list": ({TRAIN: lambda c: c.update(annotations=3)}, 'list "annotations" of .*got 3'),
        "no images": ({"*/*.jpg": None}, r"expected a folder that holds a\.jpg.*--images"),
        "latin": (
            {VAL: json.dumps(content("c.jpg")).replace("cat", "caf\xe9").encode("latin1")},
            r"val\.json: expected text in UTF-8, got bytes that are none .*Save it as UTF-8",
        ),
        "captions": (_of_another_task(caption="a cat"), "labels of objects, got captions"),
        "panoptic": (_of_another_task(segments_info=[]), "got panoptic segments"),
        "turned": (_of_another_task(bbox=[20, 10, 9, 8, 0.5]), "got oriented boxes"),
        "corners": (_of_another_task(bbox=[1, 2, 9, 2, 9, 9, 1, 9]), "got oriented boxes"),
        "pose": (_of_another_task(keypoints=[1, 2, 2], bbox=None), "got key points without boxes"),
        "predictions": (_of_another_task(score=0.7), r"got predictions \(each has a score"),
        "two of a part": (
            {"annotations/instances_train_2.json": json.dumps(content("a.jpg"))},
            r"one annotation file for train, got annotations/instances_train\.json and",
        ),
        "part of no name": (
            {"annotations/instances_x.json": json.dumps(content("a.jpg"))},
            r"expected parts whose names say train or val, got .*instances_x\.json",
        ),
        "other classes": (
            {VAL: lambda c: c.update(categories=[{"id": 2, "name": "owl"}])},
            r"val\.json: expected the categories of .*got 'owl' instead of 'cat'",
        ),
        "spelling": ({VAL: lambda c: c["categories"][0].update(name="Cat")}, "got 'Cat' instead"),
        "no names": (named("a\0.jpg", "\ud800.jpg"), "expected a folder that holds"),
        "two formats": (
            described("names: [a]") | {"images/train/a.jpg": "img:", A_TXT: LINE},
            r"got COCO json \(annotations/.*\) and YOLO text labels \(data\.yaml\)\. Choose with",
        ),
    },
}


@pytest.mark.parametrize(("form", "kind"), [(form, kind) for form in WRONG for kind in WRONG[form]])
def test_is_an_error_of_one_line(tmp_path, form, kind):
    FORMS[form](tmp_path)
    changes, wanted = WRONG[form][kind]
    change(tmp_path, changes)
    with pytest.raises(InputError) as caught:
        find_data(tmp_path)
    assert re.search(wanted, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


# (suffix, begin of a file, whose it is)
FOREIGN = [
    ("json", '{"version": "5", "shapes": [], "imagePath": "a.jpg"}', "labelme.*labelme2coco"),
    ("json", '[{"annotations": [{"result": [{"from_name": "x"}]}]}]', "Label Studio"),
    ("json", '[{"label": [{"x": 1, "original_width": 40}]}]', "Label Studio"),
    ("json", '[{"image_id": 1, "bbox": [], "score": 1}]', "results of a detector"),
    ("json", '{"a": {"regions": [{"shape_attributes": {}}]}}', "VGG Image Annotator"),
    ("csv", "filename,region_shape_attributes\n", "VGG Image Annotator"),
    ("csv", "filename,width,height,class,xmin,ymin\n", "a table"),
    ("json", '{"tags": [], "objects": []}', "Supervisely"),
    ("json", '[{"annotations": [{"coordinates": {}}]}]', "CreateML"),
    ("ndjson", '{"data_row": {}}', "Labelbox"),
    ("json", '{"assets": {"a": {"regions": []}}}', "VoTT"),
    ("json", '[{"labels": [{"box2d": {}}]}]', "BDD100K"),
    ("json", '{"categories": {"labels": []}, "items": [{"annotations": []}]}', "Datumaro"),
    ("json", '{"imgHeight": 2, "objects": []}', "Cityscapes"),
    ("xml", "<annotations>\n<image id='0'/></annotations>", "CVAT for images"),
    ("xml", "<dataset><images><image file='a'/></images></dataset>", "dlib"),
    ("txt", "10 5 20 5 20 15 10 15 plane 0\n", "DOTA, oriented boxes"),
    ("txt", "Car 0.0 0 -1.6 587 173 614 200 1.6 1.7 3.6 -0.6 1.7 46 -1.6\n", "KITTI"),
    ("txt", "684,8,273,116,0,0,0,0\n", "rows with commas"),
    ("json", "version https://git-lfs.github.com/spec/v1", "Git LFS"),
]


@pytest.mark.parametrize(("suffix", "text", "tool"), FOREIGN)
def test_labels_of_other_tools_are_named(tmp_path, suffix, text, tool):
    change(tmp_path, {"a.jpg": "img:", f"a.{suffix}": text})
    with pytest.raises(InputError, match=rf"got .*1 x .{suffix}.* a.{suffix} is .*{tool}"):
        find_data(tmp_path)


def test_a_folder_of_no_format_says_what_was_looked_for_and_what_is_near(tmp_path):
    image(tmp_path / "a.jpg")
    change(tmp_path, {"notes/x.md": ""})
    with pytest.raises(InputError, match=r"expected json files .* got notes/, 1 x \.jpg\. Give"):
        find_data(tmp_path)
    yolo(tmp_path / "inside")
    (tmp_path / "empty").mkdir()
    change(tmp_path, {"zip/x.zip": "", "cvat/a.xml": "<annotations><image/></annotations>"})
    for name, wanted in {
        ".": r"There is inside/data\.yaml: give .*inside\.",
        "zip": r"got 1 x \.zip\.",
        "cvat": r"got 1 x \.xml\. a\.xml is of CVAT for images: export it as COCO",
        "empty": "got an empty folder",
    }.items():
        with pytest.raises(InputError, match=wanted):
            find_data(tmp_path / name)
