"""A minimal MQTT 3.1.1 client for one simulated device: QoS 1 in both directions, a last will, pings.

It parses bytes and calls its owner. aiomqtt would need a task, queues and a paho client for each of thousands
of devices. This client does not detect a lost connection by itself: its owner must call `ping`.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

KEEPALIVE_SEC = 60
LATE_SEC = 0.05
MAX_PACKET_BYTES = 262_144
BAD_CREDENTIALS = (4, 5)

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 0x10, 0x20, 0x30, 0x40, 0x82, 0x90
PINGREQ, PINGRESP, DISCONNECT = 0xC0, 0xD0, 0xE0
RETAINED, AT_LEAST_ONCE = 0x01, 0x02


class Refused(Exception):
    """The MQTT server refused the connection or the subscription. `code` is the server's reason."""

    def __init__(self, what: str, code: int) -> None:
        self.code = code
        super().__init__(f"the MQTT server refused {what} (code {code})")


class Owner(Protocol):
    """The owner of a connection. Its methods are called from the event loop and must never raise."""

    def up(self, connection: Connection) -> None:
        """The connection is open and subscribed or, with `subscribes_late`, about to subscribe."""
        ...

    def message(self, connection: Connection, topic: str, payload: bytes, number: int) -> None:
        """A message arrived. Pass `number` to `puback`; it is 0 for QoS 0, which needs no PUBACK."""
        ...

    def pubacked(self, connection: Connection, number: int) -> None: ...

    def down(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One connection of one device, from CONNECT to its end, with a clean session.

    `ready` completes when the subscription is granted, or fails with the reason. `lost` completes when the
    connection ends.
    """

    def __init__(
        self,
        owner: Owner,
        name: str,
        token: str,
        topics: list[str],
        will_topic: str,
        will: bytes,
        *,
        subscribes_late: bool = False,
    ) -> None:
        """`subscribes_late`: the owner speaks first, and the subscription follows `LATE_SEC` later."""
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.lost: asyncio.Future[None] = loop.create_future()
        self._owner = owner
        # Clean session, will with QoS 1 and retained, user name, password.
        about = text(b"MQTT") + bytes([4, 0b11101110]) + KEEPALIVE_SEC.to_bytes(2)
        user = text(name.encode())
        self._connect = packet(
            CONNECT, about + user + text(will_topic.encode()) + text(will) + user + text(token.encode())
        )
        self._subscribe = packet(
            SUBSCRIBE, (1).to_bytes(2) + b"".join(text(topic.encode()) + b"\x01" for topic in topics)
        )
        self._buffer = bytearray()
        self.subscribes_late = subscribes_late
        self._number = 1
        self._pinged = False
        self._over = False
        self._transport: asyncio.Transport | None = None

    # --- called by the owner ---

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Publishes with QoS 1. Returns the packet id, which the PUBACK repeats."""
        self._number = self._number % 65_535 + 1
        flags = AT_LEAST_ONCE | (RETAINED if retain else 0)
        self._write(packet(PUBLISH | flags, text(topic.encode()) + self._number.to_bytes(2) + payload))
        return self._number

    def puback(self, number: int) -> None:
        if number:
            self._write(packet(PUBACK, number.to_bytes(2)))

    def ping(self) -> None:
        """Sends PINGREQ. Breaks the connection if the previous PINGREQ was not answered."""
        if self._pinged:
            self.vanish()
        self._pinged = True
        self._write(packet(PINGREQ, b""))

    def leave(self) -> None:
        """Disconnects in order, so the server does not send the last will."""
        self._write(packet(DISCONNECT, b""))
        self._over = True
        if self._transport is not None:
            self._transport.close()

    def vanish(self) -> None:
        """Breaks the connection, like a power cut: unsent data is lost, the server sends the last will."""
        self._over = True
        if self._transport is not None:
            self._transport.abort()

    def give_up(self) -> None:
        """Cancels `ready` and breaks the connection."""
        self.ready.cancel()
        self.vanish()

    # --- called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._write(self._connect)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            while not self._over and (found := take(self._buffer)) is not None:
                self._handle(*found)
        except (ValueError, IndexError):  # not MQTT, or a truncated packet
            self.vanish()

    def connection_lost(self, error: Exception | None) -> None:
        self._over = True
        self._fail(ConnectionResetError(str(error or "the MQTT server ended the connection")))
        if not self.lost.done():
            self.lost.set_result(None)
        self._owner.down(self)

    def _handle(self, kind: int, body: bytes) -> None:
        if kind & 0xF0 == PUBLISH:
            end = 2 + int.from_bytes(body[:2])
            numbered = 2 if kind & 0x06 else 0
            number = int.from_bytes(body[end : end + numbered])
            self._owner.message(self, body[2:end].decode(), body[end + numbered :], number)
        elif kind == PUBACK:
            self._owner.pubacked(self, int.from_bytes(body[:2]))
        elif kind == PINGRESP:
            self._pinged = False
        elif kind == CONNACK and body[1] == 0:
            if self.subscribes_late:
                self._owner.up(self)
                asyncio.get_running_loop().call_later(LATE_SEC, self._write, self._subscribe)
            else:
                self._write(self._subscribe)
        elif kind == SUBACK and max(body[2:]) < 0x80:
            if not self.subscribes_late:
                self._owner.up(self)
            if not self.ready.done():
                self.ready.set_result(None)
        elif kind in (CONNACK, SUBACK):
            self._fail(Refused("the device" if kind == CONNACK else "its subscription", body[-1]))
            self.vanish()

    def _fail(self, why: Exception) -> None:
        if not self.ready.done():
            self.ready.set_exception(why)

    def _write(self, data: bytes) -> None:
        if not self._over and self._transport is not None:
            self._transport.write(data)


def text(data: bytes) -> bytes:
    """An MQTT string or binary field: two bytes of length, then the data."""
    return len(data).to_bytes(2) + data


def packet(kind: int, body: bytes) -> bytes:
    length = bytearray()
    left = len(body)
    while left > 127:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    return bytes([kind, *length, left]) + body


def take(buffer: bytearray) -> tuple[int, bytes] | None:
    """Removes the first packet from the buffer and returns it; None if it is not complete.

    Raises:
        ValueError: the packet is longer than MAX_PACKET_BYTES, or its length is malformed.
    """
    length = 0
    for place in range(1, min(len(buffer), 5)):
        length |= (buffer[place] & 0x7F) << 7 * (place - 1)
        if buffer[place] < 0x80:
            break
    else:
        if len(buffer) >= 5:
            raise ValueError("the length of a packet has more than four bytes")
        return None
    if length > MAX_PACKET_BYTES:
        raise ValueError(f"a packet of {length} bytes")
    end = place + 1 + length
    if len(buffer) < end:
        return None
    found = buffer[0], bytes(buffer[place + 1 : end])
    del buffer[:end]
    return found
