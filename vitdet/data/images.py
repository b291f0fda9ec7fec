"""Reading image files, with one-line errors for what is missing, damaged or of another size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

from vitdet.utils.checks import InputError, fail

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size only where this many times as many pixels as
# are wanted, each way, are left to the resize: without that, edges come out visibly sharper.
_SPARE = 2.0
_REDUCTIONS = (8, 4, 2)


def read_image(record: dict[str, Any], image_format: str = "RGB") -> np.ndarray:
    """Decode the image of a record, turned upright by its EXIF orientation.

    Args:
        record: has `file_name`, and `height` and `width` in pixels if they are known.
        image_format: "RGB" or "BGR".

    Returns:
        uint8 (height, width, 3).

    Raises:
        InputError: missing, unreadable or truncated file, more than 8 bits a channel in a grey
            image, or a size other than the record's.
    """
    name = record["file_name"]
    with _readable(name), PathManager.open(name, "rb") as file:
        stream: Any = file  # annotated as text
        picture = Image.open(stream)
        _check_depth(name, picture)
        picture = detection_utils._apply_exif_orientation(picture)
        image = detection_utils.convert_PIL_to_numpy(picture, image_format)
    _check_size(record, image.shape[0], image.shape[1])
    return image


def read_reduced(record: dict[str, Any], shrink: float) -> tuple[Image.Image, int]:
    """Decode the image of a record, upright and in RGB, at less than its size where that saves.

    Only JPEG files can be decoded smaller (by the inverse cosine transform, which averages
    properly), and only with enough pixels to spare for the resize that follows.

    Args:
        record: as in `read_image`.
        shrink: how many times smaller the image will be used, 1 or less for not smaller.

    Returns:
        The picture, and the factor 1, 2, 4 or 8 it was reduced by (sides are rounded up).

    Raises:
        InputError: as `read_image`.
    """
    name = record["file_name"]
    with _readable(name), PathManager.open(name, "rb") as file:
        stream: Any = file  # annotated as text
        opened = Image.open(stream)
        _check_depth(name, opened)
        full, reduction = opened.size, _reduction(opened, shrink)
        if reduction > 1:
            opened.draft(None, (full[0] // reduction, full[1] // reduction))
            if opened.size == full:  # not a JPEG
                reduction = 1
        stored = opened.size
        picture = detection_utils._apply_exif_orientation(opened)
        picture = picture.convert("RGB")  # decodes
    upright = full if picture.size == stored else full[::-1]
    _check_size(record, upright[1], upright[0])
    return picture, reduction


def _reduction(image: Image.Image, shrink: float) -> int:
    """Largest reduction that leaves pixels to spare.

    An image with EXIF data may be turned, and then a side that the reduction does not divide would
    have its incomplete last pixel first.
    """
    whole = "exif" in image.info
    for reduction in _REDUCTIONS:
        if reduction * _SPARE <= shrink and min(image.size) >= reduction:
            divides = not any(side % reduction for side in image.size)
            if divides or not whole:
                return reduction
    return 1


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        fail(
            f"image {name}",
            expected="a file",
            got="nothing at this path",
            remedy="Check the image folder, or leave such images out with check=drop.",
        )
    except InputError:
        raise
    # what Pillow raises for damaged files: SyntaxError for PNG, ValueError and EOFError for others
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        fail(
            f"image {name}",
            expected="an image that can be decoded",
            got=f"{type(error).__name__} ({error})",
            remedy="Replace the file, or remove the image from the annotation file.",
        )


def _check_depth(name: str, image: Image.Image) -> None:
    """Refuse what Pillow would turn into RGB by cutting every value off at 255."""
    if image.mode.partition(";")[0] in ("I", "F"):
        fail(
            f"image {name}",
            expected="values up to 255",
            got=f"grey values of more than 8 bits (Pillow's mode {image.mode})",
            remedy="Scale them to 8 bits and store the image again.",
        )


def _check_size(record: dict[str, Any], height: int, width: int) -> None:
    if "height" not in record:  # an image of no data set
        return
    expected = (record["height"], record["width"])
    if (height, width) != expected:
        fail(
            f"image {record['file_name']}",
            expected=f"{expected[0]} x {expected[1]} pixels (height x width) as in the annotations",
            got=f"{height} x {width}",
            remedy="Correct height and width in the annotation file, or replace the image.",
        )
