"""A minimal MQTT 3.1.1 client with QoS 1, for the benchmark's round trips and its devices.

It never resends, and ends with its connection. The product must not use it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import cast

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 0x10, 0x20, 0x30, 0x40, 0x82, 0x90
QOS_1, RETAIN = 0x02, 0x01
REFUSED = 0x80

Told = Callable[[bytes, bytes], None]


class Client(asyncio.Protocol):
    """One connection. `publish` only queues; `flush` writes the queue at once, and so does each read."""

    def __init__(self, on_message: Told) -> None:
        self._on_message = on_message
        self._transport: asyncio.WriteTransport | None = None
        self._rest = b""
        self._out: list[bytes] = []
        self._message_id = 0
        self._unacknowledged = 0
        self._answer: asyncio.Future[bytes] | None = None
        self._settled: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, port: int, client_id: str, on_message: Told) -> Client:
        """Connects to a server on this machine; returns when the server has accepted the connection."""
        client = cls(on_message)
        await client.enter(port, client_id)
        return client

    async def enter(
        self,
        port: int,
        name: str,
        *,
        password: str | None = "-",
        tls: ssl.SSLContext | None = None,
        clean: bool = True,
    ) -> None:
        """Connects; client id and user name are both `name`. `password`: None for no user at all. `clean`:
        false to have a session that the server keeps."""
        await asyncio.get_running_loop().create_connection(lambda: self, "127.0.0.1", port, ssl=tls)
        flags = (0 if password is None else 0xC0) | (0x02 if clean else 0)
        # Protocol level 4, no keep-alive, which a short benchmark does not need.
        body = _text(b"MQTT") + bytes((4, flags, 0, 0)) + _text(name.encode())
        if password is not None:
            body += _text(name.encode()) + _text(password.encode())
        if (await self._ask(CONNECT, body))[1]:  # the first byte says whether there was a session
            raise ConnectionError("the MQTT server refused the connection")

    async def subscribe(self, topics: Sequence[str]) -> None:
        """Subscribes to all topics with QoS 1."""
        wanted = b"".join(_text(topic.encode()) + b"\x01" for topic in topics)
        granted = await self._ask(SUBSCRIBE, self._next_id() + wanted)
        if any(code >= REFUSED for code in granted[2:]):
            raise ConnectionError("the MQTT server refused a subscription")

    def publish(self, topic: bytes, payload: bytes, *, retain: bool = False) -> None:
        first = PUBLISH | QOS_1 | (RETAIN if retain else 0)
        self._out.append(_packet(first, _text(topic) + self._next_id() + payload))
        self._unacknowledged += 1

    def flush(self) -> None:
        if self._out and self._transport is not None:
            self._transport.write(b"".join(self._out))
            self._out.clear()

    async def settled(self) -> None:
        """Returns when the PUBACKs of all messages published so far have arrived."""
        self.flush()
        if self._unacknowledged:
            self._settled = asyncio.get_running_loop().create_future()
            await self._settled

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # --- called by asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's class is not a subclass of it

    def connection_lost(self, error: Exception | None) -> None:
        for waiting in (self._answer, self._settled):
            if waiting is not None and not waiting.done():
                waiting.set_exception(error or ConnectionError("the MQTT server closed the connection"))

    def data_received(self, data: bytes) -> None:
        data = self._rest + data
        at, end = 0, len(data)
        while end - at >= 2:
            length, body, shift = data[at + 1] & 0x7F, at + 2, 7
            while data[body - 1] & 0x80 and body < end:
                length |= (data[body] & 0x7F) << shift
                body, shift = body + 1, shift + 7
            if data[body - 1] & 0x80 or body + length > end:
                break
            self._packet(data[at], data[body : body + length])
            at = body + length
        self._rest = data[at:]
        self.flush()

    def _packet(self, first: int, body: bytes) -> None:
        kind = first & 0xF0
        if kind == PUBLISH:
            payload_at = 2 + int.from_bytes(body[:2], "big")
            topic = body[2:payload_at]
            if first & QOS_1:
                self._out.append(b"\x40\x02" + body[payload_at : payload_at + 2])
                payload_at += 2
            self._on_message(topic, body[payload_at:])
        elif kind == PUBACK:
            self._unacknowledged -= 1
            if not self._unacknowledged and self._settled is not None and not self._settled.done():
                self._settled.set_result(None)
        elif kind in (CONNACK, SUBACK) and self._answer is not None:
            self._answer.set_result(body)

    async def _ask(self, first: int, body: bytes) -> bytes:
        self._answer = asyncio.get_running_loop().create_future()
        self._out.append(_packet(first, body))
        self.flush()
        try:
            return await self._answer
        finally:
            self._answer = None

    def _next_id(self) -> bytes:
        self._message_id = self._message_id % 65_535 + 1
        return self._message_id.to_bytes(2, "big")


def _text(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def _packet(first: int, body: bytes) -> bytes:
    length, digits = len(body), bytearray()
    while length > 0x7F:
        digits.append(length & 0x7F | 0x80)
        length >>= 7
    digits.append(length)
    return bytes((first, *digits)) + body
