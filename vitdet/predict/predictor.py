"""From images to detections: the door for everything that uses a trained detector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Instances
from omegaconf import DictConfig
from torch import nn

from vitdet.predict import augmentation, loading
from vitdet.predict.augmentation import TestTimeAugmentation
from vitdet.predict.inputs import Picture, open_inputs
from vitdet.predict.results import Result, class_indexes
from vitdet.predict.slicing import Slices, detect_sliced
from vitdet.utils.checks import InputError
from vitdet.utils.precision import autocast_dtype, pick_device


class Predictor:
    """Callable that finds objects in images, with the numbers that evaluation gives.

    Args:
        detector: a detector of this project with its weights. It is put into evaluation mode.
        class_names: of its class indexes.
        augmentations: detectron2 augmentations that resize an image as in training; the recipe's
            test mapper has them.
        image_format: channel order that the detector takes, "RGB" or "BGR".
        class_ids: number of each class in COCO results; by default 1, 2, ...
        device: where to compute, None for where the detector is, else see `pick_device`.
        precision: "fp32", "bf16", "fp16", or "auto" for bf16 where the device has it.
        threshold: detections with a lower score are left out; 0 leaves out nothing.
        classes: names of the only classes to report, None for all.
        tta: test-time augmentation, None for none.
        slices: cut large images into parts of this size, None to take them whole.
        batch_size: images that go through the detector together.
        cfg: the recipe, kept for those who ask.

    Raises:
        InputError: a device that is absent, an unknown class, a number outside its range.
    """

    def __init__(
        self,
        detector: nn.Module,
        class_names: Sequence[str],
        *,
        augmentations: Iterable[T.Augmentation | T.Transform] = (),
        image_format: str = "RGB",
        class_ids: Sequence[int] | None = None,
        device: str | torch.device | None = None,
        precision: str = "auto",
        threshold: float = 0.5,
        classes: Sequence[str] | None = None,
        tta: TestTimeAugmentation | None = None,
        slices: Slices | None = None,
        batch_size: int = 1,
        cfg: DictConfig | None = None,
    ) -> None:
        if not 0 <= threshold <= 1 or batch_size < 1 or image_format not in ("RGB", "BGR"):
            raise InputError(
                "predictor: expected a threshold of 0 to 1, batch_size of 1 or more, RGB or BGR, "
                f"got threshold={threshold}, batch_size={batch_size}, image_format={image_format}."
            )
        if classes is not None:
            class_indexes(classes, class_names)  # said before anything is computed
        if tta is not None:
            augmentation.check_detector(detector)
        if device is not None:
            detector = detector.to(pick_device(device))
        self.detector = detector.eval()
        self.device = next(detector.parameters()).device
        self.class_names = tuple(class_names)
        self.class_ids = tuple(class_ids or range(1, len(self.class_names) + 1))
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.precision = precision
        self.threshold = threshold
        self.classes = None if classes is None else tuple(classes)
        self.tta = tta
        self.slices = slices
        self.batch_size = batch_size
        self.cfg = cfg
        self.source: str | None = None  # the file whose recipe names the parts of the detector
        autocast_dtype(precision, self.device)  # an unknown precision is said at once

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        config: str | Path | None = None,
        overrides: Sequence[str] = (),
        class_names: Sequence[str] | Mapping[int, str] | None = None,
        weights: str = "model",
        trust: bool = False,
        device: str | torch.device = "auto",
        **options: Any,
    ) -> Predictor:
        """Return a predictor with everything that a checkpoint tells.

        Args:
            path, config, overrides, class_names, weights, trust: see `vitdet.predict.loading.load`.
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            options: precision, threshold, classes, tta, slices, batch_size: see the class.

        Raises:
            InputError: no such file, nothing known of the recipe, weights of another size.
        """
        detector, about, _ = loading.load(
            path,
            device=pick_device(device),
            config=config,
            overrides=overrides,
            class_names=class_names,
            weights=weights,
            trust=trust,
        )
        predictor = cls(detector, **about, **options)
        predictor.source = None if config is not None or trust else str(path)
        return predictor

    def __call__(self, images: Any) -> Any:
        """Find objects in what `open_inputs` takes.

        Returns:
            A `Result` for one image, a list of them for many (a list, folder, pattern), an iterator
            for a video or a generator, of which only a batch is in memory.

        Raises:
            InputError: something else; a file that is missing or damaged.
        """
        kind, pictures = open_inputs(images)
        results = self._stream(pictures)
        if kind == "stream":
            return results
        return next(results) if kind == "one" else list(results)

    def _stream(self, pictures: Iterable[Picture]) -> Iterator[Result]:
        waiting = iter(pictures)
        while batch := list(islice(waiting, self.batch_size)):
            images = [picture.pixels() for picture in batch]
            if self.slices is None:
                found = [(instances, None) for instances in self.detect(images)]
            else:
                cut = self.slices
                found = [detect_sliced(self.detect, x, cut, self.batch_size) for x in images]
            for picture, (instances, masks) in zip(batch, found, strict=True):
                result = Result(picture, instances, self.class_names, self.class_ids, masks)
                result = result.above(self.threshold)
                yield result if self.classes is None else result.of_classes(self.classes)

    def detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Return all detections in images uint8 RGB (height, width, 3) that are taken whole.

        They are detectron2's instances on the CPU in float32, in pixels of the images, which go
        through the detector together.
        """
        dtype, tta = autocast_dtype(self.precision, self.device), self.tta
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        ordered = [each if self.image_format == "RGB" else each[..., ::-1] for each in images]
        with loading.building(self.source), torch.inference_mode(), autocast:
            inputs = [self.model_input(image) for image in ordered]
            if tta is None or tta.neutral:
                found = [output["instances"] for output in self.detector(inputs)]
            else:
                found = [
                    augmentation.detect(self.detector, given, image, tta)
                    for given, image in zip(inputs, ordered, strict=True)
                ]
        return [_plain(instances) for instances in found]

    def model_input(self, image: np.ndarray) -> dict[str, Any]:
        """Return what the detector takes of an image uint8 (height, width, 3) in its channels.

        Raises:
            InputError: resized it is larger than the detector's square, or has no pixel left.
        """
        height, width = image.shape[:2]
        given: Any = T.AugInput(np.ascontiguousarray(image))
        try:
            self.augmentations(given)
        except (ValueError, ZeroDivisionError) as error:  # a side would have no pixel left
            text = f"image of {height} x {width} pixels: too elongated to be resized ({error})."
            raise InputError(text) from error
        planes = np.ascontiguousarray(given.image.transpose(2, 0, 1))
        backbone: Any = getattr(self.detector, "backbone", None)
        square = backbone.padding_constraints.get("square_size", 0) if backbone is not None else 0
        if square and max(planes.shape[1:]) > square:  # detectron2's ImageList would cut it off
            raise InputError(
                f"image for the detector: expected at most {square} x {square} pixels "
                f"(model.backbone.square_pad), got {planes.shape[1]} x {planes.shape[2]} after the "
                "predictor's augmentations. Give those of the recipe, as from_checkpoint does."
            )
        return {"image": torch.from_numpy(planes), "height": height, "width": width}


def _plain(instances: Instances) -> Instances:
    """Bring instances to the CPU and to float32, which NumPy knows."""
    instances = instances.to("cpu")
    fields = instances.get_fields()
    floats = {
        name: value.float()
        for name, value in fields.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return Instances(instances.image_size, **{**fields, **floats})
