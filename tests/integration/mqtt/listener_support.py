"""A listener on a real socket, its owner, and the clients of the tests: aiomqtt, and raw packets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import aiomqtt
import msgspec

from broker.mqtt import packets as p
from broker.mqtt.access import Access, CheckService
from broker.mqtt.codec import Splitter, decode, encode
from broker.mqtt.listener import Listener
from broker.mqtt.packets import Packet
from broker.mqtt.services import Services
from broker.mqtt.sockets import Sockets
from broker.seams import Message, Outgoing, Receipt
from broker.settings import MqttLimits
from broker.subscriptions.feed import Feed
from devices.mqtt_url import Endpoint
from tests.integration.mqtt.test_link import CLOSED_SEC, DEADLINE_SEC, NODELAY

TOKENS = {name: f"dtok-{name}" for name in ("door", "gate")}
RLS, ACK, STATUS = "iotee/dev/door/rls", "iotee/dev/door/ack", "iotee/dev/door/status"
REFUSED = 0x80
V5, V311 = aiomqtt.ProtocolVersion.V5, aiomqtt.ProtocolVersion.V311
# So that nothing but what a test is about holds a client back, and nothing waits for a tick.
QUICK = MqttLimits(packets_per_sec=1e6, bytes_per_sec=1e9, tick_sec=0.02)


class Owner:
    """Whom the listener tells: it checks tokens, keeps what devices say, and gives PUBACKs if it may."""

    def __init__(self, *, takes: bool = True) -> None:
        self.listener: Listener
        self.takes = takes
        self.told: list[str] = []
        self.messages: list[Message] = []
        self.receipts: list[Receipt] = []
        self.tokens = dict(TOKENS)
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.certified: list[str] = []
        self._changed = asyncio.Event()

    async def check(self, hardware_id: str, token: str | None) -> str | None:
        if token is None:
            self.certified.append(hardware_id)
            return None if hardware_id in self.tokens else "nobody"
        right = self.tokens.get(hardware_id) == token
        self.asked.set()
        await self.may_answer.wait()
        return None if right else "wrong token"

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.messages]

    def link_up(self) -> None:
        self.told.append("up")

    def link_down(self, why: str) -> None:
        self.told.append("down")

    def device_online(self, hardware_id: str) -> None:
        self._tell(f"{hardware_id} online")

    def device_offline(self, hardware_id: str) -> None:
        self._tell(f"{hardware_id} offline")

    def _tell(self, what: str) -> None:
        self.told.append(what)
        self._changed.set()

    def message(self, message: Message) -> None:
        self.messages.append(message)
        if self.takes:
            asyncio.get_running_loop().call_soon(self.listener.puback, message)
        self._changed.set()

    def done(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)
        self._changed.set()

    @property
    def presence(self) -> list[str]:
        return [each for each in self.told if each not in ("up", "down")]

    def send(self, payload: bytes, topic: str = RLS, **more: Any) -> None:
        assert self.listener.publish(Outgoing(topic=topic, payload=payload, **more), self.done)

    async def until(self, fact: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_SEC):
            while not fact():
                self._changed.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await self._changed.wait()


class Server:
    def __init__(self, listener: Listener, sockets: Sockets) -> None:
        self.listener, self.sockets = listener, sockets
        self.host, self.port, _ = sockets.endpoints[0]

    @property
    def connected(self) -> int:
        return self.listener.connected


@contextlib.asynccontextmanager
async def listening(
    owner: Owner,
    *,
    check_service: CheckService | None = None,
    services: Services | None = None,
    endpoints: tuple[Endpoint, ...] = (Endpoint("127.0.0.1", 0),),
    certificates: Any = None,
    trusted_proxies: tuple[str, ...] = (),
    identity_field: Any = "cn",
    **limits: Any,
) -> AsyncIterator[Server]:
    bounds = msgspec.structs.replace(QUICK, **limits)
    access = Access(prefix="iotee", check_device=owner.check, check_service=check_service)
    # Where no service can come in, its feed is never asked.
    heard = services or Services(cast(Feed, None), access.events, lambda: "", lambda _: None)
    listener = owner.listener = Listener(access, owner, heard, bounds)
    sockets = Sockets(
        listener,
        endpoints,
        certificates=certificates,
        trusted_proxies=trusted_proxies,
        identity_field=identity_field,
    )
    listener.start()
    await sockets.open()
    try:
        yield Server(listener, sockets)
    finally:
        async with asyncio.timeout(CLOSED_SEC):
            await sockets.close()
            await listener.close()
        assert listener.crowd.all == {}
        assert listener.crowd.strangers == 0
        assert [task for task in asyncio.all_tasks() if _is_ours(task)] == []


def _is_ours(task: asyncio.Task[Any]) -> bool:
    """Whether the listener started it; clients and a core have tasks too."""
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and "/broker/mqtt/" in code.co_filename


def device(server: Server, name: str = "door", **more: Any) -> aiomqtt.Client:
    settings: dict[str, Any] = {"identifier": name, "username": name, "password": TOKENS.get(name)}
    settings |= {"socket_options": [NODELAY], "protocol": V5, "timeout": DEADLINE_SEC} | more
    return aiomqtt.Client(server.host, server.port, **settings)


class Raw:
    """A connection that sends byte for byte what a test wants, and reads packets."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, version: int) -> None:
        self.reader, self.writer, self.version = reader, writer, version
        self._splitter = Splitter(1_000_000)

    def say(self, *packets: Packet) -> None:
        self.writer.write(b"".join(encode(packet, self.version) for packet in packets))

    async def hear(self) -> Packet:
        async with asyncio.timeout(DEADLINE_SEC):
            while (cut := self._splitter.next()) is None:
                data = await self.reader.read(65_536)
                if not data:
                    raise EOFError
                self._splitter.put(data)
        return decode(*cut, self.version)

    async def ended(self) -> list[Packet]:
        """What still comes until the server closes the connection."""
        found = []
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                found.append(await self.hear())
        return found


def connect(name: str = "door", **more: Any) -> p.Connect:
    settings: dict[str, Any] = {"user": name, "password": TOKENS.get(name, "").encode()}
    return p.Connect(client_id=name, **settings | more)


@contextlib.asynccontextmanager
async def raw(server: Server, *, version: int = 5, greeting: bool = True, **more: Any) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection(server.host, server.port)
    client = Raw(reader, writer, version)
    try:
        if greeting:
            client.say(connect(version=version, **more))
            connack = await client.hear()
            assert isinstance(connack, p.Connack)
            assert connack.reason == 0
        yield client
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def said(payload: bytes, packet_id: int = 1, topic: str = ACK, **more: Any) -> p.Publish:
    return p.Publish(topic, payload, **{"qos": 1, "packet_id": packet_id} | more)


def subscribe(*topics: str, qos: int = 1) -> p.Subscribe:
    return p.Subscribe(9, [p.Filter(topic, qos) for topic in topics or (RLS,)])
