"""The embedded MQTT server against real clients: what it lets in, what it lets through, what it keeps quiet.

Every attack here worked on amqtt as it comes, or would if our part of it were left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from structlog.testing import capture_logs

from broker.engine import intake
from broker.mqtt import connection as mqtt_connection
from broker.mqtt import server as mqtt_server
from broker.mqtt.access import Access, CheckService
from broker.mqtt.link import MqttLink
from broker.mqtt.server import EmbeddedServer
from broker.seams import Message, Outgoing, Receipt
from tests.conftest import program
from tests.integration.core_support import running, until
from tests.integration.mqtt.test_link import DEADLINE_SEC, NODELAY, Owner, eventually, linked, until_logged

TOKENS = {name: f"dtok-{name}" for name in ("door", "gate")}
RLS, ACK, STATUS = "iotee/dev/door/rls", "iotee/dev/door/ack", "iotee/dev/door/status"
REFUSED = 0x80


class Taker(Owner):
    """Acknowledges all it gets."""

    link: MqttLink

    def message(self, message: Message) -> None:
        super().message(message)
        self.link.puback(message)


class Doorman:
    """Checks tokens, and is told who is there."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.tokens = dict(TOKENS)
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self._changed = asyncio.Event()

    async def check(self, hardware_id: str, token: str) -> bool:
        right = self.tokens.get(hardware_id) == token
        self.asked.set()
        await self.may_answer.wait()
        return right

    def device_online(self, hardware_id: str) -> None:
        self.told.append(f"{hardware_id} online")
        self._changed.set()

    def device_offline(self, hardware_id: str) -> None:
        self.told.append(f"{hardware_id} offline")
        self._changed.set()

    async def until(self, fact: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_SEC):
            while not fact():
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def embedded(
    doorman: Doorman, *, check_service: CheckService | None = None, **more: Any
) -> AsyncIterator[EmbeddedServer]:
    access = Access(
        prefix="iotee", link_password="p:@/ss", check_device=doorman.check, check_service=check_service
    )
    server = EmbeddedServer(host="127.0.0.1", port=0, access=access, presence=doorman, **more)
    await server.start()
    try:
        yield server
    finally:
        async with asyncio.timeout(2):
            await server.close()
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


def device(server: EmbeddedServer, name: str = "door", **more: Any) -> aiomqtt.Client:
    settings: dict[str, Any] = {"identifier": name, "username": name, "password": TOKENS.get(name)}
    settings |= {"socket_options": [NODELAY]} | more
    return aiomqtt.Client(server.host, server.port, **settings)


async def refused(client: aiomqtt.Client) -> None:
    with pytest.raises(aiomqtt.MqttError, match="Not authorized"):
        async with client:
            pytest.fail("it was let in")


async def code_of(client: aiomqtt.Client, topic: str) -> int:
    (code,) = await client.subscribe(topic, qos=1)
    return code if isinstance(code, int) else code.value


@contextlib.asynccontextmanager
async def listening(server: EmbeddedServer) -> AsyncIterator[Taker]:
    """Our own link, seeing and acknowledging all that devices may say."""
    owner = Taker()
    everything = {"client_id": "ordain", "subscriptions": ["iotee/dev/#"], "clean_session": True}
    async with linked(server.url, owner, **everything) as owner.link:
        link = owner.link
        await owner.until(lambda: link.up)
        yield owner


async def test_a_command_and_its_answer_make_the_round_trip() -> None:
    doorman, owner = Doorman(), Owner()
    async with (
        embedded(doorman) as server,
        linked(server.url, owner, subscriptions=["iotee/dev/+/ack"], clean_session=True) as link,
        device(server) as door,
    ):
        await owner.until(lambda: link.up)
        assert await code_of(door, RLS) == 1
        assert link.publish(Outgoing(topic=RLS, payload=b"1"), owner.done)
        assert (await anext(aiter(door.messages))).payload == b"1"
        answering = asyncio.create_task(door.publish(ACK, b"ok", qos=1))
        await owner.until(lambda: owner.payloads == [b"ok"] and owner.receipts != [])
        assert owner.receipts == [Receipt(written=True, reason=0)]
        link.puback(owner.messages[0])
        await answering


