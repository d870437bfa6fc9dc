"""The certificates for MQTT and HTTP with TLS 1.2 or 1.3, read again when their files change.

Open connections keep the certificate that they began with. If a new file cannot be used, the old ones stay in
use and the log says why.
"""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any, Literal

import structlog

logger = structlog.get_logger()


class Certificates:
    """One certificate and its key. `client_ca`: the file with the CAs whose certificates stand for an MQTT
    client, or empty. `https_client_ca`: those that must have signed the certificate of every HTTPS client.

    Raises:
        OSError: a file cannot be read.
        ssl.SSLError: a file has no certificate, or the key does not belong to it.
    """

    def __init__(self, certificate: str, key: str, client_ca: str = "", https_client_ca: str = "") -> None:
        self._certificate = certificate
        self._key = key or certificate
        self._client_ca = client_ca
        self.for_http = self._context()
        if https_client_ca:  # the HTTP server keeps its context: other CAs need a restart
            self.for_http.load_verify_locations(https_client_ca)
            self.for_http.verify_mode = ssl.CERT_REQUIRED
        self.for_mqtt = self._of_mqtt()  # another object after each change
        self._stamp = self._stamps()

    def look(self, *, again: bool = False) -> None:
        """Reads the files again if they have changed, or with `again` in any case."""
        stamps = self._stamps()
        if stamps == self._stamp and not again:
            return
        self._stamp = stamps
        try:
            # A new context, because a CA cannot be removed from one; and half-written files fail here.
            fresh = self._of_mqtt()
            self.for_http.load_cert_chain(self._certificate, self._key)  # the HTTP server keeps its context
            self.for_mqtt = fresh
        except (OSError, ssl.SSLError) as error:
            logger.error("tls.not_reloaded", certificate=self._certificate, why=str(error))
        else:
            logger.info("tls.reloaded", certificate=self._certificate)

    def _of_mqtt(self) -> ssl.SSLContext:
        context = self._context()
        context.set_alpn_protocols(["mqtt"])
        if self._client_ca:
            context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_OPTIONAL
        return context

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self._certificate, self._key)
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
    """The hardware id in a verified client certificate: its common name, or its first DNS name, or None."""
    if not certificate:
        return None
    if field == "san":
        names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    else:
        parts = [pair for each in certificate.get("subject", ()) for pair in each]
        names = [value for name, value in parts if name == "commonName"]
    return names[0] if names else None
