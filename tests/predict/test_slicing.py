"""Sliced inference: parts cover the image, each object is found once, memory stays small."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from vitdet.predict.predictor import Predictor
from vitdet.predict.slicing import Slices, detect_sliced, keep
from vitdet.utils.run_lengths import decode

SMALLEST = 8  # pixels: an object that is smaller after the resize is not found by the stand-in
SIZES = []  # of the images that it saw


def find_bright(images, side=128):
    """A detector that knows its job: bright rectangles, seen after a resize to `side` pixels.

    What a part cuts is a smaller rectangle to it. The score is a little higher for smaller ones, so
    that a piece of an object has a better one than the object, and lower in larger images.
    """
    outputs = []
    for image in images:
        height, width = image.shape[:2]
        SIZES.append((height, width))
        small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)[..., 0] > 128
        count, labels, stats, _ = cv2.connectedComponentsWithStats(small.astype(np.uint8))
        rows = [i for i in range(1, count) if min(stats[i][2:4]) >= SMALLEST]
        scale = torch.tensor([width, height, width, height]) / side
        boxes = torch.tensor([[s[0], s[1], s[0] + s[2], s[1] + s[3]] for s in stats[rows]])
        masks = np.zeros((len(rows), height, width), dtype=bool)
        for mask, i in zip(masks, rows, strict=True):
            mask[:] = cv2.resize((labels == i).astype(np.uint8), (width, height)).astype(bool)
        found = Instances((height, width), pred_boxes=Boxes(boxes.reshape(-1, 4) * scale))
        found.scores = torch.tensor([0.9 - width / 2_000 - stats[i][4] / 40_000 for i in rows])
        found.pred_classes = torch.zeros(len(rows), dtype=torch.int64)
        found.pred_masks = torch.from_numpy(masks)
        outputs.append(found)
    return outputs


def without_masks(images):
    found = find_bright(images)
    for each in found:
        each.remove("pred_masks")
    return found


def drawn(size, *rectangles):
    image = np.zeros((*size, 3), np.uint8)
    for x1, y1, x2, y2 in rectangles:
        image[y1:y2, x1:x2] = 255
    return image


def boxes_of(found):
    return {tuple(round(v) for v in box) for box in found.pred_boxes.tensor.tolist()}


@pytest.mark.parametrize("size", [(128, 128), (129, 500), (700, 127), (1000, 1000)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_parts_cover_the_image_and_overlap_enough(size, overlap):
    seen = np.zeros(size, dtype=bool)
    places = Slices(128, overlap).places(*size)
    for top, left in places:
        assert 0 <= top <= max(0, size[0] - 128)
        assert 0 <= left <= max(0, size[1] - 128)
        seen[top : top + 128, left : left + 128] = True
    assert seen.all()
    for starts in ({top for top, _ in places}, {left for _, left in places}):
        assert (np.diff(sorted(starts)) <= np.ceil(128 * (1 - overlap))).all()
    assert len(places) == len(set(places))


RECTANGLES = (
    (20, 20, 50, 44),  # in one part
    (90, 200, 128, 236),  # over a border, whole in a neighbour
    (300, 250, 331, 281),  # where four parts meet
    (0, 330, 24, 400),  # at the image's own edge, which cuts nothing
    (150, 20, 380, 120),  # larger than a part: only the whole image shows it
)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_object_is_found_once_in_its_place(batch_size):
    image = drawn((400, 420), *RECTANGLES)
    found, lengths = detect_sliced(find_bright, image, Slices(128, 0.4), batch_size)
    exact = {box for box in boxes_of(found) if box in RECTANGLES}
    assert exact == set(RECTANGLES[:4])
    (large,) = [box for box in boxes_of(found) if box not in exact]
    assert np.abs(np.subtract(large, RECTANGLES[4])).max() <= 4  # seen at a third of its size
    assert (found.scores.diff() <= 0).all()
    assert found.image_size == (400, 420)
    assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
    for box, mask in zip(found.pred_boxes.tensor.round().int().tolist(), lengths, strict=True):
        x1, y1, x2, y2 = box
        expected = np.zeros((400, 420), dtype=bool)
        expected[y1:y2, x1:x2] = True
        overlap = (decode(mask) & expected).sum() / (decode(mask) | expected).sum()
        assert overlap > 0.95
    boxes, none = detect_sliced(without_masks, image, Slices(128, 0.4))
    assert (len(boxes), none) == (5, None)


def test_small_and_large_objects_and_none():
    """36 objects of 14 pixels, of which the plain path sees none; pieces where nothing is whole."""
    places = [(60 + 160 * i, 70 + 160 * j) for i in range(6) for j in range(6)]
    boxes = [(x, y, x + 14, y + 14) for x, y in places]
    image = drawn((1024, 1024), *boxes)
    assert len(find_bright([image])[0]) == 0
    found, lengths = detect_sliced(find_bright, image, Slices(128, 0.25))
    assert boxes_of(found) == set(boxes)
    assert [mask["size"] for mask in lengths] == [[1024, 1024]] * 36
    image = drawn((128, 420), (20, 40, 400, 80))
    found, _ = detect_sliced(find_bright, image, Slices(128, 0.25, whole=False))
    x1, _, x2, _ = found.pred_boxes.tensor.unbind(1)
    assert (x1.min(), x2.max()) == (20, 400)
    assert len(found) > 1
    found, lengths = detect_sliced(find_bright, drawn((300, 300)), Slices(128))
    assert (len(found), lengths) == (0, [])


def test_a_large_image_is_never_looked_at_in_its_own_size():
    SIZES.clear()
    image = drawn((1000, 5000), (500, 200, 4000, 900))
    found, (mask,) = detect_sliced(find_bright, image, Slices(640, 0.1))
    assert max(max(size) for size in SIZES) == 2048  # the whole, made smaller
    assert SIZES.count((640, 640)) == len(SIZES) - 1
    assert np.abs(np.subtract(boxes_of(found).pop(), (500, 200, 4000, 900))).max() <= 40
    pixels = decode(mask)
    assert pixels.shape == (1000, 5000)
    assert pixels[250:850, 600:3900].all()
    assert not pixels[:, 4100:].any()


def test_which_of_two_detections_stays():
    """Rows: a whole object; the same one seen elsewhere; its piece; a small one in front of it."""
    boxes = torch.tensor([[10.0, 10, 90, 90], [11, 9, 92, 90], [10, 10, 45, 90], [30, 30, 60, 60]])
    scores = torch.tensor([0.6, 0.5, 0.9, 0.4])
    classes, owner = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 2, 1])
    cut = torch.tensor([False, False, True, False])

    def kept(**changes):
        given = {"boxes": boxes, "scores": scores, "classes": classes, "cut": cut, "owner": owner}
        return sorted(keep(**{**given, **changes}).tolist())

    assert kept() == [0, 3]
    assert kept(cut=torch.zeros(4, dtype=torch.bool)) == [0, 2, 3]  # then it is no piece
    assert kept(owner=torch.tensor([0, 0, 0, 0])) == [0, 1, 2, 3]  # the detector's own choice
    assert kept(classes=torch.tensor([0, 1, 2, 0])) == [0, 1, 2, 3]


def test_through_a_predictor(drawn_run):
    """A part is resized by the recipe's rule; one part is the plain path to the bit."""
    options = {"threshold": 0.0, "device": "cpu", "precision": "fp32"}
    plain = Predictor.from_checkpoint(drawn_run.weights, **options)
    cut = Predictor.from_checkpoint(drawn_run.weights, **options, slices=Slices(128, 0.0))
    found, wanted = cut(drawn_run.images[0]).instances, plain(drawn_run.images[0]).instances
    assert torch.equal(found.pred_boxes.tensor, wanted.pred_boxes.tensor)
    assert torch.equal(found.pred_masks, wanted.pred_masks)
    sizes, forward = [], cut.detector.forward

    def noted(batch):
        sizes.extend((tuple(each["image"].shape), each["height"]) for each in batch)
        return forward(batch)

    cut.detector.forward = noted
    pixels = [np.asarray(Image.open(path)) for path in drawn_run.images[:4]]
    result = cut(np.vstack([np.hstack(pixels[:2]), np.hstack(pixels[2:])]))
    assert sizes == [((3, 128, 128), 256)] + [((3, 128, 128), 128)] * 4  # the whole and four parts
    part = result.above(float(np.median(result.scores)))
    assert 10 < len(part) < len(result)
    assert part.instances.pred_masks.shape == (len(part), 256, 256)
