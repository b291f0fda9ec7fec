from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from vitdet.data.datasets import (
    coco_dataset,
    coco_mini,
    federated_loss_weights,
    joined_dataset,
    named_dataset,
    subset,
)
from vitdet.utils.checks import InputError


def test_records_and_classes_come_from_the_file(tiny):
    dataset = coco_dataset(tiny.json_file, tiny.images, "tiny")
    assert dataset.class_names == ("cat", "dog")
    assert dataset.class_ids == (3, 7)
    assert dataset.num_classes == 2
    assert [record["image_id"] for record in dataset.records] == [1, 2, 3]
    first = dataset.records[0]
    assert first["file_name"] == str(tiny.images / "1.jpg")
    assert (first["height"], first["width"]) == (30, 40)
    assert [a["category_id"] for a in first["annotations"]] == [0, 1]
    assert first["annotations"][0]["bbox"] == [5, 5, 10, 8]
    assert first["annotations"][0]["bbox_mode"] == BoxMode.XYWH_ABS
    assert dataset.records[2]["annotations"][0]["iscrowd"] == 1
    assert dataset.truth is None
    assert dataset.image_counts is None


def test_detectron2_knows_the_data_set_by_its_name(tiny):
    coco_dataset(tiny.json_file, tiny.images, "tiny")
    metadata = MetadataCatalog.get("tiny")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    assert metadata.json_file == str(tiny.json_file)
    assert metadata.image_root == str(tiny.images)
    tiny.content["categories"][0]["name"] = "wolf"  # a second data set under the same name
    coco_dataset(tiny.write().json_file, tiny.images, "tiny")
    assert MetadataCatalog.get("tiny").thing_classes == ["cat", "wolf"]


