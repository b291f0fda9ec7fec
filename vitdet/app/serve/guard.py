"""Who may ask: no other web site by way of a visitor's browser, and no other machine unasked."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vitdet.app.serve.hosts import address_of, host_of

# The page runs its own files only, and reaches nothing but this server.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware that answers 403 to foreign requests and adds headers to every answer.

    A site can let its name point to this machine (DNS rebinding); then the Host header tells the
    name. An address as host cannot be a rebound name. A site can post a form here; then Origin or
    Sec-Fetch-Site tells it.

    Args:
        app: what is guarded.
        names: hosts by which it may be called besides "localhost" and addresses.
        loopback_only: whether of the addresses only loopback ones count.
    """

    def __init__(self, app: ASGIApp, *, names: Collection[str], loopback_only: bool) -> None:
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return  # there are no web sockets
        headers = Headers(scope=scope)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        wrong = self._wrong(headers)
        if wrong:
            await JSONResponse({"error": wrong}, 403)(scope, receive, sending)
        else:
            await self._app(scope, receive, sending)

    def _wrong(self, headers: Headers) -> str:
        """Say what is wrong with where a request comes from, "" for nothing."""
        host = headers.get("host", "")
        if not self._is_mine(host_of(host)):
            return "This server is not known by that name."
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            return "Requests of other sites are not answered."
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "Requests of other sites are not answered."
        return ""

    def _is_mine(self, host: str) -> bool:
        if host in self._names:
            return True
        address = address_of(host)
        return address is not None and (address.is_loopback or not self._loopback_only)
