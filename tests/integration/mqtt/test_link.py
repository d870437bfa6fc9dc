"""The MQTT link against a real Mosquitto: the server behaviour the broker depends on, and every private
attribute of paho it uses."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import random
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from structlog.testing import capture_logs

from broker.mqtt.client.link import MqttLink
from broker.mqtt.client.wire import Wire
from broker.seams import Message, Outgoing, Receipt
from devices.agent import Agent
from devices.mqtt_url import joined, parse_url, parted
from devices.tls import trust
from tests.conftest import MINIMAL, Mosquitto, program, unused_port
from tests.streams import stream_server

ANSWERS = "iotee/dev/+/ack"
DEADLINE_SEC = 120
# Shorter than any wait of the link for a server's answer, and longer than a busy machine stands still.
CLOSED_SEC = 8
NODELAY = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Jitter:
    """Random tokens, but always the shortest pause, so that no test waits long."""

    def token(self, size: int) -> bytes:
        return random.randbytes(size)

    def uniform(self, low: float, high: float) -> float:
        return low


class Owner:
    """A `LinkEvents` that records its calls and lets a test wait for a fact."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.messages: list[Message] = []
        self.receipts: list[Receipt] = []
        self._changed = asyncio.Event()

    def link_up(self) -> None:
        self.told.append("up")
        self._changed.set()

    def link_down(self, why: str) -> None:
        self.told.append("down")
        self._changed.set()

    def message(self, message: Message) -> None:
        self.messages.append(message)
        self._changed.set()

    def done(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)
        self._changed.set()

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.messages]

    async def until(self, fact: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_SEC):
            while not fact():
                self._changed.clear()
                await self._changed.wait()


@contextlib.asynccontextmanager
async def linked(url: str, owner: Owner, **options: Any) -> AsyncIterator[MqttLink]:
    settings: dict[str, Any] = {"client_id": "ordain", "subscriptions": [ANSWERS], "clean_session": False}
    link = MqttLink(url, events=owner, entropy=Jitter(), **(settings | options))
    running = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        async with asyncio.timeout(CLOSED_SEC):
            await link.close()
            await running


async def until_logged(logs: list[Any], event: str, times: int = 1) -> list[Any]:
    await eventually(lambda: [line["event"] for line in logs].count(event) >= times)
    return [line for line in logs if line["event"] == event]


async def eventually(fact: Callable[[], bool]) -> None:
    """Polls a fact that has no hook to wait on."""
    async with asyncio.timeout(DEADLINE_SEC):
        while not fact():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def device(server: Mosquitto) -> aiomqtt.Client:
    return aiomqtt.Client(
        server.host, server.port, identifier="door", socket_options=[NODELAY], timeout=DEADLINE_SEC
    )


def rls(payload: bytes = b"1", **more: Any) -> Outgoing:
    return Outgoing(topic="iotee/dev/door/rls", payload=payload, **more)


@contextlib.contextmanager
def stopped(server: Mosquitto) -> Iterator[None]:
    """Stops the server process with SIGSTOP: it does nothing, and its connections stay open."""
    assert server._process is not None
    server._process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server._process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def another_mosquitto(home: Path, more: str, *, minimal: str = MINIMAL) -> Iterator[Mosquitto]:
    port = unused_port()
    server = Mosquitto(minimal.format(port=port) + more, port, home)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_command_goes_out_and_its_answer_comes_back(mosquitto: Mosquitto, version: str) -> None:
    owner = Owner()
    async with linked(f"{mosquitto.url}?v={version}", owner) as link, device(mosquitto) as door:
        await owner.until(lambda: link.up)
        await door.subscribe("iotee/dev/door/rls", qos=1)
        assert link.publish(rls(b"lock"), owner.done)
        assert owner.receipts == []
        assert (await anext(aiter(door.messages))).payload == b"lock"
        await door.publish("iotee/dev/door/ack", b"ok", qos=1)
        await owner.until(lambda: owner.payloads == [b"ok"] and len(owner.receipts) == 1)
        assert owner.receipts == [Receipt(written=True, reason=0)]
        assert (owner.messages[0].topic, owner.messages[0].qos) == ("iotee/dev/door/ack", 1)
        assert link.version == version
    assert owner.told == ["up", "down"]


