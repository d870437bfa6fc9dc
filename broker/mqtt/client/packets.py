"""The MQTT packets that every command needs, as bytes: PUBLISH and its acknowledgements, 3.1.1 and 5.

Pure. It cuts a stream into packets and raises nothing but `BadPacket`, whatever the bytes are; what
the other packets mean is not its business.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from struct import Struct
from typing import Any

from broker.seams import Message, Outgoing

PUBLISH, PUBACK = 0x30, 0x40
QOS_1, DUP, RETAIN = 0x02, 0x08, 0x01
_USUAL, _RETAINED = bytes((PUBLISH | QOS_1,)), bytes((PUBLISH | QOS_1 | RETAIN,))
_two = Struct(">H").pack
# What acknowledges a PUBLISH of this QoS. After PUBREC a QoS 2 message does not come again.
_ACKNOWLEDGE = {1: b"\x40\x02", 2: b"\x50\x02"}
# An answer with the largest payload allowed fits four times over. Of a longer PUBLISH only the beginning is
# kept: dropping the connection instead would make the server send it again, for ever.
LONGEST = 262_144

EXPIRY, RESPONSE_TOPIC, CORRELATION, SUBSCRIPTION, USER = 0x02, 0x08, 0x09, 0x0B, 0x26
_CONTENT_TYPE = 0x03
_FIXED = {0x01: 1, EXPIRY: 4, 0x23: 2}  # payload format, expiry, topic alias

Packet = tuple[int, bytes]


class BadPacket(Exception):
    """The MQTT server sent what is no MQTT: nothing after it can be read."""


def publish_packet(mid: int, outgoing: Outgoing, *, five: bool) -> bytes:
    """QoS 1, sent for the first time."""
    topic, payload = outgoing.topic.encode(), outgoing.payload
    properties = _properties(outgoing) if five else b""
    length = _varint(4 + len(topic) + len(properties) + len(payload))
    first = _RETAINED if outgoing.retain else _USUAL
    return b"".join((first, length, _two(len(topic)), topic, _two(mid), properties, payload))


def acknowledgement(mid: int, qos: int) -> bytes:
    return _ACKNOWLEDGE[qos] + _two(mid)


def whole(first: int, body: bytes) -> bytes:
    """A packet as it is on the wire."""
    return bytes((first,)) + _varint(len(body)) + body


class Splitter:
    """Cuts what arrives into packets, each its first byte and its body; keeps the last unfinished one.

    The body of a PUBLISH longer than `LONGEST` ends one byte after that.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._cut: Packet | None = None
        self._skip = 0

    def feed(self, data: bytes) -> Iterator[Packet]:
        """The packets that are now complete.

        Raises:
            BadPacket: after the last good one; the connection cannot be used any more.
        """
        if self._cut is not None:
            data, self._skip = data[self._skip :], max(0, self._skip - len(data))
            if self._skip:
                return
            yield self._cut
            self._cut = None
        elif self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while end - at >= 2:
            sized = _length(data, at + 1)
            if sized is None:
                break
            length, body = sized
            if length > LONGEST:
                yield from self._too_long(data[at:], body - at, length)
                return
            if body + length > end:
                break
            yield data[at], data[body : body + length]
            at = body + length
        self._rest = data[at:]

    def _too_long(self, data: bytes, body: int, length: int) -> Iterator[Packet]:
        if data[0] & 0xF0 != PUBLISH:
            raise BadPacket(f"a packet of type {data[0]:#04x} with {length} bytes")
        kept = body + LONGEST + 1
        if len(data) < kept:
            self._rest = data
            return
        self._cut, self._skip, self._rest = (data[0], data[body:kept]), length - LONGEST - 1, b""
        yield from self.feed(data[kept:])


