"""Socket options by which the system notices that the machine at the other end has vanished.

Without them a connection to a machine without power, or behind a cut cable, stays open for 15 minutes and
more, and whatever waits for an answer on it waits as long. Connections to PostgreSQL, between nodes, and of
HTTP clients have them. macOS does not have all of them.
"""

from __future__ import annotations

import socket
from typing import Any

PROBES = 3


def options(within_sec: int, unread_sec: int | None = None) -> list[tuple[int, int, int]]:
    """What `setsockopt` takes. The connection ends when the other machine has not confirmed for so long what
    was sent. When nothing is under way, probes are sent, and must be confirmed too.

    `unread_sec`: another time for what is under way. It also ends a connection whose other side lives, but
    reads nothing for so long.
    """
    wanted = (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", max(1, within_sec // 2)),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", max(1, within_sec // 2 // PROBES)),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", PROBES),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", (unread_sec or within_sec) * 1_000),
    )
    return [(level, getattr(socket, name), value) for level, name, value in wanted if hasattr(socket, name)]


def watch(connection: Any, within_sec: int) -> None:
    """Sets these options on a socket, if it reaches another machine."""
    if connection.family != socket.AF_UNIX:
        for each in options(within_sec):
            connection.setsockopt(*each)
