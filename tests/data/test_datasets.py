import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import MetadataCatalog

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
    from detectron2.data.datasets.coco import load_coco_json

    dataset = coco_dataset(tiny.json_file, tiny.images)
    assert (dataset.name, dataset.truth) == ("instances", None)
    assert (dataset.class_names, dataset.class_ids) == (("cat", "dog"), (3, 7))
    theirs = load_coco_json(str(tiny.json_file), str(tiny.images), "tiny_by_detectron2")
    assert dataset.records == theirs
    assert [record["image_id"] for record in subset(dataset, 2).records] == [1, 2]
    with pytest.raises(InputError, match="expected 3 images with objects, got 2"):
        subset(dataset, 3)  # image 3 has a crowd region only


def test_faults_stop_or_are_left_out_of_training_and_evaluation(tiny, caplog):
    tiny.content["annotations"][0].update(bbox=[55, 5, 10, 8], segmentation=[])
    (tiny.images / "2.jpg").unlink()
    with pytest.raises(InputError) as caught:
        coco_dataset(tiny.write().json_file, tiny.images)
    assert str(caught.value).startswith(
        f"annotation file {tiny.json_file} has 2 faults (1 x missing image, 1 x box outside); the "
        "first: image 2 (2.jpg): missing image (no such file), got image "
    )
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        dataset = coco_dataset(tiny.json_file, tiny.images, check="drop")
    assert [record["image_id"] for record in dataset.records] == [1, 3]
    assert [len(record["annotations"]) for record in dataset.records] == [1, 1]
    assert dataset.truth is not None
    assert [each["id"] for each in dataset.truth["annotations"]] == [12, 14]
    assert "1 x box outside (nothing of it is in the image), the first: annot" in caplog.text


def test_what_is_written_otherwise_is_read_and_evaluated_so(tiny, caplog):
    tiny.content["annotations"][2]["bbox"] = [-0.5, -0.5, 41, 31]  # out by rounding
    for each in tiny.content["images"]:
        each.update(id=str(each["id"]), height=30.0)
    with caplog.at_level(logging.WARNING):
        dataset = coco_dataset(tiny.write().json_file, tiny.images)
    assert [len(record["annotations"]) for record in dataset.records] == [2, 1, 1]
    sizes = [(each["image_id"], each["height"], each["width"]) for each in dataset.records]
    assert sizes == [(1, 30, 40), (2, 30, 40), (3, 30, 40)]
    assert dataset.truth is not None
    assert {each["id"] for each in dataset.truth["images"]} == {1, 2, 3}
    assert "6 x number in another form" in caplog.text


def test_boxes_among_masks_are_a_data_set_of_boxes(tiny, caplog):
    tiny.content["annotations"][2]["segmentation"] = []
    with caplog.at_level(logging.WARNING):
        dataset = coco_dataset(tiny.write().json_file, tiny.images)
    assert not any("segmentation" in a for r in dataset.records for a in r["annotations"])
    assert "1 of 3 objects" in caplog.text


def test_keep_takes_what_detectron2_takes(tiny):
    objects = tiny.content["annotations"]
    objects[1]["bbox"] = [30, 10, 12, 12]
    objects[2]["segmentation"] = [[1, 2, 3, 4]]  # too few points: detectron2 leaves it out
    (tiny.images / "2.jpg").unlink()
    dataset = coco_dataset(tiny.write().json_file, tiny.images, check="keep")
    assert [len(record["annotations"]) for record in dataset.records] == [2, 0, 1]
    for value, text in (
        ({"category_id": 8}, "annotation 14: expected a category_id of its categories, got 8"),
        ({}, "an entry has no key 'category_id'"),
    ):
        del objects[3]["category_id"]
        objects[3].update(value)
        with pytest.raises(InputError, match=text):
            coco_dataset(tiny.write().json_file, tiny.images, check="keep")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("[1", r"instances\.json: expected json, got text that is not \(.*char \d+\)"),
        ([1], r"expected an object in COCO's format, got a list\. Results"),
        ({"annotations": None}, r'expected a list "annotations" of objects \(COCO .*got the keys'),
        ({"categories": []}, "got no category"),
        ({"categories": [{"id": 1}]}, r'category number 0: expected the key "name", got no such'),
        ({"images": [{"id": 1}]}, r'image 1: expected the key "file_name", got no such key'),
    ],
)
def test_files_that_are_not_coco(tiny, change, text):
    content = {**tiny.content, **change} if isinstance(change, dict) else change
    tiny.json_file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=text) as caught:
        coco_dataset(tiny.json_file, tiny.images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"images": "nowhere"}, "image folder nowhere: expected a folder, got nothing"),
        ({"images": __file__}, "image folder .*: expected a folder, got a file"),
        ({"check": "yes"}, 'expected "error", "drop" or "keep", got \'yes\''),
    ],
)
def test_wrong_arguments_of_a_data_set(tiny, values, text):
    with pytest.raises(InputError, match=text):
        coco_dataset(**{"json": tiny.json_file, "images": tiny.images, **values})


