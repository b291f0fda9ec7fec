"""Pictures that come from outside: read and decoded within limits, whatever they claim to be."""

from __future__ import annotations

import asyncio
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from starlette.requests import ClientDisconnect, Request

# What browsers show too. Pillow's readers of other formats are never reached.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
# What Pillow raises for damaged files, see vitdet/data/images.py.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError)


class RefusedError(Exception):
    """A request that gets an error instead of an answer.

    Args:
        status: of HTTP.
        text: one line for people.
        headers: of the response, such as Retry-After.
    """

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers or {}


@dataclass(frozen=True)
class Limits:
    """How much a request may take.

    Attributes:
        max_bytes: of an upload.
        max_pixels: of its picture.
        body_seconds: for the upload to arrive.
        answer_seconds: from then on, the wait for others included.
        waiting: uploads that may wait while one is worked on.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    body_seconds: float = 60.0
    answer_seconds: float = 300.0
    waiting: int = 16


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request; reading stops at the limit, whatever the header announced.

    Raises:
        RefusedError: it is empty, too large, too slow, or the client left.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > limits.max_bytes:
        raise _too_large(limits)
    try:
        content = await asyncio.wait_for(_read(request, limits), limits.body_seconds)
    except asyncio.TimeoutError as error:
        seconds = f"{limits.body_seconds:g} seconds"
        raise RefusedError(408, f"The upload did not arrive within {seconds}.") from error
    except ClientDisconnect as error:
        raise RefusedError(400, "The upload was broken off.") from error
    if not content:
        raise RefusedError(400, "The file is empty.")
    return content


async def _read(request: Request, limits: Limits) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limits.max_bytes:
            raise _too_large(limits)
        parts.append(part)
    return b"".join(parts)


def _too_large(limits: Limits) -> RefusedError:
    most = f"{limits.max_bytes / 2**20:g} MiB"
    return RefusedError(413, f"The file is too large: {most} at most.", {"Connection": "close"})


@dataclass(frozen=True)
class Upload:
    """A decoded picture.

    Attributes:
        image: uint8 RGB (height, width, 3), upright.
        odd: whether it was turned by EXIF data in a format where browsers differ about that.
    """

    image: np.ndarray
    odd: bool


def decode(content: bytes, max_pixels: int) -> Upload:
    """Decode a picture, upright by its EXIF orientation.

    Its size is read in the header, and nothing is decoded of a picture that is too large.

    Raises:
        RefusedError: no picture, a damaged one, too many pixels, more than 8 bits a channel.
    """
    with warnings.catch_warnings():
        # Pillow warns of odd EXIF data, and at a limit of its own; neither is news here
        warnings.simplefilter("ignore")
        return _decode(content, max_pixels)


def _decode(content: bytes, max_pixels: int) -> Upload:
    picture = _opened(content, max_pixels)
    if picture.width * picture.height > max_pixels:
        raise _too_many_pixels(f"{picture.width} x {picture.height}", max_pixels)
    if picture.mode.partition(";")[0] in ("I", "F"):
        raise RefusedError(415, "The picture has more than 8 bits a channel: convert it to 8 bits.")
    try:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) != 1
        odd = turned and picture.format != "JPEG"
        picture = ImageOps.exif_transpose(picture)  # decodes
        if "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return Upload(np.asarray(picture.convert("RGB")), odd)
    except _DAMAGED as error:
        raise RefusedError(400, "The picture is damaged or not complete.") from error


def _opened(content: bytes, max_pixels: int) -> Image.Image:
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError as error:
        kinds = "JPEG, PNG, WebP or BMP"
        raise RefusedError(
            415, f"This is no picture that can be read: it must be {kinds}."
        ) from error
    except Image.DecompressionBombError as error:  # Pillow's last limit
        raise _too_many_pixels("far more", max_pixels) from error
    except _DAMAGED as error:
        raise RefusedError(400, "The picture is damaged or not complete.") from error


def _too_many_pixels(size: str, max_pixels: int) -> RefusedError:
    most = f"{max_pixels / 1e6:g} megapixels"
    return RefusedError(413, f"The picture is too large: {size} pixels, {most} at most.")