async def test_a_hundred_commands_at_once_reach_the_device_in_order() -> None:
    doorman, owner = Doorman(), Owner()
    async with (
        embedded(doorman) as server,
        linked(server.url, owner, subscriptions=["iotee/dev/+/ack"], clean_session=True) as link,
        device(server) as door,
    ):
        await owner.until(lambda: link.up)
        await door.subscribe(RLS, qos=1)
        for number in range(100):
            assert link.publish(Outgoing(topic=RLS, payload=str(number).encode()), owner.done)
        arrived = [(await anext(aiter(door.messages))).payload for _ in range(100)]
        assert arrived == [str(number).encode() for number in range(100)]


# 1: who gets in


@pytest.mark.parametrize(
    "wrong",
    [
        {"username": None, "password": None},
        {"password": None},
        {"password": "dtok-gate"},
        {"identifier": "gate"},
        {"identifier": "stranger", "username": "stranger"},
        {"identifier": None},
        {"username": "ordain", "password": "guess"},
        {"username": "service", "password": "guess"},
        {"will": aiomqtt.Will("iotee/dev/gate/rls", b"0", qos=1)},
        {"will": aiomqtt.Will("iotee/dev/gate/status", b"offline", qos=1)},
        {"will": aiomqtt.Will(ACK, b"ok", qos=1)},
    ],
    ids=str,
)
async def test_who_is_not_who_they_say_stays_out(wrong: dict[str, Any]) -> None:
    doorman = Doorman()
    async with embedded(doorman) as server:
        await refused(device(server, **wrong))
        assert server.connected == 0
        async with device(server, will=aiomqtt.Will(STATUS, b"offline", qos=1)):
            assert server.connected == 1


async def test_a_service_sees_the_events_it_may_see_and_says_nothing() -> None:
    async def check(key: str) -> Callable[[str], bool] | None:
        return "door".__eq__ if key == "right" else None

    doorman = Doorman()
    async with embedded(doorman, check_service=check) as server, listening(server) as owner:
        await refused(device(server, "service", password="wrong"))
        will = aiomqtt.Will("iotee/evt/door/cmd_1", b"{}", qos=1)
        await refused(device(server, "service", password="right", will=will))
        async with device(server, "door") as door:
            # The client id of a device: neither takes anything from the other.
            client = device(server, "service", identifier="door", password="right")
            async with client as service:
                assert await code_of(service, "iotee/evt/#") == 1
                for foreign in ("#", "iotee/#", "iotee/dev/#", RLS, "$SYS/#", "+/evt/#"):
                    assert await code_of(service, foreign) == REFUSED
                await service.publish(RLS, b"1", qos=1)
                await service.publish(STATUS, b"offline", qos=1)
                for hardware_id in ("gate", "door"):
                    topic = f"iotee/evt/{hardware_id}/cmd_1"
                    assert owner.link.publish(Outgoing(topic=topic, payload=b"{}"), owner.done)
                seen = await anext(aiter(service.messages))
                assert str(seen.topic) == "iotee/evt/door/cmd_1"
            await door.publish(ACK, b"still here", qos=1)
            await owner.until(lambda: owner.payloads == [b"still here"])


# 2: which topics


@pytest.mark.parametrize(
    "topic", ["#", "+", "iotee/#", "$SYS/#", "iotee/dev/+/rls", "iotee/dev/gate/rls", ACK]
)
async def test_a_device_subscribes_to_nothing_but_its_own_commands(topic: str) -> None:
    doorman = Doorman()
    async with embedded(doorman) as server, device(server) as door:
        assert await code_of(door, topic) == REFUSED
        assert await code_of(door, "iotee/dev/door/rbt") == 1


