"""The web server: a page and `POST /predict`, who may ask, and the process that detects."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import multiprocessing
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import connection
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vitdet.app.serve.uploads import Limits, Uploads, files_of, is_form
from vitdet.utils.checks import InputError

# The only files that are ever sent, read once; no part of an address becomes a path.
_FILES = {"/": "serve.html", "/serve.css": "serve.css", "/serve.js": "serve.js"}
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
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

# Loads the model; returns what is known of it, and what gives a status and JSON for an upload.
Start = Callable[[], tuple[dict[str, Any], Callable[[bytes], tuple[int, bytes]]]]


# --- the process that detects --------------------------------------------------------------------


class Worker:
    """One picture at a time, in a process of its own, which can be ended in the midst of it.

    A few pictures may wait, and no one waits for ever. What nobody waits for any more may end in a
    few seconds; else the process is ended, and the next picture starts a new one. `start` is called
    in the process, `method` is of multiprocessing.

    Raises:
        InputError: the model cannot be used.
    """

    GRACE = 5.0  # seconds

    def __init__(self, start: Start, limits: Limits, method: str = "forkserver") -> None:
        self._start, self._limits = start, limits
        self._context: Any = multiprocessing.get_context(method)
        self._turns = ThreadPoolExecutor(1)
        self.asked: set[Future[tuple[int, bytes]]] = set()  # what waits or is worked on
        self._ended = False
        self._last = 1.0  # seconds that the latest took
        self.seconds = 0.0  # that all took
        self.answers: Counter[int] = Counter()  # {status: pictures}
        self.process: Any = None
        self.about = self._begin()  # what the page shows of the model

    def _begin(self) -> dict[str, Any]:
        self._mine, theirs = self._context.Pipe()
        given = (self._start, self._mine, theirs)
        self.process = self._context.Process(target=_work, args=given, daemon=True)
        self.process.start()
        theirs.close()
        try:
            error, about = self._mine.recv()
        except EOFError:
            error, about = "detector: its process died at its start, see above.", {}
        if error:
            self._kill()
            raise InputError(error)
        return about

    def end(self) -> None:
        """End the process, whatever it does; there will be no other."""
        self._ended = True
        self._kill()
        self._turns.shutdown(wait=False)

    async def answer(
        self, content: bytes, left: Callable[[], Awaitable[None]]
    ) -> tuple[int, bytes]:
        """Return the status and the JSON for an upload; `left` returns when its client has left.

        Raises:
            HTTPException: too many wait, it took too long, or the process died of it.
        """
        if len(self.asked) > self._limits.waiting:
            raise self._busy("Too many pictures are waiting.")
        asked = self._turns.submit(self._exchange, content)
        self.asked.add(asked)
        asked.add_done_callback(self.asked.discard)
        answer, gone = asyncio.wrap_future(asked), asyncio.ensure_future(left())
        first, seconds = asyncio.FIRST_COMPLETED, self._limits.answer_seconds
        try:
            await asyncio.wait({answer, gone}, timeout=seconds, return_when=first)
            if answer.done():
                return answer.result()
            answer.cancel()
            later = asyncio.get_running_loop().call_later
            later(self.GRACE, lambda: asked.done() or self._kill())
            raise self._busy("It took too long.")
        finally:
            gone.cancel()

    def _exchange(self, content: bytes) -> tuple[int, bytes]:
        begun, status = time.perf_counter(), 500
        try:
            if self.process is None and not self._ended:
                self._begin()
            self._mine.send_bytes(content)
            status, answer = self._mine.recv()
            return status, answer
        except (EOFError, OSError) as error:  # the process died, or was ended
            self._kill()
            raise HTTPException(500, "The server failed. Its log tells more.") from error
        finally:
            self._last = time.perf_counter() - begun
            self.seconds += self._last
            self.answers[status] += 1

    def metrics(self) -> str:
        """Return counts as Prometheus reads them."""
        totals = [
            f'pictures_total{{status="{key}"}} {n}' for key, n in sorted(self.answers.items())
        ]
        lines = [*totals, f"seconds_total {self.seconds:.3f}", f"waiting {len(self.asked)}"]
        return "".join(f"vitdet_{line}\n" for line in lines)

    def _kill(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.join()

    def _busy(self, text: str) -> HTTPException:
        wait = max(1, math.ceil(self._last * len(self.asked)))
        return HTTPException(503, f"{text} Try again in {wait} s.", {"Retry-After": str(wait)})


def _work(start: Start, theirs: connection.Connection, parent: connection.Connection) -> None:
    """Answer uploads until the parent ends."""
    theirs.close()  # else this process would never see that the parent has gone
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is for the parent, which ends this process
    try:
        about, answer = start()
    except InputError as error:
        parent.send((str(error), None))
        return
    parent.send(("", about))
    while True:
        try:
            content = parent.recv_bytes()
        except EOFError:
            return
        parent.send(answer(content))


# --- requests ------------------------------------------------------------------------------------


def build_app(
    worker: Worker,
    uploads: Uploads,
    names: Collection[str] = (),
    *,
    loopback_only: bool = True,
    root: str = "",
) -> ASGIApp:
    """Return the application.

    Args:
        worker: from an uploaded file to what the page draws.
        uploads: reads the files.
        names: hosts by which it may be called besides "localhost" and addresses.
        loopback_only: whether of the addresses only loopback ones count.
        root: a path, "/detect", below which a proxy finds the same again.
    """
    limits = uploads.limits
    known = worker.about | {"max_bytes": limits.max_bytes, "max_pixels": limits.max_pixels}

    async def model(_: Request) -> JSONResponse:
        return JSONResponse(known)

    async def predict(request: Request) -> Response:
        content = await uploads.read(request)  # a place is taken when it has come
        if is_form(request):
            (_, content), *others = files_of(request, content)
            if others:
                text = (
                    f"Expected one file, got {1 + len(others)}. POST /predict/batch takes several."
                )
                raise HTTPException(400, text)
        status, found = await _asked(worker, request, content)
        return Response(found, status, media_type="application/json")

    async def batch(request: Request) -> JSONResponse:
        if not is_form(request):
            raise HTTPException(415, "Expected a form: curl -F file=@a.jpg -F file=@b.jpg ADDRESS")
        images = []
        for name, content in files_of(request, await uploads.read(request)):
            status, found = await _asked(worker, request, content)
            images.append({"name": name, "status": status} | json.loads(found))
        return JSONResponse({"images": images})

    routes: list[Route | Mount] = [
        Route("/model", model),
        Route("/predict", predict, methods=["POST"]),
        Route("/predict/batch", batch, methods=["POST"]),
        Route("/healthz", lambda _: JSONResponse({"status": "ok", "waiting": len(worker.asked)})),
        Route("/metrics", lambda _: PlainTextResponse(worker.metrics())),
        *(Route(address, _file(name)) for address, name in _FILES.items()),
    ]
    routes += [Mount(root, routes=list(routes))] if root else []
    handlers: Any = {HTTPException: _error, Exception: _error}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # to the host that a client names
    return _guarded(app, {*map(str.lower, names)}, loopback_only)


async def _asked(worker: Worker, request: Request, content: bytes) -> tuple[int, bytes]:
    """Return the worker's answer, unless the client leaves before it."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return await worker.answer(content, left)


