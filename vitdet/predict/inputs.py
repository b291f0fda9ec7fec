"""What a predictor can be given, as pictures one after the other."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from vitdet.data.images import (
    IMAGE_SUFFIXES,
    UNREADABLE_SUFFIXES,
    header_of,
    open_image,
    to_rgb,
)
from vitdet.utils.checks import InputError

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"}
)


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
        """Return uint8 RGB (height, width, 3), upright, or raise an InputError of the file."""
        return np.array(open_image(str(self.path))) if self.array is None else self.array


def open_inputs(given: Any) -> tuple[str, Iterable[Picture]]:
    """Return how pictures came, "one", "list" or "stream", and the pictures, read in their turn.

    Args:
        given: one image (path, PIL image, uint8 array (height, width, 3) RGB, (height, width) grey
            or (height, width, 4) with alpha, uint8 tensor (3, height, width) RGB, `Picture`); or
            many: a list or tuple of these, a folder or a pattern ("shots/*.jpg") of image files; or
            a stream: a video file, a generator.

    Raises:
        InputError: something else, nothing at the path, a folder without images.
    """
    if isinstance(given, list | tuple):
        return "list", [_picture(each, f"image {i}") for i, each in enumerate(given)]
    if isinstance(given, Iterator):
        return "stream", (_picture(each, f"image {i}") for i, each in enumerate(given))
    if not isinstance(given, str | Path):
        return "one", [_picture(given, "image")]
    if Path(given).suffix.lower() in VIDEO_SUFFIXES and os.path.isfile(given):  # noqa: PTH113
        return "stream", video_frames(Path(given))
    files, _ = find_files(given)
    pictures = [_picture(file, "") for file in files]
    return "one" if str(given) == str(files[0]) else "list", pictures


def find_files(given: str | Path) -> tuple[list[Path], Counter[str]]:
    """Return the files that a path means: itself, the images of a folder, those of a pattern.

    Returns:
        The files by name, and what was passed over, kind -> number: a suffix, or "folder" and
        "hidden file" (as macOS leaves them, "._a.jpg").

    Raises:
        InputError: nothing there, a folder without images, an address, a camera.
    """
    text, suffixes = str(given), IMAGE_SUFFIXES
    if text and os.path.isdir(text):  # noqa: PTH112 (Path's raises for names that are too long)
        paths = list(Path(text).iterdir())
    elif text and os.path.lexists(text):
        return [Path(text)], Counter()
    else:
        paths = [Path(name) for name in glob.glob(text)]  # noqa: PTH207 (Path's needs a root)
        suffixes = suffixes | VIDEO_SUFFIXES
        if not paths:
            raise InputError(
                f"input {text or repr(text)}: nothing is at this path. Files and folders are read; "
                "addresses and cameras are not: download or record them first."
            )
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
    video = cv2.VideoCapture(str(path))
    number = 0
    try:
        while (read := video.read())[0]:
            pixels = np.ascontiguousarray(read[1][..., ::-1])
            yield Picture(f"{path} frame {number}", array=pixels)
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
        path = Path(given)
        if os.path.isdir(path) or path.suffix.lower() in VIDEO_SUFFIXES:  # noqa: PTH112
            raise InputError(f"input {path}: give a folder or a video alone, not in a list.")
        if not os.path.lexists(path):
            find_files(given)  # says what it is
        return Picture(str(path), path)
    if isinstance(given, Image.Image):
        return Picture(name, array=_of_pil(given, name))
    if isinstance(given, torch.Tensor) and given.ndim == 3:
        given = given.detach().cpu().permute(1, 2, 0).numpy()
    if not isinstance(given, np.ndarray):
        kinds = "a path, a PIL image, a uint8 array or tensor, or many of these"
        raise InputError(f"input {name}: expected {kinds}, got a {type(given).__name__}.")
    grey = given[..., None] if given.ndim == 2 else given
    good = grey.ndim == 3 and grey.shape[2] in (1, 3, 4) and grey.size
    if not good or grey.dtype != np.uint8:
        raise InputError(
            f"{name}: expected uint8 values from 0 to 255 in an array (height, width, 3) of RGB, "
            "grey or with alpha, or a tensor (3, height, width), got "
            f"{given.dtype} {given.shape}. Several images are a list."
        )
    return Picture(
        name, array=np.repeat(grey, 3, 2) if grey.shape[2] == 1 else grey[..., :3].copy()
    )


def _of_pil(image: Image.Image, name: str) -> np.ndarray:
    if header_of(image).deep:  # convert() would cut values off at 255
        text = f"expected 8 bits a channel, got Pillow's mode {image.mode}. Scale it first."
        raise InputError(f"{name}: {text}")
    try:
        return np.array(to_rgb(image))
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # decoded only now
        raise InputError(f"{name}: the PIL image cannot be decoded ({error}).") from error
