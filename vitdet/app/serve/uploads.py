"""What a request may take, its body, and the files of a form."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from email import message_from_string

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request


@dataclass(frozen=True)
class Limits:
    """How much a request may take."""

    max_bytes: int = 32 * 2**20  # of an upload; all on their way hold `waiting` times as much
    max_pixels: int = 50_000_000  # of its picture
    body_seconds: float = 60.0  # for the upload to arrive
    answer_seconds: float = 300.0  # from then on, the wait for others included
    waiting: int = 16  # uploads that may wait while one is worked on


class Uploads:
    """Reads the bodies of requests, up to a limit for each and one for all on their way."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.free = limits.max_bytes * limits.waiting

    async def read(self, request: Request) -> bytes:
        """Return a body.

        Raises:
            HTTPException: it is too large, too slow or empty, or too many come at once.
        """
        seconds = self.limits.body_seconds
        content = bytearray()
        try:
            await asyncio.wait_for(self._read(request, content), seconds)
        except asyncio.TimeoutError as error:
            text = f"The upload did not arrive within {seconds:g} seconds."
            raise HTTPException(408, text) from error
        except ClientDisconnect as error:
            raise HTTPException(400, "The upload was broken off.") from error
        finally:
            self.free += len(content)
        if not content:
            raise HTTPException(400, "The file is empty.")
        return bytes(content)

    async def _read(self, request: Request, content: bytearray) -> None:
        """Reading stops at the limit, whatever the header announced."""
        most = self.limits.max_bytes
        size = int(request.headers.get("content-length", "0"))  # uvicorn lets numbers in alone
        parts = request.stream()
        while size <= most and (part := await anext(parts, None)) is not None:
            content += part
            size = max(size, len(content))
            self.free -= len(part)
            if self.free < 0:
                raise HTTPException(503, "Too many uploads are on their way. Try again.")
        if size > most:
            text = f"The file is too large: {most / 2**20:g} MiB at most."
            raise HTTPException(413, text, {"Connection": "close"})


def is_form(request: Request) -> bool:
    """Whether a request's body is a form with files, as `curl -F` and browsers send it."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


def files_of(request: Request, content: bytes) -> list[tuple[str, bytes]]:
    """Return (name, bytes) of each file of a form (RFC 7578).

    Raises:
        HTTPException: it holds none.
    """
    boundary = message_from_string(
        f"Content-Type: {request.headers['content-type']}"
    ).get_boundary()
    files = []
    for part in (b"\r\n" + content).split(b"\r\n--" + (boundary or "").encode())[1:-1]:
        head, _, data = part.partition(b"\r\n\r\n")
        name = message_from_string(head.decode(errors="replace").lstrip()).get_filename()
        if name is not None:
            files.append((name, data))
    if not files:
        raise HTTPException(400, "The form has no file, or is not complete.")
    return files
