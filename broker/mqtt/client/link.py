"""The MQTT link: the broker's connection to its MQTT server. It reconnects until it is closed.

The link passes received messages on. It sends the PUBACK of a message only when the caller asks for it. It
makes no decisions, never sends a message twice, and drops its state when a connection ends. Only this module
uses private parts of aiomqtt and paho.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import aiomqtt
import structlog
from paho.mqtt import client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from broker.mqtt.client.packets import (
    PUBACK,
    PUBLISH,
    Splitter,
    acknowledgement,
    publish_packet,
    read_puback,
    read_publish,
    whole,
)
from broker.mqtt.client.receipts import Receipts
from broker.mqtt.client.wire import Wire
from broker.seams import Entropy, LinkEvents, Message, Outgoing, Receipt
from devices.mqtt_url import Version, parse_url
from devices.tls import trust

T = TypeVar("T")

logger = structlog.get_logger()

OPEN_WITHIN_SEC = 10
BACKOFF_SEC = (0.1, 5.0)
# The other MQTT version is tried after so many ends before a CONNACK. One end can have other reasons.
HANG_UPS = 3
# The MQTT server keeps the session, with queued answers, for 7 days: longer than a long weekend's outage.
SESSION_EXPIRY_SEC = 7 * 86_400
# Receive Maximum. The limit on answers a second is WINDOW / commit time, so the usual 20 is too low.
WINDOW = 1_000
REFUSED = 0x80
# CONNACK codes for "unsupported protocol version": 0x84 in MQTT 5, 1 from a server that knows only 3.1.1.
WRONG_VERSION = frozenset({1, 0x84})

_SILENT = logging.getLogger("broker.mqtt.aiomqtt")
_SILENT.disabled = True


def _code(answer: int | ReasonCode | None) -> int:
    return answer.value if isinstance(answer, ReasonCode) else answer or 0


class _Ended(aiomqtt.MqttError):
    """The connection ended while an answer of the server was awaited."""


class _HungUp(_Ended):
    """It ended before the server's CONNACK."""


