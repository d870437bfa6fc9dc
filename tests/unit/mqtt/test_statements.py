"""All normative statements of MQTT 5.0 by their numbers: held, done otherwise on purpose, or a client's duty.

A row of `HELD` is held if what is sent in it leads to what it says. `closes` is the reason code that ends the
connection; `hears` is what is answered; `tells` is what reaches the session's owner. Rows with "3.1.1" are
about that version, where it differs.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from broker.mqtt import packets as p
from broker.mqtt.codec import encode
from broker.mqtt.packets import Packet, Reason
from tests.unit.mqtt.speaker import Speaker, said

TESTS = Path(__file__).parents[2]
ROOT = TESTS.parent


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


def with_property(written: bytes) -> bytes:
    """A PUBLISH of QoS 0 with one property."""
    return body(0x30, PUBLISH + bytes((len(written),)) + written)


PUBLISH, SUB = b"\0\x01a", p.Subscribe(1, [p.Filter("a", 1)])
MALFORMED, PROTOCOL = Reason.MALFORMED, Reason.PROTOCOL_ERROR
HELD = [
    # 1.5: texts
    Held("1.5.4-1 3.3.2-1 well-formed UTF-8", body(0x30, b"\0\x02\xc3\x28\0"), MALFORMED),
    Held("1.5.4-1 no surrogates", body(0x30, b"\0\x03\xed\xa0\x80\0"), MALFORMED),
    Held("1.5.4-2 4.7.3-2 no U+0000", body(0x30, b"\0\x01\0\0"), MALFORMED),
    Held(
        "1.5.4-3 a BOM is a character", body(0x30, b"\0\x03\xef\xbb\xbf\0"), tells=[p.Publish("\ufeff", b"")]
    ),
    Held("1.5.5-1 the shortest length", [p.Ping()], hears=[p.Ping(p.PINGRESP)]),
    Held("1.5.7-1 both texts of a user property", with_property(b"\x26\0\1a\0\1\xff"), MALFORMED),
    # 2: every packet
    Held("2.1.3-1 reserved flags", b"\xc1\0", MALFORMED),
    Held("3.8.1-1 of SUBSCRIBE", body(0x80, b"\0\x01\0\0\x01a\x01"), MALFORMED),
    Held("3.6.1-1 of PUBREL", body(0x60, b"\0\x01"), MALFORMED, version=4),
    Held("2.2.1-2 no packet id with QoS 0", body(0x30, PUBLISH + b"\0xy"), tells=[p.Publish("a", b"xy")]),
    Held("2.2.1-3 a packet id is not 0", body(0x32, PUBLISH + b"\0\0\0"), PROTOCOL),
    Held("2.2.1-3 in SUBSCRIBE", body(0x82, b"\0\0\0\0\x01a\x01"), PROTOCOL),
    Held("2.2.2-1 no properties are a zero", [p.Publish("a", b"x")], tells=[p.Publish("a", b"x")]),
    # 3.1: CONNECT
    Held("3.1.0-1 CONNECT is the first", p.Ping(), PROTOCOL, connected=False),
    Held("3.1.0-2 and comes once", [p.Connect(client_id="a")], PROTOCOL),
    Held("3.1.2-1 the protocol's name", connect(2, name=b"\0\x04HTTP"), MALFORMED, connected=False),
    Held("3.1.2-2 the version", connect(2, version=6), Reason.WRONG_VERSION, version=4, connected=False),
    Held("3.1.2-3 the reserved flag", connect(3), MALFORMED, connected=False),
    Held("3.1.2-9 a will that is not there", connect(6), MALFORMED, connected=False),
    Held("3.1.2-16 no flag, no user", connect(2, b"\0\0\0\1u"), MALFORMED, connected=False),
    Held("3.1.2-18 no flag, no password", connect(0x82, b"\0\0\0\1u\0\1p"), MALFORMED, connected=False),
    Held("3.1.3-3 the client id is not left out", connect(2, b""), MALFORMED, connected=False),
    Held("3.1.3-12 the user is UTF-8", connect(0x82, b"\0\0\0\1\xff"), MALFORMED, connected=False),
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
    Held("3.3.2-2 4.7.0-1 no wildcards in a topic", body(0x30, b"\0\x01#\0"), Reason.BAD_TOPIC),
    Held(
        "3.3.2-9 an alias beyond the maximum",
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
    Held("3.3.2-13 the response topic is UTF-8", with_property(b"\x08\0\1\xff"), MALFORMED),
    Held("3.3.2-19 the content type is UTF-8", with_property(b"\x03\0\1\xff"), MALFORMED),
    Held("3.2.2-11 not more than the Maximum QoS", [said(qos=2)], Reason.QOS),
    Held("4.7.3-1 a topic has a character", body(0x30, b"\0\0\0"), PROTOCOL),
    # 3.6: QoS 2 of MQTT 3.1.1
    Held("3.1.1: 4.3.3-2 PUBCOMP for PUBREL", [p.Ack(p.PUBREL, 9)], hears=[p.Ack(p.PUBCOMP, 9)], version=4),
    Held(
        "3.7.2-1 PUBCOMP 0x92 for an unknown one",
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
    Held("3.10.1-1 reserved flags of UNSUBSCRIBE", body(0xA0, b"\0\x01\0\0\x01a"), MALFORMED),
    Held("3.10.3-1 a filter is UTF-8", body(0xA2, b"\0\x01\0\0\x01\xff"), MALFORMED),
    Held("3.10.3-2 at least one filter", body(0xA2, b"\0\x01\0"), PROTOCOL),
    Held("3.10.4-4 every UNSUBSCRIBE is told", [p.Unsubscribe(1, ["a"])], tells=[p.Unsubscribe(1, ["a"])]),
    # 3.12, 3.14
    Held("3.12.4-1 PINGRESP for PINGREQ", [p.Ping()], hears=[p.Ping(p.PINGRESP)]),
    Held("3.14.1-1 reserved flags of DISCONNECT", b"\xe1\0", MALFORMED),
    Held("3.15.1-1 reserved flags of AUTH", b"\xf1\0", MALFORMED),
    Held("3.14.2 no longer session at the end", [p.Goodbye(properties={"session_expiry": 9})], PROTOCOL),
    Held("3.14.4-3 the will is gone with a goodbye", [p.Goodbye(), p.Ping()], Reason.SUCCESS, hears=[]),
    Held("4.12.0-7 no AUTH without a method", [p.Goodbye(p.AUTH, 0x18)], PROTOCOL),
    # 4: flow
    Held("4.6.0-2 PUBACKs in order, none before its time", [said(b"x", 1), said(b"y", 2)], hears=[]),
    Held("4.13.1-1 what a server alone sends", [p.Ping(p.PINGRESP)], PROTOCOL),
    Held("4.13.1-1 nor a SUBACK", [p.Granted(p.SUBACK, 1, [0])], PROTOCOL),
    Held("4.13.1-1 nor a packet of type 0", b"\0\0", MALFORMED),
]

# All statements of MQTT 5.0 that have a number (its appendix B): section -> the last number in it.
SECTIONS = {
    "1.5.4": 3, "1.5.5": 1, "1.5.7": 1, "2.1.3": 1, "2.2.1": 6, "2.2.2": 1, "3.1.0": 2,
    "3.1.2": 30, "3.1.3": 12, "3.1.4": 6, "3.2.0": 2, "3.2.2": 22, "3.3.1": 13, "3.3.2": 20,
    "3.3.4": 10, "3.4.2": 3, "3.5.2": 3, "3.6.1": 1, "3.6.2": 3, "3.7.2": 3, "3.8.1": 1,
    "3.8.3": 5, "3.8.4": 8, "3.9.2": 2, "3.9.3": 2, "3.10.1": 1, "3.10.3": 2, "3.10.4": 6,
    "3.11.2": 2, "3.11.3": 2, "3.12.4": 1, "3.14.0": 1, "3.14.1": 1, "3.14.2": 4, "3.14.4": 3,
    "3.15.1": 1, "3.15.2": 3, "4.1.0": 2, "4.2.0": 1, "4.3.1": 1, "4.3.2": 5, "4.3.3": 13,
    "4.4.0": 2, "4.5.0": 2, "4.6.0": 6, "4.7.0": 1, "4.7.1": 2, "4.7.2": 1, "4.7.3": 4, "4.8.2": 6,
    "4.9.0": 3, "4.12.0": 7, "4.12.1": 2, "4.13.1": 1, "4.13.2": 1, "6.0.0": 4,
}  # fmt: skip
NO_SUCH = {"2.2.1-1", "3.1.3-10", "3.3.4-5", "4.8.2-5"}

# Held, and shown by another test -> its name.
ELSEWHERE = {
    "2.2.1-4 4.3.2-1": "test_a_packet_id_in_flight_is_not_reused",
    "2.2.1-5 3.3.4-1 4.3.2-4": "test_pubacks_go_out_in_order_of_arrival_after_the_owner_allows_them",
    "2.2.1-6 3.8.4-2": "test_a_filter_that_cannot_be_is_refused_by_itself",
    "3.1.2-7 3.1.2-8 3.1.2-10": "test_only_a_disconnect_cancels_the_will",
    "3.1.2-22": "test_silence_for_one_and_a_half_keepalives_ends_the_session",
    "3.1.2-24": "test_a_message_larger_than_the_clients_maximum_is_not_sent",
    "3.1.2-26 3.1.2-27 3.2.2-17 3.2.2-18 3.3.2-11": "test_topic_aliases_are_not_used_and_not_taken",
    "3.1.2-28 3.1.3-1 3.1.4-5 3.2.2-9 4.12.0-6": "test_a_connect_is_reported_to_the_owner_and_accepted",
    "3.1.2-29": "test_a_client_without_problem_information_gets_codes_only",
    "3.1.3-2 3.1.4-3": "test_a_second_connection_closes_the_first_and_ends_as_online",
    "3.1.3-6 3.1.3-7 3.2.2-16": "test_a_service_without_a_client_id_is_given_one_and_two_have_two",
    "3.1.3-8 3.1.4-2": "test_a_client_with_wrong_credentials_is_refused_with_a_reason",
    "3.1.4-1 4.13.2-1": "test_nonsense_costs_its_own_connection_and_no_other",
    "3.1.4-6 3.2.0-1": "test_packets_after_a_connect_wait_for_the_owner",
    "3.2.0-2 3.14.4-1 3.14.4-2": "test_after_the_end_nothing_is_read_sent_or_reported",
    "3.2.2-1": "test_an_encoded_packet_is_decoded_again",
    "3.2.2-2 3.2.2-3": "test_a_device_that_asks_for_a_session_is_told_that_there_is_none",
    "3.2.2-6 3.2.2-7 3.2.2-8": "test_a_refusal_uses_the_codes_of_its_mqtt_version",
    "3.2.2-10 3.3.4-2": "test_overlapping_subscriptions_deliver_one_copy_with_the_highest_qos",
    "3.2.2-12": "test_a_will_of_qos_2_is_refused_in_mqtt_5",
    "3.2.2-15": "test_no_packet_is_larger_than_the_other_side_allows",
    "3.2.2-19 3.2.2-20": "test_a_client_that_cannot_take_the_connack_is_disconnected",
    "3.2.2-22": "test_a_missing_or_too_long_keepalive_is_set_by_the_server",
    "3.3.1-1": "test_only_a_message_without_puback_is_a_duplicate_after_a_reconnect",
    "3.3.1-3 4.3.2-2 4.3.2-3": "test_a_message_is_sent_and_its_puback_is_reported_with_its_tag",
    "3.3.2-3": "test_a_filter_that_covers_more_delivers_own_commands_only",
    "3.3.2-5": "test_the_queue_for_a_client_is_bounded_and_its_messages_expire",
    "3.3.2-6": "test_the_expiry_of_a_message_counts_the_time_that_it_waited",
    "3.3.4-3 3.3.4-4": "test_filters_narrow_and_their_numbers_come_with_the_events",
    "3.3.4-9 4.9.0-1 4.9.0-2": (
        "test_in_flight_messages_respect_the_clients_window_and_the_rest_follows_in_order"
    ),
    "3.3.4-10 4.9.0-3": "test_no_more_messages_than_its_receive_maximum_wait_for_a_client",
    "3.4.2-1": "test_a_puback_has_a_reason_in_mqtt_5_only",
    "3.4.2-2 3.4.2-3 3.14.2-3 3.14.2-4": "test_a_reason_string_too_long_for_the_client_is_left_out",
    "3.8.4-3": "test_a_filter_that_comes_again_has_its_new_qos",
    "3.8.4-5 3.8.4-6 3.8.4-7 3.9.3-1 3.9.3-2": (
        "test_a_refused_filter_has_its_code_and_the_others_are_granted"
    ),
    "3.8.4-8": "test_a_subscription_of_qos_0_is_served_with_qos_0_and_a_receipt_without_reason",
    "3.10.4-1 3.10.4-2 3.10.4-5 3.10.4-6 3.11.3-1 3.11.3-2": "test_after_unsubscribing_nothing_comes",
    "3.10.4-3": "test_a_message_sent_before_an_unsubscribe_is_delivered",
    "3.14.0-1": "test_a_client_that_sends_no_connect_is_cut_without_an_answer",
    "3.14.2-1 3.14.2-2": "test_an_mqtt_5_client_beyond_the_window_is_disconnected_with_the_reason",
    "4.2.0-1": "test_it_listens_on_ipv6_and_several_addresses",
    "4.3.1-1": "test_qos_0_is_sent_and_not_tracked",
    "4.3.2-5": "test_a_repeated_publish_on_one_connection_is_one_message",
    "4.3.3-8 4.3.3-10..12": "test_qos_2_of_mqtt_3_is_one_message_however_often_it_is_sent",
    "4.4.0-2": "test_a_refusal_of_the_device_is_its_own_and_not_the_servers",
    "4.6.0-5 4.6.0-6": "test_a_hundred_commands_at_once_reach_the_device_in_order",
    "4.7.1-1 4.7.1-2": "test_a_filter_is_valid_by_the_rule_of_the_standard",
    "4.7.3-4": "test_a_filter_covers_topics_by_the_rule_of_the_standard",
    "4.8.2-1 4.8.2-2": "test_a_group_needs_a_name_without_wildcards",
    "4.8.2-3": "test_a_group_shares_and_all_events_of_a_command_go_to_one_member",
    "4.8.2-6": "test_an_event_that_a_member_refused_is_not_sent_to_another",
    "6.0.0-1 6.0.0-2": "test_a_packet_may_be_cut_into_frames_anywhere_and_text_is_refused",
    "6.0.0-3": "test_only_mqtt_from_known_pages_is_upgraded",
    "6.0.0-4": "test_mqtt_over_websocket_makes_the_round_trip",
}

# What we do otherwise, or what does not occur here, and why.
ON_PURPOSE = {
    "3.1.2-4..6 3.1.2-23 3.1.4-4 4.1.0-1 4.1.0-2 4.4.0-1 4.5.0-1": (
        "there are no sessions: Session Expiry is 0 and Session Present is always 0"
    ),
    "3.1.2-14 3.1.2-15 3.2.2-13 3.3.1-5..13 3.8.4-4": (
        "RETAIN is accepted and ignored; nobody hears what devices publish, so it cannot be observed"
    ),
    "3.3.2-4 3.3.2-15..18 3.3.2-20 3.8.3-3": ("no message of a client is forwarded to another client"),
    "3.1.2-25": "a command that is too large for the device fails, and says so",
    "3.1.3-5": "a device's client id is its hardware id",
    "3.1.3-9": "the will's delay: the session ends with the connection, and the will is due then",
    "3.3.2-7 3.3.2-12": "Topic Alias Maximum is 0 in both directions",
    "3.5.2-1..3 3.7.2-2 3.7.2-3": "QoS 2 is for MQTT 3.1.1 only, which has no reason strings",
    "3.8.3-4": "a shared subscription with No Local is refused alone, with 0x8F; the connection stays",
    "3.9.2-1 3.9.2-2 3.11.2-1 3.11.2-2": "SUBACK and UNSUBACK have no properties",
    "3.15.2-1..3 4.12.0-2 4.12.0-4 4.12.0-5 4.12.1-1 4.12.1-2": (
        "no enhanced authentication: a token or a client certificate"
    ),
    "4.3.3-1..7 4.8.2-4": "subscriptions are granted QoS 1 at most",
    "4.3.3-9 4.3.3-13": "a PUBREC always means success, and what devices publish does not expire",
    "4.7.2-1": "no topic here begins with $",
    "4.7.3-3": "the length field of a text has two bytes",
}
CLIENTS = (
    "3.1.2-20 3.1.2-21 3.1.2-30 3.2.2-4 3.2.2-5 3.2.2-14 3.2.2-21 3.3.2-10 3.3.4-8 3.6.2-1..3 4.5.0-2 "
    "4.6.0-1 4.6.0-3 4.6.0-4 4.12.0-3"
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


def numbers(text: str) -> list[str]:
    """The numbers of statements of MQTT 5.0 in a text; `3.5.2-1..3` are three."""
    found = [] if text.startswith("3.1.1:") else re.findall(r"(\d\.\d+\.\d+)-(\d+)(?:\.\.(\d+))?", text)
    return [f"{section}-{n}" for section, a, b in found for n in range(int(a), int(b or a) + 1)]


def test_every_statement_of_the_standard_has_one_place() -> None:
    known = {f"{section}-{n}" for section, last in SECTIONS.items() for n in range(1, last + 1)} - NO_SUCH
    rows = {number for row in HELD for number in numbers(row.numbers)}
    others = [number for text in (*ELSEWHERE, *ON_PURPOSE, CLIENTS) for number in numbers(text)]
    places = Counter([*rows, *others])
    assert {number for number, count in places.items() if count > 1} == set()
    assert set(places) == known


def test_every_test_that_the_table_names_exists() -> None:
    rooms = [TESTS / room for room in ("unit/mqtt", "integration/mqtt")]
    found = "\n".join(path.read_text() for room in rooms for path in room.glob("test_*.py"))
    assert [name for name in ELSEWHERE.values() if f"def {name}(" not in found] == []
    assert len({row.numbers for row in HELD}) == len(HELD)


def test_the_reference_page_names_every_reason_code_that_is_sent() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "broker/mqtt").glob("*.py"))
    sent = {getattr(Reason, name) for name in re.findall(r"Reason\.([A-Z_]+)", sources)}
    page = (ROOT / "docs/reference/listener.md").read_text()
    named = {int(code, 16) for code in re.findall(r"^\| 0x([0-9A-F]{2})", page, re.MULTILINE)}
    assert {f"0x{code:02X}" for code in sent - named if code > Reason.UNSPECIFIED} == set()
