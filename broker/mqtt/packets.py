"""MQTT packets as values, and the table of MQTT 5's properties. Pure; `codec` reads and writes them."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import msgspec

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBSCRIBE = range(1, 9)
SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT, AUTH = range(9, 16)
WILL = 0  # not a packet type: it stands for the properties of a will in the table below

Properties = dict[str, Any]
_ANSWERS = (CONNACK, PUBACK, PUBREC, PUBREL, PUBCOMP, SUBACK, UNSUBACK, DISCONNECT, AUTH)
# Property -> its identifier, its form (see `codec`), the packets that may contain it.
# Source: MQTT 5.0, table 2-4. "user" and "subscription_id" may be repeated: their values are lists.
PROPERTIES: dict[str, tuple[int, str, tuple[int, ...]]] = {
    "format": (0x01, "flag", (PUBLISH, WILL)),
    "expiry": (0x02, "4 bytes", (PUBLISH, WILL)),
    "content_type": (0x03, "text", (PUBLISH, WILL)),
    "response_topic": (0x08, "text", (PUBLISH, WILL)),
    "correlation": (0x09, "bytes", (PUBLISH, WILL)),
    "subscription_id": (0x0B, "varint, not 0", (PUBLISH, SUBSCRIBE)),
    "session_expiry": (0x11, "4 bytes", (CONNECT, CONNACK, DISCONNECT)),
    "assigned_id": (0x12, "text", (CONNACK,)),
    "server_keepalive": (0x13, "2 bytes", (CONNACK,)),
    "auth_method": (0x15, "text", (CONNECT, CONNACK, AUTH)),
    "auth_data": (0x16, "bytes", (CONNECT, CONNACK, AUTH)),
    "problem_info": (0x17, "flag", (CONNECT,)),
    "will_delay": (0x18, "4 bytes", (WILL,)),
    "response_info_wanted": (0x19, "flag", (CONNECT,)),
    "response_info": (0x1A, "text", (CONNACK,)),
    "server_reference": (0x1C, "text", (CONNACK, DISCONNECT)),
    "reason_string": (0x1F, "text", _ANSWERS),
    "receive_maximum": (0x21, "2 bytes, not 0", (CONNECT, CONNACK)),
    "alias_maximum": (0x22, "2 bytes", (CONNECT, CONNACK)),
    "alias": (0x23, "2 bytes", (PUBLISH,)),
    "maximum_qos": (0x24, "flag", (CONNACK,)),
    "retain_available": (0x25, "flag", (CONNACK,)),
    "user": (0x26, "pair", tuple(range(AUTH + 1))),
    "maximum_packet": (0x27, "4 bytes, not 0", (CONNECT, CONNACK)),
    "wildcards_available": (0x28, "flag", (CONNACK,)),
    "subscription_ids_available": (0x29, "flag", (CONNACK,)),
    "shared_available": (0x2A, "flag", (CONNACK,)),
}
REPEATED = ("user", "subscription_id")


class Reason:
    """The reason codes that are used here. Source: MQTT 5.0, section 2.4."""

    SUCCESS, WITH_WILL, NO_SUBSCRIBER, NO_SUBSCRIPTION = 0x00, 0x04, 0x10, 0x11
    UNSPECIFIED, MALFORMED, PROTOCOL_ERROR, WRONG_VERSION, WRONG_CLIENT_ID = 0x80, 0x81, 0x82, 0x84, 0x85
    NOT_AUTHORIZED, UNAVAILABLE, SHUTTING_DOWN, BAD_AUTH_METHOD = 0x87, 0x88, 0x8B, 0x8C
    KEEPALIVE, TAKEN_OVER, BAD_FILTER, BAD_TOPIC, UNKNOWN_ID, TOO_MANY = 0x8D, 0x8E, 0x8F, 0x90, 0x92, 0x93
    BAD_ALIAS, TOO_LARGE, TOO_FAST, QUOTA, ADMINISTRATIVE, BAD_FORMAT = 0x94, 0x95, 0x96, 0x97, 0x98, 0x99
    QOS, NO_SHARED, CONNECTION_RATE, NO_SUBSCRIPTION_IDS = 0x9B, 0x9E, 0x9F, 0xA1


class BadPacket(Exception):
    """The bytes violate the protocol. `reason`: the MQTT 5 reason code."""

    def __init__(self, text: str, reason: int = Reason.MALFORMED) -> None:
        super().__init__(text)
        self.reason = reason


class Will(msgspec.Struct):
    topic: str
    payload: bytes
    qos: int = 0
    retain: bool = False
    properties: Properties = {}


class Connect(msgspec.Struct):
    """`version` is the protocol level: 4 for MQTT 3.1.1, 5. `keepalive` in seconds."""

    kind: ClassVar[int] = CONNECT
    client_id: str
    version: int = 5
    clean: bool = True
    keepalive: int = 0
    user: str | None = None
    password: bytes | None = None
    will: Will | None = None
    properties: Properties = {}


class Connack(msgspec.Struct):
    kind: ClassVar[int] = CONNACK
    reason: int
    session_present: bool = False
    properties: Properties = {}


class Publish(msgspec.Struct):
    kind: ClassVar[int] = PUBLISH
    topic: str
    payload: bytes
    qos: int = 0
    packet_id: int = 0
    dup: bool = False
    retain: bool = False
    properties: Properties = {}


class Ack(msgspec.Struct):
    """PUBACK, PUBREC, PUBREL or PUBCOMP: `kind` says which."""

    kind: int
    packet_id: int
    reason: int = 0
    properties: Properties = {}


class Filter(NamedTuple):
    """One filter of a SUBSCRIBE; the last three mean something in MQTT 5 only."""

    topic: str
    qos: int = 0
    no_local: bool = False
    retain_as_published: bool = False
    retain_handling: int = 0


class Subscribe(msgspec.Struct):
    kind: ClassVar[int] = SUBSCRIBE
    packet_id: int
    filters: list[Filter]
    properties: Properties = {}


class Unsubscribe(msgspec.Struct):
    kind: ClassVar[int] = UNSUBSCRIBE
    packet_id: int
    topics: list[str]
    properties: Properties = {}


class Granted(msgspec.Struct):
    """SUBACK or UNSUBACK: `kind` says which. An UNSUBACK of MQTT 3.1.1 has no reasons."""

    kind: int
    packet_id: int
    reasons: list[int] = []
    properties: Properties = {}


class Ping(msgspec.Struct):
    """PINGREQ or PINGRESP: `kind` says which."""

    kind: int = PINGREQ


class Goodbye(msgspec.Struct):
    """DISCONNECT or AUTH: `kind` says which."""

    kind: int = DISCONNECT
    reason: int = 0
    properties: Properties = {}


Packet = Connect | Connack | Publish | Ack | Subscribe | Unsubscribe | Granted | Ping | Goodbye


def weight(packet: Packet) -> int:
    """What a packet counts for the rate of its client: a filter, or 8 user properties, count as one."""
    if isinstance(packet, Publish):
        return 1 + len(packet.properties.get("user", ())) // 8
    if isinstance(packet, Subscribe):
        return len(packet.filters)
    return len(packet.topics) if isinstance(packet, Unsubscribe) else 1
