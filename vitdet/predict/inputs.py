"""What a predictor can be given, as pictures one after the other."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps

from vitdet.data.images import IMAGE_SUFFIXES, UNREADABLE_SUFFIXES, open_image
from vitdet.utils.checks import InputError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"}
)
_KINDS = "a path, a PIL image, a uint8 array or tensor, or a list, folder, video or generator"
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/", re.IGNORECASE)  # two letters: C:/ is a path


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
        return np.array(open_image(str(self.path))) if self.array is None else self.array

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
        return _open_path(given)
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
    return find_files(folder)[0]


def find_files(given: str | Path) -> tuple[list[Path], Counter[str]]:
    """Return the files that a path means: itself, the images of a folder, those of a pattern.

    Returns:
        The files by name, and what was passed over, kind -> number: a suffix, or "folder" and
        "hidden file" (as macOS leaves them, "._a.jpg").

    Raises:
        InputError: nothing there, a folder without images, an address, a camera.
    """
    text = str(given)
    suffixes = IMAGE_SUFFIXES
    if text and os.path.isdir(text):  # noqa: PTH112 (Path's raises for names that are too long)
        what, candidates = f"folder {text}: expected image files", Path(text).iterdir()
    elif text and os.path.lexists(text):
        return [Path(text)], Counter()
    else:
        what = f"input {text or repr(text)}: expected a file or folder"
        names = glob.glob(text)  # noqa: PTH207 (Path's needs a root)
        candidates, suffixes = map(Path, names), suffixes | VIDEO_SUFFIXES
        if not names:
            raise InputError(f"{what}, {_nothing(text)}")
    files, passed_over = _sorted_out(candidates, suffixes)
    if not files:
        told = passed_over_text(passed_over) if passed_over else "the folder is empty"
        raise InputError(f"{what} (.jpg, .png, ...), got none; {told}.")
    return files, passed_over


def passed_over_text(passed_over: Counter[str]) -> str:
    """Return one line: "passed over: 4 x .heic (convert ...), 1 x folder"."""
    kinds = [
        f"{count} x {kind}"
        + (f" ({UNREADABLE_SUFFIXES[kind]})" if kind in UNREADABLE_SUFFIXES else "")
        for kind, count in passed_over.most_common()
    ]
    return f"passed over: {', '.join(kinds)}"


def _sorted_out(paths: Iterable[Path], suffixes: frozenset[str]) -> tuple[list[Path], Counter[str]]:
    """Return the paths with such a suffix by name, and how many others there are of which kind."""
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
    return files, others


def _nothing(text: str) -> str:
    """Say what a text is that is no path."""
    if not text:
        return "got an empty text. Check the command."
    address = _ADDRESS.match(text)
    if address and address[1].lower() == "file":
        return "got an address. Give the path alone, without file://."
    if address:
        return "got an address. Files are read, and nothing else: download or record it first."
    if text.isdigit():
        return "got a number. Cameras are not read: record a video first."
    return "got nothing at this path. Check the path."


def video_frames(path: Path) -> Iterator[Picture]:
    """Yield the frames of a video, one at a time.

    Raises:
        InputError: OpenCV cannot read it.
    """
    if not path.is_file():  # OpenCV would wait for a pipe
        raise InputError(f"video {path}: expected a file, got none. Check the path.")
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
        text = "expected frames that OpenCV reads, got none. Turn it into .mp4 with H.264."
        raise InputError(f"video {path}: {text}")


def _open_path(given: str | Path) -> Inputs:
    path = Path(given)
    if str(given) and os.path.isfile(path):  # noqa: PTH113 (as in `find_files`)
        if is_video(path):
            return Inputs("stream", video_frames(path))
        return Inputs("one", [Picture(str(path), path)])
    return Inputs("list", [_one(file, "") for file in find_files(given)[0]])


def _one(given: Any, name: str) -> Picture:
    """Make a picture of one image."""
    if isinstance(given, Picture):
        return given
    if isinstance(given, str | Path):
        path = Path(given)
        if os.path.isdir(path) or is_video(path):  # noqa: PTH112 (as in `find_files`)
            raise InputError(
                f"input {path}: expected an image file. Give a folder or a video alone."
            )
        if not os.path.lexists(path):
            raise InputError(f"image {given}: expected a file, {_nothing(str(given))}")
        return Picture(str(path), path)
    if isinstance(given, Image.Image):
        return Picture(name, array=_of_pil(given, name))
    if isinstance(given, torch.Tensor):
        return Picture(name, array=_of_tensor(given, name))
    if isinstance(given, np.ndarray):
        return Picture(name, array=_of_array(given, name))
    raise InputError(f"input {name}: expected {_KINDS}, got {type(given).__name__}.")


def _of_pil(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.partition(";")[0] in ("I", "F"):  # convert() would cut values off at 255
        text = (
            f"expected 8 bits a channel, got Pillow's mode {image.mode}. Scale it to 8 bits first."
        )
        raise InputError(f"{name}: {text}")
    try:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # decoded only now
        raise InputError(f"{name}: the PIL image cannot be decoded ({error}).") from error


def _of_tensor(image: torch.Tensor, name: str) -> np.ndarray:
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        text = f"expected a tensor (3, height, width) of RGB, got shape {tuple(image.shape)}. "
        text += "Give a list of images, not a batch; permute (height, width, 3) first."
        raise InputError(f"{name}: {text}")
    _check_dtype(name, image.dtype, torch.uint8)
    return _of_array(image.detach().cpu().permute(1, 2, 0).numpy(), name)


def _of_array(image: np.ndarray, name: str) -> np.ndarray:
    """Return uint8 RGB (height, width, 3): grey three times, alpha left out."""
    grey = image[..., None] if image.ndim == 2 else image
    if grey.ndim != 3 or grey.shape[2] not in (1, 3, 4) or not grey.size:
        text = "expected an array (height, width, 3) of RGB, or of 1 or 4 channels, got shape "
        text += f"{image.shape}. Check the order of its axes; give several images as a list."
        raise InputError(f"{name}: {text}")
    _check_dtype(name, image.dtype, np.uint8)
    return np.repeat(grey, 3, axis=2) if grey.shape[2] == 1 else grey[..., :3].copy()


def _check_dtype(name: str, dtype: Any, wanted: Any) -> None:
    if dtype != wanted:
        text = f"expected uint8 values from 0 to 255, got {dtype}. Scale values of 0 to 1 by 255"
        raise InputError(f"{name}: {text} and convert them, as in (255 * x).round() to uint8.")
