"""From a data set record to a model input: read, augment, turn annotations into instances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Instances, PolygonMasks
from PIL import Image

from vitdet.utils.checks import fail

_KEPT_KEYS = ("file_name", "image_id", "height", "width")


class Mapper:
    """Callable that turns one record (detectron2 dataset dict) into one model input.

    Behaviour of facebookresearch/detectron2 data/dataset_mapper.py: crowd regions are left out of
    the instances, boxes are recomputed from the augmented masks where asked, and instances that
    the augmentation left without box or mask are dropped.

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
        image = self._image(record)
        inputs = T.AugInput(image)
        transforms = self.augmentations(inputs)
        image = np.ascontiguousarray(inputs.image)
        result = {key: record[key] for key in _KEPT_KEYS if key in record}
        result["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.with_instances and "annotations" in record:
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
            detection_utils.transform_instance_annotations(
                self._annotation(annotation, record), transforms, size
            )
            for annotation in record["annotations"]
            if not annotation.get("iscrowd", 0)
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


def read_image(record: dict[str, Any], image_format: str = "RGB") -> np.ndarray:
    """Decode the image of a record, turned upright by its EXIF orientation.

    Args:
        record: has `file_name`, and `height` and `width` in pixels.
        image_format: "RGB" or "BGR".

    Returns:
        uint8 (height, width, 3).

    Raises:
        InputError: missing, unreadable or truncated file, or a size other than the record's.
    """
    name = record["file_name"]
    try:
        image = detection_utils.read_image(name, format=image_format)
    except FileNotFoundError:
        fail(
            f"image {name}",
            expected="a file",
            got="nothing at this path",
            remedy="Check the image folder, or leave such images out with check=drop.",
        )
    # what Pillow raises for damaged files: SyntaxError for PNG, ValueError and EOFError for others
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        fail(
            f"image {name}",
            expected="an image that can be decoded",
            got=f"{type(error).__name__} ({error})",
            remedy="Replace the file, or remove the image from the annotation file.",
        )
    expected = (record["height"], record["width"])
    if image.shape[:2] != expected:
        fail(
            f"image {name}",
            expected=f"{expected[0]} x {expected[1]} pixels (height x width) as in the annotations",
            got=f"{image.shape[0]} x {image.shape[1]}",
            remedy="Correct height and width in the annotation file, or replace the image.",
        )
    return image
