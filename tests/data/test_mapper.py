import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, PolygonMasks
from PIL import Image

from vitdet.data.augment import large_scale_jitter, resize_shortest_edge
from vitdet.data.datasets import coco_dataset, coco_mini
from vitdet.data.mapper import Mapper
from vitdet.utils.checks import InputError
from vitdet.utils.env import random_state

SIZE = (24, 32)  # height, width
both = pytest.mark.parametrize("fast", [False, True])


def _record(folder, crowd=()):
    """A record whose image shows exactly its masks: object i is white in channel i."""
    masks = np.zeros((*SIZE, 3), dtype=bool)  # three objects that touch no other
    masks[2:9, 3:10, 0] = True
    masks[5:9, 7:10, 0] = False  # an L
    masks[14:22, 20:30, 1] = np.tri(8, 10, dtype=bool)
    masks[12:20, 2:8, 2] = True
    masks[14:16, 4:6, 2] = False  # with a hole
    path = folder / "blobs.png"
    Image.fromarray(masks.astype(np.uint8) * 255).save(path)
    annotations = []
    for index in range(3):
        encoded = mask_util.encode(np.asfortranarray(masks[..., index], dtype=np.uint8))
        entry = {"category_id": index, "bbox": mask_util.toBbox(encoded).tolist()}
        entry |= {"bbox_mode": BoxMode.XYWH_ABS, "segmentation": encoded}
        annotations.append({**entry, "iscrowd": int(index in crowd)})
    record = {"file_name": str(path), "image_id": 5, "annotations": annotations}
    return record | {"height": SIZE[0], "width": SIZE[1]}


def _extent(mask):
    """Smallest box XYXY round the true pixels."""
    ys, xs = np.nonzero(mask)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@both
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_jittered_masks_and_boxes_are_those_of_the_jittered_image(tmp_path, scale, fast):
    """The image shows its masks, so after any flip, doubling and crop it must still show them."""
    mapper = Mapper(large_scale_jitter(32, scale, scale), is_train=True, fast=fast)
    record, counts = _record(tmp_path), []
    boxes = [list(annotation["bbox"]) for annotation in record["annotations"]]
    for seed in range(12):
        with random_state(seed):
            result = mapper(record)
        assert result["image"].shape == (3, *((24, 32) if scale == 1 else (32, 32)))
        shown, instances = result["image"].numpy() > 127, result["instances"]
        expected = [index for index in range(3) if shown[index].any()]
        assert instances.gt_classes.tolist() == expected
        for place, index in enumerate(expected):
            np.testing.assert_array_equal(instances.gt_masks.tensor[place].numpy(), shown[index])
            assert instances.gt_boxes.tensor[place].tolist() == _extent(shown[index])
        counts.append(len(expected))
    assert min(counts) == 3 if scale == 1 else min(counts) < 3  # the jitter cuts objects away
    # the record stays as it was, and what went before does not matter
    assert [annotation["bbox"] for annotation in record["annotations"]] == boxes
    with random_state(11):
        assert torch.equal(mapper(record)["image"], result["image"])


@both
def test_a_cut_triangle_gets_a_tight_box(tmp_path, fast):
    record = _record(tmp_path)
    box = {"category_id": 0, "bbox": [0, 0, 20, 20], "bbox_mode": BoxMode.XYWH_ABS}
    record["annotations"] = [{**box, "segmentation": [[0, 0, 20, 0, 0, 20]]}]
    for recompute, bottom in ((True, 10), (False, 20)):
        options = {"recompute_boxes": recompute, "fast": fast}
        mapper = Mapper([T.CropTransform(10, 0, 10, 20)], is_train=True, **options)
        (found,) = mapper(record)["instances"].gt_boxes.tensor.tolist()
        assert found == pytest.approx([0, 0, 10, bottom], abs=1)


@both
def test_crowd_regions_are_no_training_objects(tmp_path, fast):
    record = _record(tmp_path, crowd=(0,))
    counts = [40, 20, 24 * 32 - 60]  # as files have crowd regions: numbers, not text
    record["annotations"][0]["segmentation"] = {"size": list(SIZE), "counts": counts}
    instances = Mapper([], is_train=True, fast=fast)(record)["instances"]
    assert instances.gt_classes.tolist() == [1, 2]
    instances = Mapper([], is_train=True, fast=fast)(_record(tmp_path, (0, 1, 2)))["instances"]
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_masks.tensor.shape == (0, *SIZE)


@both
def test_modes_and_channels(tmp_path, fast):
    record = _record(tmp_path)
    result = Mapper(resize_shortest_edge(48, 1000), is_train=False, fast=fast)(record)
    assert sorted(result) == ["file_name", "height", "image", "image_id", "width"]
    assert result["image"].shape == (3, 48, 64)
    assert result["image"].dtype == torch.uint8
    assert (result["height"], result["width"], result["image_id"]) == (*SIZE, 5)
    options = {"use_masks": False, "image_format": "BGR", "fast": fast}
    boxes = Mapper([], is_train=True, **options)(record)
    assert sorted(boxes["instances"].get_fields()) == ["gt_boxes", "gt_classes"]
    assert boxes["instances"].gt_boxes.tensor[0].tolist() == [3, 2, 10, 9]
    rgb = Mapper([], is_train=False, fast=fast)(record)["image"]
    assert torch.equal(boxes["image"], rgb.flip(0))
    del record["annotations"][1]["segmentation"]
    with pytest.raises(InputError, match=r"of category 1 has no segm.*use_masks=False"):
        Mapper([], is_train=True, fast=fast)(record)


