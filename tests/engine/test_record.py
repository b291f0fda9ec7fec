"""What a run keeps of its origin, and what a resume says to other data."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from tiny_recipe import recipe
from tiny_recipe import rectangles as make

from vitdet import checkpoint
from vitdet.engine.record import changed, check_data, counts, set_absolute_paths, write
from vitdet.engine.run import train
from vitdet.utils.checks import InputError


def test_what_changed_is_named():
    before = {"class_names": ["cat", "dog"], "images": 10, "objects": 30, "name": "a"}
    now = {"class_names": ["cat", "cow"], "images": 9, "objects": 30, "name": "b"}
    assert changed(before, now) == ["2 classes, now 2 without dog and with cow", "10 images, now 9"]
    now = {**before, "class_names": ["dog", "cat"]}
    assert changed(before, now) == ["2 classes, now 2 in new order"]
    assert changed(before, {**before, "objects": 3}) == ["30 objects, now 3"]


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
    now = {"train": counts(filled(3))}
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


def test_a_run_knows_where_its_data_lie(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "a.json").touch()
    here = {"json": "a.json", "images": "images", "name": "images"}
    named = {"name": "coco_2017_val", "json": 3}
    cfg = OmegaConf.create({"dataloader": {"train": {"dataset": here}, "test": {"dataset": named}}})
    set_absolute_paths(cfg)
    wanted = {"json": f"{tmp_path}/a.json", "images": f"{tmp_path}/images", "name": "images"}
    assert cfg.dataloader.train.dataset == wanted
    assert cfg.dataloader.test.dataset == named
