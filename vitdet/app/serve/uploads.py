"""Pictures that come from outside: read and decoded within limits, whatever they claim to be."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from vitdet.data.images import ImageError, open_image, read_header

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # what browsers show too
_KINDS = "JPEG, PNG, WebP or BMP, the file itself being the body"
_FORM = "Send the file itself as the body, and no form: curl --data-binary @photo.jpg ADDRESS"


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


class Bodies:
    """Reads the bodies of requests, up to a limit for each and one for all that are on their way.

    Args:
        limits: of a request; all together may hold as much as `waiting` of them.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._free = limits.max_bytes * limits.waiting

    async def read(self, request: Request) -> bytes:
        """Return the body; reading stops at the limit, whatever the header announced.

        Raises:
            HTTPException: it is empty, too large, too slow, a form, or the client left.
        """
        if request.headers.get("content-type", "").startswith("multipart/"):
            raise HTTPException(415, _FORM)
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limits.max_bytes:
            raise self._too_large()
        try:
            content = await asyncio.wait_for(self._read(request), self._limits.body_seconds)
        except asyncio.TimeoutError as error:
            text = f"The upload did not arrive within {self._limits.body_seconds:g} seconds"
            raise HTTPException(408, text) from error
        except ClientDisconnect as error:
            raise HTTPException(400, "The upload was broken off") from error
        if not content:
            raise HTTPException(400, "The file is empty")
        return content

    async def _read(self, request: Request) -> bytes:
        parts, size = [], 0
        try:
            async for part in request.stream():
                size += len(part)
                self._free -= len(part)
                if size > self._limits.max_bytes:
                    raise self._too_large()
                if self._free < 0:
                    raise HTTPException(503, "Too many uploads are on their way. Try again")
                parts.append(part)
            return b"".join(parts)
        finally:
            self._free += size

    def _too_large(self) -> HTTPException:
        most = f"{self._limits.max_bytes / 2**20:g} MiB"
        text = f"The file is too large: {most} at most"
        return HTTPException(413, text, {"Connection": "close"})


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

    Its size and scans are read in the header, and nothing is decoded of a picture that is too
    large.

    Raises:
        HTTPException: no picture, a damaged one, too many pixels, more than 8 bits a channel.
    """
    try:
        picture = open_image(content, formats=FORMATS, max_pixels=max_pixels)
    except ImageError as error:
        raise _refused(error) from error
    header = read_header(content)
    odd = header.orientation != 1 and header.format not in ("JPEG", "MPO")
    return Upload(np.array(picture), odd)


def _refused(error: ImageError) -> HTTPException:
    answers = {
        "unknown format": (415, f"This is no picture that can be read: it must be {_KINDS}"),
        "more than 8 bits": (415, "It has more than 8 bits a channel: convert the picture to 8"),
        "too many pixels": (413, f"The picture is too large: it {str(error).partition(': ')[2]}"),
        "too many scans": (413, "The picture takes too long to decode: a JPEG of too many scans"),
    }
    return HTTPException(*answers.get(error.kind, (400, "The picture is damaged or not complete")))
