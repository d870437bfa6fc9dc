"""The list of Eclipse Paho's interoperability tests, with the paho client: what the listener does with each.

What it does not have by design (sessions, retained messages, topic aliases, QoS 2 in MQTT 5) must be said
with the reason code of the standard, so that a client library can act on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from broker.mqtt.packets import Reason
from tests.integration.mqtt.listener_support import ACK, RLS, STATUS, TOKENS, Owner, Server, listening

V311, V5 = MQTTProtocolVersion.MQTTv311, MQTTProtocolVersion.MQTTv5
BOTH = pytest.mark.parametrize("version", [V311, V5], ids=["3.1.1", "5"])


class Device:
    """A paho client in its own thread. The lists hold what its callbacks were told."""

    def __init__(self, owner: Owner, version: MQTTProtocolVersion, client_id: str, **more: Any) -> None:
        self.owner = owner
        more |= {"client_id": client_id, "protocol": version, "reconnect_on_failure": False}
        self.client = Client(CallbackAPIVersion.VERSION2, **more)
        self.client.username_pw_set("door", TOKENS["door"])
        self.connacks: list[tuple[int, bool, Any]] = []
        self.granted: list[list[int]] = []
        self.released: list[list[int]] = []
        self.published: list[int] = []
        self.messages: list[MQTTMessage] = []
        self.ends: list[int] = []
        self.client.on_connect = lambda _c, _u, flags, code, told: self.connacks.append(
            (code.value, flags.session_present, told)
        )
        self.client.on_subscribe = lambda _c, _u, _m, codes, _p: self.granted.append([c.value for c in codes])
        self.client.on_unsubscribe = lambda _c, _u, _m, codes, _p: self.released.append(
            [c.value for c in codes]
        )
        self.client.on_publish = lambda _c, _u, _m, code, _p: self.published.append(code.value)
        self.client.on_message = lambda _c, _u, message: self.messages.append(message)
        self.client.on_disconnect = lambda _c, _u, _f, code, _p: self.ends.append(code.value)

    async def until(self, fact: Callable[[], bool]) -> None:
        await self.owner.until(fact)

    async def subscribe(self, *wanted: Any) -> list[int]:
        before = len(self.granted)
        self.client.subscribe(list(wanted))
        await self.until(lambda: len(self.granted) > before)
        return self.granted[-1]


def properties(packet: int, **values: Any) -> Properties:
    made = Properties(packet)  # type: ignore[no-untyped-call]
    for name, value in values.items():
        setattr(made, name, value)
    return made


@contextlib.asynccontextmanager
async def connected(
    owner: Owner,
    server: Server,
    version: MQTTProtocolVersion,
    *,
    client_id: str = "door",
    keepalive: int = 60,
    will: Any = None,
    asks: dict[str, Any] | None = None,
    **more: Any,
) -> AsyncIterator[Device]:
    device = Device(owner, version, client_id, **more)
    if will is not None:
        device.client.will_set(*will)
    asked = properties(PacketTypes.CONNECT, **asks) if asks else None
    device.client.connect_async(server.host, server.port, keepalive=keepalive, properties=asked)
    device.client.loop_start()
    try:
        await device.until(lambda: len(device.connacks) > 0)
        yield device
    finally:
        device.client.disconnect()
        await asyncio.to_thread(device.client.loop_stop)


@BOTH
async def test_every_qos_that_the_version_allows_is_taken(version: MQTTProtocolVersion) -> None:
    owner = Owner()
    async with listening(owner) as server, connected(owner, server, version) as door:
        for qos in (0, 1):
            door.client.publish(ACK, b"%d" % qos, qos)
        await door.until(lambda: owner.payloads == [b"0", b"1"] and len(door.published) == 2)
        door.client.publish(ACK, b"2", 2)
        if version == V311:
            await door.until(lambda: owner.payloads == [b"0", b"1", b"2"] and len(door.published) == 3)
        else:
            await door.until(lambda: len(door.ends) > 0)
            assert door.connacks[0][2].MaximumQoS == 1
            assert (door.ends[0], owner.payloads) == (Reason.QOS, [b"0", b"1"])


@BOTH
async def test_a_device_that_asks_for_a_session_is_told_that_there_is_none(
    version: MQTTProtocolVersion,
) -> None:
    owner = Owner()
    async with listening(owner) as server:
        more: Any = {"clean_session": False} if version == V311 else {"asks": {"SessionExpiryInterval": 600}}
        for _ in range(2):
            async with connected(owner, server, version, **more) as door:
                _, present, told = door.connacks[0]
                assert not present
                assert version == V311 or told.SessionExpiryInterval == 0
                await door.subscribe((RLS, 1))
            await owner.until(lambda: server.connected == 0)
            owner.send(b"while away")
            await owner.until(lambda: len(owner.receipts) > 0)
            assert owner.receipts.pop().reason == Reason.NO_SUBSCRIBER
        assert door.messages == []


@pytest.mark.parametrize(("version", "client_id"), [(V311, "gate"), (V5, "gate"), (V5, "")])
async def test_a_device_needs_its_name_as_client_id(version: MQTTProtocolVersion, client_id: str) -> None:
    owner = Owner()
    async with listening(owner) as server, connected(owner, server, version, client_id=client_id) as other:
        # paho shows the codes of MQTT 3.1.1 as those of MQTT 5.
        assert other.connacks[0][0] == Reason.WRONG_CLIENT_ID


@BOTH
async def test_overlapping_subscriptions_deliver_one_copy_with_the_highest_qos(
    version: MQTTProtocolVersion,
) -> None:
    owner = Owner()
    async with listening(owner) as server, connected(owner, server, version) as door:
        assert await door.subscribe(("iotee/dev/door/#", 0), (RLS, 2), ("iotee/dev/+/rls", 0)) == [0, 1, 0]
        owner.send(b"1")
        owner.send(b"2")
        await door.until(lambda: len(door.messages) >= 2)
        assert [(each.payload, each.qos) for each in door.messages] == [(b"1", 1), (b"2", 1)]


@BOTH
async def test_a_refused_filter_has_its_code_and_the_others_are_granted(version: MQTTProtocolVersion) -> None:
    owner = Owner()
    async with listening(owner) as server, connected(owner, server, version) as door:
        codes = await door.subscribe((RLS, 1), ("$SYS/#", 0), ("iotee/dev/gate/rls", 1))
        refused = Reason.NOT_AUTHORIZED if version == V5 else Reason.UNSPECIFIED
        assert codes == [1, refused, refused]


@BOTH
async def test_after_unsubscribing_nothing_comes(version: MQTTProtocolVersion) -> None:
    owner = Owner()
    async with listening(owner) as server, connected(owner, server, version) as door:
        await door.subscribe((RLS, 1))
        door.client.unsubscribe([RLS, "iotee/dev/door/never"])
        await door.until(lambda: len(door.released) > 0)
        if version == V5:
            assert door.released == [[Reason.SUCCESS, Reason.NO_SUBSCRIPTION]]
        assert owner.presence == ["door online", "door offline"]
        owner.send(b"lock")
        await door.until(lambda: [each.reason for each in owner.receipts] == [Reason.NO_SUBSCRIBER])


@BOTH
async def test_a_filter_that_comes_again_has_its_new_qos(version: MQTTProtocolVersion) -> None:
    owner = Owner()
    async with listening(owner) as server, connected(owner, server, version) as door:
        assert await door.subscribe((RLS, 1)) == [1]
        assert await door.subscribe((RLS, 0)) == [0]
        owner.send(b"lock")
        await door.until(lambda: len(door.messages) == 1)
        assert door.messages[0].qos == 0
        assert owner.presence == ["door online"]


@BOTH
async def test_a_message_sent_before_an_unsubscribe_is_delivered(version: MQTTProtocolVersion) -> None:
    owner = Owner()
    async with listening(owner) as server, connected(owner, server, version, manual_ack=True) as door:
        await door.subscribe((RLS, 1))
        owner.send(b"lock")
        door.client.unsubscribe(RLS)
        await door.until(lambda: len(door.released) == 1 and len(door.messages) == 1)
        assert owner.receipts == []
        door.client.ack(door.messages[0].mid, 1)
        await door.until(lambda: [each.reason for each in owner.receipts] == [Reason.SUCCESS])


@BOTH
async def test_a_will_is_sent_at_once_when_the_connection_breaks(version: MQTTProtocolVersion) -> None:
    owner = Owner()
    will = properties(PacketTypes.WILLMESSAGE, WillDelayInterval=60) if version == V5 else None
    async with listening(owner) as server:
        async with connected(owner, server, version, will=(STATUS, b"offline", 1, False, will)):
            pass  # it says goodbye
        await owner.until(lambda: server.connected == 0)
        assert owner.payloads == []
        async with connected(owner, server, version, will=(STATUS, b"offline", 1, False, will)) as door:
            cut: Any = door.client.socket()
            cut.shutdown(socket.SHUT_RDWR)
            await owner.until(lambda: owner.payloads == [b"offline"])


async def test_a_will_of_qos_2_is_refused_in_mqtt_5() -> None:
    owner = Owner()
    async with listening(owner) as server:
        async with connected(owner, server, V5, will=(STATUS, b"offline", 2)) as door:
            assert door.connacks[0][0] == Reason.QOS
        async with connected(owner, server, V311, will=(STATUS, b"offline", 2)) as door:
            assert door.connacks[0][0] == Reason.SUCCESS


async def test_the_options_of_a_subscription_are_accepted() -> None:
    owner = Owner()
    async with listening(owner) as server, connected(owner, server, V5) as door:
        options = SubscribeOptions(qos=1, noLocal=True, retainAsPublished=True, retainHandling=2)
        assert await door.subscribe((RLS, options)) == [1]


async def test_topic_aliases_are_not_used_and_not_taken() -> None:
    owner = Owner()
    async with listening(owner) as server:
        async with connected(owner, server, V5, asks={"TopicAliasMaximum": 10}) as door:
            assert door.connacks[0][2].TopicAliasMaximum == 0
            await door.subscribe((RLS, 1))
            owner.send(b"1")
            owner.send(b"2")
            await door.until(lambda: len(door.messages) == 2)
            assert {each.topic for each in door.messages} == {RLS}
            door.client.publish(ACK, b"ok", 1, properties=properties(PacketTypes.PUBLISH, TopicAlias=1))
            await door.until(lambda: door.ends == [Reason.BAD_ALIAS])
        assert owner.payloads == []


@pytest.mark.parametrize(("asked", "told"), [(60, None), (0, 300), (65_535, 300)])
async def test_a_keepalive_that_the_server_does_not_allow_is_replaced(asked: int, told: int | None) -> None:
    owner = Owner()
    async with listening(owner) as server, connected(owner, server, V5, keepalive=asked) as door:
        assert getattr(door.connacks[0][2], "ServerKeepAlive", None) == told


async def test_no_more_messages_than_its_receive_maximum_wait_for_a_client() -> None:
    owner = Owner()
    asks = {"ReceiveMaximum": 2}
    async with (
        listening(owner) as server,
        connected(owner, server, V5, asks=asks, manual_ack=True) as door,
    ):
        await door.subscribe((RLS, 1))
        for number in range(5):
            owner.send(b"%d" % number)
        door.client.publish(ACK, b"after them", 1)
        await door.until(lambda: len(door.published) == 1)  # its PUBACK came behind what was sent before
        assert [each.payload for each in door.messages] == [b"0", b"1"]
        for number in range(5):
            await door.until(lambda: len(door.messages) > number)  # noqa: B023
            door.client.ack(door.messages[number].mid, 1)
        await door.until(lambda: len(owner.receipts) == 5)
        assert [each.payload for each in door.messages] == [b"0", b"1", b"2", b"3", b"4"]


async def test_a_client_that_keeps_to_the_servers_receive_maximum_may_send_any_number() -> None:
    owner = Owner(takes=False)
    async with listening(owner) as server, connected(owner, server, V5) as door:
        assert door.connacks[0][2].ReceiveMaximum == 20
        for number in range(50):
            door.client.publish(ACK, b"%d" % number, 1)
        for number in range(50):
            await owner.until(lambda: len(owner.messages) > number)  # noqa: B023
            assert len(owner.messages) <= number + 20
            owner.listener.puback(owner.messages[number])
        await door.until(lambda: len(door.published) == 50)
        assert owner.payloads == [b"%d" % number for number in range(50)]


async def test_no_packet_is_larger_than_the_other_side_allows() -> None:
    owner = Owner()
    async with (
        listening(owner, packet_bytes=2_000) as server,
        connected(owner, server, V5, asks={"MaximumPacketSize": 100}) as door,
    ):
        assert door.connacks[0][2].MaximumPacketSize == 2_000
        await door.subscribe((RLS, 1))
        owner.send(bytes(100))
        owner.send(b"short")
        await door.until(lambda: [each.reason for each in owner.receipts] == [Reason.TOO_LARGE, 0])
        assert [each.payload for each in door.messages] == [b"short"]
        door.client.publish(ACK, bytes(2_000), 1)
        await door.until(lambda: door.ends == [Reason.TOO_LARGE])


async def test_the_properties_of_requests_and_answers_pass_both_ways() -> None:
    owner = Owner()
    async with listening(owner) as server, connected(owner, server, V5) as door:
        await door.subscribe((RLS, 1))
        more: Any = {"correlation": b"cmd_1", "expiry_sec": 30, "response_topic": ACK}
        owner.send(b"{}", user_properties=(("attempt", "2"),), **more)
        await door.until(lambda: len(door.messages) == 1)
        told: Any = door.messages[0].properties
        assert (told.CorrelationData, told.ResponseTopic) == (b"cmd_1", ACK)
        assert (told.MessageExpiryInterval, told.UserProperty) == (30, [("attempt", "2")])
        said = properties(
            PacketTypes.PUBLISH,
            PayloadFormatIndicator=1,
            MessageExpiryInterval=60,
            ContentType="application/json",
            ResponseTopic="a/b",
            CorrelationData=b"cmd_1",
            UserProperty=[("a", "1"), ("a", "2")],
        )
        door.client.publish(ACK, b"{}", 1, retain=True, properties=said)
        await door.until(lambda: door.published == [Reason.SUCCESS])
        assert [(each.correlation, each.retain) for each in owner.messages] == [(b"cmd_1", False)]
