"""Pictures of instances: what is drawn where, every size and name, and files that are whole."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from tests.conftest import largest_file
from vitdet.drawing import PALETTE, colours_of, draw_instances, place_labels, save_image
from vitdet.utils.checks import InputError

GREY = 90
BOX = {"bbox": [40, 60, 160, 160], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}


def picture(height=240, width=320):
    return np.full((height, width, 3), GREY, np.uint8)


def predictions():
    """A box with a mask in its left half, and another box in the corner of score 0.2."""
    masks = torch.zeros(2, 240, 320, dtype=torch.bool)
    masks[0, 60:160, 40:100] = True
    masks[1, 200:230, 280:310] = True
    return Instances(
        (240, 320),
        pred_boxes=Boxes(torch.tensor([[40.0, 60, 160, 160], [280, 200, 310, 230]])),
        scores=torch.tensor([0.9, 0.2]),
        pred_classes=torch.tensor([0, 1]),
        pred_masks=masks,
    )


def changed(image, y, x):
    """Whether the 5 x 5 pixels around a place are no longer grey."""
    patch = image[y - 2 : y + 3, x - 2 : x + 3].astype(int)
    return bool((abs(patch - GREY) > 20).any())


def drawn(instances, threshold=0.5, names=("cup", "ball")):
    return draw_instances(picture(), instances, names, threshold, min_side=240)


def test_predictions_above_the_threshold_are_drawn_in_place():
    image = drawn(predictions())
    assert (image.shape, image.dtype) == ((240, 320, 3), np.uint8)
    assert changed(image, 120, 70)  # the mask
    assert not changed(image, 120, 125)  # in the box, outside the mask
    assert changed(image, 160, 125)  # the box's lower edge
    assert not changed(image, 215, 295)  # score 0.2
    assert changed(drawn(predictions(), 0.1), 215, 295)
    boxes = predictions()
    boxes.remove("pred_masks")
    assert changed(drawn(boxes), 160, 125)
    assert not changed(drawn(boxes), 120, 70)
    found = predictions()
    found.pred_masks[0, 60:160, 40:160] = True
    found.pred_masks[0, 90:130, 80:120] = False
    image = drawn(found)
    assert not changed(image, 110, 100)  # a hole stays open
    assert changed(image, 90, 100)  # its outline
    found.pred_masks[0] = False  # nothing to be seen
    assert draw_instances(picture(), found, ["cup", "ball"]).shape == (480, 640, 3)


def test_ground_truth_with_polygons_crowd_regions_and_without_masks():
    runs = [180 + 240 * 200] + [40, 200] * 99 + [40, 20 + 240 * 20]
    polygon = BOX | {"segmentation": [[40, 60, 100, 60, 100, 160, 40, 160]]}
    crowd = {"bbox": [200, 180, 100, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    crowd |= {"segmentation": {"size": [240, 320], "counts": runs}, "iscrowd": 1}
    image = drawn([polygon, crowd])
    assert changed(image, 120, 70)
    assert not changed(image, 120, 125)
    assert changed(image, 200, 250)
    assert changed(drawn([BOX]), 160, 125)
    assert not changed(drawn([BOX]), 120, 70)


@pytest.mark.parametrize(
    "box",
    [
        [300, 100, 320, 140],  # its label begins at the left side, and reaches over the right one
        [250, 225, 320, 240],  # a label beside a flat box
    ],
)
def test_labels_stay_in_the_picture(box):
    def letters(box):
        """Bright pixels of the label's text."""
        return int((drawn([BOX | {"bbox": box}], names=["a long name"]) > 180).all(-1).sum())

    width, height = box[2] - box[0], box[3] - box[1]
    assert letters(box) == letters([80, 100, 80 + width, 100 + height]) > 50


def scattered(count, side, width=640, height=480):
    """Boxes of a third of a side to a whole one all over an image."""
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, (width - side, height - side), (count, 2))
    return np.hstack([corners, corners + rng.uniform(side / 3, side, (count, 2))])


def hidden(labels, boxes):
    """The share (N, M) of each of M boxes that each of N labels hides."""
    low = np.maximum(labels[:, None, :2], boxes[None, :, :2])
    high = np.minimum(labels[:, None, 2:], boxes[None, :, 2:])
    return np.clip(high - low, 0, None).prod(-1) / (boxes[:, 2:] - boxes[:, :2]).prod(-1)


