"""The web server: a page, what the page needs to know, and `POST /predict`."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from vitdet.app.serve.guard import Guard
from vitdet.app.serve.uploads import Bodies, Limits
from vitdet.app.serve.worker import Worker
from vitdet.utils.checks import InputError, fail

_FOLDER = Path(__file__).with_name("page")
# The only files that are ever sent, read once; no part of an address becomes a path.
_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/draw.js": ("draw.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_CONNECTIONS = 512  # those that ask for nothing are closed before they are many


def build_app(
    worker: Worker,
    about: dict[str, Any],
    limits: Limits,
    *,
    names: Collection[str] = (),
    loopback_only: bool = True,
) -> Starlette:
    """Return the application.

    Args:
        worker: from an uploaded file to what the page draws; it has begun.
        about: what the page shows of the model, and its classes.
        limits: of the requests.
        names, loopback_only: see `Guard`.
    """
    bodies = Bodies(limits)
    known = about | {"max_bytes": limits.max_bytes, "max_pixels": limits.max_pixels}

    async def model(_: Request) -> JSONResponse:
        return JSONResponse(known)

    async def predict(request: Request) -> Response:
        content = await bodies.read(request)  # a place is taken when it has come
        status, answer = await worker.answer(content, _left(request))
        return Response(answer, status, media_type="application/json")

    files = [
        Route(path, _file((_FOLDER / name).read_bytes(), kind))
        for path, (name, kind) in _FILES.items()
    ]
    app = Starlette(
        routes=[*files, Route("/model", model), Route("/predict", predict, methods=["POST"])],
        middleware=[Middleware(Guard, names=names, loopback_only=loopback_only)],
        exception_handlers={InputError: _wrong_input, HTTPException: _error, Exception: _fault},
    )
    app.router.redirect_slashes = False  # to the host that a client names
    return app


async def _left(request: Request) -> None:
    """Return when the client of a request has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _file(content: bytes, kind: str) -> Callable[[Request], Response]:
    def send(_: Request) -> Response:
        return Response(content, media_type=kind)

    return send


def _wrong_input(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 400)


def _error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    text = f"{error.detail.removesuffix('.')}."
    return JSONResponse({"error": text}, error.status_code, error.headers)


def _fault(_: Request, __: Exception) -> JSONResponse:
    """A mistake of this program; its traceback goes to the log."""
    return JSONResponse({"error": "The server failed. Its log tells more."}, 500)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, port 0 for any free port.

    Raises:
        InputError: the address is taken, or is none of this machine's.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(_CONNECTIONS)
        except OSError:
            listening.close()
            raise
        return listening
    except (OSError, OverflowError) as error:
        remedy = "Choose another with --port, 0 for any that is free, or another --host."
        fail(f"address {host}:{port}", expected="a free one", got=str(error), remedy=remedy)


class Connection(H11Protocol):
    """uvicorn's, closed when no whole head of a request comes, or no answer is taken, in time."""

    HEAD_SECONDS = 10.0
    ANSWER_SECONDS = 60.0  # without a byte taken
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        """A client is there."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """A part of a request has come."""
        super().data_received(data)
        self._watch()

    def _watch(self) -> None:
        """Let the time run while no request is worked on; further bytes do not prolong it."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.HEAD_SECONDS, self._late)

    def _late(self) -> None:
        self._timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def pause_writing(self) -> None:
        """The client takes nothing for now."""
        super().pause_writing()
        self._stop()
        self._timer = self.loop.call_later(self.ANSWER_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client goes on."""
        super().resume_writing()
        self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        super().connection_lost(exc)
        self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Server(uvicorn.Server):
    """uvicorn's; its `run(sockets=[...])` returns after ^C, whatever is worked on."""

    def __init__(self, app: Starlette, worker: Worker) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_level="error",
                access_log=False,
                server_header=False,
                lifespan="off",
                limit_concurrency=_CONNECTIONS,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=1,
            )
        )
        self._worker = worker

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the work, then the connections."""
        self._worker.end()
        await super().shutdown(sockets)
