"""The checker finds what was planted, and nothing in clean data; the repaired copy is clean."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from other_formats import COCO_MINI, Source, write_voc, write_yolo
from PIL import Image
from planted import CLEAN_NOTES, Planted

from vitdet.data.checking import KINDS, Checked, check_data
from vitdet.data.checking.pictures import look_at, similar
from vitdet.data.checking.repair import write_repaired
from vitdet.data.datasets import coco_dataset
from vitdet.data.formats import find_data
from vitdet.utils.checks import InputError

pytestmark = pytest.mark.skipif(
    not COCO_MINI.is_dir(), reason=f"no photographs in {COCO_MINI} (set VITDET_COCO_MINI)"
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted(tmp_path_factory.mktemp("planted") / "data")


@pytest.fixture(scope="module")
def checked(planted: Planted) -> Checked:
    return check_data(find_data(planted.folder))


def test_clean_data_have_notes_only() -> None:
    found = check_data(find_data(COCO_MINI))
    assert found.faults == []
    assert found.counts() == CLEAN_NOTES
    grey = next(each for each in found.findings if each.kind == "grey image")
    assert (grey.split, grey.image_id) == ("train", 86)
    empty = {each.image_id for each in found.findings if each.kind == "image without annotations"}
    assert empty == {508, 58636}


def test_every_kind_is_planted_and_found_as_often(planted: Planted, checked: Checked) -> None:
    assert set(planted.counts) == set(KINDS)
    assert sum(KINDS[kind].severity == "fault" for kind in KINDS) >= 25
    assert dict(checked.counts()) == dict(planted.counts)


def test_findings_say_where_and_what(planted: Planted, checked: Checked) -> None:
    by_kind = {each.kind: each for each in checked.findings}
    assert by_kind["same image twice"].where.endswith("(copy.jpg)")
    assert "has the same bytes" in by_kind["image in two parts"].got
    assert by_kind["image in two parts"].where.endswith("(of_val.jpg)")
    assert by_kind["similar images in two parts"].where.endswith("(like_val.jpg)")
    assert by_kind["unknown image id"].got == "1000000000"
    assert "is truncated" in by_kind["damaged image"].got
    assert "IoU" in by_kind["mask and box disagree"].got
    annotations = planted.train["annotations"]
    for kind in ("crowd polygon", "wrong iscrowd", "ignore flag"):
        place = by_kind[kind].place
        assert place is not None
        assert annotations[place]["iscrowd"] or annotations[place].get("ignore")


def test_faults_that_stop_a_training_are_those_of_the_reader(planted: Planted) -> None:
    path = planted.folder / "annotations" / "instances_train.json"
    with pytest.raises(InputError, match="categories with one name each"):
        coco_dataset(path, planted.folder / "train")


@pytest.fixture(scope="module")
def repaired(checked: Checked, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("repaired") / "copy"
    write_repaired(checked, output)
    return output


def test_the_repaired_copy_is_clean(planted: Planted, repaired: Path) -> None:
    again = check_data(find_data(repaired))
    assert again.faults == []
    assert again.counts()["image without annotations"] >= 2
    # gone: a missing, a damaged one, one that is none; joined or doubled: none of those added but
    # the one that only looks like another
    assert len(again.data.parts["train"].content["images"]) == 100 - 3 + 1
    assert len(again.data.parts["val"].content["images"]) == 34
    for split in ("train", "val"):
        json_file = repaired / "annotations" / f"instances_{split}.json"
        assert len(coco_dataset(json_file, repaired / split).class_names) == 80


def test_repairs_are_listed(planted: Planted, repaired: Path) -> None:
    listed = Counter(each["kind"] for each in json.loads((repaired / "repairs.json").read_text()))
    for kind, count in planted.counts.items():
        if KINDS[kind].severity == "fault":
            assert listed[kind] >= min(count, 1), kind
    drops = [
        each["kind"]
        for each in json.loads((repaired / "repairs.json").read_text())
        if each["done"] == "left out"
    ]
    # without a mask to take the box from, or of nothing that is there
    assert Counter(drops)["unknown category id"] == 1
    assert Counter(drops)["box outside"] == 1
    assert "mask and box disagree" not in drops


def test_what_a_repair_makes_of_labels_and_files(
    planted: Planted, checked: Checked, repaired: Path
) -> None:
    content = json.loads((repaired / "annotations/instances_train.json").read_text())
    ours = {each["id"]: each for each in content["annotations"]}
    before = {each["id"]: each for each in planted.train["annotations"]}
    images = {each["id"]: each for each in content["images"]}
    for each in checked.findings:
        if each.place is None or KINDS[each.kind].severity == "note":
            continue
        number = planted.train["annotations"][each.place]["id"]
        if each.kind == "box outside" and number in ours:
            x, y, width, height = ours[number]["bbox"]
            image = images[each.image_id]
            assert x >= 0
            assert y >= 0
            assert x + width <= image["width"]
            assert y + height <= image["height"]
        if each.kind == "crowd polygon":
            assert ours[number]["segmentation"]["size"] == [
                images[each.image_id]["height"],
                images[each.image_id]["width"],
            ]
        if each.kind == "wrong area" and number in before:
            assert ours[number]["area"] > 100
    by_kind = {each.kind: each for each in checked.findings}
    turned = images[by_kind["EXIF rotation"].image_id]
    with Image.open(repaired / "train" / turned["file_name"]) as image:
        assert image.size == (turned["width"], turned["height"])
        assert image.getexif().get(0x0112) in (None, 1)
    deep = images[by_kind["more than 8 bits"].image_id]
    with Image.open(repaired / "train" / deep["file_name"]) as image:
        assert image.mode == "L"
        assert image.getextrema() == (0, 255)
    renamed = images[by_kind["wrong extension"].image_id]
    assert renamed["file_name"].endswith(".png")
    untouched = next(each for each in content["images"] if each["id"] == 30)
    name = untouched["file_name"]
    copied, original = repaired / "train" / name, planted.folder / "train" / name
    assert copied.read_bytes() == original.read_bytes()


def test_the_original_is_not_touched(checked: Checked, tmp_path: Path) -> None:
    folder = checked.data.folder
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    write_repaired(checked, tmp_path / "copy")
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert after == before
    for output in (folder, folder / "copy", folder.parent):
        with pytest.raises(InputError, match=r"expected a folder apart from the data, got one"):
            write_repaired(checked, output)
    with pytest.raises(InputError, match="expected a new folder, got one with content"):
        write_repaired(checked, tmp_path / "copy")
    assert not [path for path in tmp_path.iterdir() if path.name != "copy"]


@pytest.mark.parametrize("form", ["yolo", "voc"])
def test_other_formats_are_checked_and_repaired_too(form: str, tmp_path: Path) -> None:
    source = Source(4)
    if form == "yolo":
        write_yolo(source, tmp_path / "data", polygons=True)
        labels = next((tmp_path / "data/train/labels").glob("*.txt"))
        labels.write_text(labels.read_text() + "3 0.99 0.5 0.5 0.1\n")
    else:
        write_voc(source, tmp_path / "data", masks=False)
        xml = next(
            path
            for path in sorted((tmp_path / "data/Annotations").glob("*.xml"))
            if "<xmax>" in path.read_text()
        )
        text = xml.read_text()
        xml.write_text(text.replace("<xmax>", "<xmax>9", 1))
    found = check_data(find_data(tmp_path / "data"))
    assert [each.kind for each in found.faults] == ["box outside"]
    write_repaired(found, tmp_path / "copy")
    assert check_data(find_data(tmp_path / "copy")).faults == []


def test_pictures_that_look_alike(tmp_path: Path) -> None:
    names = sorted((COCO_MINI / "val").glob("*.jpg"))[:10]
    looks = [look_at(path).look for path in names]
    assert None not in looks
    for path in names:
        with Image.open(path) as image:
            half = image.convert("RGB").resize((image.width // 2, image.height // 2))
            half.save(tmp_path / path.name, quality=70)
    smaller = [look_at(tmp_path / path.name).look for path in names]
    pairs = set(similar([x for x in looks if x], [x for x in smaller if x]))
    assert pairs == {(a, b) for a, b in zip(looks, smaller, strict=True)}
    Image.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "plain.png")
    assert look_at(tmp_path / "plain.png").look is None
