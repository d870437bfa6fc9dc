"""The little of MQTT 3.1.1 that one simulated device needs: QoS 1 both ways, a will, pings.

Bytes in, calls out. aiomqtt would cost each of thousands of devices a task, its queues and a paho client.
It must never be used where a lost connection has to be noticed by itself: its owner pings.
"""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

KEEPALIVE_SEC = 60
MAX_PACKET_BYTES = 262_144
BAD_CREDENTIALS = (4, 5)

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 0x10, 0x20, 0x30, 0x40, 0x82, 0x90
PINGREQ, PINGRESP, DISCONNECT = 0xC0, 0xD0, 0xE0
RETAINED, AT_LEAST_ONCE = 0x01, 0x02


class Refused(Exception):
    """The MQTT server did not let the device in, or not listen. `code` is its reason."""

    def __init__(self, what: str, code: int) -> None:
        self.code = code
        super().__init__(f"the MQTT server refused {what} (code {code})")


class Owner(Protocol):
    """Whose connection it is. Called from the event loop; must never raise."""

    def up(self, connection: Connection) -> None:
        """Connected and subscribed."""
        ...

    def message(self, connection: Connection, topic: str, payload: bytes, number: int) -> None:
        """`number` is for `puback`; 0 if there is nothing to acknowledge."""
        ...

    def pubacked(self, connection: Connection, number: int) -> None: ...

    def down(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """One connection of one device, from CONNECT to its end, with a clean session.

    `ready` ends when it is subscribed, or with why it is not; `lost` when the connection is gone.
    """

    def __init__(
        self, owner: Owner, name: str, token: str, topics: list[str], will_topic: str, will: bytes
    ) -> None:
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
        self._number = 1
        self._pinged = False
        self._over = False
        self._transport: asyncio.Transport | None = None

    # --- what the owner does ---

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """With QoS 1; gives the number that its PUBACK will have."""
        self._number = self._number % 65_535 + 1
        flags = AT_LEAST_ONCE | (RETAINED if retain else 0)
        self._write(packet(PUBLISH | flags, text(topic.encode()) + self._number.to_bytes(2) + payload))
        return self._number

    def puback(self, number: int) -> None:
        if number:
            self._write(packet(PUBACK, number.to_bytes(2)))

    def ping(self) -> None:
        """The connection ends if the one before was not answered."""
        if self._pinged:
            self.vanish()
        self._pinged = True
        self._write(packet(PINGREQ, b""))

    def leave(self) -> None:
        """In order: the server drops the will."""
        self._write(packet(DISCONNECT, b""))
        self._over = True
        if self._transport is not None:
            self._transport.close()

    def vanish(self) -> None:
        """As a device does whose power goes: what is unsent is lost, and the server sends the will."""
        self._over = True
        if self._transport is not None:
            self._transport.abort()

    def give_up(self) -> None:
        """Nobody waits for it any more."""
        self.ready.cancel()
        self.vanish()

    # --- what the loop does ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._write(self._connect)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            while not self._over and (found := take(self._buffer)) is not None:
                self._handle(*found)
        except (ValueError, IndexError):  # no MQTT, or not all of a packet that says it is whole
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
            self._write(self._subscribe)
        elif kind == SUBACK and max(body[2:]) < 0x80:
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
    """A string or binary field: its length, then itself."""
    return len(data).to_bytes(2) + data


def packet(kind: int, body: bytes) -> bytes:
    length = bytearray()
    left = len(body)
    while left > 127:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    return bytes([kind, *length, left]) + body


def take(buffer: bytearray) -> tuple[int, bytes] | None:
    """Takes the first packet off the buffer, if it is there as a whole.

    Raises:
        ValueError: it would be longer than anything that is sent to a device.
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
