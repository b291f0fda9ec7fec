"""What a predictor can be given, as pictures one after the other."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import detection_utils
from PIL import Image

from vitdet.data.images import read_image
from vitdet.utils.checks import InputError, fail

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
_KINDS = "a path, a PIL image, a uint8 array or tensor, or a list, folder, video or generator"


@dataclass(frozen=True)
class Picture:
    """An image to predict on: a file that is read when it is needed, or pixels.

    Attributes:
        name: the path, or words such as "image 3".
        path: its file, if it is one.
        array: uint8 RGB (height, width, 3), if it is no file.
    """

    name: str
    path: Path | None = None
    array: np.ndarray | None = field(default=None, repr=False)

    def pixels(self) -> np.ndarray:
        """Return uint8 RGB (height, width, 3), upright by the EXIF orientation of a file.

        Raises:
            InputError: the file is missing or cannot be decoded.
        """
        if self.array is not None:
            return self.array
        return read_image({"file_name": str(self.path)}, "RGB")

    def loaded(self) -> Picture:
        """Return the same picture with its pixels in memory.

        Raises:
            InputError: as `pixels`.
        """
        return Picture(self.name, self.path, self.pixels())


@dataclass(frozen=True)
class Inputs:
    """Pictures, and whether they came as one, as a list, or as a stream without a known end."""

    kind: str  # "one", "list" or "stream"
    pictures: Iterable[Picture]


def open_inputs(given: Any) -> Inputs:
    """Look at what a predictor was given.

    Args:
        given: one image (path, PIL image, uint8 array (height, width, 3) RGB, (height, width) grey
            or (height, width, 4) with alpha, uint8 tensor (3, height, width) RGB, `Picture`); or
            many: a list or tuple of these, a folder or a pattern ("shots/*.jpg") of image files, a
            video file, a generator.

    Returns:
        The pictures. Files and frames are read when their turn comes.

    Raises:
        InputError: something else, nothing at the path, a folder without images.
    """
    if isinstance(given, str | Path):
        return _open_path(Path(given))
    if isinstance(given, list | tuple):
        return Inputs("list", [_one(item, f"image {i}") for i, item in enumerate(given)])
    if isinstance(given, Iterator):
        return Inputs("stream", (_one(item, f"image {i}") for i, item in enumerate(given)))
    return Inputs("one", [_one(given, "image")])


def is_video(path: Path) -> bool:
    """Whether a path has the suffix of a video file."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder (not of folders in it), by name.

    Raises:
        InputError: there is none.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        expected = f"image files ({' '.join(IMAGE_SUFFIXES)})"
        fail(f"folder {folder}", expected=expected, got="none", remedy="Check the path.")
    return found


def video_frames(path: Path) -> Iterator[Picture]:
    """Yield the frames of a video, one at a time.

    Raises:
        InputError: OpenCV cannot read it.
    """
    video = cv2.VideoCapture(str(path))
    try:
        number = 0
        while True:
            good, frame = video.read()
            if not good:
                break
            yield Picture(f"{path} frame {number}", array=np.ascontiguousarray(frame[..., ::-1]))
            number += 1
    finally:
        video.release()
    if not number:
        remedy = "Check the file, or turn it into .mp4 with H.264."
        fail(f"video {path}", expected="frames that OpenCV reads", got="none", remedy=remedy)


def files_of(path: Path) -> list[Path]:
    """Return the files that a path means: itself, the images of a folder, those of a pattern.

    Raises:
        InputError: nothing there, a folder without images.
    """
    if path.is_dir():
        return image_files(path)
    if path.is_file():
        return [path]
    found = [Path(name) for name in glob.glob(str(path))]  # noqa: PTH207 (Path's needs a root)
    if not found:
        got = "nothing at this path"
        fail(f"input {path}", expected="a file or folder", got=got, remedy="Check the path.")
    return sorted(found)


def _open_path(path: Path) -> Inputs:
    if path.is_file():
        if is_video(path):
            return Inputs("stream", video_frames(path))
        return Inputs("one", [Picture(str(path), path)])
    return Inputs("list", [_one(file, "") for file in files_of(path)])


def _one(given: Any, name: str) -> Picture:
    """Make a picture of one image."""
    if isinstance(given, Picture):
        return given
    if isinstance(given, str | Path):
        path = Path(given)
        if path.is_dir() or is_video(path):
            remedy = "Give a folder or a video alone, not in a list."
            fail(f"input {path}", expected="an image file", got="something else", remedy=remedy)
        if not path.is_file():
            got = "nothing at this path"
            fail(f"image {path}", expected="a file", got=got, remedy="Check the path.")
        return Picture(str(path), path)
    if isinstance(given, Image.Image):
        return Picture(name, array=_of_pil(given, name))
    if isinstance(given, torch.Tensor):
        return Picture(name, array=_of_tensor(given, name))
    if isinstance(given, np.ndarray):
        return Picture(name, array=_of_array(given, name))
    fail(f"input {name}", expected=_KINDS, got=type(given).__name__, remedy="Convert it.")


def _of_pil(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.partition(";")[0] in ("I", "F"):  # convert() would cut values off at 255
        got = f"Pillow's mode {image.mode}"
        fail(name, expected="8 bits a channel", got=got, remedy="Scale it to 8 bits first.")
    try:
        upright = detection_utils._apply_exif_orientation(image)
        return np.asarray(upright.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # decoded only now
        raise InputError(f"{name}: the PIL image cannot be decoded ({error}).") from error


def _of_tensor(image: torch.Tensor, name: str) -> np.ndarray:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        expected = "a tensor (3, height, width) of RGB"
        remedy = "Give a list of images, not a batch; permute (height, width, 3) first."
        fail(name, expected=expected, got=f"shape {tuple(image.shape)}", remedy=remedy)
    if image.dtype != torch.uint8:
        _refuse_dtype(name, str(image.dtype))
    return _of_array(image.detach().cpu().permute(1, 2, 0).numpy(), name)


def _of_array(image: np.ndarray, name: str) -> np.ndarray:
    """Return uint8 RGB (height, width, 3): grey three times, alpha left out."""
    grey = image[..., None] if image.ndim == 2 else image
    if grey.ndim != 3 or grey.shape[2] not in (1, 3, 4) or not grey.size:
        expected = "an array (height, width, 3) of RGB, or of 1 or 4 channels"
        remedy = "Check the order of its axes; give several images as a list."
        fail(name, expected=expected, got=f"shape {image.shape}", remedy=remedy)
    if image.dtype != np.uint8:
        _refuse_dtype(name, str(image.dtype))
    rgb = np.repeat(grey, 3, axis=2) if grey.shape[2] == 1 else grey[..., :3]
    return np.ascontiguousarray(rgb)


def _refuse_dtype(name: str, dtype: str) -> None:
    remedy = "Scale values of 0 to 1 by 255 and convert them, as in (255 * x).round() to uint8."
    fail(name, expected="uint8 values from 0 to 255", got=dtype, remedy=remedy)