async def test_a_device_publishes_nothing_but_its_own_answers_and_status() -> None:
    doorman = Doorman()
    async with (
        embedded(doorman) as server,
        listening(server) as owner,
        device(server) as door,
        device(server, "gate") as gate,
    ):
        await gate.subscribe("iotee/dev/gate/rls", qos=1)
        for topic in ("iotee/dev/gate/rls", "iotee/dev/gate/ack", RLS, "iotee/evt/door/cmd_1", "elsewhere"):
            await door.publish(topic, b"forged", qos=1)
        await door.publish("$SYS/broker", b"forged", qos=1)
        await door.publish(STATUS, b"online", qos=1)
        await door.publish(ACK, b"ok", qos=1)
        await owner.until(lambda: len(owner.messages) == 2)
        assert owner.payloads == [b"online", b"ok"]
        assert len(gate.messages) == 0


# 3: nothing is kept


async def test_a_retained_message_is_delivered_and_not_kept() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server:
        async with listening(server) as owner, device(server) as door:
            await door.publish(STATUS, b"online", qos=1, retain=True)
            await owner.until(lambda: owner.payloads == [b"online"])
            assert not owner.messages[0].retain
        async with listening(server) as later, device(server) as door:
            await door.publish(ACK, b"ok", qos=1)
            await later.until(lambda: later.messages != [])
            assert later.payloads == [b"ok"]


async def test_a_retained_will_is_delivered_and_not_kept() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server:
        async with listening(server) as owner:
            await crash(server, will=aiomqtt.Will(STATUS, b"offline", qos=1, retain=True))
            await owner.until(lambda: owner.payloads == [b"offline"])
        async with listening(server) as later, device(server) as door:
            await door.publish(ACK, b"ok", qos=1)
            await later.until(lambda: later.messages != [])
            assert later.payloads == [b"ok"]


async def crash(server: EmbeddedServer, **settings: Any) -> None:
    """A device connects and is gone without a goodbye."""
    client = device(server, **settings)
    await client.__aenter__()
    drop(client)


def drop(client: aiomqtt.Client) -> None:
    client._client._sock_close()


async def test_a_device_that_asks_for_a_session_gets_none() -> None:
    doorman, owner = Doorman(), Owner()
    async with (
        embedded(doorman) as server,
        linked(server.url, owner, subscriptions=["iotee/dev/+/ack"], clean_session=True) as link,
    ):
        await owner.until(lambda: link.up)
        async with device(server, clean_session=False) as door:
            await door.subscribe(RLS, qos=1)
            await doorman.until(lambda: doorman.told == ["door online"])
        await doorman.until(lambda: doorman.told == ["door online", "door offline"])
        assert link.publish(Outgoing(topic=RLS, payload=b"missed"), owner.done)
        await owner.until(lambda: len(owner.receipts) == 1)
        assert server._broker is not None
        assert list(server._broker.sessions) == ["ordain:ordain"]
        assert list(server._broker.subscriptions) == ["iotee/dev/+/ack"]
        async with device(server, clean_session=False) as door:
            await door.subscribe(RLS, qos=1)
            assert link.publish(Outgoing(topic=RLS, payload=b"seen"), owner.done)
            assert (await anext(aiter(door.messages))).payload == b"seen"


# 4: taking over


async def test_without_the_token_a_client_id_cannot_be_taken_over() -> None:
    doorman = Doorman()
    will = aiomqtt.Will(STATUS, b"offline", qos=1)
    async with embedded(doorman) as server, listening(server) as owner, device(server, will=will) as door:
        await door.subscribe(RLS, qos=1)
        for clean in (True, False):
            await refused(device(server, password="guess", clean_session=clean))
        assert server.connected == 1
        assert owner.messages == []
        client = device(server, "gate", identifier="door")
        await refused(client)
        assert doorman.told == ["door online"]
        await publish_command(server, b"1")
        assert (await anext(aiter(door.messages))).payload == b"1"


async def publish_command(server: EmbeddedServer, payload: bytes) -> None:
    """As our link does, with a tool nobody here wrote."""
    arguments = ["-h", server.host, "-p", str(server.port), "-i", "tool", "-u", "ordain", "-P", "p:@/ss"]
    tool = await asyncio.create_subprocess_exec(
        program("mosquitto_pub"), *arguments, "-t", RLS, "-m", payload.decode(), "-q", "1"
    )
    assert await tool.wait() == 0