def test_two_files_of_one_name_do_not_share_a_name(tiny, tmp_path):
    other = tmp_path / "other" / tiny.json_file.name
    other.parent.mkdir()
    other.write_text(
        json.dumps(tiny.content | {"categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}]})
    )
    first = coco_dataset(tiny.json_file, tiny.images)
    second = coco_dataset(other, tiny.images)
    assert second.name == str(other) != first.name
    assert MetadataCatalog.get(first.name).thing_classes == ["cat", "dog"]
    assert MetadataCatalog.get(second.name).thing_classes == ["a", "b"]


def test_agrees_with_detectron2s_reader(tiny):
    from detectron2.data.datasets.coco import load_coco_json

    theirs = load_coco_json(str(tiny.json_file), str(tiny.images), "tiny_by_detectron2")
    assert coco_dataset(tiny.json_file, tiny.images, "tiny").records == theirs


def _set(place, **values):
    def change(tiny):
        tiny.content["annotations"][place].update(values)

    return change


def _delete_image(tiny):
    (tiny.images / "2.jpg").unlink()


def test_faults_stop_with_one_line_that_names_the_first(tiny):
    _set(0, bbox=[55, 5, 10, 8], segmentation=[])(tiny)
    _set(1, bbox=[55, 5, 10, 8])(tiny)
    _delete_image(tiny)
    with pytest.raises(InputError) as caught:
        coco_dataset(tiny.write().json_file, tiny.images)
    assert str(caught.value).startswith(
        f"annotation file {tiny.json_file} has 3 faults (2 x box outside, 1 x missing image); the "
        "first: image 2 (2.jpg): missing image (no such file), got image "
    )
    assert "\n" not in str(caught.value)


def test_faults_can_be_left_out_of_training_and_evaluation(tiny, caplog):
    _set(0, bbox=[55, 5, 10, 8], segmentation=None)(tiny)
    _delete_image(tiny)
    with caplog.at_level(logging.WARNING):
        dataset = coco_dataset(tiny.write().json_file, tiny.images, check="drop")
    assert [record["image_id"] for record in dataset.records] == [1, 3]
    assert [len(record["annotations"]) for record in dataset.records] == [1, 1]
    assert dataset.truth is not None
    assert [each["id"] for each in dataset.truth["annotations"]] == [12, 14]
    assert "1 x box outside (nothing of it is in the image), the first: annot" in caplog.text


def test_what_is_written_otherwise_is_read_and_evaluated_so(tiny, caplog):
    for each in tiny.content["annotations"]:
        each["image_id"] = str(each["image_id"])
    for each in tiny.content["images"]:
        each.update(height=30.0, width="40")
    with caplog.at_level(logging.WARNING):
        dataset = coco_dataset(tiny.write().json_file, tiny.images)
    assert [len(record["annotations"]) for record in dataset.records] == [2, 1, 1]
    assert [(each["height"], each["width"]) for each in dataset.records] == [(30, 40)] * 3
    assert dataset.truth is not None
    assert {each["image_id"] for each in dataset.truth["annotations"]} == {1, 2, 3}
    assert "7 x number in another form" in caplog.text


def test_boxes_among_masks_are_a_data_set_of_boxes(tiny, caplog):
    _set(2, segmentation=[])(tiny)
    with caplog.at_level(logging.WARNING):
        dataset = coco_dataset(tiny.write().json_file, tiny.images)
    assert not any("segmentation" in a for r in dataset.records for a in r["annotations"])
    assert "1 of 3 objects" in caplog.text
    dropped = coco_dataset(tiny.json_file, tiny.images, check="drop")
    assert [len(record["annotations"]) for record in dropped.records] == [2, 0, 1]
    assert all("segmentation" in a for r in dropped.records for a in r["annotations"])


def test_a_box_may_stick_out_by_rounding(tiny):
    _set(2, bbox=[-0.5, -0.5, 41, 31])(tiny)
    assert len(coco_dataset(tiny.write().json_file, tiny.images).records) == 3


def test_a_data_set_of_boxes_needs_no_masks(tiny):
    for annotation in tiny.content["annotations"]:
        annotation["segmentation"] = []
    dataset = coco_dataset(tiny.write().json_file, tiny.images)
    assert not any("segmentation" in a for r in dataset.records for a in r["annotations"])


def test_keep_takes_what_detectron2_takes(tiny):
    _set(1, bbox=[30, 10, 12, 12])(tiny)
    _set(2, segmentation=[[1, 2, 3, 4]])(tiny)  # too few points: detectron2 leaves it out
    _delete_image(tiny)
    dataset = coco_dataset(tiny.write().json_file, tiny.images, check="keep")
    assert [len(record["annotations"]) for record in dataset.records] == [2, 0, 1]
    _set(3, category_id=8)(tiny)
    with pytest.raises(InputError, match="annotation 14: expected a category_id of its categories"):
        coco_dataset(tiny.write().json_file, tiny.images, check="keep")


def _no_file(tiny):
    tiny.json_file.unlink()


def _cut(tiny):
    tiny.json_file.write_text(tiny.json_file.read_text()[:100])


def _content(content):
    def change(tiny):
        tiny.json_file.write_text(json.dumps(content))

    return change


def _without(part, key):
    def change(tiny):
        del tiny.content[part][1][key]
        tiny.write()

    return change


def _two_dogs(tiny):
    tiny.content["categories"][1]["name"] = "dog"
    tiny.write()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_no_file, r"instances\.json: expected a file that can be read, got No such file"),
        (_cut, r"instances\.json: expected json, got text that is not \(.*char \d+\)"),
        (_content([1]), r'expected an object with "images".*got a list\. A list is often'),
        (
            _content({"images": []}),
            r'expected a list "annotations" of objects \(COCO .*got the keys',
        ),
        (_content({"images": [], "annotations": [], "categories": []}), "got no category"),
        (_without("images", "file_name"), r'image 1: expected the key "file_name", got no such'),
        (_without("categories", "name"), r'category number 1: expected the key "name"'),
        (_two_dogs, r"1 x repeated category name\); .*class 'dog'.* got the ids 7 and 3"),
    ],
)
def test_files_that_are_not_coco(tiny, change, text):
    change(tiny)
    with pytest.raises(InputError, match=text) as caught:
        coco_dataset(tiny.json_file, tiny.images)
    assert "\n" not in str(caught.value)


def test_image_folder_must_exist(tiny):
    with pytest.raises(InputError, match=r"image folder .*nowhere: expected a folder, got nothing"):
        coco_dataset(tiny.json_file, tiny.images / "nowhere")
    with pytest.raises(InputError, match=r"image folder .*: expected a folder, got a file"):
        coco_dataset(tiny.json_file, tiny.json_file)


