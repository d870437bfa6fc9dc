"""Addresses and URLs of MQTT servers: parsed, and written. Pure, so that settings can be checked before
anything starts. The broker and the device side use the same functions.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

Version = Literal["5", "3.1.1"]
FORM = "an MQTT server's URL is mqtt or mqtts, then ://host"
ENCODED = (
    "in the user and the password of a URL, each character other than a letter, a digit and -._~ must be "
    "percent-encoded, such as # as %23, @ as %40, / as %2F and % as %25"
)
# User and password in a URL. The delimiters of a URL are not allowed (RFC 3986, section 3.2.1).
LOGIN = re.compile(r"(?:[^/?#\[\]@%\\]|%[0-9A-Fa-f]{2})*")
SPACE = re.compile(r"[\s\x00-\x20\x7f]")


class Address(NamedTuple):
    """The parts of a server's URL. `shown`: the URL without user and password, for logs."""

    host: str
    port: int
    tls: bool
    username: str | None
    password: str | None
    version: Version | None
    shown: str


def parse_url(url: str) -> Address:
    """Parses `mqtt://` or `mqtts://`, user and password, host, port, and `?v=5` or `?v=3.1.1`.

    User, password, port and version are optional.

    Raises:
        ValueError: names the fault and never contains a password.
    """
    if SPACE.search(url):  # urlsplit would remove it
        raise ValueError(f"an MQTT server's URL has no spaces and no control characters; {ENCODED}")
    scheme, _, rest = url.partition("://")
    login, at, _ = rest.rpartition("@")
    if at and scheme in ("mqtt", "mqtts") and not LOGIN.fullmatch(login):
        raise ValueError(ENCODED)
    if "#" in url:
        raise ValueError(f"an MQTT server's URL has no fragment; {ENCODED}")
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:  # its text could contain part of the password
        raise ValueError(FORM) from None
    tls = parts.scheme == "mqtts"
    if parts.scheme not in ("mqtt", "mqtts") or not host or not is_host(host):
        raise ValueError(FORM)
    try:
        port = parts.port or (8883 if tls else 1883)
    except ValueError:
        # urlsplit's error quotes the port. If the password contains a slash, that is part of the password.
        raise ValueError("the port of an MQTT server's URL is not a number up to 65535") from None
    options = parse_qs(parts.query)
    versions: dict[tuple[str, ...], Version | None] = {(): None, ("5",): "5", ("3.1.1",): "3.1.1"}
    asked = tuple(options.pop("v", ()))
    if options or asked not in versions or parts.path not in ("", "/"):
        raise ValueError("after host and port an MQTT server's URL can only have ?v=5 or ?v=3.1.1")
    return Address(
        host=host,
        port=port,
        tls=tls,
        username=None if parts.username is None else unquote(parts.username),
        password=None if parts.password is None else unquote(parts.password),
        version=versions[asked],
        shown=f"{parts.scheme}://{joined(host, port)}",
    )


class Endpoint(NamedTuple):
    """An address of our own MQTT server. As a text it is an URL, an IPv6 address in brackets."""

    host: str
    port: int
    tls: bool = False

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{joined(self.host, self.port)}"


def joined(host: str, port: int | None) -> str:
    """HOST:PORT, with an IPv6 address in brackets. Without a port only the host. The only place that joins
    them."""
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def parse_endpoint(text: str) -> Endpoint:
    """`HOST:PORT`, `mqtt://HOST:PORT` or `mqtts://HOST:PORT`; port 0 takes a free one.

    Raises:
        ValueError: it is not of that form.
    """
    scheme, found, rest = text.rpartition("://")
    place = parted(rest)
    if (scheme not in ("mqtt", "mqtts") if found else scheme) or place is None:
        raise ValueError("must be mqtt://HOST:PORT, mqtts://HOST:PORT or HOST:PORT, such as 127.0.0.1:1883")
    return Endpoint(*place, scheme == "mqtts")


def parted(text: str) -> tuple[str, int] | None:
    """Host and port of `HOST:PORT`, with an IPv6 address in brackets; None if it is not of that form."""
    host, colon, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    number = int(port) if port.isascii() and port.isdecimal() and len(port) <= 5 else 65_536
    wrong = not colon or (":" in bare) is not (bare != host) or not is_host(bare) or number > 65_535
    return None if wrong else (bare, number)


def is_host(host: str) -> bool:
    """True if the name is valid for DNS: each label has 1 to 63 bytes."""
    try:
        return host.encode("idna") != b""
    except UnicodeError:
        return False
