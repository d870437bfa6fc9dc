"""The link's packets compared with paho's: the same bytes out, the same meaning in, however the stream is
split."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt import _packet, client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from broker.mqtt.client.packets import (
    LONGEST,
    PUBACK,
    PUBLISH,
    BadPacket,
    Packet,
    Splitter,
    acknowledgement,
    publish_packet,
    read_puback,
    read_publish,
    whole,
)
from broker.seams import Outgoing

PROTOCOLS = {True: MQTTProtocolVersion.MQTTv5, False: MQTTProtocolVersion.MQTTv311}
OWNER = object()

texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=20
)  # paho refuses U+FEFF
topics = texts.map(lambda text: text.replace("+", "").replace("#", "") or "t")
ids = st.integers(1, 65_535)
pairs = st.lists(st.tuples(texts, texts), max_size=3)
# Payload sizes near the limits where the length needs one more byte, too.
payloads = st.one_of(st.binary(max_size=200), st.integers(0, 17_000).map(bytes))
all_properties = st.fixed_dictionaries(
    {},
    optional={
        "PayloadFormatIndicator": st.integers(0, 1),
        "MessageExpiryInterval": st.integers(0, 2**32 - 1),
        "ContentType": texts,
        "ResponseTopic": topics,
        "CorrelationData": st.binary(max_size=300),
        "SubscriptionIdentifier": st.lists(st.integers(1, 268_435_455), min_size=1, max_size=2),
        "TopicAlias": st.integers(1, 65_535),
        "UserProperty": pairs.filter(bool),
    },
)


def properties(values: dict[str, Any]) -> Properties:
    made = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(made, name, value)
    return made


class Paho:
    """A real paho client at one end of a real socket pair; `sent` holds what arrives at the other end."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._clients = {
            five: client.Client(CallbackAPIVersion.VERSION2, protocol=protocol)
            for five, protocol in PROTOCOLS.items()
        }
        for each in self._clients.values():
            each._sock = self._ours

    def publish(self, five: bool, mid: int, topic: str, payload: bytes, **more: Any) -> bytes:
        told = client.MQTTMessageInfo(mid)
        assert self._clients[five]._send_publish(mid, topic.encode(), payload, info=told, **more) == 0
        return self._theirs.recv(1_000_000)

    def puback(self, mid: int) -> bytes:
        assert self._clients[True]._send_puback(mid) == 0
        return self._theirs.recv(100)

    def pubrec(self, mid: int) -> bytes:
        assert self._clients[True]._send_pubrec(mid) == 0
        return self._theirs.recv(100)

    def close(self) -> None:
        for each in self._clients.values():
            each._sock = None
        self._ours.close()
        self._theirs.close()


@pytest.fixture(scope="module")
def paho() -> Iterator[Paho]:
    opened = Paho()
    yield opened
    opened.close()


def cut(data: bytes, at: list[int]) -> list[bytes]:
    places = sorted({place % (len(data) + 1) for place in at})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


def split(pieces: list[bytes]) -> list[Packet]:
    splitter = Splitter()
    return [packet for piece in pieces for packet in splitter.feed(piece)]


@given(
    five=st.booleans(),
    mid=ids,
    payload=payloads,
    outgoing=st.builds(
        Outgoing,
        topic=topics,
        payload=st.just(b""),
        correlation=st.none() | st.binary(max_size=300),
        response_topic=st.none() | topics,
        expiry_sec=st.none() | st.integers(0, 2**32 - 1),
        user_properties=pairs.map(tuple),
    ),
)
def test_sent_packets_equal_pahos_byte_for_byte(
    paho: Paho, five: bool, mid: int, payload: bytes, outgoing: Outgoing
) -> None:
    named = {
        "MessageExpiryInterval": outgoing.expiry_sec,
        "ResponseTopic": outgoing.response_topic,
        "CorrelationData": outgoing.correlation,
        "UserProperty": list(outgoing.user_properties) or None,
    }
    given_ones = properties({name: value for name, value in named.items() if value is not None})
    theirs = paho.publish(five, mid, outgoing.topic, payload, qos=1, properties=given_ones if five else None)
    ours = Outgoing(
        topic=outgoing.topic,
        payload=payload,
        correlation=outgoing.correlation,
        response_topic=outgoing.response_topic,
        expiry_sec=outgoing.expiry_sec,
        user_properties=outgoing.user_properties,
    )
    assert publish_packet(mid, ours, five=five) == theirs


@given(mid=ids)
def test_acknowledgements_equal_pahos(paho: Paho, mid: int) -> None:
    assert acknowledgement(mid, 1) == paho.puback(mid)
    assert acknowledgement(mid, 2) == paho.pubrec(mid)