def test_check_has_three_values(tiny):
    with pytest.raises(InputError, match='expected "error", "drop" or "keep", got \'yes\''):
        coco_dataset(tiny.json_file, tiny.images, check="yes")


def test_named_data_sets_lie_under_detectron2_datasets(tiny, tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "coco" / "annotations").mkdir(parents=True)
    tiny.images.rename(root / "coco" / "val2017")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    before = MetadataCatalog.get("coco_2017_val").as_dict()
    with pytest.raises(
        InputError,
        match=r"data set coco_2017_val: expected its annotation file .*root/coco/annotations/"
        r"instances_val2017\.json, got nothing at this path\. Set the environment variable "
        r"DETECTRON2_DATASETS to the folder that holds .* and coco/val2017 \(it is .*root\)\.",
    ):
        named_dataset("coco_2017_val")
    tiny.json_file.rename(root / "coco" / "annotations" / "instances_val2017.json")
    try:
        dataset = named_dataset("coco_2017_val")
        assert dataset.name == "coco_2017_val"
        assert dataset.records[0]["file_name"] == str(root / "coco" / "val2017" / "1.jpg")
        assert MetadataCatalog.get("coco_2017_val").thing_colors == before["thing_colors"]
    finally:
        MetadataCatalog.remove("coco_2017_val")
        MetadataCatalog.get("coco_2017_val").set(**before)


