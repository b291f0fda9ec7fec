"""From a data set record to a model input: read, augment, turn annotations into instances."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import cv2
import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, Boxes, BoxMode, Instances, PolygonMasks

from vitdet.data.augment import draw_view
from vitdet.data.images import Size, read_image, read_reduced
from vitdet.data.presets import Scene, augment, find_preset, steps_of
from vitdet.utils.checks import InputError

_KEPT_KEYS = ("file_name", "image_id", "height", "width")
_MIN_SIDE = 1e-5  # pixels; detectron2's filter_empty_instances drops boxes that are not larger


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
        fast: the same masks and boxes by the same random numbers, several times sooner. Pixels are
            the same up to rounding, but in JPEG images of which less than a quarter of each side's
            pixels is wanted: these are decoded at a reduced size. The augmentations may flip
            horizontally, resize and crop, in this order.
        preset: more augmentation, by a name of `vitdet.data.presets.PRESETS`; needs `fast`.
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
        fast: bool = False,
        preset: str | None = None,
    ) -> None:
        self.preset = find_preset(preset) if preset else None
        self.steps = steps_of(preset, masks=use_masks) if preset else ""  # for people
        if preset and not (fast and mask_format == "bitmask"):
            got = f"mapper.preset={preset} and mapper.fast={fast}, mapper.mask_format={mask_format}"
            raise InputError(f"{got}: expected fast=True and bitmask with a preset. Set them.")
        kept = [each for each in augmentations if not isinstance(each, T.RandomFlip)]
        listed = kept if self.preset and not self.preset.flip else list(augmentations)
        self.augmentations = T.AugmentationList(listed)
        self.is_train, self.image_format = is_train, image_format
        self.use_masks, self.mask_format = use_masks, mask_format
        self.recompute_boxes = recompute_boxes and use_masks
        self.fast = fast

    def __call__(
        self, record: dict[str, Any], others: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        """Map one record, which is not changed; an image or mask that cannot be is an InputError.

        `others` are the records of the data set, which a preset may take pictures and objects from.

        Returns:
            `image` uint8 (3, height, width) after augmentation, `height` and `width` of the image
            file, `image_id`, `file_name`, and `instances` (gt_boxes XYXY in pixels of the
            augmented image, gt_classes, gt_masks) where asked.
        """
        result = {key: record[key] for key in _KEPT_KEYS if key in record}
        wanted = self.is_train and "annotations" in record
        if self.fast and not (wanted and self.mask_format == "polygon"):
            draw = partial(self._scene, record, others if len(others) else [record])
            scene = augment(self.preset, draw) if self.preset and wanted else draw()
            planes = np.empty((3, *scene.size), dtype=np.uint8)
            cv2.split(scene.image, list(planes)[:: 1 if self.image_format == "RGB" else -1])
            if wanted:
                result["instances"] = self._seen(scene)
        else:
            annotations = self._annotations(record) if wanted else None
            inputs = T.AugInput(read_image(record, self.image_format))
            transforms = self.augmentations(inputs)
            planes = np.ascontiguousarray(np.asarray(inputs.image).transpose(2, 0, 1))
            if annotations is not None:
                size = (planes.shape[1], planes.shape[2])
                result["instances"] = self._transformed(annotations, transforms, size)
        result["image"] = torch.from_numpy(planes)
        return result

    def _scene(
        self,
        record: dict[str, Any],
        others: Sequence[dict[str, Any]],
        other: bool = False,
        half: bool = False,
    ) -> Scene:
        """Read one picture, or another one at random, with what a view shows of its objects."""
        record = others[np.random.randint(len(others))] if other else record
        wanted = self.is_train and "annotations" in record
        annotations = self._annotations(record) if wanted else []
        view = draw_view(self.augmentations, (record["height"], record["width"]))
        view = view.halved() if half else view
        picture, reduction = read_reduced(record, view.shrink)
        given = ((each["bbox"], each["bbox_mode"], BoxMode.XYXY_ABS) for each in annotations)
        boxes = np.array([BoxMode.convert(*box) for box in given], dtype=np.float64)
        masks = [each["segmentation"] for each in annotations] if self.use_masks else None
        return Scene(
            view.image(picture, reduction),
            view.boxes(boxes.reshape(-1, 4)),
            np.array([each["category_id"] for each in annotations], dtype=np.int64),
            None if masks is None else view.masks(masks),
        )

    def _transformed(
        self, annotations: list[dict[str, Any]], transforms: T.TransformList, size: Size
    ) -> Instances:
        """Return the objects by detectron2's own functions."""
        moved = detection_utils.transform_instance_annotations
        objects = [moved(each, transforms, size) for each in annotations]
        instances = detection_utils.annotations_to_instances(objects, size, self.mask_format)
        if not objects and self.use_masks:
            # detectron2 leaves the field out, and a batch of such images could not be joined
            empty = BitMasks(torch.zeros((0, *size), dtype=torch.bool))
            instances.gt_masks = empty if self.mask_format == "bitmask" else PolygonMasks([])
        if self.recompute_boxes:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        return _not_empty(instances)

    def _seen(self, scene: Scene) -> Instances:
        """Return the objects of which a scene shows anything."""
        instances, drawn = Instances(scene.size), scene.masks
        instances.gt_boxes = Boxes(torch.from_numpy(scene.boxes))
        instances.gt_classes = torch.from_numpy(scene.classes)
        if drawn is None:
            return _not_empty(instances)
        if self.recompute_boxes:
            sides = np.array([box for box, _ in drawn], dtype=np.float32)
            instances.gt_boxes = Boxes(torch.from_numpy(sides.reshape(-1, 4)))
        # as filter_empty_instances, which would look at every pixel of every mask
        shown = instances.gt_boxes.nonempty(threshold=_MIN_SIDE).tolist()
        places: Any = [n for n, (_, pixels) in enumerate(drawn) if shown[n] and pixels.size]
        instances = instances[places]
        filled = np.zeros((len(places), *scene.size), dtype=bool)  # only objects are written to
        for mask, place in zip(filled, places, strict=True):
            (left, top, right, bottom), pixels = drawn[place]
            mask[top:bottom, left:right] = pixels
        instances.gt_masks = BitMasks(torch.from_numpy(filled))
        return instances

    def _annotations(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Return shallow copies of the training objects, without masks where none are wanted."""
        left_out = {"keypoints"} if self.use_masks else {"keypoints", "segmentation"}
        objects = [each for each in record["annotations"] if not each.get("iscrowd", 0)]
        for each in objects if self.use_masks else ():
            mask = each.get("segmentation")
            got = None if mask else "no segmentation, and the model has a mask head"
            if self.mask_format == "polygon" and isinstance(mask, dict):
                got = 'run lengths, and mask_format="polygon"'
            if got:
                raise InputError(
                    f"{record['file_name']}: an annotation of category {each['category_id']} has "
                    f'{got}. Add it, use "bitmask", or train boxes only (mapper.use_masks=False '
                    "and a model without mask head)."
                )
        return [{k: value for k, value in each.items() if k not in left_out} for each in objects]


def _not_empty(instances: Instances) -> Instances:
    kept = detection_utils.filter_empty_instances(instances)
    assert isinstance(kept, Instances)  # a tuple only where its mask is asked for
    return kept
