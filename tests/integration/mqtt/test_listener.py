"""The listener with real clients: authentication, topics, presence, PUBACKs and bounds."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from typing import Any

import aiomqtt
import pytest
from structlog.testing import capture_logs

from broker.mqtt import packets as p
from broker.mqtt.packets import Reason
from broker.seams import Receipt
from devices.mqtt_url import Endpoint
from tests.conftest import program
from tests.integration.mqtt.listener_support import (
    ACK,
    REFUSED,
    RLS,
    STATUS,
    TOKENS,
    V5,
    V311,
    Owner,
    connect,
    device,
    listening,
    raw,
    said,
    subscribe,
)
from tests.integration.mqtt.test_link import DEADLINE_SEC, until_logged

VERSIONS = pytest.mark.parametrize("version", [V311, V5], ids=["3.1.1", "5"])
BOTH = pytest.mark.parametrize("version", [4, 5])


async def code_of(client: aiomqtt.Client, topic: str) -> int:
    (code,) = await client.subscribe(topic, qos=1)
    return code if isinstance(code, int) else code.value


def drop(client: aiomqtt.Client) -> None:
    client._client._sock_close()


@VERSIONS
async def test_a_command_and_its_answer_make_the_round_trip(version: Any) -> None:
    owner = Owner()
    async with listening(owner) as server, device(server, protocol=version) as door:
        assert await code_of(door, RLS) == 1
        owner.send(b"1", correlation=b"cmd_1", expiry_sec=9, user_properties=(("attempt", "1"),))
        command = await anext(aiter(door.messages))
        assert (command.payload, command.qos, command.retain) == (b"1", 1, False)
        if version is V5:
            properties: Any = command.properties
            assert properties.CorrelationData == b"cmd_1"
            assert properties.MessageExpiryInterval == 9
            assert properties.UserProperty == [("attempt", "1")]
        await owner.until(lambda: owner.receipts == [Receipt(written=True, reason=0)])
        await door.publish(ACK, b"ok", qos=1)
        assert owner.payloads == [b"ok"]


@VERSIONS
async def test_a_hundred_commands_at_once_reach_the_device_in_order(version: Any) -> None:
    owner = Owner()
    async with listening(owner) as server, device(server, protocol=version) as door:
        await door.subscribe(RLS, qos=1)
        for number in range(100):
            owner.send(str(number).encode())
        arrived = [(await anext(aiter(door.messages))).payload for _ in range(100)]
        assert arrived == [str(number).encode() for number in range(100)]
        await owner.until(lambda: len(owner.receipts) == 100)


# 1: who gets in


@BOTH
@pytest.mark.parametrize(
    ("wrong", "reason", "code"),
    [
        ({"user": None, "password": None}, Reason.NOT_AUTHORIZED, 5),
        ({"password": None}, Reason.NOT_AUTHORIZED, 5),
        ({"password": b"dtok-gate"}, Reason.NOT_AUTHORIZED, 5),
        ({"password": b"dtok-door\0"}, Reason.NOT_AUTHORIZED, 5),
        ({"password": b"\xff"}, Reason.NOT_AUTHORIZED, 5),
        ({"client_id": "gate"}, Reason.WRONG_CLIENT_ID, 2),
        ({"client_id": "stranger", "user": "stranger"}, Reason.NOT_AUTHORIZED, 5),
        ({"client_id": "a/b", "user": "a/b"}, Reason.NOT_AUTHORIZED, 5),
        ({"client_id": ""}, Reason.WRONG_CLIENT_ID, 2),
        ({"user": "ordain", "client_id": "ordain"}, Reason.NOT_AUTHORIZED, 5),
        ({"user": "service", "client_id": "x"}, Reason.NOT_AUTHORIZED, 5),
        ({"will": p.Will(topic="iotee/dev/gate/rls", payload=b"0")}, Reason.BAD_TOPIC, 3),
        ({"will": p.Will(topic="iotee/dev/gate/status", payload=b"x")}, Reason.BAD_TOPIC, 3),
        ({"will": p.Will(topic=ACK, payload=b"ok")}, Reason.BAD_TOPIC, 3),
    ],
    ids=str,
)
async def test_a_client_with_wrong_credentials_is_refused_with_a_reason(
    version: int, wrong: dict[str, Any], reason: int, code: int
) -> None:
    owner = Owner()
    with capture_logs() as logs:
        async with listening(owner) as server, raw(server, version=version, greeting=False) as client:
            packet = connect(version=version)
            for field, value in wrong.items():
                setattr(packet, field, value)
            if version == 4 and packet.user is None:
                packet.password = None
            client.say(packet)
            (connack,) = await client.ended()
            assert isinstance(connack, p.Connack)
            assert connack.reason == (reason if version == 5 else code)
            assert server.connected == 0
            if version == 5:
                assert connack.properties["reason_string"]
            assert server.listener.refusals[reason] == 1
        (line,) = [line for line in logs if line["event"] == "mqtt.refused"]
        assert line["why"]
        assert "dtok" not in str(line)


async def test_a_device_with_its_token_is_accepted() -> None:
    owner = Owner()
    will = aiomqtt.Will(STATUS, b"offline", qos=1, retain=True)
    async with listening(owner) as server, device(server, will=will):
        assert server.connected == 1


async def test_an_unknown_name_and_a_wrong_token_take_the_same_time() -> None:
    owner = Owner()
    async with listening(owner) as server:
        loop, took = asyncio.get_running_loop(), []
        for packet in (connect("nobody", password=b"x"), connect(password=b"x")):
            async with raw(server, greeting=False) as client:
                since = loop.time()
                client.say(packet)
                await client.ended()
                took.append(loop.time() - since)
        assert min(took) >= 0.25


async def test_an_error_of_the_broker_is_never_answered_as_not_authorised() -> None:
    class Broken(Owner):
        async def check(self, hardware_id: str, token: str | None) -> str | None:
            raise OSError("the disk is gone")

    for version, code in ((4, 3), (5, Reason.UNAVAILABLE)):
        with capture_logs():
            async with listening(Broken()) as server, raw(server, version=version, greeting=False) as client:
                client.say(connect(version=version))
                (connack,) = await client.ended()
                assert isinstance(connack, p.Connack)
                assert connack.reason == code


async def test_a_client_that_cannot_be_served_in_time_is_told_to_try_later() -> None:
    owner = Owner()
    owner.may_answer.clear()
    async with listening(owner, admit_within_sec=0.2) as server, raw(server, greeting=False) as client:
        client.say(connect())
        (connack,) = await client.ended()
        assert isinstance(connack, p.Connack)
        assert connack.reason == Reason.CONNECTION_RATE


# 2: which topics


@pytest.mark.parametrize("topic", ["iotee/dev/+/status", "$SYS/#", "iotee/dev/gate/rls", ACK, "iotee/evt/#"])
async def test_a_device_subscribes_to_nothing_but_its_own_commands(topic: str) -> None:
    owner = Owner()
    for version, code in ((V5, Reason.NOT_AUTHORIZED), (V311, REFUSED)):
        async with listening(owner) as server, device(server, protocol=version) as door:
            assert await code_of(door, topic) == code
            assert await code_of(door, "iotee/dev/door/rbt") == 1


@pytest.mark.parametrize("topic", ["#", "iotee/#", "iotee/dev/door/#", "iotee/dev/+/rls", "+/+/+/+"])
async def test_a_filter_that_covers_more_delivers_own_commands_only(topic: str) -> None:
    owner = Owner()
    async with listening(owner) as server, device(server) as door, device(server, "gate") as gate:
        assert await code_of(door, topic) == 1
        await gate.subscribe("iotee/dev/gate/rls", qos=1)
        owner.send(b"gate's", "iotee/dev/gate/rls")
        await gate.publish("iotee/dev/gate/ack", b"ok", qos=1)
        owner.send(b"door's")
        assert (await anext(aiter(door.messages))).payload == b"door's"
        assert len(door.messages) == 0


@pytest.mark.parametrize(
    ("topic", "code"),
    [
        ("iotee/dev/door/#/rls", Reason.BAD_FILTER),
        ("iotee/dev/door+/rls", Reason.BAD_FILTER),
        ("$share/g/iotee/dev/door/rls", Reason.NO_SHARED),
    ],
)
async def test_a_filter_that_cannot_be_is_refused_by_itself(topic: str, code: int) -> None:
    owner = Owner()
    async with listening(owner) as server, raw(server) as client:
        client.say(subscribe(RLS, topic, "iotee/dev/door/rbt"))
        assert await client.hear() == p.Granted(p.SUBACK, 9, [1, code, 1])


async def test_a_message_on_a_foreign_topic_is_refused_and_kept_without_a_device() -> None:
    owner = Owner()
    foreign = ("iotee/dev/gate/rls", "iotee/dev/gate/ack", RLS, "iotee/evt/door/cmd_1", "elsewhere")
    async with listening(owner) as server, device(server) as door, device(server, "gate") as gate:
        await gate.subscribe("iotee/dev/gate/rls", qos=1)
        for topic in foreign:
            await door.publish(topic, b"forged", qos=1)
        await door.publish(STATUS, b"online", qos=1)
        await door.publish(ACK, b"ok", qos=1)
        assert [message.foreign for message in owner.messages] == ["door"] * len(foreign) + [None, None]
        assert len(gate.messages) == 0
        assert server.listener.counts["denied"] == len(foreign)


async def test_a_puback_says_why_and_the_connection_stays() -> None:
    owner = Owner(takes=False)
    async with listening(owner) as server, raw(server) as client:
        client.say(said(b"nonsense"))
        await owner.until(lambda: len(owner.messages) == 1)
        server.listener.puback(owner.messages[0], Reason.BAD_FORMAT, "not an answer")
        wanted = p.Ack(p.PUBACK, 1, Reason.BAD_FORMAT, {"reason_string": "not an answer"})
        assert await client.hear() == wanted
        client.say(p.Ping())
        assert await client.hear() == p.Ping(p.PINGRESP)


async def test_a_device_with_a_subscription_identifier_is_disconnected_with_the_reason() -> None:
    owner = Owner()
    async with listening(owner) as server, raw(server) as client:
        client.say(p.Subscribe(1, [p.Filter(RLS, 1)], {"subscription_id": [1]}))
        goodbye = (await client.ended())[-1]
        assert isinstance(goodbye, p.Goodbye)
        assert goodbye.reason == Reason.NO_SUBSCRIPTION_IDS


# 3: nothing is kept


async def test_retained_messages_and_wills_are_delivered_and_not_kept() -> None:
    owner = Owner()
    will = aiomqtt.Will(STATUS, b"offline", qos=1, retain=True)
    async with listening(owner) as server:
        async with device(server, will=will) as door:
            await door.publish(STATUS, b"online", qos=1, retain=True)
        client = device(server, will=will)
        await client.__aenter__()
        drop(client)
        await owner.until(lambda: owner.payloads == [b"online", b"offline"])
        assert not any(message.retain for message in owner.messages)
        async with device(server) as door:
            await door.subscribe(RLS, qos=1)
            owner.send(b"first")
            assert (await anext(aiter(door.messages))).payload == b"first"


async def test_a_device_that_asks_for_a_session_gets_none() -> None:
    owner = Owner()
    async with listening(owner) as server:
        for _ in range(2):
            async with raw(server, version=4, greeting=False) as client:
                client.say(connect(version=4, clean=False))
                assert await client.hear() == p.Connack(0, session_present=False)
                client.say(subscribe())
                await client.hear()
                client.say(p.Goodbye())
                await client.ended()
            owner.send(b"missed")
        await owner.until(lambda: len(owner.receipts) == 2)
        assert {receipt.reason for receipt in owner.receipts} == {Reason.NO_SUBSCRIBER}


# 4: taking over


async def test_without_the_token_a_client_id_cannot_be_taken_over() -> None:
    owner = Owner()
    will = aiomqtt.Will(STATUS, b"offline", qos=1)
    async with listening(owner) as server, device(server, will=will) as door:
        await door.subscribe(RLS, qos=1)
        for wrong in ({"password": "guess"}, {"password": "guess", "protocol": V311}, {"username": "gate"}):
            with pytest.raises(aiomqtt.MqttError):
                async with device(server, **wrong):
                    pytest.fail("it was let in")
        assert owner.presence == ["door online"]
        owner.send(b"1")
        assert (await anext(aiter(door.messages))).payload == b"1"


@BOTH
async def test_a_second_connection_closes_the_first_and_ends_as_online(version: int) -> None:
    owner = Owner()
    async with listening(owner) as server, raw(server, version=version) as first:
        first.say(subscribe(), said(b"before"))
        await first.hear()
        await first.hear()
        async with device(server) as second:
            last = await first.ended()
            reasons = [packet.reason for packet in last if isinstance(packet, p.Goodbye)]
            assert reasons == ([Reason.TAKEN_OVER] if version == 5 else [])
            await second.subscribe(RLS, qos=1)
            assert owner.presence == ["door online", "door offline", "door online"]
            owner.send(b"1")
            assert (await anext(aiter(second.messages))).payload == b"1"
            assert (server.connected, owner.payloads) == (1, [b"before"])


async def test_of_many_connections_at_once_one_remains() -> None:
    owner = Owner()
    async with listening(owner) as server:
        clients = [await asyncio.open_connection(server.host, server.port) for _ in range(10)]
        for _, writer in reversed(clients):
            writer.write(p_connect())
        await owner.until(lambda: server.listener.crowd.strangers == 0 and server.listener.connections == 1)
        assert server.connected == 1
        answers = [await reader.read(4) for reader, _ in clients]
        assert b"\x20\x02\x00\x00" in answers
        for _, writer in clients:
            writer.close()


async def test_two_rivals_under_one_name_are_slowed_down() -> None:
    owner = Owner()
    async with listening(owner) as server:
        loop = asyncio.get_running_loop()
        clients, since = [], loop.time()
        for _ in range(6):
            reader, writer = await asyncio.open_connection(server.host, server.port)
            writer.write(p_connect())
            async with asyncio.timeout(DEADLINE_SEC):
                await reader.readexactly(4)
            clients.append(writer)
        assert loop.time() - since >= 0.7
        assert server.listener.admission.damped == 3
        for writer in clients:
            writer.close()


def p_connect() -> bytes:
    from broker.mqtt.codec import encode

    return encode(connect(version=4), 4)


# 5: presence


async def test_a_device_is_online_while_it_is_connected_and_subscribed_to_each_topic() -> None:
    owner = Owner()
    async with listening(owner) as server:
        async with device(server) as door:
            await door.publish(STATUS, b"online", qos=1)
            assert owner.presence == []
            await door.subscribe("iotee/dev/door/rbt", qos=1)
            assert owner.presence == ["door online"]
            assert not server.listener.listens(RLS)
            await door.subscribe(RLS, qos=1)
            assert server.listener.listens(RLS)
            assert owner.presence == ["door online", "door online"]
            await door.unsubscribe(RLS)
            assert not server.listener.listens(RLS)
            assert owner.presence == ["door online", "door online"]
            await door.unsubscribe("iotee/dev/door/rbt")
            assert owner.presence[2:] == ["door offline"]
            await door.subscribe(RLS, qos=1)
        await owner.until(lambda: owner.presence[3:] == ["door online", "door offline"])


async def test_a_device_that_is_cut_off_is_offline_and_its_will_is_sent() -> None:
    owner = Owner()
    async with listening(owner) as server:
        client = device(server, will=aiomqtt.Will(STATUS, b"offline", qos=1))
        await client.__aenter__()
        await client.subscribe(RLS, qos=1)
        drop(client)
        await owner.until(lambda: owner.presence == ["door online", "door offline"])
        assert owner.payloads == [b"offline"]


@VERSIONS
async def test_a_device_that_says_goodbye_loses_nothing_and_sends_no_will(version: Any) -> None:
    owner = Owner()
    async with listening(owner) as server:
        will = aiomqtt.Will(STATUS, b"offline", qos=1)
        async with device(server, will=will, protocol=version) as door:
            for number in range(200):
                await door.publish(ACK, str(number), qos=number % 2)
        async with device(server) as door:
            await door.publish(ACK, b"last", qos=1)
        assert owner.payloads == [*(str(number).encode() for number in range(200)), b"last"]


# 6: what does not read, write or end as it should


@BOTH
async def test_a_connection_silent_for_one_and_a_half_keepalives_is_closed(version: int) -> None:
    owner = Owner()
    async with listening(owner) as server, raw(server, version=version, keepalive=1) as client:
        client.say(subscribe())
        client.writer.write(b"\x30\x10\x00")  # half a packet is silence too
        last = await client.ended()
        assert [each.reason for each in last if isinstance(each, p.Goodbye)] == (
            [Reason.KEEPALIVE] if version == 5 else []
        )
        assert owner.presence == ["door online", "door offline"]


async def test_a_connection_without_connect_is_closed() -> None:
    owner = Owner()
    async with listening(owner, connect_sec=0.1) as server:
        for sent in (b"", b"\x10\x20\x00\x04MQTT"):
            async with raw(server, greeting=False) as client:
                client.writer.write(sent)
                assert await client.ended() == []


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00",
        b"\x10\x00",
        b"\x10\xff\xff\xff\xff\x01",
        b"\x10\xff\xff\x7f",
        b"\x30\x05\x00\x03a/bx",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c",  # a proxy that is not trusted
    ],
    ids=repr,
)
@pytest.mark.parametrize("first", [False, True])
async def test_nonsense_costs_its_own_connection_and_no_other(nonsense: bytes, first: bool) -> None:
    owner = Owner()
    async with listening(owner) as server, device(server, "gate") as gate:
        async with raw(server, greeting=first) as client:
            client.writer.write(nonsense)
            client.writer.write_eof()
            await client.ended()
        await gate.publish("iotee/dev/gate/ack", b"ok", qos=1)
        assert owner.payloads == [b"ok"]
        assert server.connected == 1


async def test_an_old_version_is_told_which_ones_are_spoken() -> None:
    owner = Owner()
    async with listening(owner) as server, raw(server, greeting=False, version=4) as client:
        client.writer.write(b"\x10\x10\x00\x06MQIsdp\x03\x02\x00\x3c\x00\x02ab")
        assert await client.ended() == [p.Connack(1)]


@BOTH
async def test_a_too_large_packet_closes_the_connection(version: int) -> None:
    owner = Owner()
    async with listening(owner, packet_bytes=2_000) as server, raw(server, version=version) as client:
        client.say(said(b"x" * 1_900))
        await client.hear()
        client.say(said(b"x" * 2_000, 2))
        last = await client.ended()
        assert [each.reason for each in last if isinstance(each, p.Goodbye)] == (
            [Reason.TOO_LARGE] if version == 5 else []
        )


async def test_a_client_that_does_not_read_is_not_read_either_and_cut_in_the_end() -> None:
    owner = Owner()
    async with listening(owner, stalled_sec=0.3) as server:
        reader, writer = await asyncio.open_connection(server.host, server.port, limit=1)
        writer.write(p_connect())
        async with asyncio.timeout(DEADLINE_SEC):
            while not writer.is_closing():
                with contextlib.suppress(ConnectionError):
                    writer.write(b"\xc0\x00" * 50_000)
                    await writer.drain()
        assert server.listener.connected == 0
        writer.close()
        del reader


async def test_beyond_its_rate_a_device_is_slowed() -> None:
    owner = Owner()
    async with listening(owner, packets_per_sec=200, burst_sec=0.1) as server, raw(server) as loud:
        loop = asyncio.get_running_loop()
        since = loop.time()
        loud.say(*(said(b"x", qos=0, packet_id=0) for _ in range(220)), p.Ping())
        assert await loud.hear() == p.Ping(p.PINGRESP)
        assert loop.time() - since >= 0.9
        assert len(owner.messages) == 220
        assert server.listener.counts["slowed"] >= 1


async def test_a_device_in_debt_for_ten_minutes_delays_no_neighbour() -> None:
    owner = Owner()
    async with (
        listening(owner, bytes_per_sec=100, burst_sec=10) as server,
        raw(server) as loud,
        device(server, "gate") as gate,
    ):
        loud.say(said(b"x" * 60_000, qos=0, packet_id=0), p.Ping())
        await owner.until(lambda: len(owner.messages) == 1)
        await gate.publish("iotee/dev/gate/ack", b"ok", qos=1)
        assert len(owner.messages) == 2
        assert server.listener.counts["slowed"] >= 1


async def test_unacknowledged_bytes_of_all_are_bounded_and_nothing_is_lost() -> None:
    owner = Owner(takes=False)
    async with listening(owner, unacknowledged_bytes=65_536) as server, raw(server) as client:
        client.say(*(said(b"x" * 20_000, each) for each in range(1, 11)))
        await owner.until(lambda: server.listener.counts["held"] == 1)
        assert len(owner.messages) < 10
        for number in range(10):
            await owner.until(lambda number=number: len(owner.messages) > number)  # type: ignore[misc]
            server.listener.puback(owner.messages[number])
        assert [packet.packet_id for packet in [await client.hear() for _ in range(10)]] == [  # type: ignore[union-attr]
            *range(1, 11)
        ]
        assert server.listener.unacknowledged == 0


async def test_small_messages_that_wait_count_by_what_they_cost() -> None:
    owner = Owner(takes=False)
    async with listening(owner, unacknowledged_bytes=65_536, receive_maximum=200) as server:
        async with raw(server) as client:
            client.say(*(said(b"x", each) for each in range(1, 101)))
            await owner.until(lambda: server.listener.counts["held"] == 1)
            for message in owner.messages:
                server.listener.puback(message)
            await owner.until(lambda: len(owner.messages) == 100)


async def test_a_device_that_is_held_is_not_cut_as_silent() -> None:
    owner = Owner(takes=False)
    async with listening(owner, unacknowledged_bytes=65_536) as server:
        async with raw(server, keepalive=1) as client:
            client.say(*(said(b"x" * 50_000, each) for each in (1, 2)))
            await owner.until(lambda: server.listener.counts["held"] == 1)
            loop = asyncio.get_running_loop()
            until = loop.time() + 1.8
            await owner.until(lambda: loop.time() > until)
            for message in owner.messages:
                server.listener.puback(message)
            assert isinstance(await client.hear(), p.Ack)


async def test_a_client_that_hangs_up_before_its_verdict_uses_up_no_turn() -> None:
    owner = Owner()
    owner.may_answer.clear()
    async with listening(owner, admitted_at_once=1, admit_within_sec=600.0) as server:
        async with raw(server, greeting=False) as first:
            first.say(connect())
            await owner.asked.wait()
        await owner.until(lambda: server.listener.connections == 0)
        owner.may_answer.set()
        async with device(server, "gate"):
            assert server.connected == 1
        assert server.listener.counts["let_in"] == 1


async def test_many_connections_are_looked_at_in_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.mqtt.crowd.LOOKED_AT_ONCE", 2)
    owner = Owner()
    async with listening(owner, connect_sec=0.2) as server:
        clients = [await asyncio.open_connection(server.host, server.port) for _ in range(5)]
        async with asyncio.timeout(DEADLINE_SEC):
            for reader, writer in clients:
                assert await reader.read() == b""
                writer.close()
        assert server.listener.connections == 0


async def test_connections_are_bounded_in_all_and_those_of_strangers_too() -> None:
    owner = Owner()
    async with listening(owner, connections=3, strangers=2) as server:
        async with device(server), device(server, "gate"):
            async with raw(server, greeting=False):
                async with raw(server, greeting=False) as fourth:
                    assert await fourth.ended() == []
        async with raw(server, greeting=False), raw(server, greeting=False):
            async with raw(server, greeting=False) as third:
                assert await third.ended() == []
        await owner.until(lambda: server.listener.crowd.strangers == 0)
        async with device(server):
            assert server.listener.counts["turned_away"] == 2


async def test_refusals_are_logged_a_few_at_a_time_and_names_are_cut() -> None:
    owner = Owner()
    with capture_logs() as logs:
        async with listening(owner) as server:

            async def refused() -> None:
                async with raw(server, greeting=False) as client:
                    client.say(connect("\n\x1b[31m" + "x" * 200, password=b"y"))
                    await client.ended()

            await asyncio.gather(*(refused() for _ in range(15)))  # within the period of the bound
    lines = [line for line in logs if line["event"] == "mqtt.refused"]
    assert len(lines) == 10
    assert lines[0]["user"] == "\\n\\x1b[31m" + "x" * 58 + "…"


# 7: what its owner does with it


@BOTH
async def test_a_device_whose_token_is_rotated_is_disconnected_at_once(version: int) -> None:
    owner = Owner()
    async with listening(owner) as server, raw(server, version=version) as client:
        client.say(subscribe())
        await client.hear()
        owner.tokens["door"] = "new"
        server.listener.disconnect("door")
        server.listener.disconnect("nobody")
        assert owner.presence == ["door online", "door offline"]
        last = await client.ended()
        assert [each.reason for each in last if isinstance(each, p.Goodbye)] == (
            [Reason.ADMINISTRATIVE] if version == 5 else []
        )
        async with device(server, password="new"):
            assert server.connected == 1


async def test_a_token_rotated_while_it_is_checked_does_not_let_the_device_in() -> None:
    owner = Owner()
    async with listening(owner) as server, raw(server, greeting=False) as client:
        owner.may_answer.clear()
        client.say(connect())
        async with asyncio.timeout(DEADLINE_SEC):
            await owner.asked.wait()
        server.listener.disconnect("door")
        owner.may_answer.set()
        (connack,) = await client.ended()
        assert isinstance(connack, p.Connack)
        assert connack.reason == Reason.ADMINISTRATIVE
        assert server.connected == 0


# 8: a PUBACK says that it is durable


@VERSIONS
@pytest.mark.parametrize("qos", [1, 2])
async def test_pubacks_leave_in_order_once_they_are_given(version: Any, qos: int) -> None:
    if version is V5 and qos == 2:
        return  # there is none
    owner = Owner(takes=False)
    async with listening(owner) as server, device(server, protocol=version) as door:
        answers = [asyncio.create_task(door.publish(ACK, word, qos=qos)) for word in (b"first", b"second")]
        await owner.until(lambda: len(owner.messages) == 2)
        server.listener.puback(owner.messages[1])
        await door.subscribe(RLS, qos=1)
        assert [answer.done() for answer in answers] == [False, False]
        server.listener.puback(owner.messages[0])
        async with asyncio.timeout(DEADLINE_SEC):
            await asyncio.gather(*answers)


class Counted:
    """A transport that also notes what is written."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.writes: list[bytes] = []
        self._transport = transport

    def write(self, data: bytes) -> None:
        self.writes.append(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def test_pubacks_given_at_once_and_the_next_command_are_one_write() -> None:
    owner = Owner(takes=False)
    async with listening(owner) as server, raw(server) as client:
        client.say(subscribe(), *(said(b"x", number) for number in (1, 2, 3)))
        assert await client.hear() == p.Granted(p.SUBACK, 9, [1])
        await owner.until(lambda: len(owner.messages) == 3)
        connection = server.listener.peers["door"]
        counted: Any = Counted(connection.transport)
        connection.transport = counted
        for message in owner.messages:
            server.listener.puback(message)
        owner.send(b"next")
        heard = [await client.hear() for _ in range(4)]
        assert [each.kind for each in heard] == [p.PUBACK, p.PUBACK, p.PUBACK, p.PUBLISH]
        assert len(counted.writes) == 1


async def test_only_a_message_without_puback_is_a_duplicate_after_a_reconnect() -> None:
    owner = Owner(takes=False)
    async with listening(owner) as server:
        async with raw(server) as client:
            client.say(said(b"new since the start", 5, dup=True), said(b"had", 7))
            await owner.until(lambda: len(owner.messages) == 2)
        server.listener.puback(owner.messages[1])
        async with raw(server) as client:
            client.say(said(b"had", 7, dup=True), said(b"not had", 8, dup=True), said(b"new", 9))
            await owner.until(lambda: len(owner.messages) == 5)
            # Before the first connection since our start, whatever is repeated may have been here.
            assert [message.dup for message in owner.messages] == [True, False, True, False, False]
            for message in owner.messages:
                server.listener.puback(message)
            assert [await client.hear() for _ in range(3)] == [p.Ack(p.PUBACK, each) for each in (7, 8, 9)]


async def test_qos_0_beyond_a_bound_is_dropped_and_said_so_once() -> None:
    owner = Owner(takes=False)
    with capture_logs() as logs:
        async with listening(owner, unacknowledged=5) as server:
            async with raw(server) as client:
                client.say(*(said(b"%d" % each, qos=0, packet_id=0) for each in range(20)), p.Ping())
                await client.hear()
            assert owner.payloads == [b"0", b"1", b"2", b"3", b"4"]
            assert server.listener.counts["dropped_qos_0"] == 15
            (line,) = await until_logged(logs, "mqtt.qos0_lost")
            for message in owner.messages:
                server.listener.puback(message)
            assert server.listener.unacknowledged == 0
    assert line["messages"] == 15
    assert [line["event"] for line in logs].count("mqtt.qos0_dropped") == 1


async def test_a_subscription_of_qos_0_is_served_with_qos_0_and_a_receipt_without_reason() -> None:
    owner = Owner()
    async with listening(owner) as server, raw(server) as client:
        client.say(subscribe(qos=0))
        assert await client.hear() == p.Granted(p.SUBACK, 9, [0])
        owner.send(b"1")
        message = await client.hear()
        assert isinstance(message, p.Publish)
        assert (message.qos, message.packet_id) == (0, 0)
        await owner.until(lambda: owner.receipts == [Receipt(written=True, reason=None)])


async def test_a_refusal_of_the_device_is_its_own_and_not_the_servers() -> None:
    owner = Owner()
    with capture_logs() as logs:
        async with listening(owner) as server, raw(server) as client:
            client.say(subscribe())
            await client.hear()
            owner.send(b"1")
            message = await client.hear()
            assert isinstance(message, p.Publish)
            text = {"reason_string": "no memory"}
            client.say(p.Ack(p.PUBACK, message.packet_id, Reason.NOT_AUTHORIZED, text))
            await owner.until(lambda: owner.receipts == [Receipt(written=True, reason=Reason.UNSPECIFIED)])
    (line,) = [line for line in logs if line["event"] == "mqtt.device_refused"]
    assert "no memory" in line["why"]


async def test_receipts_name_a_too_large_message_and_one_without_subscriber() -> None:
    owner = Owner()
    async with listening(owner) as server, raw(server, properties={"maximum_packet": 100}) as client:
        client.say(subscribe())
        await client.hear()
        owner.send(b"x" * 100)
        owner.send(b"x", "iotee/dev/door/rbt")
        await owner.until(lambda: len(owner.receipts) == 2)
        assert [receipt.reason for receipt in owner.receipts] == [Reason.TOO_LARGE, Reason.NO_SUBSCRIBER]


# 9: start, end, and tools nobody here wrote


async def test_closing_does_not_wait_for_silent_clients_and_reports_nothing() -> None:
    owner = Owner()
    async with listening(owner) as server:
        door = device(server, will=aiomqtt.Will(STATUS, b"offline", qos=1))
        await door.__aenter__()
        await door.subscribe(RLS, qos=1)
        silent = [await asyncio.open_connection(server.host, server.port) for _ in range(5)]
    assert owner.presence == ["door online"]
    assert owner.messages == []
    with pytest.raises(aiomqtt.MqttError):
        await anext(aiter(door.messages))
    for _, writer in silent:
        writer.close()


async def test_a_port_that_is_taken_is_an_error_that_names_it() -> None:
    owner = Owner()
    async with listening(owner) as server:
        with pytest.raises(OSError, match=str(server.port)):
            async with listening(Owner(), endpoints=(Endpoint("127.0.0.1", server.port),)):
                pytest.fail("it listens")


async def test_it_listens_on_ipv6_and_several_addresses() -> None:
    owner = Owner()
    endpoints = (Endpoint("127.0.0.1", 0), Endpoint("::1", 0))
    async with listening(owner, endpoints=endpoints) as server:
        shown = [str(endpoint) for endpoint in server.sockets.endpoints]
        assert shown[1].startswith("mqtt://[::1]:")
        settings: dict[str, Any] = {"identifier": "door", "username": "door", "password": TOKENS["door"]}
        async with aiomqtt.Client("::1", server.sockets.endpoints[1].port, **settings):
            assert server.connected == 1


@pytest.mark.parametrize("version", ["mqttv5", "mqttv311"])
async def test_mosquitto_pub_and_mosquitto_sub_are_served(version: str) -> None:
    owner = Owner()
    async with listening(owner) as server:
        arguments = ["-h", server.host, "-p", str(server.port), "-i", "door", "-u", "door", "-V", version]
        arguments += ["-P", TOKENS["door"], "-q", "1"]
        tool = await asyncio.create_subprocess_exec(
            program("mosquitto_sub"), *arguments, "-t", RLS, "-C", "1", stdout=subprocess.PIPE
        )
        await owner.until(lambda: owner.presence == ["door online"])
        owner.send(b"lock")
        async with asyncio.timeout(DEADLINE_SEC):
            heard, _ = await tool.communicate()
        assert heard == b"lock\n"
        await owner.until(lambda: owner.presence == ["door online", "door offline"])
        tool = await asyncio.create_subprocess_exec(
            program("mosquitto_pub"), *arguments, "-t", ACK, "-m", "ok"
        )
        async with asyncio.timeout(DEADLINE_SEC):
            assert await tool.wait() == 0
        assert owner.payloads == [b"ok"]


async def test_qos_0_of_many_clients_is_bounded_in_bytes_of_all() -> None:
    owner = Owner(takes=False)
    async with listening(owner, unacknowledged_bytes=65_536) as server:
        async with raw(server) as first, raw(server, name="gate") as second:
            first.say(*(said(b"x" * 40_000, qos=0, packet_id=0) for _ in range(2)))
            await owner.until(lambda: len(owner.messages) == 2)
            second.say(said(b"x" * 40_000, topic="iotee/dev/gate/ack", qos=0, packet_id=0), p.Ping())
            assert isinstance(await second.hear(), p.Ping)
            assert server.listener.counts["dropped_qos_0"] == 1
            assert len(owner.messages) == 2
            for message in owner.messages:
                server.listener.puback(message)
            assert server.listener.unacknowledged == 0
