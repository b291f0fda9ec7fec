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
from vitdet.predict.devices import pick_device
from vitdet.predict.inputs import Picture, open_inputs
from vitdet.predict.results import Result, class_indexes
from vitdet.predict.slicing import Slices, detect_sliced
from vitdet.utils.checks import InputError, fail
from vitdet.utils.precision import autocast_dtype


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
            fail(
                "predictor",
                expected="a threshold of 0 to 1, batch_size of 1 or more, RGB or BGR",
                got=f"threshold={threshold}, batch_size={batch_size}, image_format={image_format}",
                remedy="Correct the value.",
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
            path: a run's .pth, a .safetensors of `save_for_inference`, or, with `config`, a
                converted file.
            config: the recipe, for files that hold none.
            overrides: changes to the recipe: ["model.roi_heads.box_predictor.test_nms_thresh=0.6"].
            class_names: for files that hold none (recipes of COCO and LVIS know theirs), or
                {category id: name}.
            weights: "model", or "ema" for the moving average of a run with train.ema_decay.
            trust: allow parts from outside vitdet and detectron2; the file may then run code.
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            options: precision, threshold, classes, tta, slices, batch_size: see the class.

        Raises:
            InputError: no such file, nothing known of the recipe, weights of another size.
        """
        loaded = loading.load(
            path,
            device=pick_device(device),
            config=config,
            overrides=overrides,
            class_names=class_names,
            weights=weights,
            trust=trust,
        )
        predictor = cls(
            loaded.detector,
            loaded.class_names,
            augmentations=loaded.mapper.augmentations.augs,
            image_format=loaded.mapper.image_format,
            class_ids=loaded.class_ids,
            cfg=loaded.cfg,
            **options,
        )
        predictor.source = None if config is not None or trust else str(path)
        return predictor

    def __call__(self, images: Any) -> Any:
        """Find objects.

        Args:
            images: one image: a path, PIL image, uint8 array (height, width, 3) in RGB, uint8
                tensor (3, height, width); a list of these, a folder, a pattern ("shots/*.jpg"); a
                video file or a generator of images.

        Returns:
            A `Result` for one image, a list of them for many, an iterator for a video or a
            generator, of which only a batch is in memory.

        Raises:
            InputError: something else; a file that is missing or damaged.
        """
        inputs = open_inputs(images)
        results = self._stream(inputs.pictures)
        if inputs.kind == "stream":
            return results
        if inputs.kind == "one":
            return next(results)
        return [result.packed() for result in results]

    def _stream(self, pictures: Iterable[Picture]) -> Iterator[Result]:
        waiting = iter(pictures)
        while batch := list(islice(waiting, self.batch_size)):
            yield from self._results(batch)

    def _results(self, pictures: Sequence[Picture]) -> list[Result]:
        images = [picture.pixels() for picture in pictures]
        if self.slices is None:
            found = [(instances, None) for instances in self.detect(images)]
        else:
            found = [
                detect_sliced(self.detect, image, self.slices, self.batch_size) for image in images
            ]
        return [
            self._chosen(Result(picture, instances, self.class_names, self.class_ids, masks))
            for picture, (instances, masks) in zip(pictures, found, strict=True)
        ]

    def _chosen(self, result: Result) -> Result:
        result = result.above(self.threshold)
        return result if self.classes is None else result.of_classes(self.classes)

    def detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Return all detections, of any score and class, in images that are taken whole.

        Args:
            images: uint8 RGB (height, width, 3) each; they go through the detector together.

        Returns:
            detectron2's instances on the CPU in float32, in pixels of the images.
        """
        dtype = autocast_dtype(self.precision, self.device)
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        with loading.building(self.source), torch.inference_mode(), autocast:
            if self.tta is not None and not self.tta.neutral:
                views = self.tta
                found = [
                    augmentation.detect(self.detector, self.model_input(image), image, views)
                    for image in self._ordered(images)
                ]
            else:
                inputs = [self.model_input(image) for image in self._ordered(images)]
                found = [output["instances"] for output in self.detector(inputs)]
        return [_plain(instances) for instances in found]

    def _ordered(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return RGB images with the channels in the order that the detector takes."""
        return list(images) if self.image_format == "RGB" else [each[..., ::-1] for each in images]

    def model_input(self, image: np.ndarray) -> dict[str, Any]:
        """Return what the detector takes: the image resized by the recipe's rule, and its size.

        Args:
            image: uint8 (height, width, 3), channels in the detector's order.

        Raises:
            InputError: the result is larger than the square that the detector pads to, or has a
                side without a pixel.
        """
        height, width = image.shape[:2]
        given: Any = T.AugInput(np.ascontiguousarray(image))
        try:
            self.augmentations(given)
        except (ValueError, ZeroDivisionError) as error:  # a side would have no pixel left
            text = f"image of {height} x {width} pixels: too elongated to be resized ({error})."
            raise InputError(text) from error
        planes = np.ascontiguousarray(given.image.transpose(2, 0, 1))
        self._check_size(planes.shape[1], planes.shape[2])
        return {"image": torch.from_numpy(planes), "height": height, "width": width}

    def _check_size(self, height: int, width: int) -> None:
        """Refuse what detectron2's ImageList would cut off without a word."""
        backbone: Any = getattr(self.detector, "backbone", None)
        square = backbone.padding_constraints.get("square_size", 0) if backbone is not None else 0
        if square and max(height, width) > square:
            fail(
                "image for the detector",
                expected=f"at most {square} x {square} pixels (model.backbone.square_pad)",
                got=f"{height} x {width} after the predictor's augmentations",
                remedy="Give the augmentations of the recipe, as Predictor.from_checkpoint does.",
            )


def _plain(instances: Instances) -> Instances:
    """Bring instances to the CPU and to float32, which NumPy knows."""
    instances = instances.to("cpu")
    fields = {
        name: value.float()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in instances.get_fields().items()
    }
    return Instances(instances.image_size, **fields)
