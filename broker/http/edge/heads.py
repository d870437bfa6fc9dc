"""Strict reading of request heads. Pure.

A proxy in front of the broker and the broker must agree where each request ends. If they do not, a stranger
can hide a request in the body of another, and it runs with the next client's key (request smuggling).
Therefore whatever RFC 9112 lets two readers understand differently is refused, and the connection closes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Literal

Network = IPv4Network | IPv6Network
Headers = list[tuple[bytes, bytes]]  # names in lower case
Fault = tuple[Literal[400, 408, 414, 415, 431], str, str]  # status, error code, message

MOST_HOPS = 16  # proxies behind each other
WEBSOCKET_PATH = b"/mqtt"
# A name, an IPv4 address or an IPv6 address in brackets, and perhaps a port.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+,;=%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")


def fault_of(version: str, method: bytes, target: bytes, headers: Headers) -> Fault | None:
    """What is wrong with a head, or None. `target`: the request target as it was sent."""
    hosts = _values(headers, b"host")
    coded = _values(headers, b"transfer-encoding")
    path = target.partition(b"?")[0]
    if version not in ("1.0", "1.1"):
        return _wrong("the request line must end with HTTP/1.1")
    if method == b"CONNECT" or not target.startswith(b"/") or b"#" in target:
        return _wrong("the request target must be a path, such as /v1/commands")
    if b"//" in path or b"%2f" in path.lower():
        return _wrong("the path must not contain // or %2F")
    if len(hosts) > 1 or (version == "1.1" and not hosts):
        return _wrong("there must be exactly one Host header")
    if hosts and not _HOST.fullmatch(hosts[0]):
        return _wrong("the Host header must be HOST or HOST:PORT")
    if coded and (version == "1.0" or len(coded) > 1 or coded[0].lower() != b"chunked"):
        return _wrong("Transfer-Encoding must be chunked, once, and needs HTTP/1.1")
    if coded and _values(headers, b"content-length"):
        return _wrong("Transfer-Encoding and Content-Length must not be given together")
    if asks_to_upgrade(headers) and has_body(headers):
        return _wrong("a request with Upgrade must not have a body")
    if _values(headers, b"content-encoding"):
        return 415, "unsupported_media_type", "a body must be sent without Content-Encoding"
    return None


def forwarded_for(headers: Headers, trusted: Sequence[Network]) -> str | None:
    """The client's address that trusted proxies wrote into `X-Forwarded-For`: the last that is not theirs.

    None if there is none, or if a proxy wrote no address. Only what stands behind the last stranger can be
    believed: a client may send the header too, and proxies add to it.
    """
    hops = b",".join(_values(headers, b"x-forwarded-for")).decode("latin-1").split(",")
    for text in reversed(hops[-MOST_HOPS:]):
        if not is_of(text.strip(), trusted):
            try:
                return str(ip_address(text.strip()))
            except ValueError:
                return None
    return None


def is_of(text: str, networks: Sequence[Network]) -> bool:
    """Whether this is an address of one of the networks."""
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return any((mapped or found) in network for network in networks)


def asks_to_upgrade(headers: Headers) -> bool:
    """Whether the request asks for another protocol: `Upgrade`, and `Connection` names it.

    A proxy often sends `Connection: upgrade` alone with every request. Without `Upgrade` it asks for nothing.
    """
    if not _values(headers, b"upgrade"):
        return False
    named = b",".join(_values(headers, b"connection")).lower().split(b",")
    return b"upgrade" in (token.strip() for token in named)


def has_body(headers: Headers) -> bool:
    lengths = _values(headers, b"content-length")
    return bool(_values(headers, b"transfer-encoding")) or any(value.strip() != b"0" for value in lengths)


def is_websocket(version: str, method: bytes, target: bytes, headers: Headers) -> bool:
    """Whether a request without fault asks for a WebSocket, at exactly `WEBSOCKET_PATH` (RFC 6455, 4.2.1)."""
    return (
        (version, method, target) == ("1.1", b"GET", WEBSOCKET_PATH)
        and asks_to_upgrade(headers)
        and [value.lower() for value in _values(headers, b"upgrade")] == [b"websocket"]
    )


def _wrong(reason: str) -> Fault:
    return 400, "invalid_request", reason


def _values(headers: Headers, wanted: bytes) -> list[bytes]:
    return [value for name, value in headers if name == wanted]
