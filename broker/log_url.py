"""The URL of a log that is in PostgreSQL: `postgresql://user@host/database`. It may hold a password."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

import msgspec


class Address(msgspec.Struct, frozen=True):
    """Where a log is. `shown`: the URL without its password, for people."""

    url: str
    shown: str
    password: str | None = None


def address(url: str, password: str | None = None) -> Address:
    """Checks a URL such as `postgresql://user@host/database`. `password` is used if the URL has none.

    Raises:
        ValueError: it is not of this form; the message does not repeat a password.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError("must be postgresql://USER@HOST/DATABASE")
    options = dict(parse_qsl(parts.query))
    user, _, hosts = parts.netloc.rpartition("@")
    hosts = hosts or options.get("host", "")
    if not hosts:
        raise ValueError("it names no host: must be postgresql://USER@HOST/DATABASE")
    if not parts.path.strip("/"):
        raise ValueError("it names no database: must be postgresql://USER@HOST/DATABASE")
    name, _, secret = user.partition(":")
    shown = f"{parts.scheme}://{name}{'@' if name else ''}{hosts}{parts.path}"
    return Address(url, shown, None if secret or "password" in options else password)
