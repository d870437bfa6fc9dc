"""TLS towards an MQTT server: whose certificates are trusted, and the client's own certificate."""

from __future__ import annotations

import ssl

Tls = ssl.SSLContext


def trust(ca: str = "", certificate: str = "", key: str = "") -> Tls:
    """A context for connections to a server. All arguments are paths of PEM files.

    `ca`: the authorities to trust; empty: those of the system. `certificate`: shown to the server; empty:
    none. `key`: its key; empty: it is in the same file.

    Raises:
        OSError: a file cannot be read, or holds no certificate; or the key is of another one or has a
            pass phrase.
    """
    context = ssl.create_default_context(cafile=ca or None)
    if certificate:
        # Without a callback OpenSSL would ask for the pass phrase of a key on the terminal.
        context.load_cert_chain(certificate, key or None, password=lambda: "")
    return context
