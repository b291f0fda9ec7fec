"""The web server: a page, what the page needs to know, and `POST /predict`; who may ask."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vitdet.app.serve.worker import Worker
from vitdet.utils.checks import InputError

_FOLDER = Path(__file__).parents[1] / "templates"
# The only files that are ever sent, read once; no part of an address becomes a path.
_FILES = {
    "/": ("serve.html", "text/html; charset=utf-8"),
    "/serve.css": ("serve.css", "text/css; charset=utf-8"),
    "/serve.js": ("serve.js", "text/javascript; charset=utf-8"),
}
_HEADERS = [
    (  # the page runs its own files only, and reaches nothing but this server
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
]
_CONNECTIONS = 512  # those that ask for nothing are closed before they are many
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")
_PROXY = (
    "Behind a proxy, name its host by --host-name and pass the Host header on (nginx: "
    "proxy_set_header Host $http_host;)."
)


@dataclass(frozen=True)
class Limits:
    """How much a request may take."""

    max_bytes: int = 32 * 2**20  # of an upload; all on their way hold `waiting` times as much
    max_pixels: int = 50_000_000  # of its picture
    body_seconds: float = 60.0  # for the upload to arrive
    answer_seconds: float = 300.0  # from then on, the wait for others included
    waiting: int = 16  # uploads that may wait while one is worked on


def build_app(
    worker: Worker,
    about: dict[str, Any],
    limits: Limits,
    names: Collection[str] = (),
    loopback_only: bool = True,
) -> Starlette:
    """Return the application.

    Args:
        worker: from an uploaded file to what the page draws; it has begun.
        about: what the page shows of the model.
        limits: of the requests.
        names: hosts by which it may be called besides "localhost" and addresses.
        loopback_only: whether of the addresses only loopback ones count.
    """
    known = about | {"max_bytes": limits.max_bytes, "max_pixels": limits.max_pixels}
    uploads = _Uploads(limits)

    async def model(_: Request) -> JSONResponse:
        return JSONResponse(known)

    async def predict(request: Request) -> Response:
        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        content = await uploads.read(request)  # a place is taken when it has come
        status, answer = await worker.answer(content, left)
        return Response(answer, status, media_type="application/json")

    def file(name: str, kind: str) -> Callable[[Request], Response]:
        content = (_FOLDER / name).read_bytes()
        return lambda _: Response(content, media_type=kind)

    files = [Route(path, file(*of)) for path, of in _FILES.items()]
    app = Starlette(
        routes=[*files, Route("/model", model), Route("/predict", predict, methods=["POST"])],
        middleware=[Middleware(_Guard, names=names, loopback_only=loopback_only)],
        exception_handlers={HTTPException: _error, Exception: _error},
    )
    app.router.redirect_slashes = False  # to the host that a client names
    return app


def _error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    # a mistake of this program; its traceback goes to the log
    return JSONResponse({"error": "The server failed. Its log tells more."}, 500)


class _Guard:
    """Answers 403 to requests that do not come from the server's own page.

    A site can let its name point to this machine (DNS rebinding); then the Host header tells the
    name. An address as host cannot be a rebound name. A site can post a form here; then Origin or
    Sec-Fetch-Site tells it. (Starlette's TrustedHostMiddleware has no word for "any address".)
    """

    def __init__(self, app: ASGIApp, names: Collection[str], loopback_only: bool) -> None:
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}
        self._is_mine = is_loopback if loopback_only else _address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wrong = self._wrong(Headers(scope=scope))
        app = JSONResponse({"error": wrong}, 403) if wrong else self._app
        await app(scope, receive, send)

    def _wrong(self, headers: Headers) -> str:
        """Say what is wrong with where a request comes from, "" for nothing."""
        host = headers.get("host", "").strip().lower()
        found = _HOST.fullmatch(host)
        name = (found[1] or found[2]) if found else "another name"
        if found is None or not (name in self._names or self._is_mine(name)):
            return f"This server is not known by the name {name}. {_PROXY}"
        origin = headers.get("origin", f"http://{host}").lower()
        if origin not in (f"http://{host}", f"https://{host}"):
            return f"Requests of other sites are not answered. {_PROXY}"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "Requests of other sites are not answered."
        return ""


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:  # a name
        return None


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, that no other machine reaches."""
    found = _address(host)
    return host == "localhost" or (found is not None and found.is_loopback)


class _Uploads:
    """Reads the bodies of requests, up to a limit for each and one for all on their way."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._free = limits.max_bytes * limits.waiting

    async def read(self, request: Request) -> bytes:
        """Return the body; reading stops at the limit, whatever the header announced."""
        seconds = self._limits.body_seconds
        if request.headers.get("content-type", "").startswith("multipart/"):
            text = "Send the file itself as the body, and no form: curl --data-binary @photo.jpg"
            raise HTTPException(415, f"{text} ADDRESS")
        content = bytearray()
        try:
            await asyncio.wait_for(self._read(request, content), seconds)
        except asyncio.TimeoutError as error:
            text = f"The upload did not arrive within {seconds:g} seconds."
            raise HTTPException(408, text) from error
        except ClientDisconnect as error:
            raise HTTPException(400, "The upload was broken off.") from error
        finally:
            self._free += len(content)
        if not content:
            raise HTTPException(400, "The file is empty.")
        return bytes(content)

    async def _read(self, request: Request, content: bytearray) -> None:
        most = self._limits.max_bytes
        size = int(request.headers.get("content-length", "0"))  # uvicorn lets numbers in alone
        parts = request.stream()
        while size <= most and (part := await anext(parts, None)) is not None:
            content += part
            size = max(size, len(content))
            self._free -= len(part)
            if self._free < 0:
                raise HTTPException(503, "Too many uploads are on their way. Try again.")
        if size > most:
            text = f"The file is too large: {most / 2**20:g} MiB at most."
            raise HTTPException(413, text, {"Connection": "close"})


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, port 0 for any free port.

    Raises:
        InputError: the address is taken, or is none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_CONNECTIONS)
    except (OSError, OverflowError) as error:
        text = "Choose another --port, 0 for any that is free, or another --host."
        raise InputError(f"address {host}:{port}: {error}. {text}") from error


class Connection(H11Protocol):
    """uvicorn's, closed when no whole head of a request comes, or no answer is taken, in time."""

    SECONDS = 10.0
    _state: object = (None, 0)

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        """A client is there."""
        super().connection_made(transport)
        self.loop.call_later(self.SECONDS, self._watch)

    def _watch(self) -> None:
        """Close it if it is the client's turn, and nothing has changed since the last look."""
        if self.transport.is_closing():
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        state = (self.cycle, self.transport.get_write_buffer_size())
        if state == self._state and (is_idle or self.flow.write_paused):
            self.transport.abort()
            return
        self._state = state
        self.loop.call_later(self.SECONDS, self._watch)


class Server(uvicorn.Server):
    """uvicorn's; its `run(sockets=[...])` returns after ^C, whatever is worked on."""

    def __init__(self, app: Starlette, worker: Worker) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_level="error",
            access_log=False,
            server_header=False,
            headers=_HEADERS,
            lifespan="off",
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the work, then the connections."""
        self._worker.end()
        await super().shutdown(sockets)
