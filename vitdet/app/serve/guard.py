"""Who may ask: no other web site by way of a visitor's browser, and no other machine unasked."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]{1,5})?")
_BEHIND_A_PROXY = (
    "Behind a proxy, name its host by --host-name and pass the Host header on (nginx: "
    "proxy_set_header Host $http_host;)."
)


class Guard:
    """ASGI middleware that answers 403 to foreign requests and adds headers to every answer.

    A site can let its name point to this machine (DNS rebinding); then the Host header tells the
    name. An address as host cannot be a rebound name. A site can post a form here; then Origin or
    Sec-Fetch-Site tells it. (Starlette's TrustedHostMiddleware takes "localhost:1@evil.org" for
    localhost, and knows no IPv6.)

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

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        wrong = self._wrong(Headers(scope=scope))
        if wrong:
            await JSONResponse({"error": wrong}, 403)(scope, receive, sending)
        else:
            await self._app(scope, receive, sending)

    def _wrong(self, headers: Headers) -> str:
        """Say what is wrong with where a request comes from, "" for nothing."""
        host = headers.get("host", "").strip().lower()
        found = _HOST.fullmatch(host)
        if found is None or not self._is_mine(found[1] or found[2]):
            name = f"the name {found[1] or found[2]}" if found else "that name"
            return f"This server is not known by {name}. {_BEHIND_A_PROXY}"
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            return f"Requests of other sites are not answered. {_BEHIND_A_PROXY}"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "Requests of other sites are not answered."
        return ""

    def _is_mine(self, host: str) -> bool:
        if host in self._names:
            return True
        return is_loopback(host) if self._loopback_only else address_of(host) is not None


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, that no other machine reaches."""
    found = address_of(host)
    return host == "localhost" or (found is not None and found.is_loopback)


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a text writes out, None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
