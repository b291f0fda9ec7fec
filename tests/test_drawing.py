from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances
from PIL import Image

from vitdet.drawing import contact_sheet, draw_instances, save_image
from vitdet.utils.checks import InputError

GREY = 90


def picture(height: int = 240, width: int = 320) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def predictions(scores: tuple[float, ...] = (0.9, 0.2)) -> Instances:
    """A box with a mask in its left half, and another box in the corner."""
    masks = torch.zeros(2, 240, 320, dtype=torch.bool)
    masks[0, 60:160, 40:100] = True
    masks[1, 200:230, 280:310] = True
    return Instances(
        (240, 320),
        pred_boxes=Boxes(torch.tensor([[40.0, 60, 160, 160], [280, 200, 310, 230]])),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor([0, 1]),
        pred_masks=masks,
    )


def changed(image: np.ndarray, y: int, x: int) -> bool:
    """Whether the 5 x 5 pixels around a place are no longer grey."""
    patch = image[y - 2 : y + 3, x - 2 : x + 3].astype(int)
    return bool((abs(patch - GREY) > 20).any())


def test_predictions_above_the_threshold_are_drawn_in_place():
    drawn = draw_instances(picture(), predictions(), ["cup", "ball"], 0.5, min_side=240)
    assert drawn.shape == (240, 320, 3)
    assert drawn.dtype == np.uint8
    assert changed(drawn, 120, 70)  # the mask
    assert not changed(drawn, 120, 125)  # in the box, outside the mask
    assert changed(drawn, 160, 125)  # the box's lower edge
    assert not changed(drawn, 215, 295)  # score 0.2
    both = draw_instances(picture(), predictions(), ["cup", "ball"], 0.1, min_side=240)
    assert changed(both, 215, 295)


def test_drawing_is_repeatable_and_takes_no_random_numbers():
    before = np.random.get_state()[1].copy()
    first = draw_instances(picture(), predictions(), ["cup", "ball"], 0.0)
    second = draw_instances(picture(), predictions(), ["cup", "ball"], 0.0)
    assert np.array_equal(first, second)
    assert np.array_equal(np.random.get_state()[1], before)


def test_small_images_are_enlarged_for_their_labels():
    drawn = draw_instances(picture(48, 64), [], ["cup"], min_side=480)
    assert drawn.shape == (480, 640, 3)
    assert (drawn == GREY).all()


def test_ground_truth_with_polygons_and_crowd_regions():
    crowd = torch.zeros(1, 240, 320, dtype=torch.uint8)
    crowd[0, 180:220, 200:300] = 1
    runs = [180 + 240 * 200] + [40, 200] * 99 + [40, 20 + 240 * 20]
    annotations = [
        {
            "bbox": [40, 60, 120, 100],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 0,
            "segmentation": [[40, 60, 100, 60, 100, 160, 40, 160]],
        },
        {
            "bbox": [200, 180, 100, 40],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 0,
            "segmentation": {"size": [240, 320], "counts": runs},
            "iscrowd": 1,
        },
    ]
    drawn = draw_instances(picture(), annotations, ["cup"], min_side=240)
    assert changed(drawn, 120, 70)
    assert not changed(drawn, 120, 125)
    assert changed(drawn, 200, 250)


def test_ground_truth_without_masks_and_predictions_without_masks():
    annotations = [{"bbox": [40, 60, 160, 160], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}]
    drawn = draw_instances(picture(), annotations, ["cup"], min_side=240)
    assert changed(drawn, 160, 125)
    assert not changed(drawn, 120, 70)
    found = predictions()
    found.remove("pred_masks")
    drawn = draw_instances(picture(), found, ["cup", "ball"], 0.5, min_side=240)
    assert changed(drawn, 160, 125)
    assert not changed(drawn, 120, 70)


def test_masks_may_come_as_detectron2_structures():
    found = predictions()
    found.pred_masks = BitMasks(found.pred_masks).tensor
    assert changed(draw_instances(picture(), found, ["a", "b"], 0.5, min_side=240), 120, 70)


def test_holes_of_masks_stay_open():
    found = predictions()
    found.pred_masks[0] = False
    found.pred_masks[0, 60:160, 40:160] = True
    found.pred_masks[0, 90:130, 80:120] = False
    drawn = draw_instances(picture(), found, ["cup", "ball"], 0.5, min_side=240)
    assert not changed(drawn, 110, 100)
    assert changed(drawn, 90, 100)  # the outline of the hole
    assert changed(drawn, 75, 60)
    found.pred_masks[0] = False  # nothing to be seen
    assert draw_instances(picture(), found, ["cup", "ball"], 0.5).shape == (480, 640, 3)