def read_publish(first: int, body: bytes, *, five: bool, owner: Any) -> Message:
    """The message of a PUBLISH; its token is (`owner`, packet id), or None at QoS 0.

    Raises:
        BadPacket: it is not what the protocol says.
    """
    qos = first >> 1 & 3
    topic_end = 2 + int.from_bytes(body[:2], "big")
    at = topic_end + 2 if qos else topic_end
    mid = int.from_bytes(body[topic_end:at], "big")
    # Without a topic it would have an alias, which we never allowed.
    if qos == 3 or at > len(body) or topic_end == 2 or (qos and not mid):
        raise BadPacket(f"a PUBLISH of QoS {qos}, packet id {mid}, with {len(body)} bytes")
    correlation = None
    # The properties of one that was cut count as payload: it is too large for anyone to read in any case.
    if five and len(body) <= LONGEST:
        correlation, at = _read_properties(body, at)
    return Message(
        topic=body[2:topic_end].decode(errors="replace"),
        payload=body[at:],
        qos=qos,
        dup=bool(first & DUP),
        retain=bool(first & RETAIN),
        correlation=correlation,
        token=(owner, mid) if qos else None,
    )


def read_puback(body: bytes, *, five: bool) -> tuple[int, int]:
    """(packet id, reason code); the reason is 0 where it is not said.

    Raises:
        BadPacket: it is not what the protocol says.
    """
    if len(body) < 2 or (len(body) > 2 and not five):
        raise BadPacket(f"a PUBACK with {len(body)} bytes")
    return int.from_bytes(body[:2], "big"), body[2] if len(body) > 2 else 0


def _read_properties(body: bytes, at: int) -> tuple[bytes | None, int]:
    """(correlation data, where the payload begins)."""
    sized = _length(body, at)
    if sized is None:
        raise BadPacket("a PUBLISH that ends before its properties")
    length, start = sized
    if start + length > len(body):
        raise BadPacket("properties that end after their packet")
    return _correlation(body[start : start + length]), start + length


def _correlation(properties: bytes) -> bytes | None:
    found, at = None, 0
    while at < len(properties):
        kind, at = properties[at], at + 1
        if kind in _FIXED:
            at += _FIXED[kind]
        elif kind in (_CONTENT_TYPE, RESPONSE_TOPIC, CORRELATION):
            start, at = at + 2, _text_end(properties, at)
            if kind == CORRELATION:
                found = properties[start:at]
        elif kind == USER:
            at = _text_end(properties, _text_end(properties, at))
        elif kind == SUBSCRIPTION and (sized := _length(properties, at)) is not None:
            at = sized[1]
        else:
            raise BadPacket(f"property {kind:#04x} in a PUBLISH")
    if at > len(properties):
        raise BadPacket("a property that ends after the others")
    return found


def _properties(outgoing: Outgoing) -> bytes:
    parts: list[bytes] = []
    if outgoing.expiry_sec is not None:
        parts.append(b"\x02" + outgoing.expiry_sec.to_bytes(4, "big"))
    if outgoing.response_topic is not None:
        parts.append(b"\x08" + _text(outgoing.response_topic.encode()))
    if outgoing.correlation is not None:
        parts.append(b"\x09" + _text(outgoing.correlation))
    for key, value in outgoing.user_properties:
        parts.append(b"\x26" + _text(key.encode()) + _text(value.encode()))
    if not parts:  # an event
        return b"\0"
    packed = b"".join(parts)
    return _varint(len(packed)) + packed


def _text(value: bytes) -> bytes:
    return _two(len(value)) + value


def _text_end(data: bytes, at: int) -> int:
    return at + 2 + int.from_bytes(data[at : at + 2], "big")


@lru_cache(1_024)
def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _length(data: bytes, at: int) -> tuple[int, int] | None:
    """(a length of one to four bytes, where it ends), or None if there is not enough to tell."""
    length = shift = 0
    for byte in data[at : at + 4]:
        length |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return length, at
    if shift == 28:
        raise BadPacket("a length of more than four bytes")
    return None
