"""Normative statements of MQTT 5.0 and 3.1.1, by their numbers: held, done otherwise on purpose, or not ours.

A row is held if what is sent in it leads to what it says. `closes` is the reason code that ends the
connection; `hears` is what is answered; `tells` is what reaches the session's owner. Numbers with "3.1.1" are
of that version.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from broker.mqtt import packets as p
from broker.mqtt.codec import encode
from broker.mqtt.packets import Packet, Reason
from tests.unit.mqtt.speaker import Speaker, said


class Held(NamedTuple):
    numbers: str
    sent: bytes | Packet | list[Packet]
    closes: int | None = None
    hears: list[Packet] | None = None
    tells: list[Any] | None = None
    version: int = 5
    connected: bool = True


def body(first: int, rest: bytes) -> bytes:
    return bytes((first, len(rest))) + rest


def connect(flags: int, rest: bytes = b"\0\0", *, version: int = 5, name: bytes = b"\0\x04MQTT") -> bytes:
    properties = b"\0" if version == 5 else b""
    return body(0x10, name + bytes((version, flags)) + b"\0\x3c" + properties + rest)


PUBLISH, SUB = b"\0\x01a", p.Subscribe(1, [p.Filter("a", 1)])
MALFORMED, PROTOCOL = Reason.MALFORMED, Reason.PROTOCOL_ERROR
HELD = [
    # 1.5: texts
    Held("1.5.4-1 well-formed UTF-8", body(0x30, b"\0\x02\xc3\x28\0"), MALFORMED),
    Held("1.5.4-1 no surrogates", body(0x30, b"\0\x03\xed\xa0\x80\0"), MALFORMED),
    Held("1.5.4-2 no U+0000", body(0x30, b"\0\x01\0\0"), MALFORMED),
    Held(
        "1.5.4-3 a BOM is a character", body(0x30, b"\0\x03\xef\xbb\xbf\0"), tells=[p.Publish("\ufeff", b"")]
    ),
    Held("1.5.5-1 the shortest length", [p.Ping()], hears=[p.Ping(p.PINGRESP)]),
    # 2: every packet
    Held("2.1.3-1 reserved flags", b"\xc1\0", MALFORMED),
    Held("2.1.3-1 of SUBSCRIBE", body(0x80, b"\0\x01\0\0\x01a\x01"), MALFORMED),
    Held("2.1.3-1 of PUBREL", body(0x60, b"\0\x01"), MALFORMED, version=4),
    Held("2.2.1-2 no packet id with QoS 0", body(0x30, PUBLISH + b"\0xy"), tells=[p.Publish("a", b"xy")]),
    Held("2.2.1-3 a packet id is not 0", body(0x32, PUBLISH + b"\0\0\0"), PROTOCOL),
    Held("2.2.1-3 nor in SUBSCRIBE", body(0x82, b"\0\0\0\0\x01a\x01"), PROTOCOL),
    Held("2.2.2-1 no properties are a zero", [p.Publish("a", b"x")], tells=[p.Publish("a", b"x")]),
    # 3.1: CONNECT
    Held("3.1.0-1 CONNECT is the first", p.Ping(), PROTOCOL, connected=False),
    Held("3.1.0-2 and comes once", [p.Connect(client_id="a")], PROTOCOL),
    Held("3.1.2-1 the protocol's name", connect(2, name=b"\0\x04HTTP"), MALFORMED, connected=False),
    Held("3.1.2-2 the version", connect(2, version=6), Reason.WRONG_VERSION, version=4, connected=False),
    Held("3.1.2-3 the reserved flag", connect(3), MALFORMED, connected=False),
    Held("3.1.2-11 no will, no QoS", connect(0x0A), MALFORMED, connected=False),
    Held("3.1.2-12 a will of QoS 3", connect(0x1E, b"\0\0\0\0\x01a\0\0"), MALFORMED, connected=False),
    Held("3.1.2-13 no will, no retain", connect(0x22), MALFORMED, connected=False),
    Held("3.1.2-17 a user that is not there", connect(0x82), MALFORMED, connected=False),
    Held("3.1.2-19 a password that is not there", connect(0x42), MALFORMED, connected=False),
    Held(
        "3.1.1: 3.1.2-22 a password without a user",
        connect(0x42, b"\0\0\0\0", version=4),
        MALFORMED,
        connected=False,
    ),
    Held(
        "3.1.2.11 Receive Maximum 0",
        body(0x10, b"\0\x04MQTT\x05\x02\0\x3c\x03\x21\0\0\0\0"),
        PROTOCOL,
        connected=False,
    ),
    Held("3.1.3-4 the client id is UTF-8", connect(2, b"\0\x01\xff"), MALFORMED, connected=False),
    Held(
        "3.1.3-11 the will's topic is UTF-8", connect(6, b"\0\0\0\0\x01\xff\0\0"), MALFORMED, connected=False
    ),
    Held(
        "4.12.0-1 an unknown authentication method",
        p.Connect(client_id="a", properties={"auth_method": "x"}),
        Reason.BAD_AUTH_METHOD,
        connected=False,
    ),
    # 3.3: PUBLISH
    Held("3.3.1-2 DUP with QoS 0", body(0x38, PUBLISH + b"\0"), MALFORMED),
    Held("3.3.1-4 QoS 3", body(0x36, PUBLISH + b"\0\x01\0"), MALFORMED),
    Held("3.3.2-2 no wildcards in a topic", body(0x30, b"\0\x01#\0"), Reason.BAD_TOPIC),
    Held(
        "3.3.2-7 an alias beyond the maximum",
        [p.Publish("a", b"", properties={"alias": 1})],
        Reason.BAD_ALIAS,
    ),
    Held("3.3.2-8 an alias of 0", body(0x30, PUBLISH + b"\x03\x23\0\0"), Reason.BAD_ALIAS),
    Held(
        "3.3.2-14 no wildcards in a response topic",
        [p.Publish("a", b"", properties={"response_topic": "b/+"})],
        PROTOCOL,
    ),
    Held(
        "3.3.4-6 a client numbers no subscription",
        [p.Publish("a", b"", properties={"subscription_id": [1]})],
        PROTOCOL,
    ),
    Held(
        "3.3.4-7 not more than the Receive Maximum",
        [said(b"x", each) for each in range(1, 22)],
        Reason.TOO_MANY,
    ),
    Held("3.2.2-11 not more than the Maximum QoS", [said(qos=2)], Reason.QOS),
    Held("4.8.1-1 a topic has a character", body(0x30, b"\0\0\0"), PROTOCOL),
    # 3.6: QoS 2 of MQTT 3.1.1
    Held("3.1.1: 4.3.3-2 PUBCOMP for PUBREL", [p.Ack(p.PUBREL, 9)], hears=[p.Ack(p.PUBCOMP, 9)], version=4),
    Held(
        "3.6.2 PUBCOMP 0x92 for an unknown one",
        [p.Ack(p.PUBREL, 9)],
        hears=[p.Ack(p.PUBCOMP, 9, Reason.UNKNOWN_ID)],
    ),
    # 3.8: SUBSCRIBE
    Held("3.8.3-1 a filter is UTF-8", body(0x82, b"\0\x01\0\0\x01\xff\x01"), MALFORMED),
    Held("3.8.3-2 at least one filter", body(0x82, b"\0\x01\0"), PROTOCOL),
    Held("3.8.3-5 the reserved options", body(0x82, b"\0\x01\0\0\x01a\x41"), PROTOCOL),
    Held("3.8.3-5 a retain handling of 3", body(0x82, b"\0\x01\0\0\x01a\x31"), PROTOCOL),
    Held("3.1.1: 3.8.3-4 a QoS of 3", body(0x82, b"\0\x01\0\x01a\x03"), PROTOCOL, version=4),
    Held("3.8.4-1 every SUBSCRIBE is told", [SUB], tells=[SUB]),
    # 3.10: UNSUBSCRIBE
    Held("3.10.3-2 at least one filter", body(0xA2, b"\0\x01\0"), PROTOCOL),
    Held("3.10.4-4 every UNSUBSCRIBE is told", [p.Unsubscribe(1, ["a"])], tells=[p.Unsubscribe(1, ["a"])]),
    # 3.12, 3.14
    Held("3.12.4-1 PINGRESP for PINGREQ", [p.Ping()], hears=[p.Ping(p.PINGRESP)]),
    Held("3.14.1-1 reserved flags of DISCONNECT", b"\xe1\0", MALFORMED),
    Held("3.14.2 no longer session at the end", [p.Goodbye(properties={"session_expiry": 9})], PROTOCOL),
    Held("3.14.4-3 the will is gone with a goodbye", [p.Goodbye(), p.Ping()], Reason.SUCCESS, hears=[]),
    Held("3.15 no AUTH without a method", [p.Goodbye(p.AUTH, 0x18)], PROTOCOL),
    # 4: flow
    Held("4.6.0-2 PUBACKs in order, none before its time", [said(b"x", 1), said(b"y", 2)], hears=[]),
    Held("4.13.1-1 what a server alone sends", [p.Ping(p.PINGRESP)], PROTOCOL),
    Held("4.13.1-1 nor a SUBACK", [p.Granted(p.SUBACK, 1, [0])], PROTOCOL),
    Held("4.13.1-1 nor a packet of type 0", b"\0\0", MALFORMED),
]

# What the standard lets a server do otherwise, and why we do.
ON_PURPOSE = {
    "3.1.2-4, -5, -6 sessions": "there are none: Session Expiry is 0 and Session Present is always 0",
    "3.3.1-5 to -13 retained messages": "RETAIN is accepted and ignored; nobody hears what devices publish",
    "3.8.4-4 retained messages of a SUBSCRIBE": "there are none",
    "4.8.2 shared subscriptions": "services have them; devices are told that there are none",
    "3.3.2-3 topic aliases": "Topic Alias Maximum is 0 in both directions",
    "4.3.3 QoS 2 of MQTT 5": "Maximum QoS is 1; on MQTT 3.1.1 it is taken, and PUBREC means durable",
    "4.12 enhanced authentication": "a token or a client certificate",
    "3.2.2 Response Information, Server Reference": "there is one server and no request to answer",
    "3.1.2-25 the will's delay": "the session ends with the connection, and the will is due then",
}
NOT_OURS = (
    "3.1.2-20 (the client's PINGREQ)",
    "3.8.4-2 (the client's SUBACK)",
    "4.4.0-1 (resending)",
    "4.5.0-1",
)


@pytest.mark.parametrize("row", HELD, ids=lambda row: row.numbers)
def test_a_normative_statement_is_held(row: Held) -> None:
    speaker = Speaker(version=row.version)
    if row.connected:
        speaker.connected()
    if isinstance(row.sent, bytes):
        speaker.raw(row.sent)
    else:
        packets = row.sent if isinstance(row.sent, list) else [row.sent]
        speaker.raw(b"".join(encode(packet, row.version) for packet in packets))
    closed = speaker.closed
    assert (None if closed is None else closed.reason) == row.closes
    if row.hears is not None:
        assert speaker.heard == row.hears
    if row.tells is not None:
        assert speaker.effects == row.tells
    if row.closes is not None and row.closes >= 0x80 and row.connected:
        goodbyes = [packet.reason for packet in speaker.sent(p.Goodbye)]
        assert goodbyes == ([row.closes] if row.version == 5 else [])


def test_every_statement_stands_once_and_says_why() -> None:
    names = [row.numbers for row in HELD]
    assert len(set(names)) == len(names)
    assert all(why for why in ON_PURPOSE.values())
    assert not set(ON_PURPOSE) & set(names) & set(NOT_OURS)