@given(
    five=st.booleans(),
    messages=st.lists(
        st.tuples(
            ids,
            topics,
            payloads,
            st.fixed_dictionaries({"qos": st.integers(0, 2), "retain": st.booleans(), "dup": st.booleans()}),
            all_properties,
        ),
        min_size=1,
        max_size=4,
    ),
    at=st.lists(st.integers(0, 10**6), max_size=12),
)
def test_messages_mean_the_same_as_in_paho_wherever_the_stream_is_split(
    paho: Paho, five: bool, messages: list[Any], at: list[int]
) -> None:
    stream = b"".join(
        paho.publish(five, mid, topic, payload, **flags, properties=properties(named) if five else None)
        for mid, topic, payload, flags, named in messages
    )
    packets = split(cut(stream, at))
    assert b"".join(whole(*packet) for packet in packets) == stream
    for first, body in packets:
        theirs = _packet.decode_publish(first, body, PROTOCOLS[five])
        ours = read_publish(first, body, five=five, owner=OWNER)
        assert ours.topic == theirs.topic.decode()
        assert (ours.payload, ours.qos, ours.dup, ours.retain) == (
            theirs.payload,
            theirs.qos,
            theirs.dup,
            theirs.retain,
        )
        assert ours.correlation == getattr(theirs.properties, "CorrelationData", None)
        assert ours.token == ((OWNER, theirs.mid) if theirs.qos else None)


@given(mid=ids, code=st.sampled_from([0, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99]), why=texts)
def test_a_puback_means_the_same_as_in_paho(mid: int, code: int, why: str) -> None:
    reason = ReasonCode(PacketTypes.PUBACK, identifier=code)
    more = Properties(PacketTypes.PUBACK)  # type: ignore[no-untyped-call]
    more.ReasonString = why
    short = mid.to_bytes(2, "big")
    medium = short + reason.pack()
    long = medium + more.pack()  # type: ignore[no-untyped-call]
    for body in (short, medium, long):
        theirs = _packet.decode_puback(PUBACK, body, PROTOCOLS[True])
        assert read_puback(body, five=True) == (theirs.mid, theirs.reason.value)
    assert read_puback(short, five=False) == (mid, 0)
    with pytest.raises(BadPacket):
        read_puback(medium, five=False)


@given(
    five=st.booleans(),
    first=st.sampled_from([PUBLISH, PUBLISH | 2, PUBLISH | 4, PUBLISH | 6, PUBACK]),
    body=st.binary(max_size=60),
)
def test_any_body_is_read_or_is_a_bad_packet(five: bool, first: int, body: bytes) -> None:
    try:
        if first == PUBACK:
            read_puback(body, five=five)
        else:
            read_publish(first, body, five=five, owner=OWNER)
    except BadPacket:
        pass


@given(pieces=st.lists(st.binary(max_size=40), max_size=8))
def test_splitting_the_stream_never_changes_its_meaning(pieces: list[bytes]) -> None:
    def said(given: list[bytes]) -> list[Packet | str]:
        splitter, found = Splitter(), list[Packet | str]()
        try:
            for piece in given:
                found.extend(splitter.feed(piece))
        except BadPacket as error:
            found.append(str(error))
        return found

    data = b"".join(pieces)
    assert said(pieces) == said([data]) == said([data[at : at + 1] for at in range(len(data))])


@pytest.mark.parametrize("five", [True, False])
@pytest.mark.parametrize("length", [LONGEST, LONGEST + 1, LONGEST + 2, 1_000_000])
@pytest.mark.parametrize("piece", [1_460, 65_536, 262_144, 2_000_000])
def test_a_too_long_message_is_cut_and_the_next_one_is_complete(five: bool, length: int, piece: int) -> None:
    head = b"\0\1t" + b"\0\7" + (b"\x05\x09\0\x02ab" if five else b"")
    long = whole(PUBLISH | 2, head + bytes(length - len(head)))
    after = publish_packet(8, Outgoing(topic="t", payload=b"ok"), five=five)
    stream = long + after + long + after
    packets = split([stream[at : at + piece] for at in range(0, len(stream), piece)])
    read = [read_publish(*packet, five=five, owner=OWNER) for packet in packets]
    assert [message.token for message in read] == [(OWNER, 7), (OWNER, 8)] * 2
    assert [message.payload for message in read[1::2]] == [b"ok", b"ok"]
    assert all(65_536 < len(message.payload) <= LONGEST for message in read[::2])


def test_any_other_too_long_packet_is_refused() -> None:
    with pytest.raises(BadPacket, match="300000 bytes"):
        split([whole(0x90, bytes(300_000))[:10]])


@pytest.mark.parametrize(
    ("first", "body"),
    [
        (PUBLISH | 6, b"\0\1t\0\1\0"),  # QoS 3
        (PUBLISH | 2, b"\0\1t\0\0\0"),  # packet id 0
        (PUBLISH | 2, b"\0\0\0\1\3\x23\0\1"),  # a topic alias instead of a topic
        (PUBLISH | 2, b"\0\1t\0\1"),  # the properties are missing
        (PUBLISH | 2, b"\0\1t\0\1\x09\x09\0\1"),  # properties that go on after the end
        (PUBLISH | 2, b"\0\1t\0\1\4\x09\0\5a"),  # correlation data that goes on after the properties
        (PUBLISH | 2, b"\0\1t\0\1\2\x11\0"),  # a property of another packet
        (PUBLISH | 2, b"\0\1t\0\1\2\x0b\x80"),  # an unterminated subscription identifier
    ],
)
def test_a_publish_that_breaks_the_protocol_is_a_bad_packet(first: int, body: bytes) -> None:
    with pytest.raises(BadPacket):
        read_publish(first, body, five=True, owner=OWNER)
