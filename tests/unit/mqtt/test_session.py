"""One session alone: its input, its output, and its reports to the owner. No network, no clock."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from broker.mqtt import packets as p
from broker.mqtt.codec import encode
from broker.mqtt.packets import Reason
from broker.mqtt.session import Closed
from broker.settings import MqttLimits
from tests.unit.mqtt.speaker import LIMITS, Speaker, said

BOTH = pytest.mark.parametrize("version", [4, 5])


def limits(**more: Any) -> MqttLimits:
    return msgspec.structs.replace(LIMITS, **more)


@BOTH
def test_a_connect_is_reported_to_the_owner_and_accepted(version: int) -> None:
    speaker = Speaker(version=version)
    speaker.say(p.Connect(client_id="door", version=version, user="door", password=b"secret", keepalive=20))
    (connect,) = speaker.told(p.Connect)
    assert (connect.client_id, connect.user, connect.password) == ("door", "door", b"secret")
    assert speaker.heard == []
    speaker.session.accept(speaker.now)
    speaker.look()
    (connack,) = speaker.sent(p.Connack)
    assert (connack.reason, connack.session_present) == (0, False)
    if version == 5:
        assert connack.properties == {
            "maximum_qos": 1,
            "receive_maximum": 20,
            "maximum_packet": 262_144,
            "alias_maximum": 0,
            "session_expiry": 0,
            "shared_available": 0,
            "subscription_ids_available": 0,
        }


@pytest.mark.parametrize(("asked", "told"), [(0, 300), (60, None), (300, None), (301, 300), (65_535, 300)])
def test_a_missing_or_too_long_keepalive_is_set_by_the_server(asked: int, told: int | None) -> None:
    speaker = Speaker()
    speaker.say(p.Connect(client_id="door", keepalive=asked))
    speaker.session.accept(speaker.now)
    speaker.look()
    assert speaker.sent(p.Connack)[0].properties.get("server_keepalive") == told


def test_a_service_gets_its_assigned_client_id_and_may_share_subscriptions() -> None:
    speaker = Speaker()
    speaker.say(p.Connect(client_id=""))
    speaker.session.accept(speaker.now, assigned_id="service-1", shared=True)
    speaker.look()
    properties = speaker.sent(p.Connack)[0].properties
    assert properties["assigned_id"] == "service-1"
    assert not {"shared_available", "subscription_ids_available"} & properties.keys()


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (Reason.NOT_AUTHORIZED, 5),
        (Reason.WRONG_CLIENT_ID, 2),
        (Reason.WRONG_VERSION, 1),
        (Reason.UNAVAILABLE, 3),
        (Reason.CONNECTION_RATE, 3),
        (Reason.QUOTA, 3),
    ],
)
def test_a_refusal_uses_the_codes_of_its_mqtt_version(reason: int, code: int) -> None:
    for version in (4, 5):
        speaker = Speaker(version=version)
        speaker.say(p.Connect(client_id="door", version=version, will=p.Will(topic="t", payload=b"")))
        speaker.session.refuse(reason, "because")
        speaker.look()
        (connack,) = speaker.sent(p.Connack)
        assert connack.reason == (reason if version == 5 else code)
        if version == 5:
            assert connack.properties["reason_string"] == "because"
        assert speaker.closed == Closed(reason, "because", will=False, by_us=True)


@BOTH
def test_packets_after_a_connect_wait_for_the_owner(version: int) -> None:
    speaker = Speaker(version=version)
    subscribe = p.Subscribe(7, [p.Filter("a", 1)])
    speaker.say(p.Connect(client_id="door", version=version), subscribe)
    assert speaker.told(p.Subscribe) == []
    assert not speaker.session.paused  # it is read on: a client that hangs up now is noticed
    speaker.session.accept(speaker.now)
    speaker.look()
    assert speaker.told(p.Subscribe) == [subscribe]
    assert not speaker.session.paused


@BOTH
def test_pubacks_go_out_in_order_of_arrival_after_the_owner_allows_them(version: int) -> None:
    speaker = Speaker(version=version).connected()
    speaker.say(said(b"a", 3), said(b"b", 1), said(b"c", 2))
    assert speaker.heard == []
    speaker.acknowledge(2)
    speaker.acknowledge(1)
    assert speaker.heard == []
    speaker.acknowledge(3)
    assert [ack.packet_id for ack in speaker.sent(p.Ack)] == [3, 1, 2]
    speaker.acknowledge(3)
    assert len(speaker.heard) == 3


def test_a_puback_has_a_reason_in_mqtt_5_only() -> None:
    for version in (4, 5):
        speaker = Speaker(version=version).connected()
        speaker.say(said(b"a", 3))
        speaker.acknowledge(3, Reason.BAD_FORMAT, "not JSON")
        (ack,) = speaker.sent(p.Ack)
        told = (ack.reason, ack.properties.get("reason_string"))
        assert told == ((Reason.BAD_FORMAT, "not JSON") if version == 5 else (0, None))


def test_a_client_without_problem_information_gets_codes_only() -> None:
    speaker = Speaker().connected(properties={"problem_info": 0})
    speaker.say(said(b"a", 3))
    speaker.acknowledge(3, Reason.BAD_FORMAT, "not JSON")
    assert speaker.sent(p.Ack) == [p.Ack(p.PUBACK, 3, Reason.BAD_FORMAT)]


def test_a_reason_string_too_long_for_the_client_is_left_out() -> None:
    speaker = Speaker().connected(properties={"maximum_packet": 40})
    speaker.say(said(b"a", 3))
    speaker.acknowledge(3, Reason.BAD_FORMAT, "a text of more than forty bytes, with code and id")
    assert speaker.sent(p.Ack) == [p.Ack(p.PUBACK, 3, Reason.BAD_FORMAT)]


@BOTH
def test_a_repeated_publish_on_one_connection_is_one_message(version: int) -> None:
    speaker = Speaker(version=version, limits=limits(receive_maximum=1)).connected()
    speaker.say(said(), said(dup=True), said(dup=True))
    assert len(speaker.told(p.Publish)) == 1
    speaker.acknowledge(1)
    assert len(speaker.sent(p.Ack)) == 1
    speaker.say(said(b"next"))
    assert [each.payload for each in speaker.told(p.Publish)] == [b"ok", b"next"]


@BOTH
def test_a_packet_id_used_for_another_message_ends_the_connection(version: int) -> None:
    speaker = Speaker(version=version).connected()
    speaker.say(said(b"one"), said(b"two"))
    assert speaker.closed is not None
    assert speaker.closed.reason == Reason.PROTOCOL_ERROR


def test_an_mqtt_5_client_beyond_the_window_is_disconnected_with_the_reason() -> None:
    speaker = Speaker().connected()
    speaker.say(*(said(b"x", each) for each in range(1, 21)))
    assert not speaker.told(Closed)
    speaker.say(said(b"x", 21))
    assert speaker.sent(p.Goodbye)[0].reason == Reason.TOO_MANY
    assert len(speaker.told(p.Publish)) == 20


def test_an_mqtt_3_client_beyond_the_window_is_paused_and_read_later() -> None:
    speaker = Speaker(version=4, limits=limits(unacknowledged=2)).connected()
    speaker.say(said(b"a", 1), said(b"b", 2), said(b"c", 3), p.Ping())
    assert speaker.session.paused
    assert len(speaker.told(p.Publish)) == 2
    speaker.wait(1_000)
    assert not speaker.told(Closed)  # the server paused reading, so the client's silence does not count
    speaker.acknowledge(1)
    assert len(speaker.told(p.Publish)) == 3
    speaker.acknowledge(2)
    assert speaker.sent(p.Ping) == [p.Ping(p.PINGRESP)]
    assert not speaker.session.paused


def test_pings_are_answered_during_a_long_commit() -> None:
    speaker = Speaker().connected()
    speaker.say(*(said(b"x", each) for each in range(1, 21)), p.Ping())
    assert speaker.heard == [p.Ping(p.PINGRESP)]


def test_qos_2_of_mqtt_3_is_one_message_however_often_it_is_sent() -> None:
    speaker = Speaker(version=4).connected()
    speaker.say(said(qos=2))
    speaker.acknowledge(1)
    speaker.say(said(qos=2, dup=True), p.Ack(p.PUBREL, 1), p.Ack(p.PUBREL, 1))
    assert len(speaker.told(p.Publish)) == 1
    assert [ack.kind for ack in speaker.sent(p.Ack)] == [p.PUBREC, p.PUBREC, p.PUBCOMP, p.PUBCOMP]
    speaker.say(said(qos=2))
    assert len(speaker.told(p.Publish)) == 2


# Messages to the client


@BOTH
def test_a_message_is_sent_and_its_puback_is_reported_with_its_tag(version: int) -> None:
    speaker = Speaker(version=version).connected()
    assert speaker.publish(tag="first") == "sent"
    (message,) = speaker.sent(p.Publish)
    assert (message.qos, message.dup, message.retain, message.packet_id) == (1, False, False, 1)
    speaker.say(p.Ack(p.PUBACK, 1, Reason.UNSPECIFIED if version == 5 else 0))
    assert speaker.taken == [("first", 0x80 if version == 5 else 0)]
    speaker.say(p.Ack(p.PUBACK, 1), p.Ack(p.PUBACK, 99))
    assert not speaker.told(Closed)


def test_in_flight_messages_respect_the_clients_window_and_the_rest_follows_in_order() -> None:
    speaker = Speaker().connected(properties={"receive_maximum": 2})
    assert [speaker.publish(bytes([each]), tag=each) for each in range(4)] == [
        "sent",
        "sent",
        "queued",
        "queued",
    ]
    assert speaker.session.in_flight == 4
    speaker.say(p.Ack(p.PUBACK, 2))
    assert [message.payload for message in speaker.sent(p.Publish)] == [b"\x00", b"\x01", b"\x02"]
    speaker.say(p.Ack(p.PUBACK, 1))
    assert len(speaker.sent(p.Publish)) == 4


def test_the_queue_for_a_client_is_bounded_and_its_messages_expire() -> None:
    speaker = Speaker(limits=limits(queued=2)).connected(properties={"receive_maximum": 1})
    speaker.publish(tag=0)
    assert speaker.publish(tag=1, expires_at=speaker.now + 5) == "queued"
    assert speaker.publish(tag=2) == "queued"
    assert speaker.publish(tag=3) == "full"
    speaker.wait(6)
    speaker.say(p.Ack(p.PUBACK, 1))
    assert speaker.taken == [(0, 0), (1, None)]
    assert len(speaker.sent(p.Publish)) == 2


def test_a_packet_id_in_flight_is_not_reused() -> None:
    speaker = Speaker().connected()
    speaker.publish(tag="old")
    speaker.session._last_id = 0xFFFF
    speaker.publish(tag="new")
    assert [message.packet_id for message in speaker.sent(p.Publish)] == [1, 2]


def test_a_message_larger_than_the_clients_maximum_is_not_sent() -> None:
    speaker = Speaker().connected(properties={"maximum_packet": 100})
    assert speaker.publish(b"x" * 100) == "too large"
    assert speaker.publish(b"x" * 60) == "sent"
    assert len(speaker.heard) == 1


def test_qos_0_is_sent_and_not_tracked() -> None:
    speaker = Speaker().connected()
    assert speaker.publish(qos=0) == "sent"
    assert speaker.session.in_flight == 0


@BOTH
def test_messages_in_flight_at_the_end_are_reported_as_unknown(version: int) -> None:
    speaker = Speaker(version=version).connected()
    speaker.publish(tag="lost")
    speaker.session.lost()
    speaker.look()
    assert speaker.taken == [("lost", None)]
    assert speaker.closed is not None
    assert not speaker.closed.by_us


# Time


@BOTH
def test_silence_for_one_and_a_half_keepalives_ends_the_session(version: int) -> None:
    speaker = Speaker(version=version).connected(keepalive=10)
    speaker.wait(14)
    speaker.say(p.Ping())
    speaker.wait(14)
    assert not speaker.told(Closed)
    speaker.raw(encode(said(), version)[:-1])
    speaker.wait(2)
    assert speaker.closed is not None
    assert speaker.closed.reason == Reason.KEEPALIVE
    assert [goodbye.reason for goodbye in speaker.sent(p.Goodbye)] == [Reason.KEEPALIVE][: version - 4]


@BOTH
def test_bytes_that_never_become_a_packet_are_no_sign_of_life(version: int) -> None:
    speaker = Speaker(version=version).connected(keepalive=10)
    slow = encode(said(b"x" * 100), version)
    for number in range(14):
        speaker.raw(slow[number : number + 1])
        speaker.wait(1)
        assert speaker.closed is None
    speaker.wait(1)
    assert speaker.closed is not None
    assert speaker.closed.reason == Reason.KEEPALIVE


def test_without_a_keepalive_a_client_that_does_not_acknowledge_is_cut() -> None:
    speaker = Speaker(version=4).connected(keepalive=0)
    speaker.wait(100_000)
    assert not speaker.told(Closed)
    speaker.publish()
    speaker.wait(29)
    speaker.say(p.Ping())
    speaker.wait(29)
    assert not speaker.told(Closed)
    speaker.wait(2)
    assert speaker.closed is not None


def test_a_client_that_sends_no_connect_is_cut_without_an_answer() -> None:
    speaker = Speaker()
    speaker.raw(encode(p.Connect(client_id="door"), 5)[:-1])
    speaker.wait(9)
    assert not speaker.told(Closed)
    speaker.wait(2)
    assert speaker.closed is not None
    assert speaker.heard == []


def test_a_client_above_its_rate_is_read_later_and_nothing_is_lost() -> None:
    speaker = Speaker(limits=limits(packets_per_sec=10, burst_sec=1)).connected()
    speaker.say(*(said(b"x", each, qos=0) for each in range(30)))
    first = len(speaker.told(p.Publish))
    assert 10 <= first <= 12
    while speaker.session.resume_at is not None:
        assert speaker.session.resume_at > speaker.now
        speaker.now = speaker.session.resume_at
        speaker.session.work(speaker.now)
        speaker.look()
    assert len(speaker.told(p.Publish)) == 30
    assert 1_001.5 <= speaker.now <= 1_002.5


def test_large_packets_count_by_their_bytes() -> None:
    speaker = Speaker(limits=limits(bytes_per_sec=1_000, burst_sec=1)).connected()
    speaker.say(said(b"x" * 5_000))
    assert len(speaker.told(p.Publish)) == 1
    speaker.say(p.Ping())
    assert speaker.session.resume_at == pytest.approx(speaker.now + 4, abs=0.1)


def test_pubacks_for_server_messages_are_not_rate_limited() -> None:
    speaker = Speaker(limits=limits(packets_per_sec=1, burst_sec=1)).connected()
    for each in range(50):
        speaker.publish(tag=each)
        speaker.say(p.Ack(p.PUBACK, each + 1))
    assert len(speaker.taken) == 50
    assert not speaker.session.paused


def test_one_turn_handles_a_bounded_number_of_packets() -> None:
    speaker = Speaker().connected()
    speaker.raw(b"\xc0\x00" * 1_000)
    assert len(speaker.heard) == 200
    assert speaker.session.resume_at == speaker.now
    for _ in range(5):
        speaker.session.work(speaker.now)
        speaker.look()
    assert len(speaker.heard) == 1_000


# The end of a session


WILL = p.Will(topic="iotee/dev/door/status", payload=b"offline")


@BOTH
def test_only_a_disconnect_cancels_the_will(version: int) -> None:
    for say, due in (([p.Goodbye()], False), ([said(qos=1), p.Connect(client_id="door")], True)):
        speaker = Speaker(version=version).connected(will=WILL)
        speaker.say(*say)
        assert speaker.closed is not None
        assert speaker.closed.will is due
    speaker = Speaker(version=version).connected(will=WILL)
    speaker.session.lost()
    speaker.look()
    assert speaker.closed is not None
    assert speaker.closed.will


def test_an_mqtt_5_disconnect_may_request_the_will() -> None:
    speaker = Speaker().connected(will=WILL)
    speaker.say(p.Goodbye(reason=Reason.WITH_WILL))
    assert speaker.closed is not None
    assert speaker.closed.will


@BOTH
def test_after_the_end_nothing_is_read_sent_or_reported(version: int) -> None:
    speaker = Speaker(version=version).connected()
    speaker.say(said(b"a", 1), p.Goodbye(), said(b"b", 2), p.Ping())
    assert len(speaker.told(p.Publish)) == 1
    speaker.acknowledge(1)
    speaker.session.close(Reason.TAKEN_OVER, "again")
    speaker.wait(100)
    speaker.look()
    assert speaker.heard == []
    assert len(speaker.told(Closed)) == 1


# --- what a client may not make us do


def test_bytes_that_come_before_the_connack_are_bounded() -> None:
    speaker = Speaker(limits=limits(connect_bytes=1_000))
    speaker.say(p.Connect(client_id="door"), said(b"x" * 900))
    assert speaker.closed is None
    speaker.raw(b"x" * 100)
    assert [connack.reason for connack in speaker.sent(p.Connack)] == [Reason.TOO_LARGE]


def test_a_client_that_cannot_take_the_connack_is_disconnected() -> None:
    speaker = Speaker().connected(properties={"maximum_packet": 10})
    assert (speaker.session.state, speaker.heard) == ("closed", [])
    speaker = Speaker().connected(properties={"maximum_packet": 60})
    assert speaker.session.state == "open"


def test_an_mqtt_3_client_without_a_client_id_needs_a_clean_session() -> None:
    for clean, code in ((False, [2]), (True, [])):
        speaker = Speaker(version=4)
        speaker.say(p.Connect(client_id="", version=4, clean=clean))
        assert [connack.reason for connack in speaker.sent(p.Connack)] == code


def test_a_disconnect_may_change_the_session_expiry_only_if_there_was_one() -> None:
    for asked, reason in ((0, Reason.PROTOCOL_ERROR), (60, Reason.SUCCESS)):
        speaker = Speaker().connected(properties={"session_expiry": asked})
        speaker.say(p.Goodbye(properties={"session_expiry": 5}))
        assert speaker.closed is not None
        assert speaker.closed.reason == reason


def test_a_client_that_is_not_read_is_not_called_silent() -> None:
    speaker = Speaker().connected(keepalive=10)
    speaker.session.tick(speaker.now + 100, read=False)
    speaker.session.tick(speaker.now + 114)
    speaker.look()
    assert speaker.closed is None
    speaker.session.tick(speaker.now + 115)
    speaker.look()
    assert speaker.closed is not None


def test_a_packet_id_of_qos_2_is_not_taken_for_qos_1_before_its_pubrel() -> None:
    speaker = Speaker(version=4).connected()
    speaker.say(said(b"a", 1, qos=2))
    speaker.acknowledge(1)
    speaker.say(said(b"b", 1, qos=1))
    assert speaker.closed is not None
    assert speaker.closed.reason == Reason.PROTOCOL_ERROR


def test_the_expiry_of_a_message_counts_the_time_that_it_waited() -> None:
    speaker = Speaker().connected(properties={"receive_maximum": 1})
    speaker.publish()
    assert speaker.publish(properties={"expiry": 30}, expires_at=speaker.now + 30) == "queued"
    speaker.now += 10
    speaker.say(p.Ack(p.PUBACK, 1))
    assert speaker.sent(p.Publish)[-1].properties == {"expiry": 20}


def test_websocket_frames_without_a_packet_are_rate_limited() -> None:
    speaker = Speaker(limits=limits(packets_per_sec=10, burst_sec=1)).connected()
    frames = 0
    while not speaker.session.paused and frames < 1_000:
        frames += 1
        speaker.session.frame(speaker.now)
        speaker.raw(b"")
    assert 75 <= frames <= 85


def test_each_filter_counts_as_a_packet_for_the_rate_and_for_one_turn() -> None:
    filters = [p.Filter(f"a/{n}", 1) for n in range(50)]
    speaker = Speaker(limits=limits(packets_at_once=100)).connected()
    speaker.say(*(p.Subscribe(n, filters) for n in range(1, 6)))
    assert len(speaker.told(p.Subscribe)) == 2
    assert speaker.session.resume_at == speaker.now
    speaker = Speaker(limits=limits(packets_per_sec=100, burst_sec=1)).connected()
    speaker.say(*(p.Unsubscribe(n, [each.topic for each in filters]) for n in range(1, 6)))
    assert len(speaker.told(p.Unsubscribe)) == 3
    assert speaker.session.resume_at == pytest.approx(speaker.now + 0.5)


def test_many_user_properties_count_as_more_packets() -> None:
    speaker = Speaker(limits=limits(packets_at_once=100)).connected()
    speaker.say(*(said(b"x", qos=0, properties={"user": [("", "")] * 99}) for _ in range(20)))
    assert len(speaker.told(p.Publish)) == 8