async def test_mqtt_5_carries_correlation_data_user_properties_and_expiry(mosquitto: Mosquitto) -> None:
    owner = Owner()
    door = aiomqtt.Client(
        mosquitto.host, mosquitto.port, identifier="door", protocol=aiomqtt.ProtocolVersion.V5
    )
    async with linked(mosquitto.url, owner, subscriptions=["iotee/dev/+/rls"]) as link, door:
        await owner.until(lambda: link.up)
        await door.subscribe("iotee/dev/door/rls", qos=1)
        outgoing = rls(
            correlation=b"cmd_1",
            response_topic="iotee/dev/door/ack",
            expiry_sec=30,
            user_properties=(("grant", "g"), ("attempt", "1")),
        )
        assert link.publish(outgoing, owner.done)
        properties = (await anext(aiter(door.messages))).properties
        assert properties is not None
        sent = properties.json()  # type: ignore[no-untyped-call]
        assert sent["ResponseTopic"] == "iotee/dev/door/ack"
        assert sent["MessageExpiryInterval"] == 30
        assert sent["UserProperty"] == [("grant", "g"), ("attempt", "1")]
        await owner.until(lambda: owner.messages != [])
        assert owner.messages[0].correlation == b"cmd_1"


async def test_a_publish_without_subscriber_is_reason_0x10_with_mqtt_5(mosquitto: Mosquitto) -> None:
    owner = Owner()
    async with linked(mosquitto.url, owner) as link:
        await owner.until(lambda: link.up)
        assert link.publish(rls(), owner.done)
        await owner.until(lambda: owner.receipts == [Receipt(written=True, reason=0x10)])


async def test_a_publish_forbidden_by_the_server_is_reason_0x87(tmp_path: Path) -> None:
    (acl := tmp_path / "acl").write_text("topic read iotee/#\n")
    with another_mosquitto(tmp_path, f"acl_file {acl}\n") as server:
        owner = Owner()
        async with linked(server.url, owner) as link:
            await owner.until(lambda: link.up)
            assert link.publish(rls(), owner.done)
            await owner.until(lambda: owner.receipts == [Receipt(written=True, reason=0x87)])


async def test_a_message_without_puback_comes_again_on_the_next_connection(mosquitto: Mosquitto) -> None:
    first, second = Owner(), Owner()
    async with linked(mosquitto.url, first) as link, device(mosquitto) as door:
        await first.until(lambda: link.up)
        for payload in (b"a", b"b"):
            await door.publish("iotee/dev/door/ack", payload, qos=1)
        await first.until(lambda: first.payloads == [b"a", b"b"])
        assert [message.dup for message in first.messages] == [False, False]
        link.puback(first.messages[0])
    async with linked(mosquitto.url, second) as link:
        await second.until(lambda: second.payloads == [b"b"])
        assert second.messages[0].dup
        assert second.told == ["up"]
        link.puback(first.messages[1])  # a PUBACK for an older connection does nothing
        link.puback(second.messages[0])


async def test_pubacks_go_out_in_the_requested_order(tmp_path: Path) -> None:
    with another_mosquitto(tmp_path, "log_type all\n") as server:
        owner = Owner()
        async with linked(server.url, owner) as link, device(server) as door:
            await owner.until(lambda: link.up)
            for payload in (b"a", b"b", b"c"):
                await door.publish("iotee/dev/door/ack", payload, qos=1)
            await owner.until(lambda: len(owner.messages) == 3)
            asked = [owner.messages[index] for index in (2, 0, 1)]
            for message in asked:
                link.puback(message)
        await eventually(lambda: server.log().count("Received PUBACK from ordain") == 3)
        seen = [line for line in server.log().splitlines() if "Received PUBACK from ordain" in line]
        mids = [f"Mid: {message.token[1]}" for message in asked]
        assert all(mid in line for mid, line in zip(mids, seen, strict=True))


