"""A view shows what detectron2's transforms leave, for the same random numbers."""

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from PIL import Image

from vitdet.data.augment import (
    View,
    draw_view,
    fixed_resize,
    large_scale_jitter,
    resize_shortest_edge,
)
from vitdet.data.images import read_image, read_reduced
from vitdet.utils.env import random_state

CASES = [
    (large_scale_jitter(64, 0.1, 2.0), (48, 67)),
    (large_scale_jitter(96, 1.99, 1.999), (50, 51)),
    (large_scale_jitter(64, 1.0, 1.5, flip=False), (300, 200)),  # smaller, and yet cropped
    (resize_shortest_edge([40, 90], 130, flip=True), (59, 83)),
    (fixed_resize(90, 20, flip=True), (60, 80)),  # higher and narrower
    ([T.CropTransform(5, 7, 20, 30)], (40, 50)),
    ([T.Resize((33, 47), interp=Image.Resampling.NEAREST)], (20, 30)),
]


def _noise(height, width, seed=0):
    """A picture with edges and texture."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    blocks = np.kron(coarse, np.ones((16, 16, 1), dtype=np.uint8))[:height, :width]
    grain = rng.integers(-30, 30, blocks.shape)
    return (blocks.astype(int) + grain).clip(0, 255).astype(np.uint8)


def _polygons(size, seed):
    """Stars, polygons that cross themselves, objects of two parts, and one beyond the edge."""
    rng = np.random.default_rng(seed)
    objects = []
    for index in range(12):
        parts = []
        for _ in range(1 + index % 2):
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 20)))
            if index % 4 == 3:
                rng.shuffle(angles)
            radius = rng.uniform(0.2, 1, len(angles)) * min(size) * rng.uniform(0.05, 0.6)
            centre = rng.uniform(0, 1, 2) * size[::-1]
            points = centre + radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
            points = points if index == 5 else points.clip(0, size[::-1])
            parts.append(points.round(2).ravel().tolist())
        objects.append(parts)
    return objects


def _expected_mask(segmentation, transforms, size):
    annotation = {"segmentation": segmentation, "bbox": [0, 0, 1, 1], "bbox_mode": 0}
    moved = detection_utils.transform_instance_annotations(annotation, transforms, size)
    moved["category_id"] = 0
    instances = detection_utils.annotations_to_instances([moved], size, "bitmask")
    return instances.gt_masks.tensor[0].numpy().astype(bool)


def _got_mask(drawn, size):
    mask = np.zeros(size, dtype=bool)
    (left, top, right, bottom), pixels = drawn
    mask[top:bottom, left:right] = pixels
    if pixels.size:  # the rectangle is tight
        assert all(edge.any() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    else:
        assert drawn[0] == (0, 0, 0, 0)
    return mask


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("augmentations", "size"), CASES)
def test_a_view_is_what_the_transforms_leave(augmentations, size, seed):
    listed = T.AugmentationList(augmentations)
    with random_state(seed):
        view = draw_view(listed, size)
    with random_state(seed):
        transforms = listed(T.AugInput(np.zeros((*size, 3), dtype=np.uint8)))
    image = _noise(*size, seed=seed)
    expected = transforms.apply_image(image)
    got = view.image(Image.fromarray(image))
    assert view.size == got.shape[:2] == expected.shape[:2]
    difference = got.astype(int) - expected
    assert np.abs(difference).max() <= 5  # 1 by rounding, the rest by up to 1/64 of a pixel
    assert np.abs(difference).mean() < 0.3
    assert abs(difference.mean()) < 0.03  # not darker, not brighter
    corners = np.random.default_rng(seed).uniform(0, 1, (9, 2, 2))
    boxes = (np.sort(corners, axis=1) * size[::-1]).reshape(9, 4)
    clipped = transforms.apply_box(boxes.copy()).clip(min=0)
    clipped = np.minimum(clipped, (*view.size[::-1], *view.size[::-1]))
    np.testing.assert_allclose(view.boxes(boxes), clipped, rtol=0, atol=1e-12)
    assert view.boxes(np.zeros((0, 4))).shape == (0, 4)
    objects = _polygons(size, seed)
    objects += [mask_util.merge(mask_util.frPyObjects(parts, *size)) for parts in objects]
    objects.append(mask_util.encode(np.asfortranarray(np.zeros(size, dtype=np.uint8))))
    for item, drawn in zip(objects, view.masks(objects), strict=True):
        mask = _expected_mask(item, transforms, view.size)
        np.testing.assert_array_equal(_got_mask(drawn, view.size), mask)


@pytest.mark.parametrize("left", [0, 16, 990])
def test_small_objects_anywhere_in_a_large_view(left):
    view = View(source=(1000, 1000), resized=(1000, 1000))
    corners = [[left + 0.3, 700.2, left + 9.6, 703.1, left + 4.4, 711.7]]
    expected = mask_util.decode(mask_util.frPyObjects(corners, 1000, 1000))[..., 0]
    (drawn,) = view.masks([corners])
    np.testing.assert_array_equal(_got_mask(drawn, view.size), expected)


TURNED = [((160, 240), 4, 2, turn) for turn in range(1, 9)]
ODD = [((161, 243), 4, 1, turn) for turn in range(1, 9)]  # the incomplete pixel may come first
REDUCED = [((273, 351), *each, None) for each in ((1, 1), (3, 1), (4, 2), (9, 4), (17, 8))]


@pytest.mark.parametrize(("size", "shrink", "reduction", "turn"), [*REDUCED, *TURNED, *ODD])
def test_reduced_decoding(tmp_path, size, shrink, reduction, turn):
    """Against decoding in full and resizing by the transforms."""
    options = {}
    if turn is not None:
        exif = options["exif"] = Image.Exif()
        exif[0x0112] = turn
    # smooth, as photographs are, so that the test sees misplaced pixels rather than JPEG's noise
    picture = Image.fromarray(cv2.GaussianBlur(_noise(*size), (0, 0), 3))
    picture.save(tmp_path / "image.jpg", quality=95, **options)
    source = size[::-1] if turn in (5, 6, 7, 8) else size
    record = {"file_name": str(tmp_path / "image.jpg"), "height": source[0], "width": source[1]}
    resized = (source[0] // shrink, source[1] // shrink)
    for flip in (False, True):
        view = View(source=source, resized=resized, flip=flip)
        picture, used = read_reduced(record, view.shrink)
        assert used == reduction
        image = read_image(record)[:, ::-1] if flip else read_image(record)
        expected = T.ResizeTransform(*source, *resized).apply_image(np.ascontiguousarray(image))
        difference = np.abs(view.image(picture, used).astype(int) - expected).mean()
        assert difference < (0.01 if used == 1 else 1.5)  # aliasing would give more than 5