async def test_a_second_connection_closes_the_first_and_ends_as_online() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server:
        first = device(server)
        await first.__aenter__()
        await first.subscribe(RLS, qos=1)
        async with device(server) as second:
            with pytest.raises(aiomqtt.MqttError):
                await anext(aiter(first.messages))
            await second.subscribe(RLS, qos=1)
            await doorman.until(lambda: len(doorman.told) == 3)
            assert doorman.told == ["door online", "door offline", "door online"]
            assert server.connected == 1
            await publish_command(server, b"1")
            assert (await anext(aiter(second.messages))).payload == b"1"
            assert doorman.told[-1] == "door online"


async def test_of_many_connections_at_once_one_remains() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server:
        clients = [device(server) for _ in range(10)]
        entered = await asyncio.gather(*(client.__aenter__() for client in clients), return_exceptions=True)
        assert server.connected == 1
        remaining = [client for client in entered if isinstance(client, aiomqtt.Client)]
        await eventually(lambda: sum(not client._disconnected.done() for client in remaining) <= 1)
        for client in clients:
            if client._disconnected.done():
                client._disconnected.exception()
            drop(client)


# 5: presence


async def test_a_device_is_online_while_it_is_connected_and_subscribed() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server, listening(server):
        async with device(server) as door:
            await door.publish(STATUS, b"online", qos=1)
            assert doorman.told == []
            await door.subscribe("iotee/dev/door/rbt", qos=1)
            await door.subscribe(RLS, qos=1)
            await door.unsubscribe(RLS)
            await doorman.until(lambda: doorman.told != [])
            assert doorman.told == ["door online"]
            await door.unsubscribe("iotee/dev/door/rbt")
            await doorman.until(lambda: doorman.told == ["door online", "door offline"])
            await door.subscribe(RLS, qos=1)
        await doorman.until(lambda: doorman.told == ["door online", "door offline"] * 2)


async def test_a_device_that_is_cut_off_is_offline_and_its_will_is_sent() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server, listening(server) as owner:
        client = device(server, will=aiomqtt.Will(STATUS, b"offline", qos=1))
        await client.__aenter__()
        await client.subscribe(RLS, qos=1)
        drop(client)
        await doorman.until(lambda: doorman.told == ["door online", "door offline"])
        await owner.until(lambda: owner.payloads == [b"offline"])


async def test_a_device_that_says_goodbye_loses_nothing_and_sends_no_will() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server, listening(server) as owner:
        async with device(server, will=aiomqtt.Will(STATUS, b"offline", qos=1)) as door:
            for number in range(200):
                await door.publish(ACK, str(number), qos=number % 2)
        async with device(server) as door:
            await door.publish(ACK, b"last", qos=1)
            await owner.until(lambda: b"last" in owner.payloads)
        assert owner.payloads == [*(str(number).encode() for number in range(200)), b"last"]


# 6: keep-alive and what does not read or write as it should


