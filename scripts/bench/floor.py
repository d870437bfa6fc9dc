"""The smallest MQTT server that can do the round trip of part e: the lower bound for the listener.

It accepts every client, checks nothing, and remembers one topic per client. The product must not use it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

Said = Callable[["Floor", bytes], None]


class Floor(asyncio.Protocol):
    """One connection. `topic` is what the client subscribed to last; `said` is told each payload."""

    clients: list[Floor]

    def __init__(self, clients: list[Floor], said: Said) -> None:
        self._said = said
        self._all = clients
        self._rest = b""
        self._id = 0
        self.topic = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def send(self, payload: bytes) -> None:
        self._id = self._id % 65_535 + 1
        body = len(self.topic).to_bytes(2, "big") + self.topic + self._id.to_bytes(2, "big") + payload
        length = len(body)
        size = bytes((length,)) if length < 128 else bytes((length & 0x7F | 0x80, length >> 7))
        self._transport.write(b"\x32" + size + body)

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        at, end, out = 0, len(data), []
        while end - at >= 2:
            length, start = data[at + 1], at + 2
            if length > 127:
                if end - at < 3:
                    break
                length, start = length & 0x7F | data[at + 2] << 7, at + 3
            if start + length > end:
                break
            kind, body = data[at] & 0xF0, data[start : start + length]
            at = start + length
            if kind == 0x30:
                topic_end = 2 + int.from_bytes(body[:2], "big")
                out.append(b"\x40\x02" + body[topic_end : topic_end + 2])
                self._said(self, body[topic_end + 2 :])
            elif kind == 0x10:
                out.append(b"\x20\x02\x00\x00")
            elif kind == 0x80:
                self.topic = body[4 : 4 + int.from_bytes(body[2:4], "big")]
                out.append(b"\x90\x03" + body[:2] + b"\x01")
                self._all.append(self)
        self._rest = data[at:]
        if out:
            self._transport.write(b"".join(out))
