"""Certificates of our own doors: MQTT and HTTP with TLS 1.2 or 1.3, read again when their files change.

A connection that is open keeps what it began with. A broken new file changes nothing but a line in the log.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Literal

import structlog

logger = structlog.get_logger()


class Certificates:
    """One certificate and key; `client_ca` is whose client certificates are believed, if there are any.

    Raises:
        OSError: a file cannot be read.
        ssl.SSLError: it holds no certificate, or the key is of another.
    """

    def __init__(self, certificate: str, key: str, client_ca: str = "") -> None:
        self._certificate = certificate
        self._key = key or certificate
        self._client_ca = client_ca
        self._contexts = [self._context([]), self._context(["mqtt"])]
        self._stamp = self._stamps()

    @property
    def for_http(self) -> ssl.SSLContext:
        return self._contexts[0]

    @property
    def for_mqtt(self) -> ssl.SSLContext:
        return self._contexts[1]

    def look(self, *, again: bool = False) -> None:
        """Reads the files again if they have changed, or in any case."""
        stamps = self._stamps()
        if stamps == self._stamp and not again:
            return
        self._stamp = stamps
        try:
            self._context(["mqtt"])  # a half-written pair must not reach the contexts in use
            for context in self._contexts:
                context.load_cert_chain(self._certificate, self._key)
                if self._client_ca:
                    context.load_verify_locations(self._client_ca)
        except (OSError, ssl.SSLError) as error:
            logger.error("tls.not_reloaded", certificate=self._certificate, why=str(error))
        else:
            logger.info("tls.reloaded", certificate=self._certificate)

    def _context(self, alpn: list[str]) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._certificate, self._key)
        if alpn:
            context.set_alpn_protocols(alpn)
            if self._client_ca:
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_OPTIONAL
        return context

    def _stamps(self) -> list[tuple[int, int] | None]:
        found = []
        for name in (self._certificate, self._key, self._client_ca):
            try:
                stat = Path(name).stat() if name else None
            except OSError:
                stat = None
            found.append(None if stat is None else (stat.st_mtime_ns, stat.st_ino))
        return found


def identity(certificate: dict[str, Any] | None, field: Literal["cn", "san"]) -> str | None:
    """Whom a verified client certificate names: its common name, or its first DNS name. None: nobody."""
    if not certificate:
        return None
    if field == "san":
        names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    else:
        parts = [pair for each in certificate.get("subject", ()) for pair in each]
        names = [value for name, value in parts if name == "commonName"]
    return names[0] if names else None
