"""From images to detections: the door for everything that uses a trained detector."""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import transforms as T
from detectron2.structures import Instances
from omegaconf import DictConfig
from PIL import Image
from torch import nn

from vitdet.data.images import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES, header_of, to_rgb
from vitdet.predict import augmentation, loading
from vitdet.predict.augmentation import TestTimeAugmentation
from vitdet.predict.results import Picture, Result, class_indexes
from vitdet.predict.slicing import Slices, detect_sliced
from vitdet.utils import thresholds
from vitdet.utils.checks import InputError
from vitdet.utils.precision import autocast_dtype, pick_device
from vitdet.utils.thresholds import Thresholds
from vitdet.weights import fetch_input, is_address

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"}
)


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
        threshold: detections with a lower score are left out; 0 leaves out nothing. None for those
            that the file's evaluation found, class by class, and 0.5 where there are none.
        classes: names of the only classes to report, None for all.
        boxes_only: compute no masks; boxes and scores are the same to the bit. Where a recipe makes
            scores of masks (maskness_thresh), they are computed and left out.
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
        threshold: float | Thresholds | None = None,
        classes: Sequence[str] | None = None,
        boxes_only: bool = False,
        tta: TestTimeAugmentation | None = None,
        slices: Slices | None = None,
        batch_size: int = 1,
        cfg: DictConfig | None = None,
    ) -> None:
        if batch_size < 1 or image_format not in ("RGB", "BGR"):
            raise InputError(
                "predictor: expected a batch_size of 1 or more, RGB or BGR, "
                f"got batch_size={batch_size}, image_format={image_format}."
            )
        class_indexes(classes or (), class_names)  # said before anything is computed
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
        known = isinstance(threshold, Thresholds)
        self.threshold = threshold if known else thresholds.chosen(threshold, {})
        self.classes = None if classes is None else tuple(classes)
        self.boxes_only = boxes_only
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
        threshold: float | None = None,
        **options: Any,
    ) -> Predictor:
        """Return a predictor with everything that a checkpoint tells.

        Args:
            path, config, overrides, class_names, weights, trust: see `vitdet.predict.loading.load`.
            device: "auto", "cpu", "cuda", "cuda:1", "mps".
            threshold: of all classes; None for what the file's evaluation found.
            options: precision, classes, boxes_only, tta, slices, batch_size: see the
                class.

        Raises:
            InputError: no such file, nothing known of the recipe, weights of another size.
        """
        detector, about, note = loading.load(
            path,
            device=pick_device(device),
            config=config,
            overrides=overrides,
            class_names=class_names,
            weights=weights,
            trust=trust,
        )
        least = thresholds.chosen(threshold, note, weights, str(path))
        if not least.found:
            logger.warning("%s: threshold %s", path, least.text())
        predictor = cls(detector, **about, threshold=least, **options)
        predictor.source = None if config is not None or trust else str(path)
        return predictor

    def __call__(
        self, images: Any, classes: Sequence[str] | None = None, threshold: float | None = None
    ) -> Any:
        """Find objects in what `open_inputs` takes.

        `classes` and `threshold` are those of the predictor where they are not given.

        Returns:
            A `Result` for one image, a list of them for many (a list, folder, pattern), an iterator
            for a video or a generator, of which only a batch is in memory.

        Raises:
            InputError: something else; a file that is missing or damaged; an unknown class.
        """
        classes = self.classes if classes is None else classes
        class_indexes(classes or (), self.class_names)
        least = self.threshold if threshold is None else thresholds.chosen(threshold, {})
        kind, pictures = open_inputs(images)
        results = self._stream(pictures, classes, least)
        if kind == "stream":
            return results
        return next(results) if kind == "one" else list(results)

    def _stream(
        self, pictures: Iterable[Picture], classes: Sequence[str] | None, least: Thresholds
    ) -> Iterator[Result]:
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
                kept = result.above(least.of(self.class_names))
                if classes is not None:
                    kept, result = kept.of_classes(classes), result.of_classes(classes)
                kept.best = result.best
                yield kept

    def detect(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """Return all detections in images uint8 RGB (height, width, 3) that are taken whole.

        They are detectron2's instances on the CPU in float32, in pixels of the images, which go
        through the detector together.
        """
        dtype, tta = autocast_dtype(self.precision, self.device), self.tta
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        ordered = [each if self.image_format == "RGB" else each[..., ::-1] for each in images]
        masks = _without_mask_head(self.detector) if self.boxes_only else nullcontext()
        with loading.building(self.source), torch.inference_mode(), autocast, masks:
            inputs = [self.model_input(image) for image in ordered]
            if tta is None or tta == TestTimeAugmentation(flip=False):
                found = [output["instances"] for output in self.detector(inputs)]
            else:
                both = zip(inputs, ordered, strict=True)
                found = [augmentation.detect(self.detector, x, image, tta) for x, image in both]
        for instances in found if self.boxes_only else ():
            instances.get_fields().pop("pred_masks", None)
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


@contextmanager
def _without_mask_head(detector: Any) -> Iterator[None]:
    """Leave the mask head out, unless scores are made of its masks."""
    heads = getattr(detector, "roi_heads", None)
    found = getattr(heads, "mask_on", False) and getattr(heads, "maskness_thresh", None) is None
    if not found:
        yield
        return
    heads.mask_on = False  # pyright: ignore[reportOptionalMemberAccess]
    try:
        yield
    finally:
        heads.mask_on = True  # pyright: ignore[reportOptionalMemberAccess]


def _plain(instances: Instances) -> Instances:
    """Bring instances to the CPU and to float32, which NumPy knows."""
    fields = instances.to("cpu").get_fields()
    floats = {
        name: value.float()
        for name, value in fields.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    return Instances(instances.image_size, **{**fields, **floats})


# --- what it is given ----------------------------------------------------------------------------


def open_inputs(given: Any) -> tuple[str, Iterable[Picture]]:
    """Return how pictures came, "one", "list" or "stream", and the pictures, read in their turn.

    Args:
        given: one image (path, address, PIL image, uint8 array (height, width, 3) RGB, (height,
            width) grey or (height, width, 4) with alpha, uint8 tensor (3, height, width) RGB,
            `Picture`); or many: a list or tuple of these, a folder or a pattern ("shots/*.jpg") of
            image files; or a stream: a video file, a generator.

    Raises:
        InputError: something else, nothing at the path, a folder without images.
    """
    if isinstance(given, list | tuple):
        return "list", [_picture(each, f"image {i}") for i, each in enumerate(given)]
    if isinstance(given, Iterator):
        return "stream", (_picture(each, f"image {i}") for i, each in enumerate(given))
    if not isinstance(given, str | Path):
        return "one", [_picture(given, "image")]
    given = local(given)
    if given.suffix.lower() in VIDEO_SUFFIXES and os.path.isfile(given):  # noqa: PTH113
        return "stream", video_frames(given)
    files, _ = find_files(given)
    pictures = [_picture(file, "") for file in files]
    return "one" if str(given) == str(files[0]) else "list", pictures


def local(given: str | Path) -> Path:
    """Return the path that is meant: of an address what is fetched, with "~" the user's folder."""
    if not str(given):  # Path's is the working folder
        raise _nothing_at("''")
    return fetch_input(given) if is_address(given) else Path(given).expanduser()


def _nothing_at(text: str) -> InputError:
    return InputError(
        f"input {text}: nothing is at this path. Files, folders and https:// are read; cameras and "
        "streams are not: record them first."
    )


def find_files(given: str | Path) -> tuple[list[Path], Counter[str]]:
    """Return the files that a path means: itself, the images of a folder, those of a pattern.

    What an address gives is fetched: it is one file.

    Returns:
        The files by name, and what was passed over, kind -> number: a suffix, or "folder" and
        "hidden file" (as macOS leaves them, "._a.jpg").

    Raises:
        InputError: nothing there, a folder without images, a camera.
    """
    text, suffixes = str(local(given)), IMAGE_SUFFIXES
    if os.path.isdir(text):  # noqa: PTH112 (Path's raises for names that are too long)
        paths = list(Path(text).iterdir())
    elif os.path.lexists(text):
        return [Path(text)], Counter()
    else:
        paths = [Path(name) for name in glob.glob(text)]  # noqa: PTH207 (Path's needs a root)
        suffixes = suffixes | VIDEO_SUFFIXES
        if not paths:
            raise _nothing_at(text)
    files, others = [], Counter[str]()
    for path in sorted(paths):
        suffix = path.suffix.lower()
        if path.name.startswith("."):
            others["hidden file"] += 1
        elif path.is_dir():
            others["folder"] += 1
        elif suffix in suffixes:
            files.append(path)
        else:
            others[suffix or "file without suffix"] += 1
    if not files:
        found = passed_over_text(others) if others else "the folder is empty"
        raise InputError(
            f"input {text}: expected image files (.jpg, .png, ...), got none; {found}."
        )
    return files, others


def passed_over_text(passed_over: Counter[str]) -> str:
    """Return one line: "passed over: 4 x .heic (convert ...), 1 x folder"."""
    ways = {kind: f" ({way})" for kind, way in UNREADABLE_SUFFIXES.items()}
    kinds = (f"{count} x {kind}{ways.get(kind, '')}" for kind, count in passed_over.most_common())
    return f"passed over: {', '.join(kinds)}"


def video_frames(path: Path) -> Iterator[Picture]:
    """Yield the frames of a video, or raise an InputError where OpenCV cannot read it."""
    if not path.is_file():  # OpenCV would wait for a pipe
        raise InputError(f"video {path}: expected a file, got none. Check the path.")
    video, number = cv2.VideoCapture(str(path)), 0
    try:
        while (read := video.read())[0]:
            yield Picture(f"{path} frame {number}", array=np.ascontiguousarray(read[1][..., ::-1]))
            number += 1
    finally:
        video.release()
    if not number:
        text = "expected frames that OpenCV reads, got none. Turn it into .mp4 with H.264."
        raise InputError(f"video {path}: {text}")


def _picture(given: Any, name: str) -> Picture:
    """Make a picture of one image."""
    if isinstance(given, Picture):
        return given
    if isinstance(given, str | Path):
        path = local(given)
        if os.path.isdir(path) or path.suffix.lower() in VIDEO_SUFFIXES:  # noqa: PTH112
            raise InputError(f"input {path}: give a folder or a video alone, not in a list.")
        if not os.path.lexists(path):
            find_files(path)  # says what it is
        return Picture(str(path), path)
    if isinstance(given, Image.Image):
        return Picture(name, array=_of_pil(given, name))
    if isinstance(given, torch.Tensor) and given.ndim == 3:
        given = given.detach().cpu().permute(1, 2, 0).numpy()
    pixels: Any = given[..., None] if isinstance(given, np.ndarray) and given.ndim == 2 else given
    good = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.size
    if not good or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4):
        is_array = isinstance(given, np.ndarray | torch.Tensor)
        got = f"{given.dtype} {tuple(given.shape)}" if is_array else f"a {type(given).__name__}"
        raise InputError(
            f"input {name}: expected a path, a PIL image, uint8 values from 0 to 255 in an array "
            "(height, width, 3) of RGB, grey or with alpha, or in a tensor (3, height, width), or "
            f"a list of these, got {got}."
        )
    colours = np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels[..., :3].copy()
    return Picture(name, array=colours)


def _of_pil(image: Image.Image, name: str) -> np.ndarray:
    if header_of(image).deep:  # convert() would cut values off at 255
        text = f"expected 8 bits a channel, got Pillow's mode {image.mode}. Scale it first."
        raise InputError(f"{name}: {text}")
    try:
        return np.array(to_rgb(image))
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # decoded only now
        raise InputError(f"{name}: the PIL image cannot be decoded ({error}).") from error
