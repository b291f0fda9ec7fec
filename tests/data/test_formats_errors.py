"""Data that are wrong: one line that says where, in each format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vitdet.data.formats import find_data
from vitdet.utils.checks import InputError


def _image(path: Path, size: tuple[int, int] = (40, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path)
    return path


def _text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def _yolo(folder: Path, line: str = "0 0.5 0.5 0.5 0.5") -> Path:
    """One image with one label line after an empty one."""
    _image(folder / "train/images/a.jpg")
    _text(folder / "data.yaml", "train: train/images\nnames: [cat, dog]\n")
    _text(folder / "train/labels/a.txt", f"\n{line}\n")
    return folder


def _voc(folder: Path, item: str) -> Path:
    _image(folder / "JPEGImages/a.jpg")
    _text(folder / "Annotations/a.xml", f"<annotation>\n<object>\n{item}\n</object>\n</annotation>")
    return folder


_BOX = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>10</xmax><ymax>20</ymax></bndbox>"


def _error(folder: Path, text: str, **options: str) -> None:
    with pytest.raises(InputError, match=text) as caught:
        find_data(folder, **options)
    assert "\n" not in str(caught.value)


def test_a_folder_of_no_format_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    _image(tmp_path / "a.jpg")
    _image(tmp_path / "b.jpg")
    _text(tmp_path / "notes/x.md", "")
    _error(
        tmp_path,
        r"expected json files .* or a data\.yaml or classes\.txt .* or xml files .*, "
        r"got notes/, 2 x \.jpg\. Give the folder",
    )
    (tmp_path / "empty").mkdir()
    _error(tmp_path / "empty", "got an empty folder")
    _error(tmp_path / "none", "data: expected a folder .*none, got nothing at this path")


def test_a_folder_of_two_formats_asks_which(tmp_path: Path) -> None:
    _yolo(_voc(tmp_path, f"<name>cat</name>{_BOX}"))
    _error(
        tmp_path,
        r"got YOLO text labels \(data\.yaml\) and Pascal VOC xml \(Annotations\)\. "
        "Choose with --format yolo or --format voc",
    )
    assert find_data(tmp_path, "yolo").class_names == ("cat", "dog")
    assert find_data(tmp_path, "voc").class_names == ("cat",)
    _error(tmp_path, "expected json files .*got Annotations/, JPEGImages/", form="coco")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("2 0.5 0.5 0.5 0.5", "expected a class number from 0 to 1, got 2"),
        ("-1 0.5 0.5 0.5 0.5", "expected a class number from 0 to 1, got -1"),
        ("0.5 0.5 0.5 0.5 0.5", "expected a class number from 0 to 1, got 0.5"),
        ("0 0.5 0.5 0.5", "expected a class and x y width height, .*got 4 numbers"),
        ("0 0.5 0.5 0.5 0.5 0.9", "got 6 numbers.*the score of a prediction"),
        ("0 0.1 0.1 0.5 0.5 0.9 0.9 0.2", "got 8 numbers"),
        ("0 0.5 left 0.5 0.5", "expected finite numbers, got 'left'"),
        ("0 0.5 nan 0.5 0.5", "expected finite numbers, got 'nan'"),
        ("0 20 10 10 10", "expected parts of the image's sides, 0 to 1, got 20. Divide pixels"),
        ("cat 0.5 0.5 0.5 0.5", "expected finite numbers, got 'cat'"),
    ],
)
def test_yolo_lines(tmp_path: Path, line: str, text: str) -> None:
    _error(_yolo(tmp_path, line), rf"labels/a\.txt, line 2: .*{text}")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("train: train/images\n", r"data\.yaml: names: expected a list .*got no such key"),
        ("train: train/images\nnames: 3\n", r"names: expected a list of class names.*got 3"),
        ("train: train/images\nnames: {1: a}\n", r"names: expected a list.*got \{1: 'a'\}"),
        ("train: train/images\nnc: 3\nnames: [a]\n", "expected 3 names, as nc says, got 1"),
        ("train: elsewhere\nnames: [a]\n", r"data\.yaml: train: expected a folder.*elsewhere"),
        ("train: [\n", r"data\.yaml: expected YAML, got text that is not"),
        ("val: train/images\nnames: [a, b]\n", "images to train on, got YOLO .* with val only"),
    ],
)
def test_yolo_yamls(tmp_path: Path, content: str, text: str) -> None:
    _text(_yolo(tmp_path) / "data.yaml", content)
    _error(tmp_path, text)


def test_yolo_images(tmp_path: Path) -> None:
    _yolo(tmp_path)
    _image(tmp_path / "train/images/a.png")
    _error(tmp_path, r"names that differ by more than their suffix.*got a\.jpg and a\.png")
    (tmp_path / "train/images/a.png").unlink()
    (tmp_path / "train/images/a.jpg").write_bytes(b"no image")
    _error(tmp_path, r"image .*a\.jpg: expected an image file, got UnidentifiedImageError")


def test_yolo_reads_sizes_upright_and_takes_what_roboflow_and_lists_say(tmp_path: Path) -> None:
    _yolo(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "train/images/a.jpg", exif=exif)
    (part,) = find_data(tmp_path).parts.values()
    (image,) = part.content["images"]
    assert (image["height"], image["width"]) == (40, 20)
    assert part.content["annotations"][0]["bbox"] == [5, 10, 10, 20]
    _text(tmp_path / "list.txt", "./train/images/a.jpg\n")
    _text(tmp_path / "data.yaml", "train: ../list.txt\nnames: {0: cat, 1: dog}\n")
    assert find_data(tmp_path).parts["train"].content == part.content
    _text(tmp_path / "list.txt", "./train/images/a.jpg\n\n./b.jpg\n")
    _error(tmp_path, r"list\.txt, line 3: expected an image file, got \./b\.jpg")


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (f"<name>cat</name><pose>{_BOX}", r"line 4: expected xml, .*mismatched tag"),
        ("<name>cat</name>", r"line 2: expected <bndbox> in <object>, got none"),
        (_BOX, r"line 2: expected <name> in <object>, got none"),
        (f"<name></name>{_BOX}", r"line 2: expected <name> in <object>, got none"),
        ("<name>a</name><bndbox><xmin>1</xmin></bndbox>", r"line 3: expected <ymin> in <bndbox>"),
        (
            f"<name>a</name>\n{_BOX.replace('20', 'x')}",
            r"line 4: expected a number in <ymax>, got 'x'",
        ),
        (
            f"<name>a</name>{_BOX}\n<polygon><x1>1</x1><y1>1</y1></polygon>",
            r"line 4: expected <x1>, <y1>, <x2>, <y2> and so on .*got x1, y1",
        ),
    ],
)
def test_voc_files(tmp_path: Path, item: str, text: str) -> None:
    _error(_voc(tmp_path, item), rf"Annotations/a\.xml, {text}")


def test_voc_images_and_lists(tmp_path: Path) -> None:
    _voc(tmp_path, f"<name>cat</name>{_BOX}")
    _text(tmp_path / "ImageSets/Main/train.txt", "a\nb\n")
    _error(tmp_path, r"Main/train\.txt, line 2: expected .*b\.xml, got no such file")
    _text(tmp_path / "ImageSets/Main/train.txt", "a 1\n")
    assert set(find_data(tmp_path).parts) == {"train"}
    (tmp_path / "JPEGImages/a.jpg").rename(tmp_path / "JPEGImages/c.jpg")
    _error(tmp_path, r"a\.xml: expected an image a\.\*.*got none in the data folder")


def test_voc_in_a_devkit(tmp_path: Path) -> None:
    item = f"<name>cat</name>{_BOX}"
    _voc(tmp_path / "VOCdevkit/VOC2012", item)
    _text(tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/trainval.txt", "a\n")
    (part,) = find_data(tmp_path).parts.values()
    assert part.split == "all"
    assert (part.images / part.content["images"][0]["file_name"]).is_file()
    _voc(tmp_path / "VOCdevkit/VOC2007", item)
    _error(tmp_path, r"one data set, got VOCdevkit/VOC2007/Annotations and VOCdevkit/VOC2012/Anno")
    _text(tmp_path / "VOCdevkit/VOC2012/ImageSets/Main/test.txt", "a\n")
    parts = find_data(tmp_path / "VOCdevkit/VOC2012").parts
    assert set(parts) == {"test", "train"}  # trainval is what is not test


def test_voc_boxes_count_from_1_unless_one_begins_at_0(tmp_path: Path) -> None:
    _voc(tmp_path, f"<name>cat</name>{_BOX}")
    box = find_data(tmp_path).parts["all"].content["annotations"][0]["bbox"]
    assert box == [0, 1, 10, 19]
    _voc(tmp_path, f"<name>cat</name>{_BOX.replace('<xmin>1<', '<xmin>0<')}")
    box = find_data(tmp_path).parts["all"].content["annotations"][0]["bbox"]
    assert box == [0, 2, 10, 18]


def test_voc_polygons_and_masks(tmp_path: Path) -> None:
    points = [(2, 3), (9, 3), (9, 12)]
    polygon = "".join(f"<x{i}>{x}</x{i}><y{i}>{y}</y{i}>" for i, (x, y) in enumerate(points, 1))
    _voc(tmp_path, f"<name>cat</name>{_BOX}<polygon>{polygon}</polygon>")
    (each,) = find_data(tmp_path).parts["all"].content["annotations"]
    assert each["segmentation"] == [[1, 2, 8, 2, 8, 11]]
    _image(tmp_path / "SegmentationObject/a.png", (30, 20))
    _error(tmp_path, r"SegmentationObject/a\.png: expected 20 x 40 pixels .*of 1 objects")


def _coco(folder: Path, name: str, **changes: object) -> Path:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 20}],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }
    return _text(folder / name, json.dumps({**content, **changes}))


def test_coco_files(tmp_path: Path) -> None:
    path = _coco(tmp_path, "train.json")
    _error(
        tmp_path, r"images of .*train\.json: expected a folder that holds a\.jpg, got no such file"
    )
    _image(tmp_path / "images/a.jpg")
    assert find_data(tmp_path).parts["train"].images == tmp_path / "images"
    _coco(tmp_path, "train_small.json")
    _error(tmp_path, r"one annotation file for train, got train\.json and train_small\.json")
    (tmp_path / "train_small.json").unlink()
    _coco(tmp_path, "other.json")
    _error(tmp_path, r"expected parts whose names say train or val, got other\.json, train\.json")
    (tmp_path / "other.json").unlink()
    _coco(tmp_path, "val.json", categories=[{"id": 1, "name": "dog"}])
    _error(
        tmp_path, r"val\.json: expected the categories of .*got 'dog' with id 1 instead of 'cat'"
    )
    (tmp_path / "val.json").unlink()
    text = path.read_text()
    path.write_text(text[:-30])
    _error(tmp_path, r"train\.json: expected json, got text that is not \(.*char \d+\)")
    path.write_text(text.replace('"annotations": []', '"annotations": 3'))
    _error(tmp_path, r'expected a list "annotations" of objects \(COCO format\), got 3')