async def raw(server: EmbeddedServer, sent: bytes) -> bytes:
    """What comes back until the server closes the connection."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(sent)
    async with asyncio.timeout(DEADLINE_SEC):
        answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


def connect_packet(*, keepalive: int = 0) -> bytes:
    def text(value: str) -> bytes:
        return len(value).to_bytes(2, "big") + value.encode()

    body = text("MQTT") + bytes([4, 0xC2]) + keepalive.to_bytes(2, "big")
    body += text("door") + text("door") + text(TOKENS["door"])
    return bytes([0x10, len(body)]) + body


ACCEPTED = b"\x20\x02\x00\x00"


async def test_a_connection_silent_for_one_and_a_half_keepalives_is_closed() -> None:
    doorman = Doorman()
    subscribe = b"\x82" + bytes([5 + len(RLS)]) + b"\x00\x01" + bytes([0, len(RLS)]) + RLS.encode() + b"\x01"
    async with embedded(doorman) as server:
        assert (
            await raw(server, connect_packet(keepalive=1) + subscribe) == ACCEPTED + b"\x90\x03\x00\x01\x01"
        )
        assert doorman.told == ["door online", "door offline"]


async def test_half_a_packet_is_silence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt_connection, "CONNECT_WITHIN_SEC", 0.05)
    doorman = Doorman()
    async with embedded(doorman) as server:
        assert await raw(server, b"") == b""
        assert await raw(server, connect_packet()[:-3]) == b""
        assert await raw(server, connect_packet(keepalive=1) + b"\x30\x10\x00") == ACCEPTED


@pytest.mark.parametrize(
    "nonsense",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00",
        b"\x10\x00",
        b"\x10\xff\xff\xff\xff\x01",
        b"\x30\x05\x00\x03a/bx",
        connect_packet().replace(b"MQTT\x04", b"MQTT\x09"),
        connect_packet() + b"\x36\x07\x00\x01a\x00\x01xx",
        connect_packet() + b"\xf0\x00",
        connect_packet() + connect_packet(),
        connect_packet() + b"\x82\x02\x00\x01" + b"\x30\xff\xff\xff\x7f",
    ],
    ids=repr,
)
async def test_nonsense_costs_its_own_connection_and_no_other(
    nonsense: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt_connection, "CONNECT_WITHIN_SEC", 0.5)
    doorman = Doorman()
    async with embedded(doorman) as server, listening(server) as owner, device(server, "gate") as gate:
        await raw(server, nonsense)
        await gate.publish("iotee/dev/gate/ack", b"ok", qos=1)
        await owner.until(lambda: owner.payloads == [b"ok"])
        assert server.connected == 1


async def test_a_device_that_says_more_than_our_link_takes_has_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mqtt_connection, "UNREAD", 10)
    monkeypatch.setattr(mqtt_connection, "WINDOW", 5)
    doorman, owner = Doorman(), Owner()
    async with (
        embedded(doorman) as server,
        linked(server.url, owner, subscriptions=["iotee/dev/+/ack"], clean_session=True) as link,
        device(server, max_inflight_messages=1_000) as door,
    ):
        await owner.until(lambda: link.up)
        said = asyncio.gather(*(door.publish(ACK, str(number), qos=1) for number in range(200)))
        await owner.until(lambda: len(owner.messages) == 5)
        assert server._broker is not None
        handler = server._broker.sessions["door"][1]
        await eventually(lambda: not handler.reader.ready.is_set())
        assert handler.unread == 10
        for number in range(200):
            await owner.until(lambda number=number: len(owner.messages) > number)  # type: ignore[misc]
            link.puback(owner.messages[number])
        await said
        assert owner.payloads == [str(number).encode() for number in range(200)]


async def test_what_is_too_large_closes_the_connection_and_is_logged() -> None:
    doorman = Doorman()
    with capture_logs() as logs:
        async with embedded(doorman, max_packet_bytes=1_000) as server, listening(server) as owner:
            async with device(server) as door:
                await door.publish(ACK, b"x" * 900, qos=1)
                await owner.until(lambda: len(owner.messages) == 1)
                with pytest.raises(aiomqtt.MqttError):
                    await door.publish(ACK, b"x" * 1_000, qos=1, timeout=1)
            await until_logged(logs, "mqtt.embedded_too_large")


# 7: what its owner does with it


async def test_a_device_whose_token_is_rotated_is_disconnected() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server, listening(server), device(server, "gate") as gate:
        door = device(server)
        await door.__aenter__()
        await door.subscribe(RLS, qos=1)
        doorman.tokens["door"] = "new"
        server.disconnect("door")
        server.disconnect("nobody")
        with pytest.raises(aiomqtt.MqttError):
            await anext(aiter(door.messages))
        await doorman.until(lambda: doorman.told == ["door online", "door offline"])
        await refused(device(server))
        async with device(server, password="new"):
            assert server.connected == 2
        await gate.publish("iotee/dev/gate/ack", b"ok", qos=1)


async def test_a_token_rotated_while_it_is_checked_does_not_let_the_device_in() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server:
        doorman.may_answer.clear()
        connecting = asyncio.create_task(raw(server, connect_packet()))
        async with asyncio.timeout(DEADLINE_SEC):
            await doorman.asked.wait()
        server.disconnect("door")
        doorman.may_answer.set()
        assert await connecting == b""
        assert server.connected == 0


async def test_a_crowd_is_warned_about_once_and_mosquitto_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt_server, "CROWDED", 1)
    doorman = Doorman()
    with capture_logs() as logs:
        async with embedded(doorman) as server, device(server):
            assert "mqtt.embedded_crowded" not in str(logs)
            for _ in range(2):
                async with device(server, "gate"):
                    assert server.connected == 2
                await eventually(lambda: server.connected == 1)
    (line,) = [line for line in logs if line["event"] == "mqtt.embedded_crowded"]
    assert line["devices"] == 2
    assert "Mosquitto" in line["advice"]


# 8: a PUBACK says that it is durable


def settled(answers: list[asyncio.Task[None]]) -> list[bool]:
    return [answer.done() for answer in answers]


def saying(door: aiomqtt.Client, *words: bytes, qos: int = 1) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(door.publish(ACK, word, qos=qos)) for word in words]


@pytest.mark.parametrize("qos", [1, 2])
async def test_a_device_gets_its_pubacks_in_order_once_our_link_has_given_them(qos: int) -> None:
    doorman, owner = Doorman(), Owner()
    async with (
        embedded(doorman) as server,
        linked(server.url, owner, clean_session=True) as link,
        device(server) as door,
    ):
        await owner.until(lambda: link.up)
        answers = saying(door, b"first", b"second", qos=qos)
        await owner.until(lambda: len(owner.messages) == 2)
        link.puback(owner.messages[1])
        # What comes back after it shows that the PUBACK has arrived, and was not passed on.
        assert link.publish(Outgoing(topic=RLS, payload=b"1"), owner.done)
        await owner.until(lambda: owner.receipts != [])
        await door.subscribe(RLS, qos=1)
        assert settled(answers) == [False, False]
        link.puback(owner.messages[0])
        async with asyncio.timeout(DEADLINE_SEC):
            await asyncio.gather(*answers)


async def test_a_commit_of_more_than_five_seconds_loses_nothing() -> None:
    doorman, owner = Doorman(), Owner()
    async with (
        embedded(doorman) as server,
        linked(server.url, owner, clean_session=True) as link,
        device(server) as door,
    ):
        await owner.until(lambda: link.up)
        answers = saying(door, b"slow")
        await owner.until(lambda: len(owner.messages) == 1)
        with pytest.raises(TimeoutError):
            # The fact waited for is that this time passes: it is where amqtt gives up.
            async with asyncio.timeout(5.5):
                await asyncio.shield(answers[0])
        link.puback(owner.messages[0])
        async with asyncio.timeout(DEADLINE_SEC):
            await answers[0]
        assert owner.payloads == [b"slow"]


async def test_without_our_link_a_device_is_served_but_not_acknowledged_until_the_link_is_back() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server, device(server) as door:
        answers = saying(door, b"first", b"second")
        await door.publish(ACK, b"for nobody", qos=0)
        await door.subscribe(RLS, qos=1)
        await publish_command(server, b"1")
        assert (await anext(aiter(door.messages))).payload == b"1"
        assert settled(answers) == [False, False]
        async with listening(server) as owner, asyncio.timeout(DEADLINE_SEC):
            await asyncio.gather(*answers)
            assert owner.payloads == [b"first", b"second"]
            assert not any(message.dup for message in owner.messages)


async def test_what_a_lost_link_did_not_acknowledge_goes_to_the_next_one_as_a_duplicate() -> None:
    doorman, owner = Doorman(), Owner()
    async with embedded(doorman) as server, device(server) as door:
        async with linked(server.url, owner, clean_session=True) as link:
            await owner.until(lambda: link.up)
            answers = saying(door, b"first", b"second")
            await owner.until(lambda: len(owner.messages) == 2)
        async with listening(server) as later, asyncio.timeout(DEADLINE_SEC):
            await asyncio.gather(*answers)
        assert [(message.payload, message.dup) for message in later.messages] == [
            (b"first", True),
            (b"second", True),
        ]


def publish_of(payload: bytes, packet_id: int, *, dup: bool = False) -> bytes:
    body = len(ACK).to_bytes(2, "big") + ACK.encode() + packet_id.to_bytes(2, "big") + payload
    return bytes([0x3A if dup else 0x32, len(body)]) + body


@contextlib.asynccontextmanager
async def bare(server: EmbeddedServer) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection that sends byte for byte what a test wants."""
    reader, writer = await asyncio.open_connection(server.host, server.port)
    writer.write(connect_packet())
    assert await reader.readexactly(4) == ACCEPTED
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


