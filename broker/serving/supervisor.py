"""Tells the service manager how far the broker is, if one asked for it: systemd with `Type=notify`."""

from __future__ import annotations

import socket
from collections.abc import Mapping

READY, STOPPING = "READY=1", "STOPPING=1"


def notify(state: str, environment: Mapping[str, str]) -> bool:
    """Sends one datagram to NOTIFY_SOCKET; False if there is none. Source: sd_notify(3).

    An error of the socket is not raised: the broker is more important than the message about it.
    """
    place = environment.get("NOTIFY_SOCKET", "")
    if not place:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            # `@` stands for the zero byte that begins an abstract name.
            channel.connect("\0" + place[1:] if place.startswith("@") else place)
            channel.sendall(state.encode())
        except OSError:
            return False
    return True
