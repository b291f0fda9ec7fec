"""coco-mini's photographs in each format, read back: the same objects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from folders import class_names
from other_formats import (
    COCO_MINI,
    Source,
    by_image,
    drawn_masks,
    mask_of,
    voc_box,
    write_coco,
    write_roboflow,
    write_voc,
    write_yolo,
)
from PIL import Image

from vitdet.data.datasets import coco_dataset
from vitdet.data.formats import find_data
from vitdet.data.prepare import prepare_data

pytestmark = pytest.mark.skipif(
    not COCO_MINI.is_dir(), reason=f"no photographs in {COCO_MINI} (set VITDET_COCO_MINI)"
)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source()


def test_coco_is_used_as_it_is(source: Source, tmp_path: Path) -> None:
    write_coco(source, tmp_path / "data")
    found = find_data(tmp_path / "data")
    assert found.format == "COCO json"
    assert set(found.parts) == {"train", "val"}
    for split, part in found.parts.items():
        assert part.content == source.parts[split]
        assert part.images == tmp_path / "data" / f"{split}2017"
    prepared = prepare_data(tmp_path / "data", tmp_path / "run")
    json_file = tmp_path / "data" / "annotations" / "instances_train2017.json"
    assert prepared.train == (str(json_file), str(tmp_path / "data" / "train2017"))
    assert prepared.masks
    assert prepared.class_names == tuple(source.names)
    assert not (tmp_path / "run").exists()
    assert len(coco_dataset(*prepared.train).records) == 8


@pytest.mark.parametrize(
    ("json_file", "images"),
    [
        ("instances_{}.json", "images/{}"),
        ("annotations/{}.json", "{}"),
        ("{}/_annotations.coco.json", "{}"),
        ("{}/labels.json", "{}/data"),
        ("{}.json", "."),
    ],
)
def test_coco_in_other_layouts(source: Source, tmp_path: Path, json_file: str, images: str) -> None:
    for split, content in source.parts.items():
        path = tmp_path / json_file.format(split)
        path.parent.mkdir(exist_ok=True, parents=True)
        for image in content["images"]:
            place = tmp_path / images.format(split) / image["file_name"]
            place.parent.mkdir(exist_ok=True, parents=True)
            place.touch()
        names = content["images"]
        if images.endswith("data"):  # as some tools write it: relative to the json
            names = [{**each, "file_name": f"data/{each['file_name']}"} for each in names]
        path.write_text(json.dumps({**content, "images": names}))
    found = find_data(tmp_path)
    assert set(found.parts) == {"train", "val"}
    for part in found.parts.values():
        for image in part.content["images"]:
            assert (part.images / image["file_name"]).is_file()


def test_roboflows_category_above_the_others_is_no_class(source: Source, tmp_path: Path) -> None:
    write_roboflow(source, tmp_path / "data")
    found = find_data(tmp_path / "data")
    assert found.format == "Roboflow's COCO json"
    assert class_names(found) == tuple(source.names)
    prepared = prepare_data(tmp_path / "data", tmp_path / "run")
    assert prepared.train[0] == str(tmp_path / "run" / "train.json")
    dataset = coco_dataset(*prepared.train)
    assert dataset.class_names == tuple(source.names)
    assert sorted(len(record["annotations"]) for record in dataset.records) == sorted(
        map(len, source.objects("train").values())
    )
    # one with objects of that category is a class like any other
    path = tmp_path / "data" / "train" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(content))
    assert class_names(find_data(tmp_path / "data")) == ("things", *source.names)


@pytest.mark.parametrize("polygons", [False, True], ids=["boxes", "polygons"])
def test_yolo(source: Source, tmp_path: Path, polygons: bool) -> None:
    write_yolo(source, tmp_path / "data", polygons=polygons)
    found = find_data(tmp_path / "data")
    assert found.format == "YOLO text labels"
    assert class_names(found) == tuple(source.names)
    for split, part in found.parts.items():
        sizes, read = source.sizes(split), by_image(part.content)
        assert set(read) == set(sizes)
        for name, everything in source.objects(split).items():
            objects = [each for each in everything if not each["iscrowd"]]
            assert len(objects) == len(read[name])
            for ours, theirs in zip(read[name], objects, strict=True):
                assert ours["category_id"] - 1 == source.index[theirs["category_id"]]
                # six digits of a side of 640 pixels; a polygon's box is a pixel off in COCO's file
                assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=6 if polygons else 0.002)
                assert ("segmentation" in ours) is polygons
                if polygons:
                    assert ours["segmentation"][0] == pytest.approx(
                        theirs["segmentation"][0], abs=0.002
                    )
    prepared = prepare_data(tmp_path / "data", tmp_path / "run")
    assert prepared.masks is polygons
    assert coco_dataset(*prepared.val).class_names == tuple(source.names)


def test_yolo_without_a_yaml(source: Source, tmp_path: Path) -> None:
    write_yolo(source, tmp_path / "a", polygons=False)
    wanted = find_data(tmp_path / "a").parts
    for split, part in (("train", "train"), ("val", "valid")):  # images/train, labels/train
        for kind in ("images", "labels"):
            (tmp_path / "b" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "a" / part / kind).rename(tmp_path / "b" / kind / split)
    (tmp_path / "b" / "classes.txt").write_text("\n".join(source.names) + "\n")
    found = find_data(tmp_path / "b")
    assert class_names(found) == tuple(source.names)
    for split, part in found.parts.items():
        assert part.content["annotations"] == wanted[split].content["annotations"]


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_voc(source: Source, tmp_path: Path, masks: bool) -> None:
    write_voc(source, tmp_path / "data", masks=masks)
    found = find_data(tmp_path / "data")
    assert found.format == "Pascal VOC xml"
    used = {
        source.names[source.index[each["category_id"]]]
        for content in source.parts.values()
        for each in content["annotations"]
    }
    assert class_names(found) == tuple(sorted(used))
    for split, part in found.parts.items():
        sizes, read = source.sizes(split), by_image(part.content)
        assert set(read) == set(sizes)
        for name, objects in source.objects(split).items():
            drawn = drawn_masks(objects, sizes[name])
            for place, (ours, theirs) in enumerate(zip(read[name], objects, strict=True), 1):
                wanted = source.names[source.index[theirs["category_id"]]]
                assert class_names(found)[ours["category_id"] - 1] == wanted
                left, top, right, bottom = voc_box(theirs)
                assert ours["bbox"] == [left - 1, top - 1, right - left + 1, bottom - top + 1]
                assert ours["iscrowd"] == theirs["iscrowd"]
                assert ("segmentation" in ours) is masks
                if masks:
                    mask = mask_of(ours["segmentation"], sizes[name])
                    assert np.array_equal(mask, drawn == place)
    assert prepare_data(tmp_path / "data", tmp_path / "run").masks is masks


def test_voc_objects_that_others_hide_are_left_out(source: Source, tmp_path: Path) -> None:
    write_voc(source, tmp_path / "data", masks=True)
    before = find_data(tmp_path / "data").parts["train"].content["annotations"]
    path = (
        tmp_path
        / "data/SegmentationObject"
        / f"{Path(next(iter(source.objects('train')))).stem}.png"
    )
    with Image.open(path) as image:
        numbers = np.array(image)
    last = int(numbers[numbers < 255].max())
    Image.fromarray(np.where(numbers == last, 0, numbers)).save(path)
    found = find_data(tmp_path / "data")
    assert "left out: 1 object hidden by others in SegmentationObject" in found.notes
    assert len(found.parts["train"].content["annotations"]) == len(before) - 1
    assert prepare_data(tmp_path / "data", tmp_path / "run").masks


def test_voc_beside_the_images(source: Source, tmp_path: Path) -> None:
    write_voc(source, tmp_path / "a", masks=False)
    wanted = find_data(tmp_path / "a").parts
    for split, part in (("train", "train"), ("val", "valid")):
        (tmp_path / "b" / part).mkdir(parents=True)
        for name in source.objects(split):
            stem = Path(name).stem
            (tmp_path / "a/JPEGImages" / name).rename(tmp_path / "b" / part / name)
            (tmp_path / "a/Annotations" / f"{stem}.xml").rename(
                tmp_path / "b" / part / f"{stem}.xml"
            )
    found = find_data(tmp_path / "b")
    for split, part in found.parts.items():
        assert part.content["annotations"] == wanted[split].content["annotations"]
        assert part.content["categories"] == wanted[split].content["categories"]
