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
    data = tmp_path / "data"
    write_coco(source, data)
    found = find_data(data)
    assert found.format == "COCO json"
    for split, content in source.parts.items():
        assert found.parts[split].content == content
        assert found.parts[split].images == data / f"{split}2017"
    prepared = prepare_data(data, tmp_path / "run")
    json_file = data / "annotations" / "instances_train2017.json"
    assert prepared.train == (str(json_file), str(data / "train2017"))
    assert (prepared.masks, prepared.class_names) == (True, tuple(source.names))
    assert not (tmp_path / "run").exists()
    assert len(coco_dataset(*prepared.train).records) == 8


@pytest.mark.parametrize(
    ("json_file", "images", "name"),
    [
        ("instances_{}.json", "images/{}", "{}"),
        ("annotations/{}.json", "{}", "{}"),
        ("{}/_annotations.coco.json", "{}", "{}"),
        ("{}/labels.json", "{}/data", "data/{}"),  # relative to the json
        ("{}.json", ".", "{}"),
    ],
)
def test_coco_in_other_layouts(
    source: Source, tmp_path: Path, json_file: str, images: str, name: str
) -> None:
    for split, content in source.parts.items():
        path, folder = tmp_path / json_file.format(split), tmp_path / images.format(split)
        path.parent.mkdir(exist_ok=True, parents=True)
        folder.mkdir(exist_ok=True, parents=True)
        for image in content["images"]:
            (folder / image["file_name"]).touch()
        named = [{**x, "file_name": name.format(x["file_name"])} for x in content["images"]]
        path.write_text(json.dumps({**content, "images": named}))
    found = find_data(tmp_path)
    assert set(found.parts) == {"train", "val"}
    for part in found.parts.values():
        assert part.json_file is not None
        for image in part.content["images"]:
            assert (part.images / image["file_name"]).is_file()


def test_roboflows_category_above_the_others_is_no_class(source: Source, tmp_path: Path) -> None:
    write_roboflow(source, tmp_path / "data")
    found = find_data(tmp_path / "data")
    assert (found.format, class_names(found)) == ("Roboflow's COCO json", tuple(source.names))
    prepared = prepare_data(tmp_path / "data", tmp_path / "run")
    assert prepared.train[0] == str(tmp_path / "run" / "train.json")
    dataset = coco_dataset(*prepared.train)
    assert dataset.class_names == tuple(source.names)
    counts = sorted(len(record["annotations"]) for record in dataset.records)
    assert counts == sorted(map(len, source.objects("train").values()))
    # one with objects of that category is a class like any other
    path = tmp_path / "data" / "train" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 0
    path.write_text(json.dumps(content))
    assert class_names(find_data(tmp_path / "data")) == ("things", *source.names)


@pytest.mark.parametrize("polygons", [False, True], ids=["boxes", "polygons"])
def test_yolo(source: Source, tmp_path: Path, polygons: bool) -> None:
    write_yolo(source, tmp_path / "a", polygons=polygons)
    found = find_data(tmp_path / "a")
    assert (found.format, class_names(found)) == ("YOLO text labels", tuple(source.names))
    for split, part in found.parts.items():
        read = by_image(part.content)
        assert set(read) == set(source.sizes(split))
        for name, everything in source.objects(split).items():
            objects = [each for each in everything if not each["iscrowd"]]
            for ours, theirs in zip(read[name], objects, strict=True):
                assert ours["category_id"] - 1 == source.index[theirs["category_id"]]
                # six digits of a side of 640 pixels; a polygon's box is a pixel off in COCO's file
                assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=6 if polygons else 0.002)
                points = ours["segmentation"][0] if polygons else theirs["segmentation"][0]
                assert points == pytest.approx(theirs["segmentation"][0], abs=0.002)
                assert ("segmentation" in ours) is polygons
    prepared = prepare_data(tmp_path / "a", tmp_path / "run")
    assert prepared.masks is polygons
    assert coco_dataset(*prepared.val).class_names == tuple(source.names)
    for split, folder in (("train", "train"), ("val", "valid")):  # without a yaml, in other folders
        for kind in ("images", "labels"):
            (tmp_path / "b" / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / "a" / folder / kind).rename(tmp_path / "b" / kind / split)
    (tmp_path / "b" / "classes.txt").write_text("\n".join(source.names) + "\n")
    for split, part in find_data(tmp_path / "b").parts.items():
        assert part.content["annotations"] == found.parts[split].content["annotations"]
        assert part.content["categories"] == found.parts[split].content["categories"]


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "masks"])
def test_voc(source: Source, tmp_path: Path, masks: bool) -> None:
    write_voc(source, tmp_path / "a", masks=masks)
    found = find_data(tmp_path / "a")
    assert found.format == "Pascal VOC xml"
    everything = [each for x in source.parts.values() for each in x["annotations"]]
    names = class_names(found)
    assert set(names) == {source.names[source.index[each["category_id"]]] for each in everything}
    for split, part in found.parts.items():
        sizes, read = source.sizes(split), by_image(part.content)
        assert set(read) == set(sizes)
        for name, objects in source.objects(split).items():
            drawn = drawn_masks(objects, sizes[name])
            for place, (ours, theirs) in enumerate(zip(read[name], objects, strict=True), 1):
                wanted = source.names[source.index[theirs["category_id"]]]
                assert names[ours["category_id"] - 1] == wanted
                left, top, right, bottom = voc_box(theirs)
                assert ours["bbox"] == [left - 1, top - 1, right - left + 1, bottom - top + 1]
                assert ours["iscrowd"] == theirs["iscrowd"]
                assert ("segmentation" in ours) is masks
                if masks:
                    assert np.array_equal(
                        mask_of(ours["segmentation"], sizes[name]), drawn == place
                    )
    assert prepare_data(tmp_path / "a", tmp_path / "run").masks is masks
    for split, folder in (("train", "train"), ("val", "valid")):  # xml beside the images
        (tmp_path / "b" / folder).mkdir(parents=True)
        for name in source.objects(split):
            xml = f"{Path(name).stem}.xml"
            (tmp_path / "a/JPEGImages" / name).rename(tmp_path / "b" / folder / name)
            (tmp_path / "a/Annotations" / xml).rename(tmp_path / "b" / folder / xml)
    for split, part in find_data(tmp_path / "b").parts.items():
        wanted = found.parts[split].content["annotations"]
        boxes = [[each["image_id"], each["bbox"]] for each in part.content["annotations"]]
        assert boxes == [[each["image_id"], each["bbox"]] for each in wanted]


def test_voc_objects_that_others_hide_are_left_out(source: Source, tmp_path: Path) -> None:
    write_voc(source, tmp_path, masks=True)
    before = find_data(tmp_path).parts["train"].content["annotations"]
    stem = Path(next(iter(source.objects("train")))).stem
    path = tmp_path / "SegmentationObject" / f"{stem}.png"
    with Image.open(path) as image:
        numbers = np.array(image)
    last = int(numbers[numbers < 255].max())
    Image.fromarray(np.where(numbers == last, 0, numbers)).save(path)
    found = find_data(tmp_path)
    assert "left out: 1 object hidden by others in SegmentationObject" in found.notes
    assert len(found.parts["train"].content["annotations"]) == len(before) - 1