# --- data sets by their names ---------------------------------------------------------------------


@pytest.fixture
def root(tiny, tmp_path, monkeypatch):
    """DETECTRON2_DATASETS with COCO's images of 2017, LVIS' val and Objects365 of two parts."""
    root = tmp_path / "root"
    for folder in ("coco/annotations", "lvis", "Objects365/annotations", "Objects365/images/v1"):
        (root / folder).mkdir(parents=True)
    tiny.images.rename(root / "coco" / "val2017")
    (root / "Objects365/images/v1/patch0").symlink_to(root / "coco/val2017")
    for split, more in (("train", 0), ("val", 100)):
        content = copy.deepcopy(tiny.content)
        for image in content["images"]:
            image |= {"id": image["id"] + more, "file_name": f"images/v1/patch0/{image['id']}.jpg"}
        for annotation in content["annotations"]:
            annotation["image_id"] += more
        path = root / "Objects365" / "annotations" / f"zhiyuan_objv2_{split}.json"
        path.write_text(json.dumps(content))
    for image in tiny.content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
        image |= {"neg_category_ids": [3], "not_exhaustive_category_ids": [7]}
    (root / "lvis" / "lvis_v1_val.json").write_text(json.dumps(tiny.content))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    return root


def test_named_data_sets_lie_under_detectron2_datasets(root, tiny, tmp_path, monkeypatch):
    text = r"expected its annotation file .*root/coco/annotations/instances_val2017\.json, got noth"
    with pytest.raises(InputError, match=text + r".*DETECTRON2_DATASETS .* \(it is .*root\)"):
        named_dataset("coco_2017_val")
    tiny.json_file.rename(root / "coco" / "annotations" / "instances_val2017.json")
    dataset = named_dataset("coco_2017_val")
    assert (dataset.name, dataset.style) == ("coco_2017_val", "coco")
    assert dataset.records[0]["file_name"] == str(root / "coco" / "val2017" / "1.jpg")
    lvis = named_dataset("lvis_v1_val")
    assert lvis.style == "lvis"
    assert Path(lvis.records[1]["file_name"]) == root / "coco" / "val2017" / "2.jpg"
    assert lvis.records[1]["neg_category_ids"] == [3]
    assert lvis.records[1]["not_exhaustive_category_ids"] == [7]
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"\(it is not set, so \./datasets\)"):
        named_dataset("lvis_v1_train")
    with pytest.raises(InputError, match=r"got 'coco_2017_vall'\. Did you mean coco_2017_val\?"):
        named_dataset("coco_2017_vall")


def test_objects365_has_names_of_its_own_and_may_be_joined(root):
    dataset = named_dataset("objects365_v2_val")
    assert dataset.class_names == ("cat", "dog")  # whatever the file has: no table is built in
    first = dataset.records[0]["file_name"]
    assert Path(first).is_file()
    assert first.endswith("Objects365/images/v1/patch0/1.jpg")
    names = ["objects365_v2_train", "objects365_v2_val"]
    joined = joined_dataset(names)
    assert joined.name == "objects365_v2_train+objects365_v2_val"
    assert joined.records == [*named_dataset(names[0]).records, *dataset.records]
    assert (joined.class_names, joined.class_ids) == (("cat", "dog"), (3, 7))
    assert not joined.json_file.exists()  # an evaluation by one of the two would be wrong
    content = json.loads(dataset.json_file.read_text())
    content["categories"].append({"id": 9, "name": "cow"})
    dataset.json_file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="got 2 in objects365_v2_train, 3 in objects365_v2_val"):
        joined_dataset(names)


def test_federated_weights_are_those_of_detectron2():
    counts = MetadataCatalog.get("lvis_v1_train").class_image_count
    numbers = [each["image_count"] for each in sorted(counts, key=lambda each: each["id"])]
    for power in (0.5, 1.0):
        ours = federated_loss_weights("lvis_v1_train", power)()
        assert ours.shape == (1203,)
        assert torch.equal(ours, torch.tensor(numbers).float() ** power)
    with pytest.raises(InputError, match=r"counts detectron2 knows.*got 'coco_2017_train'"):
        federated_loss_weights("coco_2017_train")


def test_coco_mini():
    try:
        dataset = coco_mini("val")
    except InputError as error:
        pytest.skip(str(error))
    annotations = [a for record in dataset.records for a in record["annotations"]]
    assert sum(isinstance(a["segmentation"], list) for a in annotations) == 299
    assert sum(a["iscrowd"] for a in annotations) == 5
    assert dataset.class_names == tuple(MetadataCatalog.get("coco_2017_val").thing_classes)
    assert (len(dataset.records), len(coco_mini("val", 8).records)) == (34, 8)