def _file(name: str) -> Callable[[Request], Response]:
    path = Path(__file__).parents[1] / "templates" / name
    content, kind = path.read_bytes(), f"{_KINDS[path.suffix]}; charset=utf-8"
    return lambda _: Response(content, media_type=kind)


def _error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    # a mistake of this program; its traceback goes to the log
    return JSONResponse({"error": "The server failed. Its log tells more."}, 500)


# --- who may ask ---------------------------------------------------------------------------------


def _guarded(app: ASGIApp, names: Collection[str], loopback_only: bool) -> ASGIApp:
    """Answer 403 to requests that do not come from the server's own page."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        wrong = _wrong(Headers(scope=scope), names, loopback_only)
        answer = JSONResponse({"error": wrong}, 403) if wrong else app
        await answer(scope, receive, send)

    return guarded


def _wrong(headers: Headers, names: Collection[str], loopback_only: bool) -> str:
    """Say what is wrong with where a request comes from, "" for nothing.

    A site can let its name point to this machine (DNS rebinding); then the Host header tells the
    name. An address as host cannot be a rebound name. A site can post a form here; then Origin or
    Sec-Fetch-Site tells it. (Starlette's TrustedHostMiddleware has no word for "any address".)
    """
    host = headers.get("host", "").strip().lower()
    found = _HOST.fullmatch(host)
    name = (found[1] or found[2]) if found else ""
    if not (name in names or is_own(name, loopback_only)):
        return f"This server is not known by the name {name or 'that is given'}. {_PROXY}"
    origin = headers.get("origin", f"http://{host}").lower()
    if origin not in (f"http://{host}", f"https://{host}"):
        return f"Requests of other sites are not answered. {_PROXY}"
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return "Requests of other sites are not answered."
    return ""


def is_own(host: str, loopback_only: bool = True) -> bool:
    """Whether a name or address is this machine's own, that no other machine reaches.

    Without `loopback_only` every address is.
    """
    try:
        return ipaddress.ip_address(host).is_loopback or not loopback_only
    except ValueError:  # a name
        return host == "localhost"


# --- connections ---------------------------------------------------------------------------------


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

    def __init__(self, app: ASGIApp, worker: Worker) -> None:
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
