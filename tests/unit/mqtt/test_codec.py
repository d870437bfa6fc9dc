"""The codec: every encoded packet is decoded again, however it is split, and invalid bytes are only
refused."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from broker.mqtt import packets as p
from broker.mqtt.codec import MOST_FILTERS, MOST_PROPERTIES, Splitter, decode, encode, varint
from broker.mqtt.packets import PROPERTIES, REPEATED, BadPacket, Packet, Reason

LONGEST = 268_435_455

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
topics = texts.map(lambda text: text.replace("+", "").replace("#", "") or "t")
filters = texts.filter(bool)
ids = st.integers(1, 0xFFFF)
# Sizes near the limits where the length needs one more byte, too.
payloads = st.binary(max_size=200) | st.sampled_from([120, 127, 128, 16_383, 16_384, 20_000]).map(bytes)
reasons = st.integers(0, 255)


def values(form: str) -> st.SearchStrategy[Any]:
    return {
        "flag": st.integers(0, 1),
        "2 bytes": st.integers(0, 0xFFFF),
        "2 bytes, not 0": ids,
        "4 bytes": st.integers(0, 0xFFFF_FFFF),
        "4 bytes, not 0": st.integers(1, 0xFFFF_FFFF),
        "varint, not 0": st.integers(1, LONGEST),
        "text": texts,
        "bytes": st.binary(max_size=300),
        "pair": st.tuples(texts, texts),
    }[form]


def properties(place: int) -> st.SearchStrategy[p.Properties]:
    each = {}
    for name, (_, form, places) in PROPERTIES.items():
        if place in places:
            value = values(form)
            each[name] = st.lists(value, min_size=1, max_size=3) if name in REPEATED else value
    return st.fixed_dictionaries({}, optional=each)


wills = st.builds(
    p.Will,
    topic=topics,
    payload=payloads,
    qos=st.integers(0, 2),
    retain=st.booleans(),
    properties=properties(p.WILL),
)
credentials = st.one_of(
    st.fixed_dictionaries({"user": st.none(), "password": st.none()}),
    st.fixed_dictionaries({"user": texts, "password": st.none() | st.binary(max_size=40)}),
)
connects = st.builds(
    lambda who, **rest: p.Connect(**who, **rest),
    who=credentials,
    client_id=texts,
    version=st.sampled_from([4, 5]),
    clean=st.booleans(),
    keepalive=st.integers(0, 0xFFFF),
    will=st.none() | wills,
    properties=properties(p.CONNECT),
)
publishes = st.one_of(
    st.builds(p.Publish, topics, payloads, retain=st.booleans(), properties=properties(p.PUBLISH)),
    st.builds(
        p.Publish,
        topics,
        payloads,
        st.integers(1, 2),
        ids,
        st.booleans(),
        st.booleans(),
        properties(p.PUBLISH),
    ),
)
options = st.builds(p.Filter, filters, st.integers(0, 2), st.booleans(), st.booleans(), st.integers(0, 2))
packets: st.SearchStrategy[Packet] = st.one_of(
    connects,
    publishes,
    st.builds(p.Connack, reasons, st.booleans(), properties(p.CONNACK)),
    st.sampled_from([p.PUBACK, p.PUBREC, p.PUBREL, p.PUBCOMP]).flatmap(
        lambda kind: st.builds(p.Ack, st.just(kind), ids, reasons, properties(kind))
    ),
    st.builds(p.Subscribe, ids, st.lists(options, min_size=1, max_size=5), properties(p.SUBSCRIBE)),
    st.builds(p.Unsubscribe, ids, st.lists(filters, min_size=1, max_size=5), properties(p.UNSUBSCRIBE)),
    st.sampled_from([p.SUBACK, p.UNSUBACK]).flatmap(
        lambda kind: st.builds(p.Granted, st.just(kind), ids, st.lists(reasons, max_size=5), properties(kind))
    ),
    st.builds(p.Ping, st.sampled_from([p.PINGREQ, p.PINGRESP])),
    st.sampled_from([p.DISCONNECT, p.AUTH]).flatmap(
        lambda kind: st.builds(p.Goodbye, st.just(kind), reasons, properties(kind))
    ),
)


def split(stream: bytes, *, longest: int = LONGEST) -> list[tuple[int, bytes]]:
    splitter = Splitter(longest)
    splitter.put(stream)
    found = []
    while (cut := splitter.next()) is not None:
        found.append(cut)
    return found


def as_three(packet: Packet) -> Packet:
    """The packet with only the fields that MQTT 3.1.1 has."""
    packet = msgspec.structs.replace(packet)
    if hasattr(packet, "properties"):
        packet.properties = {}
    if isinstance(packet, p.Connect) and packet.will is not None:
        packet.will = msgspec.structs.replace(packet.will, properties={})
    if isinstance(packet, p.Ack | p.Goodbye):
        packet.reason = 0
    if isinstance(packet, p.Subscribe):
        packet.filters = [p.Filter(each.topic, each.qos) for each in packet.filters]
    return packet


@given(packet=packets, version=st.sampled_from([4, 5]))
def test_an_encoded_packet_is_decoded_again(packet: Packet, version: int) -> None:
    if isinstance(packet, p.Connect):
        version = packet.version
    if version == 4 and isinstance(packet, p.Goodbye) and packet.kind == p.AUTH:
        return
    if version == 4:
        packet = as_three(packet)
    ((first, body),) = split(encode(packet, version))
    assert decode(first, body, version) == packet


@given(packet=packets)
def test_a_packet_cut_at_any_byte_is_refused_without_harm(packet: Packet) -> None:
    version = packet.version if isinstance(packet, p.Connect) else 5
    ((first, body),) = split(encode(packet, version))
    for end in range(min(len(body), 400)):
        with contextlib.suppress(BadPacket):
            decode(first, body[:end], version)


@given(sent=st.lists(packets, max_size=4), data=st.data())
def test_a_stream_split_anywhere_gives_the_same_packets(sent: list[Packet], data: st.DataObject) -> None:
    stream = b"".join(encode(packet, 5) for packet in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    splitter, found = Splitter(LONGEST), []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        splitter.put(stream[start:end])
        while (cut := splitter.next()) is not None:
            found.append(cut)
    assert found == split(stream)
    assert splitter.next() is None


@given(first=st.integers(0, 255), body=st.binary(max_size=300), version=st.sampled_from([4, 5]))
@example(first=0x10, body=b"\x00\x04MQTT\x05\xc2\x00\x00\x05\x26\x00", version=5)
@example(first=0x30, body=b"\x00\x05ab", version=5)
def test_any_bytes_raise_bad_packet_at_most(first: int, body: bytes, version: int) -> None:
    with contextlib.suppress(BadPacket):
        encode(decode(first, body, version), version)


@pytest.mark.parametrize("number", [0, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, LONGEST])
def test_a_length_is_encoded_as_short_as_possible_and_decoded_again(number: int) -> None:
    written = varint(number)
    assert len(written) == sum(number >= bound for bound in (0, 128, 16_384, 2_097_152))
    splitter = Splitter(number)
    splitter.put(b"\x30" + written + b"x" * 3)
    if number <= 3:
        assert splitter.next() == (0x30, b"x" * number)
    else:
        assert splitter.next() is None


def test_a_packet_one_byte_too_long_is_refused_before_it_has_arrived() -> None:
    assert split(b"\x30" + varint(200) + bytes(200), longest=200) == [(0x30, bytes(200))]
    splitter = Splitter(200)
    splitter.put(b"\x30" + varint(201))
    with pytest.raises(BadPacket) as raised:
        splitter.next()
    assert raised.value.reason == Reason.TOO_LARGE


def test_a_length_of_five_bytes_is_refused() -> None:
    with pytest.raises(BadPacket):
        split(b"\x30\xff\xff\xff\xff\x01")


def test_the_number_of_entries_in_one_packet_is_bounded() -> None:
    def subscribe(count: int) -> bytes:
        return encode(p.Subscribe(1, [p.Filter("a")] * count), 5)

    def unsubscribe(count: int) -> bytes:
        return encode(p.Unsubscribe(1, ["a"] * count), 5)

    def user(count: int) -> bytes:
        return encode(p.Publish("a", b"", properties={"user": [("k", "v")] * count}), 5)

    for make, most in ((subscribe, MOST_FILTERS), (unsubscribe, MOST_FILTERS), (user, MOST_PROPERTIES)):
        decode(*split(make(most))[0], 5)
        with pytest.raises(BadPacket):
            decode(*split(make(most + 1))[0], 5)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\x00\x04MQTT\x03\x02\x00\x00\x00\x00", Reason.WRONG_VERSION),
        (b"\x00\x06MQIsdp\x03\x02\x00\x00\x00\x00", Reason.WRONG_VERSION),
        (b"\x00\x04MQTT\x06\x02\x00\x00\x00\x00\x00", Reason.WRONG_VERSION),
        (b"\x00\x04HTTP\x04\x02\x00\x00\x00\x00", Reason.MALFORMED),
        (b"\x00\x04MQTT\x04\x03\x00\x00\x00\x00", Reason.MALFORMED),  # the reserved flag
        (b"\x00\x04MQTT\x04\x1e\x00\x00\x00\x00", Reason.MALFORMED),  # a will of QoS 3
        (b"\x00\x04MQTT\x04\x22\x00\x00\x00\x00", Reason.MALFORMED),  # will retain without a will
        (b"\x00\x04MQTT\x04\x42\x00\x00\x00\x00\x00\x00", Reason.MALFORMED),  # a password without a user
        (b"\x00\x04MQTT\x05\x02\x00\x00\x03\x21\x00\x00\x00\x00", Reason.PROTOCOL_ERROR),  # Receive Maximum 0
        (b"\x00\x04MQTT\x05\x02\x00\x00\x02\x17\x02\x00\x00", Reason.PROTOCOL_ERROR),  # problem info 2
        # a duplicate property
        (b"\x00\x04MQTT\x05\x02\x00\x00\x06\x21\x00\x01\x21\x00\x01\x00\x00", Reason.PROTOCOL_ERROR),
        # a topic alias in CONNECT
        (b"\x00\x04MQTT\x05\x02\x00\x00\x03\x23\x00\x01\x00\x00", Reason.MALFORMED),
        (b"\x00\x04MQTT\x04\x02\x00\x00\x00\x01\xff", Reason.MALFORMED),  # not UTF-8
        (b"\x00\x04MQTT\x04\x02\x00\x00\x00\x03\xed\xa0\x80", Reason.MALFORMED),  # a surrogate
        (b"\x00\x04MQTT\x04\x02\x00\x00\x00\x01\x00", Reason.MALFORMED),  # U+0000
        (b"\x00\x04MQTT\x04\x02\x00\x00\x00\x00x", Reason.MALFORMED),  # bytes after the end
    ],
)
def test_a_connect_that_breaks_the_protocol_is_refused_with_its_reason(body: bytes, reason: int) -> None:
    with pytest.raises(BadPacket) as raised:
        decode(0x10, body, 4)
    assert raised.value.reason == reason
