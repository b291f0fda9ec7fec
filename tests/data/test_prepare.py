"""Putting a validation part aside, and what is kept beside a run."""

import json
from pathlib import Path

import pytest
from folders import OBJECT, SIZE, TRAIN, VAL, change, coco, content, voc, xml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vitdet.data.datasets import coco_dataset
from vitdet.data.formats import find_data
from vitdet.data.prepare import prepare_data, prepare_part, split_content
from vitdet.utils.checks import InputError
from vitdet.utils.files import RESULT_MARKER


def _content(classes):
    """Images 1, 2, ... with an object of each of the classes given."""
    annotations = [
        {"id": 100 * i + label, "image_id": i, "category_id": label, "bbox": [0, 0, 4, 4]}
        for i, labels in enumerate(classes, 1)
        for label in sorted(labels)
    ]
    return {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(1, len(classes) + 1)],
        "annotations": annotations,
        "categories": [{"id": label, "name": f"class {label}"} for label in range(5)],
    }


def _ids(part):
    return {each["id"] for each in part["images"]}


def _classes(part):
    return {each["category_id"] for each in part["annotations"]}


@settings(
    max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    classes=st.lists(st.sets(st.integers(0, 4), max_size=2), min_size=2, max_size=40),
    fraction=st.sampled_from([0.1, 0.3, 0.5, 0.9]),
    seed=st.integers(0, 5),
)
def test_a_split_loses_nothing(tmp_path, classes, fraction, seed):
    content = _content(classes)
    train, val = split_content(content, tmp_path, fraction, seed)
    assert _ids(train) | _ids(val) == _ids(content)
    assert not _ids(train) & _ids(val)
    assert _ids(train)
    assert _ids(val)
    for part in (train, val):
        assert {each["image_id"] for each in part["annotations"]} <= _ids(part)
        assert part["categories"] == content["categories"]
    assert len(train["annotations"] + val["annotations"]) == len(content["annotations"])
    if _classes(content) - _classes(train):  # only where no image can be spared
        assert len(_ids(val)) == 1
        assert all(len(each) > 0 for each in classes)
    assert split_content(content, tmp_path, fraction, seed) == (train, val)


def test_every_class_of_two_images_or_more_is_in_both_parts(tmp_path):
    content = _content([{0}] * 40 + [{1}] * 2 + [{2}] * 3 + [{3}])
    train, val = split_content(content, tmp_path, 0.1, 0)
    assert _classes(train) == {0, 1, 2, 3}
    assert _classes(val) == {0, 1, 2}
    assert len(val["images"]) == 5  # a tenth of 46
    assert _ids(split_content(content, tmp_path, 0.1, 1)[1]) != _ids(val)
    with pytest.raises(InputError, match="two or more different images to split, got 1 among 1"):
        split_content(_content([{0}]), tmp_path)


def test_copies_stay_together(tmp_path):
    content = _content([{0}] * 20)
    for i in range(1, 21):  # 5 to 8 have the bytes of 4
        Image.new("RGB", (8, 8), (4 if i in range(5, 9) else i, 0, 0)).save(tmp_path / f"{i}.png")
    for number, image in enumerate(content["images"][10:]):  # two pictures, five copies of each
        image["file_name"] = f"cat{number % 2}_jpg.rf.{number}.jpg"
    for seed in range(10):
        train, val = split_content(content, tmp_path, 0.3, seed)
        for group in ({4, 5, 6, 7, 8}, set(range(11, 21, 2)), set(range(12, 21, 2))):
            assert len({number in _ids(val) for number in group}) == 1
        assert len(_ids(train)) + len(_ids(val)) == 20


# --- files beside a run ---------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """Twelve images with YOLO's labels, without a validation part."""
    folder = tmp_path / "data"
    for i in range(12):
        change(folder, {f"labels/{i}.txt": f"{i % 2} 0.5 0.5 0.2 0.2\n", f"images/{i}.png": ""})
        Image.new("RGB", (40, 30), (i, 9, 9)).save(folder / "images" / f"{i}.png")
    change(folder, {"classes.txt": "cat\ndog\n"})
    return folder


def _contents(prepared):
    return [json.loads(Path(part[0]).read_text()) for part in (prepared.train, prepared.val)]


def test_the_split_is_written_beside_the_run(data, tmp_path):
    cache = tmp_path / "run" / "data"
    before = sorted(data.rglob("*"))
    prepared = prepare_data(data, cache)
    assert prepared.notes == (
        "found YOLO text labels: all 12 images with 12 objects; 2 classes (cat, dog)",
        "no validation part: 2 of 12 images put aside for it",
    )
    assert (prepared.masks, prepared.num_images) == (False, 10)
    names = [RESULT_MARKER, "train.json", "val.json"]  # a marker: they are no data, wherever it is
    assert sorted(path.name for path in cache.iterdir()) == names
    assert prepare_data(data, cache) == prepared
    assert sorted(data.rglob("*")) == before
    assert _contents(prepare_data(data, tmp_path / "third", seed=3)) != _contents(prepared)
    prepare_data(data, data / "data")
    assert prepare_data(data, data / "data").notes[0] == prepared.notes[0]


