"""coco-mini's photographs in each format, read back: the same objects."""

from __future__ import annotations

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
