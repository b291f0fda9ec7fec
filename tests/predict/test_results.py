"""What a result tells: its detections as numbers, COCO results, JSON, pictures, other packages."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from vitdet.predict.inputs import Picture
from vitdet.predict.results import Result, class_indexes, split_names
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import decode, encode

NAMES = ("cup", "ball", "dog")


def masks() -> torch.Tensor:
    masks = torch.zeros(3, 60, 80, dtype=torch.bool)
    masks[0, 10:30, 5:25] = True
    masks[1, 40:50, 60:75] = True
    masks[2, 12:20, 6:16] = True
    return masks


def instances(with_masks: bool = True) -> Instances:
    boxes = [[5.0, 10, 25, 30], [60, 40, 75, 50], [6, 12, 16, 20]]
    found = Instances((60, 80), pred_boxes=Boxes(torch.tensor(boxes)))
    found.scores = torch.tensor([0.75, 0.5, 0.25])
    found.pred_classes = torch.tensor([2, 0, 2])
    if with_masks:
        found.pred_masks = masks()
    return found


def result(with_masks: bool = True, **given) -> Result:
    picture = Picture("x.png", array=np.full((60, 80, 3), 90, np.uint8))
    return Result(picture, instances(with_masks), NAMES, **given)


def test_its_numbers():
    found = result()
    assert (len(found), found.size, found.name) == (3, (60, 80), "x.png")
    assert found.names == ["dog", "cup", "dog"]
    assert found.counts() == {"dog": 2, "cup": 1}
    assert found.scores.tolist() == [0.75, 0.5, 0.25]
    assert found.boxes[1].tolist() == [60, 40, 75, 50]
    assert repr(found) == "Result(x.png, 60 x 80: 2 dog, 1 cup)"
    assert repr(found.above(0.9)) == "Result(x.png, 60 x 80: nothing)"


def test_parts_of_it():
    found = result()
    assert found.above(0.5).names == ["dog", "cup"]  # a score at the threshold stays
    assert found.of_classes(["dog"]).scores.tolist() == [0.75, 0.25]
    assert len(found.of_classes([])) == 0
    assert torch.equal(found.of_classes(["cup"]).instances.pred_masks, masks()[1:2])
    with pytest.raises(InputError, match=r"of 3 classes \(cup, ball, dog\), got 'dgo'"):
        found.of_classes(["dgo"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat, dog", ["cat", "dog"]),
        ("dog, small", ["dog, small"]),
        ('dog, small,cat: "big",dog', ["dog, small", 'cat: "big"', "dog"]),
        ("dog, smal", ["dog", "smal"]),
    ],
)
def test_names_of_classes_may_have_commas(text, names):
    assert split_names(text, ["dog", "dog, small", "cat", 'cat: "big"']) == names


def test_two_classes_of_one_name_are_both_meant():
    assert class_indexes(["cat"], ["cat", "dog", "cat"]) == [0, 2]


def test_coco_results():
    entries = result().to_coco(9)
    masks_of = [decode(entry.pop("segmentation")) for entry in entries]
    assert entries[1] == {
        "image_id": 9,
        "category_id": 1,
        "bbox": [60.0, 40.0, 15.0, 10.0],
        "score": 0.5,
    }
    assert np.array_equal(np.stack(masks_of), masks().numpy())
    assert [entry["category_id"] for entry in entries] == [3, 1, 3]
    assert [e["category_id"] for e in result(class_ids=[7, 8, 90]).to_coco(1)] == [90, 7, 90]
    assert "segmentation" not in result(with_masks=False).to_coco(9)[0]


def test_json():
    content = json.loads(result().to_json())
    first = content["detections"][0]
    assert content["image"] == "x.png"
    assert (content["height"], content["width"]) == (60, 80)
    assert first["class"] == "dog"
    assert (first["class_index"], first["category_id"], first["score"]) == (2, 3, 0.75)
    assert first["box"] == [5.0, 10.0, 25.0, 30.0]
    assert np.array_equal(decode(first["mask"]), masks()[0].numpy())
    assert "mask" not in json.loads(result(with_masks=False).to_json())["detections"][0]


def test_masks_in_run_lengths_are_the_same_result():
    lengths = encode(masks().numpy())
    packed = Result(result().picture, instances(False), NAMES, run_lengths=lengths)
    assert packed.has_masks
    assert packed.to_coco(1) == result().to_coco(1)
    assert torch.equal(packed.instances.pred_masks, masks())
    assert torch.equal(packed.above(0.5).instances.pred_masks, masks()[:2])
    assert np.array_equal(packed.plot(), result().plot())


def test_boxes_alone_have_no_masks():
    found = result(with_masks=False)
    assert not found.has_masks
    with pytest.raises(InputError, match=r"masks in x\.png: expected masks, got boxes only"):
        found.run_lengths()


def test_pictures(tmp_path):
    plain = np.full((60, 80, 3), 90, np.uint8)
    drawn = result().plot(min_side=60)
    assert drawn.shape == (60, 80, 3)
    assert (drawn[10:30, 5:25] != 90).any()
    assert np.array_equal(result().above(0.9).plot(min_side=60), plain)
    assert result().plot().shape == (480, 640, 3)  # enlarged, so that labels can be read
    result().save(tmp_path / "drawn.png", min_side=60)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "drawn.png")), drawn)


def test_its_own_file_is_never_written_over(tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(np.full((60, 80, 3), 90, np.uint8)).save(path)
    before = path.read_bytes()
    found = Result(Picture(str(path), path), instances(), NAMES)
    assert found.image.shape == (60, 80, 3)
    for same in (path, tmp_path / "y" / ".." / "x.png"):
        (tmp_path / "y").mkdir(exist_ok=True)
        with pytest.raises(InputError, match=r"expected a file of its own, got the input"):
            found.save(same)
    assert path.read_bytes() == before


def test_supervision():
    pytest.importorskip("supervision")
    detections = result().to_supervision()
    assert detections.xyxy.tolist() == instances().pred_boxes.tensor.tolist()
    assert detections.confidence.tolist() == [0.75, 0.5, 0.25]
    assert detections.class_id.tolist() == [2, 0, 2]
    assert list(detections.data["class_name"]) == ["dog", "cup", "dog"]
    assert np.array_equal(detections.mask, masks().numpy())
    assert result(with_masks=False).to_supervision().mask is None


def test_without_supervision_there_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(InputError, match=r"got no such package\. pip install supervision"):
        result().to_supervision()