def test_named_data_sets_default_to_the_folder_datasets(tmp_path, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    text = r"annotation file datasets/lvis/lvis_v1_train\.json, .*\(it is not set, so \./datasets\)"
    with pytest.raises(InputError, match=text):
        named_dataset("lvis_v1_train")


def test_names_with_a_typo_get_the_nearest():
    with pytest.raises(InputError, match=r"got 'coco_2017_vall'\. Did you mean coco_2017_val\?"):
        named_dataset("coco_2017_vall")
    with pytest.raises(InputError, match=r"got 'zzz'\. Own data: use coco_dataset\(json="):
        named_dataset("zzz")


def test_lvis_files_have_urls_and_frequencies(tiny, tmp_path, monkeypatch):
    root = tmp_path / "root"
    (root / "lvis").mkdir(parents=True)
    (root / "coco").mkdir()
    tiny.images.rename(root / "coco" / "val2017")
    for image in tiny.content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
        image |= {"neg_category_ids": [3], "not_exhaustive_category_ids": [7]}
    for category, count in zip(tiny.content["categories"], (5, 200), strict=True):
        category |= {"image_count": count, "frequency": "r"}
    (root / "lvis" / "lvis_v1_val.json").write_text(json.dumps(tiny.content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    before = MetadataCatalog.get("lvis_v1_val").as_dict()
    try:
        dataset = named_dataset("lvis_v1_val")
    finally:
        MetadataCatalog.remove("lvis_v1_val")
        MetadataCatalog.get("lvis_v1_val").set(**before)
    assert dataset.style == "lvis"
    assert dataset.image_counts == (200, 5)
    assert Path(dataset.records[1]["file_name"]) == root / "coco" / "val2017" / "2.jpg"
    assert dataset.records[1]["neg_category_ids"] == [3]
    assert dataset.records[1]["not_exhaustive_category_ids"] == [7]


@pytest.fixture
def objects365(tiny, tmp_path, monkeypatch):
    """Two files in the layout of Objects365; the second has other images. Boxes only."""
    root = tmp_path / "root"
    (root / "Objects365" / "annotations").mkdir(parents=True)
    (root / "Objects365" / "images" / "v1").mkdir(parents=True)
    tiny.images.rename(root / "Objects365" / "images" / "v1" / "patch0")
    for image in tiny.content["images"]:
        image["file_name"] = f"images/v1/patch0/{image['file_name']}"
    for annotation in tiny.content["annotations"]:
        del annotation["segmentation"]
    files = {}
    for split in ("train", "val"):
        files[split] = root / "Objects365" / "annotations" / f"zhiyuan_objv2_{split}.json"
        files[split].write_text(json.dumps(tiny.content))
        for image in tiny.content["images"]:
            image["id"] += 100
        for annotation in tiny.content["annotations"]:
            annotation["image_id"] += 100
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    return files


def test_objects365_has_names_of_its_own(objects365):
    dataset = named_dataset("objects365_v2_val")
    assert dataset.class_names == ("cat", "dog")  # whatever the file has: no table is built in
    assert dataset.json_file == objects365["val"]
    assert dataset.style == "coco"
    first = dataset.records[0]
    assert first["image_id"] == 101
    assert Path(first["file_name"]).is_file()
    assert first["file_name"].endswith("Objects365/images/v1/patch0/1.jpg")
    objects365["train"].unlink()
    with pytest.raises(
        InputError,
        match=r"objects365_v2_train: expected its annotation file .*Objects365/annotations/zhiyuan_"
        r"objv2_train\.json, got nothing at this path",
    ):
        named_dataset("objects365_v2_train")
    with pytest.raises(InputError, match=r"Did you mean objects365_v2_val\?"):
        named_dataset("objects365_v2_vall")


def test_joined_data_sets_are_one_to_train_on(objects365):
    joined = joined_dataset(["objects365_v2_train", "objects365_v2_val"])
    assert joined.name == "objects365_v2_train+objects365_v2_val"
    assert [record["image_id"] for record in joined.records] == [1, 2, 3, 101, 102, 103]
    parts = [named_dataset(f"objects365_v2_{split}") for split in ("train", "val")]
    assert joined.records == [*parts[0].records, *parts[1].records]
    assert (joined.class_names, joined.class_ids) == (("cat", "dog"), (3, 7))
    assert joined.image_counts is None
    assert MetadataCatalog.get(joined.name).thing_classes == ["cat", "dog"]
    assert not joined.json_file.exists()  # an evaluation by one of the two would be wrong
    assert joined_dataset(["objects365_v2_val"]).records == parts[1].records


def test_joined_data_sets_have_the_same_classes(objects365):
    content = json.loads(objects365["val"].read_text())
    content["categories"].append({"id": 9, "name": "cow"})
    objects365["val"].write_text(json.dumps(content))
    with pytest.raises(
        InputError,
        match=r"joined data sets objects365_v2_train, objects365_v2_val: expected the 2 classes of "
        r"objects365_v2_train in each, got 3 in objects365_v2_val",
    ):
        joined_dataset(["objects365_v2_train", "objects365_v2_val"])
    with pytest.raises(InputError, match="joined data sets: expected names, got none"):
        joined_dataset([])


def test_federated_weights_are_those_of_detectron2():
    from detectron2.data.detection_utils import get_fed_loss_cls_weights

    for power in (0.5, 1.0):
        ours = federated_loss_weights("lvis_v1_train", power)()
        theirs = get_fed_loss_cls_weights("lvis_v1_train", power)
        assert ours.shape == (1203,)
        assert torch.equal(ours, theirs)
    with pytest.raises(InputError, match=r"counts detectron2 knows.*got 'coco_2017_train'"):
        federated_loss_weights("coco_2017_train")


def test_subset_keeps_the_first_images_with_objects(tiny):
    dataset = coco_dataset(tiny.json_file, tiny.images)
    assert [record["image_id"] for record in subset(dataset, 2).records] == [1, 2]
    with pytest.raises(InputError, match="expected 3 images with objects, got 2"):
        subset(dataset, 3)  # image 3 has a crowd region only


@pytest.mark.parametrize(
    ("split", "images", "polygons", "crowds"), [("train", 100, 895, 9), ("val", 34, 299, 5)]
)
def test_coco_mini(split, images, polygons, crowds):
    try:
        dataset = coco_mini(split)
    except InputError as error:
        pytest.skip(str(error))
    annotations = [a for record in dataset.records for a in record["annotations"]]
    assert len(dataset.records) == images
    assert sum(isinstance(a["segmentation"], list) for a in annotations) == polygons
    assert sum(a["iscrowd"] for a in annotations) == crowds
    assert dataset.class_names == tuple(MetadataCatalog.get("coco_2017_val").thing_classes)
    assert len(coco_mini(split, 8).records) == 8


def test_coco_mini_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("VITDET_COCO_MINI", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"folder .*none, got nothing.*VITDET_COCO_MINI"):
        coco_mini("val")