@pytest.mark.parametrize(
    "box",
    [
        [300, 100, 320, 140],  # its label begins at the left side, and reaches over the right one
        [250, 225, 320, 240],  # a label beside a flat box
    ],
)
def test_labels_stay_in_the_picture(box):
    def drawn(box):
        annotation = {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        whole = draw_instances(picture(), [annotation], ["a long name"], min_side=240)
        return int((whole < 60).all(-1).sum())  # pixels of the label's black ground

    width, height = box[2] - box[0], box[3] - box[1]
    assert drawn(box) == pytest.approx(drawn([80, 100, 80 + width, 100 + height]), rel=0.05)


@pytest.mark.parametrize(
    "name", [r"$\frac$", "a\x1b[31m\0\nb", "\ud800", "\u202e猫🙂", "x" * 100_000, "", "y " * 200]
)
def test_every_name_can_be_drawn(name):
    annotation = {"bbox": [40, 60, 160, 160], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    drawn = draw_instances(picture(), [annotation], [name], min_side=240)
    assert drawn.shape == (240, 320, 3)
    assert (drawn < 60).all(-1).any()


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        ((6000, 40), (6000, 40)),
        ((40, 2000), (82, 4096)),
        ((2, 500), (16, 4096)),
        ((1, 1), (480, 480)),
        ((300, 9000), (300, 9000)),
    ],
)
def test_the_enlargement_of_an_elongated_image_has_an_end(size, drawn):
    annotation = {"bbox": [-5, 0, size[1], size[0]], "bbox_mode": BoxMode.XYXY_ABS}
    annotation |= {"category_id": 0, "segmentation": [[0, 0, 1, 0, 1, 1]]}
    assert draw_instances(picture(*size), [annotation], ["cup"]).shape == (*drawn, 3)
    with pytest.raises(InputError, match=r"up to 65500 pixels, got 1 x 65501\. Cut it into parts"):
        draw_instances(picture(1, 65_501), [], [])


@pytest.mark.parametrize(
    ("image", "got"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 \(4, 4, 3\)"),
        (np.zeros((4, 4), np.uint8), r"uint8 \(4, 4\)"),
    ],
)
def test_other_images_are_refused(image, got):
    with pytest.raises(InputError, match=rf"image to draw on: expected uint8 RGB .*, got {got}\."):
        draw_instances(image, [], [])


def test_a_contact_sheet_has_its_pictures_in_rows():
    red, blue = picture(100, 200), picture(50, 50)
    red[:] = (255, 0, 0)
    blue[:] = (0, 0, 255)
    sheet = contact_sheet([[red, blue], [blue]], titles=["truth", "found"], cell_height=100)
    assert sheet.shape == (28 + 3 * 8 + 200, 3 * 8 + 200 + 100, 3)
    assert sheet[36 + 50, 8 + 100].tolist() == [255, 0, 0]
    assert sheet[36 + 50, 8 + 200 + 8 + 50].tolist() == [0, 0, 255]
    assert sheet[36 + 108 + 50, 8 + 50].tolist() == [0, 0, 255]
    assert sheet[36 + 108 + 50, 8 + 200 + 8 + 50].tolist() == [255, 255, 255]
    assert (sheet[8:30] < 128).any()  # the titles


def test_an_empty_contact_sheet_is_refused():
    with pytest.raises(InputError, match=r"contact sheet: expected pictures, got none"):
        contact_sheet([[], []])


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_saved_images_are_whole(tmp_path: Path, name):
    save_image(picture(), tmp_path / name)
    assert np.asarray(Image.open(tmp_path / name)).shape == (240, 320, 3)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_images_that_cannot_be_saved(tmp_path: Path):
    with pytest.raises(InputError, match=r"expected a name ending in \.jpg or \.png, got \.bmp"):
        save_image(picture(), tmp_path / "a.bmp")
    with pytest.raises(
        InputError, match=r"picture .*a\.png: could not be written, there is no such"
    ):
        save_image(picture(), tmp_path / "missing" / "a.png")
    with pytest.raises(InputError, match=r"picture .*a\.jpg: could not be written \("):
        save_image(picture(1, 66_000), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_half_a_picture_is_an_error(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))  # bytes of a file
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/a.jpg'"):
            save_image(image, tmp_path / "a.jpg")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
