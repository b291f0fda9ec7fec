"""What a result tells: its detections as numbers, COCO results, JSON, pictures, other packages."""

import base64
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from vitdet.predict.results import Picture, Result, class_indexes, split_names
from vitdet.utils.checks import InputError
from vitdet.utils.run_lengths import decode, encode

NAMES = ("cup", "ball", "dog")
MASKS = torch.zeros(3, 60, 80, dtype=torch.bool)
MASKS[0, 10:30, 5:25] = MASKS[1, 40:50, 60:75] = MASKS[2, 12:20, 6:16] = True


def instances(with_masks=True):
    boxes = [[5.0, 10, 25, 30], [60, 40, 75, 50], [6, 12, 16, 20]]
    found = Instances((60, 80), pred_boxes=Boxes(torch.tensor(boxes)))
    found.scores = torch.tensor([0.75, 0.5, 0.25])
    found.pred_classes = torch.tensor([2, 0, 2])
    if with_masks:
        found.pred_masks = MASKS
    return found


def result(with_masks=True, **given):
    picture = Picture("x.png", array=np.full((60, 80, 3), 90, np.uint8))
    return Result(picture, instances(with_masks), NAMES, **given)


def test_its_numbers_and_parts():
    found = result()
    assert (len(found), found.size, found.name) == (3, (60, 80), "x.png")
    assert found.names == ["dog", "cup", "dog"]
    assert found.scores.tolist() == [0.75, 0.5, 0.25]
    assert found.boxes[1].tolist() == [60, 40, 75, 50]
    assert repr(found) == "Result(x.png, 60 x 80: 2 dog, 1 cup)"
    assert repr(found.above(0.9)) == "Result(x.png, 60 x 80: nothing)"
    assert found.above(0.5).names == ["dog", "cup"]  # a score at the threshold stays
    assert found.of_classes(["dog"]).scores.tolist() == [0.75, 0.25]
    assert len(found.of_classes([])) == 0
    assert torch.equal(found.of_classes(["cup"]).instances.pred_masks, MASKS[1:2])
    with pytest.raises(InputError, match=r"class 'dgo': none of the 3 classes\. Did you mean dog"):
        found.of_classes(["dgo"])
    with pytest.raises(InputError, match=r"They are cup, ball, dog$"):
        found.of_classes(["zebra"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat, dog", ["cat", "dog"]),
        ('dog, small,cat: "big",dog', ["dog, small", 'cat: "big"', "dog"]),
        ("dog, smal", ["dog", "smal"]),
    ],
)
def test_names_of_classes_may_have_commas(text, names):
    assert split_names(text, ["dog", "dog, small", "cat", 'cat: "big"']) == names
    assert class_indexes(["cat"], ["cat", "dog", "cat"]) == [0, 2]  # both of one name


def test_coco_results_and_json():
    entries = result().to_coco(9)
    masks = [decode(entry.pop("segmentation")) for entry in entries]
    box = [60.0, 40.0, 15.0, 10.0]
    assert entries[1] == {"image_id": 9, "category_id": 1, "bbox": box, "score": 0.5}
    assert np.array_equal(np.stack(masks), MASKS.numpy())
    assert [each["category_id"] for each in result(class_ids=[7, 8, 90]).to_coco(1)] == [90, 7, 90]
    content = json.loads(result().to_json())
    assert (content["image"], content["height"], content["width"]) == ("x.png", 60, 80)
    first = content["detections"][0]
    assert np.array_equal(decode(first.pop("mask")), MASKS[0].numpy())
    box = [5.0, 10.0, 25.0, 30.0]
    assert first == {"class": "dog", "class_index": 2, "category_id": 3, "score": 0.75, "box": box}


