"""What a run keeps of its origin, and what a resume says to other data."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_recipe import recipe
from tiny_recipe import rectangles as make

from vitdet import checkpoint
from vitdet.data.shapes import shapes_dataset
from vitdet.engine.record import changed, check_data, fingerprint, write
from vitdet.engine.run import train
from vitdet.utils.checks import InputError


@dataclass
class Data:
    records: list[dict[str, Any]]
    name: str = "data"
    class_names: tuple[str, ...] = ("cat", "dog")
    image_root: Path = field(default_factory=Path)


def data(folder: Path) -> Data:
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"pixels")
    box = {"bbox": [1, 2, 3.5, 4], "category_id": 1, "iscrowd": 0}
    mask = {"segmentation": {"size": [9, 9], "counts": b"abc"}, **box}
    polygon = {"segmentation": [[0.0, 1.0, 2.0, 2.0, 5.0, 1.5]], **box}
    record = {"file_name": str(folder / "a.jpg"), "height": 9, "width": 8, "image_id": 4}
    return Data([{**record, "annotations": [mask, polygon]}], image_root=folder)


def test_a_fingerprint_is_that_of_the_content_and_not_of_the_place(tmp_path):
    one, two = data(tmp_path / "one"), data(tmp_path / "two")
    two.name = "another name"
    found = fingerprint(one)
    assert found["hash"] == fingerprint(two)["hash"]
    assert changed(found, fingerprint(two)) == []
    assert {key: found[key] for key in ("name", "class_names", "images", "objects")} == {
        "name": "data",
        "class_names": ["cat", "dog"],
        "images": 1,
        "objects": 2,
    }
    assert len(found["hash"]) == 32


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(height=10),
        lambda r: r.update(file_name=r["file_name"].replace("a.jpg", "b.jpg")),
        lambda r: r.update(image_id=5),
        lambda r: r["annotations"][0]["bbox"].__setitem__(2, 3.6),
        lambda r: r["annotations"][0].update(category_id=0),
        lambda r: r["annotations"][0].update(iscrowd=1),
        lambda r: r["annotations"][0]["segmentation"].update(counts=b"abd"),
        lambda r: r["annotations"][1]["segmentation"][0].__setitem__(0, 0.5),
        lambda r: r["annotations"].reverse(),
    ],
)
def test_every_change_of_the_content_is_seen(tmp_path, change):
    one = data(tmp_path / "one")
    before = fingerprint(one)
    other = copy.deepcopy(one)
    change(other.records[0])
    (text,) = changed(before, fingerprint(other))
    assert text.startswith(f"other annotations or images (hash {before['hash']}, now ")


def test_images_are_read_when_asked_for(tmp_path):
    one = data(tmp_path / "one")
    before, deep = fingerprint(one), fingerprint(one, images=True)
    (tmp_path / "one" / "a.jpg").write_bytes(b"others")
    assert fingerprint(one) == before
    assert changed(deep, fingerprint(one, images=True)) != []
    (tmp_path / "one" / "a.jpg").unlink()
    with pytest.raises(InputError, match=r"a\.jpg: expected a file that can be read, .* No such"):
        fingerprint(one, images=True)


def test_numbers_of_numpy_count_as_numbers(tmp_path):
    one, two = data(tmp_path / "one"), data(tmp_path / "two")
    two.records[0]["annotations"][0]["bbox"] = np.array([1, 2, 3.5, 4])
    two.records[0]["annotations"][0]["area"] = 3
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(two) == fingerprint(copy.deepcopy(two))


def test_records_of_other_objects_are_named(tmp_path):
    one = data(tmp_path / "one")
    one.records[0]["camera"] = object()
    with pytest.raises(InputError, match=r"records of the data set: expected plain values.* obj"):
        fingerprint(one)


def test_what_changed_is_named():
    before = {"class_names": ["cat", "dog"], "images": 10, "objects": 30, "hash": "1", "name": "a"}
    now = {"class_names": ["cat", "cow"], "images": 9, "objects": 30, "hash": "2", "name": "b"}
    assert changed(before, now) == ["2 classes, now 2 without dog and with cow", "10 images, now 9"]
    now = {**before, "class_names": ["dog", "cat"]}
    assert changed(before, now) == ["2 classes, now 2 in new order"]
    assert changed(before, {**before, "objects": 3}) == ["30 objects, now 3"]


def test_the_drawn_data_have_one_fingerprint(tmp_path):
    found = [
        fingerprint(shapes_dataset(tmp_path / name, "val", num_images=3)) for name in ("a", "b")
    ]
    assert found[0] == found[1]
    other = fingerprint(shapes_dataset(tmp_path / "a", "val", num_images=3, seed=1))
    assert other["hash"] != found[0]["hash"]


def filled(count: int, class_names: tuple[str, ...] = ("dark", "light")):
    """The rectangles with records, for what only counts them."""
    found = make(class_names)
    found.records = [{"file_name": f"{i}.jpg", "annotations": [{"id": i}]} for i in range(count)]
    return found


def with_data(cfg, count: int):
    cfg.dataloader.train.dataset = {"_target_": "test_record.filled", "count": count}
    return cfg


def test_a_run_keeps_its_data_and_a_resume_compares_them(tmp_path):
    train(with_data(recipe(tmp_path, num_images=8), 5))
    about = json.loads((tmp_path / "run.json").read_text())
    note = checkpoint.read(tmp_path / "model_final.pth")["vitdet"]
    assert note["data"] == about["data"]
    assert (about["data"]["train"]["images"], about["data"]["test"]["images"]) == (5, 0)
    assert about["data"]["train"]["class_names"] == ["dark", "light"]
    assert about["seed"] == 3
    assert about["command"]
    (tmp_path / "run.json").unlink()

    longer = with_data(recipe(tmp_path, num_images=12), 4)
    with pytest.raises(InputError) as caught:
        train(longer, resume=True)
    assert str(caught.value) == (
        f"data for resuming {tmp_path / 'model_final.pth'}: expected those with which the run "
        "began, got train data: 5 images, now 4; train data: 5 objects, now 4. Give it the same "
        "data, go on all the same with train.allow_changed_data=true, or start another run from "
        "the file with train.init_checkpoint."
    )
    assert not (tmp_path / "run.json").exists()  # nothing was written

    longer.train.allow_changed_data = True
    train(longer, resume=True)
    assert "the data changed since" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "run.json").read_text())["data"]["train"]["images"] == 4


def test_a_checkpoint_that_does_not_tell_its_data_is_not_compared(caplog):
    now = {"train": fingerprint(filled(3))}
    with caplog.at_level("INFO", logger="vitdet"):
        check_data(now, {"vitdet": {"format": 1}}, "old.pth", allow=False)
        check_data(now, {"model": {}}, "older.pth", allow=False)
    assert caplog.messages == [
        f"{name}.pth does not say which data it was trained on: not compared"
        for name in ("old", "older")
    ]


@pytest.mark.parametrize(("ids", "wanted"), [({"class_ids": (3, 1)}, [3, 1]), ({}, [1, 2])])
def test_a_checkpoint_holds_the_category_ids_of_the_data(tmp_path, ids, wanted):
    dataset = SimpleNamespace(class_names=("cat", "dog"), **ids)
    note = write(recipe(tmp_path), tmp_path, dataset, {}, {})
    assert (note["class_names"], note["class_ids"]) == (["cat", "dog"], wanted)