PING, PONG = b"\xc0\x00", b"\xd0\x00"


async def test_a_device_that_comes_back_sends_again_what_nobody_took() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server, asyncio.timeout(DEADLINE_SEC):
        async with bare(server) as (reader, writer):
            writer.write(publish_of(b"done", 7) + PING)
            assert await reader.readexactly(2) == PONG
        async with bare(server) as (reader, writer):
            writer.write(publish_of(b"done", 7, dup=True))
            async with listening(server) as owner:
                assert await reader.readexactly(4) == b"\x40\x02\x00\x07"
                assert [(message.payload, message.dup) for message in owner.messages] == [(b"done", False)]


async def test_what_our_link_had_from_a_device_that_was_cut_off_comes_again_as_a_duplicate() -> None:
    doorman, owner = Doorman(), Owner()
    async with (
        embedded(doorman) as server,
        linked(server.url, owner, clean_session=True) as link,
        asyncio.timeout(DEADLINE_SEC),
    ):
        await owner.until(lambda: link.up)
        async with bare(server) as (_, writer):
            writer.write(publish_of(b"done", 7))
            await owner.until(lambda: len(owner.messages) == 1)
        link.puback(owner.messages[0])
        async with bare(server) as (reader, writer):
            writer.write(publish_of(b"done", 7, dup=True) + publish_of(b"new", 8, dup=True))
            await owner.until(lambda: len(owner.messages) == 3)
            assert [message.dup for message in owner.messages] == [False, True, False]
            for message in owner.messages[1:]:
                link.puback(message)
            assert await reader.readexactly(8) == b"\x40\x02\x00\x07\x40\x02\x00\x08"