def test_masks_in_run_lengths_and_no_masks():
    packed = Result(result().picture, instances(False), NAMES, masks=encode(MASKS.numpy()))
    assert packed.to_coco(1) == result().to_coco(1)
    assert torch.equal(packed.above(0.5).instances.pred_masks, MASKS[:2])
    boxes = result(with_masks=False)
    assert (boxes.has_masks, packed.has_masks) == (False, True)
    assert "segmentation" not in boxes.to_coco(9)[0]
    assert "mask" not in boxes.to_dict()["detections"][0]


def test_pictures_never_go_over_the_image_itself(tmp_path):
    drawn = result().plot(min_side=60)
    assert (drawn[10:30, 5:25] != 90).any()
    assert (result().above(0.9).plot(min_side=60) == 90).all()
    assert result().plot().shape == (480, 640, 3)  # enlarged, so that labels can be read
    path = tmp_path / "x.png"
    Image.fromarray(np.full((60, 80, 3), 90, np.uint8)).save(path)
    before = path.read_bytes()
    found = Result(Picture(str(path), path), instances(), NAMES)
    (tmp_path / "y").mkdir()
    for same in (path, tmp_path / "y" / ".." / "x.png"):
        with pytest.raises(InputError, match=r"output .*x\.png: this is the input"):
            found.save(same)
    assert path.read_bytes() == before
    found.save(tmp_path / "drawn.png", min_side=60)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "drawn.png")), drawn)


def test_it_is_a_row_of_detections_with_masks_crops_and_tables():
    found = result()
    assert [(len(each), each.names, each.scores.tolist()) for each in found] == [
        *((1, ["dog"], [0.75]), (1, ["cup"], [0.5]), (1, ["dog"], [0.25]))
    ]
    assert np.array_equal(found[-1].masks, MASKS[2:].numpy())
    with pytest.raises(IndexError):
        found[3]
    assert np.array_equal(found.masks, MASKS.numpy())
    assert result(False).masks is None
    assert found.to_yolo().splitlines()[1] == "0 0.843750 0.750000 0.187500 0.166667 0.500000"
    pixels = np.arange(60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8)
    over = Instances(
        (60, 80), pred_boxes=Boxes(torch.tensor([[-5.0, 10, 5.5, 90], [90, 7, 95, 7]]))
    )
    over.scores, over.pred_classes = torch.tensor([0.5, 0.5]), torch.tensor([0, 0])
    first, second = Result(Picture("x", array=pixels), over, NAMES).crops()
    assert np.array_equal(first, pixels[10:, :6])
    assert np.array_equal(second, pixels[7:8, 79:])


def test_a_notebook_shows_the_drawn_image_and_names_are_no_code():
    found = Result(Picture("<b>x", array=np.zeros((60, 80, 3), np.uint8)), instances(), NAMES)
    page = found._repr_html_()
    data = re.fullmatch(r'<img src="data:image/jpeg;base64,(.*)"><p>(.*)</p>', page)
    assert Image.open(io.BytesIO(base64.b64decode(data[1]))).size == (640, 480)
    assert data[2] == "Result(&lt;b&gt;x, 60 x 80: 2 dog, 1 cup)"


def test_pandas(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pandas", None)
        with pytest.raises(
            InputError, match=r"to_pandas\(\): no package pandas\. pip install pandas"
        ):
            result().to_pandas()
    pytest.importorskip("pandas")
    table = result().to_pandas()
    assert table.columns.tolist() == ["x1", "y1", "x2", "y2", "score", "class_index", "class"]
    assert table.iloc[1].tolist() == [60, 40, 75, 50, 0.5, 0, "cup"]


def test_supervision(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "supervision", None)
        with pytest.raises(InputError, match=r"no package supervision\. pip install supervision"):
            result().to_supervision()
    pytest.importorskip("supervision")
    detections = result().to_supervision()
    assert detections.xyxy.tolist() == instances().pred_boxes.tensor.tolist()
    assert detections.confidence.tolist() == [0.75, 0.5, 0.25]
    assert detections.class_id.tolist() == [2, 0, 2]
    assert list(detections.data["class_name"]) == ["dog", "cup", "dog"]
    assert np.array_equal(detections.mask, MASKS.numpy())