@pytest.mark.parametrize(("count", "side"), [(5, 200), (35, 60), (35, 250), (100, 30), (100, 200)])
def test_labels_hide_neither_each_other_nor_objects_where_there_is_room(count, side):
    boxes, size = scattered(count, side), np.array([64, 16])
    corners = place_labels(boxes, np.tile(size, (count, 1)), (480, 640))
    assert (corners >= 0).all()
    assert (corners + size <= [640, 480]).all()
    labels = np.hstack([corners, corners + size])
    assert (hidden(labels, labels) == np.eye(count)).all()
    assert (hidden(labels, boxes).max(0) < 1 / 3).all()


def test_labels_without_room_stay_in_the_image():
    boxes = scattered(100, 30, 60, 60)
    corners = place_labels(boxes, np.tile([64, 16], (100, 1)), (60, 60))
    assert (corners[:, 0] == 0).all()
    assert (corners[:, 1] <= 60 - 16).all()


def test_classes_of_an_image_have_colours_of_their_own_that_colour_blind_eyes_tell_apart():
    colours = colours_of([3, 19, 35, 3])  # all three would have the fourth
    assert colours[3] == PALETTE[3]
    assert len(set(colours.values())) == 3
    assert len(set(colours_of(range(40)).values())) == len(PALETTE) == len(set(PALETTE))
    # Machado, Oliveira and Fernandes 2009: protanopia and deuteranopia, of linear RGB
    protan = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    deutan = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    for eye in (np.eye(3), np.array(protan), np.array(deutan)):
        seen = np.clip(np.array(PALETTE) / 255, 0, 1) ** 2.2 @ eye.T
        image = (np.clip(seen, 0, 1) ** (1 / 2.2)).astype(np.float32)[None]
        lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)[0]
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1000 * np.eye(len(lab))
        assert apart.min() > 15
        assert np.ptp(lab[:, 0]) > 50


def test_a_line_is_seen_on_its_own_colour():
    image = np.full((240, 320, 3), PALETTE[0], np.uint8)
    assert (draw_instances(image, [BOX], ["cup"], min_side=240)[110, 36:44] < 60).all(-1).any()


@pytest.mark.parametrize(
    "name", [r"$\frac$", "a\x1b[31m\0\nb", "\ud800", "\u202e猫🙂", "x" * 10**5]
)
def test_every_name_can_be_drawn(name):
    assert (drawn([BOX], names=[name]) < 60).all(-1).any()


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((48, 64), (480, 640)),
        ((6000, 40), (6000, 40)),
        ((2, 500), (16, 4096)),
        ((1, 1), (480,) * 2),
    ],
)
def test_small_images_are_enlarged_up_to_an_end(size, wanted):
    annotation = BOX | {"bbox": [-5, 0, size[1], size[0]], "segmentation": [[0, 0, 1, 0, 1, 1]]}
    assert draw_instances(picture(*size), [annotation], ["cup"]).shape == (*wanted, 3)
    assert (draw_instances(picture(*size), [], ["cup"]) == GREY).all()


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 \(4, 4, 3\)"),
        (np.zeros((4, 4), np.uint8), r"uint8 \(4, 4\)"),
        (picture(1, 65_501), r"uint8 \(1, 65501, 3\)\. Cut it into parts"),
    ],
)
def test_other_images_are_refused(image, got):
    with pytest.raises(InputError, match=rf"image to draw on: .*up to 65500 pixels, got {got}"):
        draw_instances(image, [], [])


def test_saved_images_are_whole_or_not_there(tmp_path):
    for name in ("a.png", "b.jpg"):
        save_image(picture(), tmp_path / name)
        assert np.asarray(Image.open(tmp_path / name)).shape == (240, 320, 3)
    for name in ("a.bmp", "missing/a.png"):
        with pytest.raises(InputError, match=r"expected a \.jpg or \.png in a folder that is"):
            save_image(picture(), tmp_path / name)
    with pytest.raises(InputError, match=r"picture .*c\.jpg: could not be written \("):
        save_image(picture(1, 66_000), tmp_path / "c.jpg")
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    with largest_file(1024), pytest.raises(OSError, match=r"File too large: '.*/d.jpg'"):
        save_image(image, tmp_path / "d.jpg")
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.jpg"}