class _Connection:
    """One TCP connection with its own aiomqtt client. Every reconnect makes a new `_Connection`, because a
    reused aiomqtt client floods the server with old messages.

    This class reads and writes PUBLISH and PUBACK itself. paho handles all other packets. paho uses the
    `Wire` as its socket, so paho never blocks.
    """

    def __init__(self, client: aiomqtt.Client, events: LinkEvents, *, version: Version) -> None:
        self.up = False
        self.receipts = Receipts()
        self._five = version == "5"
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._events = events
        self._aio = client
        self._paho = client._client
        self._paho.disable_logger()
        self._paho.on_disconnect = self._on_disconnect
        # There is no real socket for aiomqtt to watch. Without these callbacks paho writes at once.
        self._paho.on_socket_open = self._paho.on_socket_close = None
        self._paho.on_socket_register_write = self._paho.on_socket_unregister_write = None
        self._splitter = Splitter()
        self._inbox: deque[Message | tuple[int, int]] = deque()
        self._wire = Wire(self._received, self._ended)
        self._alive: asyncio.Task[None] | None = None
        self._subscribed: set[str] = set()

    async def open(self, host: str, port: int, tls: ssl.SSLContext | None, topics: Sequence[str]) -> None:
        """Connects and subscribes; returns when the server has granted every subscription. Messages wait in
        the inbox until `announce`.

        Raises:
            aiomqtt.MqttError: the server refused the connection or a subscription, or closed early.
            OSError: the TCP or TLS connection failed.
            TimeoutError: not done within OPEN_WITHIN_SEC.
        """
        async with asyncio.timeout(OPEN_WITHIN_SEC):
            # asyncio and uvloop both set TCP_NODELAY. Without it a round trip takes 88 ms instead of 0.7 ms.
            await self._loop.create_connection(lambda: self._wire, host, port, ssl=tls)
            self._paho._create_socket = lambda: self._wire  # type: ignore[method-assign]
            self._aio._client_connect()
            self._alive = asyncio.create_task(self._keep_alive())
            try:
                await self._answer(self._aio._connected)
            except _Ended as error:
                raise _HungUp(f"the server ended the connection before its CONNACK: {error}") from error
            await self.subscribe(topics, needed=True)

    async def subscribe(self, subscriptions: Sequence[str], *, needed: bool) -> None:
        """Subscribes; raises like `open`. A refusal of a topic that is not `needed` is only logged."""
        if not (new := [each for each in dict.fromkeys(subscriptions) if each not in self._subscribed]):
            return
        self._subscribed.update(new)
        granted = asyncio.create_task(self._aio.subscribe([(topic, 1) for topic in new]))
        try:
            codes = [_code(answer) for answer in await self._answer(granted)]
        finally:
            granted.cancel()
        if len(codes) != len(new):
            raise aiomqtt.MqttError(f"the server answered {len(new)} subscriptions with {len(codes)} codes")
        for topic, value in zip(new, codes, strict=True):
            if value >= REFUSED:
                logger.error("mqtt.subscription_refused", topic=topic, code=value)
                if needed:
                    raise aiomqtt.MqttError(f"the server refused the subscription to {topic}: {value:#04x}")

    async def _answer(self, answer: asyncio.Future[T]) -> T:
        """Waits for the server's answer or for the end of the connection, which aiomqtt would not notice."""
        either: set[asyncio.Future[Any]] = {answer, self.lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise _Ended(f"the connection ended too early: {self.lost.exception()}")
        return answer.result()

    async def _keep_alive(self) -> None:
        try:
            while self._paho.loop_misc() == paho.MQTT_ERR_SUCCESS:  # noqa: ASYNC110 - paho's clock
                await asyncio.sleep(1)
        except Exception as error:
            self._lose(error)

    def announce(self) -> None:
        self.up = True
        self._tell(self._events.link_up, "link_up")
        self._drain()

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        if not self.up:
            return False
        if len(self.receipts) >= WINDOW:
            # The send slots allow far fewer, so the server has stopped sending PUBACKs: reconnect.
            self._lose(aiomqtt.MqttError(f"{WINDOW} messages are not acknowledged"))
            return False
        mid = self.receipts.next_id()
        self._write(publish_packet(mid, outgoing, five=self._five))
        self.receipts.expect(mid, done)
        return True

    def puback(self, mid: int, qos: int) -> None:
        if self.up:
            self._write(acknowledgement(mid, qos))

    async def end(self) -> None:
        """Sends DISCONNECT if the connection is still open, and stops the tasks of this connection."""
        self.up = False
        self._lose(aiomqtt.MqttError("closed"))
        self.lost.exception()  # retrieved, so that asyncio does not log it as never retrieved
        if self._aio._connected.done():
            self._aio._connected.exception()
        if self._alive is not None:
            self._alive.cancel()
        self._paho.disconnect()
        await self._wire.goodbye()  # it closes before it waits, so a cancellation leaves no open socket

    def _write(self, packet: bytes) -> None:
        self._wire.write(packet)
        self._paho._last_msg_out = time.monotonic()  # paho sends PINGREQ only after a time without writes

    def _received(self, data: bytes) -> None:
        if self.lost.done():
            return  # no PUBACK is sent for this data, so the server sends it again on the next connection
        self._paho._last_bytes_received = time.monotonic()
        try:
            for first, body in self._splitter.feed(data):
                self._take(first, body)
                if self.lost.done():
                    break
        except Exception as error:  # a malformed packet: paho raises many exception types for it
            self._lose(error)
        self._drain()

    def _take(self, first: int, body: bytes) -> None:
        kind = first & 0xF0
        if kind == PUBLISH:
            self._inbox.append(read_publish(first, body, five=self._five, owner=self))
        elif kind == PUBACK:
            self._inbox.append(read_puback(body, five=self._five))
        else:
            self._wire.give(whole(first, body))
            self._paho.loop_read()

    def _ended(self, error: Exception | None) -> None:
        self._lose(error or aiomqtt.MqttError("the server closed the connection"))

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, reason: ReasonCode, _more: Any) -> None:
        self._lose(aiomqtt.MqttCodeError(reason, "the MQTT connection ended"))

    def _drain(self) -> None:
        while self.up and self._inbox:
            come = self._inbox.popleft()
            if isinstance(come, Message):
                self._tell(partial(self._events.message, come), come.topic)
            else:
                self.receipts.settle(*come)

    def _tell(self, call: Callable[[], None], about: str) -> None:
        try:
            call()
        except Exception:
            logger.exception("mqtt.callback_failed", about=about)

    def _lose(self, error: Exception) -> None:
        if not self.lost.done():
            self.lost.set_exception(error)