async def test_devices_that_come_and_go_while_nothing_is_taken_leave_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mqtt_connection, "WINDOW", 2)
    doorman, owner = Doorman(), Owner()
    async with embedded(doorman) as server, linked(server.url, owner, clean_session=True) as link:
        await owner.until(lambda: link.up)
        for _ in range(5):
            async with asyncio.timeout(DEADLINE_SEC), bare(server) as (reader, writer):
                writer.write(b"".join(publish_of(b"done", each) for each in range(1, 6)) + PING)
                assert await reader.readexactly(2) == PONG
            await eventually(lambda: server.connected == 0)
        assert server._broker is not None
        outbox = server._broker.sessions["ordain:ordain"][1].outbox
        assert (len(outbox._sent), len(outbox._queue)) == (2, 0)


async def test_a_device_that_may_not_be_read_for_too_long_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt_connection, "UNREAD", 2)
    doorman = Doorman()
    async with embedded(doorman) as server:
        said = publish_of(b"done", 1) + publish_of(b"done", 2) + PING
        assert await raw(server, connect_packet(keepalive=1) + said) == ACCEPTED


async def test_beyond_a_bound_qos_0_is_dropped_and_said_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt_connection, "UNREAD", 5)
    doorman, owner = Doorman(), Owner()
    with capture_logs() as logs:
        async with embedded(doorman) as server, linked(server.url, owner, clean_session=True) as link:
            await owner.until(lambda: link.up)
            async with device(server) as door:
                for number in range(20):
                    await door.publish(ACK, str(number), qos=0)
                await door.subscribe(RLS, qos=1)
                await owner.until(lambda: len(owner.messages) == 5)
                for message in owner.messages:
                    link.puback(message)
                answers = saying(door, b"last")
                await owner.until(lambda: len(owner.messages) == 6)
                link.puback(owner.messages[-1])
                await asyncio.gather(*answers)
            assert owner.payloads == [b"0", b"1", b"2", b"3", b"4", b"last"]
            (line,) = await until_logged(logs, "mqtt.embedded_qos0_lost")
    assert line["messages"] == 15
    assert [line["event"] for line in logs].count("mqtt.embedded_qos0_dropped") == 1