async def test_packets_are_sent_at_once_without_nagle(mosquitto: Mosquitto) -> None:
    owner = Owner()
    async with linked(mosquitto.url, owner) as link:
        await owner.until(lambda: link.up)
        assert link._connection is not None
        transport = link._connection._wire._transport
        assert transport is not None
        sock = transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_answers_sent_while_the_link_is_away_are_delivered_later(
    mosquitto: Mosquitto, version: str
) -> None:
    owner = Owner()
    url = f"{mosquitto.url}?v={version}"
    async with linked(url, owner) as link:
        await owner.until(lambda: link.up)
    async with device(mosquitto) as door:
        for number in range(300):
            await door.publish("iotee/dev/door/ack", str(number), qos=1)
    async with linked(url, owner):
        await owner.until(lambda: len(owner.messages) == 300)
        assert owner.payloads == [str(number).encode() for number in range(300)]
        assert owner.told == ["up", "down", "up"]


async def test_a_clean_session_leaves_nothing_at_the_server(mosquitto: Mosquitto) -> None:
    owner = Owner()
    async with linked(mosquitto.url, owner, clean_session=True) as link:
        await owner.until(lambda: link.up)
    async with device(mosquitto) as door:
        await door.publish("iotee/dev/door/ack", b"missed", qos=1)
        async with linked(mosquitto.url, owner, clean_session=True) as link:
            await owner.until(lambda: link.up)
            await door.publish("iotee/dev/door/ack", b"seen", qos=1)
            await owner.until(lambda: owner.payloads == [b"seen"])


async def test_a_retained_message_is_marked_retained(mosquitto: Mosquitto) -> None:
    owner = Owner()
    async with device(mosquitto) as door:
        await door.publish("iotee/dev/door/status", b"online", qos=1, retain=True)
    async with linked(mosquitto.url, owner, subscriptions=["iotee/dev/+/status"]):
        await owner.until(lambda: owner.payloads == [b"online"])
        assert owner.messages[0].retain


async def test_receipts_are_unknown_when_the_server_dies_and_the_link_reconnects(
    mosquitto: Mosquitto,
) -> None:
    owner = Owner()
    async with linked(mosquitto.url, owner) as link:
        await owner.until(lambda: link.up)
        mosquitto.kill()
        # Written to a connection whose other end is gone, before the loop can notice.
        assert link.publish(rls(), owner.done)
        assert owner.receipts == []
        await owner.until(lambda: owner.told == ["up", "down"] and owner.receipts != [])
        assert owner.receipts == [Receipt(written=True, reason=None)]
        assert not link.up
        assert link.why is not None
        assert not link.publish(rls(), owner.done)
        mosquitto.start()
        await owner.until(lambda: owner.told == ["up", "down", "up"])
        assert link.publish(rls(), owner.done)
        await owner.until(lambda: len(owner.receipts) == 2)