class MqttLink:
    """`broker.seams.Link` over a real MQTT server. Call `run` once, in a task; call `close` from anywhere.

    `why` says why the link is down; it is None while the link is up. `version` is the MQTT version of the
    current connection, or of the next attempt. Some servers end the connection when they do not know the
    version of a CONNECT (RabbitMQ 3.10). So after a few such ends the other version is tried, in turn, unless
    the URL says the version. `tls`: how an `mqtts` server is verified, else by the system's authorities.
    """

    direct = False

    def __init__(
        self,
        url: str,
        *,
        client_id: str,
        subscriptions: Sequence[str],
        events: LinkEvents,
        clean_session: bool,
        entropy: Entropy,
        keepalive: int = 10,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.address = parse_url(url)
        self.version: Version = self.address.version or "5"
        self.why: str | None = "not connected yet"
        self._client_id = client_id
        self._subscriptions = subscriptions
        self._more, self._wanted = list[str](), asyncio.Event()  # what the link can do without
        self._events = events
        self._clean_session = clean_session
        self._entropy = entropy
        self._keepalive = keepalive
        self._tls = (tls or trust()) if self.address.tls else None
        self._hung_up = 0  # in a row, on a CONNECT of this version
        self._connection: _Connection | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    @property
    def up(self) -> bool:
        return self._connection is not None and self._connection.up

    def publish(self, outgoing: Outgoing, done: Callable[[Receipt], None]) -> bool:
        return self._connection is not None and self._connection.publish(outgoing, done)

    def want(self, filters: Sequence[str]) -> None:
        """Subscribes to these topics too, now and at each reconnect. The link stays up if one is refused."""
        self._more += filters
        self._wanted.set()

    def listens(self, topic: str) -> bool:
        return True  # the server does not say

    def puback(self, message: Message, reason: int = 0, text: str = "") -> None:
        if message.token is not None:
            connection, mid = message.token
            connection.puback(mid, message.qos)

    async def run(self) -> None:
        """Keeps the link up until `close`."""
        self._task = asyncio.create_task(self._forever())
        try:
            await asyncio.wait({self._task})
        finally:
            await self.close()
        if not self._task.cancelled():
            self._task.result()

    async def close(self) -> None:
        self._closing = True
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=1)

    async def _forever(self) -> None:
        failures = 0
        while not self._closing:
            failures = 0 if await self._once() else failures + 1
            shortest, longest = BACKOFF_SEC
            # The exponent is bounded, because a float cannot hold 2 ** 2000.
            ceiling = min(longest, shortest * 2 ** min(failures + 1, 10))
            await asyncio.sleep(self._entropy.uniform(shortest, ceiling))

    async def _once(self) -> bool:
        """Opens one connection and waits until it ends. Returns whether the link was up."""
        connection = _Connection(self._client(), self._events, version=self.version)
        why = "closed"
        try:
            await connection.open(self.address.host, self.address.port, self._tls, self._subscriptions)
            self._more = [each for each in self._more if "+" in each]  # others were for retained messages
            await connection.subscribe(self._more, needed=False)
            self._up(connection)
            await self._lasts(connection)
            why = str(connection.lost.exception() or "the server ended the connection")
            return True
        except (aiomqtt.MqttError, OSError) as error:
            self._failed(error)
            return False
        finally:
            self._down(connection, why)
            await connection.end()

    async def _lasts(self, connection: _Connection) -> None:
        """Waits until the connection ends, and subscribes to what is wanted meanwhile."""
        while not connection.lost.done():
            self._wanted.clear()
            await connection.subscribe(self._more, needed=False)
            wanted: asyncio.Future[Any] = asyncio.create_task(self._wanted.wait())
            try:
                await asyncio.wait({wanted, connection.lost}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                wanted.cancel()

    def _client(self) -> aiomqtt.Client:
        five = self.version == "5"
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = 0 if self._clean_session else SESSION_EXPIRY_SEC
        properties.ReceiveMaximum = WINDOW
        return aiomqtt.Client(
            self.address.host,
            self.address.port,
            username=self.address.username,
            password=self.address.password,
            identifier=self._client_id,
            logger=_SILENT,
            protocol=aiomqtt.ProtocolVersion.V5 if five else aiomqtt.ProtocolVersion.V311,
            clean_session=None if five else self._clean_session,
            clean_start=self._clean_session if five else paho.MQTT_CLEAN_START_FIRST_ONLY,
            properties=properties if five else None,
            keepalive=self._keepalive,
            timeout=OPEN_WITHIN_SEC,
        )

    def _up(self, connection: _Connection) -> None:
        self._connection = connection
        self._hung_up, self.why = 0, None
        logger.info("mqtt.link_up", server=self.address.shown, version=self.version)
        connection.announce()

    def _down(self, connection: _Connection, why: str) -> None:
        if self._connection is connection:
            self._connection, self.why = None, why
            connection.up = False
            log = logger.info if self._closing else logger.warning
            log("mqtt.link_down", server=self.address.shown, why=why)
            connection._tell(partial(self._events.link_down, why), "link_down")
            connection.receipts.forget()

    def _failed(self, error: Exception) -> None:
        code = _code(error.rc) if isinstance(error, aiomqtt.MqttCodeError) else None
        if code in WRONG_VERSION and self.version == "5" and self.address.version is None:
            self.version = "3.1.1"
        self._hung_up = self._hung_up + 1 if isinstance(error, _HungUp) else 0
        if self._hung_up == HANG_UPS and self.address.version is None:
            self._hung_up, tried = 0, self.version
            self.version = "3.1.1" if tried == "5" else "5"
            logger.warning("mqtt.other_version", server=self.address.shown, tried=tried, next=self.version)
        self.why = str(error) or f"no answer within {OPEN_WITHIN_SEC} s"
        logger.warning("mqtt.connect_failed", server=self.address.shown, why=self.why)