async def test_beyond_a_bound_the_intake_drops_qos_0_and_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "MOST_UNACKNOWLEDGEABLE", 3)
    async with running(tmp_path) as bench:
        lost: list[str] = []
        bench.core.intake.on_unmatched = lost.append
        for qos in (0, 0, 1, 0, 1):
            bench.says(b"ok", qos=qos)
        assert lost == ["overrun"]
        await until(lambda: len(bench.wire.pubacks) == 5)


# 9: start and end


async def test_it_closes_in_time_with_clients_that_do_not_answer_and_tells_nobody() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server:
        door = device(server, will=aiomqtt.Will(STATUS, b"offline", qos=1))
        await door.__aenter__()
        await door.subscribe(RLS, qos=1)
        silent = [await asyncio.open_connection(server.host, server.port) for _ in range(5)]
    assert doorman.told == ["door online"]
    with pytest.raises(aiomqtt.MqttError):
        await anext(aiter(door.messages))
    for _, writer in silent:
        writer.close()


async def test_it_starts_again_on_the_same_port_and_the_link_finds_it() -> None:
    doorman, owner = Doorman(), Owner()
    async with embedded(doorman) as server:
        async with linked(server.url, owner, subscriptions=["iotee/dev/+/ack"], clean_session=True):
            await owner.until(lambda: owner.told == ["up"])
            await server.close()
            await owner.until(lambda: owner.told == ["up", "down"])
            await server.start()
            await owner.until(lambda: owner.told == ["up", "down", "up"])


async def test_a_port_that_is_taken_is_an_error_that_names_it() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server:
        other = EmbeddedServer(host=server.host, port=server.port, access=server.access, presence=doorman)
        with pytest.raises(OSError, match=str(server.port)):
            await other.start()
        await other.close()


async def test_a_link_without_a_version_finds_out_that_only_3_1_1_is_spoken() -> None:
    doorman, owner = Doorman(), Owner()
    async with embedded(doorman) as server:
        url = server.url.removesuffix("?v=3.1.1")
        async with linked(url, owner, subscriptions=["iotee/dev/+/ack"], clean_session=True) as link:
            versions = [str(link.version)]
            await owner.until(lambda: link.up)
            assert [*versions, link.version] == ["5", "3.1.1"]


async def test_a_refused_subscription_keeps_the_link_down_and_is_named() -> None:
    doorman, owner = Doorman(), Owner()
    with capture_logs() as logs:
        async with embedded(doorman) as server:
            topics = ["iotee/dev/+/ack", "other/dev/+/ack"]
            async with linked(server.url, owner, subscriptions=topics, clean_session=True) as link:
                (line, *_) = await until_logged(logs, "mqtt.subscription_refused", times=2)
                assert not link.up
    assert (line["topic"], line["log_level"]) == ("other/dev/+/ack", "error")
    assert owner.told == []


async def test_mosquittos_own_tools_are_served() -> None:
    doorman = Doorman()
    async with embedded(doorman) as server:
        arguments = [
            "-h",
            server.host,
            "-p",
            str(server.port),
            "-i",
            "door",
            "-u",
            "door",
            "-P",
            TOKENS["door"],
        ]
        tool = await asyncio.create_subprocess_exec(
            program("mosquitto_sub"), *arguments, "-t", RLS, "-q", "1", "-C", "1", stdout=subprocess.PIPE
        )
        await doorman.until(lambda: doorman.told == ["door online"])
        await publish_command(server, b"lock")
        async with asyncio.timeout(DEADLINE_SEC):
            heard, _ = await tool.communicate()
        assert heard == b"lock\n"
        await doorman.until(lambda: doorman.told == ["door online", "door offline"])
