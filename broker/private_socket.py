"""The private socket of a running broker: where it lies, and an HTTP client for it that costs little to load.

The broker listens on a Unix socket in its data directory; only the owner of the directory can reach it. The
command line asks through it. Its start must be quick, so this module imports no event loop and no HTTP
library beyond Python's own.
"""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

SOCKET = "ordain.sock"
TIMEOUT_SEC = 30.0


@contextmanager
def socket_path(directory: Path) -> Iterator[str]:
    """A path of the socket within the system's limit of 108 bytes, also if the directory's path is long."""
    full = str(directory / SOCKET)
    if len(os.fsencode(full)) < 100:
        yield full
        return
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{handle}/{SOCKET}"
    finally:
        os.close(handle)


def listen(directory: Path) -> socket.socket:
    """Opens a listening socket that only the owner of the data directory can use."""
    with socket_path(directory) as path:
        Path(path).unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            listening.bind(path)
        finally:
            os.umask(before)
        listening.listen(64)
    return listening


def answers(directory: Path) -> bool:
    """True if a broker serves this directory."""
    if not (directory / SOCKET).exists():
        return False
    with socket_path(directory) as path, socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


class Answer(NamedTuple):
    """What the broker answered to one request."""

    status_code: int
    body: bytes

    @property
    def is_error(self) -> bool:
        return self.status_code >= 400

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class SocketClient:
    """Asks the broker of one data directory, a connection for each request. It blocks while it waits.

    `request` has the shape of `httpx2.AsyncClient.request`, so that the same code asks through either.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def request(self, method: str, url: str, *, json: Any = None) -> Answer:
        """Raises OSError: no broker answers, or it went away in between."""
        body = None if json is None else msgspec.json.encode(json)
        headers = {} if body is None else {"Content-Type": "application/json"}
        with closing(_Connection(self._directory)) as connection:
            try:
                connection.request(method, url, body, headers)
                response = connection.getresponse()
                return Answer(response.status, response.read())
            except http.client.HTTPException as error:
                raise ConnectionError(f"the broker ended before its answer was complete: {error}") from error


class _Connection(http.client.HTTPConnection):
    def __init__(self, directory: Path) -> None:
        super().__init__("ordain", timeout=TIMEOUT_SEC)
        self._directory = directory

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_SEC)
        with socket_path(self._directory) as path:
            self.sock.connect(path)
