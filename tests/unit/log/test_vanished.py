"""The socket options that end a connection to a machine that has vanished."""

from __future__ import annotations

import socket
import sys

import pytest

from broker.log.postgresql.vanished import options
from broker.serving.listening import UNREAD_SEC, VANISHED_SEC, bound


@pytest.mark.parametrize("within_sec", [1, 5, 8, 30])
def test_the_system_takes_the_options_for_every_time(within_sec: int) -> None:
    with socket.socket() as there:
        for level, name, value in options(within_sec):
            there.setsockopt(level, name, value)
            assert there.getsockopt(level, name)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no TCP_USER_TIMEOUT")
def test_an_http_client_that_reads_nothing_has_more_time_than_one_that_has_vanished() -> None:
    with bound("listen", "127.0.0.1:0") as server, socket.create_connection(server.getsockname()):
        taken, _ = server.accept()
        with taken:
            assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == VANISHED_SEC // 2
            assert taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNREAD_SEC * 1_000
