"""MQTT packets from and to bytes: versions 3.1.1 and 5, both directions, all properties. Pure.

`decode` raises no exception but `BadPacket`, for any bytes. It checks one packet alone; the session checks
what is allowed at which moment. Source: OASIS MQTT 3.1.1 and 5.0, chapters 2 and 3.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from struct import Struct
from typing import Any

from broker.mqtt import packets as p
from broker.mqtt.packets import BadPacket, Packet, Properties, Reason

# Bounds for the lists in one packet. A packet with a longer list is refused.
MOST_FILTERS, MOST_PROPERTIES = 100, 100
_one, _two, _four = Struct("B").pack, Struct(">H").pack, Struct(">I").pack


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
        del self._data[: self._at]
        self._at = 0
        self._data += data

    def next(self) -> tuple[int, bytes] | None:
        """The next whole packet: its first byte and its body. None if it has not arrived whole.

        Raises:
            BadPacket: its length field is invalid, or larger than `longest`.
        """
        sized = _varint(self._data, self._at + 1)
        if sized is None:
            return None
        length, start = sized
        if length > self.longest:
            text = f"a packet of {length} bytes; at most {self.longest} are allowed"
            raise BadPacket(text, Reason.TOO_LARGE)
        if start + length > len(self._data):
            return None
        first, self._at = self._data[self._at], start + length
        return first, bytes(self._data[start : self._at])


class _Body:
    """The body of a packet, read from `at` on. A method raises `BadPacket` if the bytes end too early."""

    def __init__(self, kind: int, data: bytes, five: bool, at: int = 0) -> None:
        self.kind, self.data, self.five, self.at = kind, data, five, at

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int) -> bytes:
        taken = self.data[self.at : self.at + size]
        if len(taken) != size:
            raise BadPacket("a packet that ends too early")
        self.at += size
        return taken

    def number(self, size: int, least: int = 0, most: int | None = None) -> int:
        found = int.from_bytes(self.take(size), "big")
        if found < least or (most is not None and found > most):
            raise BadPacket(f"{found} in a field that does not allow it", Reason.PROTOCOL_ERROR)
        return found

    def varint(self, least: int = 0) -> int:
        sized = _varint(self.data, self.at)
        if sized is None or sized[0] < least:
            reason = Reason.PROTOCOL_ERROR if sized else Reason.MALFORMED
            raise BadPacket("a number that is too small or ends too early", reason)
        value, self.at = sized
        return value

    def binary(self) -> bytes:
        start = self.at + 2
        self.at = start + int.from_bytes(self.data[self.at : start], "big")
        if self.at > len(self.data):
            raise BadPacket("a packet that ends too early")
        return self.data[start : self.at]

    def text(self) -> str:
        return _decoded(self.binary())

    def topic(self) -> str:
        found = self.text()
        if not found:
            raise BadPacket("an empty filter", Reason.PROTOCOL_ERROR)
        return found

    def filter(self) -> p.Filter:
        topic, options = self.topic(), self.number(1)
        qos, handling = options & 3, options >> 4 & 3
        if qos > 2 or handling > 2 or options & (0xC0 if self.five else 0xFC):
            raise BadPacket(f"subscription options {options:#04x}", Reason.PROTOCOL_ERROR)
        return p.Filter(topic, qos, bool(options & 4), bool(options & 8), handling)

    def filters(self, read: Callable[[_Body], Any]) -> list[Any]:
        found: list[Any] = []
        while self.left:
            if len(found) == MOST_FILTERS:
                raise BadPacket(f"more than {MOST_FILTERS} filters", Reason.TOO_LARGE)
            found.append(read(self))
        if not found:
            raise BadPacket("no filter", Reason.PROTOCOL_ERROR)
        return found

    def properties(self, place: int | None = None) -> Properties:
        """The properties of this packet or, with `place`, of the will in it. MQTT 3.1.1 has none."""
        found: Properties = {}
        if not self.five:
            return found
        place, count, length = self.kind if place is None else place, 0, self.varint()
        end = self.at + length
        while self.at < end:
            number, count = self.number(1), count + 1
            known = _READERS.get(number)
            if known is None or place not in known[2] or count > MOST_PROPERTIES:
                raise BadPacket(f"property {number:#04x} in a packet of type {place}, number {count}")
            name, value = known[0], known[1](self)
            if name in p.REPEATED:
                found.setdefault(name, []).append(value)
            elif name in found:
                raise BadPacket(f"property {name} twice", Reason.PROTOCOL_ERROR)
            else:
                found[name] = value
        if self.at != end:
            raise BadPacket("a property that ends after the others")
        return found


def decode(first: int, body: bytes, version: int) -> Packet:
    """Decodes one packet. `version` is 4 (MQTT 3.1.1) or 5; a CONNECT contains its own version.

    Raises:
        BadPacket: this version of the protocol does not allow these bytes.
    """
    kind, flags = first >> 4, first & 0x0F
    if kind == p.PUBACK and len(body) == 2 and not flags and body != b"\0\0":
        return p.Ack(kind, body[0] << 8 | body[1])  # a third of all packets
    if kind == p.PUBLISH:
        return _decode_publish(flags, body, version == 5)
    reader = _Body(kind, body, version == 5)
    if flags != _FLAGS.get(kind, 0):
        raise BadPacket(f"flags {flags:#03x} in a packet of type {kind}")
    if kind == p.CONNECT:
        packet: Packet = _decode_connect(reader)
    elif kind in _LAYOUTS and (reader.five or kind != p.AUTH):
        make, layout = _LAYOUTS[kind]
        found = {}
        for name, form in layout.items():
            if form not in _MAY_END or (reader.five and reader.left):
                found[name] = _FORMS[form][0](reader)
        packet = make(**found)
    else:
        raise BadPacket(f"a packet of type {kind}")
    if reader.left:
        raise BadPacket(f"{reader.left} bytes too many in a packet of type {kind}")
    return packet


def _decode_publish(flags: int, body: bytes, five: bool) -> p.Publish:
    """Half of all packets, so it reads the first fields itself and compares the length once."""
    qos, packet_id = flags >> 1 & 3, 0
    at = 2 + int.from_bytes(body[:2], "big")
    topic, properties = _decoded(body[2:at]), {}
    if qos:
        packet_id, at = int.from_bytes(body[at : at + 2], "big"), at + 2
    if five:
        reader = _Body(p.PUBLISH, body, five, at)
        properties, at = reader.properties(), reader.at
    if at > len(body) or qos > 2 or (flags & 8 and not qos):
        raise BadPacket(f"a PUBLISH with flags {flags:#03x} and {len(body)} bytes")
    if qos and not packet_id:
        raise BadPacket("packet id 0", Reason.PROTOCOL_ERROR)
    if "+" in topic or "#" in topic or not (topic or "alias" in properties):
        reason = Reason.BAD_TOPIC if topic else Reason.PROTOCOL_ERROR
        raise BadPacket(f"topic {topic[:64]!r} in a PUBLISH", reason)
    return p.Publish(topic, body[at:], qos, packet_id, flags & 8 != 0, flags & 1 != 0, properties)


def _decode_connect(reader: _Body) -> p.Connect:
    name, version, flags = reader.text(), reader.number(1), reader.number(1)
    if (name, version) not in (("MQTT", 4), ("MQTT", 5)):
        reason = Reason.WRONG_VERSION if name in ("MQTT", "MQIsdp") else Reason.MALFORMED
        raise BadPacket(f"protocol {name[:16]!r} version {version}", reason)
    reader.five = version == 5
    willing, qos = flags & 4, flags >> 3 & 3
    nameless = version == 4 and flags & 0xC0 == 0x40  # a password without a user name
    if flags & 1 or qos > 2 or (not willing and flags & 0x38) or nameless:
        raise BadPacket(f"connect flags {flags:#04x}")
    keepalive, properties, client_id = reader.number(2), reader.properties(), reader.text()
    will = None
    if willing:
        placed, topic, payload = reader.properties(p.WILL), reader.text(), reader.binary()
        if not topic or "+" in topic or "#" in topic:
            raise BadPacket(f"topic {topic[:64]!r} of a will")
        will = p.Will(topic, payload, qos, bool(flags & 0x20), placed)
    user = reader.text() if flags & 0x80 else None
    password = reader.binary() if flags & 0x40 else None
    return p.Connect(client_id, version, bool(flags & 2), keepalive, user, password, will, properties)


def _decoded(text: bytes) -> str:
    try:
        found = text.decode()
    except UnicodeDecodeError:
        raise BadPacket("a text that is not UTF-8") from None
    if "\0" in found:
        raise BadPacket("a text with U+0000")
    return found


def _varint(data: bytes | bytearray, at: int) -> tuple[int, int] | None:
    """A number of one to four bytes, and the index after it. None if it is cut off."""
    if at < len(data) and data[at] < 0x80:
        return data[at], at + 1
    value = shift = 0
    for each in data[at : at + 4]:
        value |= (each & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if each < 0x80:
            return value, at
    if shift == 28:
        raise BadPacket("a length of more than four bytes")
    return None


def encode(packet: Packet, version: int) -> bytes:
    """The bytes of a packet in this version. Fields that the version does not have are left out."""
    kind, five = packet.kind, version == 5
    if isinstance(packet, p.Publish):
        topic, packet_id = packet.topic.encode(), _two(packet.packet_id) if packet.qos else b""
        body = b"".join(
            (_two(len(topic)), topic, packet_id, _packed(packet.properties, five), packet.payload)
        )
        first = kind << 4 | packet.dup << 3 | packet.qos << 1 | packet.retain
        return _one(first) + varint(len(body)) + body
    if isinstance(packet, p.Connect):
        body = _encode_connect(packet)
    else:
        parts = []
        for name, form in _LAYOUTS[kind][1].items():
            if five or form not in _ONLY_FIVE:
                parts.append(_FORMS[form][1](getattr(packet, name)))
        if isinstance(packet, p.Ack | p.Goodbye):
            while parts[-1:] == [b"\0"]:
                parts.pop()  # success and the absence of properties may be left out
        body = b"".join(parts)
    return _one(kind << 4 | _FLAGS.get(kind, 0)) + varint(len(body)) + body


def _encode_connect(packet: p.Connect) -> bytes:
    five, will, user, password = packet.version == 5, packet.will, packet.user, packet.password
    flags = packet.clean << 1 | (user is not None) << 7 | (password is not None) << 6
    if will is not None:
        flags |= 4 | will.qos << 3 | will.retain << 5
    body = _text("MQTT") + _one(packet.version) + _one(flags) + _two(packet.keepalive)
    body += _packed(packet.properties, five) + _text(packet.client_id)
    if will is not None:
        body += _packed(will.properties, five) + _text(will.topic) + _binary(will.payload)
    body += b"" if user is None else _text(user)
    return body + (b"" if password is None else _binary(password))


def _packed(properties: Properties, five: bool = True) -> bytes:
    if not five:
        return b""
    packed = b""
    for name, value in properties.items():
        number, write, repeated = _WRITERS[name]
        for each in value if repeated else (value,):
            packed += number + write(each)
    return varint(len(packed)) + packed


def _text(value: str) -> bytes:
    data = value.encode()
    return _two(len(data)) + data


def _binary(value: bytes) -> bytes:
    return _two(len(value)) + value


def _filter(each: p.Filter) -> bytes:
    options = each.qos | each.no_local << 2 | each.retain_as_published << 3 | each.retain_handling << 4
    return _text(each.topic) + _one(options)


def varint(value: int) -> bytes:
    """A number up to 268,435,455 in one to four bytes."""
    if value < 0x80:
        return _one(value)
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(digits) + _one(value)


# Form -> how it is read, and how it is written.
_FORMS: dict[str, tuple[Callable[[_Body], Any], Callable[[Any], bytes]]] = {
    "byte": (partial(_Body.number, size=1), _one),
    "flag": (partial(_Body.number, size=1, most=1), _one),
    "2 bytes": (partial(_Body.number, size=2), _two),
    "2 bytes, not 0": (partial(_Body.number, size=2, least=1), _two),
    "4 bytes": (partial(_Body.number, size=4), _four),
    "4 bytes, not 0": (partial(_Body.number, size=4, least=1), _four),
    "varint, not 0": (partial(_Body.varint, least=1), varint),
    "bytes": (_Body.binary, _binary),
    "text": (_Body.text, _text),
    "pair": (lambda body: (body.text(), body.text()), lambda pair: _text(pair[0]) + _text(pair[1])),
    "reason": (partial(_Body.number, size=1), _one),
    "properties": (_Body.properties, _packed),
    "end": (_Body.properties, _packed),
    "reasons": (lambda body: list(body.take(body.left)), bytes),
    "topics": (lambda body: body.filters(_Body.topic), lambda topics: b"".join(map(_text, topics))),
    "filters": (lambda body: body.filters(_Body.filter), lambda filters: b"".join(map(_filter, filters))),
}
_READERS = {number: (name, _FORMS[form][0], places) for name, (number, form, places) in p.PROPERTIES.items()}
_WRITERS = {
    name: (_one(number), _FORMS[form][1], name in p.REPEATED)
    for name, (number, form, _) in p.PROPERTIES.items()
}
# Packet -> how it is made, and its fields in the order of the bytes, with their forms. CONNECT and PUBLISH
# are missing, because their flags say which fields they have.
_ACK = {"packet_id": "2 bytes, not 0", "reason": "reason", "properties": "end"}
_LIST = {"packet_id": "2 bytes, not 0", "properties": "properties"}
_END = {"reason": "reason", "properties": "end"}
_LAYOUTS: dict[int, tuple[Callable[..., Packet], dict[str, str]]] = {
    p.CONNACK: (p.Connack, {"session_present": "flag", "reason": "byte", "properties": "properties"}),
    **{kind: (partial(p.Ack, kind), _ACK) for kind in (p.PUBACK, p.PUBREC, p.PUBREL, p.PUBCOMP)},
    p.SUBSCRIBE: (p.Subscribe, _LIST | {"filters": "filters"}),
    p.UNSUBSCRIBE: (p.Unsubscribe, _LIST | {"topics": "topics"}),
    **{kind: (partial(p.Granted, kind), _LIST | {"reasons": "reasons"}) for kind in (p.SUBACK, p.UNSUBACK)},
    **{kind: (partial(p.Ping, kind), {}) for kind in (p.PINGREQ, p.PINGRESP)},
    **{kind: (partial(p.Goodbye, kind), _END) for kind in (p.DISCONNECT, p.AUTH)},
}
# MQTT 5 leaves these forms out where they mean plain success. MQTT 3.1.1 has none of them.
_MAY_END, _ONLY_FIVE = ("reason", "end"), ("reason", "end", "properties")
_FLAGS = dict.fromkeys((p.PUBREL, p.SUBSCRIBE, p.UNSUBSCRIBE), 2)
