"""MQTT packets from and to bytes: versions 3.1.1 and 5, both directions, all properties. Pure.

`decode` raises no exception but `BadPacket`, for any bytes. It checks one packet alone; the session checks
what is allowed at which moment. Source: OASIS MQTT 3.1.1 and 5.0, chapters 2 and 3.
"""

from __future__ import annotations

from typing import Any

from broker.mqtt import packets as p
from broker.mqtt.packets import BadPacket, Packet, Properties, Reason

# Bounds for the lists in one packet. A packet with a longer list is refused.
MOST_FILTERS, MOST_PROPERTIES = 100, 100
_NAMES = {number: (name, form, places) for name, (number, form, places) in p.PROPERTIES.items()}


class Splitter:
    """Cuts a stream into packets with at most `longest` bytes of body."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._data = bytearray()
        self._at = 0

    @property
    def waiting(self) -> int:
        """Bytes that `next` has not returned."""
        return len(self._data) - self._at

    def put(self, data: bytes) -> None:
        if self._at:
            del self._data[: self._at]
            self._at = 0
        self._data += data

    def next(self) -> tuple[int, bytes] | None:
        """The next whole packet: its first byte and its body. None if it has not arrived whole.

        Raises:
            BadPacket: its length field is invalid, or larger than `longest`.
        """
        data, at = self._data, self._at + 1
        end = len(data)
        if at >= end:
            return None
        length = data[at]
        if length > 0x7F:
            sized = _varint(data, at, min(end, at + 4))
            if sized is None:
                return None
            length, at = sized
        else:
            at += 1
        if length > self.longest:
            text = f"a packet of {length} bytes; at most {self.longest} are allowed"
            raise BadPacket(text, Reason.TOO_LARGE)
        if at + length > end:
            return None
        first = data[self._at]
        self._at = at + length
        return first, bytes(data[at : self._at])


def decode(first: int, body: bytes, version: int) -> Packet:
    """Decodes one packet. `version` is 4 (MQTT 3.1.1) or 5; a CONNECT contains its own version.

    Raises:
        BadPacket: this version of the protocol does not allow these bytes.
    """
    kind, flags, five = first >> 4, first & 0x0F, version == 5
    if kind == p.PUBLISH:
        return _publish(flags, body, five)
    if flags != (2 if kind in (p.PUBREL, p.SUBSCRIBE, p.UNSUBSCRIBE) else 0):
        raise BadPacket(f"flags {flags:#03x} in a packet of type {kind}")
    if kind == p.PUBACK and len(body) == 2 and body != b"\0\0":
        return p.Ack(kind, int.from_bytes(body, "big"))
    reader = _Reader(body, five)
    if p.PUBACK <= kind <= p.PUBCOMP:
        packet: Packet = p.Ack(kind, reader.packet_id(), *reader.reason_and_properties(kind))
    elif kind in (p.PINGREQ, p.PINGRESP):
        packet = p.Ping(kind)
    elif kind == p.CONNECT:
        packet = _connect(reader)
    elif kind == p.SUBSCRIBE:
        mid, properties = reader.packet_id(), reader.properties(kind)
        packet = p.Subscribe(mid, _filters(reader, kind), properties)
    elif kind == p.UNSUBSCRIBE:
        mid, properties = reader.packet_id(), reader.properties(kind)
        packet = p.Unsubscribe(mid, _filters(reader, kind), properties)
    elif kind == p.DISCONNECT or (kind == p.AUTH and five):
        packet = p.Goodbye(kind, *reader.reason_and_properties(kind))
    elif kind == p.CONNACK:
        present, reason = reader.byte(), reader.byte()
        if present > 1:
            raise BadPacket(f"acknowledge flags {present:#04x}")
        packet = p.Connack(reason, bool(present), reader.properties(kind))
    elif kind in (p.SUBACK, p.UNSUBACK):
        mid, properties = reader.packet_id(), reader.properties(kind)
        packet = p.Granted(kind, mid, list(reader.rest()), properties)
    else:
        raise BadPacket(f"a packet of type {kind}")
    if reader.at != len(body):
        raise BadPacket(f"{len(body) - reader.at} bytes too many in a packet of type {kind}")
    return packet


def _publish(flags: int, body: bytes, five: bool) -> p.Publish:
    qos = flags >> 1 & 3
    at = 2 + int.from_bytes(body[:2], "big")
    topic, mid = _decoded(body[2:at]), 0
    if qos:
        mid = int.from_bytes(body[at : at + 2], "big")
        at += 2
        if not mid:
            raise BadPacket("packet id 0", Reason.PROTOCOL_ERROR)
    if at > len(body) or qos > 2 or (flags & 8 and not qos):
        raise BadPacket(f"a PUBLISH with flags {flags:#03x} and {len(body)} bytes")
    properties: Properties = {}
    if five:
        if body[at : at + 1] == b"\x00":
            at += 1
        else:
            reader = _Reader(body, five, at)
            properties, at = reader.properties(p.PUBLISH), reader.at
    if "+" in topic or "#" in topic or not (topic or "alias" in properties):
        reason = Reason.BAD_TOPIC if topic else Reason.PROTOCOL_ERROR
        raise BadPacket(f"topic {topic[:64]!r} in a PUBLISH", reason)
    return p.Publish(topic, body[at:], qos, mid, flags & 8 != 0, flags & 1 != 0, properties)


def _connect(reader: _Reader) -> p.Connect:
    name, version, flags = reader.text(), reader.byte(), reader.byte()
    if (name, version) not in (("MQTT", 4), ("MQTT", 5)):
        reason = Reason.WRONG_VERSION if name in ("MQTT", "MQIsdp") else Reason.MALFORMED
        raise BadPacket(f"protocol {name[:16]!r} version {version}", reason)
    reader.five = version == 5
    willing, qos = bool(flags & 4), flags >> 3 & 3
    if flags & 1 or qos > 2 or (not willing and flags & 0x38):
        raise BadPacket(f"connect flags {flags:#04x}")
    if flags & 0x40 and not flags & 0x80 and version == 4:
        raise BadPacket("a password without a user name")
    keepalive, properties = reader.number(2), reader.properties(p.CONNECT)
    packet = p.Connect(client_id=reader.text(), version=version, clean=bool(flags & 2), keepalive=keepalive)
    packet.properties = properties
    if willing:
        placed = reader.properties(p.WILL)
        will = p.Will(topic=reader.text(), payload=reader.binary(), qos=qos, retain=bool(flags & 0x20))
        will.properties = placed
        if not will.topic or "+" in will.topic or "#" in will.topic:
            raise BadPacket(f"topic {will.topic[:64]!r} of a will")
        packet.will = will
    packet.user = reader.text() if flags & 0x80 else None
    packet.password = reader.binary() if flags & 0x40 else None
    return packet


def _filters(reader: _Reader, kind: int) -> list[Any]:
    """The list of a SUBSCRIBE (filters with options) or of an UNSUBSCRIBE (filters only)."""
    found: list[Any] = []
    while reader.at < len(reader.data):
        topic = reader.text()
        if len(found) == MOST_FILTERS or not topic:
            raise BadPacket(f"more than {MOST_FILTERS} filters, or an empty one", Reason.TOO_LARGE)
        if kind == p.UNSUBSCRIBE:
            found.append(topic)
            continue
        options = reader.byte()
        qos, handling = options & 3, options >> 4 & 3
        if qos > 2 or handling > 2 or options & (0xC0 if reader.five else 0xFC):
            raise BadPacket(f"subscription options {options:#04x}", Reason.PROTOCOL_ERROR)
        found.append(p.Filter(topic, qos, bool(options & 4), bool(options & 8), handling))
    if not found:
        raise BadPacket("no filter", Reason.PROTOCOL_ERROR)
    return found


class _Reader:
    """Reads one body from `at` on. Every method raises `BadPacket` if the bytes end too early."""

    def __init__(self, data: bytes, five: bool, at: int = 0) -> None:
        self.data = data
        self.five = five
        self.at = at

    def take(self, size: int) -> bytes:
        taken = self.data[self.at : self.at + size]
        if len(taken) != size:
            raise BadPacket("a packet that ends too early")
        self.at += size
        return taken

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def packet_id(self) -> int:
        mid = self.number(2)
        if not mid:
            raise BadPacket("packet id 0", Reason.PROTOCOL_ERROR)
        return mid

    def binary(self) -> bytes:
        return self.take(self.number(2))

    def text(self) -> str:
        return _decoded(self.binary())

    def varint(self) -> int:
        sized = _varint(self.data, self.at, min(len(self.data), self.at + 4))
        if sized is None:
            raise BadPacket("a length that ends too early")
        value, self.at = sized
        return value

    def reason_and_properties(self, kind: int) -> tuple[int, Properties]:
        """The end of acknowledgements, DISCONNECT and AUTH. If both are left out, it means success."""
        if not self.five or self.at == len(self.data):
            return 0, {}
        reason = self.byte()
        return reason, {} if self.at == len(self.data) else self.properties(kind)

    def properties(self, place: int) -> Properties:
        found: Properties = {}
        if not self.five:
            return found
        length = self.varint()
        end, count = self.at + length, 0
        if end > len(self.data):
            raise BadPacket("properties that end after their packet")
        while self.at < end:
            count += 1
            kind = self.byte()
            name, form, places = _NAMES.get(kind, ("", 0, ()))
            if place not in places or count > MOST_PROPERTIES:
                raise BadPacket(f"property {kind:#04x} in a packet of type {place}, number {count}")
            value = self._value(form)
            if (form == 1 and value > 1) or (value == 0 and name in p.NOT_ZERO):
                reason = Reason.BAD_ALIAS if name == "alias" else Reason.PROTOCOL_ERROR
                raise BadPacket(f"property {name} with {value}", reason)
            if name in p.REPEATED:
                found.setdefault(name, []).append(value)
            elif name in found:
                raise BadPacket(f"property {name} twice", Reason.PROTOCOL_ERROR)
            else:
                found[name] = value
        if self.at != end:
            raise BadPacket("a property that ends after the others")
        return found

    def _value(self, form: int | str) -> Any:
        if isinstance(form, int):
            return self.number(form)
        if form == "text":
            return self.text()
        if form == "bytes":
            return self.binary()
        return self.varint() if form == "varint" else (self.text(), self.text())


def _decoded(text: bytes) -> str:
    try:
        found = text.decode()
    except UnicodeDecodeError:
        raise BadPacket("a text that is not UTF-8") from None
    if "\0" in found:
        raise BadPacket("a text with U+0000")
    return found


def _varint(data: bytes | bytearray, at: int, end: int) -> tuple[int, int] | None:
    """A number of one to four bytes, and the index after it. None if it is cut off."""
    value = shift = 0
    for each in range(at, end):
        value |= (data[each] & 0x7F) << shift
        shift += 7
        if data[each] < 0x80:
            return value, each + 1
    if shift == 28:
        raise BadPacket("a length of more than four bytes")
    return None


def encode(packet: Packet, version: int) -> bytes:
    """The bytes of a packet in this version. Fields that the version does not have are left out."""
    five = version == 5
    if isinstance(packet, p.Publish):
        return encode_publish(packet, five)
    if isinstance(packet, p.Ack):
        flags = 2 if packet.kind == p.PUBREL else 0
        head = packet.packet_id.to_bytes(2, "big")
        return _whole(
            packet.kind << 4 | flags, head + _tail(packet.kind, packet.reason, packet.properties, five)
        )
    if isinstance(packet, p.Ping):
        return bytes((packet.kind << 4, 0))
    if isinstance(packet, p.Goodbye):
        return _whole(packet.kind << 4, _tail(packet.kind, packet.reason, packet.properties, five))
    if isinstance(packet, p.Connack):
        head = bytes((packet.session_present, packet.reason))
        return _whole(p.CONNACK << 4, head + _packed(packet.properties, five))
    if isinstance(packet, p.Connect):
        return _encode_connect(packet)
    head = packet.packet_id.to_bytes(2, "big") + _packed(packet.properties, five)
    if isinstance(packet, p.Granted):
        return _whole(packet.kind << 4, head + bytes(packet.reasons))
    if isinstance(packet, p.Unsubscribe):
        return _whole(p.UNSUBSCRIBE << 4 | 2, head + b"".join(map(_text, packet.topics)))
    return _whole(p.SUBSCRIBE << 4 | 2, head + b"".join(map(_encode_filter, packet.filters)))


def encode_publish(packet: p.Publish, five: bool) -> bytes:
    topic = packet.topic.encode()
    first = p.PUBLISH << 4 | packet.dup << 3 | packet.qos << 1 | packet.retain
    head = len(topic).to_bytes(2, "big") + topic
    if packet.qos:
        head += packet.packet_id.to_bytes(2, "big")
    return _whole(first, head + _packed(packet.properties, five) + packet.payload)


def _encode_connect(packet: p.Connect) -> bytes:
    five, will = packet.version == 5, packet.will
    flags = packet.clean << 1 | (packet.user is not None) << 7 | (packet.password is not None) << 6
    if will is not None:
        flags |= 4 | will.qos << 3 | will.retain << 5
    parts = [_text("MQTT"), bytes((packet.version, flags)), packet.keepalive.to_bytes(2, "big")]
    parts += [_packed(packet.properties, five), _text(packet.client_id)]
    if will is not None:
        parts += [_packed(will.properties, five), _text(will.topic), _binary(will.payload)]
    if packet.user is not None:
        parts.append(_text(packet.user))
    if packet.password is not None:
        parts.append(_binary(packet.password))
    return _whole(p.CONNECT << 4, b"".join(parts))


def _encode_filter(each: p.Filter) -> bytes:
    options = each.qos | each.no_local << 2 | each.retain_as_published << 3 | each.retain_handling << 4
    return _text(each.topic) + bytes((options,))


def _tail(kind: int, reason: int, properties: Properties, five: bool) -> bytes:
    if not five or not (reason or properties):
        return b""
    return bytes((reason,)) + (_packed(properties, five) if properties else b"")


def _packed(properties: Properties, five: bool) -> bytes:
    if not five:
        return b""
    if not properties:
        return b"\x00"
    parts = []
    for name, value in properties.items():
        number, form, _ = p.PROPERTIES[name]
        for each in value if name in p.REPEATED else (value,):
            parts.append(bytes((number,)) + _write(form, each))
    packed = b"".join(parts)
    return varint(len(packed)) + packed


def _write(form: int | str, value: Any) -> bytes:
    if isinstance(form, int):
        return int(value).to_bytes(form, "big")
    if form == "text":
        return _text(value)
    if form == "bytes":
        return _binary(value)
    return varint(value) if form == "varint" else _text(value[0]) + _text(value[1])


def _whole(first: int, body: bytes) -> bytes:
    return bytes((first,)) + varint(len(body)) + body


def _text(value: str) -> bytes:
    return _binary(value.encode())


def _binary(value: bytes) -> bytes:
    return len(value).to_bytes(2, "big") + value


def varint(value: int) -> bytes:
    """A number up to 268,435,455 in one to four bytes."""
    if value < 0x80:
        return bytes((value,))
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
