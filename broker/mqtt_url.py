"""Parses the URL of an MQTT server. Pure, so that settings can be checked before anything starts."""

from __future__ import annotations

from typing import Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

Version = Literal["5", "3.1.1"]
FORM = "an MQTT server's URL is mqtt or mqtts, then ://host"


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


class Endpoint(NamedTuple):
    """An address of our own MQTT server. As a text it is an URL, an IPv6 address in brackets."""

    host: str
    port: int
    tls: bool = False

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{joined(self.host, self.port)}"


def joined(host: str, port: int) -> str:
    """HOST:PORT, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def parse_endpoint(text: str) -> Endpoint:
    """`HOST:PORT`, `mqtt://HOST:PORT` or `mqtts://HOST:PORT`; port 0 takes a free one.

    Raises:
        ValueError: it is not of that form.
    """
    scheme, found, rest = text.rpartition("://")
    host, colon, port = rest.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if (
        (scheme not in ("mqtt", "mqtts") if found else scheme)
        or not colon
        or (":" in bare) is not (bare != host)
        or not is_host(bare)
        or not port.isascii()
        or not port.isdecimal()
        or int(port) > 65_535
    ):
        raise ValueError("must be mqtt://HOST:PORT, mqtts://HOST:PORT or HOST:PORT, such as 127.0.0.1:1883")
    return Endpoint(bare, int(port), scheme == "mqtts")


def is_host(host: str) -> bool:
    """True if the name is valid for DNS: each label has 1 to 63 bytes."""
    try:
        return host.encode("idna") != b""
    except UnicodeError:
        return False
