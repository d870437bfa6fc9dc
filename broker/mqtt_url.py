"""The URL of an MQTT server, taken apart. Pure, so that settings can be checked before anything runs."""

from __future__ import annotations

from typing import Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

Version = Literal["5", "3.1.1"]
FORM = "an MQTT server's URL is mqtt or mqtts, then ://host"


class Address(NamedTuple):
    """A server's URL, taken apart. `shown` is the URL without user and password: for logs."""

    host: str
    port: int
    tls: bool
    username: str | None
    password: str | None
    version: Version | None
    shown: str


def parse_url(url: str) -> Address:
    """`mqtt` or `mqtts`, user and password, host, port and `?v=5` or `?v=3.1.1`, all but the host optional.

    Raises:
        ValueError: says what is wrong, without repeating a password.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:  # it may quote what it could not read
        raise ValueError(FORM) from None
    tls = parts.scheme == "mqtts"
    if parts.scheme not in ("mqtt", "mqtts") or not host or not is_host(host):
        raise ValueError(FORM)
    try:
        port = parts.port or (8883 if tls else 1883)
    except ValueError:
        # urlsplit would quote what it took for the port: part of a password with a slash in it.
        raise ValueError("the port of an MQTT server's URL is not a number up to 65535") from None
    options = parse_qs(parts.query)
    versions: dict[tuple[str, ...], Version | None] = {(): None, ("5",): "5", ("3.1.1",): "3.1.1"}
    asked = tuple(options.pop("v", ()))
    if options or asked not in versions or parts.path not in ("", "/"):
        raise ValueError("after the host an MQTT server's URL may say ?v=5 or ?v=3.1.1 and nothing else")
    name = f"[{host}]" if ":" in host else host
    return Address(
        host=host,
        port=port,
        tls=tls,
        username=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
        version=versions[asked],
        shown=f"{parts.scheme}://{name}:{port}",
    )


def is_host(host: str) -> bool:
    """Can it be looked up at all? A part of a name is at most 63 bytes, and not empty."""
    try:
        return host.encode("idna") != b""
    except UnicodeError:
        return False