async def test_a_receipt_that_never_comes_becomes_unknown_after_a_time_limit(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.mqtt.client.receipts.RECEIPT_WITHIN_SEC", 0.05)
    owner = Owner()
    async with linked(mosquitto.url, owner) as link:
        await owner.until(lambda: link.up)
        assert mosquitto._process is not None
        mosquitto._process.send_signal(signal.SIGSTOP)
        for _ in range(3):
            assert link.publish(rls(), owner.done)
        await owner.until(lambda: len(owner.receipts) == 3)
        assert owner.receipts == [Receipt(written=True, reason=None)] * 3
        mosquitto._process.send_signal(signal.SIGCONT)  # the late PUBACKs give no second receipt
        assert link.publish(rls(), owner.done)
        await owner.until(lambda: len(owner.receipts) == 4)


async def test_a_thousand_concurrent_commands_are_each_answered_once(mosquitto: Mosquitto) -> None:
    owner = Owner()
    async with linked(mosquitto.url, owner) as link:
        await owner.until(lambda: link.up)
        big = b"x" * 20_000  # more than the socket buffer takes at once
        assert all(link.publish(rls(big), owner.done) for _ in range(900))
        await owner.until(lambda: len(owner.receipts) == 900)
        assert {receipt.reason for receipt in owner.receipts} == {0x10}
        assert owner.told == ["up"]


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_server_that_pauses_reading_gets_everything_in_order(
    mosquitto: Mosquitto, version: str
) -> None:
    owner = Owner()
    url = f"{mosquitto.url}?v={version}"
    async with linked(url, owner, subscriptions=["iotee/dev/+/rls"]) as link:
        await owner.until(lambda: link.up)
        with stopped(mosquitto):
            for number in range(600):
                assert link.publish(rls(b"%04d" % number * 5_000), owner.done)
            assert link._connection is not None
            transport = link._connection._wire._transport
            assert isinstance(transport, asyncio.WriteTransport)
            await eventually(lambda: transport.get_write_buffer_size() > 1_000_000)
        await owner.until(lambda: len(owner.messages) == len(owner.receipts) == 600)
        assert [payload[:4] for payload in owner.payloads] == [b"%04d" % number for number in range(600)]
        assert {len(payload) for payload in owner.payloads} == {20_000}
        assert {receipt.reason for receipt in owner.receipts} == {0}
    assert owner.told == ["up", "down"]


async def test_closing_does_not_wait_for_a_server_that_stopped_reading(mosquitto: Mosquitto) -> None:
    owner = Owner()
    async with linked(mosquitto.url, owner) as link:
        await owner.until(lambda: link.up)
        with stopped(mosquitto):
            for _ in range(600):
                assert link.publish(rls(bytes(20_000)), owner.done)
            await link.close()
            assert owner.receipts == [Receipt(written=True, reason=None)] * 600


async def test_a_publish_is_written_to_the_socket_before_later_callbacks_run(
    mosquitto: Mosquitto,
) -> None:
    owner = Owner()
    async with linked(mosquitto.url, owner) as link:
        await owner.until(lambda: link.up)
        assert link._connection is not None
        wire = link._connection._wire
        later: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        for _ in range(3):
            assert link.publish(rls(), owner.done)
        assert len(wire._out) == 3
        asyncio.get_running_loop().call_soon(lambda: later.set_result(list(wire._out)))
        assert await later == []
        await owner.until(lambda: len(owner.receipts) == 3)


async def test_a_silent_server_is_noticed(mosquitto: Mosquitto) -> None:
    owner = Owner()
    async with linked(mosquitto.url, owner, keepalive=1) as link:
        await owner.until(lambda: link.up)
        with stopped(mosquitto):
            await owner.until(lambda: owner.told[-1] == "down")


async def test_an_idle_connection_is_kept_and_sent_packets_count_for_the_keepalive(tmp_path: Path) -> None:
    with another_mosquitto(tmp_path, "log_type all\n") as server:
        owner = Owner()
        # The server ends a connection after one and a half times this: a machine may stand still for 6 s.
        async with linked(server.url, owner, keepalive=4) as link:
            await owner.until(lambda: link.up)
            assert link._connection is not None
            paho = link._connection._paho
            sent, received = paho._last_msg_out, paho._last_bytes_received
            assert link.publish(rls(), owner.done)
            await owner.until(lambda: len(owner.receipts) == 1)
            assert paho._last_msg_out > sent
            assert paho._last_bytes_received > received
            await eventually(lambda: server.log().count("Received PINGREQ from ordain") >= 2)
            assert link.publish(rls(), owner.done)
            await owner.until(lambda: len(owner.receipts) == 2)
            assert owner.told == ["up"]


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_message_is_acknowledged_according_to_its_qos(tmp_path: Path, version: str) -> None:
    number, clean = (aiomqtt.ProtocolVersion.V5, None) if version == "5" else (None, False)
    forever = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    forever.SessionExpiryInterval = 1_000
    with another_mosquitto(tmp_path, "log_type all\n") as server:
        before = aiomqtt.Client(
            server.host,
            server.port,
            identifier="ordain",
            protocol=number,
            clean_session=clean,
            properties=forever if number else None,
        )
        async with before:
            await before.subscribe("iotee/dev/+/ack", qos=2)
        async with device(server) as door:
            for qos in (2, 1, 0):
                await door.publish("iotee/dev/door/ack", str(qos), qos=qos)
        owner = Owner()
        url = f"{server.url}?v={version}"
        async with linked(url, owner):
            await owner.until(lambda: len(owner.messages) >= 2)
        owner.messages.clear()
        async with linked(url, owner) as link, device(server) as door:
            await owner.until(lambda: len(owner.messages) == 2)
            await door.publish("iotee/dev/door/ack", "0", qos=0)
            await owner.until(lambda: len(owner.messages) == 3)
            assert [(m.qos, m.payload, m.dup) for m in owner.messages] == [
                (2, b"2", True),
                (1, b"1", True),
                (0, b"0", False),
            ]
            for message in owner.messages:
                link.puback(message)
            await eventually(lambda: "Received PUBCOMP from ordain" in server.log())
        assert server.log().count("Received PUBREC from ordain") == 1
        assert server.log().count("Received PUBACK from ordain") == 1
        owner.messages.clear()
        async with linked(url, owner) as link, device(server) as door:
            await owner.until(lambda: link.up)
            await door.publish("iotee/dev/door/ack", b"next", qos=1)
            await owner.until(lambda: owner.payloads == [b"next"])


@pytest.mark.parametrize("version", ["5", "3.1.1"])
async def test_a_too_large_message_is_skipped_and_the_link_goes_on(
    mosquitto: Mosquitto, version: str
) -> None:
    owner = Owner()
    async with linked(f"{mosquitto.url}?v={version}", owner) as link, device(mosquitto) as door:
        await owner.until(lambda: link.up)
        await door.publish("iotee/dev/door/ack", bytes(3_000_000), qos=1)
        await door.publish("iotee/dev/door/ack", b"next", qos=1)
        await owner.until(lambda: len(owner.messages) == 2)
        assert 65_536 < len(owner.payloads[0]) < 300_000
        assert owner.payloads[1] == b"next"
        assert owner.told == ["up"]
        for message in owner.messages:
            link.puback(message)
    async with linked(f"{mosquitto.url}?v={version}", owner) as link, device(mosquitto) as door:
        await owner.until(lambda: link.up)
        await door.publish("iotee/dev/door/ack", b"after", qos=1)
        await owner.until(lambda: len(owner.messages) == 3)
        assert owner.payloads[2] == b"after"


@pytest.mark.parametrize("nonsense", [b"\x36\x03\0\1t", b"\x40\x01\0", b"\x90\xff\xff\xff\xff\x01", b"\0\0"])
async def test_a_server_that_breaks_the_protocol_is_disconnected_and_tried_again(nonsense: bytes) -> None:
    """No real server sends this. After a protocol error no later byte of the connection can be trusted."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1_000)
        writer.write(b"\x20\x03\0\0\0")
        subscribe = await reader.read(1_000)
        writer.write(b"\x90\x04" + subscribe[2:4] + b"\0\1")
        await writer.drain()
        good = b"\x32\x0a\0\1t\0\1\0good"
        writer.write(good + nonsense + good)
        await reader.read()
        writer.close()

    owner = Owner()
    async with stream_server(serve) as port:
        async with linked(f"mqtt://127.0.0.1:{port}?v=5", owner):
            await owner.until(lambda: owner.told[:3] == ["up", "down", "up"])
            assert owner.payloads[0] == b"good"
            assert owner.told.count("up") >= len(owner.payloads)


@pytest.mark.parametrize("codes", [b"", b"\1\1\1"])
async def test_a_server_that_answers_a_subscription_with_a_wrong_number_of_codes_is_tried_again(
    codes: bytes,
) -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read(1_000)
        writer.write(b"\x20\x03\0\0\0")
        subscribe = await reader.read(1_000)
        writer.write(bytes([0x90, 3 + len(codes)]) + subscribe[2:4] + b"\0" + codes)
        await reader.read()
        writer.close()

    owner = Owner()
    async with stream_server(serve) as port:
        async with linked(f"mqtt://127.0.0.1:{port}?v=5", owner):
            await eventually(lambda: connections > 1)
    assert "up" not in owner.told


async def test_a_link_that_is_cut_while_it_connects_leaves_the_server_at_once() -> None:
    """Its CONNECT would end the connection of the node that owns the log now."""
    heard, left, holding = asyncio.Event(), asyncio.Event(), [True]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1_000)
        heard.set()
        with contextlib.suppress(OSError):
            await reader.read()
        left.set()
        writer.close()

    owner = Owner()
    async with stream_server(serve) as port:
        async with (
            linked(f"mqtt://127.0.0.1:{port}", owner, holds=lambda: holding[0]) as link,
            asyncio.timeout(CLOSED_SEC),
        ):
            await heard.wait()
            holding[0] = False
            link.cut()
            await left.wait()
    assert owner.told == []


@pytest.mark.parametrize("loop_of", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("way", ["abort", "close and abort", "goodbye"])
def test_what_is_under_way_when_a_link_is_cut_never_arrives(
    loop_of: Callable[[], asyncio.AbstractEventLoop], way: str
) -> None:
    """Another node may have sent something newer meanwhile."""

    async def fill_and_cut(server: socket.socket) -> socket.socket:
        ended = asyncio.Event()
        wire = Wire(lambda data: None, lambda error: ended.set(), lambda: None)
        await asyncio.get_running_loop().create_connection(lambda: wire, *server.getsockname())
        taken, _ = server.accept()
        wire.write(b"x" * 10_000_000)  # more than the system keeps for both sides
        await asyncio.sleep(0.01)
        if way == "goodbye":
            await wire.goodbye()
        else:
            if way == "close and abort":
                wire.close()
            wire.abort()
        async with asyncio.timeout(CLOSED_SEC):
            await ended.wait()
        return taken

    with socket.create_server(("127.0.0.1", 0)) as server, asyncio.Runner(loop_factory=loop_of) as runner:
        with runner.run(fill_and_cut(server)) as taken, pytest.raises(ConnectionResetError):
            b"".join(iter(lambda: taken.recv(1_000_000), b""))


@pytest.mark.parametrize("scheme", ["mqtt", "mqtts"])
def test_the_production_event_loop_works_too(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
    paths = f"certfile {tmp_path}/cert.pem\nkeyfile {tmp_path}/key.pem\n"

    async def round_trips(url: str) -> None:
        owner = Owner()
        async with linked(url, owner, subscriptions=["iotee/dev/+/rls"]) as link:
            await owner.until(lambda: link.up)
            assert link._connection is not None
            transport = link._connection._wire._transport
            assert transport is not None
            sock = transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
            for number in range(300):
                assert link.publish(rls(b"%05d" % number * 1_000, correlation=b"c"), owner.done)
            await owner.until(lambda: len(owner.messages) == len(owner.receipts) == 300)
            assert [payload[:5] for payload in owner.payloads] == [b"%05d" % number for number in range(300)]
            assert {message.correlation for message in owner.messages} == {b"c"}

    with another_mosquitto(tmp_path, paths if scheme == "mqtts" else "") as server:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(round_trips(server.url.replace("mqtt:", f"{scheme}:")))


async def test_a_failing_callback_affects_nothing_else(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = Owner()

    def fail(told: Receipt | Message) -> None:
        raise RuntimeError("planted")

    with capture_logs() as logs:
        async with linked(mosquitto.url, owner) as link, device(mosquitto) as door:
            await owner.until(lambda: link.up)
            assert link.publish(rls(), fail)
            assert link.publish(rls(), owner.done)
            await owner.until(lambda: owner.receipts != [])
            with monkeypatch.context() as broken:
                broken.setattr(owner, "message", fail)
                await door.publish("iotee/dev/door/ack", b"bad", qos=1)
                (line,) = await until_logged(logs, "mqtt.callback_failed")
            await door.publish("iotee/dev/door/ack", b"good", qos=1)
            await owner.until(lambda: owner.payloads == [b"good"])
            assert owner.told == ["up"]
    assert line["about"] == "iotee/dev/door/ack"
    assert [line["event"] for line in logs].count("mqtt.receipt_failed") == 1


async def test_a_bad_password_logs_one_line_per_try_and_is_tried_again(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run([program("mosquitto_passwd"), "-b", "-c", passwords, "ordain", "right"], check=True)
    strict = MINIMAL.replace("anonymous true", "anonymous false")
    with (
        another_mosquitto(tmp_path, f"password_file {passwords}\n", minimal=strict) as server,
        capture_logs() as logs,
    ):
        server_at = f"{server.host}:{server.port}"
        owner = Owner()
        async with linked(f"mqtt://ordain:wrong@{server_at}", owner):
            lines = await until_logged(logs, "mqtt.connect_failed", times=2)
        async with linked(f"mqtt://ordain:right@{server_at}", owner) as link:
            await owner.until(lambda: link.up)
    assert owner.told == ["up", "down"]
    assert "Not authorized" in lines[0]["why"]
    assert lines[0]["server"] == f"mqtt://{server_at}"
    assert "wrong" not in str(logs)
    assert {line["event"] for line in logs} == {"mqtt.connect_failed", "mqtt.link_up", "mqtt.link_down"}


def certificate(home: Path) -> None:
    """Creates a self-signed certificate for 127.0.0.1 and its key as `cert.pem` and `key.pem`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    signed = builder.add_extension(host, critical=False).sign(key, hashes.SHA256())
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (home / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (home / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))


async def test_tls_checks_the_certificate_and_loses_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate(tmp_path)
    paths = f"certfile {tmp_path}/cert.pem\nkeyfile {tmp_path}/key.pem\n"
    with another_mosquitto(tmp_path, paths) as server, capture_logs() as logs:
        url = server.url.replace("mqtt:", "mqtts:")
        owner = Owner()
        async with linked(url, owner):
            (line, *_) = await until_logged(logs, "mqtt.connect_failed")
            assert "CERTIFICATE_VERIFY_FAILED" in line["why"]
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        async with linked(url, owner, subscriptions=["iotee/dev/+/rls"]) as link:
            await owner.until(lambda: link.up)
            for number in range(300):
                assert link.publish(rls(b"%05d" % number * 1_000), owner.done)
            await owner.until(lambda: len(owner.messages) == len(owner.receipts) == 300)
            assert [payload[:5] for payload in owner.payloads] == [b"%05d" % number for number in range(300)]


async def test_a_private_authority_and_a_client_certificate_are_used(tmp_path: Path) -> None:
    certificate(tmp_path)
    cert, key = f"{tmp_path}/cert.pem", f"{tmp_path}/key.pem"
    paths = f"certfile {cert}\nkeyfile {key}\ncafile {cert}\nrequire_certificate true\n"
    with another_mosquitto(tmp_path, paths) as server:
        url = server.url.replace("mqtt:", "mqtts:")
        with capture_logs() as logs:
            async with linked(url, Owner(), tls=trust(cert)):
                await until_logged(logs, "mqtt.connect_failed")
        owner = Owner()
        async with linked(url, owner, tls=trust(cert, cert, key)) as link:
            await owner.until(lambda: link.up)
    with pytest.raises(OSError, match="No such file"):
        trust(f"{tmp_path}/no.pem")
    with pytest.raises(OSError, match=r"PEM|NO_CERT|no start line|KEY"):
        trust(cert, key)


async def test_the_link_waits_for_a_server_that_is_not_started_yet(tmp_path: Path) -> None:
    port = unused_port()
    server = Mosquitto(MINIMAL.format(port=port), port, tmp_path)
    owner = Owner()
    with capture_logs() as logs:
        async with linked(server.url, owner):
            await until_logged(logs, "mqtt.connect_failed")
            server.start()
            await owner.until(lambda: owner.told == ["up"])
    server.kill()


@pytest.mark.parametrize("scheme", ["mqtt", "mqtts"])
async def test_closing_does_not_wait_for_a_server_that_never_answers(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        owner = Owner()
        async with linked(f"{scheme}://127.0.0.1:{deaf.getsockname()[1]}", owner):
            async with asyncio.timeout(DEADLINE_SEC):
                connection, _ = await asyncio.to_thread(deaf.accept)
        connection.close()
    assert owner.told == []
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_closing_leaves_no_task_behind(mosquitto: Mosquitto) -> None:
    owner = Owner()
    async with linked(mosquitto.url, owner) as link:
        await owner.until(lambda: link.up)
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


@pytest.mark.parametrize(
    "url",
    [
        "http://host",
        "mqtt://",
        "mqtt://host?v=4",
        "mqtt://host?x=1",
        "mqtt://u:se/cret@host",
        "mqtt://u:secret@host/x",
        "mqtt://u:se@cret#secret@host",
        "mqtt://u:se#secret@host",
        "mqtt://u:se?secret@host",
        "mqtt://u:12?secret@host",
        "mqtt://u:se[secret@host",
        "mqtt://u:se%secret@host",
        "mqtt://u:se secret@host",
        "mqtt://u:se\nsecret@host",
        "mqtt://se@secret@host",
        "mqtt://u:secret@host#se",
        "mqtt://u:secret@host/#se",
    ],
)
def test_an_invalid_url_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="URL") as refused:
        parse_url(url)
    assert not {"se", "secret"} & set(str(refused.value).replace("'", " ").split())


@pytest.mark.parametrize(
    ("url", "password"),
    [
        ("mqtt://u:p%40ss%23w%25@host", "p@ss#w%"),
        ("mqtt://u:a:b!c$d&e'f(g)h*i+j,k;l=m~n@host", "a:b!c$d&e'f(g)h*i+j,k;l=m~n"),
        ("mqtt://u:pässwort@host", "pässwort"),
        ("mqtt://u@host", None),
    ],
)
def test_a_percent_encoded_password_is_decoded_and_harmless_characters_stay(
    url: str, password: str | None
) -> None:
    assert (parse_url(url).host, parse_url(url).password) == ("host", password)


def test_an_ipv6_address_keeps_its_brackets_where_it_is_joined_with_a_port() -> None:
    assert parse_url("mqtt://[::1]").shown == "mqtt://[::1]:1883"
    assert joined("::1", 80) == "[::1]:80"
    assert joined("::1", None) == "[::1]"
    assert joined("host", 80) == "host:80"
    assert parted("[::1]:80") == ("::1", 80)
    assert [parted(text) for text in ("::1:80", "[host]:80", "host", "host:", "host:٣", ":80")] == [None] * 6


@pytest.mark.parametrize("hangs_up_on", ["5", "3.1.1"])
async def test_a_server_that_hangs_up_on_a_connect_is_tried_with_the_other_version(
    hangs_up_on: str, mosquitto: Mosquitto
) -> None:
    """Such as RabbitMQ 3.10, which ends the connection when a CONNECT is of version 5."""
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(4_096)
        seen.append("5" if first[first.index(b"MQTT") + 4] == 5 else "3.1.1")
        if seen[-1] != hangs_up_on:
            up_reader, up_writer = await asyncio.open_connection(mosquitto.host, mosquitto.port)
            up_writer.write(first)
            await asyncio.gather(pump(reader, up_writer), pump(up_reader, writer))
        writer.close()

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(4_096):
            target.write(data)
        target.close()

    owner = Owner()
    async with stream_server(serve) as port:
        url = f"mqtt://127.0.0.1:{port}"
        with capture_logs() as logs:
            async with linked(url, owner) as link:
                await owner.until(lambda: link.up)
                assert link.version != hangs_up_on
        fixed = Owner()
        with capture_logs() as others:
            async with linked(f"{url}?v={hangs_up_on}", fixed) as link:
                await until_logged(others, "mqtt.connect_failed", times=5)
                assert link.version == hangs_up_on
    if hangs_up_on == "5":
        (line,) = [line for line in logs if line["event"] == "mqtt.other_version"]
        assert (line["tried"], line["next"]) == ("5", "3.1.1")
        assert "before its CONNACK" in logs[0]["why"]
        assert seen[:4] == ["5", "5", "5", "3.1.1"]
    assert fixed.told == []


@pytest.mark.parametrize("url", ["http://host", "mqtt://u:p@ss#hidden@host", "mqtt://host/hidden", "hidden"])
def test_an_agent_refuses_a_wrong_url_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match="URL") as refused:
        Agent("door", "dtok_x", url)
    assert "hidden" not in str(refused.value)


def test_the_text_of_a_url_hides_its_password() -> None:
    address = parse_url("mqtts://ordain:p%40ss@host?v=3.1.1")
    assert (address.port, address.tls, address.password, address.version) == (8883, True, "p@ss", "3.1.1")
    assert address.shown == "mqtts://host:8883"