@both
@pytest.mark.parametrize("recompute", [False, True])
def test_polygon_format(tiny, tmp_path, fast, recompute):
    record = coco_dataset(tiny.json_file, tiny.images).records[0]
    options = {"mask_format": "polygon", "recompute_boxes": recompute, "fast": fast}
    # flipped, the first object is at x from 25 to 35, the second from 8 to 20, then twice that
    cut = [T.HFlipTransform(40), T.ResizeTransform(30, 40, 60, 80), T.CropTransform(0, 0, 38, 60)]
    instances = Mapper(cut, is_train=True, **options)(record)["instances"]
    assert isinstance(instances.gt_masks, PolygonMasks)
    assert instances.gt_classes.tolist() == [1]
    assert instances.gt_boxes.tensor.tolist() == [[16, 20, 38, 44]]
    (polygon,) = instances.gt_masks.polygons[0]
    corners = sorted(map(tuple, polygon.reshape(-1, 2).tolist()))
    assert corners == [(16, 20), (16, 44), (38, 20), (38, 44)]
    with pytest.raises(InputError, match=r'has run lengths, and mask_format.*"bitmask"'):
        Mapper([], is_train=True, mask_format="polygon")(_record(tmp_path))


@both
@pytest.mark.parametrize("mask_format", ["bitmask", "polygon"])
def test_objects_outside_the_crop_leave_nothing(tiny, fast, mask_format):
    record = coco_dataset(tiny.json_file, tiny.images).records[0]
    steps = [T.CropTransform(33, 23, 7, 7)]  # beyond both objects
    mapper = Mapper(steps, is_train=True, mask_format=mask_format, fast=fast)
    instances = mapper(record)["instances"]
    assert len(instances) == len(instances.gt_masks) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64
    assert instances.image_size == (7, 7)


@pytest.mark.parametrize("size", [128, pytest.param(512, marks=pytest.mark.slow)])
def test_same_as_detectron2s_mapper_on_real_images(size):
    try:
        records = coco_mini("val", 32).records
    except InputError as error:
        pytest.skip(str(error))
    augmentations = large_scale_jitter(size)
    masks = {"use_instance_mask": True, "instance_mask_format": "bitmask"}
    theirs = DatasetMapper(
        True, augmentations=augmentations, image_format="RGB", recompute_boxes=True, **masks
    )
    mappers = [Mapper(augmentations, is_train=True, fast=fast) for fast in (False, True)]
    equal = objects = 0
    for seed, record in enumerate(records):
        results = []
        for mapper in (theirs, *mappers):
            with random_state(seed):
                results.append(mapper(record))
        wanted, exact, quick = results
        truth = wanted["instances"]
        assert torch.equal(exact["image"], wanted["image"])
        for field in ("gt_boxes", "gt_masks"):
            assert torch.equal(exact["instances"].get(field).tensor, truth.get(field).tensor)
        assert quick["image"].shape == wanted["image"].shape
        assert quick["image"].is_contiguous()
        difference = (quick["image"].int() - wanted["image"].int()).abs()
        # JPEG images used at a quarter of their size and less are decoded at a reduced one; the
        # others differ by rounding
        reduced = min(record["height"], record["width"]) >= 4 * min(wanted["image"].shape[1:])
        assert difference.max() <= (32 if reduced else 4)
        assert difference.float().mean() < (1.5 if reduced else 0.3)
        for each in (exact["instances"], quick["instances"]):
            assert each.gt_classes.tolist() == truth.gt_classes.tolist()
            assert each.image_size == truth.image_size
        found = quick["instances"]
        torch.testing.assert_close(found.gt_boxes.tensor, truth.gt_boxes.tensor, rtol=0, atol=0.5)
        a, b = found.gt_masks.tensor.flatten(1), truth.gt_masks.tensor.flatten(1)
        assert a.dtype == torch.bool
        assert ((a & b).sum(1) >= 0.99 * (a | b).sum(1)).all()
        equal += int((a == b).all(1).sum())
        objects += len(found)
    assert objects > 120
    assert equal >= 0.98 * objects


@pytest.mark.parametrize(
    ("augmentations", "name"),
    [
        ([T.RandomBrightness(0.5, 0.6)], "BlendTransform"),
        ([T.Resize((8, 8)), T.RandomFlip(prob=1.0)], "HFlipTransform"),
        ([T.FixedSizeCrop((8, 8), pad=False), T.Resize((4, 4))], "ResizeTransform"),
        ([T.FixedSizeCrop((40, 40))], "PadTransform"),
    ],
)
def test_fast_refuses_what_it_cannot_do(tmp_path, augmentations, name):
    text = rf"mapper\.augmentations with mapper\.fast=True: expected .* got {name} .*fast=False"
    with pytest.raises(InputError, match=text):
        Mapper(augmentations, is_train=True, fast=True)(_record(tmp_path))


@both
@pytest.mark.parametrize("size", [(8, 4000), (4000, 8), (1, 1)])
def test_long_images_keep_a_pixel(tmp_path, size, fast):
    height, width = size
    Image.new("RGB", (width, height), (9, 99, 9)).save(tmp_path / "a.png")
    record = {"file_name": str(tmp_path / "a.png"), "height": height, "width": width}
    for augmentations in (
        large_scale_jitter(64, 0.1, 0.1),
        resize_shortest_edge([40, 90], 130, flip=True),
    ):
        image = Mapper(augmentations, is_train=True, fast=fast)(record)["image"]
        assert min(image.shape) >= 1
        assert image[1].min() == image[1].max() == 99
