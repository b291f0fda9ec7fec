"""The web server: a page, what the page needs to know, and `POST /predict`."""

from __future__ import annotations

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

from vitdet.app.serve.guard import Guard
from vitdet.app.serve.line import Line
from vitdet.app.serve.uploads import Limits, RefusedError, read_body
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
_CONNECTIONS = 64


def build_app(
    answer: Callable[[bytes], dict[str, Any]],
    about: dict[str, Any],
    limits: Limits,
    *,
    names: Collection[str] = (),
    loopback_only: bool = True,
) -> Starlette:
    """Return the application.

    Args:
        answer: from an uploaded file to what the page draws; one call at a time.
        about: what the page shows of the model, and its classes.
        limits: of the requests.
        names, loopback_only: see `Guard`.
    """
    line = Line(answer, waiting=limits.waiting, seconds=limits.answer_seconds)
    known = about | {"max_bytes": limits.max_bytes, "max_pixels": limits.max_pixels}

    async def model(_: Request) -> JSONResponse:
        return JSONResponse(known)

    async def predict(request: Request) -> JSONResponse:
        line.enter()
        try:
            return JSONResponse(await line.serve(await read_body(request, limits)))
        finally:
            line.leave()

    files = [
        Route(path, _file((_FOLDER / name).read_bytes(), kind))
        for path, (name, kind) in _FILES.items()
    ]
    app = Starlette(
        routes=[*files, Route("/model", model), Route("/predict", predict, methods=["POST"])],
        middleware=[Middleware(Guard, names=names, loopback_only=loopback_only)],
        exception_handlers={
            RefusedError: _refused,
            InputError: _wrong_input,
            HTTPException: _http_error,
            Exception: _fault,
        },
    )
    app.state.line = line
    return app


def _file(content: bytes, kind: str) -> Callable[[Request], Response]:
    def send(_: Request) -> Response:
        return Response(content, media_type=kind)

    return send


def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RefusedError)
    return JSONResponse({"error": error.text}, error.status, error.headers)


def _wrong_input(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 400)


def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": f"{error.detail}."}, error.status_code, error.headers)


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


def make_server(app: Starlette) -> uvicorn.Server:
    """Return the server; its `run(sockets=[...])` returns after ^C."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=5,
        )
    )
