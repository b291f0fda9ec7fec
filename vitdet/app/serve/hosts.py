"""Names and addresses of this machine."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own, that no other machine reaches."""
    if host == "localhost":
        return True
    found = address_of(host)
    return found is not None and found.is_loopback


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address that a text writes out, None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def host_of(header: str) -> str:
    """Return the name in a Host header, without port and brackets, in small letters."""
    header = header.strip().lower()
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