def test_a_new_run_reads_the_data_anew_and_a_resumed_one_goes_on_with_its_own(data, tmp_path):
    cache = tmp_path / "run" / "data"
    change(data, {"labels": "ln:../elsewhere"})  # behind a link, which a glance does not see
    prepare_data(data, cache)
    written = {path: path.read_bytes() for path in cache.iterdir()}
    (tmp_path / "elsewhere/0.txt").write_text("1 0.5 0.5 0.4 0.4\n")
    resumed = prepare_data(data, cache, resume=True)
    assert {path: path.read_bytes() for path in cache.iterdir()} == written
    data.rename(tmp_path / "moved")
    moved = prepare_data(tmp_path / "moved", cache, resume=True)
    assert moved.train == (resumed.train[0], str(tmp_path / "moved"))
    (tmp_path / "moved").rename(data)
    (tmp_path / "elsewhere/1.txt").write_text("1 0.5 0.5 0.4 0.4\n" * 2)
    wanted = r"those with which the run began, got (train|val): .* annotations, now .*allow"
    with pytest.raises(InputError, match=wanted):
        prepare_data(data, cache, resume=True)
    assert {path: path.read_bytes() for path in cache.iterdir()} == written
    for prepared in (
        prepare_data(data, cache, resume=True, allow_changed=True),
        prepare_data(data, cache),
    ):
        boxes = [each["bbox"] for part in _contents(prepared) for each in part["annotations"]]
        assert boxes.count([12, 9, 16, 12]) == 3


def test_some_masks_are_none(data, tmp_path):
    change(data, {"labels/3.txt": "0 0.1 0.1 0.5 0.1 0.5 0.5\n"})
    prepared = prepare_data(data, tmp_path / "run")
    assert not prepared.masks
    assert prepared.notes[-1] == "11 of 12 objects have no mask: boxes only"
    for part in (prepared.train, prepared.val):
        records = coco_dataset(*part).records
        assert not any("segmentation" in each for r in records for each in r["annotations"])


# --- parts, and what a training stops at ----------------------------------------------------------


def test_parts_of_a_training_and_of_an_evaluation(tmp_path):
    coco(tmp_path)
    run = tmp_path / "run/data"
    bad = '{"images": [], "annotations": [], "categories": 3}'
    change(tmp_path, {TRAIN: "mv:train.json", VAL: "mv:val.json", "test.json": bad})
    # the test part is not read for a training
    assert prepare_data(tmp_path, run).train[0] == str(tmp_path / "train.json")
    Image.new("RGB", SIZE).save(tmp_path / "train/b.jpg")
    change(tmp_path, {"test.json": json.dumps(content("a.jpg", "b.jpg"))})
    (annotations, images), notes = prepare_part(tmp_path, run)
    assert (annotations, images) == (str(tmp_path / "val.json"), str(tmp_path / "val"))
    assert notes[-1] == "evaluated is val, of 1 images"
    (annotations, _), notes = prepare_part(tmp_path, run, split="test")
    assert (annotations, notes[-1]) == (str(run / "test.json"), "evaluated is test, of 2 images")
    # images of a json are found as for a training
    assert prepare_part(tmp_path / "train.json", run)[0][1] == str(tmp_path / "train")
    # classes are matched by their names, in the model's order
    annotations = prepare_part(tmp_path, run, class_names=("dog", "owl", "cat"))[0][0]
    written = json.loads(Path(annotations).read_text())
    assert [each["name"] for each in written["categories"]] == ["dog", "owl", "cat"]
    assert [each["category_id"] for each in written["annotations"]] == [1]
    assert prepare_part(tmp_path, run, class_names=("dog",))[0][0] == str(tmp_path / "val.json")
    change(tmp_path, {"val.json": None, "train.json": None})
    assert prepare_part(tmp_path, run)[0] == (str(run / "test.json"), str(tmp_path))
    with pytest.raises(InputError, match=f"{tmp_path}: expected a part val, found test"):
        prepare_part(tmp_path, run, split="val")
    with pytest.raises(InputError, match="images to train on, got COCO json with test only"):
        prepare_data(tmp_path, run)
    # a file that the user names is what he trains on, whatever its name
    assert prepare_data(tmp_path / "test.json", run, val_fraction=0.5).num_images == 1


def test_a_part_without_objects_is_an_error_unless_it_is_asked_for(tmp_path):
    coco(tmp_path)
    change(tmp_path, {VAL: lambda values: values.update(annotations=[])})
    wanted = r"validation part .*val\.json: expected images with objects, got none in 1 image\. "
    with pytest.raises(InputError, match=f"{wanted}.*--allow-empty"):
        prepare_data(tmp_path, tmp_path / "run")
    assert prepare_data(tmp_path, tmp_path / "run", allow_empty=True).num_images == 2
    with pytest.raises(InputError, match=r"data to evaluate on .*: expected images with objects"):
        prepare_part(tmp_path, tmp_path / "run")


def test_faults_of_voc_stop_a_training_and_name_the_xml(tmp_path):
    voc(tmp_path)
    size = "<size><width>{}</width><height>{}</height></size>"
    for inside, wanted in (
        (size.format(80, 20) + OBJECT, "the size of a.jpg, 40 x 20"),
        (OBJECT.replace("<xmin>1<", "<xmin>11<"), "xmin below xmax .*xmin 11, .*xmax 10"),
    ):
        change(tmp_path, xml(inside))
        assert len(find_data(tmp_path).parts["all"].problems) == 1  # a check goes on
        with pytest.raises(InputError, match=rf"Annotations/a\.xml: expected {wanted}"):
            prepare_data(tmp_path, tmp_path / "run")
    change(tmp_path, xml(size.format(0, 0) + OBJECT) | {"JPEGImages/b.jpg": "no image"})
    with pytest.raises(InputError, match=r"JPEGImages/b\.jpg"):
        prepare_data(tmp_path, tmp_path / "run")
