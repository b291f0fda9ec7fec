"""From a data set record to a model input: read, augment, turn annotations into instances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks
from PIL import Image

from vitdet.data.images import read_image, read_reduced
from vitdet.data.views import Patch, View, draw_view
from vitdet.utils.checks import fail

_KEPT_KEYS = ("file_name", "image_id", "height", "width")
_MIN_SIDE = 1e-5  # pixels; detectron2's filter_empty_instances drops boxes that are not larger


class Mapper:
    """Callable that turns one record (detectron2 dataset dict) into one model input.

    Behaviour of facebookresearch/detectron2 data/dataset_mapper.py: crowd regions are left out of
    the instances, boxes are recomputed from the augmented masks where asked, and instances that
    the augmentation left without box or mask are dropped.

    With `fast` the same random numbers give the same masks and boxes several times sooner, see
    `vitdet.data.views`. Pixels are the same too, except in JPEG images of which less than a quarter
    of each side's pixels is wanted: those are decoded at a reduced size.

    Args:
        augmentations: detectron2 augmentations or transforms, applied in order.
        is_train: whether instances are wanted.
        image_format: channel order of the result, "RGB" or "BGR".
        use_masks: whether to make `gt_masks`; every annotation needs a segmentation then.
        mask_format: "bitmask" or "polygon" (polygon cannot hold run-length encodings).
        recompute_boxes: boxes that fit the augmented masks instead of augmented boxes.
        with_annotations_in_test: make instances although `is_train` is False (to draw them).
        cache: keep every decoded image in memory (height * width * 3 bytes each, in each worker);
            for data sets of a few thousand small images.
        fast: make only what the augmentations leave of image and objects. They may flip
            horizontally, resize and crop, in this order.
    """

    def __init__(
        self,
        augmentations: Sequence[T.Augmentation | T.Transform],
        *,
        is_train: bool,
        image_format: str = "RGB",
        use_masks: bool = True,
        mask_format: Literal["bitmask", "polygon"] = "bitmask",
        recompute_boxes: bool = True,
        with_annotations_in_test: bool = False,
        cache: bool = False,
        fast: bool = False,
    ) -> None:
        if mask_format not in ("bitmask", "polygon"):
            fail(
                "mapper.mask_format",
                expected='"bitmask" or "polygon"',
                got=repr(mask_format),
                remedy="Choose one of the two.",
            )
        self.augmentations = T.AugmentationList(list(augmentations))
        self.is_train = is_train
        self.image_format = image_format
        self.use_masks = use_masks
        self.mask_format = mask_format
        self.recompute_boxes = recompute_boxes and use_masks
        self.with_instances = is_train or with_annotations_in_test
        self.fast = fast
        self._cache: dict[str, np.ndarray] | None = {} if cache else None

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Map one record; the record is not changed.

        Returns:
            `image` uint8 (3, height, width) after augmentation, `height` and `width` of the image
            file, `image_id`, `file_name`, and `instances` (gt_boxes XYXY in pixels of the
            augmented image, gt_classes, gt_masks) where asked.

        Raises:
            InputError: the file is missing, damaged or of another size than the record says, or
                an annotation has no mask in the wanted format.
        """
        with_instances = self.with_instances and "annotations" in record
        result = {key: record[key] for key in _KEPT_KEYS if key in record}
        if self.fast:
            view = draw_view(self.augmentations, (record["height"], record["width"]))
            result["image"] = self._view_of_image(record, view)
            if with_instances:
                result["instances"] = self._view_of_instances(record, view)
            return result
        inputs = T.AugInput(self._image(record))
        transforms = self.augmentations(inputs)
        image = np.ascontiguousarray(inputs.image)
        result["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if with_instances:
            size = (int(image.shape[0]), int(image.shape[1]))
            result["instances"] = self._instances(record, transforms, size)
        return result

    def _image(self, record: dict[str, Any]) -> np.ndarray:
        """Return the decoded image (height, width, 3) uint8, from the cache where there is one."""
        if self._cache is None:
            return read_image(record, self.image_format)
        name = record["file_name"]
        if name not in self._cache:
            self._cache[name] = read_image(record, self.image_format)
            self._cache[name].setflags(write=False)
        return self._cache[name].copy()  # some transforms work in place

    def _instances(
        self, record: dict[str, Any], transforms: T.TransformList, size: tuple[int, int]
    ) -> Instances:
        objects = [
            detection_utils.transform_instance_annotations(annotation, transforms, size)
            for annotation in self._annotations(record)
        ]
        instances = detection_utils.annotations_to_instances(objects, size, self.mask_format)
        if not objects and self.use_masks:
            # detectron2 leaves the field out, and a batch of such images could not be joined
            empty = torch.zeros((0, *size), dtype=torch.bool)
            instances.gt_masks = (
                BitMasks(empty) if self.mask_format == "bitmask" else PolygonMasks([])
            )
        if self.recompute_boxes:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        kept = detection_utils.filter_empty_instances(instances)
        assert isinstance(kept, Instances)  # a tuple only where its mask is asked for
        return kept

    def _view_of_image(self, record: dict[str, Any], view: View) -> torch.Tensor:
        """Return what the view shows of the image, uint8 (3, height, width)."""
        if self._cache is None:
            picture, reduction = read_reduced(record, view.shrink)
            channels = slice(None) if self.image_format == "RGB" else slice(None, None, -1)
        else:
            picture, reduction = Image.fromarray(self._image(record)), 1
            channels = slice(None)  # the cache has the right order
        planes = np.empty((3, *view.size), dtype=np.uint8)
        cv2.split(view.image(picture, reduction), list(planes)[channels])
        return torch.from_numpy(planes)

    def _view_of_instances(self, record: dict[str, Any], view: View) -> Instances:
        """Return what the view shows of the objects, of those of which it shows anything."""
        annotations = self._annotations(record)
        if self.use_masks and self.mask_format == "polygon":
            return self._view_of_polygons(annotations, view)
        wanted = annotations if self.use_masks else []
        patches = view.masks([each["segmentation"] for each in wanted])
        if self.recompute_boxes:
            sides = np.array([patch.box for patch in patches], dtype=np.float32)
            boxes = Boxes(torch.from_numpy(sides.reshape(-1, 4)))
        else:
            boxes = _boxes(annotations, view)
        # as filter_empty_instances, which would look at every pixel of every mask
        shown = boxes.nonempty(threshold=_MIN_SIDE).numpy()
        if self.use_masks:
            shown = shown & np.array([patch.pixels.size > 0 for patch in patches], dtype=bool)
        places = np.flatnonzero(shown).tolist()
        instances = Instances(view.size)
        instances.gt_boxes = boxes[places]
        instances.gt_classes = _classes([annotations[place] for place in places])
        if self.use_masks:
            instances.gt_masks = _bitmasks([patches[place] for place in places], view.size)
        return instances

    def _view_of_polygons(self, annotations: list[dict[str, Any]], view: View) -> Instances:
        instances = Instances(view.size)
        objects = view.polygons([each["segmentation"] for each in annotations])
        polygons: list[Any] = [[part.ravel() for part in parts] for parts in objects]
        masks = PolygonMasks(polygons)
        boxes = masks.get_bounding_boxes() if self.recompute_boxes else _boxes(annotations, view)
        instances.gt_boxes, instances.gt_masks = boxes, masks
        instances.gt_classes = _classes(annotations)
        kept = detection_utils.filter_empty_instances(instances)
        assert isinstance(kept, Instances)  # a tuple only where its mask is asked for
        return kept

    def _annotations(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Return copies of the annotations that are training objects."""
        return [
            self._annotation(annotation, record)
            for annotation in record["annotations"]
            if not annotation.get("iscrowd", 0)
        ]

    def _annotation(self, annotation: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
        """Return a shallow copy, without its mask where none is wanted."""
        copy = dict(annotation)
        copy.pop("keypoints", None)
        segmentation = copy.get("segmentation")
        if not self.use_masks:
            copy.pop("segmentation", None)
        elif not segmentation:
            fail(
                f"{record['file_name']}: an annotation of category {copy['category_id']}",
                expected="a segmentation, because the model has a mask head",
                got="none",
                remedy="Add masks to the data, or train with boxes only (mapper.use_masks=False "
                "and a model without mask head).",
            )
        elif self.mask_format == "polygon" and isinstance(segmentation, dict):
            fail(
                f"{record['file_name']}: an annotation of category {copy['category_id']}",
                expected="a polygon",
                got="a run-length encoding",
                remedy='Use mask_format="bitmask".',
            )
        return copy


def _boxes(annotations: Sequence[dict[str, Any]], view: View) -> Boxes:
    """The boxes of the file, moved and clipped as the view is."""
    absolute = [
        BoxMode.convert(each["bbox"], each["bbox_mode"], BoxMode.XYXY_ABS) for each in annotations
    ]
    moved = view.boxes(np.array(absolute, dtype=np.float64).reshape(-1, 4))
    return Boxes(torch.from_numpy(moved))


def _classes(annotations: Sequence[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([each["category_id"] for each in annotations], dtype=torch.int64)


def _bitmasks(patches: Sequence[Patch], size: tuple[int, int]) -> BitMasks:
    """Masks of the whole view; memory that no object touches is not written to."""
    filled = np.zeros((len(patches), *size), dtype=bool)
    for mask, patch in zip(filled, patches, strict=True):
        left, top, right, bottom = patch.box
        mask[top:bottom, left:right] = patch.pixels
    return BitMasks(torch.from_numpy(filled))
